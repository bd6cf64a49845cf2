"""Transcripts at the coordinator: chains are checked, takeovers get everything, batches have no holes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest
from coordinator_world import Actor, Learner, World

from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import RowParent, Segment, SegmentKey
from cod_async.lifecycle.transcript import mark_after, token_ids_of
from cod_async.store.ledger import ledger
from cod_async.wire.messages import LeaseRef

MakeWorld = Callable[..., World]
REF = LeaseRef(0, 0, 0)


@pytest.fixture
def world(make_world: MakeWorld) -> World:
    return make_world(lifecycle={"pack_size": 5, "group_size": 2, "carry": "transcript"})


def _spoiled(segment: Segment, parent: RowParent | None = None, token: int | None = None) -> Segment:
    """The segment as if it went on from another conversation; consistent in itself."""
    (row,) = segment.rows
    if token is not None:
        row = msgspec.structs.replace(row, token_ids=Array.of([token, *row.token_ids.numpy()[1:]], "<i4"))
    row = msgspec.structs.replace(row, parent=parent if parent is not None else row.parent)
    transcript = segment.state_after.transcript
    assert transcript is not None
    state = msgspec.structs.replace(
        segment.state_after, transcript=msgspec.structs.replace(transcript, mark=mark_after(row))
    )
    return msgspec.structs.replace(segment, rows=(row,), state_after=state)


@pytest.mark.parametrize("has_crashed", [False, True])
def test_a_delta_that_does_not_follow_costs_the_lease(world: World, has_crashed: bool) -> None:
    Learner(world)
    actor = Actor(world)
    actor.ask(2)
    actor.play(REF)
    if has_crashed:
        world.crash()  # what was remembered of the conversation is read from the database again
    seq = actor.seal(REF)
    actor.outbox[seq] = _spoiled(actor.outbox[seq], parent=RowParent(4, "0" * 64))
    actor.send(seq)
    assert actor.dropped == {"bad_transcript": 1}
    lease = world.store.work.lease(0, 0)
    assert lease is not None and (lease.state, lease.lease_epoch, lease.next_ordinal) == ("free", 1, 2)
    assert ledger(world.folder)["balanced"]


def test_a_forged_first_delta_is_only_another_beginning(world: World) -> None:
    """The chain pins what follows to what was committed, whatever the first delta says."""
    Learner(world)
    actor = Actor(world)
    actor.ask(2)
    seq = actor.seal(REF)
    honest = actor.outbox[seq]
    actor.outbox[seq] = _spoiled(honest, token=9)
    actor.send(seq)
    assert actor.dropped == {} and SegmentKey(0, 0, 0) in actor.acked
    actor.play(REF)  # goes on from the honest one, which was never committed
    assert actor.dropped == {"bad_transcript": 1}


def test_a_takeover_gets_the_whole_conversation(world: World) -> None:
    Learner(world)
    first = Actor(world)
    first.ask(2)
    played: list[int] = []
    for _ in range(3):
        seq = first.seal(REF)
        played += first.outbox[seq].rows[0].token_ids.numpy().tolist()
        first.send(seq)
    first.die()
    second = Actor(world, "actor-1")
    second.ask(8)
    lease, state = second.lives[LeaseRef(0, 0, 1)]
    assert lease.state is not None and state.next_ordinal == 6
    assert token_ids_of(state) == played
    second.play_all()
    assert second.dropped == {}


def test_dropped_segments_stay_as_context(world: World) -> None:
    """Segments too old to be trained are sent along where later ones go on from them, to be read only."""
    learner = Learner(world)
    actor = Actor(world)
    actor.ask(4)
    actor.play_all()
    world.store.segments.drop([SegmentKey(0, 0, 0), SegmentKey(0, 0, 4), SegmentKey(0, 1, 8)], "stale")
    learner.request_step()
    assert learner.batch is not None
    items = [item for item in learner.batch[1] if item.key.group == 0]
    assert [(i.key.member, i.key.ordinal, i.is_context) for i in items] == [
        (0, 0, True),
        (0, 2, False),
        (0, 4, True),
        (0, 6, False),
        (0, 8, False),
        (1, 0, False),
        (1, 2, False),
        (1, 4, False),
        (1, 6, False),
    ]
    assert all(item.advantage == 0.0 and item.rows for item in items if item.is_context)
    parent = None
    for item in items[:5]:
        (row,) = item.rows
        assert parent is None or row.parent == parent
        parent = mark_after(row)


def test_context_outlives_pruning_as_long_as_its_group_can_be_trained_again(tmp_path: Path) -> None:
    from coordinator_world import make_config

    config = make_config(
        lifecycle={"pack_size": 3, "group_size": 2, "carry": "transcript"},
        store={"retention": "until_checkpoint"},
        learner={"groups_per_step": 1},
    )
    world = World(tmp_path, config)
    learner = Learner(world)
    actor = Actor(world)
    actor.ask(2)
    actor.play_all()
    world.store.segments.drop([SegmentKey(0, 0, 0)], "stale")
    start = learner.checkpoint()
    learner.request_step()
    learner.take_step()
    world.store.prune_payloads(before_step=0)  # what a checkpoint of the step before would allow
    learner.die()
    again = Learner(world, start)
    again.request_step()
    assert again.batch is not None
    assert [item.is_context for item in again.batch[1]][:2] == [True, False]
    again.take_step()
    assert world.store.prune_payloads(before_step=5) > 0
    world.store.close()


def test_context_of_late_members_outlives_pruning_until_they_are_trained(make_world: MakeWorld) -> None:
    """The group was trained long ago; of a late conversation one part is dropped, the others come now."""
    world = make_world(
        lifecycle={"pack_size": 3, "group_size": 3, "carry": "transcript"},
        store={"retention": "until_checkpoint"},
        learner={"groups_per_step": 1},
        staleness={"max_lag": 8},
        groups={"close": "quorum", "quorum_members": 2, "after_s": 10.0},
    )
    learner, actor = Learner(world), Actor(world)
    actor.ask(64)
    late = LeaseRef(0, 2, 0)
    for ref in [ref for ref in actor.lives if ref != late]:
        while ref in actor.lives:
            actor.play(ref)
    world.tick(10.5)
    for _ in range(3):
        learner.request_step()
        learner.take_step()
    while late in actor.lives:
        actor.play(late)
    world.store.segments.drop([SegmentKey(0, 2, 0)], "version_spread")
    assert world.store.prune_payloads(before_step=3) > 0
    learner.request_step()
    assert learner.batch is not None
    items = [item for item in learner.batch[1] if item.key.group == 0]
    assert [(item.key.ordinal, item.is_context) for item in items] == [(0, True), (2, False), (4, False)]
    learner.take_step()
    world.store.prune_payloads(before_step=9)
    assert not world.store.segments.kept(0)
