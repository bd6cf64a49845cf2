"""Replay: priority by its formula, at most K uses, counted apart, undone by a rollback, exact on resume."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from coordinator_world import Actor, Learner, World, make_config
from hypothesis import given
from hypothesis import strategies as st
from test_training import DeterministicActor, DeterministicLearner, train

from cod_async.config.schema import ReplayConfig
from cod_async.coordinator.replay import Used, choose_replays, priority
from cod_async.lifecycle.seeds import stable_seed
from cod_async.store.ledger import ledger, ledger_with_problems

CONFIG = ReplayConfig(max_uses=3, groups_per_step=2)
REPLAY = {"max_uses": 3, "groups_per_step": 2, "sigma": 1.0}


def test_priority_is_that_of_the_paper() -> None:
    used = Used(group=17, birth=40, num_uses=2)
    quiet = ReplayConfig(max_uses=3, groups_per_step=1, sigma=0.0)
    assert priority(used, quiet, 0, 44) == 40 - 2.0 * 2
    noise = random.Random(stable_seed("replay", 5, 44, 17)).gauss(0.0, 1.0)
    assert priority(used, CONFIG, 5, 44) == pytest.approx(40 - 2.0 * 2 + 2.0 * noise)
    drawn = [priority(Used(g, 0, 0), CONFIG, 0, 1) for g in range(4000)]
    mean = sum(drawn) / len(drawn)
    assert abs(mean) < 0.15  # of 4,000 draws with a standard deviation of 2: 4.7 standard errors
    assert sum((x - mean) ** 2 for x in drawn) / len(drawn) == pytest.approx(4.0, rel=0.1)


def test_recent_and_little_used_groups_first() -> None:
    quiet = ReplayConfig(max_uses=3, groups_per_step=2, sigma=0.0)
    pool = [Used(0, 5, 1), Used(1, 7, 1), Used(2, 8, 2), Used(3, 9, 3), Used(4, 2, 1)]
    assert choose_replays(pool, quiet, 0, 10, 6) == (1, 2)  # 3 is used up, 4 too old; priorities 3, 5, 4


@given(
    pool=st.lists(st.tuples(st.integers(0, 20), st.integers(1, 4)), max_size=12),
    step=st.integers(0, 25),
    max_lag=st.integers(0, 10),
)
def test_neither_the_bound_nor_the_limit_is_passed(
    pool: list[tuple[int, int]], step: int, max_lag: int
) -> None:
    used = [Used(index, birth, num) for index, (birth, num) in enumerate(pool)]
    chosen = choose_replays(used, CONFIG, 0, step, max_lag)
    assert len(chosen) <= 2 and list(chosen) == sorted(set(chosen))
    assert all(step - used[g].birth <= max_lag and used[g].num_uses < 3 for g in chosen)


def test_a_segment_is_trained_once_and_used_at_most_k_times(make_world: Any) -> None:
    world = make_world(learner={"groups_per_step": 1}, staleness={"max_lag": 4}, replay=REPLAY)
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 8)
    uses = Counter(item.key for items in learner.history for item in items)
    assert set(uses.values()) == {1, 2, 3} or set(uses.values()) == {2, 3}
    for step, items in enumerate(learner.history):
        assert [item.key for item in items] == sorted(item.key for item in items)
        assert all(item.lag_steps <= 4 for item in items)
        report = world.store.history.recent_reports(learner.version, 8)[step]
        assert report["num_segments"] == 6
        assert report["num_replayed_segments"] == len(items) - 6
    actor.heartbeat()
    answer, problems = ledger_with_problems(world.folder)
    assert answer["balanced"], problems
    assert answer["segments"]["trained"] == len(uses)
    assert answer["replayed"]["segments"] == uses.total() - len(uses)


def test_a_rollback_takes_back_the_uses_of_its_steps(make_world: Any) -> None:
    world = make_world(learner={"groups_per_step": 1}, staleness={"max_lag": 4}, replay=REPLAY)
    learner, actor = Learner(world), Actor(world)
    train(world, learner, actor, 3)
    saved = learner.checkpoint()
    before = ledger(world.folder)["replayed"]
    train(world, learner, actor, 3)
    learner.die()
    again = Learner(world, saved)
    answer, problems = ledger_with_problems(world.folder)
    assert answer["balanced"], problems
    assert answer["replayed"] == before
    assert answer["segments"]["trained"] == len({i.key for items in saved.history for i in items})
    train(world, again, actor, 3)
    uses = Counter(item.key for items in again.history for item in items)
    assert max(uses.values()) <= 3
    assert ledger(world.folder)["segments"]["trained"] == len(uses)


def test_what_may_be_used_again_after_a_resume_is_not_pruned(make_world: Any) -> None:
    world = make_world(
        learner={"groups_per_step": 1},
        staleness={"max_lag": 2},
        replay=REPLAY,
        store={"retention": "until_checkpoint"},
    )
    learner, actor = Learner(world), Actor(world)
    saved = []
    for _ in range(3):
        train(world, learner, actor, 2)
        saved.append(learner.checkpoint())
    rows = world.store._connection.execute(
        "SELECT DISTINCT trained_step FROM segments WHERE payload IS NOT NULL AND state = 'trained'"
    )
    assert {step for (step,) in rows} == {2, 3, 4, 5}  # the checkpoint of step 4 may be gone on from
    learner.die()
    again = Learner(world, saved[1])
    again.request_step()
    assert again.batch is not None and len(again.batch[1]) > 6


@pytest.mark.parametrize("num_after", [0, 1, 3])
def test_a_run_with_replay_resumes_bit_for_bit(tmp_path: Path, num_after: int) -> None:
    """One actor that plays what is asked, a step at a time, with three steps' work that may be used again."""
    config = make_config(
        staleness={"max_lag": 3, "plan_ahead_steps": 0},
        learner={"groups_per_step": 1},
        replay={"max_uses": 3, "groups_per_step": 2},
    )

    def steps(world: World, learner: DeterministicLearner, actor: Actor, num_steps: int) -> None:
        for _ in range(num_steps):
            learner.publish_now()
            actor.ask(64)
            actor.play_all()
            learner.request_step()
            learner.take_step()

    worlds = {}
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
        worlds[name] = World(tmp_path / name, config)
    whole, broken = worlds["whole"], worlds["broken"]
    learner = DeterministicLearner(whole)
    steps(whole, learner, DeterministicActor(whole), 9)
    first, actor = DeterministicLearner(broken), DeterministicActor(broken)
    steps(broken, first, actor, 4)
    saved = first.checkpoint()
    steps(broken, first, actor, num_after)
    actor.die()
    first.die()
    broken.crash()
    second = DeterministicLearner(broken, saved)
    steps(broken, second, DeterministicActor(broken, "actor-1", instance=3), 5)
    assert second.weights_by_step == learner.weights_by_step
    assert [[i.key for i in step] for step in second.history] == [
        [i.key for i in step] for step in learner.history
    ]
    assert any(len(step) > 6 for step in learner.history)
    for world in worlds.values():
        world.store.close()
