"""The helper that runs several ranks: values come back by rank, and one that fails fails the test."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_ranks
from torch import distributed


def add_up(rank: int, size: int, folder: Path, scale: float) -> dict[str, Any]:
    total = torch.full((2,), scale * (rank + 1))
    distributed.all_reduce(total)
    return {"total": total, "rank": rank, "size": size, "folder": str(folder)}


def fail_on_one(rank: int, size: int, folder: Path) -> dict[str, Any]:
    if rank == 1:
        raise ValueError("rank one does not want to")
    distributed.barrier()
    return {}


def test_each_rank_returns_tensors_and_values() -> None:
    results = run_ranks(2, add_up, 0.5)
    assert [result["rank"] for result in results] == [0, 1]
    assert all(torch.equal(result["total"], torch.tensor([1.5, 1.5])) for result in results)
    assert not Path(results[0]["folder"]).exists()


def test_a_failing_rank_fails_the_test_and_ends_the_others() -> None:
    with pytest.raises(AssertionError, match="rank one does not want to"):
        run_ranks(2, fail_on_one)
