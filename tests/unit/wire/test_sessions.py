"""Rules of the session machines that the model check does not single out."""

from __future__ import annotations

from wire_samples import make_segment

from cod_async.wire.client_session import FENCED_BEFORE_SEND, ClientSession
from cod_async.wire.codec import Envelope, encode_body, encode_segment
from cod_async.wire.messages import (
    Ack,
    Bye,
    Fence,
    Hello,
    LeaseRef,
    LeaseRequest,
    Refused,
    SegmentData,
    Welcome,
)
from cod_async.wire.seqs import SeqSet
from cod_async.wire.session import Closed, KnownSession, Opened, Outcome, Received, ServerSessions

BODY_BYTES = 1000


class Server:
    """ServerSessions with a counter for epochs and short ways to say things to it."""

    def __init__(self, **options: object) -> None:
        self.epoch = 0
        settings = {"window_segments": 4, "window_bytes": 4 * BODY_BYTES, "session_timeout_s": 5.0} | options
        self.sessions = ServerSessions(allocate=self._allocate, **settings)  # type: ignore[arg-type]

    def _allocate(self, hello: Hello) -> int:
        self.epoch += 1
        return self.epoch

    def hello(self, route: bytes = b"r", now: float = 0.0, **changes: object) -> Outcome:
        fields = {"role": "actor", "name": "a", "protocol": 2, "pid": 1, "host": "h", "instance": 1} | changes
        hello = Hello(**fields)  # type: ignore[arg-type]
        return self.sessions.receive(route, envelope(hello.session), hello, 50, now)

    def data(self, seq: int, session: int = 1, num_bytes: int = BODY_BYTES, route: bytes = b"r") -> Outcome:
        self.sessions._refused_at.clear()  # here every refusal is told
        message = SegmentData(seq=seq, segment=make_segment(member=seq))
        return self.sessions.receive(route, envelope(session), message, num_bytes, 0.0)


def envelope(session: int) -> Envelope:
    return Envelope(1, "run-1", session, 0, 0)


def code(outcome: Outcome) -> str:
    (reply,) = outcome.replies
    assert isinstance(reply.message, Refused)
    return reply.message.code


def welcome_of(outcome: Outcome) -> Welcome:
    message = outcome.replies[-1].message
    assert isinstance(message, Welcome)
    return message


def test_seq_set_in_any_order() -> None:
    seqs = SeqSet()
    for seq in (3, 1, 5, 2, 2, 9):
        seqs.add(seq)
    assert [seq for seq in range(12) if seq in seqs] == [1, 2, 3, 5, 9]
    assert (len(seqs), seqs.low) == (5, 3)
    assert 0 not in seqs
    rest = SeqSet.all_but(7, [4, 6])
    assert [seq for seq in range(9) if seq in rest] == [1, 2, 3, 5, 7]
    rest.add(4)
    assert (rest.low, len(rest)) == (5, 6)
    assert len(SeqSet.all_but(0, [])) == 0


def test_credit_is_cumulative_in_segments_and_bytes() -> None:
    server = Server()
    assert (welcome_of(server.hello()).credit_segments, server.sessions.live[1].granted_bytes) == (4, 4000)
    for seq in (1, 2, 3):
        assert len(server.data(seq).events) == 1
    server.sessions.settle(1, 3)
    server.sessions.settle(1, 1, "fenced")
    (ack,) = server.sessions.acks()
    assert ack.message == Ack(seqs=[3, 1], credit_segments=6, credit_bytes=6000, dropped={"1": "fenced"})
    assert server.sessions.acks() == []
    assert server.data(1).events == []  # a repetition of what is settled
    (again,) = server.sessions.acks()
    assert isinstance(again.message, Ack)
    assert (again.message.seqs, again.message.dropped) == ([1], {"1": "fenced"})
    assert server.data(2).events == []  # a repetition of what is being committed
    assert server.sessions.acks() == []


def test_what_goes_far_beyond_credit_is_refused() -> None:
    server = Server()
    server.hello()
    assert code(server.data(9)) == "over_credit"
    assert len(server.data(1, num_bytes=50_000).events) == 1  # larger than the window, but alone
    assert code(server.data(2)) == "over_credit"
    server.sessions.settle(1, 1)
    assert len(server.data(2).events) == 1
    assert server.sessions.rejected == {"over_credit": 2}


def test_credit_can_be_withdrawn() -> None:
    server = Server()
    server.hello()
    server.data(1)
    server.sessions.set_credit_open(False)
    server.sessions.settle(1, 1)
    (ack,) = server.sessions.acks()
    assert isinstance(ack.message, Ack)
    assert ack.message.credit_segments == 4
    server.sessions.set_credit_open(True)
    (ack,) = server.sessions.acks()
    assert ack.message == Ack(seqs=[], credit_segments=5, credit_bytes=5000)


def test_a_restarted_coordinator_goes_on_with_the_clients_account() -> None:
    server = Server(known=[KnownSession(7, "actor", "a")])
    outcome = server.hello(session=7, last_seq=10, unacked=[8, 10], settled_bytes=8000)
    assert outcome.events == [Opened(server.sessions.live[7], True)]
    welcome = welcome_of(outcome)
    assert (welcome.session, welcome.is_continued) == (7, True)
    assert (welcome.credit_segments, welcome.credit_bytes) == (8 + 4, 8000 + 4000)
    assert server.data(9, session=7).events == []  # settled before the crash
    assert len(server.data(8, session=7).events) == 1
    assert len(server.data(11, session=7).events) == 1


def test_a_known_session_that_does_not_return_expires() -> None:
    server = Server(known=[KnownSession(7, "actor", "a"), KnownSession(8, "learner", "learner")])
    server.hello(session=8, role="learner", name="learner", now=4.0)
    for now in (1.0, 2.0, 3.0, 4.0, 5.0):
        assert server.sessions.expire(now) == []
    closed = server.sessions.expire(5.5)
    assert [(one.session.session, one.reason) for one in closed] == [(7, "expired")]


def test_time_this_side_was_away_is_not_held_against_clients() -> None:
    server = Server()
    server.hello()
    assert server.sessions.expire(0.5) == []
    assert server.sessions.expire(100.0) == []  # this side did not look for 99.5 s
    assert server.sessions.expire(101.0) == []
    for now in (102.0, 103.0, 103.5):
        assert server.sessions.expire(now) == []
    assert [one.reason for one in server.sessions.expire(104.0)] == ["expired"]


def test_a_foreign_session_is_not_continued() -> None:
    server = Server(known=[KnownSession(7, "actor", "a")])
    outcome = server.hello(session=7, name="b", instance=2)
    assert (welcome_of(outcome).session, welcome_of(outcome).is_continued) == (1, False)
    assert 7 in server.sessions.live
    server.hello(session=7)
    outcome = server.hello(session=7, instance=9, route=b"other")  # same name, another process: takes over
    assert welcome_of(outcome).is_continued is False
    assert [type(event) for event in outcome.events] == [Closed, Opened]


def test_a_repeated_first_hello_gets_the_same_session_until_it_is_used() -> None:
    server = Server()
    assert welcome_of(server.hello()).session == 1
    assert welcome_of(server.hello()).session == 1
    server.data(1)
    assert welcome_of(server.hello()).session == 2
    assert code(server.data(2)) == "session_expired"


def test_two_living_processes_of_one_name_do_not_alternate_forever() -> None:
    server = Server()
    for turn in range(10):
        for instance, route in ((1, b"one"), (2, b"two")):
            welcome = welcome_of(server.hello(route=route, instance=instance, now=float(turn)))
            other = b"two" if route == b"one" else b"one"
            if welcome.session > 1:
                outcome = server.data(1, session=welcome.session - 1, route=other)
                if code(outcome) == "session_replaced":
                    assert turn <= 3
                    assert server.sessions.live[welcome.session].instance == instance
                    return
    raise AssertionError("they alternate")


def test_frames_need_a_hello_on_their_connection() -> None:
    server = Server()
    assert code(server.data(1, session=0)) == "hello_first"
    assert code(server.data(1, session=3)) == "session_expired"
    server.hello()
    assert code(server.data(1, route=b"elsewhere")) == "hello_first"


def test_last_words_count_although_the_speaker_has_left() -> None:
    """A client that said Bye closes at once; the Pong that finds it gone may be sent before Bye is read."""
    server = Server()
    server.hello()
    server.sessions.lost_route(b"r")
    assert server.sessions.live[1].client_id is None
    assert code(server.data(1, route=b"elsewhere")) == "hello_first"
    outcome = server.sessions.receive(b"r", envelope(1), Bye(counters={"x": 1.0}), 10, 1.0)
    assert [type(event) for event in outcome.events] == [Received, Closed]


def test_a_new_connection_ends_what_the_old_one_may_say() -> None:
    server = Server()
    server.hello()
    server.sessions.lost_route(b"r")
    server.hello(route=b"again", session=1)
    assert code(server.data(1)) == "hello_first"


def test_hellos_that_make_no_sense() -> None:
    server = Server(known=[KnownSession(7, "actor", "a")])
    assert code(server.hello(protocol=3)) == "protocol"
    for changes in (
        {"unacked": [0], "last_seq": 5},
        {"unacked": [6], "last_seq": 5},
        {"unacked": [1], "last_seq": 1 << 60},
        {"unacked": list(range(1, 70_000)), "last_seq": 70_000},
        {"last_seq": 1 << 62},
        {"settled_bytes": 1 << 62},
    ):
        server.sessions._refused_at.clear()
        assert code(server.hello(session=7, **changes)) == "bad_hello"


def test_bye_closes() -> None:
    server = Server()
    server.hello()
    outcome = server.sessions.receive(b"r", envelope(1), Bye(counters={"x": 1.0}), 10, 1.0)
    assert [type(event) for event in outcome.events] == [Received, Closed]
    assert server.sessions.live == {}


# --------------------------------------------------------------------------------------------------- client


def open_client(
    num_segments: int = 0, credit_segments: int = 100, credit_bytes: int = 1 << 20
) -> ClientSession:
    client = ClientSession(role="actor", name="a", pid=1, host="h", instance=1, resend_s=1.0)
    client.connected(0.0)
    assert client.next_outgoing(0.0) is not None
    for member in range(num_segments):
        client.offer(encode_segment(make_segment(member=member)))
    client.receive(1, welcome(1, credit_segments, credit_bytes), 0.0)
    assert client.next_outgoing(0.0) is not None  # the heartbeat
    return client


def welcome(session: int, credit_segments: int = 100, credit_bytes: int = 1 << 20) -> Welcome:
    return Welcome(
        session=session,
        is_continued=False,
        heartbeat_s=1000.0,
        session_timeout_s=5000.0,
        credit_segments=credit_segments,
        credit_bytes=credit_bytes,
        manifest=None,
    )


def num_sent(client: ClientSession, now: float) -> int:
    count = 0
    while client.next_outgoing(now) is not None:
        count += 1
    return count


def test_resending_grows_rarer() -> None:
    client = open_client(num_segments=3)
    assert num_sent(client, 0.0) == 3
    times = [tenth / 10 for tenth in range(1, 400)]
    sent = [(now, num_sent(client, now)) for now in times]
    assert [(now, count) for now, count in sent if count] == [
        (t, 3) for t in (1.0, 3.0, 7.0, 15.0, 23.0, 31.0, 39.0)
    ]
    assert client.num_resent == 21


def test_a_segment_larger_than_the_window_travels_alone() -> None:
    client = open_client(num_segments=2, credit_bytes=10)
    assert num_sent(client, 0.0) == 1
    assert client.receive(1, Ack(seqs=[1], credit_segments=100, credit_bytes=20), 0.1).settled == [(1, None)]
    assert num_sent(client, 0.1) == 1


def test_stale_answers_change_nothing() -> None:
    client = open_client(num_segments=2)
    num_sent(client, 0.0)
    assert client.receive(9, Ack(seqs=[1], credit_segments=1, credit_bytes=1), 0.1).settled == []
    client.receive(1, Ack(seqs=[], credit_segments=1, credit_bytes=1), 0.1)
    assert client.credit[0] == 98  # credit never falls
    client.receive(9, Refused(code="session_expired", detail=""), 0.2)
    assert client.session == 1
    client.receive(1, Refused(code="session_expired", detail=""), 0.2)
    assert (client.session, client.state, client.num_unacked) == (0, "greeting", 2)
    client.receive(1, welcome(1), 0.3)  # repeated, late
    assert client.state == "greeting"
    client.receive(2, welcome(2), 0.3)
    assert (client.session, client.state, client.num_unsent) == (2, "open", 2)


def test_one_way_messages_keep_their_place_behind_segments() -> None:
    client = open_client(num_segments=2, credit_segments=1)
    client.say(encode_body(Bye()))
    first = client.next_outgoing(0.0)
    assert first is not None and b"segment" in first.body
    assert client.next_outgoing(0.0) is None  # no credit for the second, and Bye waits behind it
    client.receive(1, Ack(seqs=[1], credit_segments=2, credit_bytes=1 << 20), 0.1)
    kinds = []
    while (outgoing := client.next_outgoing(0.1)) is not None:
        kinds.append(b"bye" in outgoing.body)
    assert kinds == [False, True]


def test_the_last_word_does_not_wait() -> None:
    client = open_client(num_segments=2, credit_segments=0)
    client.say(encode_body(LeaseRequest(request=1, num_lifecycles=1)))
    client.say(encode_body(Bye()), is_last=True)
    assert num_sent(client, 0.0) == 2


def test_silence() -> None:
    client = open_client()
    assert not client.is_peer_dead(4999.0)
    assert client.is_peer_dead(5001.0)
    client.disconnected()
    assert not client.is_peer_dead(9999.0)
    assert client.next_outgoing(9999.0) is None


def test_a_fence_drops_nothing_that_was_ever_sent() -> None:
    """What was sent in an expired session may be committed: only its ack may settle it, or it counts
    twice.
    """
    client = open_client()
    lease = LeaseRef(0, 0, 0)
    sent, unsent = (encode_segment(make_segment(member=member)) for member in (0, 1))
    client.offer(sent, lease)
    assert num_sent(client, 0.0) == 1
    client.receive(1, Refused(code="session_expired", detail=""), 0.1)
    client.receive(2, welcome(2, credit_segments=0), 0.2)  # the database is full: no credit
    client.offer(unsent, lease)
    fenced = client.receive(2, Fence(leases=[lease], reason="not_yours"), 0.3)
    assert (fenced.settled, client.num_unsent) == ([(2, FENCED_BEFORE_SEND)], 1)
    client.receive(2, Ack(seqs=[], credit_segments=1, credit_bytes=1 << 20), 0.4)
    assert num_sent(client, 0.4) == 2  # the heartbeat and the segment
    answer = client.receive(2, Ack(seqs=[1], credit_segments=1, credit_bytes=1 << 20), 0.5)
    assert answer.settled == [(1, None)]


def test_a_peer_that_is_dead_already_is_not_waited_for_again() -> None:
    client = open_client()
    assert num_sent(client, 6000.0) == 1  # the heartbeat
    assert client.is_peer_dead(6000.0)
    assert client.deadline(6000.0) > 6000.0  # else its owner would spin until it gives the connection up
