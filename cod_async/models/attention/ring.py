"""Ring attention over packed rows: queries stay, keys and values go around (arXiv 2310.01889).

Rank r of n has the r-th and the (2n-1-r)-th of 2n parts of the micro-batch. In step i it computes the blocks
between its queries and the keys of rank r - i, while those are already on their way to rank r + 1. What a
part sees of an earlier part is at most one row, the one that crosses from it, so each step has at most two
full blocks and rows stay apart. Backward goes around once more, and the gradients of keys and values travel
with them: after n steps they are home with everybody's share.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from torch import Tensor, distributed
from torch.autograd.function import once_differentiable

from cod_async.models.attention.blocks import backward_block, forward_block, forward_blocks, merge, wide_type
from cod_async.models.attention.kernels import Kernel
from cod_async.models.attention.places import Block, Pass, Segment, make_blocks
from cod_async.models.attention.sequence import parts_of
from cod_async.models.layout import SequenceShard

Range = tuple[int, int]


class RingAttention(torch.autograd.Function):
    """Attention of this rank's queries to all ranks' keys, [T/n, H, D] tensors."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        lengths: tuple[int, ...],
        shard: SequenceShard,
        kernel: Kernel,
        scale: float,
    ) -> Tensor:
        """Return the output [T/n, H, D]."""
        pairs = torch.stack((key, value))
        moving = _Transfer(pairs, shard)
        blocks = _step_blocks(lengths, shard.rank, shard.size, 0, kernel.is_ragged, query.device)
        out, lse = forward_blocks(kernel, blocks, query, key, value, scale)
        out = out.to(wide_type(query.dtype))
        for step in range(1, shard.size):
            pairs = moving.wait()
            if step < shard.size - 1:
                moving = _Transfer(pairs, shard)
            blocks = _step_blocks(lengths, shard.rank, shard.size, step, kernel.is_ragged, query.device)
            for block in blocks:
                more, more_lse = forward_block(kernel, block, query, pairs[0], pairs[1], scale)
                merge(out, lse, block.queries, more, more_lse)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.lengths, ctx.shard, ctx.kernel, ctx.scale = lengths, shard, kernel, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of this rank's query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        shard: SequenceShard = ctx.shard
        grad = grad.contiguous()
        wide = wide_type(query.dtype)
        dquery = torch.zeros(query.shape, dtype=wide, device=query.device)

        def dpairs_of(step: int, pairs: Tensor) -> Tensor:
            """Return this rank's part of the gradients of keys and values, and add to those of queries."""
            dpairs = torch.zeros(pairs.shape, dtype=wide, device=pairs.device)
            is_ragged = ctx.kernel.is_ragged
            for block in _step_blocks(ctx.lengths, shard.rank, shard.size, step, is_ragged, pairs.device):
                parts = (grad, query, pairs[0], pairs[1], out, lse)
                dq, dk, dv = backward_block(ctx.kernel, block, *parts, ctx.scale)
                block.queries.add(dquery, dq)
                block.keys.add(dpairs[0], dk)
                block.keys.add(dpairs[1], dv)
            return dpairs

        pairs = torch.stack((key, value))
        moving = _Transfer(pairs, shard)
        coming = _Transfer(dpairs_of(0, pairs), shard)
        for step in range(1, shard.size):
            pairs = moving.wait()
            if step < shard.size - 1:
                moving = _Transfer(pairs, shard)
            dpairs = dpairs_of(step, pairs)
            coming = _Transfer(dpairs.add_(coming.wait()), shard)
        dkey, dvalue = coming.wait().to(key.dtype).unbind(0)
        return dquery.to(query.dtype), dkey, dvalue, None, None, None, None


def attend_ring(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    shard: SequenceShard,
    kernel: Kernel,
    scale: float,
) -> Tensor:
    """Return the output [T/n, H, D] of :class:`RingAttention`.

    Args:
        query: [T/n, H, D], this rank's tokens.
        key: [T/n, Hkv, D].
        value: [T/n, Hkv, D].
        lengths: tokens per row of the whole micro-batch.
        shard: this rank's part.
        kernel: what computes a block.
        scale: factor of the scores.
    """
    out: Tensor = RingAttention.apply(  # type: ignore[no-untyped-call]
        query, key, value, lengths, shard, kernel, scale
    )
    return out


class _Transfer:
    """A tensor on its way to the next rank, while the previous rank's one comes in."""

    def __init__(self, tensor: Tensor, shard: SequenceShard) -> None:
        self.sent = tensor  # kept until it has left
        self.received = tensor
        self.requests: list[Any] = []
        if shard.size == 1:
            return
        self.received = torch.empty_like(tensor)
        following, preceding = (
            _global_rank(shard.group, (shard.rank + offset) % shard.size) for offset in (1, -1)
        )
        self.requests = distributed.batch_isend_irecv(
            [
                distributed.P2POp(distributed.isend, tensor, following, shard.group),
                distributed.P2POp(distributed.irecv, self.received, preceding, shard.group),
            ]
        )

    def wait(self) -> Tensor:
        """Return the previous rank's tensor."""
        for request in self.requests:
            request.wait()
        return self.received


def _global_rank(group: Any, rank: int) -> int:
    return rank if group is None else distributed.get_global_rank(group, rank)


def step_passes(lengths: tuple[int, ...], rank: int, size: int, step: int) -> tuple[Pass, ...]:
    """Return what a rank's queries see of the keys that are with it in a step of the ring.

    Places are those in the local tensors: of the queries in this rank's, of the keys in those of rank
    ``(rank - step) % size``.
    """
    num_tokens = sum(lengths)
    source = (rank - step) % size
    own, others = (parts_of(num_tokens, each, size, "ring") for each in (rank, source))
    length = num_tokens // (2 * size)
    starts = np.cumsum([0, *lengths])
    passes = []
    if step == 0:
        rows = [(low + shift, high + shift) for low, high, shift in _clipped(starts, own, length)]
        passes.append(Pass(tuple(Segment(np.arange(*row), np.arange(*row)) for row in rows), True))
    seen: list[tuple[Range, Range]] = []
    for number, queries in enumerate(own):
        for other, keys in enumerate(others):
            if keys[0] >= queries[0]:
                continue
            row = int(np.searchsorted(starts, queries[0], side="right")) - 1
            first, last = int(starts[row]), int(starts[row + 1])
            if first >= keys[1]:
                continue  # the row that enters this part begins after that one
            shift_q, shift_k = number * length - queries[0], other * length - keys[0]
            seen.append(
                (
                    (queries[0] + shift_q, min(last, queries[1]) + shift_q),
                    (max(first, keys[0]) + shift_k, keys[1] + shift_k),
                )
            )
    passes += [
        Pass((Segment(np.arange(*queries), np.arange(*keys)),), False) for queries, keys in _joined(seen)
    ]
    return tuple(passes)


def _clipped(starts: np.ndarray, parts: list[Range], length: int) -> list[tuple[int, int, int]]:
    """Return the pieces of rows inside a rank's parts: begin, end and what leads to local places."""
    pieces = []
    for number, (begin, end) in enumerate(parts):
        cuts = sorted({begin, end, *(int(s) for s in starts if begin < s < end)})
        pieces += [(low, high, number * length - begin) for low, high in pairwise(cuts)]
    return pieces


def _joined(seen: list[tuple[Range, Range]]) -> list[tuple[Range, Range]]:
    """Make one block of two that have the same keys and adjoining queries, or the other way round."""
    if len(seen) != 2:
        return seen
    (queries, keys), (more_queries, more_keys) = seen
    if keys == more_keys and queries[1] == more_queries[0]:
        return [((queries[0], more_queries[1]), keys)]
    if queries == more_queries and keys[1] == more_keys[0]:
        return [(queries, (keys[0], more_keys[1]))]
    return seen


@lru_cache(maxsize=256)
def _step_blocks(
    lengths: tuple[int, ...], rank: int, size: int, step: int, is_ragged: bool, device: torch.device
) -> tuple[Block, ...]:
    return make_blocks(step_passes(lengths, rank, size, step), is_ragged=is_ragged, device=device)
