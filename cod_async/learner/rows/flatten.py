"""From the segments of a step to its rows, checked.

The deltas of a transcript are put together: one row with many segments, each with its own advantage. Rows
that continue each other become one where that is asked for (:mod:`.merging`). Everything is a function of the
sorted items alone, so results do not depend on arrival order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from msgspec import UNSET

from cod_async.errors import NumericsError, WorkError
from cod_async.learner.rows.flat import FlatRows, IntArray, ranges
from cod_async.learner.rows.merging import merge_rows
from cod_async.lifecycle.segment import Row, RowParent, SegmentKey, Version
from cod_async.lifecycle.transcript import mark_after
from cod_async.wire.messages import TrainItem

MAX_LOGPROB = 1e-6
"""An engine's rounding may lift a log-prob this far above 0, in nats; the coordinator lets in no more."""


def _concatenate(parts: Sequence[npt.NDArray[Any]], dtype: Any) -> npt.NDArray[Any]:
    return np.concatenate(parts).astype(dtype, copy=False) if parts else np.empty(0, dtype)


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
    has_prefix_merging: bool = False,
) -> FlatRows:
    """Lay the rows of a step end to end and check them.

    Args:
        items: the whole step, sorted by key.
        vocab_size: token ids must be below this.
        max_row_tokens: longest row the model takes, or None.
        version: of the learner, or None, which takes every lag from the item's.
        has_prefix_merging: whether rows that continue each other become one.

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
    flat = FlatRows(
        tokens=tokens,
        starts=np.cumsum(lengths) - lengths,
        lengths=lengths,
        action_items=np.repeat(piece_items[owners], span_sizes),
        action_rows=np.repeat(row_of[owners], span_sizes),
        action_offsets=ranges(spans[kept, 1] + offsets[owners], span_sizes),
        action_lags=lags[np.repeat(is_trained, expected)],
        behavior_logprobs=behavior[np.repeat(is_trained, expected)],
        advantages=np.array([item.advantage for item in items], dtype=np.float64),
        row_lifecycles=_lifecycles(items)[piece_items[np.unique(row_of, return_index=True)[1]]],
        teacher_logprobs=_teacher_logprobs(pieces, items, is_trained),
    )
    return merge_rows(flat) if has_prefix_merging else flat


def _teacher_logprobs(
    pieces: _Pieces, items: Sequence[TrainItem], is_trained: npt.NDArray[np.bool_]
) -> npt.NDArray[np.float32] | None:
    """Return what the teachers say of the action tokens, [A], or None if nobody asked them.

    Raises:
        WorkError: some rows have a teacher's log-probs and others none, or not one per action token.
    """
    trained = [
        (row, index) for row, index in zip(pieces.rows, pieces.items, strict=True) if is_trained[index]
    ]
    if all(row.teacher_logprobs is UNSET for row, _ in trained):
        return None
    parts: list[npt.NDArray[np.float32]] = []
    for row, index in trained:
        if row.teacher_logprobs is UNSET or row.teacher_logprobs.length != row.num_action_tokens:
            raise WorkError(
                f"segment {items[index].key}: a row misses log-probs of its teacher; it cannot be trained "
                "on, look at it with cod inspect"
            )
        parts.append(row.teacher_logprobs.numpy())
    found = _concatenate(parts, np.float32)
    _check_logprobs(
        found,
        [items[index].key for _, index in trained],
        np.array([part.size for part in parts], dtype=np.int64),
    )
    return found


def _lifecycles(items: Sequence[TrainItem]) -> IntArray:
    """Return the number of each item's lifecycle, counted in the order of the items."""
    members = [(item.key.group, item.key.member) for item in items]
    is_new = [index > 0 and member != members[index - 1] for index, member in enumerate(members)]
    return np.cumsum(np.array(is_new, dtype=np.int64))
