"""The client's half of a session, as a pure state machine: greeting, outbox, credit, resending, fences,
heartbeats.

The machine owns what must survive a lost connection: sealed segments that are not acknowledged, and open
requests. It is told of time, of a fresh connection and of every decoded message, and says what to send next;
it never reads a clock and never touches a socket. See :mod:`cod_async.wire.session` for the protocol.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from cod_async.wire.codec import encode_body, segment_body
from cod_async.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Fence,
    Heartbeat,
    Hello,
    LeaseRef,
    Pong,
    Refused,
    Role,
    ToClient,
    Welcome,
)
from cod_async.wire.requests import Reply, Requests

State = Literal["offline", "greeting", "open", "refused"]
FENCED_BEFORE_SEND = "fenced_before_send"
MAX_BACKOFF = 3  # unacknowledged segments are repeated after 1, 2, 4, 8, 8, … times ``resend_s``


class Outgoing(NamedTuple):
    """A body to put an envelope before and send: ``session`` belongs into the envelope."""

    session: int
    body: bytes


@dataclass(slots=True)
class Incoming:
    """What a received message led to.

    Attributes:
        settled: outbox ids that are settled, with None for acknowledged or the reason of the drop.
        replies: completed requests, as (request id, reply).
        is_for_owner: whether the message should be shown to the owner (Welcome, Stop, Fence, NewVersion,
            fatal Refused).
    """

    settled: list[tuple[int, str | None]] = field(default_factory=list)
    replies: list[tuple[int, Reply]] = field(default_factory=list)
    is_for_owner: bool = False


@dataclass(slots=True)
class _Entry:
    """A sealed segment in the outbox; ``seq`` 0 means not sent in this session, ``is_known`` sent in any."""

    outbox_id: int
    raw: bytes
    lease: LeaseRef | None
    seq: int = 0
    body: bytes = b""
    send_at: float = 0.0
    num_sends: int = 0
    is_known: bool = False


class ClientSession:
    """One client's session. Not thread-safe; its owner calls it from one thread.

    Args:
        role: ``actor``, ``learner`` or ``observer``.
        name: unique name of the client in its run; a newer process with the same name replaces an older one.
        pid, host: for people.
        instance: random number of this process, 1 .. 2^62.
        resend_s: seconds until an unacknowledged segment, request or Hello is first repeated.
        heartbeat_s, session_timeout_s: until Welcome says what the coordinator wants.
    """

    def __init__(
        self,
        *,
        role: Role,
        name: str,
        pid: int,
        host: str,
        instance: int,
        resend_s: float = 2.0,
        heartbeat_s: float = 1.0,
        session_timeout_s: float = 5.0,
    ) -> None:
        self.state: State = "offline"
        self.session = 0
        self.heartbeat_s = heartbeat_s
        self.session_timeout_s = session_timeout_s
        self.heartbeat: Callable[[], Heartbeat] = Heartbeat
        self.requests = Requests(resend_s)
        self.refused: Refused | None = None
        self.num_resent = 0
        self._hello = Hello(
            role=role, name=name, protocol=PROTOCOL_VERSION, pid=pid, host=host[:4096], instance=instance
        )
        self._resend_s = resend_s
        self._dead_session = 0
        self._next_id = 1
        self._unsent: deque[_Entry] = deque()
        self._in_flight: dict[int, _Entry] = {}
        self._oneway: deque[tuple[int, bytes]] = deque()
        self._credit_segments = self._credit_bytes = 0
        self._last_seq = self._sent_bytes = self._settled_bytes = 0
        self._resend_at = self._hello_at = self._heartbeat_at = 0.0
        self._num_hellos = 0
        self._heard_at = 0.0

    # ----------------------------------------------------------------------------------- what the owner wants

    @property
    def num_unacked(self) -> int:
        """Segments in the outbox: not sent, or sent and not settled."""
        return len(self._unsent) + len(self._in_flight)

    @property
    def num_unsent(self) -> int:
        """Segments in the outbox that wait for credit or a connection."""
        return len(self._unsent)

    @property
    def num_oneway(self) -> int:
        """One-way messages that wait to be sent."""
        return len(self._oneway)

    @property
    def credit(self) -> tuple[int, int]:
        """Segments and bytes that may still be sent."""
        return self._credit_segments - self._last_seq, self._credit_bytes - self._sent_bytes

    def offer(self, raw_segment: bytes, lease: LeaseRef | None = None) -> int:
        """Put a sealed segment (from ``codec.encode_segment``) into the outbox; return its id (1, 2, …)."""
        entry = _Entry(self._next_id, raw_segment, lease)
        self._next_id += 1
        self._unsent.append(entry)
        return entry.outbox_id

    def say(self, body: bytes, *, is_last: bool = False) -> None:
        """Queue a message that is sent once, after the segments offered before it (``is_last``: at once)."""
        if is_last:
            self._oneway = deque((0, earlier) for _, earlier in self._oneway)
        self._oneway.append((0 if is_last else self._next_id, body))

    # ------------------------------------------------------------------------------------------ what happened

    def connected(self, now: float) -> None:
        """A fresh connection was made (or is being made): greet."""
        if self.state != "refused":
            self._greet(now)

    def disconnected(self) -> None:
        """The connection was given up."""
        if self.state != "refused":
            self.state = "offline"

    def is_peer_dead(self, now: float) -> bool:
        """Whether nothing was heard for ``session_timeout_s``; then make a new connection."""
        return self.silence_s(now) > self.session_timeout_s

    def silence_s(self, now: float) -> float:
        """Seconds since anything was heard on this connection."""
        return 0.0 if self.state in ("offline", "refused") else now - self._heard_at

    def receive(self, session: int, message: ToClient, now: float) -> Incoming:
        """Take a decoded message whose envelope named ``session``."""
        self._heard_at = now
        incoming = Incoming()
        match message:
            case Welcome():
                incoming.is_for_owner = self._welcomed(message, now)
            case Refused() if session in (0, self.session):
                incoming.is_for_owner = self._refused(session, message, now)
            case _ if session != self.session or self.state == "refused":
                pass  # left over from an earlier session
            case Ack():
                self._acked(message, incoming)
            case Fence():
                self._fenced(message, incoming)
                incoming.is_for_owner = True
            case Pong():
                pass  # heard, which is all it is for
            case _:
                incoming.replies, is_matched = self.requests.receive(message, now)
                incoming.is_for_owner = not is_matched
        return incoming

    # -------------------------------------------------------------------------------------- what to send next

    def next_outgoing(self, now: float) -> Outgoing | None:
        """Return the next message to send, or None; call again until None while the socket takes messages."""
        if self.state == "greeting":
            return self._next_hello(now)
        if self.state != "open":
            return None
        if self._heartbeat_at <= now:
            self._heartbeat_at = now + self.heartbeat_s
            return Outgoing(self.session, encode_body(self.heartbeat()))
        body = (
            self.requests.next_due(now)
            or self._next_oneway()
            or self._next_resend(now)
            or self._next_new(now)
        )
        return None if body is None else Outgoing(self.session, body)

    def deadline(self, now: float) -> float:
        """Return the time at which :meth:`next_outgoing` or :meth:`is_peer_dead` may change by time alone."""
        if self.state in ("offline", "refused"):
            return now + self.heartbeat_s
        dead_at = self._heard_at + self.session_timeout_s
        times = [dead_at] if dead_at > now else []  # a peer that is dead already does not die again
        if self.state == "greeting":
            times.append(self._hello_at)
        else:
            times.append(self._heartbeat_at)
            times.extend(at for at in (self.requests.deadline(), self._resend_at) if at is not None)
        return max(now, min(times))

    # ----------------------------------------------------------------------------------------------- greeting

    def _greet(self, now: float) -> None:
        self.state = "greeting"
        self._hello_at, self._num_hellos = now, 0
        self._heard_at = now

    def _next_hello(self, now: float) -> Outgoing | None:
        if self._hello_at > now:
            return None
        self._hello_at = now + self._resend_s * (1 << min(self._num_hellos, MAX_BACKOFF))
        self._num_hellos += 1
        old = self._hello
        hello = Hello(
            role=old.role,
            name=old.name,
            protocol=old.protocol,
            pid=old.pid,
            host=old.host,
            instance=old.instance,
            session=self.session,
            last_seq=self._last_seq,
            unacked=sorted(self._in_flight),
            settled_bytes=self._settled_bytes,
        )
        return Outgoing(self.session, encode_body(hello))

    def _welcomed(self, welcome: Welcome, now: float) -> bool:
        """Open the session; return whether the owner should know."""
        if self.state == "refused" or welcome.session < self.session or welcome.session <= self._dead_session:
            return False
        if welcome.session == self.session:
            self._credit_segments = max(self._credit_segments, welcome.credit_segments)
            self._credit_bytes = max(self._credit_bytes, welcome.credit_bytes)
            if self.state == "open":
                return False
        else:
            self._renumber()
            self.session = welcome.session
            self._credit_segments, self._credit_bytes = welcome.credit_segments, welcome.credit_bytes
        self.state = "open"
        self.heartbeat_s, self.session_timeout_s = welcome.heartbeat_s, welcome.session_timeout_s
        self._heartbeat_at = now
        for entry in self._in_flight.values():
            entry.send_at, entry.num_sends = now, 0
        self._resend_at = now
        self.requests.repeat_all(now)
        return True

    def _renumber(self) -> None:
        """A new session counts anew: everything that is not settled is offered again, in its old order."""
        entries = sorted([*self._in_flight.values(), *self._unsent], key=lambda entry: entry.outbox_id)
        for entry in entries:
            entry.seq, entry.body, entry.num_sends = 0, b"", 0
        self._unsent = deque(entries)
        self._in_flight = {}
        self._last_seq = self._sent_bytes = self._settled_bytes = 0

    def _refused(self, session: int, refused: Refused, now: float) -> bool:
        if refused.is_fatal:
            self.state, self.refused = "refused", refused
            return True
        if self.state == "refused":
            return False
        if refused.code == "session_expired" and session == self.session != 0:
            self._dead_session = self.session
            self._renumber()
            self.session = 0
            self._greet(now)
        elif refused.code == "hello_first" and self.state == "open":
            self._greet(now)
        return False

    # ------------------------------------------------------------------------------------------------- outbox

    def _next_oneway(self) -> bytes | None:
        if self._oneway and (not self._unsent or self._unsent[0].outbox_id >= self._oneway[0][0]):
            return self._oneway.popleft()[1]
        return None

    def _next_resend(self, now: float) -> bytes | None:
        if self._resend_at > now:
            return None
        for entry in self._in_flight.values():
            if entry.send_at <= now:
                self._sent(entry, now)
                self.num_resent += 1
                return entry.body
        self._resend_at = min(
            (entry.send_at for entry in self._in_flight.values()), default=now + self._resend_s
        )
        return None

    def _next_new(self, now: float) -> bytes | None:
        if not self._unsent or self._last_seq >= self._credit_segments:
            return None
        entry = self._unsent[0]
        if not entry.body:
            entry.body = segment_body(self._last_seq + 1, entry.raw)
        # One segment larger than the whole window may travel alone; otherwise it could never be sent.
        if self._sent_bytes + len(entry.body) > self._credit_bytes and self._in_flight:
            return None
        self._unsent.popleft()
        self._last_seq += 1
        entry.seq = self._last_seq
        self._sent_bytes += len(entry.body)
        self._in_flight[entry.seq] = entry
        self._sent(entry, now)
        self._resend_at = min(self._resend_at, entry.send_at) if len(self._in_flight) > 1 else entry.send_at
        return entry.body

    def _sent(self, entry: _Entry, now: float) -> None:
        entry.send_at = now + self._resend_s * (1 << min(entry.num_sends, MAX_BACKOFF))
        entry.num_sends += 1
        entry.is_known = True

    def _acked(self, ack: Ack, incoming: Incoming) -> None:
        for seq in ack.seqs:
            entry = self._in_flight.pop(seq, None)
            if entry is not None:
                self._settled_bytes += len(entry.body)
                incoming.settled.append((entry.outbox_id, ack.dropped.get(str(seq))))
        self._credit_segments = max(self._credit_segments, ack.credit_segments)
        self._credit_bytes = max(self._credit_bytes, ack.credit_bytes)

    def _fenced(self, fence: Fence, incoming: Incoming) -> None:
        """Drop what was never sent; what was sent, in this session or an earlier one, may be committed
        already, so its ack decides.
        """
        fenced = set(fence.leases)
        kept: deque[_Entry] = deque()
        for entry in self._unsent:
            if entry.lease in fenced and not entry.is_known:
                incoming.settled.append((entry.outbox_id, FENCED_BEFORE_SEND))
            else:
                kept.append(entry)
        self._unsent = kept
