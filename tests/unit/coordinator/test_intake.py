from __future__ import annotations

from collections.abc import Callable

import msgspec
import pytest
from coordinator_world import Actor, Learner, World

from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Segment, SegmentKey, Version, VersionSpan
from cod_async.store.ledger import ledger
from cod_async.wire.messages import LeaseRef, Refused, SegmentData

MakeWorld = Callable[..., World]


@pytest.fixture
def actor(make_world: MakeWorld) -> Actor:
    world = make_world()
    Learner(world)
    actor = Actor(world)
    actor.ask(4)
    return actor


def change(segment: Segment, **fields: object) -> Segment:
    return msgspec.structs.replace(segment, **fields)


def spoil(actor: Actor, ref: LeaseRef, **fields: object) -> int:
    seq = actor.seal(ref, num_tokens=3)
    actor.outbox[seq] = change(actor.outbox[seq], **fields)
    return seq


def stored(world: World) -> list[tuple[int, int, int, int, str]]:
    rows = world.store._connection.execute("SELECT grp, member, ordinal, lease_epoch, state FROM segments")
    return sorted(rows.fetchall())


def test_a_segment_is_settled_once_committed(actor: Actor) -> None:
    ref = LeaseRef(0, 0, 0)
    actor.play(ref)
    assert actor.acked == {SegmentKey(0, 0, 0): 0} and actor.outbox == {}
    assert stored(actor.world) == [(0, 0, 0, 0, "waiting")]


@pytest.mark.parametrize("crash", ["is_lost_before", "is_lost_after"])
def test_a_crash_around_the_commit_changes_nothing(actor: Actor, crash: str) -> None:
    ref = LeaseRef(0, 0, 0)
    actor.play(ref, **{crash: True})
    assert actor.acked == {SegmentKey(0, 0, 0): 0}
    assert stored(actor.world) == [(0, 0, 0, 0, "waiting")]


def test_a_duplicate_is_acknowledged_and_not_counted(actor: Actor) -> None:
    seq = actor.seal(LeaseRef(0, 0, 0))
    segment = actor.outbox[seq]
    out = [actor.send(seq)]
    for other_seq in (seq, 99):
        actor.outbox[other_seq] = segment
        out.append(actor.send(other_seq))
    assert [settled.reason for one in out for settled in one.settled] == [None] * 3
    assert len(stored(actor.world)) == 1 and ledger(actor.world.folder)["segments"]["generated"] == 1


def test_out_of_order_waits_for_its_predecessor(actor: Actor) -> None:
    ref = LeaseRef(0, 0, 0)
    first, second = actor.seal(ref), actor.seal(ref)
    assert actor.send(second).settled == []
    assert actor.send(second).settled == []
    assert stored(actor.world) == []
    assert [settled.seq for settled in actor.send(first).settled] == [first, second]
    assert [row[2] for row in stored(actor.world)] == [0, 1]


def test_an_early_segment_is_fenced_when_its_lease_is_taken(actor: Actor) -> None:
    ref = LeaseRef(0, 0, 0)
    actor.seal(ref)
    second = actor.seal(ref)
    actor.send(second)
    with actor.world.store.transaction():
        lease = actor.world.store.work.lease(0, 0)
        assert lease is not None
        actor.world.store.work.free(lease)
    actor.world.tick()
    assert actor.dropped == {"fenced": 1}


NAN_ROW = {"behavior_logprobs": Array.of([float("nan")] * 3, "<f4")}
POSITIVE_ROW = {"behavior_logprobs": Array.of([0.5] * 3, "<f4")}
FUTURE_ROW = {"versions": (VersionSpan(Version(0, 1), 3),)}
OTHER_LINEAGE_ROW = {"versions": (VersionSpan(Version(5, 0), 3),)}


@pytest.mark.parametrize(
    ("fields", "row_fields", "reason"),
    [
        ({"run": "other"}, {}, "wrong_run"),
        ({"pack_seed": 1}, {}, "wrong_world"),
        ({"preset": "cross"}, {}, "wrong_world"),
        ({"reward": float("nan")}, {}, "bad_reward"),
        ({"kind": "update"}, {}, "bad_kind"),
        ({"is_last": True}, {}, "bad_is_last"),
        ({}, NAN_ROW, "bad_logprobs"),
        ({}, POSITIVE_ROW, "bad_logprobs"),
        ({}, FUTURE_ROW, "unknown_version"),
        ({}, OTHER_LINEAGE_ROW, "unknown_version"),
    ],
)
def test_bad_segments_are_dropped_by_name_and_cost_the_lease(
    actor: Actor, fields: dict[str, object], row_fields: dict[str, object], reason: str
) -> None:
    ref = LeaseRef(0, 0, 0)
    seq = actor.seal(ref, num_tokens=3)
    segment = actor.outbox[seq]
    row = msgspec.structs.replace(segment.rows[0], **row_fields)
    actor.outbox[seq] = change(segment, rows=(row,), **fields)
    actor.send(seq)
    assert actor.dropped == {reason: 1} and stored(actor.world) == []
    assert ref not in actor.lives
    lease = actor.world.store.work.lease(0, 0)
    assert lease is not None and (lease.state, lease.lease_epoch, lease.num_retries) == ("free", 1, 1)
    answer = ledger(actor.world.folder)
    assert answer["segments"]["dropped"] == {reason: 1} and answer["balanced"]


def test_a_refused_segment_is_counted_once_however_often_it_comes(actor: Actor) -> None:
    seq = spoil(actor, LeaseRef(0, 0, 0), pack_seed=1)
    segment = actor.outbox[seq]
    actor.send(seq)
    for other_seq in (seq, 50):
        actor.outbox[other_seq] = segment
        actor.send(other_seq)
    actor.world.crash()
    actor.outbox[51] = segment
    actor.send(51)
    assert ledger(actor.world.folder)["segments"]["dropped"] == {"wrong_world": 1}
    assert actor.dropped == {"wrong_world": 4}


def test_unknown_lifecycles_are_refused(actor: Actor) -> None:
    seq = spoil(actor, LeaseRef(0, 0, 0), key=SegmentKey(1 << 60, 0, 0))
    actor.send(seq)
    assert actor.dropped == {"unknown_lease": 1}


def test_three_bad_segments_within_a_minute_expel_the_actor(actor: Actor) -> None:
    refs = list(actor.lives)
    for index, ref in enumerate(refs[:2]):
        actor.send(spoil(actor, ref, pack_seed=1))
        actor.world.tick(61.0 if index == 0 else 1.0)
    assert not [m for m in actor.messages if isinstance(m, Refused)]
    actor.send(spoil(actor, refs[2], pack_seed=1))  # the first one is too long ago
    assert not [m for m in actor.messages if isinstance(m, Refused)]
    actor.ask(4)
    for ref in list(actor.lives)[:1]:
        actor.send(spoil(actor, ref, pack_seed=1))
    refused = [m for m in actor.messages if isinstance(m, Refused)]
    assert [(m.code, m.is_fatal) for m in refused] == [("quarantined", True)]
    assert actor.world.store.work.held_leases(actor.session) == []
    actor.ask(4)
    assert isinstance(actor.messages[-1], Refused)


def test_an_actor_cannot_send_for_another_ones_lease(actor: Actor) -> None:
    thief = Actor(actor.world, "thief", instance=9)
    seq = actor.seal(LeaseRef(0, 0, 0))
    out = actor.world.say(thief.session, SegmentData(seq=1, segment=actor.outbox[seq]))
    assert [settled.reason for settled in out.settled] == ["fenced"]
    assert stored(actor.world) == []


def test_no_carry_has_solve_episodes_only(make_world: MakeWorld) -> None:
    world = make_world(
        lifecycle={"carry": "none", "pack_size": 3, "group_size": 2}, learner={"groups_per_step": 1}
    )
    learner = Learner(world)
    actor = Actor(world)
    actor.ask(2)
    for ref in list(actor.lives):
        for position in range(3):
            actor.send(actor.seal(ref, reward=float(ref.member == position)))
    assert [row[2] for row in stored(world)] == [0, 2, 4] * 2
    learner.request_step()
    assert learner.batch is not None
    # every task stands alone: reward minus the mean of the two members at the same position
    advantages = {(item.key.member, item.position): item.advantage for item in learner.batch[1]}
    assert advantages == {(0, 0): 0.5, (0, 1): -0.5, (0, 2): 0.0, (1, 0): -0.5, (1, 1): 0.5, (1, 2): 0.0}
