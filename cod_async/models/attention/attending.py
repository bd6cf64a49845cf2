"""The one entry to attention: what a layout says decides how it is computed."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor
from torch.nn import functional

from cod_async.models.attention import choice
from cod_async.models.attention.blocks import attend_blocks
from cod_async.models.attention.places import Block, make_blocks
from cod_async.models.attention.ring import attend_ring
from cod_async.models.attention.rows import packed_passes, tree_passes
from cod_async.models.attention.ulysses import gather_heads, gather_tokens
from cod_async.models.layout import Layout, LayoutKind

NUM_CACHED_LAYOUTS = 16
"""Layouts whose kernel calls are kept: every layer of a micro-batch asks for the same, forward and backward.
Those of a tree hold about 30 bytes of device memory per token; making them takes 16 ms at 100,000 tokens."""


def attend(query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float) -> Tensor:
    """Return causal grouped-query attention within each row of a micro-batch.

    Args:
        query: [B, Hq, T, D], rotated.
        key: [B, Hkv, T, D], rotated; Hkv divides Hq, and query head h reads head ``h // (Hq / Hkv)``.
        value: [B, Hkv, T, D]; its type is that of the products, to which the others are converted.
        layout: how rows lie; B = 1 unless it is a rectangle, where padding on the right is not seen by what
            comes before it.
        scale: factor of the scores, before softmax.

    Returns:
        [B, T, Hq, D].

    Raises:
        ValueError: shapes and layout do not fit each other, or a layout that cannot be shared by ranks is.
    """
    if query.dtype != value.dtype or key.dtype != value.dtype:  # autocast leaves normalized heads in float32
        query, key = query.to(value.dtype), key.to(value.dtype)
    _check(query, key, value, layout)
    if layout.kind == "rectangle":
        return _rectangle(query, key, value, scale)
    parts = (_tokens_first(query), _tokens_first(key), _tokens_first(value))
    kernel = choice.pick(query.device, query.dtype, query.shape[-1])
    shard = layout.sequence
    if shard is None:
        blocks = _blocks(layout.kind, layout.lengths, layout.parents, kernel.is_ragged, query.device)
        out = attend_blocks(*parts, blocks, kernel, scale)
    elif shard.mode == "ulysses":
        blocks = _blocks("packed", layout.lengths, (), kernel.is_ragged, query.device)
        whole = gather_tokens(*parts, shard)
        out = gather_heads(attend_blocks(*whole, blocks, kernel, scale), shard)
    else:
        out = attend_ring(*parts, layout.lengths, shard, kernel, scale)
    return out[None]


def attention_backend(
    device: torch.device | str, dtype: torch.dtype, kind: LayoutKind, head_dim: int = 128
) -> str:
    """Return the name of what computes a layout's attention here: ``sdpa``, ``cpu-flash``, ``varlen-flash``,
    ``efficient`` or ``plain``.

    Args:
        device: where the tensors are.
        dtype: their type.
        kind: of the layout.
        head_dim: width of a head.
    """
    if kind == "rectangle":
        return "sdpa"
    return choice.pick(torch.device(device), dtype, head_dim).name


def _tokens_first(tensor: Tensor) -> Tensor:
    """Return [T, H, D] of [1, H, T, D]: a view, unless numbers of a head do not lie side by side."""
    tensor = tensor[0].transpose(0, 1)
    return tensor if tensor.stride(-1) == 1 else tensor.contiguous()


def _rectangle(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    is_native = takes_grouped_heads(query.device.type, query.dtype, query.shape[-1])
    if groups > 1 and not is_native:
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    mixed = functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, enable_gqa=is_native and groups > 1
    )
    return mixed.transpose(1, 2)


def takes_grouped_heads(device_type: str, dtype: torch.dtype, head_dim: int) -> bool:
    """Return whether torch's attention over rectangles shall get key heads as they are, not repeated.

    On a CPU grouped keys give the same output, but their gradients add up in another order: what was trained
    with repeated heads shall replay bit for bit. On CUDA only flash attention takes them, which has 16-bit
    types and heads up to 256; for all else torch would fall back to a [T, T] matrix of scores per head.
    """
    return device_type == "cuda" and dtype in (torch.bfloat16, torch.float16) and head_dim <= 256


@lru_cache(maxsize=NUM_CACHED_LAYOUTS)
def _blocks(
    kind: LayoutKind,
    lengths: tuple[int, ...],
    parents: tuple[int, ...],
    is_ragged: bool,
    device: torch.device,
) -> tuple[Block, ...]:
    passes = packed_passes(lengths) if kind == "packed" else tree_passes(lengths, parents)
    return make_blocks(passes, is_ragged=is_ragged, device=device)


def _check(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> None:
    batch, heads, length, width = query.shape
    kv_heads = key.shape[1]
    if key.shape != value.shape or key.shape != (batch, kv_heads, length, width) or heads % kv_heads:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)} and value {tuple(value.shape)} do not fit: "
            "rows, tokens and width must agree, and key heads divide query heads"
        )
    shard = layout.sequence
    if layout.kind == "rectangle":
        if shard is not None:
            raise ValueError("a rectangle cannot be shared by ranks: use the packed layout")
        return
    if batch != 1:
        raise ValueError(f"the {layout.kind} layout has one line of tokens, not {batch}")
    total = sum(layout.lengths)
    if shard is None:
        if total != length:
            raise ValueError(f"the layout has rows of {total} tokens in all, the tensors {length}")
        return
    if layout.kind == "tree":
        raise ValueError("a tree cannot be shared by ranks: use the packed layout")
    if total != shard.num_tokens or length * shard.size != total:
        raise ValueError(
            f"rows of {total} tokens and a rank with {length} do not make {shard.num_tokens} tokens on "
            f"{shard.size} ranks: padding is a row of its own at the end"
        )
