"""What is said of single tokens adds up to what the loss says of all of them, for every switch."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from cod_kernels.segment_loss.op import loss_inputs
from cod_kernels.segment_loss.reference import (
    METRIC_NAMES,
    LossInputs,
    LossOptions,
    loss_gradient_and_metrics,
    segment_loss_reference,
)
from cod_kernels.segment_loss.states import token_states

COUNT, SEGMENTS = 400, 13
CLIPS: list[dict[str, Any]] = [
    {"clip": "one_side"},
    {"clip": "none"},
    {"clip": "ppo", "dual_clip": 1.4},
    {"clip": "cispo", "eps_low": 0.9, "eps_high": 0.3},
    {"clip": "dppo_tv", "tv_bound": 0.05},
    {"clip": "m2po"},
    {"clip": "topr"},
]
WEIGHTS: list[dict[str, Any]] = [
    {},
    {"behavior_weight": "truncated", "weight_cap": 1.1},
    {"behavior_weight": "masked", "weight_floor": 0.8, "weight_cap": 1.3},
]
ANCHORS = ("behavior", "proximal", "mix", "segment")


def inputs_of(anchor: str, clip: str, *, seed: int = 0) -> LossInputs:
    rng = np.random.default_rng(seed)
    behavior = -rng.exponential(1.0, COUNT)
    current = behavior + rng.normal(0, 0.4, COUNT)
    current[:2] = behavior[:2] + np.array([25.0, -25.0])
    advantages = rng.normal(0, 1, SEGMENTS).round(1)
    advantages[3] = 0.0
    double = torch.tensor(current)
    tokens = {
        "current_logprobs": double,
        "behavior_logprobs": torch.tensor(behavior),
        "proximal_logprobs": torch.tensor(behavior + rng.normal(0, 0.2, COUNT))
        if anchor == "proximal"
        else None,
        "proximal_mix": torch.tensor(rng.uniform(0, 1, COUNT)) if anchor == "mix" else None,
        "reference_logprobs": torch.tensor(behavior + rng.normal(0, 0.4, COUNT)),
        "entropy": None,
    }
    segments = {
        "advantages": torch.tensor(advantages),
        "weights": torch.tensor(rng.uniform(0.5, 1.5, SEGMENTS) / COUNT),
        "negative_advantages": None,
        "segment_log_ratios": torch.tensor(rng.normal(0, 0.3, SEGMENTS)) if anchor == "segment" else None,
    }
    ids = torch.tensor(rng.integers(0, SEGMENTS, COUNT))
    return loss_inputs(double, tokens, ids, segments, 0.25 if clip == "m2po" else None)


@pytest.mark.parametrize(("clip", "weight"), list(itertools.product(CLIPS, WEIGHTS)), ids=str)
@pytest.mark.parametrize("anchor", ANCHORS)
def test_tokens_add_up_to_the_metrics(anchor: str, clip: dict[str, Any], weight: dict[str, Any]) -> None:
    inputs = inputs_of(anchor, clip["clip"])
    options = LossOptions(**clip, **weight, kl_coef=0.1)
    states = token_states(inputs, options)
    loss, gradient, metrics = loss_gradient_and_metrics(inputs, options)
    totals = dict(zip(METRIC_NAMES, metrics.tolist(), strict=True))
    assert math.isfinite(float(loss))
    for name, mask in (
        ("num_masked_positive", states.is_clipped_high),
        ("num_masked_negative", states.is_clipped_low),
        ("num_dual_clipped", states.is_dual_clipped),
        ("num_weight_capped", states.is_weight_outside),
        ("num_clamped", states.is_clamped),
        ("num_nonfinite", states.is_nonfinite),
    ):
        assert mask.dtype == torch.bool and int(mask.sum()) == totals[name], name
    assert float(states.ratio.sum()) == totals["sum_ratio"]
    assert torch.equal(states.gradient, gradient)


@pytest.mark.parametrize("clip", CLIPS, ids=str)
def test_the_gradient_is_that_of_the_loss(clip: dict[str, Any]) -> None:
    inputs = inputs_of("proximal", clip["clip"], seed=1)
    options = LossOptions(**clip, kl_coef=0.1)
    current = inputs.current.clone().requires_grad_()
    plain = LossInputs(**{**vars(inputs), "current": current})
    (expected,) = torch.autograd.grad(segment_loss_reference(plain, options), current)
    torch.testing.assert_close(token_states(inputs, options).gradient, expected)


def test_a_token_that_is_not_finite_is_named() -> None:
    inputs = inputs_of("behavior", "one_side")
    inputs.current[7] = torch.nan
    inputs.behavior[9] = -torch.inf
    states = token_states(inputs, LossOptions())
    assert torch.nonzero(states.is_nonfinite).flatten().tolist() == [7, 9]
    assert torch.isnan(states.gradient[[7, 9]]).all() and torch.isfinite(states.gradient).sum() == COUNT - 2
