"""Which rows are computed together, before anything is laid out.

The plan is made on the host from lengths (and ids, for trees) alone, so every rank can know what all ranks
compute, and a step's metrics can say how well its rows fill micro-batches.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cod_async.config.learner import LearnerConfig
from cod_async.errors import InputError, WorkError
from cod_async.learner.rows.balance import RowCost, assign, balance_of, fill, row_costs
from cod_async.learner.rows.flat import FlatRows, IntArray
from cod_async.learner.rows.merging import merging_metrics
from cod_async.learner.rows.rectangles import MAX_BUCKET_TOKENS, rectangles
from cod_async.learner.rows.tree import Tree, plan_trees
from cod_async.models.layout import LayoutKind


@dataclass(frozen=True)
class MicroBatchPlan:
    """A micro-batch before it is laid out.

    Attributes:
        rows: int64, indices of its rows.
        kind: how they will lie.
        num_row_tokens: tokens of its rows, each counted in full.
        num_tokens: tokens that are computed and are not padding; fewer than the rows' in a tree.
        num_computed_tokens: with padding.
        tree: of kind ``tree``.
    """

    rows: IntArray
    kind: LayoutKind
    num_row_tokens: int
    num_tokens: int
    num_computed_tokens: int
    tree: Tree | None = None


def choose_layout(learner: LearnerConfig, device: torch.device | str, *, is_recurrent: bool) -> LayoutKind:
    """Return the layout that ``learner.layout`` and ``learner.has_prefix_tree`` come to.

    Args:
        learner: configuration.
        device: of the model.
        is_recurrent: whether layers of the model carry a state from token to token.

    Raises:
        InputError: a recurrent model and a layout in which rows lie end to end; its state would run over.
    """
    if is_recurrent:
        for name, value in (("layout", learner.layout), ("has_prefix_tree", learner.has_prefix_tree)):
            if value in ("packed", True):
                raise InputError(
                    f"learner.{name}: {value} needs rows end to end, but recurrent layers of this model "
                    'would run them together; use learner.layout = "auto" and no prefix tree'
                )
        return "rectangle"
    if learner.has_prefix_tree:
        return "tree"
    if learner.layout == "auto":
        return "packed" if torch.device(device).type == "cuda" else "rectangle"
    return "packed" if learner.layout == "packed" else "rectangle"


def token_budget(learner: LearnerConfig, device: torch.device | str, kind: LayoutKind) -> int:
    """Return the tokens of a micro-batch: as configured; of a rectangle on a CPU, no more than fit its
    cache.
    """
    if kind == "rectangle" and torch.device(device).type == "cpu":
        return min(learner.tokens_per_micro_batch, MAX_BUCKET_TOKENS)
    return learner.tokens_per_micro_batch


def _padded(num_tokens: int, multiple: int) -> int:
    return -(-num_tokens // multiple) * multiple


def _plans_of(
    flat: FlatRows, rows: IntArray, max_tokens: int, kind: LayoutKind, multiple: int, cost: RowCost
) -> Iterator[MicroBatchPlan]:
    """Plan micro-batches of some rows."""
    lengths = flat.lengths[rows]
    if kind == "rectangle":
        for part in rectangles(lengths, max_tokens):
            real = int(lengths[part].sum())
            yield MicroBatchPlan(rows[part], kind, real, real, part.size * int(lengths[part].max()))
    elif kind == "packed":
        for part in fill(lengths, row_costs(flat, cost)[rows], max_tokens):
            real = int(lengths[part].sum())
            yield MicroBatchPlan(rows[part], kind, real, real, _padded(real, multiple))
    else:
        for tree in plan_trees(flat, rows, max_tokens):
            real = int(flat.lengths[tree.rows].sum())
            computed = _padded(tree.num_tokens, multiple)
            yield MicroBatchPlan(tree.rows, kind, real, tree.num_tokens, computed, tree)


def plan_micro_batches(
    flat: FlatRows,
    max_tokens: int,
    *,
    kind: LayoutKind = "rectangle",
    rows: IntArray | None = None,
    is_trained: npt.NDArray[np.bool_] | None = None,
    multiple: int = 1,
    max_row_tokens: int | None = None,
    cost: RowCost | None = None,
) -> list[MicroBatchPlan]:
    """Plan the micro-batches of a step, or of one rank's rows, in a fixed order.

    Args:
        flat: the step.
        max_tokens: budget of a micro-batch, padding included; a longer row gets one of its own.
        kind: how rows lie.
        rows: indices of the rows to compute, ascending; all when None. Rows without action tokens are never
            computed.
        is_trained: bool [N], items whose tokens get a gradient. Their rows come first, in micro-batches of
            their own. All do, and nothing is sorted, when None.
        multiple: rows that lie end to end are padded to a multiple of this; the ranks that share a row's
            tokens need it.
        max_row_tokens: longest row that the device can hold, or None.
        cost: what packed micro-batches are balanced by.

    Raises:
        WorkError: a row is longer than ``max_row_tokens``.
    """
    has_actions = np.zeros(flat.num_rows, dtype=np.bool_)
    has_actions[flat.action_rows] = True
    chosen = np.arange(flat.num_rows) if rows is None else rows
    chosen = chosen[has_actions[chosen]]
    longest = int(flat.lengths[chosen].max(initial=0))
    if max_row_tokens is not None and longest > max_row_tokens:
        raise WorkError(
            f"a row has {longest} tokens, and a micro-batch of one row can have {max_row_tokens} here; use "
            "more learner.sequence_parallel ranks, more recomputation (learner.recompute), or a smaller "
            "model.max_context_tokens"
        )
    groups = [chosen]
    if is_trained is not None:
        rows_trained = np.unique(flat.action_rows[is_trained[flat.action_items]])
        groups = [np.intersect1d(chosen, rows_trained), np.setdiff1d(chosen, rows_trained)]
    cost = RowCost() if cost is None else cost
    # Padding is part of the budget.
    budget = max_tokens if kind == "rectangle" else max(max_tokens // multiple * multiple, 1)
    return [plan for group in groups for plan in _plans_of(flat, group, budget, kind, multiple, cost)]


def row_metrics(
    flat: FlatRows,
    max_tokens: int,
    *,
    kind: LayoutKind = "rectangle",
    num_ranks: int = 1,
    is_trained: npt.NDArray[np.bool_] | None = None,
    multiple: int = 1,
) -> dict[str, float]:
    """Return what a step's metrics say about its rows: how they merged, and how they fill micro-batches.

    Everything is known on the host, of all ranks; nothing is computed on a device.

    Args:
        flat: the whole step.
        max_tokens: budget of a micro-batch.
        kind: how rows lie.
        num_ranks: data-parallel ranks.
        is_trained: as of :func:`plan_micro_batches`, as is ``multiple``.
        multiple: of padding.

    Returns:
        The numbers of :func:`.merging.merging_metrics` and :func:`layout_metrics`, and with several ranks
        ``rank_balance``: mean over largest cost of the ranks.
    """
    parts = assign(flat, num_ranks, kind=kind)
    plans = [
        plan
        for rows in parts
        for plan in plan_micro_batches(
            flat, max_tokens, kind=kind, rows=rows, is_trained=is_trained, multiple=multiple
        )
    ]
    numbers = merging_metrics(flat) | layout_metrics(plans)
    return numbers | ({"rank_balance": balance_of(flat, parts)} if num_ranks > 1 else {})


def layout_metrics(plans: Sequence[MicroBatchPlan]) -> dict[str, float]:
    """Return how well rows fill micro-batches.

    Returns:
        ``packing_efficiency``: share of the computed tokens that are not padding.
        ``micro_batch_balance``: mean over largest number of computed tokens of the micro-batches.
        ``tree_share_rate``, of trees: share of the rows' tokens that another row had computed already.
    """
    if not plans:
        return {}
    computed = [plan.num_computed_tokens for plan in plans]
    real = sum(plan.num_tokens for plan in plans)
    numbers = {
        "packing_efficiency": real / sum(computed),
        "micro_batch_balance": sum(computed) / (len(computed) * max(computed)),
    }
    if plans[0].kind == "tree":
        numbers["tree_share_rate"] = 1 - real / sum(plan.num_row_tokens for plan in plans)
    return numbers
