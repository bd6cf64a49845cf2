"""segment_reduce against exact sums, finite differences, and itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from cod_kernels import KernelInputError, segment_reduce


def _tokens(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(5000, generator=generator, dtype=torch.float64).mul(100).to(dtype)
    return values, torch.randint(19, (5000,), generator=generator) + 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("ids_dtype", [torch.int32, torch.int64])
def test_against_exact_sums(dtype: torch.dtype, ids_dtype: torch.dtype) -> None:
    values, ids = _tokens(dtype)
    sums, counts = segment_reduce(values, ids.to(ids_dtype), 22)
    assert sums.dtype == dtype
    for s in range(22):
        mine = values[ids == s].tolist()
        bound = 1e-12 if dtype == torch.float64 else 6e-8
        assert sums[s].item() == pytest.approx(math.fsum(mine), abs=bound * max(1, sum(map(abs, mine))))
        assert counts[s].item() == len(mine)
    assert torch.equal(sums, segment_reduce(values, ids, 22)[0])


def test_geometric_mean_of_a_segment() -> None:
    log_ratio = torch.tensor([0.1, 0.3, -0.2, 0.0], dtype=torch.float64, requires_grad=True)
    sums, counts = segment_reduce(log_ratio, torch.tensor([0, 0, 0, 1]), 2, is_sorted=True)
    ratio = (sums / counts).exp()
    assert ratio.tolist() == pytest.approx([math.exp(0.2 / 3), 1.0])
    ratio.sum().backward()
    slope = math.exp(0.2 / 3) / 3
    assert log_ratio.grad.tolist() == pytest.approx([slope, slope, slope, 1.0])  # type: ignore[union-attr]


def test_gradcheck() -> None:
    values, ids = _tokens()
    leaf = values[:30].clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda v: segment_reduce(v, ids[:30], 20)[0], leaf)


@pytest.mark.parametrize(
    ("changes", "part"),
    [
        ({"values": torch.zeros(0), "segment_ids": torch.zeros(0, dtype=torch.int64)}, "values is empty"),
        ({"values": torch.zeros(4, 1)}, r"values must be \[A\]"),
        ({"values": torch.zeros(4, dtype=torch.bfloat16)}, "values must be float32"),
        ({"values": torch.tensor([0, 1, math.inf, 0])}, r"values\[2\] is inf"),
        ({"segment_ids": torch.zeros(3, dtype=torch.int64)}, r"segment_ids must be \[4\]"),
        ({"segment_ids": torch.zeros(4)}, "segment_ids must be int32 or int64"),
        ({"segment_ids": torch.tensor([0, 1, 2, 0])}, r"segment_ids\[2\] is 2, there are 2"),
        ({"segment_ids": torch.tensor([0, 1, 0, 1]), "is_sorted": True}, "segment_ids fall at index 2"),
        ({"num_segments": 0}, "num_segments must be at least 1"),
        ({"backend": "x"}, "backend is 'x'"),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, Any], part: str) -> None:
    call = {"values": torch.ones(4), "segment_ids": torch.tensor([0, 0, 1, 1]), "num_segments": 2} | changes
    with pytest.raises(KernelInputError, match=part):
        segment_reduce(**call)  # type: ignore[arg-type]
