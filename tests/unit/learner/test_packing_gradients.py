"""However rows are recorded and laid out, the real trainer finds the same loss and the same gradients."""

from __future__ import annotations

import copy
import random
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from learner_world import VOCAB, tiny_model
from rows_world import make_story

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.learner.packing import FlatRows, flatten
from cod_async.learner.step import Trainer
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Version
from cod_async.models.qwen3 import Qwen3
from cod_async.wire.messages import TrainItem

TEMPERATURE = 0.8
OPTIONS: dict[str, dict[str, Any]] = {
    "rectangle": {"layout": "rectangles"},
    "packed": {"layout": "packed"},
    "tree": {"has_prefix_tree": True},
}
LOSS = LossConfig(kl_coef=0.02)


def flat_of(items: list[TrainItem], *, is_merged: bool = False) -> FlatRows:
    return flatten(items, vocab_size=VOCAB, version=Version(0, 5), has_prefix_merging=is_merged)


def result_of(
    model: Qwen3, flat: FlatRows, kind: str, budget: int = 4096
) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    """Loss, gradients and current log-probs of one step, under a fresh copy of the model."""
    own = copy.deepcopy(model)
    learner = LearnerConfig(tokens_per_micro_batch=budget, **OPTIONS[kind])
    reference = tiny_model(1).to(model.dtype)
    trainer = Trainer.create(own, learner, LOSS, TEMPERATURE, reference)
    assert trainer.kind == kind
    done = trainer.accumulate(flat)
    gradients = {name: value.grad for name, value in own.named_parameters() if value.grad is not None}
    return float(torch.stack(done.losses).sum()), gradients, done.current


def near_policy(items: list[TrainItem], model: Qwen3, seed: int) -> list[TrainItem]:
    """Give rows behaviour log-probs near the model's own: some tokens are clipped, some are not."""
    flat = flat_of(items)
    _, _, current = result_of(model, flat, "rectangle")
    noise = np.random.default_rng(seed).normal(0.0, 0.3, flat.num_action_tokens)
    behavior = np.minimum(current.numpy().astype(np.float64) + noise, 0.0)
    result, done = [], 0
    for item in items:
        rows = []
        for row in item.rows:
            own = Array.of(behavior[done : done + row.num_action_tokens], "<f4")
            done += row.num_action_tokens
            rows.append(msgspec.structs.replace(row, behavior_logprobs=own))
        result.append(msgspec.structs.replace(item, rows=tuple(rows)))
    return result


def assert_equal(
    one: tuple[float, dict[str, torch.Tensor], torch.Tensor],
    other: tuple[float, dict[str, torch.Tensor], torch.Tensor],
    tolerance: float,
) -> None:
    assert one[0] == pytest.approx(other[0], rel=tolerance, abs=tolerance * 1e-2)
    assert one[1].keys() == other[1].keys()
    total = torch.stack([value.norm() for value in other[1].values()]).norm()
    for name, value in one[1].items():
        assert (value - other[1][name]).norm() <= tolerance * (other[1][name].norm() + 1e-2 * total), name
    assert torch.allclose(one[2], other[2], rtol=0.0, atol=max(20 * tolerance, 1e-12))


@given(
    seed=st.integers(0, 10_000),
    prompt_tokens=st.sampled_from([2, 17, 30]),
    edit_odds=st.sampled_from([0.0, 0.3]),
    budget=st.sampled_from([60, 4096]),
)
@settings(max_examples=5, deadline=None)
def test_loss_and_gradients_do_not_depend_on_recording_or_layout(
    seed: int, prompt_tokens: int, edit_odds: float, budget: int
) -> None:
    story = make_story(
        seed, vocab_size=VOCAB, max_turns=3, prompt_tokens=prompt_tokens, edit_odds=edit_odds, episodes=1
    )
    for dtype, tolerance in ((torch.float32, 1e-5), (torch.float64, 1e-10)):
        model = tiny_model(seed).to(dtype)
        items = near_policy(story.per_turn, model, seed)
        per_turn = flat_of(items)
        truth = result_of(model, per_turn, "rectangle")
        assert any(value.abs().max() > 1e-6 for value in truth[1].values())
        merged = flat_of(items, is_merged=True)
        for kind in OPTIONS:
            assert_equal(result_of(model, merged, kind, budget), truth, tolerance)
        for kind in ("packed", "tree"):
            assert_equal(result_of(model, per_turn, kind, budget), truth, tolerance)


@pytest.mark.parametrize("kind", OPTIONS)
def test_order_of_arrival_changes_no_bit_and_micro_batches_nothing_to_speak_of(kind: str) -> None:
    story = make_story(4, vocab_size=VOCAB, prompt_tokens=20)
    model = tiny_model(4)
    items = near_policy(story.per_turn, model, 4)
    shuffled = items[:]
    random.Random(2).shuffle(shuffled)
    shuffled.sort(key=lambda item: item.key)
    one = result_of(model, flat_of(items, is_merged=True), kind)
    other = result_of(model, flat_of(shuffled, is_merged=True), kind)
    assert one[0] == other[0] and torch.equal(one[2], other[2])
    assert all(torch.equal(value, other[1][name]) for name, value in one[1].items())
    wide, flat = copy.deepcopy(model).double(), flat_of(items, is_merged=True)
    whole = result_of(wide, flat, kind)
    for budget in (40, 90, 200):
        assert_equal(result_of(wide, flat, kind, budget), whole, 1e-10)
        assert_equal(result_of(model, flat, kind, budget), one, 1e-6)
