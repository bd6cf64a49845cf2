"""The definition of the loss, differentiated by autograd, and the torch twin with its gradient written out.

Both follow the table of README.md. The twin makes loss, gradient and metrics in one pass without a host
synchronisation, and every sum has one fixed order, so equal inputs give equal bits.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

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
    "num_dual_clipped",
    "num_bad_segments",
    "num_bad_ids",
    "max_ratio",
    "min_ratio",
    "first_bad_token",
)
"""Meaning of the entries of the metrics vector; all but the last three add up over micro-batches."""

NUM_ADDITIVE = len(METRIC_NAMES) - 3

CLIPS = ("one_side", "ppo", "none", "cispo", "dppo_tv", "m2po", "topr")
BEHAVIOR_WEIGHTS = ("none", "truncated", "masked")
KL_ESTIMATORS = ("k1", "k2", "k3")
RATIO_CLIPS = ("ppo", "dppo_tv", "m2po")
"""Clips whose objective is a multiple of the ratio."""
WEIGHTED_CLIPS = (*RATIO_CLIPS, "cispo", "topr")
"""Clips that weigh tokens by the ratio already."""
SEGMENT_CLIPS = ("one_side", "ppo", "cispo", "topr")
"""Clips that may take one ratio per segment."""


@dataclass(frozen=True)
class LossOptions:
    """The switches of the loss; see :func:`cod_kernels.segment_loss.op.segment_loss`."""

    clip: str = "one_side"
    eps_low: float = 0.2
    eps_high: float = 0.2
    behavior_weight: str = "none"
    weight_cap: float = 2.0
    kl_coef: float = 0.0
    dual_clip: float | None = None
    weight_floor: float = 0.0
    tv_bound: float = 0.2
    kl: str = "k3"
    log_ratio_coef: float = 0.0


@dataclass(frozen=True)
class LossInputs:
    """The tensors of a call; [A] per token in one dtype, [N] per segment in the same.

    Attributes:
        current: [A] under the weights being trained.
        behavior: [A] at sampling.
        segment_ids: int64 or int32 [A] in [0, N).
        advantages: [N]; the positive parts alone where ``negative_advantages`` is given.
        weights: [N].
        negative_advantages: [N], at most 0, or None.
        proximal: [A] at the start of the update, or None.
        reference: [A] under the reference model, or None.
        entropy: [A], or None.
        m2po_bound: [2], upper and lower bound, or None.
        proximal_mix: [A] in [0, 1], or None: the proximal log-prob lies so far on the way from ``behavior``
            to ``current``.
        segment_log_ratios: [N], or None: log of the one ratio that the clip uses for all tokens of a segment.
    """

    current: Tensor
    behavior: Tensor
    segment_ids: Tensor
    advantages: Tensor
    weights: Tensor
    negative_advantages: Tensor | None = None
    proximal: Tensor | None = None
    reference: Tensor | None = None
    entropy: Tensor | None = None
    m2po_bound: Tensor | None = None
    proximal_mix: Tensor | None = None
    segment_log_ratios: Tensor | None = None

    @property
    def is_decoupled(self) -> bool:
        """Whether the clip has an anchor of its own."""
        return self.proximal is not None or self.proximal_mix is not None

    def rows(self, rows: slice, current: Tensor) -> LossInputs:
        """Return the inputs of some tokens, with ``current`` for their log-probs."""
        cut: dict[str, Any] = {
            name: None if (value := getattr(self, name)) is None else value[rows]
            for name in ("behavior", "segment_ids", "proximal", "reference", "entropy", "proximal_mix")
        }
        return replace(self, current=current, **cut)


def segment_loss_reference(inputs: LossInputs, options: LossOptions) -> Tensor:
    """Return the loss, written the way the table reads, and differentiated by autograd; for tests."""
    current, ids = inputs.current, inputs.segment_ids
    if inputs.negative_advantages is None:
        parts = [inputs.advantages[ids]]
    else:
        parts = [inputs.advantages[ids], inputs.negative_advantages[ids]]
    anchor = inputs.behavior if inputs.proximal is None else inputs.proximal
    if inputs.proximal_mix is not None:
        anchor = (inputs.behavior + inputs.proximal_mix * (current - inputs.behavior)).detach()
    difference = current - anchor
    if inputs.segment_log_ratios is not None:
        difference = _segment_difference(current, ids, inputs.segment_log_ratios)
    log_ratio = torch.clamp(difference, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    loss = -sum(_objective_reference(a, log_ratio, anchor, inputs, options) for a in parts)
    if options.behavior_weight != "none":
        gap = anchor - inputs.behavior if inputs.is_decoupled else log_ratio
        loss = loss * _behavior_weight(gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), options)[0].detach()
    drift = torch.clamp(current - inputs.behavior, -MAX_LOG_RATIO, MAX_LOG_RATIO)
    loss = loss + options.log_ratio_coef * drift.square()
    if inputs.reference is not None and options.kl_coef > 0:
        r = torch.clamp(inputs.reference - current, -MAX_LOG_RATIO, MAX_LOG_RATIO)
        loss = loss + options.kl_coef * {"k1": -r, "k2": r.square() / 2, "k3": r.exp() - r - 1}[options.kl]
    return (inputs.weights[ids] * loss).sum()


def _segment_difference(current: Tensor, ids: Tensor, log_ratios: Tensor) -> Tensor:
    """Return each token's segment log-ratio, with the gradient of a mean over the segment's tokens.

    The tokens at hand may be part of a segment only. What they add to the mean changes with slope 1 / n, and
    the segment's objective counts at each of its n tokens, so per token the slope is 1.
    """
    return log_ratios[ids] + current - current.detach()


def _objective_reference(
    advantage: Tensor, log_ratio: Tensor, anchor: Tensor, inputs: LossInputs, options: LossOptions
) -> Tensor:
    current, ratio = inputs.current, log_ratio.exp()
    low, high = 1 - options.eps_low, 1 + options.eps_high
    if options.clip == "none":
        return advantage * current
    if options.clip == "one_side":
        keep = ((advantage >= 0) & (ratio <= high)) | ((advantage <= 0) & (ratio >= low))
        return keep.to(current.dtype) * advantage * current
    if options.clip == "cispo":
        return ratio.clamp(low, high).detach() * advantage * current
    if options.clip == "topr":
        return torch.where(advantage < 0, ratio.clamp(max=1), 1).detach() * advantage * current
    if options.clip == "dppo_tv":
        move = (current.exp() - anchor.exp()) * advantage.sign()
        return (move <= options.tv_bound) * ratio * advantage
    if inputs.m2po_bound is not None:
        clipped = log_ratio.clamp(-inputs.m2po_bound[1], inputs.m2po_bound[0]).exp()
    else:
        clipped = ratio.clamp(low, high)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    if options.dual_clip is not None:
        dual = torch.maximum(objective, options.dual_clip * advantage)
        objective = torch.where(advantage < 0, dual, objective)
    return objective


def _behavior_weight(ratio: Tensor, options: LossOptions) -> tuple[Tensor, Tensor]:
    """Return (weight, whether the ratio lay outside its range)."""
    if options.behavior_weight == "truncated":
        return ratio.clamp(max=options.weight_cap), ratio > options.weight_cap
    outside = (ratio > options.weight_cap) | (ratio < options.weight_floor)
    return ratio * ~outside, outside


@dataclass(frozen=True)
class _Policy:
    """Value and slope of the clipped objective, and which tokens lost their gradient by sign."""

    objective: Tensor
    slope: Tensor
    masked_positive: Tensor
    masked_negative: Tensor
    dual: Tensor | None


def _policy(
    positive: Tensor, negative: Tensor, ratio: Tensor, log_ratio: Tensor, is_clamped: Tensor,
    anchor: Tensor, inputs: LossInputs, options: LossOptions,
) -> _Policy:  # fmt: skip
    """Evaluate the clip's row of the table for the two parts of the advantage."""
    current = inputs.current
    low: Any = 1 - options.eps_low
    high: Any = 1 + options.eps_high
    too_high, too_low, dual = ratio > high, ratio < low, None
    if options.clip == "dppo_tv":
        move = current.exp() - anchor.exp()
        too_high, too_low = move > options.tv_bound, move < -options.tv_bound
    if inputs.m2po_bound is not None:  # clip "m2po"
        upper, lower = inputs.m2po_bound[0], inputs.m2po_bound[1]
        too_high, too_low = log_ratio > upper, log_ratio < -lower
        high, low = upper.exp(), (-lower).exp()
    masked_positive, masked_negative = (positive > 0) & too_high, (negative < 0) & too_low
    if options.clip in ("none", "cispo", "topr"):
        slope = positive + negative
        if options.clip == "cispo":
            slope = slope * ratio.clamp(low, high)
        elif options.clip == "topr":
            slope = positive + negative * ratio.clamp(max=1)
            masked_positive, masked_negative = torch.zeros_like(too_high), (negative < 0) & (ratio > 1)
        return _Policy(slope * current, slope, masked_positive, masked_negative, None)
    keep_negative = ~masked_negative
    if options.dual_clip is not None:
        dual = (negative < 0) & (ratio > options.dual_clip)
        keep_negative = keep_negative & ~dual
    slope = positive * ~masked_positive + negative * keep_negative
    if options.clip == "one_side":
        return _Policy(slope * current, slope, masked_positive, masked_negative, None)
    slope = slope * ratio
    if options.clip == "dppo_tv":
        objective = slope
    else:
        lowest = torch.clamp(ratio, min=low)
        if options.dual_clip is not None:
            lowest = lowest.clamp(max=options.dual_clip)
        objective = torch.clamp(ratio, max=high) * positive + lowest * negative
    return _Policy(objective, slope * ~is_clamped, masked_positive, masked_negative, dual)


def loss_gradient_and_metrics(
    inputs: LossInputs, options: LossOptions, *, has_checked: bool | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return (loss scalar, d loss / d current [A], metrics float64 [len(METRIC_NAMES)]).

    A token with a bad value has a NaN gradient and makes the loss NaN.

    Args:
        inputs: tensors of the call.
        options: its switches.
        has_checked: segment ids are known to be in range; on the CPU they are when None.
    """
    if has_checked is None:
        has_checked = inputs.current.device.type == "cpu"  # the op has refused others already
    current, ids, weights = inputs.current, inputs.segment_ids, inputs.weights
    is_bad_id = None
    if not has_checked:
        is_bad_id = (ids < 0) | (ids >= weights.numel())
        ids = ids.clamp(0, weights.numel() - 1)
    positive, negative = advantage_parts(inputs, ids)
    weight, is_bad_segment = _token_weight(inputs, ids, positive, negative)
    gaps = _gaps(inputs, ids)
    log_ratio = gaps.clip.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    is_clamped = gaps.clip != log_ratio  # true for NaN as well
    policy = _policy(positive, negative, ratio, log_ratio, is_clamped, gaps.anchor, inputs, options)
    objective, slope = policy.objective, policy.slope
    drift, grown = log_ratio, ratio  # of current and behaviour
    if gaps.clip is not gaps.drift:
        drift = gaps.drift.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
        grown = drift.exp()
    behavior_weight = is_outside = None
    if options.behavior_weight != "none":
        raw = gaps.weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp() if inputs.is_decoupled else grown
        behavior_weight, is_outside = _behavior_weight(raw, options)
        slope, objective = slope * behavior_weight, objective * behavior_weight
        if options.clip not in RATIO_CLIPS:
            objective = slope * current
    kl_value, kl_slope = _divergence(inputs, options)
    is_nonfinite = ~torch.isfinite(gaps.drift + inputs.behavior)
    if inputs.is_decoupled:
        is_nonfinite = is_nonfinite | ~torch.isfinite(gaps.weight)
    if inputs.reference is not None:
        is_nonfinite = is_nonfinite | ~torch.isfinite(inputs.reference)
    is_bad = is_nonfinite | is_bad_segment
    if is_bad_id is not None:
        is_bad = is_bad | is_bad_id
    weight = torch.where(is_bad, torch.nan, weight)
    token_loss, gradient = -objective, -slope
    if options.kl_coef > 0 and kl_value is not None:
        token_loss = token_loss + options.kl_coef * kl_value
        gradient = gradient + options.kl_coef * kl_slope
    if options.log_ratio_coef > 0:
        token_loss = token_loss + options.log_ratio_coef * drift.square()
        gradient = gradient + 2 * options.log_ratio_coef * drift * (gaps.drift == drift)
    loss = (weight * token_loss).sum(dtype=torch.float64)
    metrics = _metrics(
        {
            "num_nonfinite": is_nonfinite,
            "num_clamped": is_clamped,
            "num_positive": positive > 0,
            "num_negative": negative < 0,
            "num_masked_positive": policy.masked_positive,
            "num_masked_negative": policy.masked_negative,
            "sum_ratio": ratio,
            "sum_ratio_squared": ratio.double().square(),
            "sum_behavior_weight": behavior_weight,
            "num_weight_capped": is_outside,
            "sum_kl_behavior": grown - drift - 1,
            "sum_kl_reference": kl_value,
            "sum_entropy": inputs.entropy,
            "sum_advantage": positive + negative,
            "policy_loss": -(weight * objective),
            "num_dual_clipped": policy.dual,
            "num_bad_segments": is_bad_segment,
            "num_bad_ids": is_bad_id,
        },
        ratio,
        is_bad,
    )
    return loss.to(current.dtype), gradient * weight, metrics


class _Gaps(NamedTuple):
    """Differences of log-probs, [A] each, not clamped.

    Attributes:
        clip: current - anchor, or the segment's log-ratio; its exponential is the clip's ratio.
        anchor: of the clip.
        weight: anchor - behaviour; the logarithm of the behaviour weight of a decoupled objective.
        drift: current - behaviour; the very tensor ``clip`` where the two are the same.
    """

    clip: Tensor
    anchor: Tensor
    weight: Tensor
    drift: Tensor


def _gaps(inputs: LossInputs, ids: Tensor) -> _Gaps:
    drift = inputs.current - inputs.behavior
    clip, anchor, weight = drift, inputs.behavior, drift
    if inputs.proximal_mix is not None:
        weight = inputs.proximal_mix * drift
        clip, anchor = (1 - inputs.proximal_mix) * drift, inputs.behavior + weight
    elif inputs.proximal is not None:
        anchor = inputs.proximal
        clip, weight = inputs.current - anchor, anchor - inputs.behavior
    if inputs.segment_log_ratios is not None:
        clip = inputs.segment_log_ratios[ids]
    return _Gaps(clip, anchor, weight, drift)


def advantage_parts(inputs: LossInputs, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return the positive and the negative part of each token's advantage."""
    if inputs.negative_advantages is not None:
        return inputs.advantages[ids], inputs.negative_advantages[ids]
    advantage = inputs.advantages[ids]
    return advantage.clamp(min=0), advantage.clamp(max=0)


def _token_weight(
    inputs: LossInputs, ids: Tensor, positive: Tensor, negative: Tensor
) -> tuple[Tensor, Tensor]:
    """Return (each token's weight, whether what its segment says cannot be used)."""
    weight = inputs.weights[ids]
    is_bad = ~torch.isfinite(weight * (positive + negative))
    if inputs.negative_advantages is not None:
        is_bad = is_bad | (positive < 0) | (negative > 0)
    if inputs.m2po_bound is not None:
        is_bad = is_bad | ~((inputs.m2po_bound >= 0) & torch.isfinite(inputs.m2po_bound)).all()
    if inputs.segment_log_ratios is not None:
        is_bad = is_bad | ~torch.isfinite(inputs.segment_log_ratios[ids])
    return weight, is_bad


def _divergence(inputs: LossInputs, options: LossOptions) -> tuple[Tensor | None, Tensor]:
    """Return the estimate of KL(current || reference) of each token and its slope."""
    if inputs.reference is None:
        return None, inputs.current
    gap = inputs.reference - inputs.current
    r = gap.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    is_inside = gap == r
    if options.kl == "k1":
        return -r, is_inside.to(r.dtype)
    if options.kl == "k2":
        return r.square() / 2, -r * is_inside
    grown = r.exp()
    return grown - r - 1, (1 - grown) * is_inside


def _metrics(terms: dict[str, Tensor | None], ratio: Tensor, is_bad: Tensor) -> Tensor:
    """Reduce the token-wise terms (in the order of METRIC_NAMES) to one vector, without leaving the
    device.
    """
    zero = torch.zeros((), dtype=torch.float64, device=ratio.device)

    def total(term: Tensor | None) -> Tensor:
        if term is None:
            return zero
        is_count = term.dtype == torch.bool
        return term.count_nonzero().double() if is_count else term.sum(dtype=torch.float64)

    sums = [zero + ratio.numel()]
    sums += [total(terms[name]) for name in METRIC_NAMES[1:NUM_ADDITIVE]]
    index = torch.arange(ratio.numel(), dtype=torch.float64, device=ratio.device)
    first = torch.where(is_bad, index, torch.inf).min()
    return torch.stack([*sums, ratio.max().double(), ratio.min().double(), first])
