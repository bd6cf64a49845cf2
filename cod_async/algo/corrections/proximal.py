"""A-3PO: proximal log-probs without a forward pass.

The decoupled objective (arXiv 2110.00641) clips against a policy between the behaviour policy and the current
one. Where only the lag of a token is known, that policy is put on the line between the two, in log-probs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def interpolation_share(lags: Tensor) -> Tensor:
    """Return how far the proximal log-prob lies on the way from behaviour to current, float64 [A].

    alpha = (d - 1) / d for a token of lag d above 1, else 0: the proximal policy is one version behind the
    current one, and log-probs are taken to change at an even pace. Source: A-3PO, arXiv 2512.06547; measured
    by its authors up to d = 8, to be watched beyond 10.

    Args:
        lags: [A], versions between the behaviour policy and the current one, at least 0.
    """
    wide = lags.double()
    return torch.where(wide > 1, (wide - 1) / wide.clamp(min=1), torch.zeros_like(wide))
