"""Admission by forecast in the coordinator: it may cost speed, never the run."""

from __future__ import annotations

from collections.abc import Callable

import msgspec
from coordinator_world import Actor, Learner, World

from cod_async.wire.messages import LeaseRef

MakeWorld = Callable[..., World]


def play_all(world: World, learner: Learner, actor: Actor, wall_s: float) -> None:
    """Every lease to its end, each episode with this wall time; then a step, if there is one."""
    while actor.lives:
        seq = actor.seal(next(iter(actor.lives)))
        actor.outbox[seq] = msgspec.structs.replace(actor.outbox[seq], wall_s=wall_s)
        actor.send(seq)
    learner.request_step()
    if learner.batch is not None:
        learner.take_step()


def learned(make_world: MakeWorld) -> tuple[World, Learner, Actor]:
    """A run whose forecast knows lifecycles of 30 to 48 seconds."""
    world = make_world(
        learner={"groups_per_step": 2},
        staleness={"max_lag": 2, "plan_ahead_steps": 2, "on_bound": "expire"},
    )
    learner, actor = Learner(world), Actor(world)
    for number in range(6):
        actor.ask(4)
        world.tick(30.0)
        play_all(world, learner, actor, 10.0 + number)
    for _ in range(20):
        world.tick(0.3)
        actor.ask(1)
    return world, learner, actor


def test_work_that_a_dead_actor_leaves_is_handed_out_again(make_world: MakeWorld) -> None:
    world, learner, actor = learned(make_world)
    num_held = len(actor.lives)
    assert num_held > 4  # more than a step's worth was under way
    actor.die()
    learner.request_step()
    assert world.brain.status()["is_learner_waiting"]
    other = Actor(world, "actor-1", instance=2)
    world.tick(1.0)
    other.ask(64)
    assert len(other.lives) >= num_held


def test_what_looks_hopeless_is_played_when_nothing_else_is(make_world: MakeWorld) -> None:
    """Closed groups turn over as fast as they like in the forecast; in truth nobody plays anything."""
    world, learner, actor = learned(make_world)
    before, first = world.brain.step, sorted(actor.lives, key=lambda ref: (ref.group, ref.member))[:2]
    for ref in first:  # one group closes, which is not enough for a step
        while ref in actor.lives:
            actor.play(ref)
    actor.die()
    other = Actor(world, "actor-1", instance=2)
    for _ in range(12):
        learner.request_step()
        if learner.batch is not None:
            learner.take_step()
        world.tick(1.0)
        other.ask(1)
        play_all(world, learner, other, 15.0)
    assert world.brain.step >= before + 2


def hung(make_world: MakeWorld) -> tuple[World, Learner, Actor]:
    """A learner that waits for a group of which one member plays on and on; lifecycles take 30 s."""
    world = make_world(
        learner={"groups_per_step": 1},
        lifecycle={"group_size": 3},
        staleness={"max_lag": 1},
        groups={"overdue_factor": 3.0},
    )
    learner, actor = Learner(world), Actor(world)
    for _ in range(6):
        actor.ask(3)
        world.tick(30.0)
        play_all(world, learner, actor, 10.0)
    actor.ask(64)
    oldest = min(ref.group for ref in actor.lives)
    for ref in [ref for ref in actor.lives if ref != LeaseRef(oldest, 2, 0)]:
        while ref in actor.lives:
            actor.play(ref)
    learner.request_step()
    learner.take_step()  # the younger group: the older one can still be trained in the next step
    learner.request_step()
    actor.ask(64)
    for ref in [ref for ref in actor.lives if ref.group != oldest]:
        while ref in actor.lives:
            actor.play(ref)
    world.tick(1.0)
    assert world.brain.status()["waits_for"] == "older_groups_open"
    return world, learner, actor


def test_what_takes_far_too_long_is_given_up_while_the_learner_waits_for_it(make_world: MakeWorld) -> None:
    world, learner, _ = hung(make_world)
    world.tick(80.0)
    assert learner.batch is None  # 81 s of the 90 that it has
    world.tick(10.0)
    world.tick()
    assert learner.batch is not None
    rows = world.store._connection.execute("SELECT count(*) FROM leases WHERE reason = 'overdue'").fetchone()
    assert rows == (1,)


def test_nothing_is_overdue_for_a_learner_that_starts_again(make_world: MakeWorld) -> None:
    world, learner, _ = hung(make_world)
    saved = learner.checkpoint()
    again = Learner(world, saved)  # it opens its lineage before the old one's session has expired
    world.tick(200.0)
    rows = world.store._connection.execute("SELECT count(*) FROM leases WHERE reason = 'overdue'").fetchone()
    assert rows == (0,)
    again.request_step()
    for _ in range(3):
        world.tick(1.0)
    assert again.batch is not None
