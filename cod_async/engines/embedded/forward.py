"""The model's arithmetic for generation: fused weights, one decode step, one prefill.

Query, key and value projections are one matrix, gate and up projections another; the attention scale is
folded into the query norm. Grouped-query attention reshapes the queries to ``[slots * kv_heads, group,
head_dim]`` instead of repeating keys and values. Prefill fills the cache and returns nothing: the last token
of a prompt goes through the decode step like every other token, so there is one place that makes logits, and
the last layer of a prefill ends at its keys and values. Equal to :class:`cod_async.models.qwen3.Qwen3` up to
rounding.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from cod_async.engines.embedded.cache import KVCache
from cod_async.models.qwen3 import Qwen3Config, rotary_table


@dataclass(frozen=True)
class LayerWeights:
    """One block.

    Attributes:
        attention_norm, mlp_norm: [hidden].
        qkv: [(H + 2 KV) D, hidden], query, key and value projections.
        qk_norm: [H + KV, D], norms of query and key heads, the attention scale in the query part.
        out: [H D, hidden], output projection, transposed.
        gate_up: [2 intermediate, hidden].
        down: [intermediate, hidden], transposed.
    """

    attention_norm: Tensor
    qkv: Tensor
    qk_norm: Tensor
    out: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor


@dataclass(frozen=True)
class FusedWeights:
    """A model's weights in the form the engine computes with: copies, independent of its parameters."""

    config: Qwen3Config
    embedding: Tensor
    layers: tuple[LayerWeights, ...]
    norm: Tensor
    head: Tensor

    @classmethod
    def of(cls, config: Qwen3Config, tensors: Mapping[str, Tensor]) -> FusedWeights:
        """Build from tensors by Hugging Face name, already checked by ``models.directory.check_weights``."""
        get = {name: tensor.detach() for name, tensor in tensors.items()}
        embedding = get["model.embed_tokens.weight"].clone()
        head = embedding if config.tie_word_embeddings else get["lm_head.weight"].clone()
        layers = tuple(
            _fuse_layer(config, get, f"model.layers.{i}.") for i in range(config.num_hidden_layers)
        )
        return cls(config, embedding, layers, get["model.norm.weight"].clone(), head)


def _fuse_layer(config: Qwen3Config, get: Mapping[str, Tensor], prefix: str) -> LayerWeights:
    attention, mlp = prefix + "self_attn.", prefix + "mlp."
    q_norm = get[attention + "q_norm.weight"] * config.head_dim**-0.5
    k_norm = get[attention + "k_norm.weight"]
    return LayerWeights(
        attention_norm=get[prefix + "input_layernorm.weight"].clone(),
        qkv=torch.cat([get[f"{attention}{part}_proj.weight"] for part in "qkv"]),
        qk_norm=torch.cat(
            (
                q_norm.expand(config.num_attention_heads, -1),
                k_norm.expand(config.num_key_value_heads, -1),
            )
        ),
        out=get[attention + "o_proj.weight"].t().contiguous(),
        mlp_norm=get[prefix + "post_attention_layernorm.weight"].clone(),
        gate_up=torch.cat((get[mlp + "gate_proj.weight"], get[mlp + "up_proj.weight"])),
        down=get[mlp + "down_proj.weight"].t().contiguous(),
    )


class Rotary:
    """Rotary tables [positions, head_dim], laid out so that a rotation is ``x * cos + swap(x) * sin``."""

    def __init__(self, config: Qwen3Config, num_positions: int, dtype: torch.dtype) -> None:
        cos, sin = rotary_table(config.head_dim, config.rope_theta, num_positions)
        self.cos = torch.cat((cos, cos), dim=-1).to(dtype)
        self.sin = torch.cat((-sin, sin), dim=-1).to(dtype)

    def at(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cos and sin [N, 1, head_dim] of positions [N]."""
        return self.cos[positions][:, None], self.sin[positions][:, None]


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos).addcmul_(torch.cat((second, first), dim=-1), sin)


def _norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight, eps)


def _project(
    config: Qwen3Config, layer: LayerWeights, x: Tensor, cos: Tensor, sin: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return queries [N, H, D], keys and values [N, KV, D] of the residual stream ``x`` [N, hidden]."""
    num_qk = config.num_attention_heads + config.num_key_value_heads
    qkv = functional.linear(_norm(x, layer.attention_norm, config.rms_norm_eps), layer.qkv)
    qkv = qkv.view(x.shape[0], -1, config.head_dim)
    qk = _norm(qkv[:, :num_qk], None, config.rms_norm_eps).mul_(layer.qk_norm)
    qk = _rotate(qk, cos, sin)
    heads = config.num_attention_heads
    return qk[:, :heads], qk[:, heads:], qkv[:, num_qk:]


def _finish_layer(config: Qwen3Config, layer: LayerWeights, x: Tensor, attended: Tensor) -> Tensor:
    """Add the attention output [N, H * D] and the feed-forward block to the residual stream."""
    x = torch.addmm(x, attended, layer.out)
    gate, up = functional.linear(_norm(x, layer.mlp_norm, config.rms_norm_eps), layer.gate_up).chunk(
        2, dim=-1
    )
    return torch.addmm(x, functional.silu(gate).mul_(up), layer.down)


def decode(
    weights: FusedWeights,
    rotary: Rotary,
    cache: KVCache,
    token_ids: Tensor,
    positions: Tensor,
    slots: Tensor | int,
    length: int,
) -> Tensor:
    """Compute one token per row: write its keys and values, attend to everything up to it, return its logits.

    Args:
        weights: the model.
        rotary: its rotary tables.
        cache: keys and values; written to.
        token_ids: int64 [N], one token per row.
        positions: int64 [N], where each token stands in its row; positions before it are in the cache.
        slots: int64 [N], distinct slots of the rows, or N itself when they are slots 0 .. N-1.
        length: attended positions, > every position.

    Returns:
        Logits [N, vocab_size].
    """
    config, count = weights.config, token_ids.shape[0]
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    index = cache.write_index(torch.arange(count) if isinstance(slots, int) else slots, positions)
    cos, sin = rotary.at(positions)
    visible = torch.arange(length) <= positions[:, None]
    bias = torch.zeros(visible.shape, dtype=weights.norm.dtype).masked_fill_(~visible, -torch.inf)[:, None]
    x = weights.embedding.index_select(0, token_ids)
    for number, layer in enumerate(weights.layers):
        query, key, value = _project(config, layer, x, cos, sin)
        cache.write(number, index, key, value)
        keys, values = cache.read(number, slots, length)
        query = query.reshape(count * kv_heads, heads // kv_heads, config.head_dim)
        scores = torch.bmm(query, keys.transpose(1, 2)).view(count, heads, length).add_(bias)
        shares = scores.softmax(-1).view(count * kv_heads, heads // kv_heads, length)
        x = _finish_layer(config, layer, x, torch.bmm(shares, values).view(count, -1))
    return functional.linear(_norm(x, weights.norm, config.rms_norm_eps), weights.head)


def prefill(
    weights: FusedWeights,
    rotary: Rotary,
    cache: KVCache,
    token_ids: Tensor,
    starts: Tensor,
    num_new: Tensor,
    slots: Tensor,
) -> None:
    """Fill the cache with the keys and values of several new tokens per row.

    Args:
        weights: the model.
        rotary: its rotary tables.
        cache: keys and values; written to.
        token_ids: int64 [n, T], new tokens, padded on the right with any valid id.
        starts: int64 [n], positions already in the cache, per row.
        num_new: int64 [n], valid tokens per row, 1 .. T.
        slots: int64 [n], distinct.
    """
    config = weights.config
    count, width = token_ids.shape
    heads, kv_heads, head_dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    offsets = torch.arange(width)
    valid = (offsets < num_new[:, None]).view(-1).nonzero()[:, 0]
    positions = (starts[:, None] + offsets).clamp_(max=cache.max_positions - 1)
    flat_slots = slots[:, None].expand(-1, width).reshape(-1)
    index = cache.write_index(flat_slots[valid], positions.view(-1)[valid])
    cos, sin = rotary.at(positions.view(-1))
    is_fresh = not bool(starts.any())
    length = width if is_fresh else int((starts + num_new).max())
    bias = None if is_fresh else _prefix_bias(positions, length, heads // kv_heads, weights.norm.dtype)
    x = weights.embedding.index_select(0, token_ids.view(-1))
    for number, layer in enumerate(weights.layers):
        query, key, value = _project(config, layer, x, cos, sin)
        cache.write(number, index, key[valid], value[valid])
        if number == len(weights.layers) - 1:
            return  # nobody reads the last layer's output of these tokens
        query = query.view(count, width, heads, head_dim).transpose(1, 2)
        if bias is None:
            key, value = (
                part.view(count, width, kv_heads, head_dim)
                .transpose(1, 2)
                .repeat_interleave(heads // kv_heads, dim=1)
                for part in (key, value)
            )
            mixed = functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=1.0)
        else:
            keys, values = (
                part.view(count, kv_heads, length, head_dim) for part in cache.read(number, slots, length)
            )
            query = query.reshape(count, kv_heads, -1, head_dim)
            mixed = functional.scaled_dot_product_attention(query, keys, values, attn_mask=bias, scale=1.0)
        mixed = mixed.reshape(count, heads, width, head_dim).transpose(1, 2)
        x = _finish_layer(config, layer, x, mixed.reshape(count * width, -1))


def _prefix_bias(positions: Tensor, length: int, group: int, dtype: torch.dtype) -> Tensor:
    """Return [n, 1, group * T, length]: 0 where a grouped query may look, -inf elsewhere."""
    visible = torch.arange(length) <= positions[:, :, None]
    bias = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)
    return bias.repeat(1, group, 1)[:, None]
