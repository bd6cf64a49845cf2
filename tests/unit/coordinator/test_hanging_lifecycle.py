"""One lifecycle that hangs for ever: the steps go on without it, and its own group is trained."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from coordinator_world import Actor, Learner, World

from cod_async.store.ledger import ledger
from cod_async.wire.messages import LeaseRef

MakeWorld = Callable[..., World]

ROUND_S = 30.0
DEADLINE_S = 600.0
NUM_ROUNDS = 40


def run_with_a_hung_member(world: World, rounds: int) -> tuple[list[int], set[int]]:
    """Play everything but one member, a step a round: (step reached after each round, groups trained)."""
    learner, actor = Learner(world), Actor(world)
    hung: LeaseRef | None = None
    steps, groups = [], set()
    for number in range(rounds):
        actor.ask(64)
        if number == 4:
            hung = max(actor.lives, key=lambda ref: (ref.group, ref.member))
        for ref in [ref for ref in actor.lives if ref != hung]:
            while ref in actor.lives:
                actor.play(ref)
        actor.heartbeat()
        learner.request_step()
        if learner.batch is not None:
            groups |= {item.key.group for item in learner.take_step()}
        steps.append(world.brain.step)
        world.tick(ROUND_S)
    assert hung is not None
    assert hung.group in groups, "its group was trained with the members that had ended"
    return steps, groups


@pytest.mark.parametrize("window_groups", [0, 4])
def test_nobody_waits_for_it_where_groups_expire(make_world: MakeWorld, window_groups: int) -> None:
    """A step every round, as if it did not exist; it is cut off when no later step could use its group."""
    world = make_world(
        learner={"groups_per_step": 1},
        lifecycle={"group_size": 3},
        staleness={
            "max_lag": 2, "plan_ahead_steps": 1, "on_bound": "expire", "window_groups": window_groups,
        },
        groups={"deadline_s": DEADLINE_S},
    )  # fmt: skip
    steps, groups = run_with_a_hung_member(world, NUM_ROUNDS)
    assert steps == list(range(1, NUM_ROUNDS + 1))
    assert groups == set(range(NUM_ROUNDS)), "and no group was lost"
    assert ledger(world.folder)["balanced"]


@pytest.mark.parametrize(("factor", "fewest", "most"), [(0.0, 10, 20), (3.0, 0, 3)])
def test_the_wait_for_it_ends_by_its_deadline_or_when_it_is_overdue(
    make_world: MakeWorld, factor: float, fewest: int, most: int
) -> None:
    """Nothing expires with ``wait``: the learner waits for what it must not lose, but not for ever."""
    world = make_world(
        learner={"groups_per_step": 1},
        lifecycle={"group_size": 3},
        staleness={"max_lag": 2, "plan_ahead_steps": 1},
        groups={"deadline_s": DEADLINE_S, "overdue_factor": factor},
    )
    steps, _ = run_with_a_hung_member(world, NUM_ROUNDS)
    rounds_without_a_step = max(steps.count(step) - 1 for step in set(steps))
    assert fewest <= rounds_without_a_step <= most
    assert most <= DEADLINE_S / ROUND_S
    assert steps[-1] == NUM_ROUNDS - rounds_without_a_step, "before and after it a step every round"
    assert ledger(world.folder)["balanced"]
