"""``segment_loss``: dispatch and autograd; merging and naming of its metrics."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, choose_backend
from cod_kernels.segment_loss.checks import check_call, check_finite
from cod_kernels.segment_loss.reference import (
    METRIC_NAMES,
    NUM_ADDITIVE,
    LossInputs,
    LossOptions,
    loss_gradient_and_metrics,
)

__all__ = ["METRIC_NAMES", "merge_metrics", "segment_loss", "summarize_metrics"]

_OP = "segment_loss"
_REFUSED = {
    "num_bad_ids": "segment_ids are out of range",
    "num_bad_segments": "advantages, negative_advantages, weights, segment_log_ratios or m2po_bound are not "
    "finite or have the wrong sign",
    "num_nonfinite": "current, behavior, proximal or reference log-probs or proximal_mix are not finite",
}


def evaluate(inputs: LossInputs, options: LossOptions, backend: str) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss, gradient [A], metrics) from the implementation named ``torch`` or ``triton``."""
    if backend == "triton":
        from cod_kernels.segment_loss.kernel import launch

        return launch(inputs, options)
    return loss_gradient_and_metrics(inputs, options)


class _SegmentLoss(torch.autograd.Function):
    """The gradient is made in the forward pass; backward scales it."""

    @staticmethod
    def forward(
        ctx: Any, current: Tensor, inputs: LossInputs, options: LossOptions, backend: str
    ) -> tuple[Tensor, Tensor]:
        loss, gradient, metrics = evaluate(inputs, options, backend)
        ctx.save_for_backward(gradient)
        ctx.mark_non_differentiable(metrics)
        ctx.set_materialize_grads(False)
        return loss, metrics

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return (None if grads[0] is None else gradient * grads[0], None, None, None)


def convert(tensor: Tensor | None, like: Tensor) -> Tensor | None:
    """Return ``tensor`` without history, in the dtype of ``like``."""
    return None if tensor is None else tensor.detach().to(like.dtype)


def bound_tensor(bound: Tensor | float | None, like: Tensor) -> Tensor | None:
    """Return the M2PO bound as [upper, lower] beside ``like``."""
    if bound is None:
        return None
    if isinstance(bound, Tensor):
        return bound.detach().to(like.dtype).reshape(-1).expand(2).contiguous()
    return torch.full((2,), bound, dtype=like.dtype, device=like.device)  # filled there: nothing to wait for


def segment_loss(
    current_logprobs: Tensor,
    behavior_logprobs: Tensor,
    segment_ids: Tensor,
    advantages: Tensor,
    weights: Tensor,
    *,
    negative_advantages: Tensor | None = None,
    proximal_logprobs: Tensor | None = None,
    proximal_mix: Tensor | None = None,
    segment_log_ratios: Tensor | None = None,
    reference_logprobs: Tensor | None = None,
    entropy: Tensor | None = None,
    clip: str = "one_side",
    eps_low: float = 0.2,
    eps_high: float = 0.2,
    dual_clip: float | None = None,
    tv_bound: float = 0.2,
    m2po_bound: Tensor | float | None = None,
    behavior_weight: str = "none",
    weight_floor: float = 0.0,
    weight_cap: float = 2.0,
    kl_coef: float = 0.0,
    kl: str = "k3",
    log_ratio_coef: float = 0.0,
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
        advantages: finite [N]; with ``negative_advantages``, the positive parts (>= 0).
        weights: finite [N].
        negative_advantages: [N] <= 0 or None: for a prefix shared by several branches, the sums over the
            branches of the positive and of the negative advantages.
        proximal_logprobs: [A] at the start of the update or None; when given, the clip's ratio is current /
            proximal and the behaviour weight proximal / behaviour (the decoupled objective).
        proximal_mix: [A] in [0, 1] or None, instead of ``proximal_logprobs``: they lie so far on the way from
            behaviour to current, without gradient. 1 is current itself, the exact proximal log-prob where one
            batch makes one update.
        segment_log_ratios: finite [N] or None: the clip's ratio is e to this at all tokens of the segment;
            the mean of its tokens' current - anchor (anchor: proximal or behaviour), made in a pass before
            this one. The gradient flows through that mean.
        reference_logprobs: [A] under the reference model; needed when ``kl_coef`` > 0.
        entropy: [A] in nats, for the metrics only.
        clip: ``one_side`` | ``ppo`` | ``none`` | ``cispo`` | ``dppo_tv`` | ``m2po`` | ``topr``.
        eps_low: the ratio's range is [1 - eps_low, 1 + eps_high].
        eps_high: see ``eps_low``.
        dual_clip: > 1 or None; with ``ppo`` and ``m2po``: ceiling of the ratio of negative advantages.
        tv_bound: >= 0; with ``dppo_tv``: how far the token's probability may move.
        m2po_bound: >= 0; with ``m2po``: bound on the size of the log-ratio, a number or a tensor with one, or
            with two for above and below 0.
        behavior_weight: ``none`` | ``truncated`` (min(w, weight_cap)) | ``masked`` (w inside
            [weight_floor, weight_cap], else 0), without gradient.
        weight_floor: >= 0.
        weight_cap: > 0.
        kl_coef: weight of the divergence to the reference.
        kl: its estimator: ``k1`` | ``k2`` | ``k3``.
        log_ratio_coef: >= 0, weight of (current - behaviour)^2, which is added to the loss of every token.
        backend: ``auto`` (Triton on CUDA, torch elsewhere), ``torch`` or ``triton``.

    Returns:
        (loss, a scalar; metrics, float64 [len(METRIC_NAMES)], on the same device, not differentiable).

    Raises:
        KernelInputError: names the argument, and on the CPU the first offending index; on CUDA bad values
            make the loss and the gradient of their tokens NaN, are counted in the metrics and refused by
            :func:`summarize_metrics`.
        BackendUnavailableError: Triton is wanted and cannot be had.
    """
    options = LossOptions(
        clip, eps_low, eps_high, behavior_weight, weight_cap, kl_coef, dual_clip, weight_floor, tv_bound, kl,
        log_ratio_coef,
    )  # fmt: skip
    tokens = {
        "current_logprobs": current_logprobs, "behavior_logprobs": behavior_logprobs,
        "proximal_logprobs": proximal_logprobs, "proximal_mix": proximal_mix,
        "reference_logprobs": reference_logprobs,
        "entropy": entropy,
    }  # fmt: skip
    segments = {
        "advantages": advantages, "weights": weights, "negative_advantages": negative_advantages,
        "segment_log_ratios": segment_log_ratios,
    }  # fmt: skip
    check_call(tokens, segment_ids, segments, options, m2po_bound)
    if current_logprobs.device.type == "cpu":
        check_finite("current_logprobs", current_logprobs)
    chosen = choose_backend(_OP, backend, current_logprobs.device)
    inputs = loss_inputs(current_logprobs, tokens, segment_ids, segments, m2po_bound)
    loss, metrics = _SegmentLoss.apply(  # type: ignore[no-untyped-call]
        current_logprobs, inputs, options, chosen
    )
    return loss, metrics


def loss_inputs(
    current: Tensor,
    tokens: dict[str, Tensor | None],
    segment_ids: Tensor,
    segments: dict[str, Tensor | None],
    m2po_bound: Tensor | float | None,
) -> LossInputs:
    """Collect checked arguments in the dtype of the current log-probs, without history."""

    def required(name: str, of: dict[str, Tensor | None]) -> Tensor:
        tensor = convert(of[name], current)
        if tensor is None:
            raise KernelInputError(f"{_OP}: {name} is missing")
        return tensor

    return LossInputs(
        current.detach(),
        required("behavior_logprobs", tokens),
        segment_ids if segment_ids.device.type == "cuda" else segment_ids.long(),
        required("advantages", segments),
        required("weights", segments),
        convert(segments["negative_advantages"], current),
        convert(tokens["proximal_logprobs"], current),
        convert(tokens["reference_logprobs"], current),
        convert(tokens["entropy"], current),
        bound_tensor(m2po_bound, current),
        convert(tokens.get("proximal_mix"), current),
        convert(segments.get("segment_log_ratios"), current),
    )


def merge_metrics(parts: Sequence[Tensor]) -> Tensor:
    """Merge the metrics of micro-batches into those of the step, on the device and in the given order.

    ``first_bad_token`` becomes the smallest of the parts' own indices.
    """
    stacked = torch.stack(list(parts))
    return torch.cat(
        [
            stacked[:, :NUM_ADDITIVE].sum(0),
            stacked[:, NUM_ADDITIVE].amax(0, keepdim=True),
            stacked[:, NUM_ADDITIVE + 1 :].amin(0),
        ]
    )


def summarize_metrics(metrics: Tensor) -> dict[str, float]:
    """Turn a metrics vector into named numbers; the one place that reads the device (once).

    Returns:
        ``num_action_tokens``, ``num_clamped``; ``masked_positive_frac`` and
        ``masked_negative_frac`` of the tokens of that sign, ``masked_frac`` of all; ``dual_clipped_frac``;
        ``ratio_mean|max|min`` (current / behaviour, or current / proximal); ``ess_frac`` = (sum r)^2 / (A sum
        r^2); ``behavior_weight_mean`` and ``weight_capped_frac``; ``kl_behavior`` = mean(r - 1 - log r), an
        estimate of KL(behaviour || current); ``kl_reference``; ``entropy``; ``advantage_mean`` over tokens;
        ``policy_loss``.

    Raises:
        KernelInputError: a value that only the device has seen was bad: names the arguments, how many tokens,
            and the first.
    """
    v = dict(zip(METRIC_NAMES, metrics.tolist(), strict=True))
    found = [f"{text} at {v[name]:.0f} tokens" for name, text in _REFUSED.items() if v[name]]
    if found:
        raise KernelInputError(
            f"{_OP}: {', '.join(found)}; the first bad token of a call is {v['first_bad_token']:.0f}"
        )
    count = max(v["num_tokens"], 1.0)
    masked = v["num_masked_positive"] + v["num_masked_negative"]
    squared = v["sum_ratio_squared"]
    return {
        "num_action_tokens": v["num_tokens"],
        "num_clamped": v["num_clamped"],
        "masked_positive_frac": v["num_masked_positive"] / max(v["num_positive"], 1.0),
        "masked_negative_frac": v["num_masked_negative"] / max(v["num_negative"], 1.0),
        "masked_frac": masked / count,
        "dual_clipped_frac": v["num_dual_clipped"] / count,
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
