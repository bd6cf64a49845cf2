"""The optimiser step against a naive fp64 pass over every row; what is not finite is refused."""

from __future__ import annotations

import copy
import math

import msgspec
import pytest
import torch
from learner_world import VOCAB, tiny_model

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import NumericsError, WorkError
from cod_async.learner.packing import flatten
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer, learning_rate, parameter_groups
from cod_async.lifecycle.arrays import Array
from cod_async.models.qwen3 import Qwen3
from cod_async.wire.messages import TrainItem
from cod_kernels import merge_metrics, summarize_metrics


def _items(model: Qwen3, count: int = 30) -> list[TrainItem]:
    """Items with behaviour log-probs near the model's own: a few tokens are clipped."""
    items = random_items(count, vocab_size=VOCAB, min_tokens=3, max_tokens=25)
    result = []
    for index, item in enumerate(items):
        (row,) = item.rows
        ids = torch.from_numpy(row.token_ids.numpy().astype("int64"))
        with torch.no_grad():
            logprobs = torch.log_softmax(model.logits(ids[None])[0] / 0.8, -1)
        positions = [p for start, stop in row.action_spans for p in range(start, stop)]
        own = torch.stack([logprobs[p - 1, ids[p]] for p in positions])
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(index)) * 0.2
        behavior = (own + noise).clamp(max=0).numpy()
        row = msgspec.structs.replace(row, behavior_logprobs=Array.of(behavior, "<f4"))
        result.append(msgspec.structs.replace(item, rows=(row,)))
    return result


def _naive(model: Qwen3, reference: Qwen3, items: list[TrainItem], loss: LossConfig) -> torch.Tensor:
    total, count = torch.zeros((), dtype=torch.float64), 0
    for item in items:
        for row in item.rows:
            ids = torch.from_numpy(row.token_ids.numpy().astype("int64"))
            logprobs = torch.log_softmax(model.logits(ids[None])[0] / 0.8, -1)
            with torch.no_grad():
                fixed = torch.log_softmax(reference.logits(ids[None])[0] / 0.8, -1)
            behavior = row.behavior_logprobs.numpy().tolist()
            positions = [p for start, stop in row.action_spans for p in range(start, stop)]
            for b, p in zip(behavior, positions, strict=True):
                logp, a = logprobs[p - 1, ids[p]], item.advantage
                ratio = math.exp(logp.item() - b)
                keep = (a >= 0 and ratio <= 1 + loss.eps_high) or (a <= 0 and ratio >= 1 - loss.eps_low)
                gap = fixed[p - 1, ids[p]] - logp
                total = total - keep * a * logp + loss.kl_coef * (gap.exp() - gap - 1)
                count += 1
    return total / count


@pytest.mark.parametrize("kl_coef", [0.05, 0.0])
@pytest.mark.parametrize("budget", [64, 100_000])
def test_gradient_is_that_of_the_exact_global_token_mean(budget: int, kl_coef: float) -> None:
    """Without a divergence, items without advantage come last and cost a forward pass, as on a GPU."""
    model, reference = tiny_model(), tiny_model(1)
    items = [
        msgspec.structs.replace(item, advantage=0.0) if index % 3 == 1 else item
        for index, item in enumerate(_items(model))
    ]
    loss = LossConfig(kl_coef=kl_coef)
    wide, wide_reference = copy.deepcopy(model).double(), copy.deepcopy(reference).double()
    expected = _naive(wide, wide_reference, items, loss)
    expected.backward()
    learner = LearnerConfig(tokens_per_micro_batch=budget)
    trainer = Trainer.create(model, learner, loss, 0.8, reference)
    flat = flatten(items, vocab_size=VOCAB)
    losses, parts, *_ = trainer.accumulate(flat, None if kl_coef else flat.advantages != 0)
    assert len(parts) > 5 or budget > 64
    assert summarize_metrics(merge_metrics(parts))["num_action_tokens"] == flat.num_action_tokens
    assert sum(part.item() for part in losses) == pytest.approx(expected.item(), abs=1e-6)
    for ours, truth in zip(model.parameters(), wide.parameters(), strict=True):
        assert ours.grad is not None and truth.grad is not None
        assert (ours.grad - truth.grad).norm() <= 1e-5 * truth.grad.norm() + 1e-8


def test_a_step_without_any_advantage_has_zero_gradients() -> None:
    model = tiny_model()
    items = [msgspec.structs.replace(item, advantage=0.0) for item in _items(model)]
    flat = flatten(items, vocab_size=VOCAB)
    trainer = Trainer.create(model, LearnerConfig(), LossConfig(), 0.8)
    _, parts, *_ = trainer.accumulate(flat, flat.advantages != 0)
    assert summarize_metrics(merge_metrics(parts))["num_action_tokens"] == flat.num_action_tokens
    for parameter in model.parameters():
        assert parameter.grad is not None and not parameter.grad.any()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_nothing_is_read_back_inside_a_step() -> None:
    model = tiny_model()
    flat = flatten(_items(model), vocab_size=VOCAB)
    trainer = Trainer.create(model.cuda(), LearnerConfig(), LossConfig(), 0.8)
    trainer.take_step(flat, 0)  # compiles
    torch.cuda.set_sync_debug_mode("error")
    try:
        _, parts, *_ = trainer.accumulate(flat, trainer._trained_items(flat))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert summarize_metrics(merge_metrics(parts))["num_action_tokens"] == flat.num_action_tokens


def test_metrics_of_a_step() -> None:
    model = tiny_model()
    items = _items(model)
    flat = flatten(items, vocab_size=VOCAB)
    with torch.no_grad():
        rows = [row for item in items for row in item.rows]
        ids = [torch.from_numpy(row.token_ids.numpy().astype("int64")) for row in rows]
        dists = [
            torch.distributions.Categorical(logits=model.logits(i[None])[0] / 0.8).entropy() for i in ids
        ]
    entropies = [
        float(dist[p - 1])
        for row, dist in zip(rows, dists, strict=True)
        for start, stop in row.action_spans
        for p in range(start, stop)
    ]
    metrics = Trainer.create(model, LearnerConfig(lr=1e-3), LossConfig(), 0.8).take_step(flat, 0)
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["num_action_tokens"] == flat.num_action_tokens
    assert 0 < metrics["masked_frac"] < 1
    assert metrics["entropy"] == pytest.approx(sum(entropies) / len(entropies), rel=1e-5)
    assert metrics["ratio_mean"] == pytest.approx(1, abs=0.1)
    assert metrics["grad_norm"] > 0


def test_repeats_to_the_bit() -> None:
    results = []
    for _ in range(2):
        model = tiny_model()
        items = _items(model)
        trainer = Trainer.create(model, LearnerConfig(lr=1e-2), LossConfig(), 0.8)
        for step in range(3):
            trainer.take_step(flatten(items, vocab_size=VOCAB), step)
        results.append([p.detach().clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("poison", ["behavior", "weight", "advantage"])
def test_what_is_not_finite_changes_nothing(poison: str) -> None:
    model = tiny_model()
    items = _items(model)
    trainer = Trainer.create(model, LearnerConfig(lr=1e-2), LossConfig(clip="none"), 0.8)
    trainer.take_step(flatten(items, vocab_size=VOCAB), 0)
    if poison == "behavior":
        row = items[0].rows[0]
        bad = Array.of([math.nan] * row.num_action_tokens, "<f4")
        items[0] = msgspec.structs.replace(
            items[0], rows=(msgspec.structs.replace(row, behavior_logprobs=bad),)
        )
    elif poison == "advantage":
        items[0] = msgspec.structs.replace(items[0], advantage=1e39)
    else:
        with torch.no_grad():
            model.model.layers[0].mlp.down_proj.weight[0, 0] = math.nan  # type: ignore[index, union-attr]
    before = [p.detach().clone() for p in model.parameters()]
    state = copy.deepcopy(trainer.optimizer.state_dict())
    with pytest.raises(NumericsError, match="was not applied"):
        trainer.take_step(flatten(items, vocab_size=VOCAB), 1)
    for now, old in zip(model.parameters(), before, strict=True):
        assert torch.equal(now.nan_to_num(), old.nan_to_num())
        assert now.grad is None
    after = trainer.optimizer.state_dict()
    for key, value in state["state"].items():
        assert all(torch.equal(after["state"][key][name], v) for name, v in value.items())


def test_empty_steps_are_refused() -> None:
    trainer = Trainer.create(tiny_model(), LearnerConfig(), LossConfig(), 1.0)
    with pytest.raises(WorkError, match="no action tokens"):
        trainer.take_step(flatten([], vocab_size=VOCAB), 0)


def test_weight_decay_spares_norms_and_embeddings() -> None:
    model = tiny_model()
    decays, others = parameter_groups(model, 0.1)
    names = {id(p): name for name, p in model.named_parameters()}
    assert all("proj" in names[id(p)] for p in decays["params"])  # type: ignore[attr-defined]
    assert all("norm" in names[id(p)] or "embed" in names[id(p)] for p in others["params"])  # type: ignore[attr-defined]
    assert (decays["weight_decay"], others["weight_decay"]) == (0.1, 0.0)


def test_warm_up() -> None:
    config = LearnerConfig(lr=1.0, warmup_steps=4)
    assert [learning_rate(config, step) for step in range(6)] == [0.25, 0.5, 0.75, 1, 1, 1]
    assert learning_rate(LearnerConfig(lr=0.5), 0) == 0.5
