"""What ``segment_loss`` refuses: every message names the argument, and for values the first bad index."""

from __future__ import annotations

import torch
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, first_index, require
from cod_kernels.segment_loss.reference import (
    BEHAVIOR_WEIGHTS,
    CLIPS,
    KL_ESTIMATORS,
    SEGMENT_CLIPS,
    WEIGHTED_CLIPS,
    LossOptions,
)

_OP = "segment_loss"


def check_call(
    tokens: dict[str, Tensor | None],
    segment_ids: Tensor,
    segments: dict[str, Tensor | None],
    options: LossOptions,
    m2po_bound: Tensor | float | None,
) -> None:
    """Check a call; values only on the CPU, because reading them would stall a device.

    Args:
        tokens: [A] tensors by argument name; values of ``current_logprobs`` are not looked at, because inside
            a chunk they do not exist yet.
        segment_ids: [A].
        segments: [N] tensors by argument name, ``advantages`` first.
        options: the switches.
        m2po_bound: as given.

    Raises:
        KernelInputError: something is wrong.
    """
    current = tokens["current_logprobs"]
    if current is None:
        raise KernelInputError(f"{_OP}: current_logprobs is missing")
    _check_tokens(tokens, segment_ids, current)
    given = {name: tensor for name, tensor in segments.items() if tensor is not None}
    num_segments = given["advantages"].numel()
    for name, tensor in given.items():
        require(
            tensor.dim() == 1 and tensor.numel() == num_segments and num_segments > 0,
            f"{_OP}: {name} must be one number per segment, has shape {list(tensor.shape)}, "
            f"advantages has {num_segments}",
        )
        require(
            tensor.device == current.device,
            f"{_OP}: {name} is on {tensor.device}, current_logprobs on {current.device}",
        )
        require(tensor.is_floating_point(), f"{_OP}: {name} must be floating point, is {tensor.dtype}")
    has_proximal = tokens["proximal_logprobs"] is not None or tokens["proximal_mix"] is not None
    check_options(
        options, has_proximal=has_proximal, has_segment_ratio=segments["segment_log_ratios"] is not None
    )
    require(
        tokens["proximal_logprobs"] is None or tokens["proximal_mix"] is None,
        f"{_OP}: proximal_logprobs and proximal_mix are two ways to say the same; pass one of them",
    )
    require(
        options.kl_coef == 0 or tokens["reference_logprobs"] is not None,
        f"{_OP}: kl_coef is {options.kl_coef}, but reference_logprobs is None; pass them or set kl_coef to 0",
    )
    _check_bound(options, m2po_bound, current)
    if current.device.type == "cpu":
        _check_values(segment_ids, given)
        for name in ("behavior_logprobs", "proximal_logprobs", "proximal_mix", "reference_logprobs"):
            check_finite(name, tokens[name])
        _check_share(tokens["proximal_mix"])


def _check_tokens(tokens: dict[str, Tensor | None], segment_ids: Tensor, current: Tensor) -> None:
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


def check_options(options: LossOptions, *, has_proximal: bool, has_segment_ratio: bool = False) -> None:
    """Check the switches against each other.

    Raises:
        KernelInputError: unknown switch, number out of range, or a ratio that would count twice.
    """
    for name, allowed in (("clip", CLIPS), ("behavior_weight", BEHAVIOR_WEIGHTS), ("kl", KL_ESTIMATORS)):
        value = getattr(options, name)
        require(value in allowed, f"{_OP}: {name} is {value!r}; it must be one of {', '.join(allowed)}")
    require(
        has_proximal or options.clip not in WEIGHTED_CLIPS or options.behavior_weight == "none",
        f"{_OP}: behavior_weight {options.behavior_weight!r} with clip {options.clip!r} would count the "
        "ratio twice; pass proximal_logprobs, use clip 'one_side' or 'none', or behavior_weight 'none'",
    )
    require(
        not has_segment_ratio or options.clip in SEGMENT_CLIPS,
        f"{_OP}: segment_log_ratios are for clips {', '.join(SEGMENT_CLIPS)}, not {options.clip!r}",
    )
    require(
        not has_segment_ratio or options.behavior_weight == "none",
        f"{_OP}: behavior_weight {options.behavior_weight!r} is per token, segment_log_ratios make the ratio "
        "one per segment; scale the advantages by the segment's weight instead",
    )
    for name in ("eps_low", "eps_high", "kl_coef", "weight_floor", "tv_bound", "log_ratio_coef"):
        value = getattr(options, name)
        require(0 <= value < float("inf"), f"{_OP}: {name} must be at least 0 and finite, is {value}")
    require(
        options.weight_cap > options.weight_floor,
        f"{_OP}: weight_cap must be positive and above weight_floor, is {options.weight_cap}",
    )
    if options.dual_clip is not None:
        require(
            options.clip in ("ppo", "m2po"),
            f"{_OP}: dual_clip is for clip 'ppo' and 'm2po', not {options.clip!r}",
        )
        require(options.dual_clip > 1, f"{_OP}: dual_clip must be above 1, is {options.dual_clip}")


def _check_bound(options: LossOptions, bound: Tensor | float | None, current: Tensor) -> None:
    require(
        (bound is not None) == (options.clip == "m2po"),
        f"{_OP}: m2po_bound goes with clip 'm2po' and only with it; clip is {options.clip!r}",
    )
    if isinstance(bound, Tensor):
        shape = list(bound.shape)
        require(bound.numel() in (1, 2), f"{_OP}: m2po_bound must be one number or two, has shape {shape}")
        require(bound.device == current.device, f"{_OP}: m2po_bound is on {bound.device}")
    if isinstance(bound, Tensor):
        values = [] if bound.device.type != "cpu" else bound.reshape(-1).tolist()
    else:
        values = [] if bound is None else [bound]
    for value in values:
        require(0 <= value < float("inf"), f"{_OP}: m2po_bound must be at least 0 and finite, is {value}")


def check_finite(name: str, tensor: Tensor | None) -> None:
    """Check a CPU tensor's values.

    Raises:
        KernelInputError: one is NaN or infinite; names the first.
    """
    if tensor is not None and not bool(torch.isfinite(tensor).all()):
        index = first_index(~torch.isfinite(tensor))
        raise KernelInputError(f"{_OP}: {name}[{index}] is {float(tensor[index])}")


def _check_share(mix: Tensor | None) -> None:
    if mix is not None and bool(((mix < 0) | (mix > 1)).any()):
        index = first_index((mix < 0) | (mix > 1))
        raise KernelInputError(
            f"{_OP}: proximal_mix[{index}] is {float(mix[index])}; it is a share between 0 and 1"
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
        check_finite(name, tensor)
    negative = segments.get("negative_advantages")
    if negative is not None:
        signs = (("advantages", segments["advantages"] < 0), ("negative_advantages", negative > 0))
        for name, wrong in signs:
            if bool(wrong.any()):
                index = first_index(wrong)
                raise KernelInputError(
                    f"{_OP}: {name}[{index}] is {float(segments[name][index])}; with negative_advantages, "
                    "advantages must be at least 0 and negative_advantages at most 0"
                )
