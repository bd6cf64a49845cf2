"""From segments to rectangles: rows of similar length side by side, padded on the right.

The deltas of a transcript are put end to end first: one row with many segments, each with its own advantage.
On a CPU a causal attention over ragged packed rows is many times slower than over a rectangle, so rows are
bucketed by length. The cut into rectangles minimises padded tokens plus a fixed cost per rectangle (dynamic
programme over the distinct lengths). Everything is a function of the sorted items alone, so results do not
depend on arrival order.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from cod_async.errors import NumericsError, WorkError
from cod_async.lifecycle.segment import Row, RowParent, SegmentKey, Version
from cod_async.lifecycle.transcript import mark_after
from cod_async.wire.messages import TrainItem

RECTANGLE_OVERHEAD_TOKENS = 192
"""Cost of one more rectangle, in token equivalents; measured with the quickstart's model on one core."""

MAX_BUCKET_TOKENS = 2048
"""On a CPU a rectangle is cut further when its activations would no longer fit into the cache."""

MAX_LOGPROB = 1e-6
"""An engine's rounding may lift a log-prob this far above 0, in nats; the coordinator lets in no more."""

_MAX_DISTINCT_LENGTHS = 256

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FlatRows:
    """The rows of a step, end to end.

    Attributes:
        tokens: int64 [sum of lengths].
        starts: int64 [R], where each row begins in ``tokens``.
        lengths: int64 [R].
        action_items: int64 [A], index of the item of each action token.
        action_rows: int64 [A], its row.
        action_offsets: int64 [A], its position in the row (>= 1).
        action_lags: int64 [A], steps between the learner's version and the one that generated the token.
        behavior_logprobs: float32 [A].
        advantages: float64 [N], one per item.
        row_lifecycles: int64 [R], ascending; rows of one lifecycle share a number.
    """

    tokens: IntArray
    starts: IntArray
    lengths: IntArray
    action_items: IntArray
    action_rows: IntArray
    action_offsets: IntArray
    action_lags: IntArray
    behavior_logprobs: npt.NDArray[np.float32]
    advantages: npt.NDArray[np.float64]
    row_lifecycles: IntArray

    @property
    def num_tokens(self) -> int:
        """All tokens of the step, context included."""
        return int(self.lengths.sum())

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
        actions: int64 [A], index of each action token among those of the step.
        num_tokens: tokens that are not padding.
        num_trained: action tokens from this one on get no gradient.
    """

    input_ids: torch.Tensor
    predictors: torch.Tensor
    targets: torch.Tensor
    behavior_logprobs: torch.Tensor
    segment_ids: torch.Tensor
    actions: torch.Tensor
    num_tokens: int
    num_trained: int


def _concatenate(parts: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


def _ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """Return starts[0], starts[0]+1, … (sizes[0] of them), starts[1], … end to end."""
    ends = np.cumsum(sizes)
    offsets = np.arange(int(ends[-1]) if ends.size else 0) - np.repeat(ends - sizes, sizes)
    return np.repeat(starts, sizes) + offsets


class _Pieces:
    """The rows of the items as they come, and where each of them goes.

    A row that stands for itself is one piece. The deltas of a transcript follow each other, because items are
    sorted by key, and become one row.

    Attributes:
        rows: the P pieces.
        items: index of each piece's item.
        row_of: index of the row that each piece belongs to.
        offsets: where each piece begins in its row.
        num_rows: rows, R.
    """

    def __init__(self, items: Sequence[TrainItem]) -> None:
        self.rows: list[Row] = []
        self.items: list[int] = []
        self.row_of: list[int] = []
        self.offsets: list[int] = []
        self.num_rows = 0
        tail: tuple[tuple[int, int], RowParent] | None = None  # lifecycle and mark of an unfinished row
        for index, item in enumerate(items):
            for row in item.rows:
                parent, lifecycle = row.parent, (item.key.group, item.key.member)
                is_continued = parent is not None and parent.num_tokens > 0
                if is_continued and tail != (lifecycle, parent):
                    raise WorkError(
                        f"segment {item.key}: its tokens go on from {parent}, which the segments before it "
                        "do not add up to; its transcript has a hole, look at it with cod inspect"
                    )
                self.num_rows += not is_continued
                self.rows.append(row)
                self.items.append(index)
                self.row_of.append(self.num_rows - 1)
                self.offsets.append(parent.num_tokens if parent is not None else 0)
                tail = None if parent is None else (lifecycle, mark_after(row))


def _token_lags(items: Sequence[TrainItem], pieces: _Pieces, version: Version | None) -> IntArray:
    """Return the lag of every action token of all pieces.

    The coordinator knows how the lineages hang together and says how far the oldest token of an item lags;
    from there it is plain subtraction. A token of the learner's own lineage needs nobody's word.

    Raises:
        WorkError: a log-prob without a version, or a version that does not exist yet.
    """
    oldest = [
        min((span.version for row in item.rows for span in row.versions), default=None) for item in items
    ]
    lags: list[int] = []
    sizes: list[int] = []
    for row, index in zip(pieces.rows, pieces.items, strict=True):
        item, first = items[index], oldest[index]
        count = 0
        for span in row.versions:
            lag = round(item.lag_steps) + (0 if first is None else first.step - span.version.step)
            if version is not None and span.version.lineage == version.lineage:
                lag = version.step - span.version.step
                if lag < 0:
                    raise WorkError(
                        f"segment {item.key}: has tokens of version {span.version}, the learner is at "
                        f"{version}; it cannot be trained on, look at it with cod inspect"
                    )
            lags.append(max(lag, 0))
            sizes.append(max(span.num_tokens, 0))
            count += span.num_tokens
        if count != row.behavior_logprobs.length:
            raise WorkError(
                f"segment {item.key}: a row has {row.behavior_logprobs.length} log-probs and versions for "
                f"{count}; it cannot be trained on, look at it with cod inspect"
            )
    return np.repeat(np.array(lags, dtype=np.int64), np.array(sizes, dtype=np.int64))


def _check_logprobs(behavior: npt.NDArray[np.float32], keys: Sequence[SegmentKey], sizes: IntArray) -> None:
    """Refuse log-probs that no policy has.

    Args:
        behavior: of all pieces, end to end.
        keys: of the item of each piece.
        sizes: action tokens of each piece.

    Raises:
        NumericsError: one is not finite.
        WorkError: one is above 0 by more than rounding.
    """
    is_bad = ~np.isfinite(behavior) | (behavior > MAX_LOGPROB)
    if not is_bad.any():
        return
    first = int(np.argmax(is_bad))
    key, worst = keys[int(np.repeat(np.arange(sizes.size), sizes)[first])], float(behavior[first])
    if math.isfinite(worst):
        raise WorkError(f"segment {key}: a log-prob is {worst:g}, above 0; look at it with cod inspect")
    raise NumericsError(f"segment {key}: a log-prob is {worst:g}; the step was not applied")


def flatten(
    items: Sequence[TrainItem],
    *,
    vocab_size: int,
    max_row_tokens: int | None = None,
    version: Version | None = None,
) -> FlatRows:
    """Lay the rows of a step end to end and check them.

    Args:
        items: the whole step, sorted by key.
        vocab_size: token ids must be below this.
        max_row_tokens: longest row the model takes, or None.
        version: of the learner, or None, which takes every lag from the item's.

    Raises:
        WorkError: a row that no engine can have produced: empty, an id outside the vocabulary, an action span
            that starts at token 0 or ends behind the row, log-probs that do not match the spans or lie above
            0, tokens without a version or of one to come, or a transcript with a hole.
        NumericsError: a log-prob is not finite.
    """
    pieces = _Pieces(items)
    piece_items = np.array(pieces.items, dtype=np.int64)
    row_of = np.array(pieces.row_of, dtype=np.int64)
    offsets = np.array(pieces.offsets, dtype=np.int64)
    sizes = np.array([row.token_ids.length for row in pieces.rows], dtype=np.int64)
    lengths = np.bincount(row_of, weights=sizes, minlength=pieces.num_rows).astype(np.int64)
    spans = np.array(
        [(p, start, stop) for p, row in enumerate(pieces.rows) for start, stop in row.action_spans],
        dtype=np.int64,
    ).reshape(-1, 3)
    owners, span_sizes = spans[:, 0], spans[:, 2] - spans[:, 1]
    tokens = _concatenate([row.token_ids.numpy() for row in pieces.rows], np.int64)
    behavior = _concatenate([row.behavior_logprobs.numpy() for row in pieces.rows], np.float32)
    counts = np.bincount(owners, weights=span_sizes, minlength=row_of.size).astype(np.int64)
    expected = np.array([row.behavior_logprobs.length for row in pieces.rows], dtype=np.int64)
    limit = np.iinfo(np.int64).max if max_row_tokens is None else max_row_tokens
    for mask, pieces_of, what in (
        (
            (sizes < 1) | (lengths[row_of] > limit) | (counts != expected),
            np.arange(row_of.size),
            f"is empty, longer than {limit}, or has log-probs that miss its spans",
        ),
        (
            (spans[:, 1] + offsets[owners] < 1) | (span_sizes < 1) | (spans[:, 2] > sizes[owners]),
            owners,
            "has an action span outside [1, length)",
        ),
        (
            (tokens < 0) | (tokens >= vocab_size),
            np.repeat(np.arange(row_of.size), sizes),
            f"has a token id outside [0, {vocab_size})",
        ),
    ):
        if mask.any():
            item = items[pieces.items[int(pieces_of[int(np.argmax(mask))])]]
            raise WorkError(
                f"segment {item.key}: a row {what}; it cannot be trained on, look at it with cod inspect"
            )
    _check_logprobs(behavior, [items[index].key for index in pieces.items], expected)
    lags = _token_lags(items, pieces, version)
    is_trained = ~np.array([items[index].is_context for index in pieces.items], dtype=np.bool_)
    kept = is_trained[owners]
    owners, span_sizes = owners[kept], span_sizes[kept]
    return FlatRows(
        tokens=tokens,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        action_items=np.repeat(piece_items[owners], span_sizes),
        action_rows=np.repeat(row_of[owners], span_sizes),
        action_offsets=_ranges(spans[kept, 1] + offsets[owners], span_sizes),
        action_lags=lags[np.repeat(is_trained, expected)],
        behavior_logprobs=behavior[np.repeat(is_trained, expected)],
        advantages=np.array([item.advantage for item in items], dtype=np.float64),
        row_lifecycles=_lifecycles(items)[piece_items[np.unique(row_of, return_index=True)[1]]],
    )


def _lifecycles(items: Sequence[TrainItem]) -> IntArray:
    """Return the number of each item's lifecycle, counted in the order of the items."""
    members = [(item.key.group, item.key.member) for item in items]
    is_new = [index > 0 and member != members[index - 1] for index, member in enumerate(members)]
    return np.cumsum(np.array(is_new, dtype=np.int64))


def split_lifecycles(flat: FlatRows, num_parts: int) -> list[tuple[FlatRows, IntArray]]:
    """Cut a step into parts of whole lifecycles with about equal action tokens, in the order they are in.

    Args:
        flat: the step.
        num_parts: at most so many; parts without action tokens are left out.

    Returns:
        (part, which of the step's action tokens are in it) each; items keep their numbers.
    """
    if num_parts == 1:
        return [(flat, np.arange(flat.num_action_tokens))]
    lifecycles = flat.row_lifecycles[flat.action_rows]
    counts = np.bincount(lifecycles, minlength=int(flat.row_lifecycles.max(initial=0)) + 1)
    middles = np.cumsum(counts) - counts / 2
    part_of = np.minimum((middles * num_parts / max(counts.sum(), 1)).astype(np.int64), num_parts - 1)
    result = []
    for part in np.unique(part_of[lifecycles]):
        has_row = part_of[flat.row_lifecycles] == part
        actions = np.flatnonzero(has_row[flat.action_rows])
        result.append(
            (
                FlatRows(
                    tokens=flat.tokens,
                    starts=flat.starts[has_row],
                    lengths=flat.lengths[has_row],
                    action_items=flat.action_items[actions],
                    action_rows=(np.cumsum(has_row) - 1)[flat.action_rows[actions]],
                    action_offsets=flat.action_offsets[actions],
                    action_lags=flat.action_lags[actions],
                    behavior_logprobs=flat.behavior_logprobs[actions],
                    advantages=flat.advantages,
                    row_lifecycles=flat.row_lifecycles[has_row],
                ),
                actions,
            )
        )
    return result


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


def upload(array: npt.NDArray[Any], device: torch.device | str) -> torch.Tensor:
    """Return ``array`` on ``device``, without making the host wait for it."""
    tensor = torch.from_numpy(array)
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def micro_batches(
    flat: FlatRows,
    max_tokens: int,
    device: torch.device | str = "cpu",
    *,
    is_trained: npt.NDArray[np.bool_] | None = None,
) -> Iterator[MicroBatch]:
    """Yield the step's rectangles with their action tokens, in a fixed order.

    Args:
        flat: the step.
        max_tokens: budget of a rectangle.
        device: where the tensors go.
        is_trained: bool [N], items whose tokens get a gradient. Their rows come first, in rectangles of their
            own, and so do their tokens in each rectangle. All do, and nothing is sorted, when None.
    """
    action_counts = np.bincount(flat.action_rows, minlength=flat.lengths.size)
    action_starts = np.cumsum(action_counts) - action_counts
    groups = [np.arange(flat.lengths.size)]
    if is_trained is not None:
        rows_trained = np.unique(flat.action_rows[is_trained[flat.action_items]])
        groups = [rows_trained, np.setdiff1d(groups[0], rows_trained)]
    for rows in (group[part] for group in groups for part in rectangles(flat.lengths[group], max_tokens)):
        lengths = flat.lengths[rows]
        width = int(lengths.max())
        grid = np.zeros((rows.size, width), dtype=np.int64)
        grid[np.arange(width) < lengths[:, None]] = flat.tokens[_ranges(flat.starts[rows], lengths)]
        counts = action_counts[rows]
        actions = _ranges(action_starts[rows], counts)
        local = np.repeat(np.arange(rows.size), counts)
        num_trained = actions.size
        if is_trained is not None:
            comes_last = ~is_trained[flat.action_items[actions]]
            order = np.argsort(comes_last, kind="stable")
            actions, local = actions[order], local[order]
            num_trained -= int(comes_last.sum())
        offsets = flat.action_offsets[actions]
        arrays = (
            grid,
            local * width + offsets - 1,
            grid[local, offsets],
            flat.behavior_logprobs[actions],
            flat.action_items[actions],
            actions,
        )
        ids, predictors, targets, behavior, segments, places = (upload(a, device) for a in arrays)
        yield MicroBatch(
            ids, predictors, targets, behavior, segments, places, int(lengths.sum()), num_trained
        )
