"""What the ways into a server have in common: the protocol, buckets, and the label of half-made weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Protocol

import torch

from cod_async.config.schema import ServerConfig, WeightsConfig
from cod_async.weights.source import PublishedWeights

if TYPE_CHECKING:
    from cod_async.engines.sglang.client import ServerClient

Bucket = list[tuple[str, torch.Tensor]]


class Push(Protocol):
    """A way to bring published weights into one server."""

    @property
    def is_bracketed(self) -> bool:
        """Whether the server wants to be told when an update begins and ends."""
        ...

    async def prepare(self, client: ServerClient) -> None:
        """Do what need not wait until the server is paused; may be called again and again.

        Raises:
            EngineError: the server cannot take weights up in this way; it is said why.
        """
        ...

    async def push(self, client: ServerClient, source: PublishedWeights, *, is_flushing: bool) -> None:
        """Bring a version into the server, which calls its weights ``source.label`` afterwards.

        Args:
            client: the server; always the same one.
            source: what to bring.
            is_flushing: also drop the server's cached prefixes.

        Raises:
            EngineDownError: the server, or the way to it, broke; in which state its weights are is unknown
                unless its label says so.
            EngineRefusedError: the server did not take them.
            EngineError: this way is not possible here.
        """
        ...

    async def aclose(self) -> None:
        """Let go of everything; never raises, never waits for the server for long."""
        ...


def push_for(weights: WeightsConfig, server: ServerConfig) -> Push:
    """Return a new push of the kind that ``weights.into_engine`` names."""
    from cod_async.engines.sglang.pushes.disk import DiskPush
    from cod_async.engines.sglang.pushes.group import GroupPush
    from cod_async.engines.sglang.pushes.ipc import IpcPush

    if weights.into_engine == "disk":
        return DiskPush()
    if weights.into_engine == "group":
        return GroupPush(bucket_bytes=weights.bucket_bytes, timeout_s=server.update_timeout_s)
    return IpcPush(bucket_bytes=weights.bucket_bytes)


def making_label(label: str) -> str:
    """Return what weights are called that are partly those of ``label`` and partly others.

    It names no version, so tokens that were sampled from such weights belong to none.
    """
    return f"making-{label}"


def buckets(tensors: Mapping[str, torch.Tensor], bucket_bytes: int) -> Iterator[Bucket]:
    """Yield all tensors in their order, in lists of at most ``bucket_bytes``; a larger one comes alone."""
    bucket: Bucket = []
    num_bytes = 0
    for name, tensor in tensors.items():
        if bucket and num_bytes + tensor.nbytes > bucket_bytes:
            yield bucket
            bucket, num_bytes = [], 0
        bucket.append((name, tensor))
        num_bytes += tensor.nbytes
    if bucket:
        yield bucket
