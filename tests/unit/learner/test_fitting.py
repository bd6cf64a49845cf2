"""A learner and its device: what is refused before the start, what is made smaller, what is said later."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from learner_world import VOCAB, tiny_model

from cod_async.config.schema import Config, LearnerConfig, LossConfig
from cod_async.errors import InputError, WorkError
from cod_async.learner.budget import memory_budget
from cod_async.learner.fitting import fit, refusal
from cod_async.learner.opening import open_trainer, rows_of
from cod_async.learner.packing import flatten
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version
from cod_async.models.shape import ModelShape, read_shape

LEARNER = LearnerConfig(tokens_per_micro_batch=65536, compute_dtype="bfloat16", recompute="full")


def small_shape() -> ModelShape:
    sizes = {
        "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
        "max_position_embeddings": 40960,
    }  # fmt: skip
    raw = {**sizes, "model_type": "qwen3", "tie_word_embeddings": True, "rms_norm_eps": 1e-6}
    return ModelShape.of(
        {**raw, "architectures": ["Qwen3ForCausalLM"], "rope_theta": 1e6, "hidden_act": "silu"}
    )


def forecast(learner: LearnerConfig, num_tokens: int, longest: int) -> int:
    used = msgspec.structs.replace(learner, tokens_per_micro_batch=num_tokens)
    return memory_budget(small_shape(), used, max_row_tokens=longest).device_bytes


@pytest.mark.parametrize("recompute", ["none", "selective", "full", "offload"])
def test_the_largest_that_fits_fits_and_one_token_more_does_not(recompute: Any) -> None:
    learner = msgspec.structs.replace(LEARNER, recompute=recompute)
    device_bytes = forecast(learner, 40_000, 8192)
    found = fit(small_shape(), learner, device_bytes, max_row_tokens=8192)
    assert 8192 <= found.tokens_per_micro_batch < 65536
    assert found.budget.device_bytes <= device_bytes
    assert forecast(learner, found.tokens_per_micro_batch + 1, 8192) > device_bytes
    row = found.longest_row_tokens
    assert forecast(learner, 1, row) <= device_bytes < forecast(learner, 1, row + 1)


def test_what_fits_is_left_alone_and_what_cannot_is_named() -> None:
    assert fit(small_shape(), LEARNER, 1 << 50, max_row_tokens=8192).tokens_per_micro_batch == 65536
    found = fit(small_shape(), LEARNER, 1 << 30, max_row_tokens=8192)
    assert found.tokens_per_micro_batch == found.longest_row_tokens == 0
    text = refusal(found, LEARNER, 8192, "cuda:0")
    assert "\n" not in text
    for part in (
        "8192",
        "1.00 GiB",
        "moments 4.44 GiB",
        "offload",
        "sequence_parallel",
        "tokens_per_micro",
    ):
        assert part in text, part


def with_memory(config: Config, run_dir: Path, num_tokens: int) -> Config:
    """Return the configuration with a device that holds micro-batches of ``num_tokens``."""
    learner = msgspec.structs.replace(config.learner, device="cpu", tokens_per_micro_batch=num_tokens)
    budget = memory_budget(
        read_shape(run_dir / "model"), learner, max_row_tokens=48, has_reference=config.loss.kl_coef > 0
    )
    limited = msgspec.structs.replace(config.learner, device_memory_bytes=budget.device_bytes)
    return msgspec.structs.replace(config, learner=limited)


def test_a_learner_starts_with_smaller_micro_batches(run_dir: Path, config: Config) -> None:
    limited = with_memory(config, run_dir, 100)
    trainer = open_trainer(run_dir, limited)
    assert 100 <= trainer.learner.tokens_per_micro_batch < 110 < config.learner.tokens_per_micro_batch
    assert trainer.max_rectangle_tokens == trainer.learner.tokens_per_micro_batch
    assert open_trainer(run_dir, config).learner.tokens_per_micro_batch == 256


def test_a_row_of_full_length_that_does_not_fit_is_refused_at_the_start(
    run_dir: Path, config: Config
) -> None:
    tiny = msgspec.structs.replace(config.learner, device_memory_bytes=20_000)
    with pytest.raises(InputError, match=r"a row of model\.max_context_tokens = 48 does not fit"):
        open_trainer(run_dir, msgspec.structs.replace(config, learner=tiny))


def test_a_row_that_no_device_holds_is_named(run_dir: Path, config: Config) -> None:
    trainer = open_trainer(run_dir, with_memory(config, run_dir, 100))
    limit = trainer.passes.sharing.max_row_tokens
    assert limit is not None and limit >= 100
    trainer.passes.sharing = dataclasses.replace(trainer.passes.sharing, max_row_tokens=30)
    items = random_items(3, vocab_size=VOCAB, min_tokens=20, max_tokens=20)
    items += [
        msgspec.structs.replace(item, key=msgspec.structs.replace(item.key, group=9))
        for item in random_items(1, vocab_size=VOCAB, min_tokens=40, max_tokens=40)
    ]
    with pytest.raises(WorkError, match=r"segment .*9.*: its row has 40 tokens, .* has 30;"):
        rows_of(items, config, trainer, Version(0, 0))


def test_a_device_without_memory_is_named_and_nothing_is_applied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    learner = LearnerConfig(tokens_per_micro_batch=64)
    trainer = Trainer.create(model, learner, LossConfig(), 1.0)
    flat = flatten(random_items(8, vocab_size=VOCAB, min_tokens=20, max_tokens=20), vocab_size=VOCAB)
    trainer.passes.memory.forecast_bytes = 3 << 30
    before = [p.detach().clone() for p in model.parameters()]
    inner, calls = type(model).forward, []

    def forward(self: Any, *args: Any) -> Any:
        calls.append(None)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return inner(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", forward)
        with pytest.raises(
            WorkError, match=r"micro-batch of 60 tokens \(forecast 3.00 GiB; CUDA out of memory"
        ):
            trainer.take_step(flat, 0)
    for old, new in zip(before, model.parameters(), strict=True):
        assert torch.equal(old, new)
    assert trainer.take_step(flat, 0)["grad_norm"] > 0
