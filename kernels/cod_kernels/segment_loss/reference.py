"""The definition of the loss, differentiated by autograd, and the torch twin with its gradient written out.

Both follow the table of README.md. The twin makes loss, gradient and metrics in one pass without a host
synchronisation, and every sum has one fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Bound on the size of a log-ratio before it is exponentiated; tokens beyond it are counted."""

METRIC_NAMES = (
    "num_tokens",
    "num_nonfinite",
    "num_clamped",
    "num_positive",
    "num_negative",
    "num_masked_positive",
    "num_masked_negative",
    "sum_ratio",
    "sum_ratio_squared",
    "sum_behavior_weight",
    "num_weight_capped",
    "sum_kl_behavior",
    "sum_kl_reference",
    "sum_entropy",
    "sum_advantage",
    "policy_loss",
    "max_ratio",
    "min_ratio",
)
"""Meaning of the entries of the metrics vector; all but the last two add up over micro-batches."""


@dataclass(frozen=True)
class LossOptions:
    """The switches of the loss; see :func:`cod_kernels.segment_loss.op.segment_loss`."""

    clip: str
    eps_low: float
    eps_high: float
    behavior_weight: str
    weight_cap: float
    kl_coef: float


def segment_loss_reference(
    current: Tensor,
    behavior: Tensor,
    segment_ids: Tensor,
    advantages: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    options: LossOptions,
) -> Tensor:
    """Return the loss, written the way the table reads; for tests."""
    advantage = advantages[segment_ids]
    log_ratio = torch.clamp(current - behavior, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    low, high = 1 - options.eps_low, 1 + options.eps_high
    keep = ((advantage >= 0) & (ratio <= high)) | ((advantage <= 0) & (ratio >= low))
    if options.clip == "ppo":
        objective = torch.minimum(ratio * advantage, ratio.clamp(low, high) * advantage)
    elif options.clip == "one_side":
        objective = keep.to(current.dtype) * advantage * current
    else:
        objective = advantage * current
    if options.behavior_weight == "truncated":
        objective = objective * ratio.detach().clamp(max=options.weight_cap)
    loss = -objective
    if reference is not None and options.kl_coef > 0:
        log_reference = torch.clamp(reference - current, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        loss = loss + options.kl_coef * (log_reference.exp() - log_reference - 1)
    return (weights[segment_ids] * loss).sum()


def loss_gradient_and_metrics(
    current: Tensor,
    behavior: Tensor,
    segment_ids: Tensor,
    advantages: Tensor,
    weights: Tensor,
    reference: Tensor | None,
    entropy: Tensor | None,
    options: LossOptions,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss scalar, d loss / d current [A], metrics float64 [len(METRIC_NAMES)]).

    Args:
        current: [A] under the weights being trained.
        behavior: [A] at sampling.
        segment_ids: int64 [A] in [0, N).
        advantages: [N] in the dtype of ``current``.
        weights: [N] in the dtype of ``current``.
        reference: [A] under the reference model, or None.
        entropy: [A], or None.
        options: the switches.
    """
    advantage, weight = advantages[segment_ids], weights[segment_ids]
    difference = current - behavior
    log_ratio = difference.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    is_clamped = difference != log_ratio  # true for NaN as well
    positive, negative = advantage > 0, advantage < 0
    masked_positive = positive & (ratio > 1 + options.eps_high)
    masked_negative = negative & (ratio < 1 - options.eps_low)
    keep = ~(masked_positive | masked_negative)
    behavior_weight = None
    if options.clip == "ppo":
        clipped = ratio.clamp(1 - options.eps_low, 1 + options.eps_high)
        objective = torch.minimum(ratio * advantage, clipped * advantage)
        slope = advantage * ratio * (keep & ~is_clamped)
    else:
        slope = advantage * keep if options.clip == "one_side" else advantage
        if options.behavior_weight == "truncated":
            behavior_weight = ratio.clamp(max=options.weight_cap)
            slope = slope * behavior_weight
        objective = slope * current
    token_loss = -objective
    gradient = -slope
    kl_reference = None
    if reference is not None:
        gap = reference - current
        log_reference = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        grown = log_reference.exp()
        kl_reference = grown - log_reference - 1
        if options.kl_coef > 0:
            token_loss = token_loss + options.kl_coef * kl_reference
            gradient = gradient + options.kl_coef * (1 - grown) * (gap == log_reference)
    loss = (weight * token_loss).sum(dtype=torch.float64)
    metrics = _metrics(
        {
            "num_nonfinite": ~torch.isfinite(difference),
            "num_clamped": is_clamped,
            "num_positive": positive,
            "num_negative": negative,
            "num_masked_positive": masked_positive,
            "num_masked_negative": masked_negative,
            "sum_ratio": ratio,
            "sum_ratio_squared": ratio.double().square(),
            "sum_behavior_weight": behavior_weight,
            "num_weight_capped": None if behavior_weight is None else ratio > options.weight_cap,
            "sum_kl_behavior": ratio - log_ratio - 1,
            "sum_kl_reference": kl_reference,
            "sum_entropy": entropy,
            "sum_advantage": advantage,
            "policy_loss": -(weight * objective),
        },
        ratio,
    )
    return loss.to(current.dtype), gradient * weight, metrics


def _metrics(terms: dict[str, Tensor | None], ratio: Tensor) -> Tensor:
    """Reduce the token-wise terms (in the order of METRIC_NAMES) to one vector, without leaving the
    device.
    """
    zero = torch.zeros((), dtype=torch.float64, device=ratio.device)
    sums = [zero + ratio.numel()]
    sums += [
        zero if (term := terms[name]) is None else term.sum(dtype=torch.float64)
        for name in METRIC_NAMES[1:-2]
    ]
    return torch.stack([*sums, ratio.max().double(), ratio.min().double()])
