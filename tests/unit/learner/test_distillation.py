"""Distillation against the formulas it comes from, token by token in NumPy, and through a whole step."""

from __future__ import annotations

import copy
import math

import msgspec
import numpy as np
import pytest
import torch
from learner_world import VOCAB, tiny_model

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import NumericsError, WorkError
from cod_async.learner.distillation import MAX_TEACHER_GAP_NATS, divergence_by_environment
from cod_async.learner.objective import make_objective
from cod_async.learner.packing import FlatRows, flatten
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Row
from cod_async.models.qwen3 import Qwen3
from cod_async.wire.messages import TrainItem
from cod_kernels import segment_loss

TEMPERATURE = 0.8
OPD = LossConfig(preset="opd")


def flat_rows(behavior: np.ndarray, teacher: np.ndarray) -> FlatRows:
    """One row of tokens, dealt out to three segments with advantages that must not matter."""
    count = behavior.size
    zeros = np.zeros(count, dtype=np.int64)
    return FlatRows(
        tokens=np.zeros(count + 1, dtype=np.int64),
        starts=zeros[:1],
        lengths=zeros[:1] + count + 1,
        action_items=np.sort(np.arange(count) % 3),
        action_rows=zeros,
        action_offsets=np.arange(count) + 1,
        action_lags=np.arange(count) % 4,
        behavior_logprobs=behavior,  # type: ignore[arg-type]
        advantages=np.array([1.0, -2.0, 0.5]),
        row_lifecycles=zeros[:1],
        teacher_logprobs=teacher,  # type: ignore[arg-type]
    )


def paper_gradient(current: np.ndarray, behavior: np.ndarray, teacher: np.ndarray) -> np.ndarray:
    """d loss / d log current of the formulas as they are written, one token after the other.

    a = 1 * (log T - log old); a <- a + log old - stopgrad(log current); loss = -mean(a * log current).
    """
    gradient = np.empty_like(current)
    for token in range(current.size):
        advantage = 1.0 * (teacher[token] - behavior[token])
        advantage += behavior[token] - current[token]
        gradient[token] = -advantage / current.size
    return gradient


def test_the_gradient_is_the_papers_token_by_token() -> None:
    rng = np.random.default_rng(3)
    behavior, teacher, current = (-4 * rng.random(50) for _ in range(3))
    teacher[:4] = behavior[:4] + np.array([-15.9, -9.0, 0.0, -1e-9])
    logprobs = torch.tensor(current, requires_grad=True)
    objective = make_objective(OPD, flat_rows(behavior, teacher), torch.device("cpu"))
    loss, _ = segment_loss(
        logprobs,
        objective.behavior,
        objective.segment_ids,
        objective.advantages,
        objective.weights,
        reference_logprobs=objective.teacher,
        **vars(objective.options),
    )
    loss.backward()
    assert logprobs.grad is not None
    np.testing.assert_allclose(logprobs.grad.numpy(), paper_gradient(current, behavior, teacher), atol=1e-14)
    assert loss.item() == pytest.approx(((current - teacher) ** 2).mean() / 2, rel=1e-12)


@pytest.mark.parametrize("gap", [-40.0, -16.5, 30.0])
def test_a_teacher_that_is_far_away_pulls_as_one_at_the_bound(gap: float) -> None:
    """Beyond 20 nats the fused loss would have no gradient at all, where the teacher objects most."""
    behavior = np.array([-1.0, -0.5])
    flat = flat_rows(behavior, np.array([-1.0 + gap, -0.7]))
    objective = make_objective(OPD, flat, torch.device("cpu"))
    assert objective.teacher is not None
    bound = -1.0 + math.copysign(MAX_TEACHER_GAP_NATS, gap)
    np.testing.assert_allclose(objective.teacher.numpy(), [bound, -0.7], rtol=1e-12)


def taught_items(model: Qwen3, teacher: Qwen3, count: int = 24) -> list[TrainItem]:
    """Random rows; behaviour near the model's own log-probs, those of the teacher beside them."""
    items = []
    for index, item in enumerate(random_items(count, vocab_size=VOCAB, min_tokens=3, max_tokens=25)):
        (row,) = item.rows
        own, theirs = row_logprobs(model, row), row_logprobs(teacher, row)
        noise = torch.randn(own.shape, generator=torch.Generator().manual_seed(index)) * 0.3
        row = msgspec.structs.replace(
            row,
            behavior_logprobs=Array.of((own + noise).clamp(max=0).detach().numpy(), "<f4"),
            teacher_logprobs=Array.of(theirs.detach().numpy(), "<f4"),
        )
        items.append(msgspec.structs.replace(item, rows=(row,), environment=f"world.{index % 2}"))
    return items


def row_logprobs(model: Qwen3, row: Row) -> torch.Tensor:
    ids = torch.from_numpy(row.token_ids.numpy().astype("int64"))
    logprobs = torch.log_softmax(model.logits(ids[None])[0] / TEMPERATURE, -1)
    positions = torch.tensor([p for start, stop in row.action_spans for p in range(start, stop)])
    return logprobs[positions - 1, ids[positions]]


@pytest.mark.parametrize("budget", [64, 100_000])
def test_the_gradient_of_a_step_is_that_of_the_papers_loss(budget: int) -> None:
    model, teacher = tiny_model(), tiny_model(1)
    items = taught_items(model, teacher)
    wide = copy.deepcopy(model).double()
    loss, count, gap = torch.zeros((), dtype=torch.float64), 0, 0.0
    for item in items:
        (row,) = item.rows
        logp = row_logprobs(wide, row)
        assert isinstance(row.teacher_logprobs, Array)
        taught = torch.from_numpy(row.teacher_logprobs.numpy().astype("float64"))
        old = torch.from_numpy(row.behavior_logprobs.numpy().astype("float64"))
        advantage = (taught - old) + old - logp.detach()
        loss = loss - (advantage * logp).sum()
        gap -= advantage.sum().item()
        count += logp.numel()
    (loss / count).backward()  # type: ignore[no-untyped-call]
    trainer = Trainer.create(model, LearnerConfig(tokens_per_micro_batch=budget), OPD, TEMPERATURE)
    flat = flatten(items, vocab_size=VOCAB)
    trainer.accumulate(flat, trainer._trained_items(flat))
    for ours, truth in zip(model.parameters(), wide.parameters(), strict=True):
        assert ours.grad is not None and truth.grad is not None
        assert (ours.grad - truth.grad).norm() <= 1e-5 * truth.grad.norm() + 1e-8
    for parameter in model.parameters():
        parameter.grad = None
    metrics = trainer.take_step(flat, 0)
    assert metrics["distillation_kl_nats"] == pytest.approx(gap / count, abs=1e-5)
    assert metrics["distillation_k3_nats"] >= 0
    assert metrics["distillation_bounded_frac"] == 0
    assert metrics["policy_loss"] == 0


def test_steps_come_nearer_to_the_teacher() -> None:
    model, teacher = tiny_model(), tiny_model(1)
    items = taught_items(model, teacher)
    flat = flatten(items, vocab_size=VOCAB)
    trainer = Trainer.create(model, LearnerConfig(lr=3e-3, weight_decay=0.0), OPD, TEMPERATURE)
    losses = [trainer.take_step(flat, step)["loss"] for step in range(12)]
    assert losses[-1] < 0.5 * losses[0]


def test_mini_batches_and_other_recipes_carry_teachers_along() -> None:
    items = taught_items(tiny_model(), tiny_model(1))
    flat = flatten(items, vocab_size=VOCAB)
    learner = LearnerConfig(minibatches_per_step=3)
    metrics = Trainer.create(tiny_model(), learner, OPD, TEMPERATURE).take_step(flat, 0)
    assert metrics["num_updates"] == 3 and metrics["distillation_k3_nats"] > 0
    plain = Trainer.create(tiny_model(), LearnerConfig(), LossConfig(), TEMPERATURE).take_step(flat, 0)
    assert "distillation_kl_nats" not in plain


def test_divergence_is_told_by_environment() -> None:
    items = taught_items(tiny_model(), tiny_model(1), count=6)
    expected = {}
    for name in ("world.0", "world.1"):
        gaps = [
            row.behavior_logprobs.numpy().astype(float) - row.teacher_logprobs.numpy()  # type: ignore[union-attr]
            for item in items
            if item.environment == name
            for row in item.rows
        ]
        expected[f"distillation_kl_nats_{name}"] = np.concatenate(gaps).mean()
    assert divergence_by_environment(items) == pytest.approx(expected)
    as_context = [msgspec.structs.replace(item, is_context=True) for item in items]
    assert divergence_by_environment(as_context) == {}


def test_rows_without_their_teacher_are_refused() -> None:
    items = taught_items(tiny_model(), tiny_model(1), count=4)
    bare = [
        msgspec.structs.replace(
            item,
            rows=tuple(msgspec.structs.replace(row, teacher_logprobs=msgspec.UNSET) for row in item.rows),
        )
        for item in items
    ]
    with pytest.raises(WorkError, match="misses log-probs of its teacher"):
        flatten([*items[:2], *bare[2:]], vocab_size=VOCAB)
    with pytest.raises(WorkError, match="no log-probs of teachers"):
        make_objective(OPD, flatten(bare, vocab_size=VOCAB), torch.device("cpu"))
    (row,) = items[0].rows
    broken = Array.of(np.full(row.num_action_tokens, np.nan), "<f4")
    rows = (msgspec.structs.replace(row, teacher_logprobs=broken),)
    with pytest.raises(NumericsError, match="nan"):
        flatten([msgspec.structs.replace(items[0], rows=rows), *items[1:]], vocab_size=VOCAB)


def test_a_teachers_words_on_context_are_not_trained_on() -> None:
    items = taught_items(tiny_model(), tiny_model(1), count=4)
    items[1] = msgspec.structs.replace(items[1], is_context=True)
    flat = flatten(items, vocab_size=VOCAB)
    assert flat.teacher_logprobs is not None
    assert flat.teacher_logprobs.size == flat.num_action_tokens
    kept = [item for item in items if not item.is_context]
    expected = np.concatenate([row.teacher_logprobs.numpy() for item in kept for row in item.rows])  # type: ignore[union-attr]
    np.testing.assert_array_equal(flat.teacher_logprobs, expected)
