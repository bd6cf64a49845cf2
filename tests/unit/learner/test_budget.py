"""The forecast of memory and operations, against tensors really alive and operations really counted."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from memory_meter import MemoryMeter
from torch.utils.flop_counter import FlopCounterMode

from cod_async.config.learner import LearnerConfig, LoraConfig
from cod_async.config.schema import LossConfig
from cod_async.learner.budget import _head_moment, memory_budget, step_flops
from cod_async.learner.packing import flatten
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.models.layout import Layout
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.recompute import apply_recompute
from cod_async.models.shape import ModelShape, read_shape
from cod_kernels.linear_logprob.memory import num_bytes, plain_buffers, plain_chunk_rows
from cod_kernels.linear_logprob.reference import chunk_rows_for

SIZES = {
    "vocab_size": 640, "hidden_size": 128, "intermediate_size": 320, "num_hidden_layers": 5,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 32,
}  # fmt: skip
LENGTHS = (97, 160, 33)
TOKENS = sum(LENGTHS)


def make(folder: Path) -> tuple[Qwen3, ModelShape]:
    """Return a model and the shape that its config.json says."""
    model = Qwen3(Qwen3Config(**SIZES), torch.Generator().manual_seed(0))
    raw: dict[str, Any] = {
        **SIZES, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True,
        "max_position_embeddings": 4096, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(raw))
    return model, read_shape(folder)


def packed() -> tuple[torch.Tensor, Layout]:
    """Return ids and layout of three rows end to end."""
    ids = torch.randint(0, SIZES["vocab_size"], (1, TOKENS), generator=torch.Generator().manual_seed(1))
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    return ids, Layout("packed", LENGTHS, positions)


def forecast(shape: ModelShape, learner: LearnerConfig, *names: str) -> int:
    """Return the sum of the named lines of the forecast."""
    lines = memory_budget(shape, learner, max_row_tokens=max(LENGTHS)).lines
    found = [line.num_bytes for line in lines if line.name in names]
    assert len(found) == len(names)
    return sum(found)


@pytest.mark.parametrize(
    ("recompute", "line"),
    [("none", "layers"), ("full", "layer inputs"), ("selective", "kept of the layers")],
)
def test_what_the_layers_keep(tmp_path: Path, recompute: Any, line: str) -> None:
    model, shape = make(tmp_path)
    apply_recompute(model, recompute)
    ids, layout = packed()
    model(ids, layout)  # tables of positions are made once
    with MemoryMeter() as meter:
        hidden = model(ids, layout)
        alive = meter.live_bytes()
    assert hidden.requires_grad
    learner = LearnerConfig(tokens_per_micro_batch=TOKENS, recompute=recompute)
    assert forecast(shape, learner, "final norm and positions", line) == pytest.approx(alive, rel=0.1)


def test_the_peak_of_forward_and_backward(tmp_path: Path) -> None:
    """Gradients, what is kept, and one layer at work; nothing that grows with the square of a row."""
    model, shape = make(tmp_path)
    apply_recompute(model, "full")
    ids, layout = packed()
    model(ids, layout).square().mean().backward()  # gradients are there already, as in a later micro-batch
    with MemoryMeter() as meter:
        model(ids, layout).square().mean().backward()
    learner = LearnerConfig(tokens_per_micro_batch=TOKENS, recompute="full")
    names = ("final norm and positions", "layer inputs", "one layer, recomputed")
    largest = SIZES["vocab_size"] * SIZES["hidden_size"] * 4  # gradient of the embedding, before it is added
    assert meter.peak_bytes <= 1.15 * (forecast(shape, learner, *names) + largest)
    assert meter.peak_bytes >= 0.7 * forecast(shape, learner, *names)


def test_parameters_gradients_and_moments_are_counted_exactly(tmp_path: Path) -> None:
    model, shape = make(tmp_path)
    count = sum(parameter.numel() for parameter in model.parameters())
    for learner, moments in (
        (LearnerConfig(), 8 * count),
        (LearnerConfig(optimizer="adamw_8bit"), 2 * (count + count / 64)),
    ):
        assert forecast(shape, learner, "parameters") == forecast(shape, learner, "gradients") == 4 * count
        assert forecast(shape, learner, "moments") == pytest.approx(moments, abs=1)


def test_ranks_divide_what_is_sharded_and_offload_moves_the_moments(tmp_path: Path) -> None:
    _, shape = make(tmp_path)
    one = LearnerConfig(tokens_per_micro_batch=TOKENS)
    eight = LearnerConfig(tokens_per_micro_batch=TOKENS, data_parallel=4, sequence_parallel=2)
    assert forecast(shape, eight, "parameters") == pytest.approx(
        forecast(shape, one, "parameters") / 8, abs=1
    )
    assert forecast(shape, eight, "layers") == pytest.approx(forecast(shape, one, "layers") / 2, abs=4)
    offloaded = memory_budget(shape, LearnerConfig(has_optimizer_offload=True), max_row_tokens=10)
    whole = memory_budget(shape, LearnerConfig(), max_row_tokens=10)
    moments = next(line for line in whole.lines if line.name == "moments")
    copies = 8 * shape.num_parameters  # of parameters and gradients
    assert offloaded.host_bytes == moments.num_bytes + copies and whole.host_bytes == 0


def test_a_row_beyond_the_micro_batch_counts_whole(tmp_path: Path) -> None:
    _, shape = make(tmp_path)
    learner = LearnerConfig(tokens_per_micro_batch=1000, sequence_parallel=4)
    assert memory_budget(shape, learner, max_row_tokens=10_001).tokens_per_rank == 2501


def test_operations_are_those_that_torch_counts(tmp_path: Path) -> None:
    """Torch counts attention as if every query saw every key, so it is compared apart, by hand."""
    model, shape = make(tmp_path)
    length = 64
    ids = torch.randint(0, SIZES["vocab_size"], (3, length))
    with FlopCounterMode(display=False) as counter:
        logits = torch.nn.functional.linear(model(ids), model.head_weight)
        logits.square().mean().backward()
    by_op = counter.get_flop_counts()["Global"]
    products = sum(value for op, value in by_op.items() if "attention" not in str(op))
    flops = step_flops(shape, LearnerConfig(), [length] * 3, 3 * length)
    assert flops.layers + flops.head == pytest.approx(products, rel=0.01)
    forward = 4 * SIZES["num_attention_heads"] * SIZES["head_dim"] * length * (length + 1) / 2
    assert flops.attention == pytest.approx(3 * 3 * SIZES["num_hidden_layers"] * forward)
    assert flops.recomputed == 0


def test_recomputation_and_adapters_change_the_count(tmp_path: Path) -> None:
    _, shape = make(tmp_path)
    plain = step_flops(shape, LearnerConfig(), [100], 10)
    full = step_flops(shape, LearnerConfig(recompute="full"), [100], 10)
    assert full.model == plain.model
    assert full.recomputed == pytest.approx((plain.layers + plain.attention) / 3)
    adapted = step_flops(shape, LearnerConfig(lora=LoraConfig(rank=4)), [100], 10)
    assert adapted.layers == pytest.approx(plain.layers * 2 / 3)


@pytest.mark.parametrize("compute_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_the_peak_of_a_whole_step(tmp_path: Path, recompute: Any, compute_dtype: Any) -> None:
    """Of several micro-batches, so that gradients are there when most is kept; optimizer and head too."""
    model, shape = make(tmp_path)
    learner = LearnerConfig(
        device="cpu", layout="packed", tokens_per_micro_batch=800, recompute=recompute,
        compute_dtype=compute_dtype,
    )  # fmt: skip
    items = random_items(24, vocab_size=SIZES["vocab_size"], min_tokens=100, max_tokens=100)
    flat = flatten(items, vocab_size=SIZES["vocab_size"])
    parameters = 4 * shape.num_parameters
    with MemoryMeter() as made:
        trainer = Trainer.create(model, learner, LossConfig(), 1.0)
        trainer.take_step(flat, 0)
        state = made.live_bytes()
    with MemoryMeter() as meter:
        trainer.take_step(flat, 1)
    budget = memory_budget(shape, learner, max_row_tokens=100)
    expected = sum(line.num_bytes for line in budget.lines if line.name != "allocator")
    assert expected == pytest.approx(parameters + state + meter.peak_bytes, rel=0.15)
    names = {line.name for line in budget.lines}
    assert ("copy in bfloat16" in names) == (compute_dtype == "bfloat16")


def test_the_chunk_of_logits_is_the_kernels(tmp_path: Path) -> None:
    _, shape = make(tmp_path)
    for vocab_size in (640, 32_000, 151_936):
        wide = msgspec.structs.replace(shape, sizes={**shape.sizes, "vocab_size": vocab_size})
        learner = LearnerConfig(tokens_per_micro_batch=1 << 14, compute_dtype="bfloat16")
        (line, *_) = _head_moment(wide, learner, 1 << 14)
        rows = plain_chunk_rows(vocab_size)
        assert line.num_bytes == num_bytes(plain_buffers(rows, vocab_size))
        (line, *_) = _head_moment(wide, msgspec.structs.replace(learner, device="cpu"), 1 << 14)
        assert line.num_bytes == 2 * 4 * vocab_size * chunk_rows_for(vocab_size)


def test_ranks_gather_and_a_frozen_model_has_no_gradients_of_its_head(tmp_path: Path) -> None:
    _, shape = make(tmp_path)
    head = SIZES["vocab_size"] * SIZES["hidden_size"]
    two = LearnerConfig(data_parallel=2, compute_dtype="bfloat16")
    assert forecast(shape, two, "gathered head") == forecast(shape, two, "gathered embedding") == 2 * head
    assert forecast(shape, two, "gradient of the head") == 4 * head
    adapted = memory_budget(shape, LearnerConfig(lora=LoraConfig(rank=4)), max_row_tokens=10)
    assert not any("head" in line.name for line in adapted.lines)
    both = memory_budget(
        shape, LearnerConfig(compute_dtype="bfloat16"), max_row_tokens=10, has_reference=True
    )
    by_name = {line.name: line.num_bytes for line in both.lines}
    assert by_name["reference model"] == 2 * by_name["reference in bfloat16"] == 4 * shape.num_parameters
