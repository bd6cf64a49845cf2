"""A small coordinator on the real link: threads and sockets are real, its database is a dictionary."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

from msgspec.structs import replace
from wire_samples import MANIFEST, RUN

from cod_async.config.schema import TransportConfig
from cod_async.lifecycle.segment import SegmentKey
from cod_async.transport.client_link import ClientLink
from cod_async.transport.server_link import ServerLink
from cod_async.wire import messages as m
from cod_async.wire.session import Closed, Event, KnownSession, Received

CONFIG = TransportConfig(
    heartbeat_s=0.1, session_timeout_s=5.0, resend_s=0.2, credit_segments=8, max_message_bytes=1 << 16
)

IMPATIENT = replace(CONFIG, session_timeout_s=0.6)


class Coordinator:
    """A coordinator on a thread: commits into a dictionary that outlives it, answers requests."""

    def __init__(self, bind: str = "tcp://127.0.0.1:0", config: TransportConfig = CONFIG) -> None:
        self.bind, self.config = bind, config
        self.committed: dict[SegmentKey, int] = {}
        self.known: dict[int, KnownSession] = {}
        self.events: list[Event] = []
        self.replies: dict[type, Callable[[Any], list[m.ToClient]]] = {}
        self.is_committing = True
        self.address: str | None = None
        self.epoch = 0

    def start(self) -> Coordinator:
        self.link = ServerLink(
            self.bind,
            RUN,
            self.config,
            allocate_session=self._allocate,
            known_sessions=list(self.known.values()),
            preferred_address=self.address,
        )
        self.link.set_manifest(MANIFEST)
        self.address = self.link.address
        self._is_running = True
        self._thread = threading.Thread(target=self._loop)
        self._thread.start()
        return self

    def stop(self) -> None:
        """End like a killed process: nothing is flushed, nobody is told."""
        self._is_running = False
        self._thread.join()
        self.link.close(linger_s=0.0)

    def of(self, kind: type) -> list[object]:
        return [
            e.message for e in list(self.events) if isinstance(e, Received) and isinstance(e.message, kind)
        ]

    def _allocate(self, hello: m.Hello) -> int:
        self.epoch += 1
        self.known[self.epoch] = KnownSession(self.epoch, hello.role, hello.name)
        return self.epoch

    def _loop(self) -> None:
        held: list[tuple[int, m.SegmentData]] = []
        while self._is_running:
            for event in self.link.poll(0.01):
                self.events.append(event)
                match event:
                    case Received(session, m.SegmentData() as data, _):
                        held.append((session.session, data))
                    case Received(session, message, _):
                        for reply in self.replies.get(type(message), lambda _: [])(message):
                            self.link.send(session.session, reply)
                    case Closed(session, _):
                        self.known.pop(session.session, None)
            if self.is_committing:
                for session, data in held:
                    is_new = data.segment.key not in self.committed
                    self.committed[data.segment.key] = self.committed.get(data.segment.key, 0) + is_new
                    self.link.settle(session, data.seq, None if is_new else "duplicate")
                held.clear()
            self.link.flush_acks()


def client_of(coordinator: Coordinator, name: str = "actor-0", **options: Any) -> ClientLink:
    return ClientLink(lambda: coordinator.address, "actor", name, RUN, CONFIG, **options)


def wait_for(condition: Callable[[], object], timeout_s: float = 20.0) -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, "it did not happen"
        time.sleep(0.005)
