"""Means with their errors: one definition for credit assignment, scripted policies and evaluation."""

from __future__ import annotations

import math
from collections.abc import Sequence


def sample_std(values: Sequence[float]) -> float:
    """Return the unbiased standard deviation (ddof 1); 0 for fewer than two values."""
    if len(values) < 2:
        return 0.0
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1))


def mean_and_sem(values: Sequence[float]) -> tuple[float, float]:
    """Return the mean and its standard error (from the unbiased deviation; 0 for a single value)."""
    return math.fsum(values) / len(values), sample_std(values) / math.sqrt(len(values))
