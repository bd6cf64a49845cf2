"""What lies between the policy that spoke and the one being trained, measured on every step.

Two different gaps: at lag 0 both had the same weights, so what is left is the mismatch of engine and trainer;
beyond it staleness is added. They are kept apart by the lag of each token. All of it comes from log-probs
that the step has made anyway: sums on the device, in fixed order, joined with the loss's own metrics, so that
the host waits once per optimiser step.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from cod_async.algo.corrections.segments import segment_log_ratios
from cod_async.algo.corrections.step_size import effective_sample_frac
from cod_async.learner.distillation import MAX_TEACHER_GAP_NATS
from cod_async.learner.objective import Objective
from cod_async.learner.packing import upload
from cod_kernels import segment_reduce

MAX_LOG_RATIO = 20.0
"""Bound on a log-ratio before it is exponentiated, as in the fused loss."""

BOUNDED_GAP_NATS = MAX_TEACHER_GAP_NATS - 1e-3
"""A teacher this far away from the behaviour policy has been bounded; the margin is float32's rounding."""

LAG_EDGES = (0, 1, 2, 4, 8, 16, 32)
"""The last lag of each bucket but the open one."""
LAG_NAMES = ("0", "1", "2", "3_4", "5_8", "9_16", "17_32", "over_32")
"""Names of the buckets of lags, in optimiser steps."""

_PER_LAG = ("count", "ratio", "ratio_squared", "k3", "abs", "k1", "lag")
_STEP = (
    "num_segments",
    "segment_ratio",
    "segment_ratio_squared",
    "num_positive",
    "num_negative",
    "num_segment_masked_positive",
    "num_segment_masked_negative",
    "num_outside_positive",
    "num_outside_negative",
    "num_zeroed_positive",
    "num_zeroed_negative",
    "segment_weight",
    "num_segment_capped",
    "num_taught",
    "teacher_k1",
    "teacher_k3",
    "num_teacher_bounded",
)
NUM_GAPS = len(_PER_LAG) * len(LAG_NAMES) + len(_STEP)
"""Length of the vector that :func:`gap_sums` returns."""


def gap_sums(objective: Objective, current: Tensor) -> Tensor:
    """Return the sums that :func:`gap_metrics` makes numbers of, float64 [NUM_GAPS], on the device.

    Args:
        objective: of the optimiser step.
        current: [A] log-probs under the weights being trained, without history.
    """
    drift = (current.double() - objective.behavior.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    ratio = drift.exp()
    edges = upload(np.array(LAG_EDGES), current.device)
    bucket = torch.bucketize(objective.lags, edges)
    values = (
        torch.ones_like(drift),
        ratio,
        ratio.square(),
        ratio - drift - 1,
        drift.abs(),
        -drift,
        objective.lags.double(),
    )
    # A value that is not finite is the loss's to refuse, by name; here it must not spoil the other sums.
    sums = [segment_reduce(v.nan_to_num(), bucket, len(LAG_NAMES))[0] for v in values]
    step = _step_sums(objective, drift.nan_to_num()) + _teacher_sums(objective, current)
    return torch.cat([*sums, torch.stack(step)])


def _teacher_sums(objective: Objective, current: Tensor) -> list[Tensor]:
    """Return number, divergences (k1, k3) and bounded ones of the tokens that have a teacher."""
    zero = torch.zeros((), dtype=torch.float64, device=current.device)
    if objective.teacher is None:
        return [zero] * 4
    above = (current.double() - objective.teacher.double()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).nan_to_num()
    gap = (objective.teacher.double() - objective.behavior.double()).abs()
    return [
        zero + above.numel(),
        above.sum(),
        ((-above).exp() + above - 1).sum(),
        (gap > BOUNDED_GAP_NATS).sum().double(),
    ]


def _step_sums(objective: Objective, drift: Tensor) -> list[Tensor]:
    ids, advantages = objective.segment_ids, objective.raw_advantages
    is_positive, is_negative = (advantages > 0)[ids], (advantages < 0)[ids]
    zero = drift.new_zeros(())
    num_segments = advantages.numel()
    has_tokens = (objective.num_tokens > 0).double()
    segment_ratio = segment_log_ratios(drift, ids, num_segments, "geometric_mean").exp() * has_tokens
    masked = outside = capped = weight = None
    if objective.is_kept is not None:
        masked = ~objective.is_kept
    if objective.segment_weights is not None and objective.is_weight_outside is not None:
        weight, capped = objective.segment_weights[ids].sum(), objective.is_weight_outside[ids].sum().double()
        outside = objective.is_weight_outside[ids]
        is_zero = objective.segment_weights == 0
        masked = is_zero if masked is None else masked | is_zero
    elif objective.options.behavior_weight != "none":
        outside = _outside(objective, drift)
    zeroed = outside if objective.options.behavior_weight == "masked" else None

    def count(mask: Tensor | None, of: Tensor) -> Tensor:
        return zero if mask is None else (mask & of).sum().double()

    return [
        has_tokens.sum(),
        segment_ratio.sum(),
        segment_ratio.square().sum(),
        is_positive.sum().double(),
        is_negative.sum().double(),
        count(None if masked is None else masked[ids], is_positive),
        count(None if masked is None else masked[ids], is_negative),
        count(outside, is_positive),
        count(outside, is_negative),
        count(zeroed, is_positive),
        count(zeroed, is_negative),
        zero if weight is None else weight,
        zero if capped is None else capped,
    ]


def _outside(objective: Objective, drift: Tensor) -> Tensor:
    """Return which tokens' behaviour weight lies outside its bounds."""
    weight = drift
    if objective.proximal_mix is not None:
        weight = objective.proximal_mix * drift
    elif objective.proximal is not None:
        weight = objective.proximal.double() - objective.behavior.double()
    ratio = weight.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    is_outside = ratio > objective.options.weight_cap
    return is_outside | (ratio < objective.options.weight_floor)


def token_ess_frac(sums: Sequence[float]) -> float:
    """Return the effective sample fraction of current / behaviour over the tokens of one optimiser step."""
    count, ratio, squared = (sum(_bucket_sums(sums, name)) for name in ("count", "ratio", "ratio_squared"))
    return effective_sample_frac(ratio, squared, max(count, 1.0))


def _bucket_sums(sums: Sequence[float], name: str) -> list[float]:
    start = _PER_LAG.index(name) * len(LAG_NAMES)
    return list(sums[start : start + len(LAG_NAMES)])


def gap_metrics(parts: Sequence[Sequence[float]], loss_metrics: dict[str, float]) -> dict[str, float]:
    """Turn the sums of a step's optimiser steps into named numbers; only finite ones, only of what there was.

    Log-ratios are those of current and behaviour, whatever the clip's ratio is taken against. With several
    mini-batches, later ones see weights that earlier ones have moved; the mismatch is that of the first.

    Args:
        parts: vectors of :func:`gap_sums`, as numbers, in order.
        loss_metrics: of the same step, from ``summarize_metrics``; its masked fractions are corrected for
            segments that were masked as a whole.

    Returns:
        ``mismatch_abs_nats``, ``mismatch_k1_nats``, ``mismatch_k3_nats``: on tokens of lag 0, the mean of
        |log-ratio|, of behaviour - current and of ratio - 1 - log-ratio, estimates of KL(behaviour ||
        current) between engine and trainer. ``staleness_abs_nats``, ``staleness_k3_nats``: the same on older
        tokens, the mismatch included. ``kl_drift_per_version_nats``: their k3 divided by their lag, by which
        lags of different runs compare. ``token_lag_mean``: in steps. ``ess_frac``, ``ess_segments_frac``:
        effective samples over tokens, and over segments with their geometric mean ratios. Per bucket of lags:
        ``lag_B_tokens_frac``, ``lag_B_ratio_mean``, ``lag_B_ess_frac``, ``lag_B_kl_nats``. ``masked_frac``,
        ``masked_positive_frac``, ``masked_negative_frac``: by the clip or with their segment;
        ``segment_masked_frac``. ``weight_outside_positive_frac``, ``weight_outside_negative_frac``: of the
        tokens of that sign, their behaviour weight beyond its bounds; ``weight_zeroed_…``: those of them that
        count nothing, because weights are masked token by token instead of truncated.
        ``behavior_weight_mean``, ``weight_capped_frac``: of segment weights. ``distillation_kl_nats``,
        ``distillation_k3_nats``: with teachers, the mean of current - teacher, and of ratio - 1 - log-ratio
        with teacher / current, estimates of KL(current || teacher) per token;
        ``distillation_bounded_frac``: tokens that a teacher would have pulled at harder than it may.
    """
    total = [sum(column) for column in zip(*parts, strict=True)]
    of = {name: _bucket_sums(total, name) for name in _PER_LAG}
    step = dict(zip(_STEP, total[len(_PER_LAG) * len(LAG_NAMES) :], strict=True))
    count = max(sum(of["count"]), 1.0)
    numbers = {
        "token_lag_mean": sum(of["lag"]) / count,
        "ess_frac": effective_sample_frac(sum(of["ratio"]), sum(of["ratio_squared"]), count),
        "ess_segments_frac": effective_sample_frac(
            step["segment_ratio"], step["segment_ratio_squared"], max(step["num_segments"], 1.0)
        ),
    }
    numbers |= _by_lag(of, count) | _gap_numbers(parts[0], of) | _teacher_numbers(step)
    return numbers | _masked(step, loss_metrics, count)


def _teacher_numbers(step: dict[str, float]) -> dict[str, float]:
    count = step["num_taught"]
    if not count:
        return {}
    return {
        "distillation_kl_nats": step["teacher_k1"] / count,
        "distillation_k3_nats": step["teacher_k3"] / count,
        "distillation_bounded_frac": step["num_teacher_bounded"] / count,
    }


def _by_lag(of: dict[str, list[float]], count: float) -> dict[str, float]:
    numbers = {}
    for bucket, name in enumerate(LAG_NAMES):
        here = of["count"][bucket]
        numbers[f"lag_{name}_tokens_frac"] = here / count
        if here:
            numbers[f"lag_{name}_ratio_mean"] = of["ratio"][bucket] / here
            numbers[f"lag_{name}_ess_frac"] = effective_sample_frac(
                of["ratio"][bucket], of["ratio_squared"][bucket], here
            )
            numbers[f"lag_{name}_kl_nats"] = of["k3"][bucket] / here
    return numbers


def _gap_numbers(first: Sequence[float], of: dict[str, list[float]]) -> dict[str, float]:
    numbers = {}
    fresh = _bucket_sums(first, "count")[0]
    if fresh:
        for name in ("abs", "k1", "k3"):
            numbers[f"mismatch_{name}_nats"] = _bucket_sums(first, name)[0] / fresh
    stale = sum(of["count"][1:])
    if stale:
        numbers["staleness_abs_nats"] = sum(of["abs"][1:]) / stale
        numbers["staleness_k3_nats"] = sum(of["k3"][1:]) / stale
        numbers["kl_drift_per_version_nats"] = sum(of["k3"][1:]) / sum(of["lag"][1:])
    return numbers


def _masked(step: dict[str, float], loss_metrics: dict[str, float], count: float) -> dict[str, float]:
    """Join what the clip masked with what was masked by segments, over the tokens of each sign.

    The fused loss sees a masked segment as one without advantage, so its own counts are of the others.
    """
    numbers = {}
    masked = 0.0
    for sign in ("positive", "negative"):
        all_of, by_segment = step[f"num_{sign}"], step[f"num_segment_masked_{sign}"]
        by_clip = loss_metrics[f"masked_{sign}_frac"] * (all_of - by_segment)
        numbers[f"masked_{sign}_frac"] = (by_clip + by_segment) / max(all_of, 1.0)
        numbers[f"weight_outside_{sign}_frac"] = step[f"num_outside_{sign}"] / max(all_of, 1.0)
        numbers[f"weight_zeroed_{sign}_frac"] = step[f"num_zeroed_{sign}"] / max(all_of, 1.0)
        masked += by_clip + by_segment
    numbers["masked_frac"] = masked / count
    by_segments = step["num_segment_masked_positive"] + step["num_segment_masked_negative"]
    numbers["segment_masked_frac"] = by_segments / count
    if step["segment_weight"]:
        numbers["behavior_weight_mean"] = step["segment_weight"] / count
        numbers["weight_capped_frac"] = step["num_segment_capped"] / count
    return numbers
