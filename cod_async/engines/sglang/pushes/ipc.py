"""CUDA memory handed over on the same host: the server copies out of the actor's own GPU buffers.

Untested: there was no GPU where this was written.

What travels is a list of (name, CUDA-IPC handle) in the one format that SGLang reads, which is Python's own
object format. It is the project's named exception to writing that: only handles of this process's CUDA
storages are put in, only towards a server on a loopback address, and nothing of the kind is ever read here.
The GPU travels by its UUID, so a server that does not have the same GPU says so instead of reading another
one's memory. CPU tensors are refused: a server that is given those of an unrelated process dies of them.
"""

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Callable, Sequence
from multiprocessing.reduction import ForkingPickler
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import torch
from torch.multiprocessing import reductions

from cod_async import loopback
from cod_async.engines.sglang.pushes.base import buckets, making_label
from cod_async.errors import EngineError, EngineMismatchError
from cod_async.weights.source import PublishedWeights

if TYPE_CHECKING:
    from cod_async.engines.sglang.client import ServerClient

_DEVICE_INDEX = 6
"""Place of the GPU's index among the arguments that rebuild a CUDA tensor."""

Reduced = tuple[Callable[..., Any], tuple[Any, ...]]


class IpcPush:
    """CUDA-IPC handles: ``/update_weights_from_tensor``. For servers with one rank.

    Args:
        bucket_bytes: most bytes on the GPU at once; larger tensors go alone.
        device: where the handed-over copies lie; it must be the server's GPU.
    """

    is_bracketed = True

    def __init__(self, *, bucket_bytes: int, device: str = "cuda") -> None:
        self._bucket_bytes, self._device = bucket_bytes, device

    async def prepare(self, client: ServerClient) -> None:
        """Check that handles can work at all."""
        if not is_loopback(client.url):
            raise EngineMismatchError(
                f"{client.url}: CUDA memory can only be handed over on this host, by a loopback address; "
                'set weights.into_engine to "group" or "disk"'
            )
        if not torch.cuda.is_available():
            raise EngineMismatchError(
                f"{client.url}: CUDA memory cannot be handed over, this process sees no GPU; "
                'set weights.into_engine to "group" or "disk"'
            )
        num_ranks = (await client.info()).tensor_parallel_size
        if num_ranks != 1:
            raise EngineMismatchError(
                f"{client.url} has {num_ranks} ranks, CUDA memory is handed over to one; "
                'set weights.into_engine to "group" or "disk"'
            )

    async def push(self, client: ServerClient, source: PublishedWeights, *, is_flushing: bool) -> None:
        """See :class:`~.base.Push`."""
        parts = list(buckets(source.tensors(), self._bucket_bytes))
        await client.set_label(making_label(source.label))
        for number, bucket in enumerate(parts, 1):
            is_last = number == len(parts)
            label = source.label if is_last else making_label(source.label)
            # Both lists stay until the server has answered: it reads this very memory.
            held = [(name, tensor.to(self._device)) for name, tensor in bucket]
            torch.cuda.synchronize()
            text = serialized_handles(held)
            await client.update_from_handles([text], label, is_flushing=is_flushing and is_last)
            del held
            await asyncio.to_thread(torch.cuda.ipc_collect)

    async def aclose(self) -> None:
        """Nothing to let go of."""


def is_loopback(url: str) -> bool:
    """Whether a url names this host by a loopback address."""
    return loopback.is_loopback(urlsplit(url).hostname or "")


def serialized_handles(tensors: Sequence[tuple[str, torch.Tensor]]) -> str:
    """Return base64 text with names and CUDA-IPC handles. The tensors must stay alive until it was used.

    Raises:
        EngineError: a tensor is not in CUDA memory; it is named.
    """
    for name, tensor in tensors:
        if not tensor.is_cuda:
            raise EngineError(
                f"tensor {name} is in {tensor.device.type} memory; only CUDA memory can be handed over"
            )
    buffer = io.BytesIO()
    _HandleWriter(buffer).dump([(name, tensor.detach()) for name, tensor in tensors])
    return base64.b64encode(buffer.getvalue()).decode()


class _HandleWriter(ForkingPickler):
    """Writes tensors as handles with the GPU's UUID."""

    def reducer_override(self, obj: Any) -> Any:
        return reduced(obj) if isinstance(obj, torch.Tensor) else NotImplemented


def reduced(tensor: torch.Tensor) -> Reduced:
    """Return how a CUDA tensor is rebuilt elsewhere, the GPU named by its UUID."""
    reduce_tensor: Callable[[torch.Tensor], Reduced] = reductions.reduce_tensor
    rebuild, arguments = reduce_tensor(tensor)
    uuid = str(torch.cuda.get_device_properties(arguments[_DEVICE_INDEX]).uuid)
    return rebuild, (*arguments[:_DEVICE_INDEX], uuid, *arguments[_DEVICE_INDEX + 1 :])
