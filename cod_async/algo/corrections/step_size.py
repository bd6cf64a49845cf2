"""VCPO's step size: fewer effective samples, a smaller step.

The variance of an importance-weighted gradient grows as the effective sample size falls; a step in proportion
to its square root keeps the noise of the update level (arXiv 2602.17616).
"""

from __future__ import annotations


def effective_sample_frac(sum_ratio: float, sum_ratio_squared: float, count: float) -> float:
    """Return (sum r)^2 / (n sum r^2), between 1 / n and 1; 0 without samples."""
    return sum_ratio**2 / (count * sum_ratio_squared) if sum_ratio_squared > 0 else 0.0


def step_size_factor(ess_frac: float, power: float) -> float:
    """Return what the learning rate is multiplied by: ``ess_frac ** power``; 1 with power 0.

    VCPO: power 0.5, with weights of whole sequences. Here the weights are those of tokens, because a product
    over a lifecycle would leave one effective lifecycle at any lag.
    """
    return ess_frac**power if power else 1.0
