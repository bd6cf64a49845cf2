"""Grid Navigation: scripted policies against the published calibration, and continuing from snapshots."""

from __future__ import annotations

import asyncio
import itertools
import math
import random
from typing import Any

import numpy as np
import pytest

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import commands
from cod_async.envs.base import TaskSpec
from cod_async.envs.grid_navigation import SPEC
from cod_async.envs.grid_navigation.env import GridNavigation
from cod_async.envs.grid_navigation.options import parse_options
from cod_async.envs.grid_navigation.oracle import guessed_costs
from cod_async.envs.grid_navigation.planner import RookPlanner, reward_of
from cod_async.envs.grid_navigation.worlds import cost_map, make_task
from cod_async.lifecycle.packs import plan_pack

NAME = "grid_navigation"


def curve(
    preset: str, pack_size: int, policy: str, num_packs: int, seed: int = 0
) -> list[tuple[float, float]]:
    answer = commands.play(NAME, preset, pack_size, policy, num_packs, seed)
    return [(entry["mean"], entry["sem"]) for entry in answer["reward_by_position"]]


def mean(points: list[tuple[float, float]]) -> float:
    return sum(value for value, _ in points) / len(points)


@pytest.mark.parametrize(
    ("preset", "optimum", "feasible"),
    [("train_8b", 0.969, 0.80), ("train_27b", 0.925, 0.71), ("eval", 0.920, 0.69)],
)
def test_floor_and_ceiling(preset: str, optimum: float, feasible: float) -> None:
    """Packs share a map, so rewards of a pack are correlated: the error of a position is that of the mean."""
    oracle = curve(preset, 2, "oracle", 100)
    assert mean(oracle) == pytest.approx(optimum, abs=4 * oracle[0][1])
    floor = curve(preset, 2, "random", 150)
    assert mean(floor) == pytest.approx(feasible, abs=4 * floor[0][1])
    assert mean(curve(preset, 2, "uniform", 100)) < 0.03


@pytest.mark.parametrize(
    ("preset", "mean_cost", "cheap_share"),
    [("train_8b", 18.6, 0.54), ("train_27b", 25.9, 0.39), ("eval", 27.4, 0.35)],
)
def test_calibration_of_maps(preset: str, mean_cost: float, cheap_share: float) -> None:
    options = parse_options(SPEC.options(preset))
    maps = [cost_map(options, seed) for seed in range(400)]
    means = [float(costs.mean()) for costs in maps]
    assert sum(means) / 400 == pytest.approx(mean_cost, abs=4 * float(np.std(means)) / math.sqrt(400))
    shares = [float((costs < 10).mean()) for costs in maps]
    assert sum(shares) / 400 == pytest.approx(cheap_share, abs=4 * float(np.std(shares)) / math.sqrt(400))


def test_optimum_of_the_evaluation_preset() -> None:
    """Mean, 5th percentile and least value of the exact optimum over 400 tasks, each on its own map."""
    options = parse_options(SPEC.options("eval"))
    rewards = []
    for seed in range(400):
        costs = cost_map(options, seed)
        task = make_task(seed, len(costs), options.rounds_min, options.rounds_max)
        plan = RookPlanner(costs).plan(task.start, task.goal, task.num_rounds)
        assert plan is not None
        rewards.append(plan.reward)
    assert np.mean(rewards) == pytest.approx(0.920, abs=0.015)
    assert np.quantile(rewards, 0.05) == pytest.approx(0.798, abs=0.05)
    assert min(rewards) > 0.5


def test_the_planner_connects_the_dots() -> None:
    """What it carries is the map: the published curve .816 .889 .906 .903 .901 .916 .905 .916."""
    honest = curve("eval", 8, "planner", 60)
    for (value, sem), published in zip(
        honest, (0.816, 0.889, 0.906, 0.903, 0.901, 0.916, 0.905, 0.916), strict=True
    ):
        # the published values have a similar error of their own, from 150 packs
        assert value == pytest.approx(published, abs=4 * math.hypot(sem, sem * math.sqrt(60 / 150)))
    assert mean(honest[3:]) > honest[0][0] + 0.06
    oracle = curve("eval", 8, "oracle", 60)
    assert all(best >= value - 1e-12 for (best, _), (value, _) in zip(oracle, honest, strict=True))


def test_what_is_revealed_grows_from_a_third_to_most_of_the_map() -> None:
    shares = []
    for group in range(25):
        environment, act = SPEC.make(SPEC.options("eval")), SPEC.policies["planner"](0)
        assert isinstance(environment, GridNavigation)
        shares.append([])
        for task in plan_pack([EnvironmentConfig(name=NAME, preset="eval")], 8, 5, group).tasks():
            finish(environment, task, act)
            shares[-1].append(float((environment.known_costs() >= 0).mean()))
        assert shares[-1] == sorted(shares[-1])  # nothing is forgotten
    by_position = np.mean(shares, axis=0)
    assert by_position[0] == pytest.approx(0.30, abs=0.08) and by_position[7] == pytest.approx(0.85, abs=0.08)


def finish(environment: GridNavigation, task: TaskSpec, act: Any) -> float:
    observation = environment.reset(task)
    while True:
        result = asyncio.run(environment.step(act(environment, observation, {})))
        if result.is_done:
            return result.raw_reward
        observation = result.observation


def test_the_oracle_gets_the_optimum_to_the_bit() -> None:
    plan = plan_pack([EnvironmentConfig(name=NAME, preset="train_8b")], 12, 9, 3)
    environment = SPEC.make(SPEC.options("train_8b"))
    assert isinstance(environment, GridNavigation)
    for task in plan.tasks():
        reward = finish(environment, task, SPEC.policies["oracle"](0))
        view = environment.task_view()
        best = RookPlanner(np.array(environment.hidden()["cost_map"])).plan(
            tuple(view["start"]), tuple(view["goal"]), view["rounds"]
        )
        assert best is not None and reward == best.reward


def test_replanning_makes_the_best_of_a_bad_start() -> None:
    """After a random first move the plan counts what was entered, against all ways to go on."""
    generator = random.Random(3)
    for seed in range(8):
        costs = cost_map(parse_options(SPEC.options("eval", {"size_min": 5, "size_max": 5})), seed)
        start, goal = (generator.randrange(5), generator.randrange(5)), (generator.randrange(5), 2)
        cost_sum, num_entered = generator.randrange(200), generator.randrange(1, 5)
        cost_sum = min(cost_sum, 99 * num_entered)
        plan = RookPlanner(costs).plan(start, goal, 3, cost_sum, num_entered)
        assert plan is not None
        best = max(
            reward_of(cost_sum + total, num_entered + count)
            for total, count in all_walks(costs.tolist(), start, goal, 3)
        )
        assert plan.reward == best


def all_walks(
    costs: list[list[int]], here: tuple[int, int], goal: tuple[int, int], rounds: int
) -> list[tuple[int, int]]:
    """Return (sum, count) of the entered cells of every walk, by plain recursion cell by cell."""
    if rounds == 0:
        return [(0, 0)] if here == goal else []
    found = []
    for row_step, col_step in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        (row, col), total = here, 0
        for count in itertools.count(1):
            row, col = row + row_step, col + col_step
            if not (0 <= row < len(costs) and 0 <= col < len(costs)):
                break
            total += costs[row][col]
            found += [(total + t, count + c) for t, c in all_walks(costs, (row, col), goal, rounds - 1)]
    return found


def test_guesses_keep_what_is_known_and_lie_between() -> None:
    known = np.array([[10, -1, -1], [-1, -1, -1], [-1, -1, 90]])
    guess = guessed_costs(known)
    assert guess[0, 0] == 10 and guess[2, 2] == 90 and guess[1, 1] == 50
    assert guess[0, 1] == round((10 / 1 + 90 / 5) / (1 / 1 + 1 / 5))
    assert (guessed_costs(np.full((3, 3), -1)) == guessed_costs(np.full((3, 3), -1))[0, 0]).all()
    only = np.full((3, 3), -1)
    only[1, 1] = 7
    assert (guessed_costs(only) == 7).all()
    full = np.arange(9).reshape(3, 3)
    assert (guessed_costs(full) == full).all()


def test_policies_refuse_another_environment() -> None:
    from cod_async.envs.hidden_buttons import SPEC as BUTTONS

    with pytest.raises(TypeError, match="plays grid_navigation, not HiddenButtons"):
        SPEC.policies["oracle"](0)(BUTTONS.make(BUTTONS.options("cross")), "", {})


def test_play_depends_on_its_seed_alone_and_takes_no_step_penalty() -> None:
    first, second = (curve("train_8b", 3, "random", 20, 5) for _ in range(2))
    assert first == second != curve("train_8b", 3, "random", 20, 6)
    penalized = commands.play(NAME, "train_8b", 3, "random", 20, 5, solve_penalty=0.5)
    assert [entry["mean"] for entry in penalized["reward_by_position"]] == [value for value, _ in first]


def test_the_smallest_grid_and_single_rounds_are_played() -> None:
    options = {"size_min": 2, "size_max": 2, "rounds_min": 1, "rounds_max": 4}
    for policy in ("random", "oracle", "planner"):
        answer = commands.play(NAME, "eval", 3, policy, 30, 0, options=options)
        assert all(entry["mean"] > 0.3 for entry in answer["reward_by_position"])


def test_continuing_from_every_position_equals_the_uninterrupted_run() -> None:
    plan = plan_pack([EnvironmentConfig(name=NAME, preset="eval")], 6, 3, 1)
    options = SPEC.options("eval")

    def run(start: int, state: bytes) -> list[tuple[list[str], bytes]]:
        environment = SPEC.make(options)
        environment.restore(state)
        played = []
        for task in plan.tasks()[start:]:
            act = SPEC.policies["random"](task.position)
            texts = [environment.reset(task), environment.system_prompt()]
            while True:
                result = asyncio.run(environment.step(act(environment, texts[-1], {})))
                texts.append(result.observation)
                if result.is_done:
                    break
            played.append(([*texts, environment.feedback()], environment.snapshot()))
        return played

    whole = run(0, SPEC.make(options).snapshot())
    assert len({state for _, state in whole}) == 6  # every task reveals something
    for position in range(1, 6):
        assert run(position, whole[position - 1][1]) == whole[position:]
