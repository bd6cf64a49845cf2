"""From a loss recipe to the arguments of the fused loss.

Most of a recipe is decided token by token inside the fused loss. What is not (one number per segment, one
bound per step) needs the log-probs of everything that an optimiser step trains on, before its loss: a
*survey*, one forward pass without gradients, which makes a step a quarter longer. Recipes that need none
get none, and the exact proximal log-probs of a step with one optimiser step are the current ones, which costs
nothing either: the fused loss is told that they lie at share 1 between behaviour and current.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from cod_async.algo.corrections.aggregation import token_weights
from cod_async.algo.corrections.proximal import interpolation_share
from cod_async.algo.corrections.second_moment import second_moment_bounds
from cod_async.algo.corrections.segments import (
    bounded_weight,
    geometric_mask,
    negative_drift_mask,
    segment_log_ratios,
)
from cod_async.config.schema import LossConfig
from cod_async.errors import WorkError
from cod_async.learner.distillation import bounded_teacher
from cod_async.learner.packing import FlatRows, MicroBatch, upload
from cod_kernels import LossOptions


def needs_survey(loss: LossConfig) -> bool:
    """Whether a recipe needs every log-prob of an optimiser step before its loss."""
    return (
        loss.ratio == "segment"
        or loss.segment_mask != "none"
        or loss.clip == "m2po"
        or (loss.behavior_weight != "none" and loss.weight_level == "segment")
    )


def needs_start(loss: LossConfig, num_parts: int) -> bool:
    """Whether the log-probs under the step's starting weights differ from the current ones and are needed."""
    return loss.proximal == "start" and num_parts > 1


def loss_options(loss: LossConfig) -> LossOptions:
    """Return the fused loss's switches; weights of whole segments are not among them."""
    is_token_weight = loss.weight_level == "token"
    return LossOptions(
        clip=loss.clip,
        eps_low=loss.eps_low,
        eps_high=loss.eps_high,
        behavior_weight=loss.behavior_weight if is_token_weight else "none",
        weight_cap=loss.weight_cap,
        kl_coef=loss.kl_coef,
        dual_clip=loss.dual_clip or None,
        weight_floor=loss.weight_floor if loss.behavior_weight == "masked" else 0.0,
        tv_bound=loss.tv_bound,
        kl=loss.kl,
        log_ratio_coef=loss.log_ratio_coef,
    )


@dataclass(frozen=True)
class Objective:
    """What the fused loss needs for one optimiser step, on the device; A action tokens, N items.

    Attributes:
        options: its switches.
        segment_ids: int64 [A].
        behavior: float32 [A].
        lags: int64 [A].
        num_tokens: int64 [N], action tokens of each item.
        advantages: float64 [N], times the weights and masks of whole segments.
        raw_advantages: float64 [N], as they came.
        weights: float64 [N].
        proximal: [A], or None.
        proximal_mix: [A], or None.
        segment_log_ratios: [N], or None.
        m2po_bound: [2], or None.
        is_kept: bool [N], which segments the mask leaves in, or None without a mask.
        segment_weights: [N], or None.
        is_weight_outside: bool [N], whether a segment's ratio lay outside the bounds of its weight, or None.
        teacher: float32 [A], what a step that distills pulls towards (:mod:`.distillation`), or None.
    """

    options: LossOptions
    segment_ids: Tensor
    behavior: Tensor
    lags: Tensor
    num_tokens: Tensor
    advantages: Tensor
    raw_advantages: Tensor
    weights: Tensor
    proximal: Tensor | None = None
    proximal_mix: Tensor | None = None
    segment_log_ratios: Tensor | None = None
    m2po_bound: Tensor | None = None
    is_kept: Tensor | None = None
    segment_weights: Tensor | None = None
    is_weight_outside: Tensor | None = None
    teacher: Tensor | None = None

    def teacher_of(self, batch: MicroBatch) -> Tensor | None:
        """Return the teachers' log-probs of a micro-batch's action tokens, or None without teachers."""
        return None if self.teacher is None else self.teacher[batch.actions]

    def of(self, batch: MicroBatch) -> dict[str, Any]:
        """Return the arguments of ``linear_segment_loss`` for the tokens of a micro-batch."""
        return {
            "behavior_logprobs": batch.behavior_logprobs,
            "segment_ids": batch.segment_ids,
            "advantages": self.advantages,
            "weights": self.weights,
            "proximal_logprobs": None if self.proximal is None else self.proximal[batch.actions],
            "proximal_mix": None if self.proximal_mix is None else self.proximal_mix[batch.actions],
            "segment_log_ratios": self.segment_log_ratios,
            "m2po_bound": self.m2po_bound,
        }


def make_objective(
    loss: LossConfig,
    flat: FlatRows,
    device: torch.device,
    *,
    survey: Tensor | None = None,
    proximal: Tensor | None = None,
) -> Objective:
    """Prepare the loss of one optimiser step; nothing is read back from the device.

    Args:
        loss: the recipe.
        flat: what the optimiser step trains on.
        device: of the model.
        survey: [A] log-probs under the weights as they are, where :func:`needs_survey`.
        proximal: [A] under the weights that the whole step started with, where :func:`needs_start`.
    """
    num_tokens = upload(np.bincount(flat.action_items, minlength=flat.advantages.size), device)
    advantages = upload(flat.advantages, device)
    ids, lags = upload(flat.action_items, device), upload(flat.action_lags, device)
    behavior = upload(flat.behavior_logprobs, device)
    mix = None
    if loss.proximal == "interpolated":
        mix = interpolation_share(lags)
    elif loss.proximal == "start" and proximal is None:
        mix = torch.ones_like(lags, dtype=torch.float64)
    whole = Objective(
        options=loss_options(loss),
        segment_ids=ids,
        behavior=behavior,
        lags=lags,
        num_tokens=num_tokens,
        advantages=advantages,
        raw_advantages=advantages,
        weights=token_weights(num_tokens, loss.aggregation, fixed_length_tokens=loss.fixed_length_tokens),
        proximal=proximal,
        proximal_mix=mix,
    )
    if loss.is_distilled:
        return _distilled(whole, flat)
    return whole if survey is None else _with_segments(loss, whole, survey)


def _distilled(whole: Objective, flat: FlatRows) -> Objective:
    """Return the objective of a step that distills: no advantages, and the teachers to pull towards.

    Raises:
        WorkError: the items hold no log-probs of teachers.
    """
    if flat.teacher_logprobs is None:
        raise WorkError(
            'the step has no log-probs of teachers, which loss.preset = "opd" trains on; its segments were '
            "played without [[distillation.teachers]]"
        )
    teacher = bounded_teacher(upload(flat.teacher_logprobs, whole.behavior.device), whole.behavior)
    return replace(whole, advantages=torch.zeros_like(whole.advantages), teacher=teacher)


def _with_segments(loss: LossConfig, whole: Objective, survey: Tensor) -> Objective:
    """Add what one survey says about segments and the step."""
    drift = survey.double() - whole.behavior.double()
    if whole.proximal_mix is not None:
        to_proximal = whole.proximal_mix * drift
    else:
        to_proximal = drift if whole.proximal is None else whole.proximal.double() - whole.behavior.double()
    # Against the anchor of the clip; the behaviour policy where the objective is not decoupled.
    is_decoupled = whole.proximal is not None or whole.proximal_mix is not None
    to_current = drift - to_proximal if is_decoupled else drift
    num_segments = whole.advantages.numel()

    def of_segments(log_ratios: Tensor, reduction: str = "geometric_mean") -> Tensor:
        return segment_log_ratios(log_ratios, whole.segment_ids, num_segments, reduction)

    advantages, segment_weights, is_kept, is_outside = whole.advantages, None, None, None
    if loss.behavior_weight != "none" and loss.weight_level == "segment":
        segment_weights, is_outside = bounded_weight(
            of_segments(to_proximal, loss.segment_weight),
            loss.behavior_weight,
            loss.weight_floor,
            loss.weight_cap,
        )
        advantages = advantages * segment_weights
    if loss.segment_mask == "geometric_mean":
        is_kept = geometric_mask(of_segments(to_proximal), loss.mask_floor, loss.mask_cap)
    elif loss.segment_mask == "negative_drift":
        # Against the behaviour policy, whatever the clip's anchor: with one update the proximal is current.
        is_kept = negative_drift_mask(of_segments(drift), whole.raw_advantages, loss.mask_drift)
    if is_kept is not None:
        advantages = advantages * is_kept
    bound = None
    if loss.clip == "m2po":
        bound = second_moment_bounds(
            drift,
            whole.raw_advantages[whole.segment_ids],
            loss.second_moment,
            (loss.narrowest_low, loss.narrowest_high),
        )
    return replace(
        whole,
        advantages=advantages,
        segment_log_ratios=of_segments(to_current) if loss.ratio == "segment" else None,
        m2po_bound=bound,
        is_kept=is_kept,
        segment_weights=segment_weights,
        is_weight_outside=is_outside,
    )
