"""segment_reduce: sums of a million tokens by segment, beside a plain scatter."""

from __future__ import annotations

import statistics

import torch

from bench.kernels.measure import Row, compare, ratio
from cod_kernels import segment_reduce


def run(device: torch.device, seconds: float) -> list[Row]:
    """Return a row per length: error against fp64, and times."""
    rows = []
    lengths = (8192, 131_072, 1_048_576) if device.type == "cuda" else (8192, 131_072)
    for count in lengths:
        generator = torch.Generator(device=device).manual_seed(count)
        values = torch.randn(count, generator=generator, device=device)
        ids = torch.arange(count, device=device) // 500
        segments = count // 500 + 1
        truth = torch.zeros(segments, dtype=torch.float64, device=device).index_add_(0, ids, values.double())
        sums, _ = segment_reduce(values, ids, segments)
        contestants = {
            "any order": lambda v=values, i=ids, n=segments: segment_reduce(v, i, n),
            "sorted": lambda v=values, i=ids, n=segments: segment_reduce(v, i, n, is_sorted=True),
            "index_add": lambda v=values, i=ids, n=segments: torch.zeros(n, device=v.device).index_add_(
                0, i, v
            ),
        }
        times, failed = compare(contestants, device, seconds=seconds / len(lengths))
        rows.append(
            {
                "num_tokens": count,
                "max_error": float((sums - truth).abs().max()),
                "ms": {name: round(statistics.median(t), 4) for name, t in times.items()},
                "times_faster_than_index_add": ratio(times, "index_add", "sorted"),
                "failed": failed,
            }
        )
    return rows
