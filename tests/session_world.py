"""A small world for the session machines: two actors, a coordinator, a network that loses, repeats and
reorders.

Everything in it is the shipped code, codec included, except the network (lists of frames) and the database (a
dictionary of committed keys that alone survives a crash of the coordinator). Time moves only when told.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from wire_samples import RUN, make_segment

from cod_async.lifecycle.segment import SegmentKey
from cod_async.wire.codec import (
    decode_for_client,
    decode_for_coordinator,
    encode,
    encode_segment,
    frame_body,
)
from cod_async.wire.messages import Hello, SegmentData
from cod_async.wire.session import ClientSession, Closed, KnownSession, Opened, Received, ServerSessions

WINDOW_SEGMENTS = 2
SEGMENT_BYTES = len(encode_segment(make_segment()))
WINDOW_BYTES = SEGMENT_BYTES + SEGMENT_BYTES // 2  # so that bytes, too, are what a client must wait for
TIMEOUT_S = 5.0


@dataclass
class Actor:
    """One actor process: its session and what it knows. A crash forgets both; the network address changes."""

    name: str
    group: int
    session: ClientSession
    route: bytes
    keys: dict[int, SegmentKey] = field(default_factory=dict)
    settled: dict[int, str | None] = field(default_factory=dict)


class World:
    """Two actors and a coordinator. Every method is one atomic event."""

    def __init__(self, num_segments: int = 5) -> None:
        self.now = 100.0
        self.num_segments = num_segments
        self.num_refused = 0
        self.num_routes = self.num_instances = self.num_epochs = 0
        self.up: list[tuple[bytes, list[bytes]]] = []
        self.down: list[tuple[bytes, list[bytes]]] = []
        self.committed: dict[SegmentKey, tuple[int, int]] = {}
        self.live_sessions: dict[int, KnownSession] = {}
        self.batch: list[tuple[int, SegmentData]] = []
        self.handed: set[tuple[int, int]] = set()
        self.acked: set[SegmentKey] = set()
        self.server = self._new_server()
        self.actors = [self._new_actor(index) for index in range(2)]
        for actor in self.actors:
            self.offer(actor)

    # ---------------------------------------------------------------------------------------------- processes

    def _new_server(self) -> ServerSessions:
        self.handed.clear()
        return ServerSessions(
            allocate=self._allocate,
            window_segments=WINDOW_SEGMENTS,
            window_bytes=WINDOW_BYTES,
            heartbeat_s=1.0,
            session_timeout_s=TIMEOUT_S,
            known=list(self.live_sessions.values()),
            now=self.now,
        )

    def _allocate(self, hello: Hello) -> int:
        self.num_epochs += 1
        self.live_sessions[self.num_epochs] = KnownSession(self.num_epochs, hello.role, hello.name)
        return self.num_epochs

    def _route(self) -> bytes:
        self.num_routes += 1
        return b"route-%d" % self.num_routes

    def _new_actor(self, index: int) -> Actor:
        self.num_instances += 1
        session = ClientSession(
            role="actor", name=f"actor-{index}", pid=1, host="h", instance=self.num_instances, resend_s=1.0
        )
        actor = Actor(f"actor-{index}", index, session, self._route())
        session.connected(self.now)
        return actor

    def offer(self, actor: Actor) -> None:
        """Seal the actor's segments not known to be acknowledged (a new process plays them again)."""
        for member in range(self.num_segments):
            key = SegmentKey(actor.group, member, 0)
            if key not in self.acked:
                segment = make_segment(group=key.group, member=key.member, actor=actor.name)
                actor.keys[actor.session.offer(encode_segment(segment))] = key

    def crash_server(self) -> None:
        """Kill the coordinator and start it again: what was committed is left; connections get new names."""
        self.batch.clear()
        self.server = self._new_server()
        for actor in self.actors:
            actor.route = self._route()

    def crash_actor(self, index: int) -> None:
        """Kill an actor and start it again under its name."""
        self.actors[index] = self._new_actor(index)
        self.offer(self.actors[index])

    def reconnect(self, index: int) -> None:
        """The actor gives its connection up and makes another."""
        actor = self.actors[index]
        actor.session.disconnected()
        actor.route = self._route()
        actor.session.connected(self.now)

    # ------------------------------------------------------------------------------------------------ network

    def send(self, index: int) -> bool:
        """Let an actor send its next message; False if it has none."""
        actor = self.actors[index]
        outgoing = actor.session.next_outgoing(self.now)
        if outgoing is None:
            return False
        self.up.append((actor.route, frame_body(outgoing.body, run=RUN, session=outgoing.session)))
        return True

    def deliver_up(self, at: int) -> None:
        """Deliver one of the messages on their way to the coordinator."""
        route, parts = self.up.pop(at)
        envelope, message = decode_for_coordinator(parts, run=RUN)
        outcome = self.server.receive(route, envelope, message, len(parts[1]), self.now)
        for event in outcome.events:
            match event:
                case Received(session, SegmentData() as data, _):
                    assert (session.session, data.seq) not in self.handed, "handed over twice in one session"
                    self.handed.add((session.session, data.seq))
                    assert len(session.pending) <= 2 * WINDOW_SEGMENTS, "more than credit allows"
                    self.batch.append((session.session, data))
                case Closed(session, _):
                    del self.live_sessions[session.session]
                case Opened() | Received():
                    pass
        for client_id, session_id, reply in outcome.replies:
            self.down.append((client_id, encode(reply, run=RUN, session=session_id)))

    def deliver_down(self, at: int) -> None:
        """Deliver one of the coordinator's messages; it is lost if the connection is no more."""
        route, parts = self.down.pop(at)
        for actor in self.actors:
            if actor.route == route:
                envelope, message = decode_for_client(parts, run=RUN)
                for outbox_id, reason in actor.session.receive(envelope.session, message, self.now).settled:
                    assert outbox_id not in actor.settled, "settled twice"
                    actor.settled[outbox_id] = reason
                    self.acked.add(actor.keys[outbox_id])

    # -------------------------------------------------------------------------------------------- coordinator

    def commit(self) -> None:
        """Write what came, commit it, acknowledge it."""
        for session, data in self.batch:
            key = data.segment.key
            is_new = self.committed.setdefault(key, (session, data.seq)) == (session, data.seq)
            self.server.settle(session, data.seq, None if is_new else "duplicate")
        self.batch.clear()
        for client_id, session, ack in self.server.acks():
            self.down.append((client_id, encode(ack, run=RUN, session=session)))

    def tick(self, seconds: float, *, is_server_away: bool = False) -> None:
        """Let time pass; both sides look for silence, the coordinator only at the end if it is away."""
        num_looks = 1 if is_server_away else max(1, round(seconds / 0.5))
        for _ in range(num_looks):
            self.now += seconds / num_looks
            for closed in self.server.expire(self.now):
                del self.live_sessions[closed.session.session]
        for index, actor in enumerate(self.actors):
            if actor.session.refused is not None:
                # Late Hellos of dead predecessors can cost a process its name; its launcher starts it again.
                self.num_refused += 1
                self.crash_actor(index)
            elif actor.session.is_peer_dead(self.now):
                self.reconnect(index)

    # ------------------------------------------------------------------------------------------------- claims

    def check(self) -> None:
        """Assert what must hold at every moment."""
        assert self.acked <= set(self.committed), "acknowledged and not committed"
        for actor in self.actors:
            session = actor.session
            assert session.num_unacked + len(actor.settled) == len(actor.keys), (
                "a segment vanished or doubled"
            )
            segments, num_bytes = session.credit
            assert segments >= 0, "credit overdrawn"
            assert num_bytes >= 0 or session.num_unacked - session.num_unsent <= 1, "byte credit overdrawn"
        for live in self.server.live.values():
            assert live.pending_bytes == sum(live.pending.values())

    def settle_down(self) -> None:
        """Stop all faults; everything must be committed and acknowledged within a bounded time."""
        for _ in range(60):
            for index in range(len(self.actors)):
                while self.send(index):
                    pass
            while self.up:
                self.deliver_up(0)
            self.commit()
            while self.down:
                self.deliver_down(0)
            self.check()
            if all(actor.session.num_unacked == 0 for actor in self.actors):
                break
            self.tick(0.5)
        wanted = {SegmentKey(group, member, 0) for group in range(2) for member in range(self.num_segments)}
        assert set(self.committed) == wanted
        assert self.acked == wanted, "not everything was acknowledged"
        assert not [actor.name for actor in self.actors if actor.session.num_unacked]
