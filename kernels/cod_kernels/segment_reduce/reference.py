"""The definition and the torch twin of per-segment sums: one float64 sum per segment, in token order."""

from __future__ import annotations

import torch
from torch import Tensor


def segment_sums(values: Tensor, segment_ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Return (sums, counts), float64 [N] each.

    On the CPU ``index_add_`` adds in token order. On CUDA it adds atomically, in any order; there the tokens
    are sorted by segment first (stable) and summed one segment at a time.

    Args:
        values: [A].
        segment_ids: int64 [A] in [0, N).
        num_segments: N.
    """
    wide = values.double()
    if values.device.type == "cpu":
        sums = torch.zeros(num_segments, dtype=torch.float64).index_add_(0, segment_ids, wide)
        return sums, torch.bincount(segment_ids, minlength=num_segments).double()
    return sorted_sums(wide, segment_ids, num_segments)


def sorted_sums(wide: Tensor, segment_ids: Tensor, num_segments: int) -> tuple[Tensor, Tensor]:
    """Return (sums, counts) in an order that no scheduling changes, and without reading anything back.

    Args:
        wide: float64 [A].
        segment_ids: int64 [A]; tokens with an id outside [0, N) are left out.
        num_segments: N.
    """
    ordered, order = torch.sort(segment_ids, stable=True)
    edges = torch.arange(num_segments + 2, device=wide.device, dtype=ordered.dtype) - 1
    offsets = torch.searchsorted(ordered, edges)
    offsets[0] = 0  # one more segment in front takes in negative ids, because offsets have to begin at 0
    sums = torch.segment_reduce(wide[order], "sum", offsets=offsets, initial=0.0, unsafe=True)[1:]
    return sums, (offsets[2:] - offsets[1:-1]).double()
