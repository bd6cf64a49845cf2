"""Which data-parallel rank computes which rows, and which rows lie in one micro-batch.

All ranks wait for the slowest, so what is balanced is cost, not tokens: attention grows with the square of a
row's length, and only action tokens pass through the output head. Rows go to the least loaded place, the most
expensive first (LPT, Graham 1969, at most 4/3 of the best). Everything is a function of the step alone; every
rank computes the same answer by itself.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from cod_async.learner.rows.flat import FlatRows, IntArray, RowOrder
from cod_async.learner.rows.tree import MIN_SHARED_TOKENS
from cod_async.models.layout import LayoutKind

FloatArray = npt.NDArray[np.float64]


@dataclass(frozen=True)
class RowCost:
    """What a row costs, in tokens of the linear layers: ``T + T^2 / attention_tokens + head_share * A``.

    Attributes:
        attention_tokens: length of a row at which causal attention costs as much as the linear layers.
        head_share: cost of an action token in the output head.

    The defaults are those of Qwen3-0.6B (see :meth:`of_shape`: 28 layers of 15.7 million parameters,
    attention 2,048 wide, a head of 155.6 million). Larger models have larger ``attention_tokens``; the
    balance depends on them little.
    """

    attention_tokens: float = 7680.0
    head_share: float = 0.35

    @classmethod
    def of_shape(
        cls, layer_parameters: int, attention_width: int, num_layers: int, head_parameters: int
    ) -> RowCost:
        """Return the cost of a model's rows.

        A token takes 2 flop per parameter forward, and causal attention 2 * T * width per layer on average.

        Args:
            layer_parameters: parameters of one layer.
            attention_width: query heads times their width.
            num_layers: layers.
            head_parameters: vocabulary times hidden size.
        """
        return cls(
            attention_tokens=layer_parameters / attention_width,
            head_share=head_parameters / (num_layers * layer_parameters),
        )

    def of(self, lengths: IntArray, num_actions: IntArray, num_shared: IntArray | int = 0) -> FloatArray:
        """Return the cost of each row.

        Args:
            lengths: tokens of each.
            num_actions: action tokens of each.
            num_shared: leading tokens of each that another row computes.
        """
        whole = lengths + lengths.astype(np.float64) ** 2 / self.attention_tokens
        shared = np.asarray(num_shared, dtype=np.float64)
        cost: FloatArray = whole - shared - shared**2 / self.attention_tokens + self.head_share * num_actions
        return cost


def row_costs(flat: FlatRows, cost: RowCost) -> FloatArray:
    """Return what each row of a step costs, [R]; 0 for rows without action tokens, which nobody computes."""
    num_actions = np.bincount(flat.action_rows, minlength=flat.num_rows)
    return np.where(num_actions > 0, cost.of(flat.lengths, num_actions), 0.0)


def assign(
    flat: FlatRows, num_ranks: int, cost: RowCost | None = None, kind: LayoutKind = "rectangle"
) -> list[IntArray]:
    """Return the rows of each data-parallel rank.

    Args:
        flat: the step.
        num_ranks: data-parallel ranks; some get no rows when there are fewer rows than ranks.
        cost: of rows.
        kind: of the micro-batches. With a tree, rows that begin alike stay together as far as balance allows.

    Returns:
        Row indices, ascending; every row with action tokens is in exactly one of the ``num_ranks`` arrays.
    """
    cost = RowCost() if cost is None else cost
    rows = np.unique(flat.action_rows)
    if num_ranks == 1:
        return [rows]
    if kind == "tree":
        return [np.sort(part) for part in _cut_in_order(flat, rows, num_ranks, cost)]
    costs = row_costs(flat, cost)[rows]
    loads = np.zeros(num_ranks)
    ranks = np.empty(rows.size, dtype=np.int64)
    for index in np.argsort(-costs, kind="stable"):
        ranks[index] = loads.argmin()
        loads[ranks[index]] += costs[index]
    return [rows[ranks == rank] for rank in range(num_ranks)]


def _cut_in_order(flat: FlatRows, rows: IntArray, num_parts: int, cost: RowCost) -> list[IntArray]:
    """Cut rows, sorted by their ids, into runs of about equal cost, counting what they share once."""
    order = RowOrder(flat, rows)
    shared = np.where(order.shared >= MIN_SHARED_TOKENS, order.shared, 0)
    num_actions = np.bincount(flat.action_rows, minlength=flat.num_rows)[order.rows]
    costs = cost.of(flat.lengths[order.rows], num_actions, shared)
    middles = np.cumsum(costs) - costs / 2
    part_of = np.minimum((middles * num_parts / max(costs.sum(), 1e-9)).astype(np.int64), num_parts - 1)
    return [order.rows[part_of == part] for part in range(num_parts)]


def balance_of(flat: FlatRows, parts: list[IntArray], cost: RowCost | None = None) -> float:
    """Return mean over largest cost of the parts, in (0, 1]: the share of time in which no rank waits."""
    costs = row_costs(flat, RowCost() if cost is None else cost)
    loads = [float(costs[part].sum()) for part in parts]
    return sum(loads) / (len(loads) * max(loads)) if max(loads) else 1.0


def fill(lengths: IntArray, costs: FloatArray, max_tokens: int) -> list[IntArray]:
    """Put rows into as few micro-batches as best-fit-decreasing finds, then even out what these cost.

    Args:
        lengths: tokens of each row.
        costs: of each row.
        max_tokens: budget of a micro-batch; a longer row gets one of its own.

    Returns:
        Indices of the rows of each micro-batch, ascending; micro-batches in the order of their first rows.
    """
    if lengths.size == 0:
        return []
    sizes = np.minimum(lengths, max_tokens)
    bins = _best_fit(sizes, max_tokens)
    count = int(bins.max()) + 1
    even = _least_loaded(sizes, costs, count, max_tokens)
    places = bins if even is None else even
    found = [np.flatnonzero(places == place) for place in range(count)]
    return sorted((part for part in found if part.size), key=lambda part: int(part[0]))


def _best_fit(sizes: IntArray, max_tokens: int) -> IntArray:
    """Return each row's micro-batch: the fullest one that it still fits into, the longest row first."""
    room = np.empty(sizes.size, dtype=np.int64)
    places = np.empty(sizes.size, dtype=np.int64)
    count = 0
    for index in np.argsort(-sizes, kind="stable"):
        left = room[:count] - sizes[index]
        fits = left >= 0
        place = int(np.where(fits, left, max_tokens + 1).argmin()) if fits.any() else count
        if place == count:
            room[count] = max_tokens
            count += 1
        room[place] -= sizes[index]
        places[index] = place
    return places


def _least_loaded(sizes: IntArray, costs: FloatArray, count: int, max_tokens: int) -> IntArray | None:
    """Return each row's micro-batch: the cheapest one that it fits into, the most expensive row first; None
    if rows are left over that way.
    """
    room = np.full(count, max_tokens, dtype=np.int64)
    loads = np.zeros(count)
    places = np.empty(sizes.size, dtype=np.int64)
    for index in np.argsort(-costs, kind="stable"):
        fits = room >= sizes[index]
        if not fits.any():
            return None
        place = int(np.where(fits, loads, np.inf).argmin())
        room[place] -= sizes[index]
        loads[place] += costs[index]
        places[index] = place
    return places
