"""Attention put together from blocks, forward and backward, exactly.

Outputs of blocks that share queries are merged by their log-sum-exps: with ``l = log(exp(a) + exp(b))`` the
output is ``exp(a - l) * out_a + exp(b - l) * out_b``. The backward pass calls each block's kernel once more
with the final output and log-sum-exp (:mod:`cod_async.models.attention.kernels` says why that is exact) and
adds up what comes. Sums over blocks are kept in float32 where the tensors are of a shorter type.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from cod_async.models.attention.kernels import Kernel
from cod_async.models.attention.places import Block, Places


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Return the type in which sums over blocks are kept."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def merge(out: Tensor, lse: Tensor, places: Places, more: Tensor, more_lse: Tensor) -> None:
    """Merge a block's output [N, H, D] and log-sum-exp [N, H] of ``places`` into those of all tokens."""
    old_lse = places.take(lse)
    total = torch.logaddexp(old_lse, more_lse)
    old = places.take(out) * (old_lse - total).exp()[..., None]
    places.put(out, old.addcmul_(more.to(out.dtype), (more_lse - total).exp()[..., None]))
    places.put(lse, total)


def forward_blocks(
    kernel: Kernel, blocks: Sequence[Block], query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return output [T, H, D], in the wide type if there are several blocks per query, and log-sum-exp [T,
    H].

    Args:
        kernel: what computes a block.
        blocks: causal ones first; they cover every query once.
        query: [T, H, D].
        key: [T, Hkv, D].
        value: [T, Hkv, D].
        scale: factor of the scores.
    """
    has_merges = any(not block.is_causal for block in blocks)
    out_type = wide_type(query.dtype) if has_merges else query.dtype
    out = torch.empty_like(query, dtype=out_type, memory_format=torch.contiguous_format)
    lse = torch.empty(query.shape[:2], dtype=wide_type(query.dtype), device=query.device)
    for block in blocks:
        more, more_lse = forward_block(kernel, block, query, key, value, scale)
        if block.is_causal:
            block.queries.put(out, more)
            block.queries.put(lse, more_lse)
        else:
            merge(out, lse, block.queries, more, more_lse)
    return out, lse


def forward_block(
    kernel: Kernel, block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float
) -> tuple[Tensor, Tensor]:
    """Return a block's output and log-sum-exp, of its queries only."""
    return kernel.forward(
        block, block.queries.take(query), block.keys.take(key), block.keys.take(value), scale
    )


def backward_block(
    kernel: Kernel,
    block: Block,
    grad: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    lse: Tensor,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return a block's part of the gradients, of its tokens only; of padding they are zero."""
    return kernel.backward(
        block,
        block.queries.take_padded_with_zeros(grad),
        block.queries.take(query),
        block.keys.take(key),
        block.keys.take(value),
        block.queries.take(out),
        block.queries.take(lse),
        scale,
    )


class BlockAttention(torch.autograd.Function):
    """Attention of [T, H, D] tensors of one rank, by blocks."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        blocks: tuple[Block, ...],
        kernel: Kernel,
        scale: float,
    ) -> Tensor:
        """Return the output [T, H, D]."""
        out, lse = forward_blocks(kernel, blocks, query, key, value, scale)
        out = out.to(query.dtype)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.blocks, ctx.kernel, ctx.scale = blocks, kernel, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of query, key and value."""
        query, key, value, out, lse = ctx.saved_tensors
        grad = grad.contiguous()  # of a sum it is one number in every place, which kernels cannot read
        has_sums = any(not block.is_causal for block in ctx.blocks)
        sums = [
            torch.empty(
                tensor.shape,
                dtype=wide_type(tensor.dtype) if has_sums else tensor.dtype,
                device=tensor.device,
            )
            for tensor in (query, key, value)
        ]
        for block in ctx.blocks:
            parts = backward_block(ctx.kernel, block, grad, query, key, value, out, lse, ctx.scale)
            for total, part, places in zip(sums, parts, (block.queries, block.keys, block.keys), strict=True):
                if block.is_causal:  # each token is once in a causal block, and that comes first
                    places.put(total, part)
                else:
                    places.add(total, part)
        dq, dk, dv = (total.to(query.dtype) for total in sums)
        return dq, dk, dv, None, None, None


def attend_blocks(
    query: Tensor, key: Tensor, value: Tensor, blocks: tuple[Block, ...], kernel: Kernel, scale: float
) -> Tensor:
    """Return the output [T, H, D] of :class:`BlockAttention`."""
    out: Tensor = BlockAttention.apply(query, key, value, blocks, kernel, scale)  # type: ignore[no-untyped-call]
    return out
