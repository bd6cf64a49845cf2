"""Attention written out with a mask of tokens by tokens in float64: what every layout is compared with."""

from __future__ import annotations

import torch
from torch import Tensor

from cod_async.models.layout import Layout

Tensors = tuple[Tensor, Tensor, Tensor]


def visible(layout: Layout) -> Tensor:
    """Return bool [T, T] of a packed or tree layout: who (rows) sees whom (columns), token by token."""
    lengths, parents = layout.lengths, layout.parents or (-1,) * len(layout.lengths)
    sees = torch.zeros(len(lengths), len(lengths), dtype=torch.bool)  # nodes strictly above a node
    for node, parent in enumerate(parents):
        while parent >= 0:
            sees[node, parent] = True
            parent = parents[parent]
    owner = torch.tensor([node for node, length in enumerate(lengths) for _ in range(length)])
    place = torch.arange(len(owner))
    is_own = (owner[:, None] == owner) & (place[:, None] >= place)
    return is_own | sees[owner][:, owner]


def dense(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return [B, T, Hq, D] in float64, by softmax over masked scores."""
    query, key, value = query.double(), key.double(), value.double()
    groups = query.shape[1] // key.shape[1]
    key = torch.stack([key[:, head // groups] for head in range(query.shape[1])], dim=1)
    value = torch.stack([value[:, head // groups] for head in range(query.shape[1])], dim=1)
    scores = torch.einsum("bhid,bhjd->bhij", query, key) * scale
    shares = scores.masked_fill(~mask, -torch.inf).softmax(-1)
    return torch.einsum("bhij,bhjd->bihd", shares, value)


def inputs(
    num_tokens: int,
    heads: int,
    kv_heads: int,
    width: int,
    seed: int = 0,
    batch: int = 1,
    dtype: torch.dtype = torch.float64,
) -> Tensors:
    """Return query, key and value of [B, heads, T, width] as projections lay them out, drawn from a seed."""
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, num_tokens, count, width) for count in (heads, kv_heads, kv_heads)]
    parts = [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]
    return parts[0].transpose(1, 2), parts[1].transpose(1, 2), parts[2].transpose(1, 2)


def gradients(out: Tensor, parts: Tensors) -> Tensors:
    """Return the gradients of a fixed weighting of ``out``: equal for equal shapes."""
    weights = torch.linspace(-1.0, 1.0, out.numel(), dtype=torch.float64).view(out.shape)
    grads = torch.autograd.grad((out.double() * weights.sin()).sum(), parts)
    return grads[0], grads[1], grads[2]


def worst(found: Tensors | Tensor, expected: Tensors | Tensor) -> float:
    """Return the largest difference, relative to a tensor's largest expected value if above 1."""
    mine, other = (x if isinstance(x, tuple) else (x,) for x in (found, expected))
    differences = []
    for a, b in zip(mine, other, strict=True):
        a, b = a.detach().double(), b.detach().double()
        differences.append(float((a - b).abs().max() / b.abs().max().clamp_min(1.0)))
    return max(differences)
