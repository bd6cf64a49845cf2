"""Scripted policies: the floors, an honest planner, and the ceiling of a learning curve.

``uniform`` makes any legal move; ``random`` makes any legal move after which the goal can still be reached in
time, so it always succeeds and its reward is that of not looking at costs. ``planner`` is honest: it knows
what the map shows, guesses the other cells from their neighbors, and plans exactly on that guess, so its
curve is what carrying the map is worth. ``oracle`` plans exactly on the hidden map.
"""

from __future__ import annotations

import functools
import random
from typing import Any

import numpy as np
import numpy.typing as npt

from cod_async.envs.base import Environment, Policy, TaskSpec
from cod_async.envs.grid_navigation.env import GridNavigation
from cod_async.envs.grid_navigation.formats import UNKNOWN, draw_map
from cod_async.envs.grid_navigation.planner import RookPlanner
from cod_async.envs.grid_navigation.worlds import Cell, Costs
from cod_async.lifecycle.hint import prompts_for

_BLIND_GUESS = 50
"""Guess for every cell while nothing is known; any constant leads to the same walks."""


def answer(cell: Cell) -> str:
    """Return the response that moves to a cell."""
    return f"<answer>{cell[0]},{cell[1]}</answer>"


def _view(environment: Environment) -> GridNavigation:
    if not isinstance(environment, GridNavigation):
        raise TypeError(f"this policy plays grid_navigation, not {type(environment).__name__}")
    return environment


def is_feasible(cell: Cell, goal: Cell, num_rounds: int, size: int) -> bool:
    """Return whether some walk of exactly ``num_rounds`` moves leads from ``cell`` to ``goal``.

    On sides of 3 and more every pair of cells is joined by walks of 2, 3, 4, … moves. On side 2 each move
    changes one coordinate, so the parity decides.
    """
    num_differing = (cell[0] != goal[0]) + (cell[1] != goal[1])
    if num_rounds < 2:
        return num_differing == num_rounds
    return size > 2 or num_differing % 2 == num_rounds % 2


def rook_moves(cell: Cell, size: int) -> list[Cell]:
    """Return the 2 * (size - 1) cells that a move can lead to."""
    row, col = cell
    along_row = [(row, other) for other in range(size) if other != col]
    return along_row + [(other, col) for other in range(size) if other != row]


def uniform_policy(seed: int) -> Policy:
    """Return the policy that makes any legal move; it is hardly ever on the goal when the rounds are over."""
    generator = random.Random(f"grid_navigation uniform {seed}")

    def act(environment: Environment, observation: str, memory: Any) -> str:
        grid = _view(environment)
        return answer(generator.choice(rook_moves(grid.position, len(grid.known_costs()))))

    return act


def random_policy(seed: int) -> Policy:
    """Return the policy that makes any legal move after which the goal can still be reached in time."""
    generator = random.Random(f"grid_navigation random {seed}")

    def act(environment: Environment, observation: str, memory: Any) -> str:
        grid = _view(environment)
        size, num_after = len(grid.known_costs()), grid.rounds_left - 1
        moves = rook_moves(grid.position, size)
        return answer(generator.choice([m for m in moves if is_feasible(m, grid.goal, num_after, size)]))

    return act


def _best_move(grid: GridNavigation, costs: Costs) -> Cell:
    plan = RookPlanner(costs).plan(
        grid.position, grid.goal, grid.rounds_left, grid.cost_sum, grid.num_entered
    )
    assert plan is not None  # noqa: S101 - tasks are feasible, and a best walk keeps them so
    return plan.moves[0]


def oracle_policy(seed: int) -> Policy:
    """Return the policy that knows the map and plans exactly in every round; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: Any) -> str:
        grid = _view(environment)
        return answer(_best_move(grid, np.array(grid.hidden()["cost_map"])))

    return act


def planner_policy(seed: int) -> Policy:
    """Return the policy that plans on the map as far as it is shown; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: Any) -> str:
        grid = _view(environment)
        return answer(_best_move(grid, guessed_costs(grid.known_costs())))

    return act


@functools.lru_cache(maxsize=8)
def _inverse_square_distances(size: int) -> npt.NDArray[np.float64]:
    """Return 1 / squared distance of every two cells, [n*n, n*n]; 0 for a cell and itself."""
    places = np.arange(size)
    squares = (places[:, None] - places[None, :]) ** 2
    distances = squares[:, None, :, None] + squares[None, :, None, :]
    flat = distances.reshape(size * size, size * size).astype(np.float64)
    return np.divide(1.0, flat, out=np.zeros_like(flat), where=flat > 0)


def guessed_costs(known: npt.NDArray[np.int64]) -> Costs:
    """Fill unknown cells with the mean of all known ones, weighted by inverse squared distance, rounded.

    Args:
        known: shape [n, n], -1 where unknown.
    """
    is_known = known.ravel() != UNKNOWN
    if not is_known.any():
        return np.full_like(known, _BLIND_GUESS)
    weights = _inverse_square_distances(len(known))[np.ix_(~is_known, is_known)]
    guess = weights @ known[known != UNKNOWN] / weights.sum(axis=1)
    costs = known.copy()
    costs[known == UNKNOWN] = np.rint(guess).astype(np.int64)
    return costs


def truth_hint(environment: Environment, task: TaskSpec) -> str:
    """Return the hint of a perfect updater: the whole cost map. Resets the environment."""
    environment.reset(task)
    costs = np.array(environment.hidden()["cost_map"])
    body = (
        f"- All costs of this grid, with column numbers above and row numbers on the left:\n{draw_map(costs)}"
    )
    return prompts_for(environment.prompt_style).carried(body)
