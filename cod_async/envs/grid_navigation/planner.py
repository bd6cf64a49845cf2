"""The exact optimum of a task: the exact-length rook walk with the least mean cost of entered cells.

The mean is a ratio, sum / count, and is minimized by Dinkelbach's iteration (W. Dinkelbach, "On nonlinear
fractional programming", Management Science 13, 1967): for a trial ratio p/q find the walk with the least
``q * sum - p * count``; if that is zero, p/q is the optimum, otherwise the ratio of that walk is the next,
smaller trial. The inner problem is additive over moves, so a backward dynamic program over (rounds left,
cell) solves it. All arithmetic is on integers, so the result is exact.
"""

from __future__ import annotations

import math

import msgspec
import numpy as np
import numpy.typing as npt

from cod_async.envs.grid_navigation.worlds import Cell, Costs

_NO_WALK = 1 << 50
"""Value of a state without a walk to the goal; real values stay below 2^40 for all accepted options."""


class Plan(msgspec.Struct, frozen=True):
    """A best walk.

    Attributes:
        moves: destination of each remaining move.
        cost_sum, num_entered: sum and number of the entered cells, what was entered before included.
    """

    moves: tuple[Cell, ...]
    cost_sum: int
    num_entered: int

    @property
    def reward(self) -> float:
        """The reward of the walk if it ends on the goal, [0.01, 1]."""
        return reward_of(self.cost_sum, self.num_entered)


def reward_of(cost_sum: int, num_entered: int) -> float:
    """Return 1 - cost_sum / (100 * num_entered), from integers with a single division."""
    return (100 * num_entered - cost_sum) / (100 * num_entered)


class RookPlanner:
    """Exact planning on one cost map.

    Args:
        costs: shape [n, n], integers 0 .. 99, n >= 2.
    """

    def __init__(self, costs: Costs) -> None:
        size = len(costs)
        lines = np.stack((costs, costs.T))  # [direction, line, place on the line]
        prefix = np.zeros((2, size, size + 1), dtype=np.int64)
        np.cumsum(lines, axis=2, out=prefix[:, :, 1:])
        before, through = prefix[:, :, :-1], prefix[:, :, 1:]
        to, origin = np.arange(size)[:, None], np.arange(size)[None, :]
        # [destination, direction, line, origin]: the reduction of the dynamic program runs over the first
        # axis, which NumPy vectorizes over the others.
        forward = through.transpose(2, 0, 1)[:, :, :, None] - through[None]
        backward = before[None] - before.transpose(2, 0, 1)[:, :, :, None]
        self._sums = np.where((to > origin)[:, None, None, :], forward, backward)
        self._counts = np.broadcast_to(np.abs(to - origin)[:, None, None, :], self._sums.shape)
        self._stays = (to == origin)[:, None, None, :]

    def plan(
        self, start: Cell, goal: Cell, num_rounds: int, cost_sum: int = 0, num_entered: int = 0
    ) -> Plan | None:
        """Return a best walk of exactly ``num_rounds`` moves, or None if there is none.

        Args:
            start: where the walk begins.
            goal: where it must end.
            num_rounds: moves left, >= 1.
            cost_sum: sum of the costs of the cells that the episode has entered so far.
            num_entered: their number.
        """
        best = self._cheapest(start, goal, num_rounds, 0, 1)  # a first trial: the least sum
        while best is not None:
            total, count = cost_sum + best.cost_sum, num_entered + best.num_entered
            divisor = math.gcd(total, count)
            ratio = (total // divisor, count // divisor)
            better = self._cheapest(start, goal, num_rounds, *ratio)
            assert better is not None  # noqa: S101 - feasibility does not depend on the ratio
            new_total, new_count = cost_sum + better.cost_sum, num_entered + better.num_entered
            if ratio[1] * new_total - ratio[0] * new_count >= 0:
                return Plan(moves=best.moves, cost_sum=total, num_entered=count)
            best = better
        return None

    def _cheapest(
        self, start: Cell, goal: Cell, num_rounds: int, ratio_sum: int, ratio_count: int
    ) -> Plan | None:
        """Return the walk with the least ``ratio_count * sum - ratio_sum * count``."""
        weights = ratio_count * self._sums - ratio_sum * self._counts
        weights = np.where(self._stays, _NO_WALK, weights)
        values = np.full(self._sums.shape[2:], _NO_WALK)
        values[goal] = 0
        tables = [values]
        for _ in range(num_rounds - 1):
            tables.append(_one_round_more(weights, tables[-1]))
        moves, here, total, count = [], start, 0, 0
        for table in reversed(tables):
            (row, col), size = here, len(table)
            along_row = weights[:, 0, row, col] + table[row]
            along_col = weights[:, 1, col, row] + table[:, col]
            options = np.concatenate((along_row, along_col))
            choice = int(options.argmin())
            if options[choice] >= _NO_WALK // 2:
                return None
            direction, to = divmod(choice, size)
            line, origin = ((row, col), (col, row))[direction]
            total += int(self._sums[to, direction, line, origin])
            count += abs(to - origin)
            here = (row, to) if direction == 0 else (to, col)
            moves.append(here)
        return Plan(moves=tuple(moves), cost_sum=total, num_entered=count)


def _one_round_more(weights: npt.NDArray[np.int64], values: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the least weight to the goal from every cell, [n, n], with one move more than in ``values``."""
    ends = np.stack((values, values.T)).transpose(2, 0, 1)[:, :, :, None]
    along_rows, along_cols = (weights + ends).min(axis=0)
    # The ceiling keeps states without a walk from adding up.
    best: npt.NDArray[np.int64] = np.minimum(np.minimum(along_rows, along_cols.T), _NO_WALK)
    return best
