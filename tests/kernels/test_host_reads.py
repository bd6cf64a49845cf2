"""The detector of host reads finds what it is there to find."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from host_reads import host_reads_of

X = torch.arange(6.0)
MASK = X > 2


@pytest.mark.parametrize(
    "run",
    [
        lambda: X[0].item(),
        lambda: bool(MASK.any()),
        lambda: float(X.sum()),
        lambda: X[MASK],
        lambda: X.clone().__setitem__(MASK, torch.zeros(3)),
        lambda: X.masked_select(MASK),
        lambda: torch.nonzero(X),
        lambda: torch.unique(X),
        lambda: torch.repeat_interleave(torch.tensor([1, 2])),
        lambda: torch.bincount(torch.tensor([1, 2])),
        lambda: torch.equal(X, X),
    ],
)
def test_it_finds(run: Any) -> None:
    assert len(host_reads_of(run)) >= 1


def test_it_finds_nothing_where_nothing_is_read() -> None:
    assert host_reads_of(lambda: torch.where(MASK, X, 0.0)[torch.tensor([1, 2])].sum() + X.max()) == []
