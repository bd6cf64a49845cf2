"""Per-token records say what the loss saw: its log-probs to the bit, its masks, and the gradient it made."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_world import VOCAB, tiny_model

from cod_async.config.schema import Config, LearnerConfig, LossConfig
from cod_async.errors import NumericsError
from cod_async.learner.forward import Accumulated
from cod_async.learner.packing import FlatRows, flatten, split_lifecycles
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.learner.token_records import TokenRecorder, keep_records, tokens_of
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import Row, Version, VersionSpan
from cod_async.store.token_records import FIELDS, STATES, read_token_records, records_file
from cod_async.wire.messages import TrainItem
from cod_kernels import merge_metrics
from cod_kernels.segment_loss.op import METRIC_NAMES

NOW = Version(0, 9)
TEMPERATURE = 0.8
PLAIN = ("paper", "ppo", "cispo", "gspo")
"""Recipes in which a token is clipped or not, and nothing else can happen to it."""


def row_logprobs(model: Any, row: Row) -> list[torch.Tensor]:
    ids = torch.from_numpy(row.token_ids.numpy().astype("int64"))
    logprobs = torch.log_softmax(model.logits(ids[None])[0] / TEMPERATURE, -1)
    return [logprobs[p - 1, ids[p]] for start, stop in row.action_spans for p in range(start, stop)]


@torch.no_grad()
def make_items(spread: float = 0.25) -> list[TrainItem]:
    """Stale items, behaviour log-probs around the model's own; one without advantage, one with two rows."""
    model, rng = tiny_model(), np.random.default_rng(1)
    items = random_items(20, vocab_size=VOCAB, min_tokens=3, max_tokens=20)
    items[3] = msgspec.structs.replace(items[3], rows=(*items[3].rows, *items[4].rows))
    found = []
    for index, item in enumerate(items):
        rows = []
        for row in item.rows:
            own = np.array([float(value) for value in row_logprobs(model, row)])
            behavior = np.minimum(own + rng.normal(0, spread, own.size), 0)
            version = VersionSpan(Version(0, NOW.step - index % 4), own.size)
            rows.append(
                msgspec.structs.replace(row, behavior_logprobs=Array.of(behavior, "<f4"), versions=(version,))
            )
        advantage = 0.0 if index == 7 else item.advantage
        found.append(msgspec.structs.replace(item, rows=tuple(rows), advantage=advantage))
    return found


def flat_of(items: list[TrainItem]) -> FlatRows:
    return flatten(items, vocab_size=VOCAB, version=NOW)


def make_trainer(preset: str, num_parts: int = 1, **loss: Any) -> Trainer:
    learner = LearnerConfig(
        lr=1e-2, tokens_per_micro_batch=100, minibatches_per_step=num_parts, grad_clip=1e9
    )
    recipe = msgspec.convert({"preset": preset, **loss}, LossConfig)
    reference = tiny_model(seed=5) if recipe.kl_coef > 0 else None
    return Trainer.create(tiny_model(), learner, recipe, TEMPERATURE, reference)


class Spy:
    """Keeps what each optimizer step of a trainer accumulated."""

    def __init__(self, trainer: Trainer, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done: list[Accumulated] = []
        self.gradients: list[list[torch.Tensor]] = []
        original = trainer.accumulate

        def accumulate(*args: Any) -> Accumulated:
            found = original(*args)
            self.done.append(found)
            self.gradients.append([p.grad.clone() for p in trainer.model.parameters() if p.grad is not None])
            return found

        monkeypatch.setattr(trainer, "accumulate", accumulate)

    def totals(self, index: int) -> dict[str, float]:
        return dict(zip(METRIC_NAMES, merge_metrics(self.done[index].metrics).tolist(), strict=True))


def recorded(
    preset: str, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> tuple[dict[str, Any], Spy, FlatRows]:
    trainer, flat = make_trainer(preset, num_parts), flat_of(make_items())
    spy, recorder = Spy(trainer, monkeypatch), TokenRecorder(trainer)
    recorder.begin(flat)
    trainer.take_step(flat, NOW.step)
    return recorder.found(), spy, flat


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("preset", ["paper", "decoupled", "tis_segment", "gspo", "m2po", "opsm"])
def test_log_probs_are_the_loss_s_own_to_the_bit(
    preset: str, num_parts: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, spy, flat = recorded(preset, num_parts, monkeypatch)
    assert {name: values.dtype.str.lstrip("|") for name, values in tokens.items()} == dict(FIELDS)
    parts = split_lifecycles(flat, num_parts)
    assert len(spy.done) == len(parts) == num_parts
    for index, (_, actions) in enumerate(parts):
        done = spy.done[index]
        np.testing.assert_array_equal(tokens["logprob"][actions], done.current.numpy())
        np.testing.assert_array_equal(tokens["update"][actions], index)
        assert set(tokens["micro_batch"][actions]) == set(range(done.num_turns))
        totals = spy.totals(index)
        assert tokens["entropy"][actions].sum() == pytest.approx(totals["sum_entropy"], rel=1e-5)
        assert tokens["ratio"][actions].sum() == pytest.approx(totals["sum_ratio"], rel=1e-5)
    np.testing.assert_array_equal(tokens["behavior_logprob"], flat.behavior_logprobs)
    np.testing.assert_array_equal(tokens["lag"], flat.action_lags)
    np.testing.assert_array_equal(tokens["advantage"], flat.advantages[flat.action_items].astype(np.float32))


@pytest.mark.parametrize("preset", PLAIN)
def test_states_count_what_the_loss_counts(preset: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens, spy, flat = recorded(preset, 1, monkeypatch)
    totals = spy.totals(0)
    counts = np.bincount(tokens["state"], minlength=len(STATES))
    of = dict(zip(STATES, counts.tolist(), strict=True))
    assert of["clipped_high"] == totals["num_masked_positive"] > 0
    assert of["clipped_low"] == totals["num_masked_negative"]
    assert of["no_advantage"] == int((flat.action_items == 7).sum()) > 0
    assert of["trained"] == counts.sum() - of["clipped_high"] - of["clipped_low"] - of["no_advantage"]
    assert set(np.flatnonzero(counts)) <= {STATES.index(name) for name in ("trained", "no_advantage",
        "clipped_high", "clipped_low")}  # fmt: skip
    if preset != "cispo":  # there a clipped token is weighted, not left out
        assert not tokens["gradient"][tokens["state"] == STATES.index("clipped_high")].any()


@pytest.mark.parametrize(
    ("preset", "loss", "state"),
    [
        ("opsm", {"mask_drift": 1e-6}, "segment_masked"),
        ("tis_segment", {"weight_cap": 1.01}, "weight_outside"),
        ("icepop", {"proximal": "none", "weight_floor": 0.97, "weight_cap": 1.03}, "weight_outside"),
    ],
)
def test_masked_segments_and_weights_have_names(preset: str, loss: dict[str, Any], state: str) -> None:
    flat = flat_of(make_items())
    found = tokens_of(make_trainer(preset, **loss), flat, None)
    names = {STATES[number] for number in found["state"]}
    assert state in names
    if state == "segment_masked":
        is_masked = found["state"] == STATES.index("segment_masked")
        assert not found["gradient"][is_masked].any()
        for item in np.unique(flat.action_items):  # whole segments
            assert len(set(is_masked[flat.action_items == item])) == 1


@pytest.mark.parametrize(
    ("preset", "loss"), [("paper", {}), ("ppo", {"kl_coef": 0.1}), ("tis_segment", {}), ("gspo", {})]
)
def test_token_gradients_make_the_gradient_of_the_weights(
    preset: str, loss: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    items = make_items()
    trainer, flat = make_trainer(preset, **loss), flat_of(items)
    before = copy.deepcopy(trainer.model)
    spy, recorder = Spy(trainer, monkeypatch), TokenRecorder(trainer)
    recorder.begin(flat)
    trainer.take_step(flat, NOW.step)
    logprobs = torch.stack(
        [value for item in items for row in item.rows for value in row_logprobs(before, row)]
    )
    logprobs.backward(torch.from_numpy(recorder.found()["gradient"]))  # type: ignore[no-untyped-call]
    for ours, theirs in zip(spy.gradients[0], before.parameters(), strict=True):
        assert theirs.grad is not None
        torch.testing.assert_close(ours, theirs.grad, rtol=2e-4, atol=2e-6)


def test_a_recorder_changes_no_bit_of_the_step() -> None:
    flat, weights = flat_of(make_items()), []
    for has_recorder in (False, True):
        trainer = make_trainer("decoupled", 2)
        if has_recorder:
            recorder = TokenRecorder(trainer)
            recorder.begin(flat)
        trainer.take_step(flat, NOW.step)
        weights.append([p.detach().clone() for p in trainer.model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


@pytest.mark.parametrize(("preset", "num_parts"), [("paper", 1), ("decoupled", 3)])
def test_tokens_that_are_not_finite_are_named(preset: str, num_parts: int) -> None:
    trainer, flat = make_trainer(preset, num_parts), flat_of(make_items())
    recorder = TokenRecorder(trainer)
    with torch.no_grad():
        weight = dict(trainer.model.named_parameters())["model.norm.weight"]
        weight[0] = torch.nan
    recorder.begin(flat)
    with pytest.raises(NumericsError):
        trainer.take_step(flat, NOW.step)
    recorder.take()
    _, actions = split_lifecycles(flat, num_parts)[0]
    assert {STATES[number] for number in recorder.found()["state"][actions]} == {"nonfinite"}


def test_records_of_a_step_are_kept_and_bounded(tmp_path: Path, config: Config) -> None:
    items = make_items()
    items[5] = msgspec.structs.replace(items[5], is_context=True)
    flat = flat_of(items)
    found = tokens_of(make_trainer("paper"), flat, None)
    learner = msgspec.structs.replace(config.learner, max_token_records_bytes=1)
    small = msgspec.structs.replace(config, learner=learner)
    for step in (8, 9):
        keep_records(tmp_path, small, Version(0, step), items, found)
    assert [path.name for path in (tmp_path / "token_records").iterdir()] == [
        records_file(tmp_path, NOW).name
    ]
    for index, item in enumerate(items):
        (one,) = read_token_records(tmp_path, item.key)
        assert one.version == NOW
        expected = [] if item.is_context else [v for row in item.rows for v in row.behavior_logprobs.numpy()]
        assert one.tokens["behavior_logprob"].tolist() == [float(value) for value in expected]
        if not item.is_context:
            assert math.isclose(one.tokens["advantage"][0], item.advantage, rel_tol=1e-6)
        assert (one.state_names == ["no_advantage"] * len(expected)) == (index == 7 or not expected)
