"""What the loss made of each token: for looking at, not for training.

The same lines as the torch twin's, but nothing is summed up: the loss itself returns totals only, because
per-token outputs would cost it memory that nobody reads in most steps.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cod_kernels.segment_loss.reference import (
    MAX_LOG_RATIO,
    LossInputs,
    LossOptions,
    _behavior_weight,
    _gaps,
    _policy,
    advantage_parts,
    loss_gradient_and_metrics,
)


class TokenStates(NamedTuple):
    """The loss, token by token; [A] each.

    Attributes:
        ratio: of the clip, current / anchor, bounded by exp(20) either way.
        gradient: d loss / d current log-prob; NaN where a value cannot be used.
        is_clipped_high: positive advantage, ratio above its bound (``num_masked_positive``).
        is_clipped_low: negative advantage, ratio below its bound (``num_masked_negative``).
        is_dual_clipped: negative advantage, ratio above the dual clip.
        is_weight_outside: the behaviour weight lay outside its range (``num_weight_capped``).
        is_clamped: the log-ratio lay outside [-20, 20], where there is no gradient of the ratio.
        is_nonfinite: a log-prob, or what is made of it, is not finite.
    """

    ratio: Tensor
    gradient: Tensor
    is_clipped_high: Tensor
    is_clipped_low: Tensor
    is_dual_clipped: Tensor
    is_weight_outside: Tensor
    is_clamped: Tensor
    is_nonfinite: Tensor


def token_states(inputs: LossInputs, options: LossOptions) -> TokenStates:
    """Return what the loss does with each token.

    Args:
        inputs: of the loss; segment ids are in range.
        options: its switches.
    """
    ids = inputs.segment_ids.long()
    positive, negative = advantage_parts(inputs, ids)
    gaps = _gaps(inputs, ids)
    log_ratio = gaps.clip.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = log_ratio.exp()
    is_clamped = gaps.clip != log_ratio
    policy = _policy(positive, negative, ratio, log_ratio, is_clamped, gaps.anchor, inputs, options)
    none = torch.zeros_like(is_clamped)
    is_outside = none
    if options.behavior_weight != "none":
        weight = gaps.weight if inputs.is_decoupled else gaps.drift
        is_outside = _behavior_weight(weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp(), options)[1]
    is_nonfinite = ~torch.isfinite(gaps.drift + inputs.behavior)
    if inputs.is_decoupled:
        is_nonfinite = is_nonfinite | ~torch.isfinite(gaps.weight)
    if inputs.reference is not None:
        is_nonfinite = is_nonfinite | ~torch.isfinite(inputs.reference)
    _, gradient, _ = loss_gradient_and_metrics(inputs, options, has_checked=True)
    return TokenStates(
        ratio,
        gradient,
        policy.masked_positive,
        policy.masked_negative,
        none if policy.dual is None else policy.dual,
        is_outside,
        is_clamped & ~is_nonfinite,
        is_nonfinite,
    )
