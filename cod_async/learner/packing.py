"""From segments to rectangles: rows of similar length side by side, padded on the right.

On a CPU a causal attention over ragged packed rows is many times slower than over a rectangle, so rows are
bucketed by length. The cut into rectangles minimises padded tokens plus a fixed cost per rectangle (dynamic
programme over the distinct lengths). Everything is a function of the sorted items alone, so results do not
depend on arrival order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cod_async.errors import WorkError
from cod_async.wire.messages import TrainItem

RECTANGLE_OVERHEAD_TOKENS = 192
"""Cost of one more rectangle, in token equivalents; measured with the quickstart's model on one core."""

MAX_BUCKET_TOKENS = 2048
"""On a CPU a rectangle is cut further when its activations would no longer fit into the cache."""

_MAX_DISTINCT_LENGTHS = 256

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FlatRows:
    """The rows of a step, end to end.

    Attributes:
        tokens: int64 [sum of lengths].
        starts: int64 [R], where each row begins in ``tokens``.
        lengths: int64 [R].
        row_segments: int64 [R], index of the row's item.
        action_rows: int64 [A], row of each action token.
        action_offsets: int64 [A], its position in the row (>= 1).
        behavior_logprobs: float32 [A].
        advantages: float64 [N], one per item.
    """

    tokens: IntArray
    starts: IntArray
    lengths: IntArray
    row_segments: IntArray
    action_rows: IntArray
    action_offsets: IntArray
    behavior_logprobs: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float64]

    @property
    def num_tokens(self) -> int:
        """All tokens of the step, context included."""
        return int(self.tokens.size)

    @property
    def num_action_tokens(self) -> int:
        """Tokens that carry loss: the denominator of the token mean."""
        return int(self.action_rows.size)


@dataclass(frozen=True)
class MicroBatch:
    """One rectangle and its action tokens.

    Attributes:
        input_ids: int64 [B, T], padded on the right with token 0.
        predictors: int64 [A], index into the B*T hidden states of the state that predicts each action token.
        targets: int64 [A].
        behavior_logprobs: float32 [A].
        segment_ids: int64 [A], index of the item.
        num_tokens: tokens that are not padding.
    """

    input_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    behavior_logprobs: torch.Tensor
    segment_ids: torch.Tensor
    num_tokens: int


def _concatenate(parts: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


def _ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """Return starts[0], starts[0]+1, … (sizes[0] of them), starts[1], … end to end."""
    ends = np.cumsum(sizes)
    offsets = np.arange(int(ends[-1]) if ends.size else 0) - np.repeat(ends - sizes, sizes)
    return np.repeat(starts, sizes) + offsets


def flatten(items: Sequence[TrainItem], *, vocab_size: int, max_row_tokens: int | None = None) -> FlatRows:
    """Lay the rows of a step end to end and check them.

    Args:
        items: the whole step, sorted by key.
        vocab_size: token ids must be below this.
        max_row_tokens: longest row the model takes, or None.

    Raises:
        WorkError: a row that no engine can have produced: empty, an id outside the vocabulary, an action span
            that starts at token 0 or ends behind the row, or log-probs that do not match the spans.
    """
    rows = [(index, row) for index, item in enumerate(items) for row in item.rows]
    lengths = np.array([row.token_ids.length for _, row in rows], dtype=np.int64)
    spans = np.array(
        [(r, start, stop) for r, (_, row) in enumerate(rows) for start, stop in row.action_spans],
        dtype=np.int64,
    ).reshape(-1, 3)
    tokens = _concatenate([row.token_ids.numpy() for _, row in rows], np.int64)
    behavior = _concatenate([row.behavior_logprobs.numpy() for _, row in rows], np.float32)
    sizes = spans[:, 2] - spans[:, 1]
    counts = np.bincount(spans[:, 0], weights=sizes, minlength=len(rows)).astype(np.int64)
    expected = np.array([row.behavior_logprobs.length for _, row in rows], dtype=np.int64)
    limit = np.iinfo(np.int64).max if max_row_tokens is None else max_row_tokens
    bad_rows = (lengths < 1) | (lengths > limit) | (counts != expected)
    bad_spans = (spans[:, 1] < 1) | (sizes < 1) | (spans[:, 2] > lengths[spans[:, 0]])
    starts = np.cumsum(lengths) - lengths
    bad_tokens = (tokens < 0) | (tokens >= vocab_size)
    for mask, owners, what in (
        (
            bad_rows,
            np.arange(len(rows)),
            f"is empty, longer than {limit}, or has log-probs that miss its spans",
        ),
        (bad_spans, spans[:, 0], "has an action span outside [1, length)"),
        (bad_tokens, np.repeat(np.arange(len(rows)), lengths), f"has a token id outside [0, {vocab_size})"),
    ):
        if mask.any():
            item = items[rows[int(owners[int(np.argmax(mask))])][0]]
            raise WorkError(
                f"segment {item.key}: a row {what}; it cannot be trained on, look at it with cod inspect"
            )
    return FlatRows(
        tokens=tokens,
        starts=starts,
        lengths=lengths,
        row_segments=np.array([index for index, _ in rows], dtype=np.int64),
        action_rows=np.repeat(spans[:, 0], sizes),
        action_offsets=_ranges(spans[:, 1], sizes),
        behavior_logprobs=behavior,
        advantages=np.array([item.advantage for item in items], dtype=np.float64),
    )


def rectangles(
    lengths: IntArray, max_tokens: int, overhead_tokens: int = RECTANGLE_OVERHEAD_TOKENS
) -> list[IntArray]:
    """Cut rows into rectangles.

    Args:
        lengths: tokens of each row.
        max_tokens: budget of a rectangle, padding included; a longer row gets a rectangle of its own.
        overhead_tokens: fixed cost of a rectangle in tokens.

    Returns:
        Row indices of each rectangle, ascending by length, ties by index; every row is in exactly one.
    """
    if lengths.size == 0:
        return []
    order = np.argsort(lengths, kind="stable")
    sizes = lengths[order]
    distinct = np.unique(sizes)
    if distinct.size > _MAX_DISTINCT_LENGTHS:  # coarser cut candidates bound the programme for very long rows
        picks = np.linspace(0, distinct.size - 1, _MAX_DISTINCT_LENGTHS).round().astype(np.int64)
        distinct = distinct[picks]
    below = np.concatenate([[0], np.searchsorted(sizes, distinct, side="right")])
    best = np.zeros(distinct.size + 1)
    origin = np.zeros(distinct.size + 1, dtype=np.int64)
    for j in range(1, distinct.size + 1):
        width = distinct[j - 1]
        num_rows = below[j] - below[:j]
        num_rectangles = -(-num_rows // max(1, max_tokens // width))
        costs = best[:j] + width * num_rows + overhead_tokens * num_rectangles
        origin[j] = int(np.argmin(costs))
        best[j] = costs[origin[j]]
    cuts = [distinct.size]
    while cuts[-1] > 0:
        cuts.append(int(origin[cuts[-1]]))
    result: list[IntArray] = []
    for low, high in zip(cuts[:0:-1], cuts[-2::-1], strict=True):
        bucket = order[below[low] : below[high]]
        rows_each = max(1, max_tokens // int(distinct[high - 1]))
        result += np.array_split(bucket, -(-bucket.size // rows_each))
    return result


def micro_batches(
    flat: FlatRows, max_tokens: int, device: torch.device | str = "cpu"
) -> Iterator[MicroBatch]:
    """Yield the step's rectangles with their action tokens, in a fixed order."""
    action_counts = np.bincount(flat.action_rows, minlength=flat.lengths.size)
    action_starts = np.cumsum(action_counts) - action_counts
    for rows in rectangles(flat.lengths, max_tokens):
        lengths = flat.lengths[rows]
        width = int(lengths.max())
        grid = np.zeros((rows.size, width), dtype=np.int64)
        grid[np.arange(width) < lengths[:, None]] = flat.tokens[_ranges(flat.starts[rows], lengths)]
        counts = action_counts[rows]
        actions = _ranges(action_starts[rows], counts)
        offsets = flat.action_offsets[actions]
        local = np.repeat(np.arange(rows.size), counts)
        arrays = (
            grid,
            local * width + offsets - 1,
            grid[local, offsets],
            flat.behavior_logprobs[actions],
            flat.row_segments[flat.action_rows[actions]],
        )
        ids, predictors, targets, behavior, segments = (torch.from_numpy(a).to(device) for a in arrays)
        yield MicroBatch(ids, predictors, targets, behavior, segments, int(lengths.sum()))
