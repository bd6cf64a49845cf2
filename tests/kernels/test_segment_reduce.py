"""segment_reduce against exact sums, finite differences, and itself."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from host_reads import host_reads_of

from cod_kernels import KernelInputError, raise_faults, segment_reduce
from cod_kernels.segment_reduce.op import note_values
from cod_kernels.segment_reduce.reference import segment_sums, sorted_sums


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


@pytest.mark.parametrize("count", [1, 2, 4999])
def test_the_order_used_on_devices_gives_the_same_sums(count: int) -> None:
    values, ids = (tensor[:count] for tensor in _tokens())
    sums, counts = sorted_sums(values, ids, 22)
    expected, expected_counts = segment_sums(values, ids, 22)
    assert torch.allclose(sums, expected, rtol=1e-13, atol=1e-12)
    assert torch.equal(counts, expected_counts)
    outside = ids.clone()
    outside[0] = -5
    outside[-1] = 22
    kept = (outside >= 0) & (outside < 22)
    expected, expected_counts = segment_sums(values[kept], ids[kept], 22)
    sums, counts = sorted_sums(values, outside, 22)
    assert torch.allclose(sums, expected, rtol=1e-13, atol=1e-12)
    assert torch.equal(counts, expected_counts)


@pytest.mark.parametrize(
    ("ids", "value", "is_sorted", "message"),
    [
        ([0, 0, 1, 1], 0.0, True, None),
        ([0, 1, 2, 0], 0.0, False, r"segment_ids\[2\] is out of range"),
        ([0, 1, 1, -1], 0.0, False, r"segment_ids\[3\] is out of range"),
        ([0, 1, 0, 1], 0.0, True, r"segment_ids\[2\] .*below the one before"),
        ([0, 1, 0, 1], 0.0, False, None),
        ([0, 1, 0, 1], math.nan, False, r"values\[1\] is not finite"),
    ],
)
def test_values_that_only_a_device_has_seen(
    ids: list[int], value: float, is_sorted: bool, message: str | None
) -> None:
    raise_faults(torch.device("cpu"))
    values = torch.tensor([0.0, value, 1.0, 2.0])
    is_bad = note_values(values, torch.tensor(ids), 2, is_sorted)
    assert bool(is_bad) == (message is not None)
    if message is None:
        raise_faults(torch.device("cpu"))
    else:
        with pytest.raises(KernelInputError, match=message):
            raise_faults(torch.device("cpu"))


def test_nothing_is_read_back() -> None:
    values, ids = _tokens()
    assert host_reads_of(lambda: sorted_sums(values, ids, 22)) == []
    assert host_reads_of(lambda: note_values(values, ids, 22, True)) == []
    with pytest.raises(KernelInputError, match="segment_ids"):  # they are not sorted
        raise_faults(torch.device("cpu"))


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
        ({"segment_ids": torch.tensor([0, -1, 2, 0])}, r"segment_ids\[1\] is -1, there are 2"),
        ({"segment_ids": torch.zeros(4, dtype=torch.int64, device="meta")}, "segment_ids is on meta"),
        ({"segment_ids": torch.tensor([0, 1, 0, 1]), "is_sorted": True}, "segment_ids fall at index 2"),
        ({"segment_ids": torch.tensor([0, 1, 1, 2]), "is_sorted": True}, r"segment_ids\[3\] is 2"),
        ({"num_segments": 2.0}, "num_segments must be an int"),
        ({"num_segments": 0}, "num_segments must be at least 1"),
        ({"backend": "x"}, "backend is 'x'"),
    ],
)
def test_bad_input_names_the_argument(changes: dict[str, Any], part: str) -> None:
    call = {"values": torch.ones(4), "segment_ids": torch.tensor([0, 0, 1, 1]), "num_segments": 2} | changes
    with pytest.raises(KernelInputError, match=part):
        segment_reduce(**call)  # type: ignore[arg-type]
