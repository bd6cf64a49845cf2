"""segment_loss against autograd of its definition, hand-worked tokens, and itself cut into pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cod_kernels import KernelInputError, merge_metrics, segment_loss, summarize_metrics
from cod_kernels.segment_loss.reference import (
    LossInputs,
    LossOptions,
    loss_gradient_and_metrics,
    segment_loss_reference,
)

NAN_AT_9 = torch.full((400,), -1.0).index_fill(0, torch.tensor(9), math.nan)


def _tokens(
    count: int = 400, segments: int = 23, dtype: torch.dtype = torch.float64
) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    behavior = -torch.rand(count, generator=generator, dtype=torch.float64) * 3
    return {
        "current_logprobs": (behavior + torch.randn(count, generator=generator) * 0.3).to(dtype),
        "behavior_logprobs": behavior.to(dtype),
        "segment_ids": torch.randint(segments, (count,), generator=generator),
        "advantages": torch.randn(segments, generator=generator, dtype=torch.float64)
        .to(dtype)
        .round(decimals=1),
        "weights": torch.rand(segments, generator=generator, dtype=torch.float64).to(dtype) / count,
        "reference_logprobs": (behavior + torch.randn(count, generator=generator) * 0.5).to(dtype),
    }


_SWITCHES = [
    {"clip": clip, "behavior_weight": weight, "kl_coef": kl, "eps_low": low, "eps_high": high}
    for clip in ("one_side", "ppo", "none")
    for weight in ("none", "truncated")
    for kl in (0.0, 0.3)
    for low, high in ((0.2, 0.2), (0.1, 0.4))
    if not (clip == "ppo" and weight == "truncated")
]


@pytest.mark.parametrize("switches", _SWITCHES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_loss_and_gradient_against_the_definition(switches: dict[str, Any], dtype: torch.dtype) -> None:
    data = _tokens(dtype=dtype)
    data["current_logprobs"][:4] = data["behavior_logprobs"][:4] + torch.tensor([25.0, -25.0, 30.0, -30.0])
    current = data["current_logprobs"].requires_grad_()
    loss, metrics = segment_loss(**data, weight_cap=1.1, **switches)
    loss.backward()
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in data.items()}
    leaf = wide["current_logprobs"].requires_grad_()
    options = LossOptions(weight_cap=1.1, **switches)
    inputs = LossInputs(
        leaf,
        wide["behavior_logprobs"],
        wide["segment_ids"],
        wide["advantages"],
        wide["weights"],
        reference=wide["reference_logprobs"],
    )
    expected = segment_loss_reference(inputs, options)
    expected.backward()
    bound = 1e-12 if dtype == torch.float64 else 1e-5
    assert loss.item() == pytest.approx(expected.item(), rel=bound, abs=bound)
    assert torch.allclose(current.grad.double(), leaf.grad, rtol=bound, atol=bound)  # type: ignore[union-attr]
    assert summarize_metrics(metrics)["num_clamped"] == 4
    assert not metrics.requires_grad


def test_paper_loss_by_hand() -> None:
    ratios = torch.tensor([1.0, 1.3, 0.7, 1.3, 0.7, 1.2, 5.0])
    behavior = torch.full((7,), -1.0)
    current = (behavior + ratios.log()).requires_grad_()
    advantages = torch.tensor([1.0, -2.0, 0.0])
    segment_ids = torch.tensor([0, 0, 0, 1, 1, 1, 2])
    loss, metrics = segment_loss(current, behavior, segment_ids, advantages, torch.full((3,), 1 / 7))
    kept = [1, 0, 1, 1, 0, 1, 1]
    by_hand = -sum(
        k * float(advantages[s]) * float(c) / 7
        for k, s, c in zip(kept, segment_ids.tolist(), current.detach().tolist(), strict=True)
    )
    assert loss.item() == pytest.approx(by_hand, rel=1e-6)
    loss.backward()
    gradient = [-k * float(advantages[s]) / 7 for k, s in zip(kept, segment_ids.tolist(), strict=True)]
    assert current.grad.tolist() == pytest.approx(gradient, rel=1e-6)  # type: ignore[union-attr]
    named = summarize_metrics(metrics)
    assert named["num_action_tokens"] == 7
    assert named["masked_positive_frac"] == pytest.approx(1 / 3)
    assert named["masked_negative_frac"] == pytest.approx(1 / 3)
    assert named["masked_frac"] == pytest.approx(2 / 7)
    assert named["ratio_mean"] == pytest.approx(float(ratios.mean()))
    assert (named["ratio_max"], named["ratio_min"]) == (pytest.approx(5), pytest.approx(0.7))
    assert named["ess_frac"] == pytest.approx(float(ratios.sum() ** 2 / (7 * (ratios**2).sum())))
    kl = float((ratios - ratios.log() - 1).mean())
    assert named["kl_behavior"] == pytest.approx(kl, rel=1e-5)
    assert named["policy_loss"] == pytest.approx(by_hand, rel=1e-6)
    assert named["advantage_mean"] == pytest.approx((3 * 1 - 3 * 2) / 7)


def test_clip_boundaries_belong_to_the_kept_side() -> None:
    current = torch.tensor([math.log(1.25), math.log(0.75)], dtype=torch.float64, requires_grad=True)
    loss, _ = segment_loss(
        current,
        torch.zeros(2, dtype=torch.float64),
        torch.tensor([0, 1]),
        torch.tensor([1.0, -1.0]),
        torch.ones(2),
        eps_low=0.25 + 1e-15,
        eps_high=0.25 + 1e-15,
    )
    loss.backward()
    assert current.grad.tolist() == [-1, 1]  # type: ignore[union-attr]


def test_on_policy_all_three_clips_have_one_gradient() -> None:
    data = _tokens()
    data["current_logprobs"] = data["behavior_logprobs"].clone()
    gradients = []
    for clip in ("one_side", "ppo", "none"):
        leaf = data["current_logprobs"].clone().requires_grad_()
        loss, metrics = segment_loss(**(data | {"current_logprobs": leaf}), clip=clip)
        loss.backward()
        gradients.append(leaf.grad)
        assert summarize_metrics(metrics)["ess_frac"] == pytest.approx(1)
        assert summarize_metrics(metrics)["kl_behavior"] == 0
    assert torch.equal(gradients[0], gradients[1])  # type: ignore[arg-type]
    assert torch.equal(gradients[0], gradients[2])  # type: ignore[arg-type]


@pytest.mark.parametrize("cuts", [(200,), (1, 2, 399), tuple(range(1, 400))])
def test_micro_batches_add_up_exactly(cuts: tuple[int, ...]) -> None:
    data = _tokens()
    entropy = torch.rand(400, dtype=torch.float64)
    whole = data["current_logprobs"].clone().requires_grad_()
    loss, metrics = segment_loss(**(data | {"current_logprobs": whole}), entropy=entropy, kl_coef=0.1)
    loss.backward()
    pieces = data["current_logprobs"].clone().requires_grad_()
    total, parts = 0.0, []
    for start, stop in zip((0, *cuts), (*cuts, 400), strict=True):
        cut = {k: v if k in ("advantages", "weights") else v[start:stop] for k, v in data.items()}
        cut["current_logprobs"] = pieces[start:stop]
        part, numbers = segment_loss(**cut, entropy=entropy[start:stop], kl_coef=0.1)
        part.backward()
        total += float(part.detach())
        parts.append(numbers)
    assert total == pytest.approx(loss.item(), rel=1e-12)
    assert torch.equal(pieces.grad, whole.grad)  # type: ignore[arg-type]
    assert torch.allclose(merge_metrics(parts), metrics, rtol=1e-12, atol=0)
    assert summarize_metrics(merge_metrics(parts))["entropy"] == pytest.approx(float(entropy.mean()))


def test_bitwise_repeatable() -> None:
    data = _tokens(dtype=torch.float32)
    first, second = segment_loss(**data, kl_coef=0.1), segment_loss(**data, kl_coef=0.1)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


DEVICE_ONLY: list[tuple[dict[str, Any], dict[str, Any], list[int], str]] = [
    ({"current": {3: math.nan}}, {}, [3], "current, behavior, proximal or reference"),
    ({"behavior": {7: -math.inf, 9: math.nan}}, {}, [7, 9], "are not finite at 2 tokens; .* call is 7"),
    ({"proximal": {5: math.inf}}, {}, [5], "first bad token of a call is 5"),
    ({"reference": {399: math.nan}}, {"kl_coef": 0.1}, [399], "call is 399"),
    ({"reference": {399: math.nan}}, {}, [399], "call is 399"),
    ({"segment_ids": {11: 23, 12: -1, 13: 2**31 + 5}}, {}, [11, 12, 13], "segment_ids are out of range at 3"),
    ({"weights": {22: math.nan}}, {}, "segment 22", "advantages, negative_advantages, weights"),
    ({"advantages": {22: math.inf}}, {}, "segment 22", "advantages, negative_advantages, weights"),
    ({"negative_advantages": {22: 0.5}}, {}, "segment 22", "have the wrong sign at"),
    ({"advantages": {22: -0.5}, "negative_advantages": {}}, {}, "segment 22", "have the wrong sign at"),
    (
        {"m2po_bound": -0.1},
        {"clip": "m2po"},
        "all",
        "m2po_bound are not finite or have the wrong sign at 400",
    ),
    ({"m2po_bound": math.nan}, {"clip": "m2po"}, "all", "m2po_bound"),
    ({"m2po_bound": [0.3, -0.1]}, {"clip": "m2po"}, "all", "m2po_bound"),
    ({"segment_log_ratios": {22: math.nan}}, {}, "segment 22", "segment_log_ratios or m2po_bound"),
    ({"proximal_mix": {5: math.nan}}, {}, [5], "proximal_mix are not finite at 1 tokens"),
    ({"m2po_bound": math.inf}, {"clip": "m2po"}, "all", "m2po_bound"),
]


def spoiled(changes: dict[str, Any], bad: Any) -> tuple[LossInputs, list[int]]:
    """Inputs as a device gets them, with values that only it has seen, and which tokens they spoil."""
    data = _tokens(dtype=torch.float32)
    tensors = {k.removesuffix("_logprobs"): v for k, v in data.items()}
    tensors["proximal"] = tensors["behavior"].clone()
    if "segment_log_ratios" in changes:
        tensors["segment_log_ratios"] = torch.zeros(23)
    if "proximal_mix" in changes:
        tensors["proximal_mix"] = torch.ones(400)
        del tensors["proximal"]
    if "negative_advantages" in changes:
        tensors["negative_advantages"] = -tensors["advantages"].abs()
        tensors["advantages"] = tensors["advantages"].abs()
    for name, values in changes.items():
        if not isinstance(values, dict):
            tensors[name] = torch.tensor(values).expand(2)
            continue
        for index, value in values.items():
            tensors[name][index] = value
    if bad == "all":
        bad = list(range(400))
    elif isinstance(bad, str):
        bad = torch.nonzero(tensors["segment_ids"] == 22).flatten().tolist()
    return LossInputs(**tensors), bad


@pytest.mark.parametrize(("changes", "options", "bad", "message"), DEVICE_ONLY)
def test_values_that_only_a_device_has_seen(
    changes: dict[str, Any], options: dict[str, Any], bad: Any, message: str
) -> None:
    """They never come out as numbers, and the metrics name argument, count and first token."""
    inputs, bad = spoiled(changes, bad)
    loss, gradient, metrics = loss_gradient_and_metrics(inputs, LossOptions(**options), has_checked=False)
    assert torch.isnan(loss)
    assert torch.nonzero(torch.isnan(gradient)).flatten().tolist() == bad
    with pytest.raises(KernelInputError, match=message):
        summarize_metrics(metrics)
    assert metrics[-1] == bad[0]


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"current_logprobs": torch.zeros(0)}, "current_logprobs is empty"),
        ({"current_logprobs": torch.zeros(4, 4)}, r"current_logprobs must be \[A\]"),
        ({"current_logprobs": torch.zeros(400, dtype=torch.bfloat16)}, "must be float32 or float64"),
        ({"behavior_logprobs": torch.zeros(3)}, r"behavior_logprobs must be \[400\]"),
        ({"behavior_logprobs": torch.zeros(400, dtype=torch.int64)}, "behavior_logprobs must be floating"),
        ({"segment_ids": torch.full((400,), 23)}, r"segment_ids\[0\] is 23, there are 23 segments"),
        ({"segment_ids": torch.arange(400) - 399}, r"segment_ids\[0\] is -399"),
        ({"segment_ids": torch.zeros(400)}, "segment_ids must be int32 or int64"),
        ({"weights": torch.zeros(22)}, "weights must be one number per segment"),
        ({"advantages": torch.full((23,), math.nan)}, r"advantages\[0\] is nan"),
        ({"advantages": torch.ones(23, dtype=torch.int64)}, "advantages must be floating point"),
        (
            {"advantages": torch.ones(0), "weights": torch.ones(0)},
            "advantages must be one number per segment",
        ),
        ({"weights": torch.ones(23, device="meta")}, "weights is on meta, current_logprobs on cpu"),
        ({"segment_ids": torch.zeros(400, dtype=torch.int64, device="meta")}, "segment_ids is on meta"),
        ({"behavior_logprobs": torch.zeros(400, device="meta")}, "behavior_logprobs is on meta"),
        ({"segment_ids": torch.arange(400) // 50 * 4}, r"segment_ids\[300\] is 24, there are 23 segments"),
        ({"current_logprobs": NAN_AT_9}, r"current_logprobs\[9\] is nan"),
        ({"behavior_logprobs": NAN_AT_9}, r"behavior_logprobs\[9\] is nan"),
        ({"proximal_logprobs": -NAN_AT_9 / 0}, r"proximal_logprobs\[0\] is inf"),
        ({"reference_logprobs": NAN_AT_9}, r"reference_logprobs\[9\] is nan"),
        ({"clip": "dual"}, "clip is 'dual'"),
        ({"behavior_weight": "x"}, "behavior_weight is 'x'"),
        ({"clip": "ppo", "behavior_weight": "truncated"}, "count the ratio twice"),
        ({"eps_low": -0.1}, "eps_low"),
        ({"weight_cap": 0.0}, "weight_cap"),
        ({"kl": "k4"}, "kl is 'k4'"),
        ({"clip": "cispo", "behavior_weight": "masked"}, "count the ratio twice"),
        ({"dual_clip": 3.0}, "dual_clip is for clip 'ppo'"),
        ({"clip": "ppo", "dual_clip": 1.0}, "dual_clip must be above 1"),
        ({"clip": "m2po"}, "m2po_bound goes with"),
        ({"m2po_bound": 0.5}, "m2po_bound goes with"),
        ({"clip": "m2po", "m2po_bound": -0.5}, "m2po_bound must be at least 0"),
        ({"clip": "m2po", "m2po_bound": torch.tensor(-0.5)}, "m2po_bound must be at least 0"),
        ({"clip": "m2po", "m2po_bound": torch.tensor(math.nan)}, "m2po_bound must be at least 0"),
        ({"clip": "m2po", "m2po_bound": torch.ones(3)}, "m2po_bound must be one number or two"),
        ({"clip": "m2po", "m2po_bound": torch.tensor([0.5, -0.5])}, "m2po_bound must be at least 0"),
        ({"proximal_mix": torch.full((400,), 1.5)}, r"proximal_mix\[0\] is 1.5; it is a share"),
        ({"proximal_mix": torch.ones(400), "proximal_logprobs": torch.zeros(400)}, "pass one of them"),
        ({"segment_log_ratios": torch.zeros(23), "clip": "none"}, "segment_log_ratios are for clips"),
        ({"segment_log_ratios": torch.zeros(23), "behavior_weight": "masked"}, "is per token"),
        ({"segment_log_ratios": torch.zeros(22)}, "segment_log_ratios must be one number per segment"),
        ({"segment_log_ratios": torch.full((23,), math.nan)}, r"segment_log_ratios\[0\] is nan"),
        ({"clip": "topr", "behavior_weight": "truncated"}, "count the ratio twice"),
        ({"log_ratio_coef": -1.0}, "log_ratio_coef must be at least 0"),
        ({"clip": "m2po", "m2po_bound": torch.ones((), device="meta")}, "m2po_bound is on meta"),
        ({"tv_bound": math.nan}, "tv_bound"),
        ({"behavior_weight": "masked", "weight_floor": 3.0}, "weight_cap must be positive and above"),
        ({"proximal_logprobs": torch.zeros(3)}, r"proximal_logprobs must be \[400\]"),
        ({"negative_advantages": torch.zeros(3)}, "negative_advantages must be one number per segment"),
        (
            {"advantages": torch.ones(23), "negative_advantages": torch.arange(23.0)},
            r"negative_advantages\[1\] is 1.0",
        ),
        ({"reference_logprobs": None, "kl_coef": 0.1}, "reference_logprobs is None"),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, Any], part: str) -> None:
    with pytest.raises(KernelInputError, match=part):
        segment_loss(**(_tokens() | changes))  # type: ignore[arg-type]
