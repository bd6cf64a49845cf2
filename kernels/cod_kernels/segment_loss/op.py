"""``segment_loss``: checks, dispatch and autograd; merging and naming of its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, choose_backend, first_index, require
from cod_kernels.segment_loss.reference import METRIC_NAMES, LossOptions, loss_gradient_and_metrics

__all__ = ["METRIC_NAMES", "merge_metrics", "segment_loss", "summarize_metrics"]

_OP = "segment_loss"
_CLIPS = ("one_side", "ppo", "none")
_BEHAVIOR_WEIGHTS = ("none", "truncated")
_NUM_ADDITIVE = len(METRIC_NAMES) - 2


class _SegmentLoss(torch.autograd.Function):
    """The gradient is made in the forward pass; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any,
        current: Tensor,
        behavior: Tensor,
        segment_ids: Tensor,
        advantages: Tensor,
        weights: Tensor,
        reference: Tensor | None,
        entropy: Tensor | None,
        options: LossOptions,
    ) -> tuple[Tensor, Tensor]:
        loss, gradient, metrics = loss_gradient_and_metrics(
            current, behavior, segment_ids, advantages, weights, reference, entropy, options
        )
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        scaled = None if grads[0] is None else gradient * grads[0]
        return scaled, None, None, None, None, None, None, None


def _check(
    tokens: dict[str, Tensor | None], segment_ids: Tensor, segments: dict[str, Tensor], options: LossOptions
) -> None:
    current = tokens["current_logprobs"]
    if current is None:
        raise KernelInputError(f"{_OP}: current_logprobs is missing")
    require(current.dim() == 1, f"{_OP}: current_logprobs must be [A], has shape {list(current.shape)}")
    require(current.numel() > 0, f"{_OP}: current_logprobs is empty; call it with at least one action token")
    require(
        current.dtype in (torch.float32, torch.float64),
        f"{_OP}: current_logprobs must be float32 or float64, is {current.dtype}",
    )
    for name, tensor in [*tokens.items(), ("segment_ids", segment_ids)]:
        if tensor is None:
            continue
        require(
            tensor.shape == current.shape,
            f"{_OP}: {name} must be [{current.numel()}] like current_logprobs, "
            f"has shape {list(tensor.shape)}",
        )
        require(
            tensor.device == current.device,
            f"{_OP}: {name} is on {tensor.device}, current_logprobs on {current.device}",
        )
        if name != "segment_ids":
            require(tensor.is_floating_point(), f"{_OP}: {name} must be floating point, is {tensor.dtype}")
    require(
        segment_ids.dtype in (torch.int32, torch.int64),
        f"{_OP}: segment_ids must be int32 or int64, is {segment_ids.dtype}",
    )
    num_segments = segments["advantages"].numel()
    for name, tensor in segments.items():
        require(
            tensor.dim() == 1 and tensor.numel() == num_segments and num_segments > 0,
            f"{_OP}: {name} must be one number per segment, has shape {list(tensor.shape)}, "
            f"advantages has {num_segments}",
        )
        require(
            tensor.device == current.device,
            f"{_OP}: {name} is on {tensor.device}, current_logprobs on {current.device}",
        )
    _check_options(options, has_reference=tokens["reference_logprobs"] is not None)
    if current.device.type == "cpu":
        _check_values(segment_ids, segments)


def _check_options(options: LossOptions, *, has_reference: bool) -> None:
    require(options.clip in _CLIPS, f"{_OP}: clip is {options.clip!r}; it must be one of {', '.join(_CLIPS)}")
    require(
        options.behavior_weight in _BEHAVIOR_WEIGHTS,
        f"{_OP}: behavior_weight is {options.behavior_weight!r}; "
        f"it must be one of {', '.join(_BEHAVIOR_WEIGHTS)}",
    )
    require(
        not (options.clip == "ppo" and options.behavior_weight != "none"),
        f"{_OP}: behavior_weight {options.behavior_weight!r} with clip 'ppo' would count the ratio twice; "
        "use clip 'one_side' or 'none', or behavior_weight 'none'",
    )
    for name in ("eps_low", "eps_high", "kl_coef"):
        value = getattr(options, name)
        require(0 <= value < float("inf"), f"{_OP}: {name} must be at least 0 and finite, is {value}")
    require(options.weight_cap > 0, f"{_OP}: weight_cap must be positive, is {options.weight_cap}")
    require(
        options.kl_coef == 0 or has_reference,
        f"{_OP}: kl_coef is {options.kl_coef}, but reference_logprobs is None; pass them or set kl_coef to 0",
    )


def _check_values(segment_ids: Tensor, segments: dict[str, Tensor]) -> None:
    num_segments = segments["advantages"].numel()
    low, high = torch.aminmax(segment_ids)
    if int(low) < 0 or int(high) >= num_segments:
        index = first_index((segment_ids < 0) | (segment_ids >= num_segments))
        raise KernelInputError(
            f"{_OP}: segment_ids[{index}] is {int(segment_ids[index])}, there are {num_segments} segments"
        )
    for name, tensor in segments.items():
        bad = ~torch.isfinite(tensor)
        if bool(bad.any()):
            index = first_index(bad)
            raise KernelInputError(f"{_OP}: {name}[{index}] is {float(tensor[index])}")


def segment_loss(
    current_logprobs: Tensor,
    behavior_logprobs: Tensor,
    segment_ids: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    reference_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    clip: str = "one_side",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    behavior_weight: str = "none",
    weight_cap: float = 2.0,
    kl_coef: float = 0.0,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return loss and metrics of A action tokens that belong to N segments; the formulas are in README.md.

    The per-segment weight holds the whole normalisation: 1 / (action tokens of the step) for the token mean,
    1 / (segments x tokens of the segment) for the segment mean, and so on. Losses of micro-batches therefore
    simply add up to the loss of the step.

    Args:
        current_logprobs: float32 or float64 [A], differentiable; under the weights being trained.
        behavior_logprobs: [A], at sampling.
        segment_ids: int32 or int64 [A] in [0, N).
        advantages: finite [N].
        weights: finite [N].
        reference_logprobs: [A] under the reference model; needed when ``kl_coef`` > 0.
        entropy: [A] in nats, for the metrics only.
        clip: ``one_side`` | ``ppo`` | ``none``.
        eps_low: the ratio's range is [1 - eps_low, 1 + eps_high].
        eps_high: see ``eps_low``.
        behavior_weight: ``none`` | ``truncated`` (min(ratio, weight_cap), no gradient; not with ``ppo``).
        weight_cap: > 0.
        kl_coef: weight of the k3 divergence to the reference.
        backend: ``auto`` (Triton on CUDA, torch elsewhere), ``torch`` or ``triton``.

    Returns:
        (loss, a scalar; metrics, float64 [len(METRIC_NAMES)], on the same device, not differentiable).

    Raises:
        KernelInputError: names the argument, and on the CPU the first offending index.
        BackendUnavailableError: ``auto`` or ``triton`` on CUDA: the Triton kernel does not exist yet.
    """
    options = LossOptions(clip, eps_low, eps_high, behavior_weight, weight_cap, kl_coef)
    tokens = {
        "current_logprobs": current_logprobs,
        "behavior_logprobs": behavior_logprobs,
        "reference_logprobs": reference_logprobs,
        "entropy": entropy,
    }
    _check(tokens, segment_ids, {"advantages": advantages, "weights": weights}, options)
    choose_backend(_OP, backend, current_logprobs.device, has_triton_kernel=False)
    dtype = current_logprobs.dtype
    loss, metrics = _SegmentLoss.apply(  # type: ignore[no-untyped-call]
        current_logprobs,
        behavior_logprobs.detach().to(dtype),
        segment_ids.long(),
        advantages.detach().to(dtype),
        weights.detach().to(dtype),
        None if reference_logprobs is None else reference_logprobs.detach().to(dtype),
        None if entropy is None else entropy.detach(),
        options,
    )
    return loss, metrics


def merge_metrics(parts: Sequence[Tensor]) -> Tensor:
    """Merge the metrics of micro-batches into those of the step, on the device and in the given order."""
    stacked = torch.stack(list(parts))
    return torch.cat(
        [
            stacked[:, :_NUM_ADDITIVE].sum(0),
            stacked[:, _NUM_ADDITIVE].amax(0, keepdim=True),
            stacked[:, _NUM_ADDITIVE + 1].amin(0, keepdim=True),
        ]
    )


def summarize_metrics(metrics: Tensor) -> dict[str, float]:
    """Turn a metrics vector into named numbers; the one place that reads the device.

    Returns:
        ``num_action_tokens``, ``num_nonfinite``, ``num_clamped``; ``masked_positive_frac`` and
        ``masked_negative_frac`` of the tokens of that sign, ``masked_frac`` of all; ``ratio_mean|max|min``
        (current / behaviour); ``ess_frac`` = (sum r)^2 / (A sum r^2); ``behavior_weight_mean`` and
        ``weight_capped_frac``; ``kl_behavior`` = mean(r - 1 - log r), an estimate of KL(behaviour ||
        current); ``kl_reference``; ``entropy``; ``advantage_mean`` over tokens; ``policy_loss``.
    """
    v = dict(zip(METRIC_NAMES, metrics.tolist(), strict=True))
    count = max(v["num_tokens"], 1.0)
    masked = v["num_masked_positive"] + v["num_masked_negative"]
    squared = v["sum_ratio_squared"]
    return {
        "num_action_tokens": v["num_tokens"],
        "num_nonfinite": v["num_nonfinite"],
        "num_clamped": v["num_clamped"],
        "masked_positive_frac": v["num_masked_positive"] / max(v["num_positive"], 1.0),
        "masked_negative_frac": v["num_masked_negative"] / max(v["num_negative"], 1.0),
        "masked_frac": masked / count,
        "ratio_mean": v["sum_ratio"] / count,
        "ratio_max": v["max_ratio"],
        "ratio_min": v["min_ratio"],
        "ess_frac": v["sum_ratio"] ** 2 / (count * squared) if squared > 0 else 0.0,
        "behavior_weight_mean": v["sum_behavior_weight"] / count,
        "weight_capped_frac": v["num_weight_capped"] / count,
        "kl_behavior": v["sum_kl_behavior"] / count,
        "kl_reference": v["sum_kl_reference"] / count,
        "entropy": v["sum_entropy"] / count,
        "advantage_mean": v["sum_advantage"] / count,
        "policy_loss": v["policy_loss"],
    }
