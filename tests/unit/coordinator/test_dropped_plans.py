"""A plan that the learner could not train is dropped once, by name, and its step gets another one."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from coordinator_world import Actor, Learner, World
from msgspec import UNSET

from cod_async.lifecycle.segment import Version
from cod_async.store.ledger import ledger
from cod_async.wire.messages import Refused, StepDone, StepRecorded

MakeWorld = Callable[..., World]


def play(actor: Actor) -> None:
    actor.ask(64)
    actor.play_all()


def batch_of(learner: Learner) -> tuple[str, set[str]]:
    """Ask for a step; return the digest of its plan and its segments."""
    learner.batch, learner.parts = None, {}
    learner.request_step()
    assert learner.batch is not None
    digest, items = learner.batch
    return digest, {str(item.key) for item in items}


def drop(learner: Learner, digest: str, step: int = 0, **crash: bool) -> None:
    version = Version(learner.version.lineage, step)
    message = StepDone(version=version, plan_digest=digest, metrics={}, dropped_as="nonfinite")
    learner.world.say(learner.session, message, **crash)


def answers(learner: Learner) -> list[StepRecorded]:
    return [message for message in learner.messages if isinstance(message, StepRecorded)]


def balanced(world: World, actor: Actor) -> dict[str, int]:
    actor.heartbeat()
    answer = ledger(world.folder)
    assert answer["balanced"], answer
    return {**answer["segments"]["dropped"], "trained": answer["segments"]["trained"]}


def test_a_dropped_plan_makes_room_for_another(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    play(actor)
    digest, first = batch_of(learner)
    drop(learner, digest)
    assert answers(learner) == [StepRecorded(version=Version(0, 0), dropped_plan=digest)]
    assert balanced(world, actor) == {"nonfinite": len(first), "trained": 0}
    assert world.brain.step == 0 and world.store.history.step(Version(0, 0)) is None
    play(actor)
    other, second = batch_of(learner)
    assert other != digest and not first & second
    learner.take_step()
    assert balanced(world, actor) == {"nonfinite": len(first), "trained": len(second)}
    taken = world.store.history.step(Version(0, 0))
    assert taken is not None and taken.state == "done"
    # the chain of what was trained knows nothing of what was dropped
    assert world.store.history.trained_digest(Version(0, 1)) == learner.trained_digest
    tokens = ledger(world.folder)["tokens"]["dropped"]["nonfinite"]
    assert taken.report["dropped_action_tokens"] == {"nonfinite": tokens}


@pytest.mark.parametrize("crash", ["", "is_lost_before", "is_lost_after"])
def test_said_twice_it_is_dropped_once(make_world: MakeWorld, crash: str) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    play(actor)
    digest, first = batch_of(learner)
    drop(learner, digest, **({crash: True} if crash else {}))
    drop(learner, digest)
    play(actor)
    other, _ = batch_of(learner)
    drop(learner, digest)  # a late repetition, when the next plan is already made
    assert answers(learner)[-1] == StepRecorded(version=Version(0, 0), dropped_plan=digest)
    assert batch_of(learner)[0] == other
    learner.take_step()
    assert answers(learner)[-1].dropped_plan is UNSET
    drop(learner, digest)
    assert balanced(world, actor)["nonfinite"] == len(first)
    assert not [message for message in learner.messages if isinstance(message, Refused)]


def test_only_the_plan_itself_can_be_dropped(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    play(actor)
    digest, segments = batch_of(learner)
    drop(learner, "0" * 64)
    assert [message.code for message in learner.messages if isinstance(message, Refused)] == ["plan_mismatch"]
    assert batch_of(learner) == (digest, segments)
    learner.take_step()
    drop(learner, digest)
    refused = [message for message in learner.messages if isinstance(message, Refused)]
    assert refused[-1].code == "plan_mismatch" and "(done)" in refused[-1].detail
    assert balanced(world, actor) == {"trained": len(segments)}


def test_segments_that_were_to_be_used_again_stay_trained(make_world: MakeWorld) -> None:
    world = make_world(replay={"max_uses": 3, "groups_per_step": 2})
    learner, actor = Learner(world), Actor(world)
    play(actor)
    _, first = batch_of(learner)
    learner.take_step()
    play(actor)
    digest, second = batch_of(learner)
    again = first & second
    assert again
    drop(learner, digest, step=1)
    assert balanced(world, actor) == {"nonfinite": len(second - again), "trained": len(first)}
    play(actor)
    _, third = batch_of(learner)
    assert first & third  # they may be used again after all
    learner.take_step()
    assert balanced(world, actor)["trained"] == len(first | third)


def test_what_a_dropped_plan_held_is_not_trained_after_a_rollback(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    play(actor)
    digest, first = batch_of(learner)
    drop(learner, digest)
    play(actor)
    _, second = batch_of(learner)
    learner.take_step()
    learner.die()
    again = Learner(world)
    play(actor)
    _, segments = batch_of(again)
    assert second <= segments and not first & segments
    assert balanced(world, actor)["nonfinite"] == len(first)


def test_the_witness_of_a_step_is_kept_with_it(make_world: MakeWorld) -> None:
    world = make_world()
    learner, actor = Learner(world), Actor(world)
    play(actor)
    digest, _ = batch_of(learner)
    witness = {"weights": "ab" * 32, "num_threads": "1"}
    done = StepDone(version=learner.version, plan_digest=digest, metrics={"loss": 0.1}, witness=witness)
    world.say(learner.session, done)
    row = world.store.history.step(Version(0, 0))
    assert row is not None and row.report["witness"] == witness and row.report["learner"] == {"loss": 0.1}
