"""Which tokens look at which: segments, passes of segments, and their form for a kernel.

A *segment* lets some query tokens look at some key tokens. A *pass* is a list of segments that are all causal
or all full, with every query in at most one of them. For kernels that take ragged input a pass becomes one
block; for kernels that take rectangles it becomes several: each full segment by itself, and causal ones
gathered into rectangles wherever padding is cheaper than another call.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cod_async.models.transfer import upload

Indices = npt.NDArray[np.int64]

CALL_COST = 1024
"""What one more kernel call costs on a CPU, in squared tokens of a causal rectangle: measured forward and
backward on one core, 65 us against 0.07 us per squared token with 4 heads of 32, and 130 us against 0.16 us
with 8 of 64."""


@dataclass(frozen=True)
class Segment:
    """Query tokens and the key tokens they see, as places in the tensors; causal ones have equal places."""

    queries: Indices
    keys: Indices


@dataclass(frozen=True)
class Pass:
    """Segments of one kind; no query and no key is in two of them."""

    segments: tuple[Segment, ...]
    is_causal: bool


@dataclass(frozen=True, eq=False)
class Places:
    """Tokens of a [T, ...] tensor, in the order in which a kernel takes them.

    Attributes:
        index: a slice where they lie end to end, else int64 [N]; padding repeats a valid token.
        valid: int64 [M], which of the N are no padding; None if all.
        targets: int64 [M], ``index[valid]``; None if all are valid.
    """

    index: slice | Tensor
    valid: Tensor | None = None
    targets: Tensor | None = None

    @classmethod
    def of(cls, indices: Indices, device: torch.device, valid: npt.NDArray[np.bool_] | None = None) -> Places:
        """Build from token places and, with padding among them, which are real."""
        if valid is None or valid.all():
            first = int(indices[0])
            if np.array_equal(indices, np.arange(first, first + len(indices))):
                return cls(slice(first, first + len(indices)))
            return cls(upload(indices, device))
        real = np.flatnonzero(valid)
        index, kept, targets = (upload(x, device) for x in (indices, real, indices[real]))
        return cls(index, kept, targets)

    def take(self, tensor: Tensor) -> Tensor:
        """Return these tokens, [N, ...]: a view where they lie end to end."""
        if isinstance(self.index, slice):
            return tensor[self.index]
        return tensor.index_select(0, self.index)

    def take_padded_with_zeros(self, tensor: Tensor) -> Tensor:
        """Return these tokens with zeros where padding is."""
        if self.valid is None or self.targets is None or isinstance(self.index, slice):
            return self.take(tensor)
        out = tensor.new_zeros((self.index.shape[0], *tensor.shape[1:]))
        return out.index_copy_(0, self.valid, tensor.index_select(0, self.targets))

    def put(self, target: Tensor, values: Tensor) -> None:
        """Write the values [N, ...] of these tokens into ``target``."""
        if isinstance(self.index, slice):
            target[self.index] = values
        else:
            index, real = self._real(self.index, values)
            target.index_copy_(0, index, real.to(target.dtype))

    def add(self, target: Tensor, values: Tensor) -> None:
        """Add the values [N, ...] of these tokens to ``target``."""
        if isinstance(self.index, slice):
            target[self.index] += values
        else:
            index, real = self._real(self.index, values)
            target.index_add_(0, index, real.to(target.dtype))

    def _real(self, index: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        if self.valid is None or self.targets is None:
            return index, values
        return self.targets, values.index_select(0, self.valid)


@dataclass(frozen=True, eq=False)
class Block:
    """One kernel call: the tokens and their division into segments.

    Attributes:
        queries, keys: the tokens.
        is_causal: every query sees the keys up to its own place in its segment; otherwise all of the segment.
        num_segments: segments side by side.
        max_queries, max_keys: tokens of the longest; without ``query_starts`` all are so long.
        query_starts, key_starts: int32 [num_segments + 1] on the device, of ragged blocks.
    """

    queries: Places
    keys: Places
    is_causal: bool
    num_segments: int
    max_queries: int
    max_keys: int
    query_starts: Tensor | None = None
    key_starts: Tensor | None = None


def make_blocks(passes: Sequence[Pass], *, is_ragged: bool, device: torch.device) -> tuple[Block, ...]:
    """Turn passes into kernel calls; causal passes have to come first and cover every query."""
    blocks: list[Block] = []
    for part in passes:
        if is_ragged:
            blocks.append(_ragged(part, device))
        elif part.is_causal:
            blocks += _causal_rectangles(part, device)
        else:
            blocks += [_full_rectangle(segment, device) for segment in part.segments]
    return tuple(blocks)


def _ragged(part: Pass, device: torch.device) -> Block:
    num_queries = [len(segment.queries) for segment in part.segments]
    num_keys = [len(segment.keys) for segment in part.segments]
    starts = [upload(np.cumsum([0, *counts], dtype=np.int32), device) for counts in (num_queries, num_keys)]
    return Block(
        queries=Places.of(np.concatenate([segment.queries for segment in part.segments]), device),
        keys=Places.of(np.concatenate([segment.keys for segment in part.segments]), device),
        is_causal=part.is_causal,
        num_segments=len(part.segments),
        max_queries=max(num_queries),
        max_keys=max(num_keys),
        query_starts=starts[0],
        key_starts=starts[1],
    )


def _full_rectangle(segment: Segment, device: torch.device) -> Block:
    queries, keys = Places.of(segment.queries, device), Places.of(segment.keys, device)
    return Block(queries, keys, False, 1, len(segment.queries), len(segment.keys))


def buckets(lengths: Sequence[int]) -> list[list[int]]:
    """Group rows of similar length: a row joins a longer one where padding it costs less than its own call.

    Args:
        lengths: tokens per row, each at least 1.

    Returns:
        Row indices per bucket, each in rising order, longest bucket first.
    """
    order = sorted(range(len(lengths)), key=lambda row: (-lengths[row], row))
    groups: list[list[int]] = []
    width = 0
    for row in order:
        if not groups or width**2 - lengths[row] ** 2 > CALL_COST:
            groups.append([])
            width = lengths[row]
        groups[-1].append(row)
    return [sorted(group) for group in groups]


def _causal_rectangles(part: Pass, device: torch.device) -> list[Block]:
    rows = [segment.queries for segment in part.segments]
    blocks = []
    for group in buckets([len(row) for row in rows]):
        width = max(len(rows[row]) for row in group)
        offsets = np.arange(width)
        indices = np.concatenate([rows[row][np.minimum(offsets, len(rows[row]) - 1)] for row in group])
        valid = np.concatenate([offsets < len(rows[row]) for row in group])
        places = Places.of(indices, device, valid)
        blocks.append(Block(places, places, True, len(group), width, width))
    return blocks
