"""Log-probs on CUDA: cuBLAS makes one chunk of float32 logits, one program per row turns them into
statistics, another into gradients in the same memory.

The gradients overwrite the logits in the dtype of the head: element v lies at byte 2v or 4v of a row whose
logits have been read beyond it already. cuBLAS then makes the gradients of hidden states and head from them,
the latter added up in float32 over all chunks. Nothing is read back and no sum depends on scheduling.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cod_kernels.dispatch import KernelInputError
from cod_kernels.linear_logprob.chunks import Engine, Problem, Stats

BLOCK = 4096
NUM_WARPS = 8
CHUNK_BYTES = 5 << 29  # 2.5 GiB of float32 logits
ALIGNMENT = 64  # of a row of logits, in elements

_LOWEST = tl.constexpr(-1e30)


@triton.jit
def _scaled_logits(
    logits, column, stride, vocab_size, bias_ptr, softcap, inverse,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Return (logits with bias, soft-cap and temperature; slope of the soft-cap), -inf beyond the end.

    The load is bounded by the row's stride, a multiple of 64 whatever the vocabulary, so that it is wide.
    """
    mask = column < vocab_size
    z = tl.load(logits + column, column < stride, 0.0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + column, mask, 0.0).to(tl.float32)
    slope = tl.full(z.shape, 1.0, tl.float32)
    if HAS_SOFTCAP:
        capped = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
        slope = 1.0 - capped * capped
        z = softcap * capped
    return tl.where(mask, z * inverse, float("-inf")), slope


@triton.jit
def stats_kernel(
    logits_ptr, stride, target_ptr, bias_ptr, inverse_ptr, logprob_ptr, lse_ptr, entropy_ptr,
    vocab_size, vocab_start, softcap, inverse,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: log-prob of the target, log of the sum of exponentials, entropy."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_ptr + row)
    lane = tl.arange(0, BLOCK)
    highest = tl.full([BLOCK], _LOWEST, tl.float32)
    total = tl.zeros([BLOCK], tl.float32)
    spread = tl.zeros([BLOCK], tl.float32)  # sum of exp(z - highest) (z - highest)
    for start in range(0, vocab_size, BLOCK):
        column = start + lane
        z, _ = _scaled_logits(
            logits, column, stride, vocab_size, bias_ptr, softcap, inverse, HAS_BIAS, HAS_SOFTCAP
        )
        above = tl.maximum(highest, z)
        shrink = tl.exp(highest - above)
        part = tl.exp(z - above)
        if HAS_ENTROPY:
            spread = shrink * (spread + (highest - above) * total)
            spread += part * tl.where(z > _LOWEST, z - above, 0.0)
        total = total * shrink + part
        highest = above
    top = tl.max(highest, 0)
    shrink = tl.exp(highest - top)
    whole = tl.sum(total * shrink, 0)
    log_whole = tl.log(whole)
    target = tl.load(target_ptr + row).to(tl.int64) - vocab_start
    is_owner = (target >= 0) & (target < vocab_size)
    column = tl.where(is_owner, target, 0) + tl.arange(0, 1)
    z, _ = _scaled_logits(
        logits, column, stride, vocab_size, bias_ptr, softcap, inverse, HAS_BIAS, HAS_SOFTCAP
    )
    logprob = (tl.max(z, 0) - top) - log_whole
    # A NaN logit is lost in the maxima; the sum keeps it.
    tl.store(logprob_ptr + row, tl.where(is_owner, logprob, float("nan")))
    tl.store(lse_ptr + row, top + log_whole)
    if HAS_ENTROPY:
        apart = tl.sum(shrink * (spread + tl.where(total > 0, (highest - top) * total, 0.0)), 0)
        tl.store(entropy_ptr + row, log_whole - apart / whole)


@triton.jit
def gradient_kernel(
    logits_ptr, stride, out_ptr, out_stride, target_ptr, bias_ptr, inverse_ptr, lse_ptr, entropy_ptr, g_ptr,
    h_ptr, vocab_size, vocab_start, softcap, inverse,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_H: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: overwrite the logits by the gradients of the products ``hidden @ weight.T``."""
    row = tl.program_id(0).to(tl.int64)
    logits = logits_ptr + row * stride
    out = out_ptr + row * out_stride
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_ptr + row)
    lse = tl.load(lse_ptr + row)
    g = tl.load(g_ptr + row)
    target = tl.load(target_ptr + row).to(tl.int64) - vocab_start
    if HAS_H:
        h = tl.load(h_ptr + row)
        entropy = tl.load(entropy_ptr + row)
    for start in range(0, vocab_size, BLOCK):
        column = start + tl.arange(0, BLOCK)
        z, slope = _scaled_logits(
            logits, column, stride, vocab_size, bias_ptr, softcap, inverse, HAS_BIAS, HAS_SOFTCAP
        )
        p = tl.exp(z - lse)
        if HAS_H:
            d = -p * (g + h * tl.where(p > 0, z - lse + entropy, 0.0))
        else:
            d = -p * g
        d = tl.where(column == target, g + d, d) * inverse
        if HAS_SOFTCAP:
            d = d * slope
        tl.debug_barrier()  # every warp has read this block before any writes over it
        tl.store(out + column, d.to(out_ptr.dtype.element_ty), column < stride)


def chunk_rows_on_device(vocab_size: int) -> int:
    """Return how many rows of float32 logits fit into CHUNK_BYTES: a multiple of 128, at most 8192."""
    rows = CHUNK_BYTES // (4 * padded(vocab_size))
    return max(128, min(8192, rows // 128 * 128))


def padded(vocab_size: int) -> int:
    """Return the stride of a row of logits, which keeps rows aligned for any vocabulary."""
    return triton.cdiv(vocab_size, ALIGNMENT) * ALIGNMENT


def matmul_into(out: Tensor, left: Tensor, right: Tensor, *, is_added: bool = False) -> Tensor:
    """``out = left @ right`` or ``out += left @ right``, summed in float32, in the dtype of ``out``."""
    if left.dtype == out.dtype:
        return torch.addmm(out, left, right, out=out) if is_added else torch.mm(left, right, out=out)
    if out.device.type != "cuda":  # the interpreter; products with another dtype exist on CUDA alone
        wide = left.to(out.dtype) @ right.to(out.dtype)
        return out.add_(wide) if is_added else out.copy_(wide)
    if is_added:
        return torch.ops.aten.addmm.dtype_out(out, left, right, out.dtype, out=out)
    return torch.ops.aten.mm.dtype_out(left, right, out.dtype, out=out)


class TritonEngine(Engine):
    """One chunk of float32 logits, overwritten by its gradients."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem)
        if problem.compute_dtype != torch.float32:
            raise KernelInputError(
                f"linear_logprob: hidden is {problem.hidden.dtype}; the Triton kernels take float32 and "
                "16-bit floats, pass backend='torch'"
            )
        rows = min(problem.chunk_rows, problem.hidden.shape[0])
        width = padded(problem.weight.shape[0])
        device = problem.hidden.device
        self._logits = torch.empty((rows, width), dtype=torch.float32, device=device)
        inverse = problem.inverse_temperature
        self._by_row = isinstance(inverse, torch.Tensor)
        self._inverse = 0.0 if self._by_row else inverse

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Parts of several ranks are added in float32."""
        return torch.float32 if self.problem.group is not None else self.problem.hidden.dtype

    def _shared(self, rows: slice) -> tuple[Any, ...]:
        problem = self.problem
        bias = problem.weight if problem.bias is None else problem.bias
        by_row = problem.inverse_temperature[rows].reshape(-1) if self._by_row else bias
        switches = {
            "HAS_BIAS": problem.bias is not None,
            "HAS_SOFTCAP": problem.softcap is not None,
            "ROW_TEMPERATURE": self._by_row,
            "BLOCK": BLOCK,
            "num_warps": NUM_WARPS,
        }
        numbers = (problem.weight.shape[0], problem.vocab_start, problem.softcap or 1.0, self._inverse)
        return problem.targets[rows].contiguous(), bias, by_row, numbers, switches

    def forward(self, rows: slice) -> Stats:
        """One matrix product and one pass over the logits."""
        problem, size = self.problem, self.problem.weight.shape[0]
        count = rows.stop - rows.start
        logits = self._logits[:count]
        matmul_into(logits[:, :size], problem.hidden[rows], problem.weight.t())
        targets, bias, by_row, numbers, switches = self._shared(rows)
        out = torch.empty((3, count), dtype=torch.float32, device=logits.device)
        stats_kernel[(count,)](
            logits, logits.stride(0), targets, bias, by_row, out[0], out[1], out[2], *numbers,
            HAS_ENTROPY=problem.has_entropy, **switches,
        )  # fmt: skip
        self.fresh_rows = rows
        return Stats(out[0], out[1], out[2] if problem.has_entropy else None)

    def backward(
        self, rows: slice, lse: Tensor, entropy: Tensor | None, g: Tensor | None, h: Tensor | None
    ) -> None:
        """One pass over the logits and two matrix products."""
        problem, size = self.problem, self.problem.weight.shape[0]
        count = rows.stop - rows.start
        logits = self._logits[:count]
        narrow = logits.view(problem.weight.dtype)
        targets, bias, by_row, numbers, switches = self._shared(rows)
        g = torch.zeros_like(lse) if g is None else g.float().contiguous()
        h = None if h is None else h.float().contiguous()
        gradient_kernel[(count,)](
            logits, logits.stride(0), narrow, narrow.stride(0), targets, bias, by_row, lse.contiguous(),
            lse if entropy is None else entropy.contiguous(), g, g if h is None else h, *numbers,
            HAS_H=h is not None, **switches,
        )  # fmt: skip
        self.fresh_rows = None
        dz = narrow[:, :size]
        if self.d_hidden is not None:
            matmul_into(self.d_hidden[rows], dz, problem.weight)
        if self.d_weight is not None:
            matmul_into(self.d_weight, dz.t(), problem.hidden[rows], is_added=True)
        if self.d_bias is not None:
            self.d_bias += dz.sum(0, dtype=torch.float32)
