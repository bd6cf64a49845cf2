"""segment_loss against autograd of its definition, hand-worked tokens, and itself cut into pieces."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cod_kernels import KernelInputError, merge_metrics, segment_loss, summarize_metrics
from cod_kernels.segment_loss.reference import LossInputs, LossOptions, segment_loss_reference


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


def test_non_finite_tokens_are_counted() -> None:
    data = _tokens()
    data["current_logprobs"][3] = math.nan
    data["behavior_logprobs"][7] = -math.inf
    _, metrics = segment_loss(**data)
    assert summarize_metrics(metrics)["num_nonfinite"] == 2


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
