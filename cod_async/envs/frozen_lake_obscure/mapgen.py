"""Maps and hidden mappings of FrozenLake-Obscure, cell for cell those of the paper's reference.

A map is drawn until it passes a reachability test. The test is a depth-first search with two quirks that
decide which
maps exist, and are therefore kept: a cell counts as visited with the length of the path that *popped* it
first, which need not be the shortest, so some solvable maps are rejected; and the goal is recognised as a
neighbour of a visited cell, so accepted maps have shortest paths of up to ``cap + 1``.
"""

from __future__ import annotations

import functools
import itertools
import random
from collections import deque

import msgspec
import numpy as np

from cod_async.errors import EnvironmentInputError

Cell = tuple[int, int]
"""(row, column), 0-based from the top left."""

MOVES = ("Down", "Right", "Up", "Left")
"""The four moves in the reference's order."""
DELTAS: dict[str, Cell] = {"Down": (1, 0), "Right": (0, 1), "Up": (-1, 0), "Left": (0, -1)}
"""Change of (row, column) by each move."""
MAPPINGS: tuple[tuple[str, ...], ...] = tuple(itertools.permutations(MOVES))
"""The 24 mappings; entry i of a mapping is the move of code i + 1."""

_MAX_ATTEMPTS = 100_000


class LakeMap(msgspec.Struct, frozen=True):
    """A map: ``rows`` of S, G, F (frozen) and H (hole), and where the start and the goal are."""

    rows: tuple[str, ...]
    start: Cell
    goal: Cell

    def is_inside(self, cell: Cell) -> bool:
        """Return whether a cell lies on the map."""
        size = len(self.rows)
        return 0 <= cell[0] < size and 0 <= cell[1] < size

    def at(self, cell: Cell) -> str:
        """Return the letter of a cell: S, G, F or H."""
        return self.rows[cell[0]][cell[1]]

    def destination(self, cell: Cell, move: str) -> Cell:
        """Return where a move leads; a move over the edge stays."""
        row_delta, col_delta = DELTAS[move]
        target = (cell[0] + row_delta, cell[1] + col_delta)
        return target if self.is_inside(target) else cell


@functools.lru_cache(maxsize=8192)
def make_map(seed: int, size: int, p: float, cap: int) -> LakeMap:
    """Draw the map of a data record (pure; remembered, as all lifecycles of a group play the same maps).

    Args:
        seed: seed of NumPy's default generator, >= 0.
        size: side of the square grid in cells, >= 2.
        p: probability of a frozen cell, [0, 1].
        cap: path length bound of the reachability test, >= 1 (the preset's ``env_max_steps``).

    Raises:
        EnvironmentInputError: no map was accepted in 100,000 draws; give the record another size or ``p``.
    """
    generator = np.random.default_rng(seed)
    for _ in range(_MAX_ATTEMPTS):
        letters = generator.choice(["F", "H"], size=(size, size), p=[p, 1 - p])
        start, goal = _draw_ends(generator, size)
        letters[start] = "S"
        letters[goal] = "G"
        lake = LakeMap(rows=tuple("".join(row) for row in letters), start=start, goal=goal)
        if is_accepted(lake, cap):
            return lake
    raise EnvironmentInputError(
        f"environment frozen_lake_obscure: no solvable map for seed {seed}, size {size}, p {p} within "
        f"{cap} steps; choose a smaller size or a larger p"
    )


def _draw_ends(generator: np.random.Generator, size: int) -> tuple[Cell, Cell]:
    """Draw start and goal, four coordinates at a time, until they differ."""
    while True:
        start = (int(generator.integers(0, size)), int(generator.integers(0, size)))
        goal = (int(generator.integers(0, size)), int(generator.integers(0, size)))
        if start != goal:
            return start, goal


def is_accepted(lake: LakeMap, cap: int) -> bool:
    """Return whether the reference's depth-first reachability test accepts the map (see the module text)."""
    stack = [(lake.start, 0)]
    visited: set[Cell] = set()
    while stack:
        cell, length = stack.pop()
        if length > cap or cell in visited:
            continue
        visited.add(cell)
        for move in MOVES:
            neighbor = lake.destination(cell, move)
            if neighbor == cell:
                continue
            if neighbor == lake.goal:
                return True
            if lake.at(neighbor) != "H":
                stack.append((neighbor, length + 1))
    return False


def distances_to_goal(lake: LakeMap) -> dict[Cell, int]:
    """Return the number of moves from each cell that can reach the goal without a hole (breadth-first)."""
    distances = {lake.goal: 0}
    queue = deque([lake.goal])
    while queue:
        cell = queue.popleft()
        for move in MOVES:
            neighbor = lake.destination(cell, move)
            if neighbor not in distances and lake.at(neighbor) != "H":
                distances[neighbor] = distances[cell] + 1
                queue.append(neighbor)
    return distances


def mapping_for_seed(seed: int) -> tuple[str, ...]:
    """Return the mapping of a pack seed: the four moves shuffled by a Mersenne generator.

    Args:
        seed: 0 .. 2^64-1.

    Returns:
        Four moves; entry i is the move of code i + 1. For example seed 0 gives Up, Down, Right, Left.
    """
    moves = list(MOVES)
    random.Random(seed).shuffle(moves)
    return tuple(moves)
