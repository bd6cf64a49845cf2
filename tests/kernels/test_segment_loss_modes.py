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
    {"clip": "m2po", "m2po_bound": 0.25},
]
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


def policy_term(a: float, cur: float, anchor: float, o: dict[str, Any]) -> tuple[float, float]:
    """Objective and slope of one token for one part of its advantage."""
    log_ratio = clamp(cur - anchor)
    ratio, inside = math.exp(log_ratio), abs(cur - anchor) <= 20
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
        anchor = beh if prox is None else prox
        parts = [data["advantages"][s]]
        if "negative_advantages" in data:
            parts.append(data["negative_advantages"][s])
        terms = [policy_term(a, cur, anchor, o) for a in parts]
        value, slope = sum(v for v, _ in terms), sum(g for _, g in terms)
        w = math.exp(clamp(cur - beh if prox is None else prox - beh))
        if o["behavior_weight"] == "truncated":
            factor = min(w, o["weight_cap"])
        elif o["behavior_weight"] == "masked":
            factor = w if o["weight_floor"] <= w <= o["weight_cap"] else 0.0
        else:
            factor = 1.0
        token, grad = -factor * value, -factor * slope
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
@pytest.mark.parametrize("is_decoupled", [False, True], ids=["behavior", "proximal"])
@pytest.mark.parametrize("clip", CLIPS, ids=lambda o: "-".join(map(str, o.values())))
def test_every_mode_against_numpy(clip: dict[str, Any], is_decoupled: bool, is_split: bool) -> None:
    data = arrays()
    if not is_decoupled:
        del data["proximal_logprobs"]
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
        assert named["num_clamped"] == 2


def test_parts_are_the_sum_over_branches() -> None:
    """A prefix shared by three branches counts once, with the sums of their advantages by sign."""
    data = arrays()
    branches = np.random.default_rng(5).normal(size=(3, SEGMENTS))
    for clip in CLIPS:
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
