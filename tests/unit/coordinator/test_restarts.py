"""Lifecycles whose environment cannot be restored start anew when they are handed out again."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import pytest
from coordinator_world import Actor, Learner, World

from cod_async.envs import registry
from cod_async.envs.hidden_buttons import SPEC
from cod_async.envs.hidden_buttons.env import HiddenButtons
from cod_async.errors import StoreError
from cod_async.lifecycle.segment import SegmentKey
from cod_async.store.ledger import ledger, ledger_with_problems
from cod_async.wire.messages import LeaseRef, LeaseRequest, Leases, SegmentData

MakeWorld = Callable[..., World]
OLD, NEW = LeaseRef(0, 0, 0), LeaseRef(0, 0, 1)


class Forgetful(HiddenButtons):
    is_resumable: ClassVar[bool] = False


@pytest.fixture(autouse=True)
def forgetful(monkeypatch: pytest.MonkeyPatch) -> None:
    spec = msgspec.structs.replace(SPEC, make=Forgetful)
    monkeypatch.setattr(registry, "get", lambda name: spec)


def ordinals(world: World, table: str) -> list[Any]:
    """(ordinal, lease epoch) of lifecycle (0, 0)."""
    rows: list[Any] = world.store._connection.execute(
        f"SELECT ordinal, lease_epoch FROM {table} WHERE (grp, member) = (0, 0) ORDER BY 1, 2"  # noqa: S608
    ).fetchall()
    return rows


def started(make_world: MakeWorld, **sections: object) -> tuple[World, Actor]:
    """A world in which an actor has delivered two of the three episodes of lifecycle (0, 0)."""
    world = make_world(**sections)
    Learner(world)
    actor = Actor(world, "a")
    actor.ask(1)
    actor.play(OLD)
    actor.play(OLD)
    return world, actor


def test_a_takeover_starts_at_the_beginning(make_world: MakeWorld) -> None:
    world, first = started(make_world)
    num_tokens = sum(row.num_action_tokens for row in world.store.segments.of_group(0))
    first.heartbeat()
    first.die()
    second = Actor(world, "b", instance=2)
    second.ask(1)
    (lease,) = next(m for m in second.messages if isinstance(m, Leases)).leases
    assert lease.ref == NEW and lease.state is None
    assert ordinals(world, "segments") == [] and ordinals(world, "refused_segments") == [(0, 0), (1, 0)]
    assert world.store._connection.execute("SELECT count(*) FROM payloads").fetchone() == (0,)
    assert world.brain.status()["drops"] == {"restarted": 2}
    second.play_all()
    assert ordinals(world, "segments") == [(0, 1), (1, 1), (2, 1)]
    row = world.store.work.lease(0, 0)
    assert row is not None and (row.state, row.num_takeovers) == ("ended", 1)
    second.heartbeat()
    answer, problems = ledger_with_problems(world.folder)
    assert answer["balanced"], problems
    assert answer["segments"]["dropped"] == {"restarted": 2}
    assert answer["tokens"]["dropped"] == {"restarted": num_tokens}
    assert answer["segments"]["in_flight"] == 3 and answer["segments"]["generated"] == 5


def test_the_abandoned_attempt_cannot_come_back(make_world: MakeWorld) -> None:
    world, zombie = started(make_world)
    kept = [world.store.segments.payload(SegmentKey(0, 0, ordinal)) for ordinal in (0, 1)]
    ahead = zombie.seal(OLD)  # played, not delivered
    world.close(zombie.session, "expired")
    other = Actor(world, "b", instance=2)
    other.ask(1)
    other.play(NEW)
    before = ordinals(world, "segments")
    zombie.connect()
    for seq, segment in enumerate(kept, 101):  # its acknowledgements were lost, so it sends everything again
        zombie.outbox[seq] = segment
        world.say(zombie.session, SegmentData(seq=seq, segment=segment))
    zombie.send(ahead)
    assert zombie.dropped == {"restarted": 2, "fenced": 1} and not zombie.outbox
    assert ordinals(world, "segments") == before == [(0, 1)]
    other.play_all()
    assert ordinals(world, "segments") == [(0, 1), (1, 1), (2, 1)]
    assert ledger(world.folder)["segments"]["dropped"] == {"fenced": 1, "restarted": 2}


@pytest.mark.parametrize("num_instructions", [50, 300, 450, 600, 2500])
def test_starting_anew_is_one_transaction(make_world: MakeWorld, num_instructions: int) -> None:
    world, first = started(make_world)
    first.die()
    second = Actor(world, "b", instance=2)
    second.request += 1
    request = LeaseRequest(request=second.request, num_lifecycles=1)
    has_failed = world.fail_inside(second.session, request, num_instructions)
    moved: tuple[list[Any], list[Any]] = ([], [(0, 0), (1, 0)])
    assert (ordinals(world, "segments"), ordinals(world, "refused_segments")) == (
        moved[::-1] if has_failed else moved
    )
    world.say(second.session, request)
    second.play_all()
    assert ordinals(world, "segments") == [(0, 1), (1, 1), (2, 1)]
    assert ledger(world.folder)["segments"]["dropped"] == {"restarted": 2}


def test_every_takeover_starts_anew(make_world: MakeWorld) -> None:
    world, actor = started(make_world)
    for epoch in (1, 2):
        actor.die()
        actor = Actor(world, f"b{epoch}", instance=10 + epoch)
        actor.ask(1)
        actor.play(LeaseRef(0, 0, epoch))
    actor.play_all()
    assert ordinals(world, "segments") == [(0, 2), (1, 2), (2, 2)]
    assert ordinals(world, "refused_segments") == [(0, 0), (0, 1), (1, 0)]


def test_a_failure_given_back_starts_anew_too_and_is_given_up_in_the_end(make_world: MakeWorld) -> None:
    world, actor = started(make_world, actors={"max_retries": 1})
    actor.give_back(OLD)
    actor.ask(1)
    actor.play(NEW)
    actor.give_back(NEW)
    row = world.store.work.lease(0, 0)
    assert row is not None and (row.state, row.reason) == ("given_up", "infrastructure")
    assert ordinals(world, "segments") == [
        (0, 1)
    ]  # dropped for the lifecycle's own reason when the group closes


def test_an_environment_that_cannot_be_asked_counts_as_one_that_cannot_be_restored(
    make_world: MakeWorld, monkeypatch: pytest.MonkeyPatch
) -> None:
    world, first = started(make_world)

    def broken(options: object) -> HiddenButtons:
        raise OSError("no simulator here")

    spec = msgspec.structs.replace(SPEC, make=broken)
    monkeypatch.setattr(registry, "get", lambda name: spec)
    first.die()
    second = Actor(world, "b", instance=2)
    second.ask(1)
    second.play_all()
    assert ordinals(world, "segments") == [(0, 1), (1, 1), (2, 1)]


def test_a_lifecycle_without_a_committed_segment_has_nothing_to_drop(make_world: MakeWorld) -> None:
    world = make_world()
    Learner(world)
    actor = Actor(world, "a")
    actor.ask(1)
    actor.die()
    other = Actor(world, "b", instance=2)
    other.ask(1)
    assert NEW in other.lives and world.brain.status()["drops"] == {}


def test_what_started_anew_is_trained_once(make_world: MakeWorld) -> None:
    world, first = started(make_world, learner={"groups_per_step": 1})
    learner = next(client for client in world.clients.values() if isinstance(client, Learner))
    first.die()
    second = Actor(world, "b", instance=2)
    second.ask(2)
    second.play_all()
    learner.request_step()
    learner.take_step()
    epochs = {
        (row.key.ordinal, row.lease_epoch, row.state)
        for row in world.store.segments.of_group(0)
        if row.key.member == 0
    }
    assert epochs == {(ordinal, 1, "trained") for ordinal in range(3)}


def test_a_conversation_begins_again(make_world: MakeWorld) -> None:
    carry = {"pack_size": 3, "group_size": 2, "carry": "transcript"}
    world, first = started(make_world, lifecycle=carry)
    stale = first.outbox[first.seal(OLD)]
    world.close(first.session, "expired")
    second = Actor(world, "b", instance=2)
    second.ask(1)
    spliced = msgspec.structs.replace(stale, lease_epoch=1, actor="b")
    second.outbox[99] = spliced  # goes on from the conversation that was dropped
    second.play(NEW)
    second.play(NEW)
    world.say(second.session, SegmentData(seq=99, segment=spliced))
    assert second.dropped == {"bad_transcript": 1}
    second.ask(1)
    second.play_all()
    assert ordinals(world, "segments") == [(0, 2), (2, 2), (4, 2)]


def test_a_segment_in_a_plan_forbids_it(make_world: MakeWorld) -> None:
    world, _ = started(make_world)
    world.store.segments.set_ready(SegmentKey(0, 0, 0), 1.0, 0.0, 1.0)
    with pytest.raises(StoreError, match="ready"):
        world.store.segments.restart(0, 0, "restarted")
