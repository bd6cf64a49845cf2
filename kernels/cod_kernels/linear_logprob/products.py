"""Matrix products with float32 sums whatever the dtype of the factors, and what kernels need of a tensor."""

from __future__ import annotations

import torch
from torch import Tensor


def matmul_into(out: Tensor, left: Tensor, right: Tensor, *, is_added: bool = False) -> Tensor:
    """``out = left @ right`` or ``out += left @ right``, summed in float32, in the dtype of ``out``.

    Forms with ``out=`` throughout: autocast leaves those alone, so that no factor is rounded on the way.
    """
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, out=out) if is_added else torch.mm(left, right, out=out)
    if out.device.type != "cuda":  # products with another dtype exist on CUDA alone
        return matmul_into(out, left.to(out.dtype), right.to(out.dtype), is_added=is_added)
    if is_added:  # a float32 addend beside 16-bit factors: torch >= 2.10
        result: Tensor = torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
        return result
    result = torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)
    return result


def has_aligned_rows(matrix: Tensor) -> bool:
    """Return whether the tensor copy engine can read a matrix: 16-byte aligned rows of adjacent elements."""
    step = matrix.stride(0) * matrix.element_size()
    is_dense = matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]
    return is_dense and step % 16 == 0 and matrix.data_ptr() % 16 == 0


def aligned_rows(matrix: Tensor) -> Tensor:
    """Return the matrix itself, or where its rows are not aligned a copy whose rows are padded."""
    if has_aligned_rows(matrix):
        return matrix
    rows, width = matrix.shape
    step = 16 // matrix.element_size()
    copy = torch.empty((rows, -(-width // step) * step), dtype=matrix.dtype, device=matrix.device)
    return copy[:, :width].copy_(matrix)
