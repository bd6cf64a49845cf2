"""The kernels that compute one block of attention and its log-sum-exp, and back.

A backward call gets the final output and the final log-sum-exp of its queries, not those of its own block:
then ``exp(score - logsumexp)`` is the share that a key has among all keys of all blocks, and
``sum(grad_output * output)`` is the final one, so that gradients of blocks simply add up (FlashAttention,
arXiv 2205.14135, algorithm 4; used across devices by Ring Attention, arXiv 2310.01889).

All tensors here are [tokens, heads, head_dim], log-sum-exps [tokens, heads] in float32 (float64 for float64).
Key and value heads are as many as the query's or a divisor of them.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from cod_async.models.attention.places import Block

_aten = torch.ops.aten
_PLAIN_ROWS = 128
"""Queries that the plain kernel takes at once, so that its scores stay linear in the number of keys."""
_EFFICIENT_ALIGNMENT = 32
"""The memory-efficient kernel wants log-sum-exps padded to a multiple of this (``kAlignLSE`` in torch)."""

Gradients = tuple[Tensor, Tensor, Tensor]


class Kernel(Protocol):
    """One way to compute a block.

    Attributes:
        name: for logs.
        is_ragged: takes blocks with ``query_starts``.
    """

    name: str
    is_ragged: bool

    def forward(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of a block's tokens."""
        ...

    def backward(
        self,
        block: Block,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> Gradients:
        """Return this block's part of the gradients of query, key and value; key's in key's shape."""
        ...


def _split(tensor: Tensor, dim: int, parts: int) -> Tensor:
    """Divide a dimension into ``parts`` and what is left; a view."""
    shape = tensor.shape
    return tensor.view(*shape[:dim], parts, shape[dim] // parts, *shape[dim + 1 :])


def _heads_first(tensor: Tensor, num_segments: int) -> Tensor:
    """Return [num_segments, H, L, ...] of [num_segments * L, H, ...]; a view."""
    return _split(tensor, 0, num_segments).transpose(1, 2)


def _tokens_first(tensor: Tensor) -> Tensor:
    """Return [n * L, H, ...] of [n, H, L, ...]; a view if memory lies so."""
    return tensor.transpose(1, 2).flatten(0, 1)


def _repeated(tensor: Tensor, num_heads: int) -> Tensor:
    """Repeat key or value heads [T, Hkv, D] to the query's."""
    groups = num_heads // tensor.shape[1]
    return tensor if groups == 1 else tensor.repeat_interleave(groups, dim=1)


def _summed(tensor: Tensor, num_kv_heads: int) -> Tensor:
    """Add up gradients of repeated heads [T, H, D] to [T, Hkv, D]."""
    if tensor.shape[1] == num_kv_heads:
        return tensor
    return _split(tensor, 1, num_kv_heads).sum(2)


class CpuFlash:
    """Torch's flash attention for CPUs: rectangles, grouped queries, every float type."""

    name = "cpu-flash"
    is_ragged = False

    def forward(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of a block's tokens."""
        parts = [_heads_first(tensor, block.num_segments) for tensor in (query, key, value)]
        out, lse = _aten._scaled_dot_product_flash_attention_for_cpu(
            *parts, 0.0, block.is_causal, scale=scale
        )
        return _tokens_first(out), _tokens_first(lse)

    def backward(
        self,
        block: Block,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> Gradients:
        """Return this block's part of the gradients."""
        parts = [_heads_first(x, block.num_segments) for x in (grad, query, key, value, out, lse)]
        grads = _aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *parts, 0.0, block.is_causal, scale=scale
        )
        return (_tokens_first(grads[0]), _tokens_first(grads[1]), _tokens_first(grads[2]))


class VarlenFlash:
    """Flash attention on CUDA over ragged segments, grouped queries; what ``varlen_attn`` of torch calls."""

    name = "varlen-flash"
    is_ragged = True

    def forward(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of a block's tokens."""
        out, lse, *_ = _aten._flash_attention_forward(
            query,
            key,
            value,
            block.query_starts,
            block.key_starts,
            block.max_queries,
            block.max_keys,
            0.0,
            block.is_causal,
            False,
            scale=scale,
        )
        return out, lse.t()

    def backward(
        self,
        block: Block,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> Gradients:
        """Return this block's part of the gradients."""
        no_seed = torch.zeros(2, dtype=torch.uint64, device=query.device)  # nothing is dropped out
        grads = _aten._flash_attention_backward(
            grad.contiguous(),
            query,
            key,
            value,
            out,
            lse.t().contiguous(),
            block.query_starts,
            block.key_starts,
            block.max_queries,
            block.max_keys,
            0.0,
            block.is_causal,
            no_seed,
            torch.empty(0, device=query.device),
            scale=scale,
        )
        return grads[0], grads[1], grads[2]


class Efficient:
    """Torch's memory-efficient attention on CUDA: rectangles, float32 as well; heads are repeated for it."""

    name = "efficient"
    is_ragged = False

    def forward(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of a block's tokens."""
        key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
        parts = [_split(tensor, 0, block.num_segments) for tensor in (query, key, value)]
        out, lse, *_ = _aten._efficient_attention_forward(
            *parts, None, None, None, None, None, 0.0, int(block.is_causal), True, scale=scale
        )
        return out.flatten(0, 1), _tokens_first(lse[:, :, : block.max_queries])

    def backward(
        self,
        block: Block,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> Gradients:
        """Return this block's part of the gradients."""
        num_kv_heads, n = key.shape[1], block.num_segments
        key, value = _repeated(key, query.shape[1]), _repeated(value, query.shape[1])
        padded = -(-block.max_queries // _EFFICIENT_ALIGNMENT) * _EFFICIENT_ALIGNMENT
        aligned = lse.new_full((n, query.shape[1], padded), torch.inf)  # exp(score - inf) = 0
        aligned[:, :, : block.max_queries] = _heads_first(lse, n)
        no_seed = torch.zeros((), dtype=torch.int64, device=query.device)  # nothing is dropped out
        grad, query, key, value, out = (_split(x, 0, n) for x in (grad, query, key, value, out))
        grads = _aten._efficient_attention_backward(
            grad,
            query,
            key,
            value,
            None,
            out,
            None,
            None,
            block.max_queries,
            block.max_keys,
            aligned,
            0.0,
            no_seed,
            no_seed,
            int(block.is_causal),
            False,
            scale=scale,
        )
        dq, dk, dv = (grads[index].flatten(0, 1) for index in range(3))
        return dq, _summed(dk, num_kv_heads), _summed(dv, num_kv_heads)


class Plain:
    """Written out in matrix products over a few queries at a time: any device and type; slow."""

    name = "plain"
    is_ragged = False

    def forward(
        self, block: Block, query: Tensor, key: Tensor, value: Tensor, scale: float
    ) -> tuple[Tensor, Tensor]:
        """Return output and log-sum-exp of a block's tokens."""
        wide = _wide(query.dtype)
        q, k, v = self._grouped(block, query, key, value)
        out = torch.empty(q.shape, dtype=wide, device=q.device)
        lse = torch.empty(q.shape[:-1], dtype=wide, device=q.device)
        for start in range(0, block.max_queries, _PLAIN_ROWS):
            rows = slice(start, start + _PLAIN_ROWS)
            scores = self._scores(block, q[:, :, :, rows], k, start, scale)
            lse[:, :, :, rows] = scores.logsumexp(-1)
            out[:, :, :, rows] = (scores - lse[:, :, :, rows, None]).exp() @ v
        return _tokens_first(out.flatten(1, 2).to(query.dtype)), _tokens_first(lse.flatten(1, 2))

    def backward(
        self,
        block: Block,
        grad: Tensor,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        out: Tensor,
        lse: Tensor,
        scale: float,
    ) -> Gradients:
        """Return this block's part of the gradients."""
        q, k, v = self._grouped(block, query, key, value)
        kv_heads = key.shape[1]
        g, o, totals = (
            _split(_heads_first(x, block.num_segments), 1, kv_heads).to(q.dtype) for x in (grad, out, lse)
        )
        dq, dk, dv = torch.zeros_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for start in range(0, block.max_queries, _PLAIN_ROWS):
            rows = slice(start, start + _PLAIN_ROWS)
            scores = self._scores(block, q[:, :, :, rows], k, start, scale)
            shares = (scores - totals[:, :, :, rows, None]).exp()
            part = g[:, :, :, rows]
            dv += (shares.transpose(-1, -2) @ part).sum(2, keepdim=True)
            inner = (part * o[:, :, :, rows]).sum(-1, keepdim=True)
            dscores = shares * (part @ v.transpose(-1, -2) - inner) * scale
            dq[:, :, :, rows] = dscores @ k
            dk += (dscores.transpose(-1, -2) @ q[:, :, :, rows]).sum(2, keepdim=True)
        return (
            _tokens_first(dq.flatten(1, 2).to(query.dtype)),
            _tokens_first(dk.flatten(1, 2).to(key.dtype)),
            _tokens_first(dv.flatten(1, 2).to(value.dtype)),
        )

    def _grouped(self, block: Block, query: Tensor, key: Tensor, value: Tensor) -> Gradients:
        """Return [n, Hkv, group, L, D] of the query, [n, Hkv, 1, L, D] of key and value, in the wide type."""
        wide, n = _wide(query.dtype), block.num_segments
        q = _split(_heads_first(query, n), 1, key.shape[1])
        return (
            q.to(wide),
            _heads_first(key, n)[:, :, None].to(wide),
            _heads_first(value, n)[:, :, None].to(wide),
        )

    def _scores(self, block: Block, query: Tensor, key: Tensor, start: int, scale: float) -> Tensor:
        scores = (query @ key.transpose(-1, -2)) * scale
        if not block.is_causal:
            return scores
        places = torch.arange(start, start + query.shape[-2], device=query.device)
        hidden = torch.arange(key.shape[-2], device=query.device) > places[:, None]
        return scores.masked_fill(hidden, -torch.inf)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


KERNELS: tuple[Kernel, ...] = (CpuFlash(), VarlenFlash(), Efficient(), Plain())
