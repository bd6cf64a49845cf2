"""A tiny model for the learner's tests."""

from __future__ import annotations

import torch

from cod_async.models.qwen3 import Qwen3, Qwen3Config

VOCAB = 37


def tiny_model(seed: int = 0) -> Qwen3:
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=4,
        max_position_embeddings=64,
    )
    return Qwen3(config, torch.Generator().manual_seed(seed))
