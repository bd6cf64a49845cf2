"""Hidden cost maps and the tasks on them, draw for draw those of the paper's reference implementation.

A map is a sum of rotated Gaussian bumps, stretched to 0 .. 99 after squaring, so that cheap ground is common
and ridges are steep; it comes from the pack seed alone. A task (rounds, start, goal) comes from its record's
seed and the side of the map; the walk that leads from start to goal is drawn with it and proves that the task
can be solved.
"""

from __future__ import annotations

import functools
import math

import msgspec
import numpy as np
import numpy.typing as npt

from cod_async.envs.grid_navigation.options import GridOptions

Cell = tuple[int, int]
"""(row, column), 0-based from the top left."""

Costs = npt.NDArray[np.int64]
"""Costs of a map, shape [n, n], 0 .. 99."""

MAX_COST = 99


class GridTask(msgspec.Struct, frozen=True):
    """A task: walk from ``start`` to ``goal`` in exactly ``num_rounds`` moves."""

    start: Cell
    goal: Cell
    num_rounds: int


def cost_map(options: GridOptions, pack_seed: int) -> Costs:
    """Return the map of a pack, read-only, shape [n, n], int64, 0 .. 99.

    Both ends occur on every map, unless its bumps are too small to be met by any cell: then all is 0.

    Args:
        options: sides, bumps and extents are drawn from their ranges.
        pack_seed: 0 .. 2^64-1.
    """
    return _cost_map(
        pack_seed,
        options.size_min,
        options.size_max,
        options.num_components,
        float(options.scale_min),
        float(options.scale_max),
    )


@functools.lru_cache(maxsize=256)  # all lifecycles of a group, and all their tasks, share a map
def _cost_map(
    pack_seed: int, size_min: int, size_max: int, num_components: int, scale_min: float, scale_max: float
) -> Costs:
    generator = np.random.default_rng(pack_seed)
    size = int(generator.integers(size_min, size_max + 1))
    coordinates = np.arange(size) / (size - 1)
    height = np.zeros((size, size))
    for _ in range(num_components):
        center_row, center_col = generator.random(2)
        long = generator.uniform(scale_min, scale_max)
        short = generator.uniform(scale_min, long)
        angle = generator.uniform(0, math.pi)
        amplitude = generator.uniform(0.8, 1.2)
        rows = (coordinates - center_row)[:, None]
        cols = (coordinates - center_col)[None, :]
        along = math.cos(angle) * rows + math.sin(angle) * cols
        across = -math.sin(angle) * rows + math.cos(angle) * cols
        height += amplitude * np.exp(-0.5 * ((along / long) ** 2 + (across / short) ** 2))
    low, high = height.min(), height.max()
    share = (height - low) / (high - low) if high > low else np.zeros_like(height)
    costs = np.rint(MAX_COST * share**2).astype(np.int64)  # rint rounds halves to even
    costs.flags.writeable = False
    return costs


def make_task(seed: int, size: int, rounds_min: int, rounds_max: int) -> GridTask:
    """Draw a task for a map of ``size`` x ``size`` cells.

    Args:
        seed: seed of the data record, 0 .. 2^64-1.
        size: side of the map, >= 2 cells.
        rounds_min: fewest rounds, >= 1.
        rounds_max: most rounds, inclusive.
    """
    return make_task_and_walk(seed, size, rounds_min, rounds_max)[0]


def make_task_and_walk(
    seed: int, size: int, rounds_min: int, rounds_max: int
) -> tuple[GridTask, tuple[Cell, ...]]:
    """Draw a task and the walk it was drawn by: the cells moved to, the goal last; see :func:`make_task`."""
    generator = np.random.default_rng(seed)
    num_rounds = int(generator.integers(rounds_min, rounds_max + 1))
    while True:  # a walk comes back to its start with probability 1/2 at most (on the smallest grid)
        start = (int(generator.integers(size)), int(generator.integers(size)))
        row, col = start
        walk = []
        for _ in range(num_rounds):
            is_vertical = bool(generator.integers(2))
            value = int(generator.integers(size - 1))
            if is_vertical:
                row = value + (value >= row)
            else:
                col = value + (value >= col)
            walk.append((row, col))
        if (row, col) != start:
            return GridTask(start=start, goal=(row, col), num_rounds=num_rounds), tuple(walk)


def entered_cells(origin: Cell, destination: Cell) -> tuple[Cell, ...]:
    """Return the cells that a rook move enters, in order: without the origin, with the destination."""
    (row, col), (to_row, to_col) = origin, destination
    row_step = (to_row > row) - (to_row < row)
    col_step = (to_col > col) - (to_col < col)
    distance = abs(to_row - row) + abs(to_col - col)
    return tuple((row + k * row_step, col + k * col_step) for k in range(1, distance + 1))
