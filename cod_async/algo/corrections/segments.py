"""What holds for a segment as a whole: its log-ratio, its weight, and whether it is left out.

The tokens of a segment may lie in several rows and micro-batches, so these take the log-ratios of everything
that one optimiser step trains on. A product over tokens has a logarithm whose variance grows with their
number; the geometric mean has none of that, and is what segments are judged by. Over a whole lifecycle there
is no product at all: the configuration refuses it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cod_kernels import segment_reduce

MAX_LOG_RATIO = 20.0
"""Bound on the size of a segment's log-ratio before it is exponentiated, as in the fused loss."""


def segment_log_ratios(log_ratios: Tensor, segment_ids: Tensor, num_segments: int, reduction: str) -> Tensor:
    """Return the log-ratio of each segment, float64 [N]; 0 for a segment without tokens.

    ``geometric_mean``: the mean of its tokens' log-ratios, log of GSPO's ratio (arXiv 2507.18071, equation
    7). ``product``: their sum, the log of the sequence's importance weight.

    Args:
        log_ratios: [A].
        segment_ids: [A] in [0, N), in any order.
        num_segments: N.
        reduction: one of the two.

    Raises:
        ValueError: no such reduction.
    """
    if reduction not in ("geometric_mean", "product"):
        raise ValueError(f"no reduction {reduction!r} of a segment's log-ratios")
    sums, counts = segment_reduce(log_ratios.double(), segment_ids, num_segments)
    return sums / counts.clamp(min=1) if reduction == "geometric_mean" else sums


def bounded_weight(log_ratios: Tensor, kind: str, floor: float, cap: float) -> tuple[Tensor, Tensor]:
    """Return (importance weight of each segment, whether its ratio lay outside the bounds), [N].

    With w = e^(log-ratio): ``truncated`` is min(w, cap) (sequence TIS), ``masked`` is w inside [floor, cap]
    and else 0. Constants for the gradient.

    Raises:
        ValueError: no such kind.
    """
    weight = log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    if kind == "truncated":
        return weight.clamp(max=cap), weight > cap
    if kind == "masked":
        is_outside = (weight > cap) | (weight < floor)
        return torch.where(is_outside, 0.0, weight), is_outside
    raise ValueError(f"no behaviour weight {kind!r}")


def geometric_mask(mean_log_ratios: Tensor, floor: float, cap: float) -> Tensor:
    """Return whether a segment is kept, bool [N]: its geometric mean ratio lies in [floor, cap].

    The mean over n tokens scatters like 1 / sqrt(n), so unlike a product it does not condemn long segments;
    bounds of 0.99 and 1.01 are in use for the mismatch of engine and trainer over thousands of tokens, stale
    and short segments need wider ones.
    """
    ratio = mean_log_ratios.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    return (ratio >= floor) & (ratio <= cap)


def negative_drift_mask(mean_log_ratios: Tensor, advantages: Tensor, drift: float) -> Tensor:
    """Return whether a segment is kept, bool [N]: off-policy sequence masking (OPSM).

    A segment with a negative advantage is left out once mean(old - current) > drift, that is, once its tokens
    have become less likely already: pushing further down is what makes stale negatives diverge.
    """
    return ~((advantages < 0) & (-mean_log_ratios > drift))
