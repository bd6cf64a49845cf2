"""Log-probs on CUDA: the kernels of both first products, and the engine of the plain one.

Plain: cuBLAS makes one chunk of float32 logits, one program per row turns them into statistics, another into
gradients in the same memory. The gradients overwrite the logits in the dtype of the head: element v lies at
byte 2v or 4v of a row whose logits have been read beyond it already. cuBLAS then makes the gradients of
hidden states and head from them, the latter added up in float32 over all chunks.

Fused: ``hidden @ weight.T`` leaves the tensor cores as exponentials relative to the target's logit, which is
computed first, so that no maximum has to be found (exponentials.py) and no logit is stored. Programs walk
over tiles; each writes its own part of the exponentials and of the partial sums, one per row and tile.
Factors and exponentials move through the tensor copy engine, which fills with zeros beyond the ends.

Nothing is read back and no sum depends on scheduling.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cod_kernels.dispatch import KernelInputError, on_device
from cod_kernels.linear_logprob.chunks import Engine, Problem, Stats
from cod_kernels.linear_logprob.exponentials import SHIFT_BITS
from cod_kernels.linear_logprob.memory import allocate, padded, plain_buffers
from cod_kernels.linear_logprob.products import matmul_into

BLOCK = 4096
NUM_WARPS = 8

_LOWEST = tl.constexpr(-1e30)
_LOG2_E = tl.constexpr(1.4426950408889634)
_SHIFT = tl.constexpr(float(SHIFT_BITS))


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


@triton.jit(do_not_specialize=["vocab_start"])
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


@triton.jit(do_not_specialize=["vocab_start"])
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


@triton.jit
def _capped(z, softcap):
    """Return (soft-capped logits, its slope)."""
    ratio = 2.0 * tl.sigmoid(2.0 * z / softcap) - 1.0
    return softcap * ratio, 1.0 - ratio * ratio


@triton.jit
def target_kernel(
    hidden_ptr, hidden_stride, weight_ptr, weight_stride, column_ptr, bias_ptr, inverse_ptr, out_ptr,
    out_stride, width, vocab_size, softcap, inverse,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, ROW_TEMPERATURE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """One row: tempered logit of the target (0 if not among these rows), whether it is, soft-cap's slope."""
    row = tl.program_id(0).to(tl.int64)
    place = tl.load(column_ptr + row).to(tl.int64)
    is_owner = place >= 0
    place = tl.where(is_owner, place, 0)
    total = tl.zeros([BLOCK], tl.float32)
    for start in range(0, width, BLOCK):
        column = start + tl.arange(0, BLOCK)
        x = tl.load(hidden_ptr + row * hidden_stride + column, column < width, 0.0)
        w = tl.load(weight_ptr + place * weight_stride + column, column < width, 0.0)
        total += x.to(tl.float32) * w.to(tl.float32)
    z = tl.sum(total, 0)
    if HAS_BIAS:
        z += tl.load(bias_ptr + place).to(tl.float32)
    slope = 1.0
    if HAS_SOFTCAP:
        z, slope = _capped(z, softcap)
    if ROW_TEMPERATURE:
        inverse = tl.load(inverse_ptr + row)
    tl.store(out_ptr + row, tl.where(is_owner, z * inverse, 0.0))
    tl.store(out_ptr + out_stride + row, tl.where(is_owner, 1.0, 0.0))
    tl.store(out_ptr + 2 * out_stride + row, slope)


@triton.jit
def add_rows_kernel(
    out_ptr, out_row_stride, out_stride, order_ptr, column_ptr, end_ptr, rows_ptr, rows_row_stride,
    rows_stride, factor_ptr, width, BLOCK: tl.constexpr,
):  # fmt: skip
    """A place among sorted columns: if it is a column's first, add that column's rows in order to out."""
    place = tl.program_id(0)
    column = tl.load(column_ptr + place).to(tl.int64)
    before = tl.load(column_ptr + place - 1, place > 0, -1)
    if (column >= 0) & (column != before):
        at = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)).to(tl.int64)
        total = tl.zeros([BLOCK], tl.float32)
        for number in range(place, tl.load(end_ptr + place)):
            row = tl.load(order_ptr + number).to(tl.int64)
            x = tl.load(rows_ptr + row * rows_row_stride + at * rows_stride, at < width, 0.0)
            total += x.to(tl.float32) * tl.load(factor_ptr + row)
        out = out_ptr + column * out_row_stride + at * out_stride
        tl.store(out, tl.load(out, at < width, 0.0) + total, at < width)


@triton.jit(do_not_specialize=["num_rows"])
def exponentials_kernel(
    hidden_desc, weight_desc, out_desc, column_ptr, target_logit_ptr, bias_ptr, inverse_ptr, sum_ptr,
    spread_ptr, partial_stride, num_rows, vocab_size, width, softcap, inverse,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, HAS_OUT: tl.constexpr,
    ROW_TEMPERATURE: tl.constexpr, UPCAST: tl.constexpr, IS_FLAT: tl.constexpr, GROUP: tl.constexpr,
    ROWS: tl.constexpr, VOCAB: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Tiles of exponentials (times the soft-cap's slope), and per row and tile their sum and entropy part."""
    row_blocks = tl.cdiv(num_rows, ROWS)
    vocab_blocks = tl.cdiv(vocab_size, VOCAB)
    steps = tl.cdiv(width, WIDTH)
    for tile in tl.range(tl.program_id(0), row_blocks * vocab_blocks, tl.num_programs(0), flatten=IS_FLAT):
        group = tile // (GROUP * vocab_blocks)
        first = group * GROUP
        size = tl.minimum(row_blocks - first, GROUP)
        row_block = first + (tile % (GROUP * vocab_blocks)) % size
        vocab_block = (tile % (GROUP * vocab_blocks)) // size
        z = tl.zeros([ROWS, VOCAB], tl.float32)
        for step in range(steps):
            x = hidden_desc.load([row_block * ROWS, step * WIDTH])
            w = weight_desc.load([vocab_block * VOCAB, step * WIDTH])
            if UPCAST:  # the interpreter multiplies bf16 as integers
                z = tl.dot(x.to(tl.float32), w.to(tl.float32).T, z)
            else:
                z = tl.dot(x, w.T, z)
        row = row_block * ROWS + tl.arange(0, ROWS)
        column = vocab_block * VOCAB + tl.arange(0, VOCAB)
        is_row = row < num_rows
        if HAS_BIAS:
            z += tl.load(bias_ptr + column, column < vocab_size, 0.0).to(tl.float32)[None, :]
        if HAS_SOFTCAP:
            z, slope = _capped(z, softcap)
        scale = inverse
        if ROW_TEMPERATURE:
            scale = tl.load(inverse_ptr + row, is_row, 1.0)[:, None]
        target_logit = tl.load(target_logit_ptr + row, is_row, 0.0)
        target = tl.load(column_ptr + row, is_row, -1)
        above = z * scale - target_logit[:, None]
        is_other = (column[None, :] != target[:, None]) & (column < vocab_size)[None, :]
        e = tl.where(is_other, tl.exp2(above * _LOG2_E - _SHIFT), 0.0)
        place = vocab_block.to(tl.int64) * partial_stride + row
        tl.store(sum_ptr + place, tl.sum(e, 1), is_row)
        if HAS_ENTROPY:
            tl.store(spread_ptr + place, tl.sum(tl.where(e > 0, e * above, 0.0), 1), is_row)
        if HAS_OUT:
            if HAS_SOFTCAP:
                e = e * slope
            out_desc.store([row_block * ROWS, vocab_block * VOCAB], e.to(out_desc.dtype))


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
        table = plain_buffers(rows, problem.weight.shape[0])
        self._logits = allocate(table, problem.hidden.device)["logits"]
        inverse = problem.inverse_temperature
        self._by_row = isinstance(inverse, torch.Tensor)
        self._inverse = 0.0 if self._by_row else inverse

    @property
    def hidden_dtype(self) -> torch.dtype:
        """Parts of several ranks are added in float32."""
        return torch.float32 if self.problem.group is not None else self.problem.hidden.dtype

    def _shared(self, rows: slice) -> tuple[Any, ...]:
        problem = self.problem
        bias = problem.weight if problem.bias is None else problem.bias.contiguous()
        by_row = problem.inverse_temperature[rows].reshape(-1) if self._by_row else bias
        switches = {
            "HAS_BIAS": problem.bias is not None,
            "HAS_SOFTCAP": problem.softcap is not None,
            "ROW_TEMPERATURE": self._by_row,
            "BLOCK": BLOCK,
            "num_warps": NUM_WARPS,
            "enable_fp_fusion": True,
        }
        numbers = (problem.weight.shape[0], problem.vocab_start, float(problem.softcap or 1.0), self._inverse)
        return problem.targets[rows].contiguous(), bias, by_row, numbers, switches

    def forward(self, rows: slice, *, is_kept: bool = True) -> Stats:
        """One matrix product and one pass over the logits."""
        problem, size = self.problem, self.problem.weight.shape[0]
        count = rows.stop - rows.start
        logits = self._logits[:count]
        matmul_into(logits[:, :size], problem.hidden[rows], problem.weight.t())
        targets, bias, by_row, numbers, switches = self._shared(rows)
        # Padded, so that a shorter last chunk is aligned as the others and nothing is compiled again for it.
        out = torch.empty((3, padded(count)), dtype=torch.float32, device=logits.device)[:, :count]
        with on_device(logits):
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
        with on_device(logits):
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
