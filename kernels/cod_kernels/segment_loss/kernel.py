"""The segment loss on CUDA: loss, gradient and metrics in one launch; one block then sums in fixed order.

Switches are compile-time constants, lengths and numbers are run-time values: a new length never recompiles.
Sums are float64 and every partial has one writer, so equal inputs give equal bits. Nothing is read back.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, on_device
from cod_kernels.segment_loss.reference import (
    BEHAVIOR_WEIGHTS,
    CLIPS,
    KL_ESTIMATORS,
    MAX_LOG_RATIO,
    METRIC_NAMES,
    NUM_ADDITIVE,
    RATIO_CLIPS,
    LossInputs,
    LossOptions,
)

BLOCK = 1024
NUM_WARPS = 4
COLUMNS = 32  # of the partials: METRIC_NAMES in their order, then the loss, then padding
NUM_METRICS = len(METRIC_NAMES)
FINISH_ROWS, FINISH_WARPS = 64, 8

_ONE_SIDE, _PPO, _NONE, _CISPO, _DPPO_TV, _M2PO, _TOPR = (tl.constexpr(i) for i in range(len(CLIPS)))
_LIMIT = tl.constexpr(MAX_LOG_RATIO)


@triton.jit
def _bounded(x):
    """Clamp to +-20 and keep NaN."""
    return tl.where(x != x, x, tl.minimum(tl.maximum(x, -_LIMIT), _LIMIT))


@triton.jit
def _put(row, column: tl.constexpr, values, mask):
    """Store the float64 sum of the block's values as one partial."""
    tl.store(row + column, tl.sum(tl.where(mask, values.to(tl.float64), 0.0), 0))


@triton.jit
def _policy(
    pos, neg, cur, anchor, ratio, log_ratio, clamped, bound_ptr, low, high, dual_cap, tv,
    CLIP: tl.constexpr, HAS_DUAL: tl.constexpr,
):  # fmt: skip
    """Value and slope of the clipped objective; the README's first table."""
    too_high = ratio > high
    too_low = ratio < low
    if CLIP == _DPPO_TV:
        move = tl.exp(cur) - tl.exp(anchor)
        too_high = move > tv
        too_low = move < -tv
    if CLIP == _M2PO:
        upper = tl.load(bound_ptr)
        lower = tl.load(bound_ptr + 1)
        too_high = log_ratio > upper
        too_low = log_ratio < -lower
        high = tl.exp(upper)
        low = tl.exp(-lower)
    if CLIP == _TOPR:
        too_high = pos != pos
        too_low = ratio > 1.0
    masked_pos = (pos > 0) & too_high
    masked_neg = (neg < 0) & too_low
    dual = masked_neg & (pos != pos)
    if HAS_DUAL:
        dual = (neg < 0) & (ratio > dual_cap)
    slope = tl.where(masked_pos, 0.0, pos) + tl.where(masked_neg | dual, 0.0, neg)
    if (CLIP == _NONE) | (CLIP == _CISPO) | (CLIP == _TOPR):
        slope = pos + neg
        if CLIP == _CISPO:
            slope = slope * tl.minimum(tl.maximum(ratio, low), high)
        if CLIP == _TOPR:
            slope = pos + neg * tl.minimum(ratio, 1.0)
        objective = slope * cur
    elif CLIP == _ONE_SIDE:
        objective = slope * cur
    else:
        slope = slope * ratio
        if CLIP == _DPPO_TV:
            objective = slope
        else:
            lowest = tl.maximum(ratio, low)
            if HAS_DUAL:
                lowest = tl.minimum(lowest, dual_cap)
            objective = tl.minimum(ratio, high) * pos + lowest * neg
            objective = tl.where(ratio != ratio, ratio, objective)
        slope = tl.where(clamped, 0.0, slope)
    return objective, slope, masked_pos, masked_neg, dual


@triton.jit(do_not_specialize=["num_tokens", "num_segments"])
def segment_loss_kernel(
    cur_ptr, beh_ptr, ids_ptr, adv_ptr, neg_ptr, weight_ptr, prox_ptr, ref_ptr, ent_ptr, bound_ptr,
    segment_ptr, grad_ptr, partial_ptr, num_tokens, num_segments, low, high, dual_cap, floor, cap, tv,
    kl_coef, log_ratio_coef,
    CLIP: tl.constexpr, RATIO_INSIDE: tl.constexpr, HAS_DUAL: tl.constexpr, HAS_PARTS: tl.constexpr,
    PROXIMAL: tl.constexpr, HAS_SEGMENT_RATIO: tl.constexpr, HAS_SQUARE: tl.constexpr,
    HAS_ENTROPY: tl.constexpr, WEIGHT: tl.constexpr, KL: tl.constexpr,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One block of tokens. WEIGHT: 0 none, 1 truncated, 2 masked. KL: 0 no reference, else k1, k2, k3.
    PROXIMAL: 0 none, 1 log-probs, 2 shares of the way from behaviour to current.

    Metrics go to the columns of METRIC_NAMES; a bad token's gradient, and with it the loss, become NaN.
    """
    pid = tl.program_id(0).to(tl.int64)
    at = pid * BLOCK + tl.arange(0, BLOCK)
    mask = at < num_tokens
    row = partial_ptr + pid * WIDTH
    cur = tl.load(cur_ptr + at, mask, 0.0)
    beh = tl.load(beh_ptr + at, mask, 0.0)
    ids = tl.load(ids_ptr + at, mask, 0)
    bad_id = (ids < 0) | (ids >= num_segments)
    ids = tl.where(bad_id, 0, ids)
    weight = tl.load(weight_ptr + ids, mask, 0.0)
    pos = tl.load(adv_ptr + ids, mask, 0.0)
    if HAS_PARTS:
        neg = tl.load(neg_ptr + ids, mask, 0.0)
        bad_segment = (pos < 0) | (neg > 0)
    else:
        neg = tl.where(pos < 0, pos, 0.0)
        pos = tl.where(pos < 0, 0.0, pos)
        bad_segment = pos < 0
    scaled = weight * (pos + neg)
    if CLIP == _M2PO:
        upper = tl.load(bound_ptr)
        lower = tl.load(bound_ptr + 1)
        scaled += tl.where((upper >= 0) & (lower >= 0), (upper - upper) + (lower - lower), float("nan"))
    if HAS_SEGMENT_RATIO:
        of_segment = tl.load(segment_ptr + ids, mask, 0.0)
        scaled += of_segment - of_segment
    bad_segment = bad_segment | ((scaled - scaled) != 0.0)
    anchor = beh
    drift = cur - beh
    difference = drift
    whole = drift + beh
    if PROXIMAL == 1:
        anchor = tl.load(prox_ptr + at, mask, 0.0)
        difference = cur - anchor
        whole += difference
    if PROXIMAL == 2:
        share = tl.load(prox_ptr + at, mask, 0.0)
        anchor = beh + share * drift
        difference = (1.0 - share) * drift
        whole += difference
    nonfinite = (whole - whole) != 0.0
    if HAS_SEGMENT_RATIO:
        difference = of_segment
    log_ratio = _bounded(difference)
    ratio = tl.exp(log_ratio)
    clamped = difference != log_ratio
    objective, slope, masked_pos, masked_neg, dual = _policy(
        pos, neg, cur, anchor, ratio, log_ratio, clamped, bound_ptr, low, high, dual_cap, tv, CLIP, HAS_DUAL
    )
    gap, grown = log_ratio, ratio
    if (PROXIMAL != 0) | HAS_SEGMENT_RATIO:
        gap = _bounded(drift)
        grown = tl.exp(gap)
    if WEIGHT != 0:
        raw = grown
        if PROXIMAL != 0:
            raw = tl.exp(_bounded(anchor - beh))
        outside = raw > cap
        factor = tl.where(outside, cap, raw)
        if WEIGHT == 2:
            outside = outside | (raw < floor)
            factor = tl.where(outside, 0.0, raw)
        slope = slope * factor
        objective = objective * factor
        if not RATIO_INSIDE:
            objective = slope * cur
        _put(row, 9, factor, mask)
        _put(row, 10, outside, mask)
    else:
        tl.store(row + 9, 0.0)
        tl.store(row + 10, 0.0)
    token_loss = -objective
    gradient = -slope
    if KL != 0:
        apart = tl.load(ref_ptr + at, mask, 0.0) - cur
        nonfinite = nonfinite | ((apart - apart) != 0.0)
        r = _bounded(apart)
        if KL == 1:
            kl = -r
            kl_slope = tl.full([BLOCK], 1.0, tl.float32)
        elif KL == 2:
            kl = r * r * 0.5
            kl_slope = -r
        else:
            kl = tl.exp(r) - r - 1.0
            kl_slope = 1.0 - tl.exp(r)
        token_loss += kl_coef * kl
        gradient += kl_coef * tl.where(apart == r, kl_slope, 0.0)
        _put(row, 12, kl, mask)
    else:
        tl.store(row + 12, 0.0)
    if HAS_SQUARE:
        token_loss += log_ratio_coef * gap * gap
        gradient += tl.where(drift == gap, 2.0 * log_ratio_coef * gap, 0.0)
    if HAS_ENTROPY:
        _put(row, 13, tl.load(ent_ptr + at, mask, 0.0), mask)
    else:
        tl.store(row + 13, 0.0)
    is_bad = nonfinite | bad_segment | bad_id
    weight = tl.where(is_bad, float("nan"), weight)
    tl.store(grad_ptr + at, gradient * weight, mask)
    _put(row, 0, mask, mask)
    _put(row, 1, nonfinite, mask)
    _put(row, 2, clamped, mask)
    _put(row, 3, pos > 0, mask)
    _put(row, 4, neg < 0, mask)
    _put(row, 5, masked_pos, mask)
    _put(row, 6, masked_neg, mask)
    _put(row, 7, ratio, mask)
    _put(row, 8, ratio.to(tl.float64) * ratio.to(tl.float64), mask)
    _put(row, 11, grown - gap - 1.0, mask)
    _put(row, 14, pos + neg, mask)
    _put(row, 15, -(weight * objective), mask)
    _put(row, 16, dual, mask)
    _put(row, 17, bad_segment, mask)
    _put(row, 18, bad_id, mask)
    infinity = float("inf")
    tl.store(row + 19, tl.max(tl.where(mask, ratio, -infinity), 0).to(tl.float64))
    tl.store(row + 20, tl.min(tl.where(mask, ratio, infinity), 0).to(tl.float64))
    tl.store(row + 21, tl.min(tl.where(mask & is_bad, at.to(tl.float64), infinity), 0))
    _put(row, 22, weight * token_loss, mask)


@triton.jit(do_not_specialize=["num_blocks"])
def finish_kernel(
    partial_ptr, metric_ptr, loss_ptr, num_blocks,
    WIDTH: tl.constexpr, ADDITIVE: tl.constexpr, METRICS: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Join the partials of all blocks, in one block and one order."""
    column = tl.arange(0, WIDTH)
    infinity = float("inf")
    total = tl.zeros([WIDTH], tl.float64)
    largest = tl.full([WIDTH], -infinity, tl.float64)
    smallest = tl.full([WIDTH], infinity, tl.float64)
    for start in range(0, num_blocks, ROWS):
        block = start + tl.arange(0, ROWS)
        inside = (block < num_blocks)[:, None] & (column <= METRICS)[None, :]
        part = tl.load(partial_ptr + block.to(tl.int64)[:, None] * WIDTH + column[None, :], inside, 0.0)
        total += tl.sum(part, 0)
        largest = tl.maximum(largest, tl.max(tl.where(inside, part, -infinity), 0))
        smallest = tl.minimum(smallest, tl.min(tl.where(inside, part, infinity), 0))
    value = tl.where(column == ADDITIVE, largest, tl.where(column > ADDITIVE, smallest, total))
    tl.store(metric_ptr + column, value, column < METRICS)
    loss = tl.sum(tl.where(column == METRICS, total, 0.0), 0)
    tl.store(loss_ptr, loss.to(tl.float32))


def launch(inputs: LossInputs, options: LossOptions) -> tuple[Tensor, Tensor, Tensor]:
    """Run both kernels; the same contract as ``reference.loss_gradient_and_metrics``, in float32."""
    current = inputs.current.contiguous()
    if current.dtype != torch.float32:
        raise KernelInputError(
            f"segment_loss: current_logprobs is {current.dtype}; the Triton kernel takes float32, "
            "pass backend='torch'"
        )
    optional = (
        inputs.segment_ids, inputs.advantages, inputs.negative_advantages, inputs.weights,
        inputs.proximal if inputs.proximal_mix is None else inputs.proximal_mix,
        inputs.reference, inputs.entropy, inputs.m2po_bound, inputs.segment_log_ratios,
    )  # fmt: skip
    ids, adv, neg, weights, prox, ref, ent, bound, segment = (
        current if t is None else t.contiguous() for t in optional
    )
    gradient = torch.empty_like(current)
    blocks = triton.cdiv(current.numel(), BLOCK)
    partials = torch.empty((blocks, COLUMNS), dtype=torch.float64, device=current.device)
    metrics = torch.empty(NUM_METRICS, dtype=torch.float64, device=current.device)
    loss = torch.empty((), dtype=torch.float32, device=current.device)
    numbers = (
        1 - options.eps_low, 1 + options.eps_high, options.dual_clip or 0.0, options.weight_floor,
        options.weight_cap, options.tv_bound, options.kl_coef, options.log_ratio_coef,
    )  # fmt: skip
    with on_device(current):
        segment_loss_kernel[(blocks,)](
            current, inputs.behavior.contiguous(), ids, adv, neg, weights, prox, ref, ent, bound,
            segment, gradient, partials, current.numel(), inputs.advantages.numel(), *map(float, numbers),
            **switches(inputs, options), WIDTH=COLUMNS, BLOCK=BLOCK, num_warps=NUM_WARPS,
            enable_fp_fusion=True,
        )  # fmt: skip
        finish_kernel[(1,)](
            partials, metrics, loss, blocks, WIDTH=COLUMNS, ADDITIVE=NUM_ADDITIVE, METRICS=NUM_METRICS,
            ROWS=FINISH_ROWS, num_warps=FINISH_WARPS, enable_fp_fusion=True,
        )  # fmt: skip
    return loss, gradient, metrics


def switches(inputs: LossInputs, options: LossOptions) -> dict[str, Any]:
    """Return the compile-time constants of a call."""
    return {
        "CLIP": CLIPS.index(options.clip),
        "RATIO_INSIDE": options.clip in RATIO_CLIPS,
        "HAS_DUAL": options.dual_clip is not None,
        "HAS_PARTS": inputs.negative_advantages is not None,
        "PROXIMAL": 2 if inputs.proximal_mix is not None else int(inputs.proximal is not None),
        "HAS_SEGMENT_RATIO": inputs.segment_log_ratios is not None,
        "HAS_SQUARE": options.log_ratio_coef > 0,
        "HAS_ENTROPY": inputs.entropy is not None,
        "WEIGHT": BEHAVIOR_WEIGHTS.index(options.behavior_weight),
        "KL": 0 if inputs.reference is None else 1 + KL_ESTIMATORS.index(options.kl),
    }
