"""Data, floor and ceilings of Optimal Control against the calibrated values, and continued lifecycles."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import islice
from typing import Any

import numpy as np
import pytest

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import commands
from cod_async.envs.base import TaskSpec
from cod_async.envs.optimal_control import SPEC
from cod_async.envs.optimal_control.dataset import pack_seed_for, record_at, records
from cod_async.envs.optimal_control.dynamics import ControlTask, World, draw_world, simulate
from cod_async.envs.optimal_control.env import feedback_table
from cod_async.envs.optimal_control.optimum import best_controls, feedback_gains, fit_world
from cod_async.envs.optimal_control.oracle import lookup, observed_steps
from cod_async.envs.optimal_control.syntax import parse_expression
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.packs import plan_pack, stable_pack_seed

NAME = "optimal_control"
HARD = SPEC.options("hard")


def means(answer: dict[str, Any]) -> list[float]:
    return [entry["mean"] for entry in answer["reward_by_position"]]


def test_first_rows_are_the_reference_rows() -> None:
    for split, seed, expected in [
        ("train", 0, (1.09582419, -0.18336468, 5.73756672)),
        ("held_out", 50_000, (0.70332535, -0.85703040, -3.04876751)),
    ]:
        row = record_at(HARD, split, 42, 0)
        assert list(row) == ["seed", "x0", "v0", "x_target"] and row["seed"] == seed
        assert (row["x0"], row["v0"], row["x_target"]) == pytest.approx(expected, abs=6e-9)


@pytest.mark.parametrize(("split", "seed", "size"), [("train", 42, 50_000), ("held_out", 2024, 4_000)])
@pytest.mark.parametrize("preset", ["easy", "medium", "hard"])
def test_any_row_equals_sequential_draws(preset: str, split: str, seed: int, size: int) -> None:
    options = SPEC.options(preset)
    generator = np.random.default_rng(seed)
    limits = [options[key] for key in ("x0_max", "v0_max", "x_target_max")]
    drawn = [[generator.uniform(-limit, limit) for limit in limits] for _ in range(200)]
    first_seed = 0 if split == "train" else 50_000
    expected = [
        {"seed": first_seed + row, "x0": x0, "v0": v0, "x_target": x} for row, (x0, v0, x) in enumerate(drawn)
    ]
    assert list(islice(records(options, split, 42), 200)) == expected
    assert record_at(options, split, 42, 137) == expected[137]
    assert record_at(options, split, 42, size + 137) == expected[137]
    assert SPEC.num_records is not None and SPEC.num_records(options, split) == size


def test_a_pack_larger_than_the_data_set_is_refused() -> None:
    with pytest.raises(EnvironmentInputError, match="4000 records, the pack needs 4001"):
        commands.play(NAME, pack_size=4001, num_packs=1, split="held_out")


def test_other_data_seeds_give_other_rows() -> None:
    rows = [
        record_at(HARD, split, seed, 0)
        for seed in (0, 41, 42, 2024, 1 << 80)
        for split in ("train", "held_out")
    ]
    assert len({json.dumps(row) for row in rows}) == len(rows)


def test_splits_never_share_a_world() -> None:
    seeds = {
        split: {pack_seed_for(HARD, split, seed) for seed in range(500)} for split in ("train", "held_out")
    }
    assert len(seeds["train"]) == 500 and seeds["train"].isdisjoint(seeds["held_out"])
    assert SPEC.has_held_out_worlds is not None
    assert SPEC.has_held_out_worlds(HARD)
    fixed = {"a_min": 0.9, "a_max": 0.9, "b_min": 0.7, "b_max": 0.7}
    assert not SPEC.has_held_out_worlds(SPEC.options("hard", fixed))


@pytest.mark.parametrize(
    "call",
    [
        lambda: record_at(HARD, "test", 42, 0),
        lambda: records(HARD, "train", -1),
        lambda: pack_seed_for(HARD, "test", 0),
        lambda: record_at({"horizon": 0}, "train", 42, 0),
    ],
)
def test_wrong_data_requests(call: Callable[[], Any]) -> None:
    with pytest.raises(EnvironmentInputError):
        call()


def pack_tasks(num_packs: int) -> list[tuple[World, ControlTask]]:
    """First task of consecutive packs of the reference's training data."""
    found = []
    for pack in range(num_packs):
        row = record_at(HARD, "train", 42, 4 * pack)
        seed = stable_pack_seed((0, 4 * pack + i) for i in range(4))
        world = draw_world(seed, (0.55, 1.2), (-1.5, 1.5), 0.35)
        found.append((world, ControlTask(row["x0"], row["v0"], row["x_target"], 0.0, 12, 0.03)))
    return found


TASKS = pack_tasks(500)
"""500 packs, as in the calibration."""


def rewards_of(make: Callable[[World, ControlTask], Any]) -> np.ndarray[Any, np.dtype[np.float64]]:
    return np.array([simulate(task, world, make(world, task)).reward for world, task in TASKS])


def gains_law(gains: Any, task: ControlTask, is_stationary: bool = False) -> Any:
    def law(scope: Any) -> float:
        row = gains[0 if is_stationary else int(scope["t"])]
        return float(-row[0] * (scope["x"] - task.x_target) - row[1] * scope["v"])

    return law


def open_loop(world: World, task: ControlTask) -> Any:
    controls = best_controls(task, world)
    return lambda scope: float(controls[int(scope["t"])])


def pd_law(world: World, task: ControlTask, sign: float) -> Any:
    right = np.sign(world.b) * sign
    return lambda scope: right * (0.25 * (task.x_target - scope["x"]) - 0.32 * scope["v"])


def test_calibrated_rewards() -> None:
    """Means over 500 packs; the tolerances are three standard errors of a difference of two such means."""
    best = rewards_of(open_loop)
    assert best.mean() == pytest.approx(0.976, abs=0.008)
    assert np.median(best) == pytest.approx(0.991, abs=0.002)
    assert np.quantile(best, 0.05) == pytest.approx(0.911, abs=0.03)
    gains = rewards_of(lambda world, task: gains_law(feedback_gains(world, 12, 0.03), task))
    assert gains.mean() == pytest.approx(0.976, abs=0.008)
    assert np.all(gains <= best + 1e-9)  # the optimum is one
    stationary = rewards_of(lambda world, task: gains_law(feedback_gains(world, 12, 0.03), task, True))
    assert stationary.mean() == pytest.approx(0.586, abs=0.075)
    right = rewards_of(lambda world, task: pd_law(world, task, 1.0))
    assert right.mean() == pytest.approx(0.756, abs=0.06)
    wrong = rewards_of(lambda world, task: pd_law(world, task, -1.0))
    assert wrong.mean() == pytest.approx(0.001, abs=0.01)  # a few starts near their targets make the tail
    zero = rewards_of(lambda world, task: lambda scope: 0.0)
    assert zero.mean() == pytest.approx(0.114, abs=0.045)
    assert np.median(zero) == pytest.approx(0.024, abs=0.01)


def test_few_optima_touch_the_bounds() -> None:
    touching = [bool(np.any(np.abs(best_controls(task, world)) >= 1.0)) for world, task in TASKS]
    assert 0.01 < np.mean(touching) < 0.06


@pytest.mark.parametrize(("sign", "median"), [(1.0, 4e-4), (-1.0, 2e-4)])
def test_one_feedback_table_identifies_the_world(sign: float, median: float) -> None:
    """Both guesses of the sign reveal the constants; only starts at the target leave little to see."""
    errors = []
    for world, task in TASKS:
        rolled = simulate(task, world, pd_law(world, task, sign))
        fitted = fit_world(observed_steps(feedback_table(rolled)))
        assert fitted is not None
        errors.append(max(abs(fitted.a - world.a), abs(fitted.b - world.b)))
    assert np.median(errors) < median and np.quantile(errors, 0.98) < 0.01


def test_floor_ceiling_and_explorer() -> None:
    oracle = commands.play(NAME, "hard", 4, "oracle", 60, 42)
    assert np.mean(means(oracle)) == pytest.approx(0.976, abs=0.02)
    explorer = means(commands.play(NAME, "hard", 4, "explorer", 250, 42))
    assert explorer[0] == pytest.approx(0.38, abs=0.09)
    assert min(explorer[1:]) > 0.95
    floor = means(commands.play(NAME, "hard", 2, "random", 200, 42))
    assert min(floor) > 0.05 and max(floor) < 0.3
    nothing = means(commands.play(NAME, "hard", 1, "zero", 400, 42))
    assert nothing[0] == pytest.approx(0.114, abs=0.06)


@pytest.mark.parametrize("preset", ["easy", "medium"])
def test_smaller_presets_have_the_same_ceiling(preset: str) -> None:
    assert np.mean(means(commands.play(NAME, preset, 2, "oracle", 60, 1))) > 0.96


def test_rewards_lose_no_step_penalty() -> None:
    with_penalty = commands.play(NAME, "easy", 1, "oracle", 20, 0, solve_penalty=0.5)
    without = commands.play(NAME, "easy", 1, "oracle", 20, 0, solve_penalty=0.0)
    assert means(with_penalty) == means(without)


def test_under_noise_the_oracle_is_the_feedback_law() -> None:
    options = {"process_noise_std": 0.1}
    oracle, gains = (
        commands.play(NAME, "hard", 2, policy, 40, 3, options=options) for policy in ("oracle", "lqr")
    )
    assert means(oracle) == means(gains)
    explorer = means(commands.play(NAME, "hard", 2, "explorer", 40, 3, options=options))
    assert explorer[1] > explorer[0] + 0.2


def test_policies_play_their_own_environment_only() -> None:
    from cod_async.envs.hidden_buttons import SPEC as OTHER

    environment = OTHER.make(OTHER.options(OTHER.default_preset))
    for name in ("oracle", "explorer", "lqr"):
        with pytest.raises(TypeError, match="plays optimal_control"):
            SPEC.policies[name](0)(environment, "", {})


def test_lookup_gives_each_value_at_its_step() -> None:
    values = [0.5, 0.5, -1.25, 1e-9, 0.0, -0.0, 3.0]
    for horizon in range(1, 8):
        law = parse_expression(lookup(values[:horizon], 4))
        for t in range(horizon):
            assert law.root.value({"t": float(t)}) == round(values[t], 4)


def test_truth_hint_tells_both_constants() -> None:
    task = TaskSpec(NAME, "hard", {}, record_at(HARD, "train", 42, 0), 0, 0, 4)
    assert SPEC.truth_hint is not None
    hint = SPEC.truth_hint(SPEC.make(HARD), task)
    assert hint.startswith("Hints: ") and "a = 1.0989" in hint and "b = 0.9433" in hint


def test_show_gives_exactly_the_promised_fields() -> None:
    answer = commands.show(NAME, "easy", 0, {"seed": 1, "x0": 0.5, "v0": 0, "x_target": -1.0}, 2, 4)
    assert answer == {
        "environment": NAME,
        "hidden": {"a": 1.0988742034912813, "b": 0.9432951267626954},
        "task": {"x0": 0.5, "v0": 0.0, "x_target": -1.0, "horizon": 8},
    }
    json.dumps(answer, allow_nan=False)
    listed = {entry["name"]: entry for entry in commands.list_environments()}
    assert listed[NAME]["presets"] == ["easy", "medium", "hard"]


RESPONSES = [
    "<answer><controller>0.2*(x_target-x)</controller></answer>",
    "rubbish",
    "<answer><controller>1/0</controller></answer>",
    "<answer><controller>ifelse(t &lt; 3, 0.5, -0.2*v)</controller></answer>",
    "<answer><controller>0</controller></answer>",
]


@pytest.mark.parametrize("options", [{}, {"is_previous_controller_shown": False}, {"parity": True}])
def test_continuing_from_every_position_equals_the_uninterrupted_run(options: dict[str, Any]) -> None:
    plan = plan_pack([EnvironmentConfig(name=NAME, preset="hard", options=options)], len(RESPONSES), 3, 1)
    merged = SPEC.options("hard", options)

    def run(start: int, state: bytes) -> list[tuple[Any, ...]]:
        environment = SPEC.make(merged)
        environment.restore(state)
        played = []
        for task, response in list(zip(plan.tasks(), RESPONSES, strict=True))[start:]:
            opening = environment.reset(task)
            result = asyncio.run(environment.step(response))
            played.append((opening, result, environment.feedback(), environment.snapshot()))
        return played

    whole = run(0, b"")
    for position in range(1, len(RESPONSES)):
        assert run(position, whole[position - 1][-1]) == whole[position:]
