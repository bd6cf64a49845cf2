"""The coordinator's half of all sessions, as a pure state machine: epochs, duplicates, credit, acks, expiry.

Between two commits the coordinator takes messages, writes them, commits, tells :meth:`ServerSessions.settle`
which sequence numbers are settled, and sends what :meth:`ServerSessions.acks` returns: one Ack per client and
commit, however many segments it covers. The machine keeps nothing that must survive a restart except the
session epochs, which the owner persists when it allocates them; the rest a returning client tells in its
Hello. See :mod:`cod_async.wire.session`.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from cod_async.weights.manifest import Manifest
from cod_async.wire.codec import Envelope, refusal
from cod_async.wire.messages import (
    PROTOCOL_VERSION,
    Ack,
    Bye,
    Heartbeat,
    Hello,
    Pong,
    Refused,
    Role,
    SegmentData,
    ToClient,
    ToCoordinator,
    Welcome,
)
from cod_async.wire.seqs import MAX_SPREAD, SeqSet

MAX_REMEMBERED = 4096
MAX_REPLACED = 3
MAX_SEQ = 1 << 60
"""No session comes this far; beyond it, cumulative credit would no longer fit its message."""
REFUSAL_INTERVAL_S = 0.25
FATAL_CODES = frozenset({"protocol", "session_replaced"})
CloseReason = Literal["expired", "replaced", "bye"]


class KnownSession(NamedTuple):
    """A session that the store remembers from before the coordinator restarted."""

    session: int
    role: Role
    name: str


@dataclass(slots=True, eq=False)
class Session:
    """One live session as the coordinator sees it.

    Attributes:
        session: epoch, unique within the run and growing.
        role, name, pid, host, instance: who is at the other end (pid 0 until a known session says Hello
            again).
        client_id: routing id of its present connection, or None.
        gone_client_id: routing id of a connection that can no longer be written to; what the client sent over
            it before it left (its last words) may still be waiting to be read.
        heard_at: when anything was last heard (the owner's monotonic seconds).
        is_restored: known from before a restart, has not said Hello since.
        num_segments, num_duplicates: segments accepted, and repeated ones recognized.
        pending: bytes of segments that were handed to the owner and are not settled, by sequence number.
        settled: sequence numbers that are settled; ``settled_bytes`` is their total.
    """

    session: int
    role: Role
    name: str
    heard_at: float
    pid: int = 0
    host: str = ""
    instance: int = 0
    client_id: bytes | None = None
    gone_client_id: bytes | None = None
    is_restored: bool = False
    is_used: bool = False
    num_segments: int = 0
    num_duplicates: int = 0
    pending: dict[int, int] = field(default_factory=dict)
    settled: SeqSet = field(default_factory=SeqSet)
    settled_bytes: int = 0
    pending_bytes: int = 0
    granted_segments: int = 0
    granted_bytes: int = 0
    to_ack: dict[int, None] = field(default_factory=dict)
    drop_reasons: OrderedDict[int, str] = field(default_factory=OrderedDict)
    has_news: bool = False


class Opened(NamedTuple):
    """A client said Hello. With ``is_continued`` its leases stand; otherwise it starts with nothing."""

    session: Session
    is_continued: bool


class Closed(NamedTuple):
    """A session ended: its leases are free. After ``expired`` or ``replaced`` its frames are refused."""

    session: Session
    reason: CloseReason


class Received(NamedTuple):
    """A message for the coordinator. A SegmentData is new to its session and must be settled some time."""

    session: Session
    message: ToCoordinator
    num_bytes: int


Event = Opened | Closed | Received


class Reply(NamedTuple):
    """A message to send: routing id, session epoch for the envelope, message."""

    client_id: bytes
    session: int
    message: ToClient


@dataclass(slots=True)
class Outcome:
    """What one received message led to: replies to send and events for the owner, both in order."""

    replies: list[Reply] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


class ServerSessions:
    """All sessions of a run. Not thread-safe; time is passed in.

    Args:
        allocate: called with the Hello of every new session; returns its epoch (growing, never 0, never used
            before in this run), which must be durable when it returns.
        window_segments, window_bytes: unacknowledged segments and bytes that each client may have.
        heartbeat_s, session_timeout_s: told to clients in Welcome.
        known: sessions from before a restart; they have ``session_timeout_s`` to come back.
        now: present time, monotonic seconds.
    """

    def __init__(
        self,
        *,
        allocate: Callable[[Hello], int],
        window_segments: int = 256,
        window_bytes: int = 64 << 20,
        heartbeat_s: float = 1.0,
        session_timeout_s: float = 5.0,
        known: Iterable[KnownSession] = (),
        now: float = 0.0,
    ) -> None:
        self.manifest: Manifest | None = None
        self.rejected: Counter[str] = Counter()
        self.live: dict[int, Session] = {}
        self._allocate = allocate
        self._window = window_segments, window_bytes
        self._heartbeat_s = heartbeat_s
        self._session_timeout_s = session_timeout_s
        self._is_credit_open = True
        self._by_name: dict[str, Session] = {}
        self._by_route: dict[bytes, Session] = {}
        self._replaced: OrderedDict[int, tuple[str, int]] = OrderedDict()
        self._num_replaced: OrderedDict[int, int] = OrderedDict()
        self._refused_at: OrderedDict[tuple[bytes, str], float] = OrderedDict()
        self._looked_at = now
        for session, role, name in known:
            self._add(Session(session, role, name, heard_at=now, is_restored=True))

    # ---------------------------------------------------------------------------------------------- receiving

    def receive(
        self, client_id: bytes, envelope: Envelope, message: ToCoordinator, num_bytes: int, now: float
    ) -> Outcome:
        """Take one decoded message that came from routing id ``client_id`` with a body of ``num_bytes``."""
        outcome = Outcome()
        if isinstance(message, Hello):
            self._greeted(client_id, message, now, outcome)
            return outcome
        session = self.live.get(envelope.session)
        if session is None:
            code, detail = self._why_dead(envelope.session)
            self.refuse(client_id, code, detail, now, outcome, session=envelope.session)
            return outcome
        if client_id != (session.client_id or session.gone_client_id):
            # The coordinator restarted, or a frame of an earlier connection came late. Only a Hello binds a
            # connection.
            detail = f"session {session.session} has not said Hello on this connection"
            self.refuse(client_id, "hello_first", detail, now, outcome, session=session.session)
            return outcome
        session.heard_at = now
        session.is_used = True
        match message:
            case SegmentData():
                self._segment(session, client_id, message, num_bytes, now, outcome)
            case Heartbeat():
                outcome.replies.append(Reply(client_id, session.session, Pong()))
                outcome.events.append(Received(session, message, num_bytes))
            case Bye():
                outcome.events.append(Received(session, message, num_bytes))
                outcome.events.append(self._close(session, "bye"))
            case _:
                outcome.events.append(Received(session, message, num_bytes))
        return outcome

    def refuse(
        self,
        client_id: bytes,
        code: str,
        detail: str,
        now: float,
        outcome: Outcome,
        *,
        session: int | None = None,
    ) -> bool:
        """Count a refusal and, not more often than four times a second per peer and code, tell the peer.

        Returns:
            Whether the peer is told (worth a log line).
        """
        self.rejected[code] += 1
        key = (client_id, code)
        if now - self._refused_at.get(key, -1e18) < REFUSAL_INTERVAL_S:
            return False
        self._refused_at[key] = now
        self._refused_at.move_to_end(key)
        _forget_oldest(self._refused_at)
        if session is None:
            bound = self._by_route.get(client_id)
            session = bound.session if bound is not None else 0
        message: Refused = refusal(code, detail, is_fatal=code in FATAL_CODES)
        outcome.replies.append(Reply(client_id, session, message))
        return True

    def expire(self, now: float) -> list[Closed]:
        """Close sessions that were silent for too long; call after every drained poll.

        Time during which this side itself did not look (a long commit, a suspended machine) is not held
        against them.
        """
        away = now - self._looked_at - self._heartbeat_s
        self._looked_at = now
        if away > 0:
            for session in self.live.values():
                session.heard_at = min(now, session.heard_at + away)
        silent = [s for s in self.live.values() if now - s.heard_at > self._session_timeout_s]
        return [self._close(session, "expired") for session in silent]

    # -------------------------------------------------------------------------------------- settling and acks

    def settle(self, session: int, seq: int, drop_reason: str | None = None) -> None:
        """Note that a segment is committed, or dropped for good; ignored if the session is over."""
        found = self.live.get(session)
        if found is None or seq not in found.pending:
            return
        num_bytes = found.pending.pop(seq)
        found.pending_bytes -= num_bytes
        found.settled_bytes += num_bytes
        found.settled.add(seq)
        found.to_ack[seq] = None
        if drop_reason is not None:
            found.drop_reasons[seq] = drop_reason
            _forget_oldest(found.drop_reasons)

    def set_credit_open(self, is_open: bool) -> None:
        """Withdraw or restore credit: while closed no client is allowed more than it was already told."""
        if is_open and not self._is_credit_open:
            for session in self.live.values():
                session.has_news = True
        self._is_credit_open = is_open

    def acks(self) -> list[Reply]:
        """Return one Ack per client that has something to hear: settled segments or new credit."""
        replies = []
        for session in self.live.values():
            if session.client_id is None or not (session.to_ack or session.has_news):
                continue
            segments, num_bytes = self._grant(session)
            seqs = list(session.to_ack)
            dropped = {str(seq): session.drop_reasons[seq] for seq in seqs if seq in session.drop_reasons}
            ack = Ack(seqs=seqs, credit_segments=segments, credit_bytes=num_bytes, dropped=dropped)
            replies.append(Reply(session.client_id, session.session, ack))
            session.to_ack.clear()
            session.has_news = False
        return replies

    def lost_route(self, client_id: bytes) -> None:
        """The connection is gone; its session waits for the client to come back, or expires."""
        session = self._by_route.pop(client_id, None)
        if session is not None and session.client_id == client_id:
            session.client_id, session.gone_client_id = None, client_id

    # ----------------------------------------------------------------------------------------------- greeting

    def _greeted(self, client_id: bytes, hello: Hello, now: float, outcome: Outcome) -> None:
        if hello.protocol != PROTOCOL_VERSION:
            detail = f"client speaks protocol {hello.protocol}, coordinator speaks {PROTOCOL_VERSION}"
            self.refuse(client_id, "protocol", detail, now, outcome, session=hello.session)
            return
        problem = self._bad_hello(hello)
        if problem:
            self.refuse(client_id, "bad_hello", problem, now, outcome, session=hello.session)
            return
        if self._is_replaced(hello.session):
            self.refuse(client_id, *self._why_dead(hello.session), now, outcome, session=hello.session)
            return
        session, is_continued = self._session_for(hello, now, outcome)
        self._bind(session, client_id)
        session.pid, session.host, session.instance = hello.pid, hello.host, hello.instance
        session.heard_at = now
        segments, num_bytes = self._grant(session)
        welcome = Welcome(
            session=session.session,
            is_continued=is_continued,
            heartbeat_s=self._heartbeat_s,
            session_timeout_s=self._session_timeout_s,
            credit_segments=segments,
            credit_bytes=num_bytes,
            manifest=self.manifest,
        )
        outcome.replies.append(Reply(client_id, session.session, welcome))
        outcome.events.append(Opened(session, is_continued))

    def _session_for(self, hello: Hello, now: float, outcome: Outcome) -> tuple[Session, bool]:
        old = self.live.get(hello.session) if hello.session else None
        is_same_client = old is not None and (old.name, old.role) == (hello.name, hello.role)
        if old is not None and is_same_client and old.instance in (0, hello.instance):
            self._adopt(old, hello)
            return old, True
        same = self._by_name.get(hello.name)
        if same is not None:
            # A repeated first Hello (its Welcome is late) gets the session it already has. Once anything was
            # sent in that session this must not happen: sequence numbers would begin again and new segments
            # look settled.
            is_repeated = same.instance == hello.instance != 0 and not hello.session
            if is_repeated and same.role == hello.role and not same.is_used and not same.is_restored:
                return same, False
            outcome.events.append(self._close(same, "replaced", by=hello.instance))
        session = Session(self._allocate(hello), hello.role, hello.name, heard_at=now)
        self._add(session)
        return session, False

    def _adopt(self, session: Session, hello: Hello) -> None:
        """After a restart, believe the client's account: it knows what was acknowledged to it."""
        if session.is_restored:
            session.settled = SeqSet.all_but(hello.last_seq, hello.unacked)
            session.settled_bytes = hello.settled_bytes
            session.is_restored = False
            session.is_used = True

    @staticmethod
    def _bad_hello(hello: Hello) -> str:
        if hello.last_seq > MAX_SEQ or hello.settled_bytes > MAX_SEQ:
            return f"sequence number {hello.last_seq}, {hello.settled_bytes} settled bytes"
        if len(hello.unacked) > MAX_SPREAD:
            return f"{len(hello.unacked)} unacknowledged segments"
        if hello.unacked:
            lowest, highest = min(hello.unacked), max(hello.unacked)
            if not 1 <= lowest <= highest <= hello.last_seq or hello.last_seq - lowest > MAX_SPREAD:
                return f"unacknowledged {lowest} .. {highest} of {hello.last_seq}"
        return ""

    def _is_replaced(self, session: int) -> bool:
        """Whether this dead session's process has lost its name for good to one that is live now.

        Two living processes of one name would replace each other forever, so the one that was replaced first
        gives way.
        Not at once: a Hello of a process that died meanwhile may arrive late and replace its own successor.
        """
        name, instance = self._replaced.get(session, ("", 0))
        return name in self._by_name and self._num_replaced.get(instance, 0) >= MAX_REPLACED

    def _why_dead(self, session: int) -> tuple[str, str]:
        if session == 0:
            return "hello_first", "say Hello before anything else"
        if self._is_replaced(session):
            return (
                "session_replaced",
                f"session {session}: a newer process took the name {self._replaced[session]}",
            )
        return "session_expired", f"session {session} is over; say Hello with session 0"

    # ----------------------------------------------------------------------------------------------- segments

    def _segment(
        self,
        session: Session,
        client_id: bytes,
        data: SegmentData,
        num_bytes: int,
        now: float,
        outcome: Outcome,
    ) -> None:
        seq = data.seq
        if seq in session.settled:
            session.num_duplicates += 1
            session.to_ack[seq] = None  # its ack was lost
            return
        if seq in session.pending:
            session.num_duplicates += 1
            return
        problem = self._over_credit(session, seq, num_bytes)
        if problem:
            self.refuse(client_id, "over_credit", problem, now, outcome, session=session.session)
            return
        session.pending[seq] = num_bytes
        session.pending_bytes += num_bytes
        session.num_segments += 1
        outcome.events.append(Received(session, data, num_bytes))

    def _over_credit(self, session: Session, seq: int, num_bytes: int) -> str:
        """Allow twice the window: after a restart a client may hold credit that this side forgot."""
        self._grant(session)
        window_segments, window_bytes = self._window
        if (
            not 1 <= seq <= session.granted_segments + window_segments
            or seq - session.settled.low > MAX_SPREAD
        ):
            return f"sequence number {seq}, credit reaches to {session.granted_segments}"
        total = session.settled_bytes + session.pending_bytes + num_bytes if session.pending else 0
        if total > session.granted_bytes + window_bytes:
            return f"{total} bytes in all, credit reaches to {session.granted_bytes}"
        return ""

    def _grant(self, session: Session) -> tuple[int, int]:
        """Raise the session's cumulative credit to what is settled plus the window; it never falls."""
        if self._is_credit_open:
            window_segments, window_bytes = self._window
            session.granted_segments = max(session.granted_segments, len(session.settled) + window_segments)
            session.granted_bytes = max(session.granted_bytes, session.settled_bytes + window_bytes)
        return session.granted_segments, session.granted_bytes

    # -------------------------------------------------------------------------------------------- bookkeeping

    def _add(self, session: Session) -> None:
        self.live[session.session] = session
        self._by_name[session.name] = session

    def _bind(self, session: Session, client_id: bytes) -> None:
        if session.client_id is not None:
            self._by_route.pop(session.client_id, None)
        other = self._by_route.pop(client_id, None)
        if other is not None and other is not session:
            other.client_id = None
        session.client_id, session.gone_client_id = client_id, None
        self._by_route[client_id] = session

    def _close(self, session: Session, reason: CloseReason, by: int = 0) -> Closed:
        del self.live[session.session]
        if self._by_name.get(session.name) is session:
            del self._by_name[session.name]
        if session.client_id is not None:
            self._by_route.pop(session.client_id, None)
        if reason == "replaced" and by != session.instance:
            self._replaced[session.session] = session.name, session.instance
            self._num_replaced[session.instance] = self._num_replaced.get(session.instance, 0) + 1
            _forget_oldest(self._replaced)
            _forget_oldest(self._num_replaced)
        return Closed(session, reason)


def _forget_oldest(memory: OrderedDict[Any, Any]) -> None:
    while len(memory) > MAX_REMEMBERED:
        memory.popitem(last=False)
