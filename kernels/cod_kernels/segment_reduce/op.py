"""``segment_reduce``: checks, dispatch and autograd around per-segment sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, choose_backend, first_index, require
from cod_kernels.faults import BAD_SEGMENT_ID, BAD_VALUE, note_fault
from cod_kernels.segment_reduce.reference import segment_sums

_OP = "segment_reduce"


class _SegmentReduce(torch.autograd.Function):
    """The gradient of a sum is the segment's gradient at each of its tokens."""

    @staticmethod
    def forward(
        ctx: Any, values: Tensor, segment_ids: Tensor, num_segments: int, is_sorted: bool, backend: str
    ) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(segment_ids)
        ctx.dtype = values.dtype
        if backend == "triton":
            from cod_kernels.segment_reduce.kernel import launch

            sums, counts = launch(values, segment_ids, num_segments, is_sorted)
        else:
            sums, counts = segment_sums(values, segment_ids.long(), num_segments)
        ctx.mark_non_differentiable(counts)
        if values.device.type != "cpu":
            is_bad = note_values(values, segment_ids, num_segments, is_sorted)
            sums = torch.where(is_bad, torch.nan, sums)
        return sums.to(values.dtype), counts

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (segment_ids,) = ctx.saved_tensors
        if grads[0] is None:
            return None, None, None, None, None
        ids = segment_ids.long().clamp(0, grads[0].numel() - 1)
        return grads[0][ids].to(ctx.dtype), None, None, None, None


def segment_reduce(
    values: Tensor,
    segment_ids: Tensor,
    num_segments: int,
    *,
    is_sorted: bool = False,
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """Return the sum of each segment's values, and how many there are; differentiable, bitwise repeatable.

    The mean of a segment's log-ratios, exponentiated, is the sequence-level ratio of GSPO (arXiv 2507.18071)
    and the geometric mean that sequence masks test.

    Args:
        values: float32 or float64 [A], A >= 1.
        segment_ids: int32 or int64 [A] in [0, N).
        num_segments: N >= 1.
        is_sorted: the ids never fall; spares the sort on CUDA.
        backend: ``auto`` (Triton on CUDA, torch elsewhere), ``torch`` or ``triton``.

    Returns:
        (sums [N] in the dtype of ``values``, added in float64; counts float64 [N]). An empty segment has sum
        0.

    Raises:
        KernelInputError: names the argument, and on the CPU the first offending index; on CUDA bad values
            make every sum NaN and :func:`cod_kernels.raise_faults` names the first.
        BackendUnavailableError: Triton is wanted and cannot be had.
    """
    require(values.dim() == 1, f"{_OP}: values must be [A], has shape {list(values.shape)}")
    require(values.numel() > 0, f"{_OP}: values is empty; call it with at least one token")
    require(
        values.dtype in (torch.float32, torch.float64),
        f"{_OP}: values must be float32 or float64, is {values.dtype}",
    )
    require(
        segment_ids.shape == values.shape,
        f"{_OP}: segment_ids must be [{values.numel()}] like values, has shape {list(segment_ids.shape)}",
    )
    require(
        segment_ids.dtype in (torch.int32, torch.int64),
        f"{_OP}: segment_ids must be int32 or int64, is {segment_ids.dtype}",
    )
    require(
        segment_ids.device == values.device,
        f"{_OP}: segment_ids is on {segment_ids.device}, values on {values.device}",
    )
    require(
        isinstance(num_segments, int) and not isinstance(num_segments, bool),
        f"{_OP}: num_segments must be an int, is a {type(num_segments).__name__}",
    )
    require(num_segments >= 1, f"{_OP}: num_segments must be at least 1, is {num_segments}")
    chosen = choose_backend(_OP, backend, values.device)
    if values.device.type == "cpu":
        _check_values(values, segment_ids, num_segments, is_sorted)
    sums, counts = _SegmentReduce.apply(  # type: ignore[no-untyped-call]
        values, segment_ids, num_segments, is_sorted, chosen
    )
    return sums, counts


def note_values(values: Tensor, segment_ids: Tensor, num_segments: int, is_sorted: bool) -> Tensor:
    """Note the first bad id and the first bad value on their device; return whether there is one."""
    is_bad_id = _bad_ids(segment_ids, num_segments, is_sorted)
    is_bad_value = ~torch.isfinite(values)
    note_fault(BAD_SEGMENT_ID, is_bad_id)
    note_fault(BAD_VALUE, is_bad_value)
    return (is_bad_id | is_bad_value).any()


def _bad_ids(segment_ids: Tensor, num_segments: int, is_sorted: bool) -> Tensor:
    bad = (segment_ids < 0) | (segment_ids >= num_segments)
    if is_sorted:
        bad[1:] |= segment_ids[1:] < segment_ids[:-1]
    return bad


def _check_values(values: Tensor, segment_ids: Tensor, num_segments: int, is_sorted: bool) -> None:
    bad = _bad_ids(segment_ids, num_segments, is_sorted)
    if bool(bad.any()):
        index = first_index(bad)
        found = int(segment_ids[index])
        if 0 <= found < num_segments:
            raise KernelInputError(f"{_OP}: segment_ids fall at index {index}; pass is_sorted=False")
        raise KernelInputError(f"{_OP}: segment_ids[{index}] is {found}, there are {num_segments} segments")
    bad = ~torch.isfinite(values)
    if bool(bad.any()):
        index = first_index(bad)
        raise KernelInputError(f"{_OP}: values[{index}] is {float(values[index])}")
