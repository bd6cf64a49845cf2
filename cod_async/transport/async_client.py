"""The actor's view of its link: the same operations as awaitables of one asyncio loop.

The I/O thread hops into the loop for every callback, so that handlers run where the lifecycles run and need
no locks.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any, overload

from cod_async.config.schema import TransportConfig
from cod_async.lifecycle.segment import Segment
from cod_async.transport.client_link import ClientLink
from cod_async.transport.connector import AddressSource
from cod_async.wire.messages import (
    Bye,
    Checkpointed,
    Heartbeat,
    LeaseRequest,
    Leases,
    LineageOpened,
    OpenLineage,
    Published,
    PublishRecorded,
    Role,
    StepBatch,
    StepDone,
    StepRecorded,
    StepRequest,
    ToClient,
    ToCoordinator,
)
from cod_async.wire.requests import Request


class AsyncClient:
    """A ClientLink for one asyncio loop. Arguments as :class:`ClientLink`; make it while the loop runs.

    ``on_message`` is called in the loop with every message that answers no request.
    """

    def __init__(
        self,
        address_source: AddressSource,
        role: Role,
        name: str,
        run: str,
        config: TransportConfig,
        on_message: Callable[[ToClient], object],
        *,
        max_outbox_segments: int = 1024,
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._on_message = on_message
        self.link = ClientLink(
            address_source, role, name, run, config, max_outbox_segments=max_outbox_segments
        )

    def start(self) -> None:
        """Start the link; it connects by itself and keeps trying."""
        self.link.start(on_message=self._hop)

    @property
    def num_unacked(self) -> int:
        """Segments handed over that are not settled."""
        return self.link.num_unacked

    @property
    def session(self) -> int:
        """The present session epoch; 0 before the first Welcome."""
        return self.link.session

    def set_heartbeat(self, source: Callable[[], Heartbeat]) -> None:
        """Set what heartbeats say. ``source`` runs on the I/O thread: it must only read."""
        self.link.set_heartbeat(source)

    async def send_segment(self, segment: Segment) -> int:
        """Hand a sealed segment over and return its outbox id; waits while the outbox is full, drops nothing.

        Raises:
            WireError: the segment cannot be sent (``too_large``, ``not_finite``, …); the link was closed.
            ProtocolRefusedError: the coordinator refused this client for good.
        """
        while True:
            await asyncio.wrap_future(self.link.room())
            # No other task runs between the answer and this call, so the room is still there, except when
            # many waited for the same one.
            if self.link.num_unacked < self.link.max_outbox_segments:
                return self.link.send_segment(segment, timeout_s=0.0)

    async def wait_settled(self, outbox_id: int) -> str:
        """Wait until a segment is settled; return ``"acked"`` or the reason of its drop (``fenced``, …)."""
        return await asyncio.wrap_future(self.link.settlement(outbox_id))

    @overload
    async def request(self, message: LeaseRequest) -> Leases: ...
    @overload
    async def request(self, message: OpenLineage) -> LineageOpened: ...
    @overload
    async def request(self, message: StepRequest) -> list[StepBatch]: ...
    @overload
    async def request(self, message: StepDone) -> StepRecorded: ...
    @overload
    async def request(self, message: Published | Checkpointed) -> PublishRecorded: ...

    async def request(self, message: Request) -> Any:
        """Send a request until it is answered and return the answer; cancelling gives it up."""
        return await asyncio.wrap_future(self.link.request_future(message))

    def send(self, message: ToCoordinator) -> None:
        """Send a one-way message (LeaseReturn), once, after the segments handed over before it."""
        self.link.send(message)

    async def close(self, bye: Bye | None = None, *, drain_s: float = 0.0) -> bool:
        """Wait up to ``drain_s`` for an empty outbox, say Bye, end; return whether all was settled."""
        return await asyncio.to_thread(self.link.close, bye, drain_s=drain_s)

    def _hop(self, message: ToClient) -> None:
        with contextlib.suppress(RuntimeError):  # the loop has ended; nobody is left to tell
            self._loop.call_soon_threadsafe(self._on_message, message)
