"""The rows of a step, end to end in one array: what everything behind the batch reads.

Which rows a rank computes, how they lie in a micro-batch and what the loss needs all come from here. A row
is a place in ``tokens``, so leaving rows out, merging them or cutting a step into parts copies no token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class FlatRows:
    """The rows of a step.

    Action tokens are in the order in which they were recorded: by item, row, position. Their items never
    fall, and merging rows leaves every [A] as it is; only ``action_rows`` need not be sorted.

    Attributes:
        tokens: int64, the rows' tokens, and perhaps some that no row uses any more.
        starts: int64 [R], where each row begins in ``tokens``.
        lengths: int64 [R].
        action_items: int64 [A], index of the item of each action token.
        action_rows: int64 [A], its row.
        action_offsets: int64 [A], its position in the row (>= 1).
        action_lags: int64 [A], steps between the learner's version and the one that generated the token.
        behavior_logprobs: float32 [A].
        advantages: float64 [N], one per item.
        row_lifecycles: int64 [R], ascending; rows of one lifecycle share a number.
        teacher_logprobs: float32 [A], or None if the items hold none.
        num_recorded_rows, num_recorded_tokens: of the step as it was recorded, before rows were merged; None
            of a step that never was merged, and of a part of one.
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
    teacher_logprobs: npt.NDArray[np.float32] | None = None
    num_recorded_rows: int | None = None
    num_recorded_tokens: int | None = None

    @property
    def num_rows(self) -> int:
        """Rows of the step, R."""
        return int(self.lengths.size)

    @property
    def num_tokens(self) -> int:
        """Tokens of all rows, context included."""
        return int(self.lengths.sum())

    @property
    def num_action_tokens(self) -> int:
        """Tokens that carry loss: the denominator of the token mean."""
        return int(self.action_rows.size)


def ranges(starts: IntArray, sizes: IntArray) -> IntArray:
    """Return starts[0], starts[0]+1, … (sizes[0] of them), starts[1], … end to end."""
    ends = np.cumsum(sizes)
    offsets = np.arange(int(ends[-1]) if ends.size else 0) - np.repeat(ends - sizes, sizes)
    return np.repeat(starts, sizes) + offsets


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
                replace(
                    flat,
                    starts=flat.starts[has_row],
                    lengths=flat.lengths[has_row],
                    action_items=flat.action_items[actions],
                    action_rows=(np.cumsum(has_row) - 1)[flat.action_rows[actions]],
                    action_offsets=flat.action_offsets[actions],
                    action_lags=flat.action_lags[actions],
                    behavior_logprobs=flat.behavior_logprobs[actions],
                    row_lifecycles=flat.row_lifecycles[has_row],
                    teacher_logprobs=None
                    if flat.teacher_logprobs is None
                    else flat.teacher_logprobs[actions],
                    num_recorded_rows=None,
                    num_recorded_tokens=None,
                ),
                actions,
            )
        )
    return result


def row_bytes(flat: FlatRows, rows: IntArray) -> dict[int, bytes]:
    """Return rows' token ids as bytes that compare as the ids do, at the speed of memcmp (big-endian)."""
    starts, stops = flat.starts[rows].tolist(), (flat.starts + flat.lengths)[rows].tolist()
    places = zip(rows.tolist(), starts, stops, strict=True)
    ids = flat.tokens.astype(">u4")
    return {row: ids[start:stop].tobytes() for row, start, stop in places}


class RowOrder:
    """Rows in lexicographic order of their token ids, and how much neighbors share.

    Rows that begin with the same ids stand together, and what any two rows share is the least that neighbors
    between them share.

    Attributes:
        rows: int64 [n], the rows in order; equal ones by index.
        shared: int64 [n], how many leading tokens each has in common with the one before it; 0 for the first.
    """

    def __init__(self, flat: FlatRows, rows: IntArray) -> None:
        """Sort ``rows`` (indices)."""
        keys = row_bytes(flat, rows)
        order = sorted(keys, key=lambda row: (keys[row], row))
        self.rows: IntArray = np.array(order, dtype=np.int64)
        self.shared: IntArray = np.zeros(len(order), dtype=np.int64)
        for index in range(1, len(order)):
            before, row = order[index - 1], order[index]
            size = int(min(flat.lengths[before], flat.lengths[row]))
            one = flat.tokens[flat.starts[before] : flat.starts[before] + size]
            differs = one != flat.tokens[flat.starts[row] : flat.starts[row] + size]
            first = int(differs.argmax())
            self.shared[index] = first if differs[first] else size
