"""Every switch of segment_loss against a token-by-token NumPy transcription of the README's table."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from host_reads import host_reads_of

from cod_kernels import merge_metrics, segment_loss, summarize_metrics
from cod_kernels.segment_loss.op import loss_inputs
from cod_kernels.segment_loss.reference import LossOptions, loss_gradient_and_metrics

COUNT, SEGMENTS = 600, 17

CLIPS: list[dict[str, Any]] = [
    {"clip": "one_side"},
    {"clip": "none"},
    {"clip": "ppo"},
    {"clip": "ppo", "eps_low": 0.1, "eps_high": 0.28, "dual_clip": 1.4},
    {"clip": "cispo", "eps_low": 0.9, "eps_high": 0.3},
    {"clip": "dppo_tv", "tv_bound": 0.05},
    {"clip": "dppo_tv", "tv_bound": 0.1, "log_ratio_coef": 0.2},
    {"clip": "m2po", "m2po_bound": 0.25},
    {"clip": "topr"},
]
SEGMENT_CLIPS: list[dict[str, Any]] = [
    {"clip": "one_side", "log_ratio_coef": 0.1},
    {"clip": "ppo", "eps_low": 0.1, "eps_high": 0.2},
    {"clip": "ppo", "dual_clip": 1.3},
    {"clip": "cispo", "eps_low": 0.05, "eps_high": 0.1},
    {"clip": "topr"},
]
"""Clips that take one ratio per segment."""
WEIGHTS: list[dict[str, Any]] = [
    {"behavior_weight": "none"},
    {"behavior_weight": "truncated", "weight_cap": 1.1},
    {"behavior_weight": "masked", "weight_floor": 0.8, "weight_cap": 1.3},
]
KLS: list[dict[str, Any]] = [{"kl_coef": 0.0}, *({"kl_coef": 0.3, "kl": k} for k in ("k1", "k2", "k3"))]


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(1.0, COUNT)
    proximal = behavior + rng.normal(0, 0.2, COUNT)
    current = proximal + rng.normal(0, 0.3, COUNT)
    current[:2] = proximal[:2] + np.array([25.0, -25.0])
    ids = rng.integers(0, SEGMENTS, COUNT)
    advantages = rng.normal(0, 1, SEGMENTS).round(1)
    advantages[3] = 0.0
    return {
        "current_logprobs": current,
        "behavior_logprobs": behavior,
        "segment_ids": ids,
        "advantages": advantages,
        "weights": rng.uniform(0.5, 1.5, SEGMENTS) / COUNT,
        "proximal_logprobs": proximal,
        "reference_logprobs": behavior + rng.normal(0, 0.4, COUNT),
    }


def clamp(x: float) -> float:
    return min(max(x, -20.0), 20.0)


def policy_term(
    a: float, cur: float, anchor: float, difference: float, o: dict[str, Any]
) -> tuple[float, float]:
    """Objective and slope of one token for one part of its advantage."""
    log_ratio = clamp(difference)
    ratio, inside = math.exp(log_ratio), abs(difference) <= 20
    low, high = 1 - o.get("eps_low", 0.2), 1 + o.get("eps_high", 0.2)
    kind = o["clip"]
    if kind == "none" or a == 0:
        return a * cur, a
    if kind == "one_side":
        keep = ratio <= high if a > 0 else ratio >= low
        return keep * a * cur, keep * a
    if kind == "cispo":
        factor = min(max(ratio, low), high)
        return factor * a * cur, factor * a
    if kind == "topr":
        factor = min(ratio, 1.0) if a < 0 else 1.0
        return factor * a * cur, factor * a
    if kind == "dppo_tv":
        moved = math.exp(cur) - math.exp(anchor)
        keep = moved <= o["tv_bound"] if a > 0 else moved >= -o["tv_bound"]
        return keep * a * ratio, keep * a * ratio * inside
    if kind == "m2po":
        low, high = math.exp(-o["m2po_bound"]), math.exp(o["m2po_bound"])
    if a > 0:
        return a * min(ratio, high), a * ratio * (ratio <= high and inside)
    dual = o.get("dual_clip") or math.inf
    return a * min(max(ratio, low), dual), a * ratio * (low <= ratio <= dual and inside)


def transcription(data: dict[str, np.ndarray], o: dict[str, Any]) -> tuple[float, np.ndarray]:
    loss, gradient = 0.0, np.zeros(COUNT)
    for t, s in enumerate(data["segment_ids"]):
        cur, beh = data["current_logprobs"][t], data["behavior_logprobs"][t]
        prox = data["proximal_logprobs"][t] if "proximal_logprobs" in data else None
        if "proximal_mix" in data:
            prox = beh + data["proximal_mix"][t] * (cur - beh)
        anchor = beh if prox is None else prox
        difference = data["segment_log_ratios"][s] if "segment_log_ratios" in data else cur - anchor
        parts = [data["advantages"][s]]
        if "negative_advantages" in data:
            parts.append(data["negative_advantages"][s])
        terms = [policy_term(a, cur, anchor, difference, o) for a in parts]
        value, slope = sum(v for v, _ in terms), sum(g for _, g in terms)
        w = math.exp(clamp(cur - beh if prox is None else prox - beh))
        if o["behavior_weight"] == "truncated":
            factor = min(w, o["weight_cap"])
        elif o["behavior_weight"] == "masked":
            factor = w if o["weight_floor"] <= w <= o["weight_cap"] else 0.0
        else:
            factor = 1.0
        token, grad = -factor * value, -factor * slope
        drift = clamp(cur - beh)
        token += o.get("log_ratio_coef", 0.0) * drift**2
        grad += o.get("log_ratio_coef", 0.0) * 2 * drift * (abs(cur - beh) <= 20)
        if o["kl_coef"]:
            gap = data["reference_logprobs"][t] - cur
            r, inside = clamp(gap), abs(gap) <= 20
            value, slope = {
                "k1": (-r, 1.0),
                "k2": (r * r / 2, -r),
                "k3": (math.exp(r) - r - 1, 1 - math.exp(r)),
            }[o["kl"]]
            token += o["kl_coef"] * value
            grad += o["kl_coef"] * slope * inside
        loss += data["weights"][s] * token
        gradient[t] = data["weights"][s] * grad
    return loss, gradient


def tensors(data: dict[str, np.ndarray], dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    return {
        k: torch.from_numpy(v) if k == "segment_ids" else torch.from_numpy(v).to(dtype)
        for k, v in data.items()
    }


@pytest.mark.parametrize("is_split", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("anchor", ["behavior", "proximal", "mix"])
@pytest.mark.parametrize("clip", CLIPS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_mode_against_numpy(clip: dict[str, Any], anchor: str, is_split: bool) -> None:
    data = arrays()
    is_decoupled = anchor != "behavior"
    if anchor != "proximal":
        del data["proximal_logprobs"]
    if anchor == "mix":
        data["proximal_mix"] = np.random.default_rng(2).choice([0.0, 0.5, 0.75], COUNT)
    if is_split:
        rng = np.random.default_rng(1)
        data["advantages"], data["negative_advantages"] = (
            rng.exponential(1, SEGMENTS),
            -rng.exponential(1, SEGMENTS),
        )
    for weight, kl in itertools.product(WEIGHTS, KLS):
        if (
            not is_decoupled
            and weight["behavior_weight"] != "none"
            and clip["clip"] not in ("one_side", "none")
        ):
            continue
        options = clip | weight | kl
        expected, gradient = transcription(data, options)
        given = tensors(data)
        leaf = given["current_logprobs"].requires_grad_()
        loss, metrics = segment_loss(**given, **options)  # type: ignore[arg-type]
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-11)
        np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=1e-11, atol=1e-15)  # type: ignore[union-attr]
        named = summarize_metrics(metrics)
        clamped = (1 - data["proximal_mix"][:2]) * 25 > 20 if anchor == "mix" else np.array([True, True])
        assert named["num_clamped"] == clamped.sum()


@pytest.mark.parametrize("is_decoupled", [False, True], ids=["behavior", "proximal"])
@pytest.mark.parametrize("clip", SEGMENT_CLIPS, ids=lambda o: "-".join(map(str, o.values())))
def test_one_ratio_per_segment_against_numpy(clip: dict[str, Any], is_decoupled: bool) -> None:
    data = arrays() | {"segment_log_ratios": np.random.default_rng(4).normal(0, 0.2, SEGMENTS)}
    data["segment_log_ratios"][5] = 21.0
    if not is_decoupled:
        del data["proximal_logprobs"]
    for kl in KLS:
        options = clip | kl | {"behavior_weight": "none"}
        expected, gradient = transcription(data, options)
        given = tensors(data)
        leaf = given["current_logprobs"].requires_grad_()
        loss, metrics = segment_loss(**given, **options)
        loss.backward()
        assert loss.item() == pytest.approx(expected, rel=1e-11)
        np.testing.assert_allclose(leaf.grad.numpy(), gradient, rtol=1e-11, atol=1e-15)  # type: ignore[union-attr]
        assert summarize_metrics(metrics)["num_clamped"] == (data["segment_ids"] == 5).sum()


def test_a_segment_ratio_has_the_gradient_of_the_geometric_mean() -> None:
    """GSPO written down whole, sequence by sequence (arXiv 2507.18071, equations 5 to 7), under autograd."""
    data = arrays(3)
    current, behavior = data["current_logprobs"].copy(), data["behavior_logprobs"]
    current[:2] = behavior[:2]
    ids, sizes = data["segment_ids"], np.bincount(data["segment_ids"], minlength=SEGMENTS)
    leaf = torch.from_numpy(current.copy()).requires_grad_()
    truth = torch.zeros((), dtype=torch.float64)
    for s in range(SEGMENTS):
        of = torch.from_numpy(np.flatnonzero(ids == s))
        ratio = ((leaf[of] - torch.from_numpy(behavior)[of]).sum() / len(of)).exp()
        a = float(data["advantages"][s])
        truth = truth - torch.minimum(ratio * a, ratio.clamp(0.95, 1.1) * a) / SEGMENTS
    truth.backward()
    means = np.bincount(ids, weights=current - behavior, minlength=SEGMENTS) / sizes
    ours = torch.from_numpy(current.copy()).requires_grad_()
    given = tensors(data | {"weights": 1 / (SEGMENTS * sizes), "segment_log_ratios": means})
    del given["proximal_logprobs"]
    loss, _ = segment_loss(
        **(given | {"current_logprobs": ours}),
        clip="ppo",
        eps_low=0.05,
        eps_high=0.1,  # type: ignore[arg-type]
    )
    loss.backward()
    assert loss.item() == pytest.approx(truth.item(), rel=1e-12)
    assert torch.allclose(ours.grad, leaf.grad, rtol=1e-12, atol=1e-17)  # type: ignore[arg-type]
    assert 0 < int((leaf.grad == 0).sum()) < COUNT


def test_a_share_of_one_is_the_current_log_prob_itself() -> None:
    """Ratio exactly 1, weight current / behaviour: the decoupled objective of one update per batch."""
    data = arrays()
    del data["proximal_logprobs"]
    data["proximal_mix"] = np.ones(COUNT)
    for dtype in (torch.float64, torch.float32):
        given = tensors(data, dtype)
        leaf = given["current_logprobs"].requires_grad_()
        loss, metrics = segment_loss(**given, clip="ppo", behavior_weight="truncated", weight_cap=1.5)  # type: ignore[arg-type]
        loss.backward()
        named = summarize_metrics(metrics)
        assert named["ratio_max"] == named["ratio_min"] == 1
        assert named["masked_frac"] == 0
        ids = given["segment_ids"]
        ratio = (leaf.detach() - given["behavior_logprobs"]).clamp(-20, 20).exp().clamp(max=1.5)
        expected = -given["weights"][ids] * given["advantages"][ids] * ratio
        assert torch.allclose(leaf.grad, expected, rtol=1e-6)  # type: ignore[arg-type]


def test_parts_are_the_sum_over_branches() -> None:
    """A prefix shared by three branches counts once, with the sums of their advantages by sign."""
    data = arrays()
    branches = np.random.default_rng(5).normal(size=(3, SEGMENTS))
    for switches in CLIPS:
        clip = switches | {"log_ratio_coef": 0.0}  # a price on every token, whatever its advantage
        total, gradient = 0.0, torch.zeros(COUNT, dtype=torch.float64)
        for row in branches:
            given = tensors(data | {"advantages": row})
            leaf = given["current_logprobs"].requires_grad_()
            loss, _ = segment_loss(**given, **clip)  # type: ignore[arg-type]
            loss.backward()
            total, gradient = total + loss.item(), gradient + leaf.grad  # type: ignore[operator]
        parts = {"advantages": branches.clip(0).sum(0), "negative_advantages": branches.clip(None, 0).sum(0)}
        given = tensors(data | parts)
        leaf = given["current_logprobs"].requires_grad_()
        loss, _ = segment_loss(**given, **clip)  # type: ignore[arg-type]
        loss.backward()
        assert loss.item() == pytest.approx(total, rel=1e-12)
        assert torch.allclose(leaf.grad, gradient, rtol=1e-12, atol=1e-16)  # type: ignore[arg-type]


def test_bound_may_be_a_tensor_and_lengths_vary() -> None:
    given = tensors(arrays())
    first = segment_loss(**given, clip="m2po", m2po_bound=0.3)  # type: ignore[arg-type]
    second = segment_loss(**given, clip="m2po", m2po_bound=torch.tensor(0.3, dtype=torch.float64))  # type: ignore[arg-type]
    assert torch.equal(first[1], second[1])


def test_aggregations_are_weights() -> None:
    """Token mean, segment mean, sum per segment and fixed length differ in the weights alone."""
    data = arrays()
    ids, cur = data["segment_ids"], data["current_logprobs"]
    sizes = np.bincount(ids, minlength=SEGMENTS)
    token = -data["advantages"][ids] * cur
    per_segment = [token[ids == s] for s in range(SEGMENTS)]
    ways = {
        "token mean": (np.full(SEGMENTS, 1 / COUNT), token.mean()),
        "segment mean": (1 / (SEGMENTS * sizes), np.mean([x.mean() for x in per_segment])),
        "segment sum": (np.full(SEGMENTS, 1 / SEGMENTS), np.mean([x.sum() for x in per_segment])),
        "fixed length": (
            np.full(SEGMENTS, 1 / (SEGMENTS * 64)),
            np.mean([x.sum() / 64 for x in per_segment]),
        ),
    }
    for weights, expected in ways.values():
        loss, _ = segment_loss(**tensors(data | {"weights": weights}), clip="none")  # type: ignore[arg-type]
        assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_loss_gradient_and_metrics_read_nothing_back() -> None:
    given = tensors(arrays(), torch.float32)
    segments = {"advantages": given["advantages"], "weights": given["weights"], "negative_advantages": None}
    tokens = {"entropy": None} | {k: v for k, v in given.items() if k.endswith("logprobs")}
    inputs = loss_inputs(given["current_logprobs"], tokens, given["segment_ids"], segments, 0.3)  # type: ignore[arg-type]
    for clip in CLIPS:
        options = LossOptions(clip=clip["clip"], behavior_weight="masked", kl_coef=0.1)

        def run(options: LossOptions = options) -> None:
            merge_metrics([loss_gradient_and_metrics(inputs, options)[2] for _ in range(2)])

        assert host_reads_of(run) == []
    metrics = loss_gradient_and_metrics(inputs, LossOptions())[2]
    assert host_reads_of(lambda: metrics[0].item()) == ["_local_scalar_dense"]
