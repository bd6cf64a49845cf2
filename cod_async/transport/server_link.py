"""The coordinator's link: sessions of :mod:`cod_async.wire.session` run over a pipe, one thread, no
callbacks.

:meth:`ServerLink.poll` returns what happened; the owner writes, commits, settles and flushes acks. Hello,
heartbeats, duplicates, refusals and expiry are dealt with inside.
"""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

from cod_async.config.schema import TransportConfig
from cod_async.errors import InputError, WireError
from cod_async.transport.file_pipe import FileServerPipe
from cod_async.transport.pipe import ServerPipe
from cod_async.transport.zmq_pipe import ZmqServerPipe
from cod_async.weights.manifest import Manifest
from cod_async.wire.codec import decode_for_coordinator, encode_body, frame_body
from cod_async.wire.messages import Hello, Role, ToClient
from cod_async.wire.session import Event, KnownSession, Outcome, Reply, ServerSessions, Session

log = logging.getLogger(__name__)

LOG_INTERVAL_S = 10.0
MAX_POLL_BYTES = 256 << 20


class ServerLink:
    """The coordinator's end of all connections. Not thread-safe.

    Args:
        bind: address to listen on (``transport.bind``); port 0 takes a free one; ``file:///folder`` is the
            file twin.
        run: run id; messages of other runs are refused.
        config: the transport's section of the config.
        allocate_session: called with the Hello of every new session; returns an epoch that grows, is at least
            1, and is durable when it returns.
        known_sessions: sessions that were live when an earlier coordinator of this run ended.
        preferred_address: address of that earlier coordinator, taken again if it can be had.
        bind_wait_s: how long to try a busy address.
        clock: monotonic seconds.

    Raises:
        InputError: the address is busy, malformed, or not loopback.
    """

    def __init__(
        self,
        bind: str,
        run: str,
        config: TransportConfig,
        *,
        allocate_session: Callable[[Hello], int],
        known_sessions: Iterable[KnownSession] = (),
        preferred_address: str | None = None,
        bind_wait_s: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._pipe = _listen(bind, config, preferred_address, bind_wait_s)
        self._run = run
        self._config = config
        self._clock = clock
        self._logged_at: dict[tuple[bytes, str], float] = {}
        self._sessions = ServerSessions(
            allocate=allocate_session,
            window_segments=config.credit_segments,
            window_bytes=config.credit_bytes,
            heartbeat_s=config.heartbeat_s,
            session_timeout_s=config.session_timeout_s,
            known=known_sessions,
            now=clock(),
        )
        self.counters: Counter[str] = Counter()

    @property
    def address(self) -> str:
        """The address clients connect to, with the real port."""
        return self._pipe.address

    @property
    def rejected(self) -> Counter[str]:
        """Refused messages by code, since the start."""
        return self._sessions.rejected

    @property
    def sessions(self) -> Mapping[int, Session]:
        """Live sessions by epoch."""
        return self._sessions.live

    def poll(self, timeout_s: float, max_messages: int = 512) -> list[Event]:
        """Wait up to ``timeout_s`` for messages and return up to ``max_messages`` events, in order of
        arrival.

        Events are :class:`~cod_async.wire.session.Opened`, ``Received`` and ``Closed``. Sends Welcome, Pong
        and Refused by itself. Call it at least once per heartbeat interval.
        """
        events: list[Event] = []
        num_bytes = 0
        for turn in range(max_messages):
            item = self._pipe.recv()
            if item is None and turn == 0 and timeout_s > 0:
                self._pipe.wait(timeout_s)
                item = self._pipe.recv()
            if item is None:
                break
            events.extend(self._take(*item))
            num_bytes += sum(map(len, item[1]))
            if num_bytes > MAX_POLL_BYTES:
                break
        events.extend(self._sessions.expire(self._clock()))
        return events

    def send(self, session: int, message: ToClient) -> bool:
        """Send a message to a client.

        Returns:
            Whether it was handed to the transport; False if the session is over or has no connection now.
            Even True is no
            proof of receipt: state must be told again when the client asks again.

        Raises:
            WireError: the message is malformed or larger than ``max_message_bytes``.
        """
        found = self._sessions.live.get(session)
        body = encode_body(message, max_message_bytes=self._config.max_message_bytes)
        if found is None or found.client_id is None:
            return False
        return self._deliver(found.client_id, session, body)

    def broadcast(self, message: ToClient, role: Role | None = None) -> int:
        """Send a message to every connected client (of one role) and return how many it was handed to."""
        body = encode_body(message, max_message_bytes=self._config.max_message_bytes)
        targets = [(s.client_id, s.session) for s in self._sessions.live.values() if role in (None, s.role)]
        return sum(
            self._deliver(client_id, session, body) for client_id, session in targets if client_id is not None
        )

    def settle(self, session: int, seq: int, drop_reason: str | None = None) -> None:
        """Note that a segment is committed, or dropped for good; the next flush acknowledges it."""
        self._sessions.settle(session, seq, drop_reason)

    def flush_acks(self) -> int:
        """Send one Ack to every client that has settled segments or new credit to hear of; return their
        number.

        Call it after the commit that covers everything settled since the last call.
        """
        replies = self._sessions.acks()
        self._reply(replies)
        return len(replies)

    def set_manifest(self, manifest: Manifest) -> None:
        """Tell clients that say Hello from now on of this policy version."""
        self._sessions.manifest = manifest

    def set_credit_open(self, is_open: bool) -> None:
        """Withdraw credit (the database is full) or give it again; takes effect with the next flush."""
        self._sessions.set_credit_open(is_open)

    def close(self, linger_s: float = 1.0) -> None:
        """Stop listening; what was sent may still leave for ``linger_s``."""
        self._pipe.close(linger_s)

    def _take(self, client_id: bytes, parts: list[bytes]) -> list[Event]:
        now = self._clock()
        try:
            envelope, message = decode_for_coordinator(
                parts, run=self._run, max_message_bytes=self._config.max_message_bytes
            )
        except WireError as error:
            outcome = Outcome()
            self._sessions.refuse(client_id, error.code, error.detail, now, outcome)
        else:
            outcome = self._sessions.receive(client_id, envelope, message, len(parts[1]), now)
        self._reply(outcome.replies)
        self._log_refusals(outcome, now)
        return outcome.events

    def _reply(self, replies: list[Reply]) -> None:
        for client_id, session, message in replies:
            try:
                body = encode_body(message, max_message_bytes=self._config.max_message_bytes)
            except WireError as error:  # one client's odd numbers must not end everybody's coordinator
                log.error("run %s: a %s was not sent: %s", self._run, type(message).__name__, error)
                continue
            self._deliver(client_id, session, body)

    def _deliver(self, client_id: bytes, session: int, body: bytes) -> bool:
        delivery = self._pipe.send(client_id, frame_body(body, run=self._run, session=session))
        self.counters[delivery] += 1
        if delivery == "gone":
            self._sessions.lost_route(client_id)
        return delivery == "sent"

    def _log_refusals(self, outcome: Outcome, now: float) -> None:
        """One line per peer and code every ten seconds; the counters have them all."""
        for reply in outcome.replies:
            code = getattr(reply.message, "code", None)
            key = (reply.client_id, str(code))
            if code is None or now - self._logged_at.get(key, -1e18) < LOG_INTERVAL_S:
                continue
            if len(self._logged_at) > 4096:
                self._logged_at.clear()
            self._logged_at[key] = now
            found = self._sessions.live.get(reply.session)
            who = f"{found.role} {found.name}" if found else f"connection {reply.client_id.hex()}"
            detail = getattr(reply.message, "detail", "")
            log.warning("run %s: refused a message of %s: %s: %s", self._run, who, code, detail)


def _listen(bind: str, config: TransportConfig, preferred: str | None, bind_wait_s: float) -> ServerPipe:
    if bind.startswith("file://"):
        path = Path(bind.removeprefix("file://"))
        if not path.is_absolute():
            raise InputError(f"transport.bind {bind!r}: write file:///absolute/folder")
        return FileServerPipe(path)
    return ZmqServerPipe(
        bind,
        max_message_bytes=config.max_message_bytes,
        queue_messages=2 * config.credit_segments + 256,
        preferred=preferred,
        bind_wait_s=bind_wait_s,
    )
