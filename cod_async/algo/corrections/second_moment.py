"""M2PO: one bound on the log-ratio for a whole step, from how far the step's data has drifted.

Source: arXiv 2510.01161. Only tokens that a clip can touch count: those whose ratio has moved the way their
advantage pulls. While their mean squared log-ratio is within the budget nothing is clipped, however old the
data; beyond it the bound is the one that brings the clipped second moment back to the budget.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

MAX_LOG_RATIO = 20.0
"""Log-ratios are clamped to this in the loss, so a bound of it clips nothing."""
NUM_BISECTIONS = 60
"""Halvings of [0, 400]: to the last bit of a float64."""


def second_moment_bounds(
    log_ratios: Tensor, advantages: Tensor, budget: float, narrowest: tuple[float, float]
) -> Tensor:
    """Return (upper, lower) bound on the size of the log-ratio above and below 0, float64 [2]; nothing is
    read back.

    Over the M tokens with (A > 0 and ratio > 1) or (A < 0 and ratio < 1), x = log-ratio squared: no bound if
    mean x <= budget, else t with mean(min(x, t^2)) = budget. The left side grows with t, so t is found by
    bisection, which needs no sort and no scan and so has one result on every device. The range e^-t to e^t
    is widened to reach ``narrowest``.

    Args:
        log_ratios: [A], current - behaviour, of the whole step.
        advantages: [A], of each token's segment.
        budget: largest mean of squared log-ratios, nats squared; 0.04 in the paper.
        narrowest: ratios that the range always reaches, for example (0.7, 1.5).
    """
    wide = log_ratios.double().clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    is_counted = ((advantages > 0) & (wide > 0)) | ((advantages < 0) & (wide < 0))
    squares = torch.where(is_counted, wide.square(), 0.0)
    allowed = budget * is_counted.sum().double()
    low, high = torch.zeros_like(allowed), torch.full_like(allowed, MAX_LOG_RATIO**2)
    for _ in range(NUM_BISECTIONS):
        middle = (low + high) / 2
        is_within = torch.minimum(squares, middle).sum() <= allowed
        low, high = torch.where(is_within, middle, low), torch.where(is_within, high, middle)
    bound = torch.where(squares.sum() <= allowed, MAX_LOG_RATIO, low.sqrt())
    return torch.stack(
        [bound.clamp(min=math.log(narrowest[1])), bound.clamp(min=-math.log(max(narrowest[0], 1e-8)))]
    )
