"""Worlds, rollouts and optima of Optimal Control against closed forms, brute force and stored vectors."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.optimal_control.dynamics import (
    ControlTask,
    Rollout,
    RolloutError,
    World,
    draw_world,
    simulate,
)
from cod_async.envs.optimal_control.evaluation import EvaluationError
from cod_async.envs.optimal_control.optimum import best_controls, feedback_gains, fit_world, terminal_map
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.packs import stable_pack_seed

A_RANGE, B_RANGE, MARGIN = (0.55, 1.2), (-1.5, 1.5), 0.35
WORLD = World(a=0.9, b=0.7)


def task(
    x0: float = -1.0, v0: float = 0.5, x_target: float = 5.0, horizon: int = 12, **more: Any
) -> ControlTask:
    return ControlTask(
        **{
            "x0": x0,
            "v0": v0,
            "x_target": x_target,
            "v_target": 0.0,
            "horizon": horizon,
            "effort_weight": 0.03,
            **more,
        }
    )


def replay(given_task: ControlTask, world: World, controls: Any) -> Rollout:
    return simulate(given_task, world, lambda scope: float(controls[int(scope["t"])]))


@pytest.mark.parametrize(
    ("pack_seed", "a", "b"),
    [
        (0, 1.0988742034912813, 0.9432951267626954),
        (1, 0.6373367586730608, 1.1490975949556352),
        (stable_pack_seed((0, row) for row in range(4)), 0.6777260870817534, -0.5107561781864252),
    ],
)
def test_world_vectors(pack_seed: int, a: float, b: float) -> None:
    assert draw_world(pack_seed, A_RANGE, B_RANGE, MARGIN) == World(a=a, b=b)


def test_worlds_fill_their_ranges() -> None:
    worlds = [draw_world(seed, A_RANGE, B_RANGE, MARGIN) for seed in range(4000)]
    assert all(0.55 <= world.a <= 1.2 and 0.35 <= abs(world.b) <= 1.5 for world in worlds)
    assert np.mean([world.b < 0 for world in worlds]) == pytest.approx(0.5, abs=0.03)
    assert np.mean([abs(world.b) for world in worlds]) == pytest.approx(0.925, abs=0.02)
    assert np.mean([world.a for world in worlds]) == pytest.approx(0.875, abs=0.01)


@pytest.mark.parametrize(
    ("b_range", "margin", "allowed"),
    [
        ((-1.0, 3.0), 0.0, (-1.0, 3.0)),
        ((0.5, 1.5), 0.35, (0.5, 1.5)),
        ((-0.2, 1.5), 0.35, (0.35, 1.5)),
        ((-1.5, 0.2), 0.35, (-1.5, -0.35)),
        ((-1.5, -0.5), 0.35, (-1.5, -0.5)),
    ],
)
def test_b_stays_in_its_range(
    b_range: tuple[float, float], margin: float, allowed: tuple[float, float]
) -> None:
    drawn = [draw_world(seed, A_RANGE, b_range, margin).b for seed in range(500)]
    assert allowed[0] <= min(drawn) and max(drawn) <= allowed[1]
    width = allowed[1] - allowed[0]
    assert min(drawn) < allowed[0] + 0.05 * width and max(drawn) > allowed[1] - 0.05 * width


def test_a_margin_that_leaves_points() -> None:
    assert {draw_world(seed, A_RANGE, (-0.35, 0.35), 0.35).b for seed in range(50)} == {-0.35, 0.35}
    assert {draw_world(seed, A_RANGE, (0.0, 0.35), 0.35).b for seed in range(5)} == {0.35}
    assert {draw_world(seed, A_RANGE, (0.7, 0.7), 0.35).b for seed in range(5)} == {0.7}  # a fixed b
    assert {draw_world(seed, A_RANGE, (-0.7, -0.7), 0.0).b for seed in range(5)} == {-0.7}
    with pytest.raises(EnvironmentInputError, match="no b"):
        draw_world(0, A_RANGE, (-0.2, 0.2), 0.35)


def test_one_step_by_hand() -> None:
    rolled = simulate(task(1.0, 2.0, 4.0, horizon=1), World(a=0.5, b=-0.25), lambda scope: 3.0)
    assert rolled.us == (1.0,)  # clipped
    assert rolled.vs == (2.0, 0.75) and rolled.xs == (1.0, 1.75)  # the position moves by the new velocity
    assert rolled.loss == 2.25**2 + 2 * 0.75**2 + 0.03
    assert rolled.reward == 1 / (1 + rolled.loss)


def test_variables_of_every_step() -> None:
    seen: list[dict[str, float]] = []
    rolled = simulate(task(horizon=3), WORLD, lambda scope: seen.append(dict(scope)) or 0.1)
    assert [scope["t"] for scope in seen] == [0.0, 1.0, 2.0]
    assert [scope["remaining_steps"] for scope in seen] == [3.0, 2.0, 1.0]
    assert [(scope["x"], scope["v"]) for scope in seen] == list(zip(rolled.xs, rolled.vs, strict=True))[:-1]
    assert all(type(value) is float for scope in seen for value in scope.values())
    assert {(s["x_target"], s["v_target"], s["horizon"]) for s in seen} == {(5.0, 0.0, 3.0)}


def test_a_failing_controller_names_the_step() -> None:
    def controller(scope: Any) -> float:
        if scope["t"] == 7:
            raise EvaluationError("division by zero")
        return 0.0

    with pytest.raises(RolloutError, match="at t = 7: division by zero") as caught:
        simulate(task(), WORLD, controller)
    assert caught.value.step == 7


def test_stored_optimum() -> None:
    controls = best_controls(task(), WORLD)
    expected = [
        0.186175, 0.165591, 0.142721, 0.117310, 0.089075, 0.057703,
        0.022845, -0.015886, -0.058921, -0.106737, -0.159866, -0.218898,
    ]  # fmt: skip
    assert controls == pytest.approx(np.array(expected), abs=6e-7)
    rolled = replay(task(), WORLD, controls)
    assert rolled.xs[-1] == pytest.approx(4.998408, abs=6e-7)
    assert rolled.vs[-1] == pytest.approx(0.005487, abs=6e-7)
    assert rolled.loss == pytest.approx(0.0059604, abs=6e-8)


a_values = st.floats(0.55, 1.2)
b_values = st.floats(0.35, 1.5) | st.floats(-1.5, -0.35)
worlds = st.builds(World, a=a_values, b=b_values)
tasks = st.builds(
    task, x0=st.floats(-2, 2), v0=st.floats(-1.5, 1.5), x_target=st.floats(-8, 8), horizon=st.integers(1, 16)
)
controls_of = st.lists(st.floats(-1, 1), min_size=16, max_size=16)


@settings(max_examples=60, deadline=None)
@given(tasks, worlds, controls_of)
def test_terminal_state_is_the_closed_form(
    given_task: ControlTask, world: World, controls: list[float]
) -> None:
    rolled, horizon, a = replay(given_task, world, controls), given_task.horizon, world.a
    x = given_task.x0 + given_task.v0 * sum(a**k for k in range(1, horizon + 1))
    v = a**horizon * given_task.v0
    for t, u in enumerate(controls[:horizon]):
        x += world.b * u * sum(a**k for k in range(horizon - t))
        v += world.b * u * a ** (horizon - 1 - t)
    assert rolled.xs[-1] == pytest.approx(x, rel=1e-9, abs=1e-9)
    assert rolled.vs[-1] == pytest.approx(v, rel=1e-9, abs=1e-9)
    columns, wanted = terminal_map(given_task, world)
    error = columns @ np.array(controls[:horizon]) - wanted
    assert error[0] == pytest.approx(x - given_task.x_target, rel=1e-9, abs=1e-9)
    assert error[1] == pytest.approx(math.sqrt(2) * v, rel=1e-9, abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(tasks, worlds, controls_of)
def test_symmetries(given_task: ControlTask, world: World, controls: list[float]) -> None:
    loss = replay(given_task, world, controls).loss
    flipped = [-u for u in controls]
    assert replay(given_task, World(a=world.a, b=-world.b), flipped).loss == loss
    mirrored = task(-given_task.x0, -given_task.v0, -given_task.x_target, given_task.horizon)
    assert replay(mirrored, world, flipped).loss == loss
    drift = replay(given_task, world, [0.0] * 16)
    geometric = [given_task.v0 * world.a**t for t in range(given_task.horizon + 1)]
    assert drift.vs == pytest.approx(geometric, rel=1e-12, abs=1e-300)


def test_reward_is_one_only_without_loss() -> None:
    assert replay(task(2.0, 0.0, 2.0), WORLD, [0.0] * 12).reward == 1.0
    for changed in (task(2.0, 0.0, 2.1), task(2.0, 0.01, 2.0)):
        assert replay(changed, WORLD, [0.0] * 12).reward < 1.0
    assert replay(task(2.0, 0.0, 2.0), WORLD, [0.0] * 11 + [0.001]).reward < 1.0


@settings(max_examples=40, deadline=None)
@given(tasks, worlds)
def test_feedback_gains_equal_the_unbounded_optimum(given_task: ControlTask, world: World) -> None:
    """Riccati recursion against the normal equations; compared where no bound is met."""
    columns, wanted = terminal_map(given_task, world)
    system = columns.T @ columns + 0.03 * np.eye(given_task.horizon)
    expected = np.linalg.solve(system, columns.T @ wanted)
    if np.abs(expected).max() >= 1.0:
        return
    gains = feedback_gains(world, given_task.horizon, 0.03)
    rolled = simulate(
        given_task,
        world,
        lambda s: float(-gains[int(s["t"])] @ [s["x"] - given_task.x_target, s["v"]]),
    )
    assert rolled.us == pytest.approx(expected, abs=1e-9)
    assert best_controls(given_task, world) == pytest.approx(expected, abs=1e-9)


def brute_force(given_task: ControlTask, world: World) -> float:
    """Least loss over all 3^T choices of which controls sit at which bound."""
    columns, wanted = terminal_map(given_task, world)
    best = math.inf
    for sides in itertools.product((-1.0, None, 1.0), repeat=given_task.horizon):
        is_free = np.array([side is None for side in sides])
        controls = np.array([side or 0.0 for side in sides])
        if is_free.any():
            free = columns[:, is_free]
            rest = wanted - columns @ controls
            controls[is_free] = np.linalg.solve(
                free.T @ free + 0.03 * np.eye(int(is_free.sum())), free.T @ rest
            )
        if np.abs(controls).max() <= 1.0:
            error = columns @ controls - wanted
            best = min(best, float(error @ error + 0.03 * controls @ controls))
    return best


@settings(max_examples=25, deadline=None)
@given(st.builds(task, st.floats(-2, 2), st.floats(-3, 3), st.floats(-8, 8), st.integers(1, 4)), worlds)
def test_bounded_optimum_equals_brute_force(given_task: ControlTask, world: World) -> None:
    controls = best_controls(given_task, world)
    assert np.abs(controls).max() <= 1.0
    assert replay(given_task, world, controls).loss == pytest.approx(brute_force(given_task, world), rel=1e-9)


@settings(max_examples=60, deadline=None)
@given(
    st.builds(task, st.floats(-50, 50), st.floats(-20, 20), st.floats(-50, 50), st.integers(1, 64)),
    st.builds(World, a=st.floats(-1.3, 1.3), b=st.floats(-10, 10)),
)
def test_bounded_optimum_satisfies_its_conditions(given_task: ControlTask, world: World) -> None:
    """The gradient vanishes at free controls and points outward at the bounds (the problem is convex)."""
    controls = best_controls(given_task, world)
    columns, wanted = terminal_map(given_task, world)
    gradient = columns.T @ (columns @ controls - wanted) + 0.03 * controls
    scale = 1e-8 * (1.0 + np.abs(columns).max() * (np.abs(wanted).max() + np.abs(columns).sum()))
    assert np.abs(controls).max() <= 1.0
    assert np.all(np.abs(gradient[np.abs(controls) < 1.0]) <= scale)
    assert np.all(gradient[controls == 1.0] <= scale) and np.all(gradient[controls == -1.0] >= -scale)


@settings(max_examples=40, deadline=None)
@given(tasks.filter(lambda t: t.horizon >= 2), worlds, controls_of)
def test_two_steps_identify_the_world(given_task: ControlTask, world: World, controls: list[float]) -> None:
    rolled = replay(given_task, world, controls)
    steps = [(rolled.vs[t], rolled.us[t], rolled.vs[t + 1]) for t in range(2)]
    determinant = steps[0][0] * steps[1][1] - steps[1][0] * steps[0][1]
    if abs(determinant) < 1e-3:
        return
    fitted = fit_world(steps)
    assert fitted is not None
    assert (fitted.a, fitted.b) == pytest.approx((world.a, world.b), rel=1e-9, abs=1e-9)


def test_too_little_data_identifies_nothing() -> None:
    assert fit_world([]) is None
    assert fit_world([(1.0, 0.5, 1.2)]) is None
    assert fit_world([(1.0, 0.5, 1.2), (2.0, 1.0, 2.4)]) is None
    assert fit_world([(0.0, 0.0, 0.0)] * 5) is None


def test_process_noise_is_one_gaussian_per_step_and_belongs_to_the_task() -> None:
    noisy = task(process_noise_std=0.2, seed=77)
    generator = random.Random(77 ^ 0x5DEECE66D)
    expected = tuple(generator.gauss(0, 0.2) for _ in range(12))
    still = replay(noisy, WORLD, [0.0] * 12)
    pushed = replay(noisy, WORLD, [0.3] * 12)
    assert still.noise == pushed.noise == expected
    v = noisy.v0
    for noise, reached in zip(expected, still.vs[1:], strict=True):
        v = WORLD.a * v + noise
        assert reached == pytest.approx(v, rel=1e-12)
    assert replay(task(seed=77), WORLD, [0.0] * 12).noise == (0.0,) * 12
