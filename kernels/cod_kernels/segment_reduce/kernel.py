"""Per-segment sums on CUDA: one program per segment and split over the sorted tokens, then a fixed-order sum.

Each program finds its segment by binary search, so lengths are run-time values and no host count is needed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cod_kernels.dispatch import on_device

BLOCK = 1024
TOKENS_PER_SPLIT = 8192
MAX_SPLITS = 64
MAX_PROGRAMS = 4096


@triton.jit
def _lower_bound(ids_ptr, num_tokens, wanted):
    """Return how many sorted ids are below ``wanted``."""
    low = wanted * 0
    high = low + num_tokens
    while low < high:
        middle = (low + high) // 2
        if tl.load(ids_ptr + middle) < wanted:
            low = middle + 1
        else:
            high = middle
    return low


@triton.jit(do_not_specialize=["num_tokens"])
def segment_reduce_kernel(
    values_ptr, ids_ptr, order_ptr, partial_ptr, count_ptr, num_tokens,
    HAS_ORDER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Sum one split of one segment in float64."""
    segment = tl.program_id(0).to(tl.int64)
    split = tl.program_id(1).to(tl.int64)
    splits = tl.num_programs(1)
    start = _lower_bound(ids_ptr, num_tokens, segment)
    stop = _lower_bound(ids_ptr, num_tokens, segment + 1)
    share = (stop - start + splits - 1) // splits
    first = start + split * share
    last = tl.minimum(first + share, stop)
    total = tl.zeros([BLOCK], tl.float64)
    for offset in range(first, last, BLOCK):
        at = offset + tl.arange(0, BLOCK)
        mask = at < last
        if HAS_ORDER:
            at = tl.load(order_ptr + at, mask, 0)
        total += tl.load(values_ptr + at, mask, 0.0).to(tl.float64)
    tl.store(partial_ptr + segment * splits + split, tl.sum(total, 0))
    if split == 0:
        tl.store(count_ptr + segment, (stop - start).to(tl.float64))


def splits_for(num_tokens: int, num_segments: int) -> int:
    """Return programs per segment, a power of two that depends on the two numbers alone.

    Lengths are not known here, so a few segments share the programs as if each might hold all tokens.
    """
    wanted = min(triton.cdiv(num_tokens, TOKENS_PER_SPLIT), MAX_PROGRAMS // num_segments, MAX_SPLITS)
    return triton.next_power_of_2(max(1, wanted))


def launch(values: Tensor, segment_ids: Tensor, num_segments: int, is_sorted: bool) -> tuple[Tensor, Tensor]:
    """Same contract as ``reference.segment_sums``."""
    ids, order = segment_ids.contiguous(), segment_ids
    if not is_sorted:
        ids, order = torch.sort(segment_ids, stable=True)
    splits = splits_for(values.numel(), num_segments)
    partials = torch.empty((num_segments, splits), dtype=torch.float64, device=values.device)
    counts = torch.empty(num_segments, dtype=torch.float64, device=values.device)
    with on_device(values):
        segment_reduce_kernel[(num_segments, splits)](
            values.contiguous(), ids, order, partials, counts, values.numel(),
            HAS_ORDER=not is_sorted, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return partials.sum(1), counts
