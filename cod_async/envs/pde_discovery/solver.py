"""The heat equation with a reaction, on a grid: backward Euler for diffusion, forward Euler for the reaction.

The step is ``(I - dt D) u[n+1] = u[n] + dt f(u[n])`` with the three-point second difference D on the interior
and u = 0 at both ends of x in [0, 1]; t runs over [0, 1]. The matrix is constant, so its inverse is computed
once per grid and a step of any number of trajectories is one small matrix product. What the policy measures
beside u is the residual of the scheme itself, ``y[n] = (u[n+1] - u[n]) / dt - D u[n+1]``, which equals
``f(u[n])`` to rounding: on grid nodes a regression of y on the terms has no discretization error at all.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np

from cod_async.envs.pde_discovery.basis import Array, Reaction

NUM_X, NUM_T = 257, 2001
"""Nodes of the grid that is sampled, in x and t, ends included."""
COARSE_X, COARSE_T = 65, 401
"""Nodes of the grid on which stability is decided. Another one would give other worlds: it is frozen."""


@functools.lru_cache(maxsize=16)
def step_matrix(num_x: int, num_t: int) -> Array:
    """Return the inverse of ``I - dt D`` on the interior: float64 [num_x - 2, num_x - 2], not writable."""
    dx, dt = 1.0 / (num_x - 1), 1.0 / (num_t - 1)
    ratio, size = dt / dx**2, num_x - 2
    matrix = (1.0 + 2.0 * ratio) * np.eye(size) - ratio * (np.eye(size, k=1) + np.eye(size, k=-1))
    inverse: Array = np.asarray(np.linalg.inv(matrix), dtype=np.float64)
    inverse.flags.writeable = False
    return inverse


def steps(
    initial: Array, reaction: Reaction, num_t: int, bound: float | None
) -> Iterator[tuple[Array, Array]]:
    """Yield (right-hand side, state) of each of the ``num_t - 1`` steps.

    Args:
        initial: states at t = 0, float64 [num_x, M]; its end rows count as 0.
        reaction: f, for these M columns.
        num_t: time nodes, ends included.
        bound: clip right-hand sides and states to +-bound; None clips nothing.

    Yields:
        Two float64 arrays [num_x - 2, M] of interior values: ``u[n] + dt f(u[n])`` and ``u[n+1]``.
    """
    matrix, dt = step_matrix(len(initial), num_t), 1.0 / (num_t - 1)
    u = initial[1:-1]
    for _ in range(num_t - 1):
        right = u + dt * reaction(u)
        if bound is not None:
            right = np.clip(right, -bound, bound)
        u = matrix @ right
        if bound is not None:
            u = np.clip(u, -bound, bound)
        yield right, u


def solve(initial: Array, reaction: Reaction, num_t: int = NUM_T, bound: float | None = None) -> Array:
    """Return the solution of M trajectories on all nodes: float64 [M, num_t, num_x], 0 at both ends.

    Args: as for :func:`steps`.
    """
    num_x, num_columns = initial.shape
    field = np.zeros((num_columns, num_t, num_x))
    field[:, 0, 1:-1] = initial[1:-1].T
    for n, (_, u) in enumerate(steps(initial, reaction, num_t, bound), start=1):
        field[:, n, 1:-1] = u.T
    return field


def is_stable(
    initial: Array, reaction: Reaction, num_t: int, bound: float, has_bounded_right: bool = True
) -> bool:
    """Return whether an unclipped solution stays finite and inside +-bound.

    Args:
        initial: as for :func:`steps`.
        reaction: as for :func:`steps`.
        num_t: as for :func:`steps`.
        bound: every state after a step must be smaller in absolute value.
        has_bounded_right: whether the initial states and the right-hand sides must be so too, not merely
            finite.
    """
    if not _is_inside(initial, bound if has_bounded_right else np.inf):
        return False
    with np.errstate(over="ignore", invalid="ignore"):  # an explosion is an answer here
        for right, u in steps(initial, reaction, num_t, None):
            limit = bound if has_bounded_right else np.inf
            if not _is_inside(right, limit) or not _is_inside(u, bound):
                return False
    return True


def _is_inside(values: Array, bound: float) -> bool:
    # NaN compares as false, so it counts as outside.
    return bool(np.max(np.abs(values)) < bound)


def residual(field: Array, reaction: Reaction) -> Array:
    """Return y on all nodes of one solution, of its shape [num_t, num_x].

    The last level has no next one: there y is f(u) itself. On both boundaries y is 0.
    """
    num_t, num_x = field.shape
    dx, dt = 1.0 / (num_x - 1), 1.0 / (num_t - 1)
    y = np.zeros_like(field)
    after = field[1:]
    diffusion = (after[:, 2:] - 2.0 * after[:, 1:-1] + after[:, :-2]) / dx**2
    y[:-1, 1:-1] = (after[:, 1:-1] - field[:-1, 1:-1]) / dt - diffusion
    y[-1, 1:-1] = reaction(field[-1, 1:-1, None])[:, 0]
    return y


def interpolate(field: Array, y_of: Reaction, x: Array, t: Array) -> tuple[Array, Array]:
    """Return u and y at N points, bilinear between nodes.

    Args:
        field: one solution, float64 [num_t, num_x].
        y_of: its reaction (for y on the last time level).
        x: float64 [N], 0 <= x <= 1.
        t: float64 [N], 0 <= t <= 1.

    Returns:
        u and y, float64 [N] each.
    """
    num_t, num_x = field.shape
    u_out, y_out = np.empty(len(x)), np.empty(len(x))
    for i, (x_i, t_i) in enumerate(zip(x.tolist(), t.tolist(), strict=True)):
        column, x_frac = _cell(x_i, num_x)
        level, t_frac = _cell(t_i, num_t)
        weights = np.outer([1.0 - t_frac, t_frac], [1.0 - x_frac, x_frac])
        u_out[i] = np.sum(weights * field[level : level + 2, column : column + 2])
        y_out[i] = np.sum(weights * _residual_corners(field, y_of, level, column))
    return u_out, y_out


def _cell(value: float, num_nodes: int) -> tuple[int, float]:
    """Return the cell of a coordinate in [0, 1] (the last one for 1) and where in it, 0..1, it lies."""
    nodes = _nodes(num_nodes)
    cell = min(int(np.searchsorted(nodes, value, side="right")) - 1, num_nodes - 2)
    return cell, (value - nodes[cell]) / (nodes[cell + 1] - nodes[cell])


@functools.lru_cache(maxsize=16)
def _nodes(num_nodes: int) -> Array:
    nodes: Array = np.linspace(0.0, 1.0, num_nodes)
    nodes.flags.writeable = False
    return nodes


def _residual_corners(field: Array, y_of: Reaction, level: int, column: int) -> Array:
    """Return y on the four corners of a cell, float64 [2, 2]; a field of y would double the memory."""
    num_x = field.shape[1]
    low, high = max(column - 1, 0), min(column + 3, num_x)
    window = field[level : level + 3, low:high]
    if len(window) == 3:
        rows = _window_residual(field, window)
    else:  # the last cell: its upper level is the last one
        rows = np.vstack([_window_residual(field, window), y_of(window[-1][:, None]).T])
    # What lies on the boundary has no neighbour in the window, and y is 0 there.
    is_edge = np.isin(np.arange(low, high), (0, num_x - 1))
    corners: Array = np.where(is_edge, 0.0, rows)[:, column - low : column - low + 2]
    return corners


def _window_residual(field: Array, window: Array) -> Array:
    """Return y on all but the last level of a window of the field; its outer columns are meaningless."""
    num_t, num_x = field.shape
    dx, dt = 1.0 / (num_x - 1), 1.0 / (num_t - 1)
    after = window[1:]
    diffusion: Array = np.zeros_like(after)
    diffusion[:, 1:-1] = (after[:, 2:] - 2.0 * after[:, 1:-1] + after[:, :-2]) / dx**2
    values: Array = (after - window[:-1]) / dt - diffusion
    return values
