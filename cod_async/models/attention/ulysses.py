"""Ulysses: ranks exchange heads for tokens before attention, and back after it (arXiv 2309.14509).

Before: a rank has T/n tokens with all heads. After one all-to-all of queries, keys and values it has all T
tokens with Hq/n heads, and attention is that of one rank. Where there are fewer key heads than ranks they are
repeated just often enough that each rank gets those that its query heads read; autograd adds up their
gradients.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, distributed

from cod_async.models.layout import SequenceShard


def kv_repeats(num_kv_heads: int, size: int) -> int:
    """Return how often each key head is repeated so that the heads divide among ``size`` ranks."""
    return size // math.gcd(num_kv_heads, size)


def gather_tokens(
    query: Tensor, key: Tensor, value: Tensor, shard: SequenceShard
) -> tuple[Tensor, Tensor, Tensor]:
    """Return [T, Hq/n, D] and twice [T, Hkv'/n, D] of all tokens from [T/n, H, D] of this rank's.

    Raises:
        ValueError: the query heads do not divide among the ranks.
    """
    num_heads, size = query.shape[1], shard.size
    if num_heads % size:
        raise ValueError(
            f"{num_heads} query heads do not divide among {size} ranks: use sequence_mode = 'ring'"
        )
    repeats = kv_repeats(key.shape[1], size)
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    heads, kv_heads = num_heads // size, key.shape[1] // size
    # [n, T/n, heads of the receiving rank, D], one message for all three.
    sent = torch.cat(
        [x.reshape(len(x), size, -1, x.shape[2]).transpose(0, 1) for x in (query, key, value)], dim=2
    )
    received = _exchange(sent.contiguous(), shard.group).flatten(0, 1)
    return (
        received[:, :heads],
        received[:, heads : heads + kv_heads],
        received[:, heads + kv_heads :],
    )


def gather_heads(out: Tensor, shard: SequenceShard) -> Tensor:
    """Return [T/n, Hq, D] of this rank's tokens from [T, Hq/n, D] of this rank's heads."""
    sent = out.reshape(shard.size, -1, *out.shape[1:])
    received = _exchange(sent, shard.group)  # [n, T/n, Hq/n, D], by the rank of the heads
    return received.transpose(0, 1).flatten(1, 2)


class _Exchange(torch.autograd.Function):
    """All-to-all of [n, ...]: what stands at r goes to rank r; its gradients go the same way back."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: Any) -> Tensor:
        ctx.group = group
        return _all_to_all(tensor, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return _all_to_all(grad.contiguous(), ctx.group), None


def _exchange(tensor: Tensor, group: Any) -> Tensor:
    received: Tensor = _Exchange.apply(tensor, group)  # type: ignore[no-untyped-call]
    return received


def _all_to_all(tensor: Tensor, group: Any) -> Tensor:
    received = torch.empty_like(tensor)
    distributed.all_to_all_single(received, tensor, group=group)
    return received
