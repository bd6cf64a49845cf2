"""The Qwen3 architecture in plain torch, with Hugging Face parameter names.

One model class serves the learner, the embedded engine and the bootstrap: grouped-query attention with an
RMSNorm on every query and key head, rotary positions, SwiGLU and pre-norm residual blocks (Qwen3 technical
report, arXiv 2505.09388). Parameter names and shapes are those of ``Qwen3ForCausalLM`` in transformers, so a
directory written by :mod:`cod_async.models.directory` is an ordinary Hugging Face model. How rows lie in a
micro-batch is told by a :class:`~cod_async.models.layout.Layout`, which only attention reads.
:meth:`Qwen3.forward` stops at the last hidden states; logits or log-probs are made by whoever needs them (a
fused kernel, a sampler), because ``T x vocabulary`` numbers are the largest thing in the whole system.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from cod_async.models.attention import attend
from cod_async.models.attention.rows import longest_row
from cod_async.models.layout import RECTANGLE, Layout
from cod_async.models.policy import Policy

_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


@dataclass(frozen=True, kw_only=True)
class Qwen3Config:
    """Shape of a Qwen3 model; field names are those of Hugging Face's ``config.json``.

    Attributes:
        vocab_size: rows of the embedding.
        hidden_size: width of the residual stream.
        intermediate_size: width of the SwiGLU block.
        num_hidden_layers: number of blocks.
        num_attention_heads: query heads; a multiple of ``num_key_value_heads``.
        num_key_value_heads: key and value heads.
        head_dim: width of a head, even; independent of ``hidden_size``.
        rms_norm_eps: added to the mean square in every RMSNorm.
        rope_theta: base of the rotary wavelengths.
        max_position_embeddings: longest row the model claims to handle, in tokens.
        tie_word_embeddings: whether the output head is the embedding matrix.
        bos_token_id, eos_token_id, pad_token_id: written to ``config.json`` for other readers; not used in
            here.

    Raises:
        ValueError: a size is not positive, ``head_dim`` is odd, or the heads do not divide.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 1_000_000.0
    max_position_embeddings: int = 4096
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    pad_token_id: int | None = None

    def __post_init__(self) -> None:
        for name in _SIZES:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, is {getattr(self, name)}")
        if self.head_dim % 2:
            raise ValueError(f"head_dim must be even for rotary positions, is {self.head_dim}")
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads ({self.num_attention_heads}) must be a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads})"
            )
        if not (self.rms_norm_eps > 0 and self.rope_theta > 0):
            raise ValueError("rms_norm_eps and rope_theta must be positive")


def rotary_table(head_dim: int, theta: float, length: int) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of the rotary angles, float32 [length, head_dim // 2] each.

    Angle of position p and pair i is ``p / theta^(2i / head_dim)`` (RoFormer, arXiv 2104.09864). It is
    computed in float32 in the order that transformers uses, so that logits agree to the last bits.
    """
    exponents = torch.arange(0, head_dim, 2, dtype=torch.int64).to(torch.float32) / head_dim
    inverse = 1.0 / (theta**exponents)
    angles = torch.arange(length, dtype=torch.float32)[:, None] * inverse
    return angles.cos(), angles.sin()


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the two halves of the last dimension; ``cos`` and ``sin`` broadcast over ``x``'s halves."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)


class RMSNorm(nn.Module):
    """Root-mean-square normalisation with a learned scale (arXiv 1910.07467)."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x / rms(x) * weight`` over the last dimension; statistics in at least float32."""
        wide = x if x.dtype == torch.float64 else x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class Attention(nn.Module):
    """Causal grouped-query self-attention with normalised queries and keys."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.num_kv_heads = config.num_key_value_heads
        self.head_dim = config.head_dim
        hidden = config.hidden_size
        self.q_proj = nn.Linear(hidden, self.num_heads * self.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=False)
        self.v_proj = nn.Linear(hidden, self.num_kv_heads * self.head_dim, bias=False)
        self.o_proj = nn.Linear(self.num_heads * self.head_dim, hidden, bias=False)
        self.q_norm = RMSNorm(self.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(self.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout = RECTANGLE) -> Tensor:
        """Attend within each row of ``x`` [B, T, H]; ``cos``, ``sin`` fit [B, heads, T, head_dim // 2]."""
        batch, length, _ = x.shape
        query = self.q_norm(self.q_proj(x).view(batch, length, self.num_heads, self.head_dim)).transpose(1, 2)
        key = self.k_norm(self.k_proj(x).view(batch, length, self.num_kv_heads, self.head_dim)).transpose(
            1, 2
        )
        value = self.v_proj(x).view(batch, length, self.num_kv_heads, self.head_dim).transpose(1, 2)
        query, key = apply_rotary(query, cos, sin), apply_rotary(key, cos, sin)
        mixed = attend(query, key, value, layout, scale=self.head_dim**-0.5)
        out: Tensor = self.o_proj(mixed.reshape(batch, length, -1))
        return out


class MLP(nn.Module):
    """SwiGLU feed-forward block (arXiv 2002.05202)."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return ``down(silu(gate(x)) * up(x))``."""
        out: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return out


class Block(nn.Module):
    """One pre-norm residual block."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, layout: Layout = RECTANGLE) -> Tensor:
        """Return the residual stream [B, T, H] after attention and feed-forward."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin, layout)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


class Backbone(nn.Module):
    """Embedding, blocks and final norm: what Hugging Face calls ``model``."""

    def __init__(self, config: Qwen3Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)


class Qwen3(Policy):
    """A causal language model up to its last hidden states.

    The constructor draws initial weights in the way that lets tiny models learn look-ups quickly: embeddings
    with standard deviation ``1 / sqrt(hidden_size)``, projections that write into the residual stream with
    ``0.1 / sqrt(fan_in)``, all others with ``1 / sqrt(fan_in)``, norms at 1.

    Args:
        config: shape of the model.
        generator: source of the initial weights; torch's default generator if None.
    """

    def __init__(self, config: Qwen3Config, generator: torch.Generator | None = None) -> None:
        super().__init__()
        self.config = config
        self.model = Backbone(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self._rotary: tuple[Tensor, Tensor] | None = None
        self._init_weights(generator)

    @torch.no_grad()
    def _init_weights(self, generator: torch.Generator | None) -> None:
        for name, parameter in self.named_parameters():
            if parameter.dim() == 1:
                parameter.fill_(1.0)
                continue
            writes_residual = name.endswith(("o_proj.weight", "down_proj.weight"))
            # An embedding's fan-in is its width here: rows are looked up, and tied heads read them back.
            std = (0.1 if writes_residual else 1.0) / math.sqrt(parameter.shape[1])
            parameter.normal_(0.0, std, generator=generator)

    @property
    def head_weight(self) -> Tensor:
        """The output head, [vocab_size, hidden_size]: ``logits = hidden @ head_weight.T``."""
        return self.lm_head.weight

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, in order."""
        return list(self.model.layers)

    def forward(self, input_ids: Tensor, layout: Layout = RECTANGLE) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            input_ids: int64 [B, T]. In a rectangle rows start at position 0 and short ones are padded on the
                right with any valid id: under the causal mask padding never reaches a real token.
            layout: how rows lie.

        Returns:
            [B, T, hidden_size] in the parameters' dtype; what stands at padded positions is meaningless.

        Raises:
            ValueError: the layout does not fit ``input_ids``.
        """
        x = self.model.embed_tokens(input_ids)
        cos, sin = self._angles(input_ids, layout, x.dtype)
        for block in self.model.layers:
            x = block(x, cos, sin, layout)
        out: Tensor = self.model.norm(x)
        return out

    def logits(self, input_ids: Tensor) -> Tensor:
        """Return logits [B, T, vocab_size]; for tests and small inputs."""
        return functional.linear(self(input_ids), self.head_weight)

    def rotary(self, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the rotary table of positions 0 .. length - 1, [length, head_dim // 2] each; grown by
        doubling.
        """
        table = self._rotary
        if (
            table is None
            or table[0].shape[0] < length
            or table[0].device != device
            or table[0].dtype != dtype
        ):
            size = max(64, 1 << (length - 1).bit_length())
            cos, sin = rotary_table(self.config.head_dim, self.config.rope_theta, size)
            table = (cos.to(device, dtype), sin.to(device, dtype))
            self._rotary = table
        return table[0][:length], table[1][:length]

    def _angles(self, input_ids: Tensor, layout: Layout, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return cos and sin of each token's position, for tensors [B, heads, T, head_dim // 2]."""
        positions = layout.position_ids
        if positions is None:
            if layout.kind != "rectangle":
                raise ValueError(f"the {layout.kind} layout needs position_ids: rows begin anywhere in it")
            return self.rotary(input_ids.shape[1], input_ids.device, dtype)
        if layout.kind == "rectangle":
            length = int(positions.max()) + 1
        else:  # known on the host; the largest position would have to be fetched from the device
            length = longest_row(layout.lengths, layout.parents)
        cos, sin = self.rotary(length, input_ids.device, dtype)
        return cos[positions][:, None], sin[positions][:, None]
