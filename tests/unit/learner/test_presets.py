"""Every loss preset, whole: the learner's loss and gradient against the recipe in NumPy and fp64.

The model is in fp64 and small. Its log-probs and their Jacobian come from torch, row by row; everything after
them is a transcription of docs/losses/, preset by preset, that shares no code with the learner. One segment
has several rows, and rows lie in micro-batches by length, so that it lies in several of them.
"""

from __future__ import annotations

import copy
import math
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from learner_world import VOCAB, tiny_model

from cod_async.config.presets import PRESETS
from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.learner.gaps import LAG_NAMES
from cod_async.learner.packing import FlatRows, flatten, split_lifecycles
from cod_async.learner.selftest import random_items
from cod_async.learner.step import Trainer
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import SegmentKey, Version, VersionSpan
from cod_async.models.qwen3 import Qwen3
from cod_async.wire.messages import TrainItem

STEP = 9
NOW = Version(0, STEP)
Numbers = Any
"""NumPy arrays."""


def action_logprobs(model: Qwen3, items: list[TrainItem]) -> tuple[list[torch.Tensor], list[int]]:
    """Log-prob of every action token, one row at a time, and the item that it belongs to."""
    found, owners = [], []
    for index, item in enumerate(items):
        for row in item.rows:
            ids = torch.from_numpy(row.token_ids.numpy().astype("int64"))
            logprobs = torch.log_softmax(model.logits(ids[None])[0] / 0.8, -1)
            for start, stop in row.action_spans:
                found += [logprobs[p - 1, ids[p]] for p in range(start, stop)]
                owners += [index] * (stop - start)
    return found, owners


def make_items(spread: float = 0.25, count: int = 15) -> list[TrainItem]:
    """Stale items of odd sizes: behaviour log-probs lie around the model's own, lags from 0 to 9."""
    model, rng = tiny_model().double(), np.random.default_rng(3)
    items = random_items(count, vocab_size=VOCAB, min_tokens=3, max_tokens=17)
    items[4] = msgspec.structs.replace(items[4], rows=(*items[4].rows, *items[5].rows, *items[6].rows))
    result = []
    for index, item in enumerate(items):
        shift = rng.normal(0, 0.15)
        rows = []
        for row in item.rows:
            own, _ = action_logprobs(model, [msgspec.structs.replace(item, rows=(row,))])
            noise = rng.normal(shift, spread, len(own))
            behavior = np.minimum(np.array([float(v.detach()) for v in own]) + noise, -1e-3)
            first = int(rng.integers(0, len(own) + 1))
            steps = sorted(rng.integers(0, STEP + 1, 2).tolist())
            spans = [
                VersionSpan(Version(0, s), n) for s, n in zip(steps, (first, len(own) - first), strict=True)
            ]
            rows.append(
                msgspec.structs.replace(
                    row,
                    behavior_logprobs=Array.of(behavior, "<f4"),
                    teacher_logprobs=Array.of(1.3 * behavior - 0.1, "<f4"),  # read by opd alone
                    versions=tuple(span for span in spans if span.num_tokens),
                )
            )
        oldest = min(span.version.step for row in rows for span in row.versions)
        result.append(
            msgspec.structs.replace(
                item,
                key=SegmentKey(0, index, 0),
                rows=tuple(rows),
                lag_steps=float(STEP - oldest),
                advantage=0.0 if index == 2 else item.advantage,
            )
        )
    return result


def flat_of(items: list[TrainItem]) -> FlatRows:
    return flatten(items, vocab_size=VOCAB, version=NOW)


def clamped(x: Numbers) -> Numbers:
    return np.clip(x, -20, 20)


def transcription(
    name: str, cur: Numbers, beh: Numbers, lag: Numbers, ids: Numbers, adv: Numbers, teacher: Numbers
) -> tuple[float, Numbers]:
    """Loss and its slope in every log-prob, by the formulas of docs/losses/, for one update per step."""
    sizes = np.bincount(ids, minlength=adv.size)
    used = max(int((sizes > 0).sum()), 1)
    a, total = adv[ids], cur.size
    rho = np.exp(clamped(cur - beh))
    mean = np.bincount(ids, weights=cur - beh, minlength=adv.size) / np.maximum(sizes, 1)
    up, down = a > 0, a < 0

    def ppo(r: Numbers, low: float, high: float, weight: Numbers | float = 1.0) -> tuple[Numbers, Numbers]:
        value = np.minimum(r * a, np.clip(r, low, high) * a)
        inside = ~((up & (r > high)) | (down & (r < low)))
        return weight * value, weight * a * r * inside

    one = np.ones(total)
    if name == "paper":
        keep = ((a >= 0) & (rho <= 1.2)) | ((a <= 0) & (rho >= 0.8))
        value, slope = keep * a * cur, keep * a
    elif name == "ppo":
        value, slope = ppo(rho, 0.8, 1.2)
    elif name == "decoupled":
        value, slope = ppo(one, 0.8, 1.2, rho * (rho <= 5))
    elif name == "a3po":
        alpha = np.where(lag > 1, (lag - 1) / np.maximum(lag, 1), 0)
        w = np.exp(clamped(alpha * (cur - beh)))
        value, slope = ppo(np.exp(clamped((1 - alpha) * (cur - beh))), 0.8, 1.2, w * (w <= 5))
    elif name == "tis_token":
        value, slope = ppo(one, 0.8, 1.2, np.minimum(rho, 2))
    elif name == "tis_segment":
        value, slope = ppo(one, 0.8, 1.2, np.minimum(np.exp(mean), 2)[ids])
    elif name == "icepop":
        value, slope = ppo(one, 0.8, 1.2, rho * ((rho >= 0.5) & (rho <= 5)))
    elif name == "geo_mask":
        keep = ((np.exp(mean) >= 0.8) & (np.exp(mean) <= 1.25))[ids]
        value, slope = ppo(one, 0.8, 1.2, keep * np.minimum(rho, 5))
    elif name == "gspo":
        value, slope = ppo(np.exp(mean)[ids], 1 - 3e-4, 1 + 4e-4)
    elif name == "cispo":
        factor = np.clip(rho, 0, 1.2)
        value, slope = factor * a * cur, factor * a
    elif name == "dppo_tv":
        move = np.exp(cur) - np.exp(beh)
        keep = ~((up & (move > 0.2)) | (down & (move < -0.2)))
        price = clamped(cur - beh)
        value, slope = keep * rho * a - 1e-3 * price**2, keep * rho * a - 2e-3 * price
    elif name == "m2po":
        counted = (up & (cur > beh)) | (down & (cur < beh))
        t = 20.0
        if ((cur - beh)[counted] ** 2).mean() > 0.04:
            low_t, high_t = 0.0, 20.0
            for _ in range(200):
                t = (low_t + high_t) / 2
                is_within = (np.minimum(np.abs(cur - beh)[counted], t) ** 2).mean() <= 0.04
                low_t, high_t = (t, high_t) if is_within else (low_t, t)
        value, slope = ppo(rho, min(math.exp(-t), 0.7), max(math.exp(t), 1.5))
    elif name == "topr":
        factor = np.where(down, np.minimum(rho, 1), 1.0)
        value, slope = factor * a * cur, factor * a
    elif name == "opsm":
        keep = ~((a < 0) & (-mean[ids] > 1e-4))
        value, slope = ppo(rho, 0.8, 1.2, keep.astype(float))
    elif name == "opd":
        value, slope = -((cur - teacher) ** 2) / 2, teacher - cur
    else:
        raise AssertionError(name)
    weight = 1 / (used * sizes[ids]) if name == "gspo" else np.full(total, 1 / total)
    return float(-(weight * value).sum()), -weight * slope


def expected_of(name: str, items: list[TrainItem]) -> tuple[float, list[torch.Tensor]]:
    model = tiny_model().double()
    logprobs, owners = action_logprobs(model, items)
    flat = flat_of(items)
    assert flat.teacher_logprobs is not None
    current = torch.stack(logprobs)
    loss, slope = transcription(
        name,
        current.detach().numpy(),
        flat.behavior_logprobs.astype(np.float64),
        flat.action_lags.astype(np.float64),
        np.array(owners),
        flat.advantages,
        flat.teacher_logprobs.astype(np.float64),
    )
    current.backward(torch.from_numpy(slope))
    return loss, [p.grad for p in model.parameters() if p.grad is not None]


def relative(ours: list[torch.Tensor], truth: list[torch.Tensor]) -> float:
    apart = sum(float((a.double() - b.double()).square().sum()) for a, b in zip(ours, truth, strict=True))
    return math.sqrt(apart / sum(float(b.double().square().sum()) for b in truth))


def gradients(
    name: str, items: list[TrainItem], budget: int, *, is_wide: bool = True
) -> tuple[float, list[torch.Tensor], int]:
    model = tiny_model().double() if is_wide else tiny_model()
    trainer = Trainer.create(
        model, LearnerConfig(tokens_per_micro_batch=budget), LossConfig(preset=name), 0.8
    )
    done = trainer.accumulate(flat_of(items))
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return float(torch.stack(done.losses).sum()), grads, len(done.losses)


@pytest.mark.parametrize("name", PRESETS)
def test_loss_and_gradient_are_those_of_the_formula(name: str) -> None:
    items = make_items()
    expected, truth = expected_of(name, items)
    for budget in (20, 100_000):
        loss, grads, num_batches = gradients(name, items, budget)
        assert num_batches > 5 or budget > 20
        assert loss == pytest.approx(expected, rel=1e-9, abs=1e-11)
        assert relative(grads, truth) < 1e-9


@pytest.mark.parametrize("name", PRESETS)
def test_it_does_not_matter_how_a_step_is_cut(name: str) -> None:
    """In float32, as it trains; the segments of one item lie in several micro-batches."""
    items = make_items()
    loss, grads, _ = gradients(name, items, 100_000, is_wide=False)
    for budget in (20, 40):
        other, cut, _ = gradients(name, items, budget, is_wide=False)
        assert other == pytest.approx(loss, rel=1e-6, abs=1e-7)
        assert relative(cut, grads) < 1e-6


@pytest.mark.parametrize("name", PRESETS)
def test_arrival_order_changes_no_bit(name: str) -> None:
    items = make_items()
    shuffled = [items[i] for i in np.random.default_rng(0).permutation(len(items))]
    first = gradients(name, items, 40, is_wide=False)
    second = gradients(name, sorted(shuffled, key=lambda item: item.key), 40, is_wide=False)
    assert first[0] == second[0]
    assert all(torch.equal(a, b) for a, b in zip(first[1], second[1], strict=True))


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_a_step_is_finite_and_moves_the_weights(name: str, num_parts: int) -> None:
    model = tiny_model()
    before = copy.deepcopy(model.state_dict())
    learner = LearnerConfig(lr=1e-3, tokens_per_micro_batch=64, minibatches_per_step=num_parts)
    metrics = Trainer.create(model, learner, LossConfig(preset=name), 0.8).take_step(
        flat_of(make_items()), STEP
    )
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["num_updates"] == num_parts
    assert metrics["grad_norm"] > 0
    assert any(not torch.equal(before[k], v) for k, v in model.state_dict().items())
    assert 0 <= metrics["masked_frac"] <= 1
    assert sum(metrics[f"lag_{name}_tokens_frac"] for name in LAG_NAMES) == pytest.approx(1)
    if name in ("gspo", "m2po", "opsm"):
        assert metrics["masked_frac"] > 0
    if name in ("tis_segment", "tis_token", "decoupled"):
        assert 0.5 < metrics["behavior_weight_mean"] < 2


def test_exact_proximal_log_probs_matter_only_between_updates() -> None:
    """With one update the ratio is 1 without a pass; with more, it is taken against the starting weights."""
    items, loss = make_items(), LossConfig(preset="decoupled")
    flat = flat_of(items)
    for num_parts, is_moved in ((1, False), (3, True)):
        learner = LearnerConfig(lr=3e-2, minibatches_per_step=num_parts)
        metrics = Trainer.create(tiny_model(), learner, loss, 0.8).take_step(flat, STEP)
        is_one = metrics["ratio_max"] == metrics["ratio_min"] == 1
        assert is_one is not is_moved


def test_the_second_update_against_its_formula() -> None:
    """Decoupled PPO on the second of two mini-batches: proximal = the weights before the first."""
    items, loss = make_items(), LossConfig(preset="decoupled")
    flat = flat_of(items)
    model = tiny_model().double()
    learner = LearnerConfig(lr=5e-2, minibatches_per_step=2)
    trainer = Trainer.create(model, learner, loss, 0.8)
    start = trainer.logprobs(flat).numpy()
    (first, _), (second, actions) = split_lifecycles(flat, 2)
    trainer._update(first, STEP, torch.from_numpy(start[: first.num_action_tokens]))
    mid = trainer.logprobs(second).numpy()
    done = trainer.accumulate(second, start=torch.from_numpy(start[actions]))
    prox, beh = start[actions], second.behavior_logprobs.astype(np.float64)
    a, ratio, weight = second.advantages[second.action_items], np.exp(mid - prox), np.exp(prox - beh)
    assert np.abs(ratio - 1).max() > 0.2
    value = weight * (weight <= 5) * np.minimum(ratio * a, np.clip(ratio, 0.8, 1.2) * a)
    assert float(torch.stack(done.losses).sum()) == pytest.approx(-value.mean(), rel=1e-9)


@pytest.mark.parametrize("num_parts", [1, 2, 4, 99])
def test_parts_of_a_step_hold_every_token_once(num_parts: int) -> None:
    flat = flat_of(make_items())
    parts = split_lifecycles(flat, num_parts)
    assert len(parts) <= min(num_parts, 15)
    assert sorted(np.concatenate([actions for _, actions in parts]).tolist()) == list(
        range(flat.num_action_tokens)
    )
    for part, actions in parts:
        rows = flat.starts[flat.action_rows[actions]]
        assert (part.starts[part.action_rows] == rows).all()
        assert (part.action_items == flat.action_items[actions]).all()
        assert part.num_tokens == part.lengths.sum()
    items = [set(part.action_items.tolist()) for part, _ in parts]
    assert sum(len(of) for of in items) == len(set.union(*items))
    if num_parts == 2:
        sizes = [part.num_action_tokens for part, _ in parts]
        assert max(sizes) < 0.7 * flat.num_action_tokens


def test_gaps_against_a_loop_over_tokens() -> None:
    items = make_items()
    flat = flat_of(items)
    trainer = Trainer.create(tiny_model(), LearnerConfig(lr=1e-4), LossConfig(ess_lr_power=0.5), 0.8)
    current = trainer.logprobs(flat).numpy().astype(np.float64)
    metrics = trainer.take_step(flat, STEP)
    gap = current - flat.behavior_logprobs.astype(np.float64)
    lag, ratio = flat.action_lags, np.exp(gap)
    k3 = ratio - gap - 1
    assert {0, 1, 2} < set(lag.tolist())
    fresh, stale = lag == 0, lag > 0
    expected = {
        "mismatch_abs_nats": np.abs(gap[fresh]).mean(),
        "mismatch_k1_nats": -gap[fresh].mean(),
        "mismatch_k3_nats": k3[fresh].mean(),
        "staleness_abs_nats": np.abs(gap[stale]).mean(),
        "staleness_k3_nats": k3[stale].mean(),
        "kl_drift_per_version_nats": k3[stale].sum() / lag[stale].sum(),
        "token_lag_mean": lag.mean(),
        "ess_frac": ratio.sum() ** 2 / (ratio.size * (ratio**2).sum()),
    }
    buckets = [(0, 0), (1, 1), (2, 2), (3, 4), (5, 8), (9, 16), (17, 32), (33, 10**9)]
    for name, (low, high) in zip(LAG_NAMES, buckets, strict=True):
        here = (lag >= low) & (lag <= high)
        expected[f"lag_{name}_tokens_frac"] = here.mean()
        if here.any():
            r = ratio[here]
            expected[f"lag_{name}_ratio_mean"] = r.mean()
            expected[f"lag_{name}_ess_frac"] = r.sum() ** 2 / (r.size * (r**2).sum())
            expected[f"lag_{name}_kl_nats"] = k3[here].mean()
        else:
            assert f"lag_{name}_ratio_mean" not in metrics
    segment_ratio = np.exp(np.array([gap[flat.action_items == s].mean() for s in range(len(items))]))
    expected["ess_segments_frac"] = segment_ratio.sum() ** 2 / (len(items) * (segment_ratio**2).sum())
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(value, rel=2e-5, abs=1e-7), name
    assert metrics["lr"] == pytest.approx(1e-4 * math.sqrt(metrics["ess_frac"]), rel=1e-6)


def test_masked_fractions_count_segments_that_are_left_out() -> None:
    items = make_items()
    flat = flat_of(items)
    metrics = Trainer.create(
        tiny_model(), LearnerConfig(lr=1e-4), LossConfig(preset="geo_mask"), 0.8
    ).take_step(flat, STEP)
    trainer = Trainer.create(tiny_model(), LearnerConfig(), LossConfig(), 0.8)
    gap = trainer.logprobs(flat).numpy().astype(np.float64) - flat.behavior_logprobs
    ids, a = flat.action_items, flat.advantages[flat.action_items]
    mean = np.exp([gap[ids == s].mean() for s in range(len(items))])
    gone = ~((mean >= 0.8) & (mean <= 1.25))[ids]
    assert gone.any()
    assert metrics["masked_positive_frac"] == pytest.approx((gone & (a > 0)).sum() / (a > 0).sum())
    assert metrics["masked_negative_frac"] == pytest.approx((gone & (a < 0)).sum() / (a < 0).sum())
    assert metrics["segment_masked_frac"] == pytest.approx((gone & (a != 0)).mean())


@pytest.mark.parametrize("name", ["opsm", "decoupled", "a3po"])
def test_the_drift_that_masks_is_from_the_behavior_policy(name: str) -> None:
    """With one update the proximal policy is the current one: from there nothing would ever have drifted."""
    items, loss = make_items(), LossConfig(preset=name, segment_mask="negative_drift")  # type: ignore[arg-type]
    flat = flat_of(items)
    trainer = Trainer.create(tiny_model(), LearnerConfig(lr=1e-4), loss, 0.8)
    gap = trainer.logprobs(flat).numpy().astype(np.float64) - flat.behavior_logprobs
    ids, a = flat.action_items, flat.advantages
    gone = np.array([a[s] < 0 and -gap[ids == s].mean() > 1e-4 for s in range(len(items))])[ids]
    assert 0 < gone.sum() < (a[ids] < 0).sum()
    metrics = trainer.take_step(flat, STEP)
    assert metrics["segment_masked_frac"] == pytest.approx(gone.mean())


def test_lags_across_lineages() -> None:
    """Of its own lineage a token's lag is exact; elsewhere it is counted from the oldest one's, as given."""
    (item,) = random_items(1, vocab_size=VOCAB, min_tokens=12, max_tokens=12)
    (row,) = item.rows
    spans = ((Version(0, 4), 3), (Version(0, 6), 2), (Version(1, 6), row.num_action_tokens - 5))
    row = msgspec.structs.replace(row, versions=tuple(VersionSpan(v, n) for v, n in spans))
    item = msgspec.structs.replace(item, rows=(row,), lag_steps=5.0)
    flat = flatten([item], vocab_size=VOCAB, version=Version(1, 8))
    assert flat.action_lags.tolist() == [5] * 3 + [3] * 2 + [2] * (row.num_action_tokens - 5)
