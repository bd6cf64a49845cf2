"""Micro-batches: how rows lie in tensors, and where their action tokens are predicted.

Three layouts, one contract: every action token of the step is in exactly one micro-batch, once, with the
index of the hidden state that predicts it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cod_async.learner.rows.balance import RowCost
from cod_async.learner.rows.flat import FlatRows, IntArray, ranges
from cod_async.learner.rows.plans import MicroBatchPlan, plan_micro_batches
from cod_async.models.layout import RECTANGLE, Layout, LayoutKind
from cod_async.models.transfer import upload


@dataclass(frozen=True)
class MicroBatch:
    """Rows that are computed together, and their action tokens.

    Attributes:
        input_ids: int64 [B, T]; padding, if any, is token 0.
        predictors: int64 [A], index into the B*T hidden states of the state that predicts each action token.
            In a tree, several action tokens may have the same.
        targets: int64 [A].
        behavior_logprobs: float32 [A].
        segment_ids: int64 [A], index of the item.
        actions: int64 [A], index of each action token among those of the step.
        num_tokens: tokens that are not padding.
        num_trained: action tokens from this one on get no gradient.
        layout: how the rows lie.
    """

    input_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    behavior_logprobs: torch.Tensor
    segment_ids: torch.Tensor
    actions: torch.Tensor
    num_tokens: int
    num_trained: int
    layout: Layout = RECTANGLE

    @property
    def is_filler(self) -> bool:
        """Whether it only keeps step with other ranks: no rows, no action tokens."""
        return self.num_tokens == 0


def micro_batches(
    flat: FlatRows,
    max_tokens: int,
    device: torch.device | str = "cpu",
    *,
    kind: LayoutKind = "rectangle",
    rows: IntArray | None = None,
    is_trained: npt.NDArray[np.bool_] | None = None,
    multiple: int = 1,
    max_row_tokens: int | None = None,
    cost: RowCost | None = None,
) -> Iterator[MicroBatch]:
    """Yield a step's micro-batches with their action tokens, in a fixed order.

    Args:
        flat: the step.
        max_tokens: budget of a micro-batch.
        device: where the tensors go.
        kind: as of :func:`plan_micro_batches`, like all that follow.
        rows: which to compute.
        is_trained: items with a gradient; their tokens come first in each micro-batch, too.
        multiple: of padding.
        max_row_tokens: longest row.
        cost: what is balanced.
    """
    plans = plan_micro_batches(
        flat,
        max_tokens,
        kind=kind,
        rows=rows,
        is_trained=is_trained,
        multiple=multiple,
        max_row_tokens=max_row_tokens,
        cost=cost,
    )
    return lay_out(flat, plans, device, is_trained=is_trained)


def lay_out(
    flat: FlatRows,
    plans: Sequence[MicroBatchPlan],
    device: torch.device | str = "cpu",
    *,
    is_trained: npt.NDArray[np.bool_] | None = None,
) -> Iterator[MicroBatch]:
    """Yield the micro-batches of plans; arguments as of :func:`micro_batches`."""
    by_row = np.argsort(flat.action_rows, kind="stable")  # merged rows hold tokens of several recorded ones
    counts = np.bincount(flat.action_rows, minlength=flat.num_rows)
    firsts = np.cumsum(counts) - counts
    for plan in plans:
        rows = plan.rows
        actions = by_row[ranges(firsts[rows], counts[rows])]
        local = np.repeat(np.arange(rows.size), counts[rows])
        num_trained = actions.size
        if is_trained is not None:
            comes_last = ~is_trained[flat.action_items[actions]]
            order = np.argsort(comes_last, kind="stable")
            actions, local = actions[order], local[order]
            num_trained -= int(comes_last.sum())
        offsets = flat.action_offsets[actions]
        ids, positions, layout, predictors = _place(flat, plan, local, offsets - 1)
        arrays = (
            ids,
            predictors,
            flat.tokens[flat.starts[rows[local]] + offsets],
            flat.behavior_logprobs[actions],
            flat.action_items[actions],
            actions,
        )
        input_ids, places, targets, behavior, segments, own = (upload(array, device) for array in arrays)
        if positions is not None:
            layout = Layout(layout.kind, layout.lengths, upload(positions[None], device), layout.parents)
        yield MicroBatch(
            input_ids, places, targets, behavior, segments, own, plan.num_tokens, num_trained, layout
        )


def _place(
    flat: FlatRows, plan: MicroBatchPlan, local: IntArray, positions: IntArray
) -> tuple[IntArray, IntArray | None, Layout, IntArray]:
    """Lay a micro-batch's rows out on the host.

    Args:
        flat: the step.
        plan: of the micro-batch.
        local: [A], index in ``plan.rows`` of the row of each token asked for.
        positions: [A], its position in that row.

    Returns:
        (ids [B, T]; position ids [T] or None; layout without them; places of the tokens asked for).
    """
    lengths = flat.lengths[plan.rows]
    if plan.kind == "rectangle":
        width = int(lengths.max())
        grid = np.zeros((plan.rows.size, width), dtype=np.int64)
        grid[np.arange(width) < lengths[:, None]] = flat.tokens[ranges(flat.starts[plan.rows], lengths)]
        return grid, None, Layout("rectangle", tuple(lengths.tolist())), local * width + positions
    if plan.tree is None:
        starts, depths, parents = flat.starts[plan.rows], np.zeros_like(lengths), ()
        places = (np.cumsum(lengths) - lengths)[local] + positions
    else:
        tree = plan.tree
        starts, lengths, depths = tree.starts, tree.lengths, tree.depths
        parents = tuple(tree.parents.tolist())
        places = tree.places(local, positions)
    ids = flat.tokens[ranges(starts, lengths)]
    position_ids = ranges(depths, lengths)
    sizes = lengths.tolist()
    padding = plan.num_computed_tokens - plan.num_tokens
    if padding:  # a row of its own, which nothing reads
        ids = np.concatenate([ids, np.zeros(padding, dtype=np.int64)])
        position_ids = np.concatenate([position_ids, np.arange(padding)])
        sizes.append(padding)
        parents = (*parents, -1) if parents else ()
    return ids[None], position_ids, Layout(plan.kind, tuple(sizes), None, parents), places


def filler(kind: LayoutKind, device: torch.device | str = "cpu", *, multiple: int = 1) -> MicroBatch:
    """Return a micro-batch of padding alone, without action tokens, for a rank that has fewer than others.

    Its forward and backward pass (of ``hidden.sum() * 0``) take part in the collectives of a sharded model
    and change nothing.

    Args:
        kind: layout of the micro-batches of the other ranks.
        device: where the tensors go.
        multiple: as of :func:`plan_micro_batches`.
    """
    size = 1 if kind == "rectangle" else multiple
    nothing = torch.zeros(0, dtype=torch.int64, device=device)
    positions = None if kind == "rectangle" else torch.arange(size, device=device)[None]
    return MicroBatch(
        input_ids=torch.zeros(1, size, dtype=torch.int64, device=device),
        predictors=nothing,
        targets=nothing,
        behavior_logprobs=nothing.float(),
        segment_ids=nothing,
        actions=nothing,
        num_tokens=0,
        num_trained=0,
        layout=Layout(kind, (size,), positions, (-1,) if kind == "tree" else ()),
    )
