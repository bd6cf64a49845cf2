"""Tiny random models of several families, made by transformers itself, as directories."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCAB = 61
FAMILIES = ("qwen3", "qwen2", "llama")
"""Families with full attention in every layer."""
SIZES: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
}
HYBRID: dict[str, Any] = {
    "head_dim": 16,
    "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [2, 1, 1],
    },
}  # fmt: skip
LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}


def make(family: str, **changes: Any) -> Any:
    """Build a model of transformers with random weights, biases and norms; pass sizes to change."""
    import transformers
    from transformers.models.qwen3_5.configuration_qwen3_5 import Qwen3_5TextConfig
    from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5ForCausalLM

    kinds: dict[str, tuple[Any, Any, dict[str, Any]]] = {
        "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM, {"head_dim": 12}),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM, {}),
        "llama": (
            transformers.LlamaConfig, transformers.LlamaForCausalLM, {"rope_parameters": LLAMA3_ROPE},
        ),
        "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM, {"sliding_window": None}),
        "qwen3_next": (
            transformers.Qwen3NextConfig, transformers.Qwen3NextForCausalLM, {**HYBRID, "num_experts": 0},
        ),
        "qwen3_5": (Qwen3_5TextConfig, Qwen3_5ForCausalLM, HYBRID),
    }  # fmt: skip
    config_class, model_class, own = kinds[family]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = model_class(config_class(**{**SIZES, **own, **changes})).eval()
    shake(model)
    return model


@torch.no_grad()
def shake(model: torch.nn.Module, seed: int = 3) -> None:
    """Give every parameter values of its own, biases and norms too, so that a forgotten one is seen."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32)
        parameter.add_((0.1 * noise).to(parameter.dtype))


def write(folder: Path, family: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """Write such a model as a directory and return it."""
    max_shard_size = changes.pop("max_shard_size", "1GB")
    model = make(family, **changes).to(dtype)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


def ids(batch: int, length: int, seed: int = 1) -> Tensor:
    """Return random token ids, int64 [batch, length]."""
    return torch.randint(0, VOCAB, (batch, length), generator=torch.Generator().manual_seed(seed))
