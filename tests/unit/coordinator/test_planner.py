"""Admission and selection on numbers worked by hand, and a simulation that must not go stale or get stuck."""

from __future__ import annotations

import random

import pytest
from coordinator_world import make_config
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.coordinator.planner import Choice, GroupView, Limits, choose_groups, is_out_of_reach, may_lease


def limits(**changes: object) -> Limits:
    base = {"groups_per_step": 2, "max_lag": 2, "plan_ahead_steps": 1, "num_steps": 100}
    return Limits(**{**base, **changes})  # type: ignore[arg-type]


def closed(group: int, birth: int, is_settled: bool = True) -> GroupView:
    return GroupView(group, True, birth, is_settled)


def running(group: int, birth: int | None) -> GroupView:
    return GroupView(group, False, birth)


@pytest.mark.parametrize(
    ("max_lag", "plan_ahead", "expected"),
    [(0, -1, 0), (1, -1, 1), (4, -1, 2), (7, -1, 3), (4, 0, 0), (4, 9, 4)],
)
def test_default_plan_ahead(max_lag: int, plan_ahead: int, expected: int) -> None:
    config = make_config(staleness={"max_lag": max_lag, "plan_ahead_steps": plan_ahead})
    assert Limits.of(config).plan_ahead_steps == expected


def test_admission_by_capacity() -> None:
    # two groups per step and one step ahead: groups 0 to 3 may run while step s is being taken
    assert [may_lease(rank, 5, 5, limits()) for rank in range(6)] == [True] * 4 + [False] * 2


def test_admission_when_synchronous() -> None:
    sync = limits(max_lag=0, plan_ahead_steps=0)
    assert [may_lease(rank, 5, 5, sync) for rank in range(3)] == [True, True, False]
    assert not may_lease(0, 5, 4, sync)  # version 5 is not published yet


def test_admission_by_age() -> None:
    # published 3 steps behind: tokens would be lag 3 at step 8 already
    assert not may_lease(0, 8, 5, limits())
    assert may_lease(0, 8, 6, limits())
    assert not may_lease(2, 8, 6, limits())  # its turn is step 9


def test_nothing_starts_that_cannot_be_trained_before_the_end() -> None:
    assert [may_lease(rank, 98, 98, limits()) for rank in range(4)] == [True] * 4
    assert [may_lease(rank, 99, 99, limits()) for rank in range(4)] == [True, True, False, False]


def test_reach_after_a_rollback() -> None:
    assert [is_out_of_reach(rank, 20, limits()) for rank in (0, 5, 6)] == [False, False, True]


def test_oldest_closed_groups_first() -> None:
    groups = [closed(3, 4), running(2, 4), closed(1, 4), closed(0, 4), running(4, None)]
    assert choose_groups(groups, 5, limits()) == Choice(selected=(0, 1))


def test_waits_for_enough_groups() -> None:
    assert choose_groups([closed(0, 5), running(1, 5)], 5, limits()).reason == "too_few_closed"


def test_waits_for_what_would_become_too_old() -> None:
    # group 0 would have lag 3 at the next step, so it must be in this one
    groups = [running(0, 3), closed(1, 4), closed(2, 4)]
    assert choose_groups(groups, 5, limits()).reason == "older_groups_open"
    assert choose_groups([running(0, 4), closed(1, 4), closed(2, 4)], 5, limits()).selected == (1, 2)


def test_looks_ahead_as_far_as_the_bound() -> None:
    # three old groups are due by step 6 and a step takes two: one of them must be taken now
    groups = [running(0, 4), running(1, 4), running(2, 4), closed(3, 5), closed(4, 5)]
    assert choose_groups(groups, 5, limits()).reason == "older_groups_open"
    groups[2] = closed(2, 4)
    assert choose_groups(groups, 5, limits()).selected == (2, 3)


def test_expire_never_waits_for_open_groups() -> None:
    groups = [running(0, 2), running(1, 3), closed(2, 4), closed(3, 4)]
    choice = choose_groups(groups, 5, limits(on_bound="expire"))
    assert choice == Choice(selected=(2, 3), stale=(0,))


def test_too_old_is_never_selected() -> None:
    groups = [closed(0, 2), closed(1, 3), closed(2, 3)]
    assert choose_groups(groups, 5, limits()) == Choice(selected=(1, 2), stale=(0,))
    assert choose_groups(groups, 6, limits()) == Choice(stale=(0, 1, 2), reason="too_few_closed")


def test_what_may_turn_out_younger_is_kept_until_nothing_else_can_happen() -> None:
    groups = [closed(0, 2, False), closed(1, 5), running(2, 5)]
    assert choose_groups(groups, 5, limits()) == Choice(reason="unknown_weights")
    assert choose_groups(groups, 5, limits(), may_defer=False) == Choice(stale=(0,), reason="too_few_closed")


def test_more_than_can_be_trained_in_time_does_not_block() -> None:
    # after a rollback ten groups count from step 5; only six of them can be trained within the bound
    groups = [closed(index, 5) for index in range(10)]
    taken: list[int] = []
    for step in (5, 6, 7, 8):
        choice = choose_groups([g for g in groups if g.group not in taken], step, limits())
        taken += choice.selected
    assert taken == [0, 1, 2, 3, 4, 5]
    assert choice == Choice(stale=(6, 7, 8, 9), reason="too_few_closed")


@given(
    seed=st.integers(0, 1 << 32),
    groups_per_step=st.integers(1, 4),
    max_lag=st.integers(0, 6),
    ahead=st.integers(-1, 6),
    publish_every=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
def test_waiting_never_expires_anything_and_never_gets_stuck(
    seed: int, groups_per_step: int, max_lag: int, ahead: int, publish_every: int
) -> None:
    """Groups take random times, some very long; every step is full, nothing is ever too old, the run ends."""
    publish_every = min(publish_every, max_lag + 1)
    config = make_config(
        staleness={"max_lag": max_lag, "plan_ahead_steps": min(ahead, max_lag)},
        learner={"groups_per_step": groups_per_step},
        run={"num_steps": 30},
    )
    bounds = Limits.of(config)
    rng = random.Random(seed)
    births: dict[int, int] = {}
    ends: dict[int, int] = {}
    trained: set[int] = set()
    step = published = time = 0
    while step < bounds.num_steps:
        untrained = [group for group in births if group not in trained]
        while may_lease(len(untrained), step, published, bounds):
            group = len(births)
            births[group] = published
            ends[group] = time + rng.choice([0, 1, 2, 3, 50])
            untrained.append(group)
        views = [GroupView(g, ends[g] <= time, births[g]) for g in untrained]
        choice = choose_groups(views, step, bounds)
        assert not choice.stale
        if choice.selected:
            assert len(choice.selected) == groups_per_step
            assert all(step - births[group] <= max_lag for group in choice.selected)
            trained |= set(choice.selected)
            step += 1
            published = step if step % publish_every == 0 else published
        else:
            assert any(ends[group] > time for group in untrained), "waiting for nothing"
        time += 1
    assert len(trained) == bounds.num_steps * groups_per_step == len(births)
