"""Tensors broadcast over a process group of the actor (rank 0) and the server's ranks.

The group is made as SGLang makes its side: a key-value store at the actor, keys under the group's name, then
gloo (tensors in CPU memory) or NCCL (CUDA). It is held as a bare backend, so torch's default group and its
list of groups are left alone: a process may have one of its own, or none. It stays open from update to
update and is thrown away after any failure; the next update makes another under a new name.

Nothing here can hang. Collectives run in the backend's own threads and are only looked at from here; what may
block (meeting the other ranks, and giving up a group whose peer is stuck) runs in daemon threads, which do
not keep the process alive. Whatever fails first, here or at the server, ends the update with its cause.

Store and gloo know no keys. On one host everything is bound to loopback; between hosts they belong on a
private network. NCCL, and servers with several ranks, are untested: there was no GPU where this was written.
"""

from __future__ import annotations

import asyncio
import ipaddress
import secrets
import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, TypeVar
from urllib.parse import urlsplit

import torch
import torch.distributed as dist

from cod_async.engines.sglang.protocol import TensorSpec
from cod_async.engines.sglang.pushes.base import Bucket, buckets, making_label
from cod_async.errors import EngineDownError, EngineError
from cod_async.weights.source import PublishedWeights

if TYPE_CHECKING:
    from cod_async.engines.sglang.client import ServerClient

T = TypeVar("T")

GroupBackend = Literal["gloo", "nccl"]

_FIRST_DEVICE: dict[GroupBackend, str] = {"gloo": "cpu", "nccl": "cuda"}
"""The device that torch files a backend's keys under."""
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.0005, 0.02
_CAUSE_S = 1.0
"""How long the server is given to say why, after the group broke."""
_STORE_BACKLOG = 1024


class _Group:
    """An open group: its name, and the only references to what keeps it open.

    Destroying a backend waits for broadcasts that nobody receives. So nothing else may refer to it, not even
    a frame in the traceback of what went wrong: the last reference is given up in a thread.
    """

    def __init__(self, name: str, backend: Any, store: Any) -> None:
        self.name = name
        self._held = [backend, store]

    def broadcast(self, tensors: Sequence[torch.Tensor]) -> list[Any]:
        """Begin to send tensors to all other ranks; return torch's works."""
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = 0, 0
        return [self._held[0].broadcast([tensor], options) for tensor in tensors]

    def leave(self) -> None:
        """Give the group up, without waiting for it; other ranks that wait for a message fail at once."""
        held, self._held = self._held, []

        def destroy() -> None:
            if held:
                with suppress(RuntimeError):
                    held[0].abort()
                held.clear()

        threading.Thread(target=destroy, name="leave process group", daemon=True).start()


class GroupPush:
    """Broadcasts: ``/update_weights_from_distributed``.

    Args:
        bucket_bytes: most bytes per message; larger tensors go alone.
        timeout_s: longest time to meet the other ranks, and to send one bucket.
        device: where tensors are sent from: ``cpu`` (gloo) or a CUDA device (NCCL), which must not be one of
            the server's; None: CUDA if this process sees a GPU. An empty ``CUDA_VISIBLE_DEVICES`` thus
            means gloo.
    """

    is_bracketed = True

    def __init__(self, *, bucket_bytes: int, timeout_s: float, device: str | None = None) -> None:
        self._bucket_bytes, self._timeout_s = bucket_bytes, timeout_s
        self._device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        self._group: _Group | None = None
        self._client: ServerClient | None = None
        self._stale_name = ""

    @property
    def is_open(self) -> bool:
        """Whether a group is open."""
        return self._group is not None

    async def prepare(self, client: ServerClient) -> None:
        """Meet the server's ranks, unless a group is open."""
        await self._ready(client)

    async def _ready(self, client: ServerClient) -> _Group:
        if self._group is None or self._client is not client:
            self._drop()
            self._group = await self._open(client)
            self._client = client
        return self._group

    async def push(self, client: ServerClient, source: PublishedWeights, *, is_flushing: bool) -> None:
        """See :class:`~.base.Push`."""
        group = await self._ready(client)
        parts = list(buckets(source.tensors(), self._bucket_bytes))
        try:
            # From here on the weights are neither the old nor the new ones, also if this process dies.
            await client.set_label(making_label(source.label))
            for number, bucket in enumerate(parts, 1):
                is_last = number == len(parts)
                label = source.label if is_last else making_label(source.label)
                await self._send(client, group, bucket, label, is_flushing=is_flushing and is_last)
        except BaseException:
            self._drop()
            raise

    async def aclose(self) -> None:
        """Leave the group and tell the server."""
        group, client = self._group, self._client
        self._drop()
        if group is not None and client is not None:
            with suppress(EngineError, TimeoutError):
                async with asyncio.timeout(_CAUSE_S):
                    await client.close_group(group.name)

    async def _open(self, client: ServerClient) -> _Group:
        if self._stale_name:
            stale, self._stale_name = self._stale_name, ""
            with suppress(EngineError):
                await client.close_group(stale)
        num_ranks = 1 + (await client.info()).tensor_parallel_size
        backend: GroupBackend = "nccl" if self._device.startswith("cuda") else "gloo"
        name = f"cod-{secrets.token_hex(6)}"
        # The store stands before the server hears of it: SGLang's scheduler would look for it, and do nothing
        # else, for half an hour.
        try:
            address, store = await asyncio.to_thread(_serve, client.url, num_ranks, self._timeout_s)
        except (OSError, RuntimeError) as error:
            raise EngineDownError(
                f"{client.url}: no store for a process group on this host ({_short(error)})"
            ) from None
        port = store.port
        joining = _in_daemon_thread(
            lambda: _join(store, address, name, num_ranks, backend, self._timeout_s), _Group.leave
        )
        asking = asyncio.ensure_future(
            client.open_group(
                address=address, port=port, rank_offset=1, world_size=num_ranks, group=name, backend=backend
            )
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                # A refusal at the server, or a failure here, is not waited for by the other side.
                await asyncio.wait((joining, asking), return_when=asyncio.FIRST_EXCEPTION)
                await asking
                return await joining
        except BaseException as error:
            self._stale_name = name
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)
            _disown(joining)
            if isinstance(error, EngineError) or not isinstance(error, Exception):
                raise
            raise EngineDownError(
                f"{client.url}: no {backend} process group of {num_ranks} ranks at {address}:{port} "
                f"within {self._timeout_s:g} s ({_short(error)})"
            ) from error

    async def _send(
        self, client: ServerClient, group: _Group, bucket: Bucket, label: str, *, is_flushing: bool
    ) -> None:
        """Broadcast a bucket while the server is asked to receive it.

        Raises:
            EngineError: the server's word, where it gives one.
            EngineDownError: the group broke, or a deadline passed.
        """
        specs = [
            TensorSpec(name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape))
            for name, tensor in bucket
        ]
        sent = [tensor.to(self._device).contiguous() for _, tensor in bucket]
        asking = asyncio.ensure_future(
            client.update_from_group(specs, group.name, label, is_flushing=is_flushing)
        )
        try:
            async with asyncio.timeout(self._timeout_s):
                await _sent(group.broadcast(sent), asking)
                await asking
        except TimeoutError:
            raise EngineDownError(
                f"{client.url}: {len(bucket)} tensors from {bucket[0][0]} on were not taken within "
                f"{self._timeout_s:g} s"
            ) from None
        except RuntimeError as error:
            await asyncio.wait((asking,), timeout=_CAUSE_S)
            said = asking.exception() if asking.done() and not asking.cancelled() else None
            raise EngineDownError(
                f"{client.url}: the process group broke while {bucket[0][0]} and {len(bucket) - 1} more "
                f"tensors were sent ({_short(error)})" + (f"; {said}" if said is not None else "")
            ) from None
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def _drop(self) -> None:
        """Give the group up; the server's ranks, if they wait for it, fail at once."""
        group, self._group, self._client = self._group, None, None
        if group is not None:
            self._stale_name = group.name
            group.leave()


async def _sent(works: Sequence[Any], asking: asyncio.Future[None]) -> None:
    """Wait until all broadcasts are done, or the server has refused.

    Raises:
        RuntimeError: a broadcast failed.
    """
    look_s = _FIRST_LOOK_S
    for work in works:
        while not work.is_completed():
            if asking.done() and (asking.cancelled() or asking.exception() is not None):
                await asking
            await asyncio.sleep(look_s)
            look_s = min(2 * look_s, _LONGEST_LOOK_S)
        work.wait()


def _serve(url: str, num_ranks: int, timeout_s: float) -> tuple[str, Any]:
    """Open a store where a server finds it; blocks for as long as looking its name up takes.

    Returns:
        The address, and the store, which lives as long as it is held.

    Raises:
        OSError, RuntimeError: no such address, no port.
    """
    address = _local_address(url)
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as listener:
        listener.bind((address, 0))
        listener.listen(_STORE_BACKLOG)
        port = int(listener.getsockname()[1])
        # With the listener given, torch binds nothing by itself (it would listen on all addresses).
        store = _classes().TCPStore(
            address,
            port,
            num_ranks,
            True,
            timedelta(seconds=timeout_s),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
    return address, store


def _join(
    store: Any, address: str, name: str, num_ranks: int, kind: GroupBackend, timeout_s: float
) -> _Group:
    """Meet the other ranks as rank 0; blocks for up to ``timeout_s`` and a little."""
    classes = _classes()
    view = store
    for prefix in (name, f"{name}/", f"{_FIRST_DEVICE[kind]}/"):
        view = classes.PrefixStore(prefix, view)
    timeout = timedelta(seconds=timeout_s)
    if kind == "gloo":
        options = classes.ProcessGroupGloo._Options()
        options._devices = [classes.ProcessGroupGloo.create_device(hostname=address)]
        options._threads = 2
        options._timeout = timeout
        return _Group(name, classes.ProcessGroupGloo(view, 0, num_ranks, options), store)
    options = classes.ProcessGroupNCCL.Options()
    options._timeout = timeout
    return _Group(name, classes.ProcessGroupNCCL(view, 0, num_ranks, options), store)


def _classes() -> Any:
    """The compiled part of torch.distributed, which has no complete annotations."""
    return torch._C._distributed_c10d


def _in_daemon_thread(make: Callable[[], T], give_back: Callable[[T], None]) -> asyncio.Future[T]:
    """Run something that may block for long; the process does not wait for it.

    Args:
        make: what to run.
        give_back: gets the result if nobody waits for it any more.
    """
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def deliver(result: T) -> None:
        if future.done():
            give_back(result)
        else:
            future.set_result(result)

    def fail(error: Exception) -> None:
        if not future.done():
            future.set_exception(error)

    def run() -> None:
        try:
            result = make()
        except Exception as error:
            with suppress(RuntimeError):  # the loop is closed
                loop.call_soon_threadsafe(fail, error)
            return
        with suppress(RuntimeError):
            loop.call_soon_threadsafe(deliver, result)

    threading.Thread(target=run, name="join process group", daemon=True).start()
    return future


def _disown(joining: asyncio.Future[_Group]) -> None:
    """Nobody wants the group any more, whether it comes about or has done so."""
    if not joining.cancel() and not joining.cancelled() and joining.exception() is None:
        joining.result().leave()


def _local_address(url: str) -> str:
    """Return the address of this host that a server is reached from: loopback for one on this host."""
    parts = urlsplit(url)
    host = parts.hostname or ""
    with suppress(ValueError):
        if ipaddress.ip_address(host).is_loopback:
            return host
    if host == "localhost":
        return "127.0.0.1"
    family, kind, protocol, _, target = socket.getaddrinfo(host, parts.port or 80, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, kind, protocol) as probe:
        probe.connect(target)  # sends nothing
        return str(probe.getsockname()[0])


def _short(error: BaseException) -> str:
    """Return an error's first line, without torch's stack."""
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
