"""The real link: threads, sockets, restarts, hostile peers. The coordinator here is a dictionary."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import pytest
import zmq
from link_world import CONFIG, IMPATIENT, Coordinator, client_of, wait_for
from msgspec.structs import replace
from wire_samples import MANIFEST, RUN, TO_COORDINATOR, make_row, make_segment

from cod_async.errors import InputError, ProtocolRefusedError, WireError
from cod_async.lifecycle.segment import SegmentKey, Version
from cod_async.transport.async_client import AsyncClient
from cod_async.transport.client_link import ACKED, ClientLink
from cod_async.transport.server_link import ServerLink
from cod_async.transport.zmq_pipe import ZmqClientPipe
from cod_async.wire import messages as m
from cod_async.wire.codec import decode_for_client, encode, frame_body
from cod_async.wire.session import Closed, Opened, Received

T = TypeVar("T")


@pytest.fixture(params=["zmq", "file"])
def coordinator(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Coordinator]:
    bind = "tcp://127.0.0.1:0" if request.param == "zmq" else f"file://{tmp_path}/spool"
    coordinator = Coordinator(bind).start()
    yield coordinator
    coordinator.stop()


@pytest.fixture
def impatient_coordinator() -> Iterator[Coordinator]:
    coordinator = Coordinator(config=IMPATIENT).start()
    yield coordinator
    coordinator.stop()


@pytest.fixture
def zmq_coordinator() -> Iterator[Coordinator]:
    coordinator = Coordinator().start()
    yield coordinator
    coordinator.stop()


def test_segments_are_acknowledged_once_committed(coordinator: Coordinator) -> None:
    link = client_of(coordinator)
    settled: list[tuple[int, str | None]] = []
    link.start(on_settled=lambda outbox_id, reason: settled.append((outbox_id, reason)))
    coordinator.is_committing = False
    ids = [link.send_segment(make_segment(member=member)) for member in range(20)]
    assert ids == list(range(1, 21))
    wait_for(lambda: len(coordinator.of(m.SegmentData)) >= CONFIG.credit_segments)
    assert link.num_unacked == 20  # received, and still not acknowledged; credit holds the rest back
    assert len(coordinator.of(m.SegmentData)) == CONFIG.credit_segments
    coordinator.is_committing = True
    assert [link.wait_acked(outbox_id, 20) for outbox_id in ids] == [ACKED] * 20
    assert link.close(m.Bye(counters={"sealed_segments": 20.0}), drain_s=5)
    wait_for(lambda: coordinator.of(m.Bye))
    assert sorted(settled) == [(outbox_id, None) for outbox_id in ids]
    assert coordinator.committed == {SegmentKey(1, member, 0): 1 for member in range(20)}
    assert any(isinstance(event, Closed) and event.reason == "bye" for event in coordinator.events)
    assert not coordinator.link.sessions


def test_drop_reasons_come_back(coordinator: Coordinator) -> None:
    link = client_of(coordinator)
    link.start()
    first, second = link.send_segment(make_segment()), link.send_segment(make_segment())
    assert link.wait_acked(first, 20) == ACKED
    assert link.wait_acked(second, 20) == "duplicate"
    link.close()


def test_a_coordinator_restart_loses_nothing(coordinator: Coordinator) -> None:
    link = client_of(coordinator)
    welcomes: list[m.Welcome] = []
    link.start(
        on_message=lambda message: welcomes.append(message) if isinstance(message, m.Welcome) else None
    )
    assert link.wait_connected(20)
    session = link.session
    coordinator.is_committing = False
    ids = [link.send_segment(make_segment(member=member)) for member in range(12)]
    wait_for(lambda: len(coordinator.of(m.SegmentData)) >= CONFIG.credit_segments)
    address = coordinator.address
    coordinator.stop()  # with a batch received and not committed
    coordinator.is_committing = True
    coordinator.start()
    assert coordinator.address == address
    assert [link.wait_acked(outbox_id, 20) for outbox_id in ids] == [ACKED] * 12
    assert link.session == session
    assert [welcome.is_continued for welcome in welcomes] == [False, True]
    assert set(coordinator.committed.values()) == {1}
    link.close()


def test_a_coordinator_that_moves_is_found(zmq_coordinator: Coordinator) -> None:
    coordinator = zmq_coordinator
    link = client_of(coordinator)
    link.start()
    link.wait_acked(link.send_segment(make_segment()), 20)
    coordinator.stop()
    coordinator.address = None  # another port, and for a moment none
    outbox_id = link.send_segment(make_segment(member=1))
    coordinator.start()
    assert link.wait_acked(outbox_id, 20) == ACKED
    link.close()


def test_an_expired_session_starts_anew_and_offers_again(zmq_coordinator: Coordinator) -> None:
    coordinator = zmq_coordinator
    link = client_of(coordinator)
    link.start()
    assert link.wait_connected(20)
    coordinator.is_committing = False
    ids = [link.send_segment(make_segment(member=member)) for member in range(3)]
    wait_for(lambda: len(coordinator.of(m.SegmentData)) == 3)
    coordinator.known.clear()  # as if its sessions had timed out while it was down
    coordinator.stop()
    coordinator.is_committing = True
    coordinator.start()
    assert [link.wait_acked(outbox_id, 20) for outbox_id in ids] == [ACKED] * 3
    assert link.session == 2
    opened = [event.is_continued for event in coordinator.events if isinstance(event, Opened)]
    assert opened == [False, False]
    link.close()


def test_a_silent_client_expires(impatient_coordinator: Coordinator) -> None:
    with Peer(impatient_coordinator) as peer:
        peer.hello()
        wait_for(
            lambda: any(isinstance(e, Closed) and e.reason == "expired" for e in impatient_coordinator.events)
        )
        peer.send(m.Heartbeat(), session=1)
        assert peer.receive(m.Refused).code == "session_expired"


def test_requests_are_answered_whatever_happens(zmq_coordinator: Coordinator) -> None:
    coordinator = zmq_coordinator
    part = m.StepBatch(version=Version(0, 1), plan_digest="new", part=0, num_parts=2, items=[])
    stale = m.StepBatch(version=Version(0, 1), plan_digest="old", part=1, num_parts=2, items=[])
    last = m.StepBatch(version=Version(0, 1), plan_digest="new", part=1, num_parts=2, items=[])
    asked: list[int] = []

    def leases(request: object) -> list[m.ToClient]:
        assert isinstance(request, m.LeaseRequest)
        asked.append(request.request)
        other = m.Leases(request=request.request + 1, leases=[])
        return [other, m.Leases(request=request.request, leases=[])] if len(asked) > 2 else []

    coordinator.replies = {
        m.LeaseRequest: leases,
        m.StepRequest: lambda _: [stale, part, last],
        m.StepDone: lambda _: [m.StepRecorded(version=Version(0, 1), should_stop=True)],
        m.Published: lambda _: [m.PublishRecorded(version=MANIFEST.version)],
        m.OpenLineage: lambda request: [
            m.LineageOpened(nonce=request.nonce, lineage=1, step=0, num_rolled_back=0)
        ],
    }
    link = client_of(coordinator)
    unmatched: list[m.ToClient] = []
    link.start(on_message=unmatched.append)
    assert link.request(m.LeaseRequest(request=5, num_lifecycles=1), 20).request == 5
    assert asked == [5, 5, 5]  # asked until answered
    assert link.request(m.StepRequest(version=Version(0, 1)), 20) == [part, last]
    assert link.request(m.StepDone(version=Version(0, 1), plan_digest="new", metrics={}), 20).should_stop
    assert link.request(m.Published(manifest=MANIFEST), 20).version == MANIFEST.version
    assert link.request(m.OpenLineage(branch=None, trained_digest="", nonce="x"), 20).lineage == 1
    with pytest.raises(TimeoutError, match="no answer to Checkpointed"):
        link.request(m.Checkpointed(version=Version(9, 9), path="", digest="", trained_digest=""), 0.05)
    assert m.Leases(request=6, leases=[]) in unmatched
    link.close()
    with pytest.raises(WireError, match="closed"):
        link.request(m.LeaseRequest(request=7, num_lifecycles=1))


def test_heartbeats_say_what_they_are_told(zmq_coordinator: Coordinator) -> None:
    link = client_of(zmq_coordinator)
    counters = {"sealed_segments": 7.0}
    link.set_heartbeat(lambda: m.Heartbeat(counters=counters, engine_version=Version(0, 3)))
    link.start()
    wait_for(lambda: len(zmq_coordinator.of(m.Heartbeat)) >= 2)
    assert zmq_coordinator.of(m.Heartbeat)[0] == m.Heartbeat(counters=counters, engine_version=Version(0, 3))
    counters["bad"] = float("nan")  # a wrong counter must not look like a dead process
    wait_for(lambda: m.Heartbeat() in zmq_coordinator.of(m.Heartbeat))
    assert link.is_connected
    link.close()


def test_a_bad_callback_does_not_stop_the_link(
    zmq_coordinator: Coordinator, caplog: pytest.LogCaptureFixture
) -> None:
    link = client_of(zmq_coordinator)
    link.start(on_settled=lambda outbox_id, reason: 1 / 0)
    for member in range(3):
        link.wait_acked(link.send_segment(make_segment(member=member)), 20)
    wait_for(lambda: caplog.text.count("ZeroDivisionError") >= 3)
    link.close()


def test_the_outbox_has_a_ceiling(zmq_coordinator: Coordinator) -> None:
    zmq_coordinator.is_committing = False
    link = client_of(zmq_coordinator, max_outbox_segments=2)
    link.start()
    for member in range(2):
        link.send_segment(make_segment(member=member))
    with pytest.raises(WireError, match="outbox_full"):
        link.send_segment(make_segment(member=2), timeout_s=0.05)
    zmq_coordinator.is_committing = True
    assert link.wait_acked(link.send_segment(make_segment(member=2), timeout_s=20), 20) == ACKED
    link.close()


def test_what_cannot_be_sent_is_refused_at_the_sender(zmq_coordinator: Coordinator) -> None:
    link = client_of(zmq_coordinator)
    link.start()
    with pytest.raises(WireError, match="too_large"):
        link.send_segment(make_segment(rows=(make_row(num_tokens=20_000),)))
    with pytest.raises(WireError, match="not_finite"):
        link.send_segment(make_segment(reward=float("inf")))
    assert link.num_unacked == 0
    link.close()
    assert not zmq_coordinator.link.rejected


@pytest.mark.parametrize("place", ["wire.client_session", "wire.codec"])
def test_a_fatal_refusal_reaches_everyone(
    place: str, zmq_coordinator: Coordinator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another protocol in the Hello only, and (as a real newer client would) in every frame."""
    link = client_of(zmq_coordinator)
    request = link.request_future(m.LeaseRequest(request=1, num_lifecycles=1))
    settlement = link.settlement(link.send_segment(make_segment()))
    if place == "wire.client_session":
        link._session._hello = replace(link._session._hello, protocol=3)
    else:
        newer = [b"", b""]

        def receive(pipe: ZmqClientPipe) -> list[bytes] | None:
            parts = original(pipe)
            if parts is None:
                return None
            envelope = msgspec.msgpack.decode(parts[0])
            newer[:] = [msgspec.msgpack.encode(envelope | {"protocol": 3}), parts[1]]
            return newer

        original = ZmqClientPipe.recv
        monkeypatch.setattr(ZmqClientPipe, "recv", receive)
    link.start()
    for future in (request, settlement):
        with pytest.raises(ProtocolRefusedError, match=r"protocol 3.* speaks 2"):
            future.result(20)
    with pytest.raises(ProtocolRefusedError):
        link.send_segment(make_segment())
    with pytest.raises(ProtocolRefusedError):
        link.wait_connected(1)
    link.close()


def test_a_coordinator_of_another_run_is_not_believed(zmq_coordinator: Coordinator) -> None:
    """Its port may have been ours a moment ago: look for our own again, do not give up."""
    other = Coordinator().start()
    addresses = [other.address]
    link = ClientLink(lambda: addresses[0], "actor", "actor-0", RUN, CONFIG)
    other.link._run = "another"
    link.start()
    wait_for(lambda: other.link.rejected["wrong_run"] and link.rejected["wrong_run"])
    addresses[0] = zmq_coordinator.address
    assert link.wait_acked(link.send_segment(make_segment()), 20) == ACKED
    link.close()
    other.stop()


def test_looking_for_a_coordinator_is_no_work(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"tcp://127.0.0.1:{server.getsockname()[1]}"  # nobody listens there in a moment
    turns = 0

    class Counted(ClientLink):
        def _turn(self, now: float) -> bool:
            nonlocal turns
            turns += 1
            return super()._turn(now)

    link = Counted(lambda: address, "actor", "actor-0", RUN, IMPATIENT)
    link.start()
    future = link.request_future(m.LeaseRequest(request=1, num_lifecycles=1))
    time.sleep(2.0)  # longer than resending, the session's timeout and the first patience
    link.close()
    assert isinstance(future.exception(), WireError)
    assert turns < 200


def test_actors_can_note_what_was_acknowledged(zmq_coordinator: Coordinator, tmp_path: Path) -> None:
    config = replace(CONFIG, ack_journal_dir=str(tmp_path / "acks"))
    for name in ("actor-0", "actor-1"):
        link = ClientLink(lambda: zmq_coordinator.address, "actor", name, RUN, config)
        link.start()
        ids = [link.send_segment(make_segment(member=member)) for member in range(3)]
        settled = [link.wait_acked(outbox_id, 20.0) for outbox_id in ids]
        link.close()
        (path,) = (tmp_path / "acks").glob(f"{name}-*.jsonl")
        lines = [msgspec.json.decode(line) for line in path.read_bytes().splitlines()]
        assert [line["member"] for line in lines] == [0, 1, 2]
        assert [line["reason"] or ACKED for line in lines] == settled
    assert settled == ["duplicate"] * 3  # the second actor's were there already
    learner = ClientLink(lambda: zmq_coordinator.address, "learner", "learner", RUN, config)
    learner.start()
    learner.close()
    assert len(list((tmp_path / "acks").iterdir())) == 2


def test_fences_drop_what_was_not_sent(zmq_coordinator: Coordinator) -> None:
    zmq_coordinator.is_committing = False
    link = client_of(zmq_coordinator)
    fences: list[m.ToClient] = []
    link.start(on_message=lambda message: fences.append(message) if isinstance(message, m.Fence) else None)
    ids = [link.send_segment(make_segment(member=member)) for member in range(CONFIG.credit_segments + 2)]
    wait_for(lambda: len(zmq_coordinator.of(m.SegmentData)) == CONFIG.credit_segments)
    fence = m.Fence(leases=[m.LeaseRef(1, CONFIG.credit_segments, 2), m.LeaseRef(1, 0, 2)], reason="deadline")
    zmq_coordinator.replies[m.Heartbeat] = lambda _: [fence]
    assert link.wait_acked(ids[-2], 20) == "fenced_before_send"
    assert link.num_unacked == CONFIG.credit_segments + 1  # member 0 was sent: its ack decides
    zmq_coordinator.is_committing = True
    assert link.wait_acked(ids[0], 20) == ACKED
    assert link.wait_acked(ids[-1], 20) == ACKED
    assert fences
    link.close()


def test_a_restarted_actor_replaces_its_predecessor(zmq_coordinator: Coordinator) -> None:
    with Peer(zmq_coordinator) as old:
        old.hello(instance=1)
        link = client_of(zmq_coordinator)
        link.start()
        assert link.wait_connected(20)
        wait_for(lambda: [e.reason for e in zmq_coordinator.events if isinstance(e, Closed)] == ["replaced"])
        old.send(m.Heartbeat(), session=1)
        assert old.receive(m.Refused).code == "session_expired"
        link.close()


class Peer:
    """A DEALER that sends whatever it is told to."""

    def __init__(self, coordinator: Coordinator) -> None:
        self.context = zmq.Context()
        self.socket = self.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.LINGER, 0)
        self.socket.connect(coordinator.address or "")

    def __enter__(self) -> Peer:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()
        self.context.term()

    def send(self, message: m.ToCoordinator, session: int) -> None:
        self.socket.send_multipart(encode(message, run=RUN, session=session))

    def hello(self, name: str = "actor-0", instance: int = 5) -> m.Welcome:
        self.send(m.Hello(role="actor", name=name, protocol=2, pid=1, host="h", instance=instance), session=0)
        return self.receive(m.Welcome)

    def receive(self, kind: type[T]) -> T:
        """Return the next message of a kind, passing over others."""
        while True:
            assert self.socket.poll(20_000), f"no {kind.__name__} came"
            message = decode_for_client(self.socket.recv_multipart())[1]
            if isinstance(message, kind):
                return message


def test_hostile_frames_are_refused_by_name_and_the_loop_lives(zmq_coordinator: Coordinator) -> None:
    limit = CONFIG.max_message_bytes
    hostile: dict[str, list[bytes]] = {
        "bad_parts": [b"x"] * 10_000,
        "bad_envelope": [b"\xc1", b""],
        "too_large": [b"", b"\0" * (limit + 1)],
        "bad_checksum": [frame_body(b"abc", run=RUN, session=1)[0], b"abd"],
        "bad_length": [frame_body(b"abc", run=RUN, session=1)[0], b"ab"],
        "bad_message": frame_body(b"\x91" * 100, run=RUN, session=1),
        "wrong_run": encode(m.Bye(), run="other", session=1),
        "hello_first": encode(m.Bye(), run=RUN, session=0),
        "session_expired": encode(m.Bye(), run=RUN, session=99),
    }
    for code, parts in hostile.items():
        with Peer(zmq_coordinator) as peer:
            peer.socket.send_multipart(parts)
            assert peer.receive(m.Refused).code == code
    assert set(zmq_coordinator.link.rejected) == set(hostile)
    with Peer(zmq_coordinator) as peer:  # an empty message is one frame too few, too
        peer.socket.send_multipart([b""])
        assert peer.receive(m.Refused).code == "bad_parts"
    link = client_of(zmq_coordinator)
    link.start()
    assert link.wait_acked(link.send_segment(make_segment()), 20) == ACKED
    link.close()


def test_refusals_are_rate_limited(zmq_coordinator: Coordinator) -> None:
    with Peer(zmq_coordinator) as peer:
        for _ in range(200):
            peer.socket.send_multipart([b"junk", b"junk"])
        wait_for(lambda: zmq_coordinator.link.rejected["bad_envelope"] == 200)
        assert peer.receive(m.Refused).code == "bad_envelope"
        assert zmq_coordinator.link.counters["sent"] <= 20


def test_a_frame_far_beyond_the_limit_never_arrives(zmq_coordinator: Coordinator) -> None:
    with Peer(zmq_coordinator) as peer:
        peer.socket.send_multipart([b"", b"\0" * (4 * CONFIG.max_message_bytes)])
        while not peer.socket.poll(
            200
        ):  # the connection is cut with all that was queued on it, and comes back
            hello = m.Hello(role="actor", name="actor-0", protocol=2, pid=1, host="h", instance=5)
            peer.send(hello, session=0)
        peer.receive(m.Welcome)
    assert not zmq_coordinator.link.rejected


def test_repeated_frames_count_once(zmq_coordinator: Coordinator) -> None:
    with Peer(zmq_coordinator) as peer:
        session = peer.hello().session
        for _ in range(5):
            peer.send(m.SegmentData(seq=1, segment=make_segment()), session)
        assert peer.receive(m.Ack).seqs == [1]
        peer.send(m.SegmentData(seq=1, segment=make_segment()), session)
        assert peer.receive(m.Ack).seqs == [1]  # its ack may have been lost
        peer.send(m.SegmentData(seq=5000, segment=make_segment()), session)
        assert peer.receive(m.Refused).code == "over_credit"
    assert len(zmq_coordinator.of(m.SegmentData)) == 1


def test_a_vanished_peer_is_noticed(impatient_coordinator: Coordinator) -> None:
    with Peer(impatient_coordinator) as peer:
        peer.hello()
    wait_for(lambda: any(isinstance(e, Closed) for e in impatient_coordinator.events))
    assert impatient_coordinator.link.send(1, m.Pong()) is False


def test_two_frames_per_message_are_enough_for_every_message(zmq_coordinator: Coordinator) -> None:
    with Peer(zmq_coordinator) as peer:
        session = peer.hello(name="actor-0").session
        for message in TO_COORDINATOR.values():
            if not isinstance(message, m.Hello | m.Bye):
                peer.send(message, session)
        peer.send(m.Bye(), session)
        wait_for(lambda: zmq_coordinator.of(m.Bye))
    kinds = {type(event.message) for event in zmq_coordinator.events if isinstance(event, Received)}
    assert kinds == {type(message) for message in TO_COORDINATOR.values()} - {m.Hello}


@pytest.mark.parametrize(
    "bind", ["tcp://0.0.0.0:0", "tcp://10.1.2.3:5555", "tcp://*:5555", "udp://127.0.0.1:1", "", "x"]
)
def test_addresses_that_are_not_loopback_are_refused(bind: str) -> None:
    with pytest.raises(InputError, match=r"transport\.bind"):
        ServerLink(bind, RUN, CONFIG, allocate_session=lambda hello: 1)


def test_a_busy_address_is_named() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        with pytest.raises(InputError, match=f"cannot listen on '{address}'"):
            ServerLink(address, RUN, CONFIG, allocate_session=lambda hello: 1, bind_wait_s=0.1)
        # a preferred port that is lost is replaced by a free one
        link = ServerLink(
            "tcp://127.0.0.1:0",
            RUN,
            CONFIG,
            allocate_session=lambda hello: 1,
            preferred_address=address,
            bind_wait_s=0.1,
        )
        assert link.address != address
        link.close()


def test_the_asyncio_view(coordinator: Coordinator) -> None:
    coordinator.replies[m.LeaseRequest] = lambda request: [m.Leases(request=request.request, leases=[])]

    async def play() -> None:
        heard: list[m.ToClient] = []
        client = AsyncClient(
            lambda: coordinator.address, "actor", "actor-0", RUN, CONFIG, heard.append, max_outbox_segments=4
        )
        client.start()
        assert (await client.request(m.LeaseRequest(request=3, num_lifecycles=1))).request == 3
        assert isinstance(heard[0], m.Welcome)
        ids = await asyncio.gather(
            *(client.send_segment(make_segment(member=member)) for member in range(20))
        )
        assert await asyncio.gather(*map(client.wait_settled, ids)) == [ACKED] * 20
        assert client.num_unacked == 0
        assert await client.close(m.Bye(), drain_s=5)
        with pytest.raises(WireError, match="closed"):
            await client.send_segment(make_segment())

    asyncio.run(play())
    wait_for(lambda: coordinator.of(m.Bye))


def test_an_asyncio_sender_that_waits_for_room_hears_of_the_end(zmq_coordinator: Coordinator) -> None:
    zmq_coordinator.is_committing = False

    async def play() -> None:
        client = AsyncClient(
            lambda: zmq_coordinator.address,
            "actor",
            "a",
            RUN,
            CONFIG,
            lambda message: None,
            max_outbox_segments=1,
        )
        client.start()
        await client.send_segment(make_segment())
        waiting = asyncio.create_task(client.send_segment(make_segment(member=1)))
        await asyncio.sleep(0)
        assert not await client.close()
        with pytest.raises(WireError, match="closed"):
            await waiting

    asyncio.run(play())


def test_goodbye_waits_for_a_lost_connection_while_there_is_time() -> None:
    coordinator = Coordinator().start()
    link = client_of(coordinator)
    link.start()
    link.wait_acked(link.send_segment(make_segment()), 20)
    coordinator.stop()
    wait_for(lambda: not link.is_connected)
    closing = threading.Thread(
        target=link.close, args=(m.Bye(counters={"x": 1.0}),), kwargs={"drain_s": 60.0}
    )
    closing.start()
    coordinator.start()
    try:
        closing.join(60)
        wait_for(lambda: coordinator.of(m.Bye) == [m.Bye(counters={"x": 1.0})])
    finally:
        coordinator.stop()
