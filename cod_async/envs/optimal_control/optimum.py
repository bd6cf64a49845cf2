"""Optimal controllers for known constants, without a solver library.

Two forms. Linear-quadratic feedback gains ignore the bounds on the control (they bind in about 3 % of the
hard tasks) but correct for noise and for errors in the constants. The open-loop optimum respects the bounds
exactly: the terminal state is linear in the controls, z = z_free + G u with only two rows, so the bounded
least-squares problem

    minimize |W (G u + z_free - z_target)|^2 + effort_weight |u|^2   subject to -1 <= u <= 1

has a two-dimensional dual, F(p) = p + G clip(G^T p / effort_weight) - d = 0, whose piecewise linear,
strongly monotone F a damped Newton method solves exactly in a few steps, whatever the horizon.
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt

from cod_async.envs.optimal_control.dynamics import MAX_CONTROL, VELOCITY_WEIGHT, ControlTask, World

_MAX_ITERATIONS = 200
_TOLERANCE = 1e-11

Floats = npt.NDArray[np.float64]


def terminal_map(task: ControlTask, world: World) -> tuple[Floats, Floats]:
    """Return (G, d): the weighted terminal error is G u - d for controls u without noise.

    Returns:
        G, float64 [2, horizon], and d, float64 [2]; the second rows carry the square root of
        :data:`VELOCITY_WEIGHT`.

    Source: v_T = a^T v0 + b sum_t a^(T-1-t) u_t and
    x_T = x0 + v0 sum_{k=1..T} a^k + b sum_t (1 + a + ... + a^(T-1-t)) u_t.
    """
    powers = world.a ** np.arange(task.horizon + 1, dtype=np.float64)
    weight = math.sqrt(VELOCITY_WEIGHT)
    columns = world.b * np.stack([np.cumsum(powers[:-1]), weight * powers[:-1]])[:, ::-1]
    x_free = task.x0 + task.v0 * powers[1:].sum()
    v_free = task.v0 * powers[-1]
    return columns, np.array([task.x_target - x_free, weight * (task.v_target - v_free)])


def best_controls(task: ControlTask, world: World) -> Floats:
    """Return the controls with the least loss without noise, within the bounds (effort weight > 0).

    Returns:
        float64 [horizon], each in [-1, 1].
    """
    columns, wanted = terminal_map(task, world)
    weight = task.effort_weight
    dual, residual = np.zeros(2), -wanted
    for _ in range(_MAX_ITERATIONS):
        if float(np.abs(residual).max()) <= _TOLERANCE * (1.0 + float(np.abs(wanted).max())):
            break
        free = columns[:, np.abs(columns.T @ dual / weight) < MAX_CONTROL]
        step = -np.linalg.solve(np.eye(2) + free @ free.T / weight, residual).astype(np.float64)
        dual, residual = _damped(columns, wanted, weight, dual, residual, step)
    return _controls(columns, weight, dual)


def _controls(columns: Floats, weight: float, dual: Floats) -> Floats:
    """Return the controls of a dual point."""
    controls: Floats = np.clip(columns.T @ dual / weight, -MAX_CONTROL, MAX_CONTROL)
    return controls


def _damped(
    columns: Floats, wanted: Floats, weight: float, dual: Floats, residual: Floats, step: Floats
) -> tuple[Floats, Floats]:
    """Go as far along a Newton step as the convex potential of F decreases; return the dual and F there."""

    def potential(at: Floats) -> float:
        slopes = columns.T @ at / weight
        inside = np.clip(slopes, -MAX_CONTROL, MAX_CONTROL)
        bends = weight * (inside * slopes - 0.5 * inside * inside)
        return float(0.5 * at @ at + bends.sum() - at @ wanted)

    start, slope = potential(dual), float(residual @ step)
    scale = 1.0
    while scale > 1e-9 and potential(dual + scale * step) > start + 1e-4 * scale * slope + 1e-12 * abs(start):
        scale /= 2
    dual = dual + scale * step
    return dual, dual + columns @ _controls(columns, weight, dual) - wanted


def feedback_gains(world: World, horizon: int, effort_weight: float) -> Floats:
    """Return the finite-horizon linear-quadratic gains: u_t = -k_t . (x - x_target, v) for v_target = 0.

    Args:
        world: known constants.
        horizon: number of steps, >= 1.
        effort_weight: weight of u^2, > 0.

    Returns:
        float64 [horizon, 2].

    Source: the Riccati recursion for A = [[1, a], [0, a]], B = (b, b), terminal weights diag(1, 2) and
    control weight ``effort_weight``.
    """
    transition = np.array([[1.0, world.a], [0.0, world.a]])
    control = np.array([world.b, world.b])
    cost = np.diag([1.0, VELOCITY_WEIGHT])
    gains = np.zeros((horizon, 2))
    for step in reversed(range(horizon)):
        gain = control @ cost @ transition / (effort_weight + control @ cost @ control)
        cost = transition.T @ cost @ (transition - np.outer(control, gain))
        cost = (cost + cost.T) / 2
        gains[step] = gain
    return gains


def fit_world(steps: list[tuple[float, float, float]]) -> World | None:
    """Fit the constants to observed steps by least squares.

    Args:
        steps: (v_t, u_t, v_{t+1}) each.

    Returns:
        None if the steps do not determine both constants.
    """
    if len(steps) < 2:
        return None
    table = np.array(steps, dtype=np.float64)
    (a, b), _, rank, _ = np.linalg.lstsq(table[:, :2], table[:, 2], rcond=1e-9)
    return World(a=float(a), b=float(b)) if rank == 2 else None
