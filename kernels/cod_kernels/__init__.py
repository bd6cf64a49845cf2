"""The learner's two central operations: log-probs of chosen tokens from hidden states, and the segment loss
on them.

Each op has a folder: ``reference.py`` is readable torch and the definition, ``op.py`` the autograd function
with its checks and dispatch, ``README.md`` the formulas, costs and tolerances. The package depends on torch
alone.
"""

from __future__ import annotations

from cod_kernels.dispatch import BackendUnavailableError, KernelInputError
from cod_kernels.linear_logprob.op import linear_logprob
from cod_kernels.segment_loss.op import (
    METRIC_NAMES,
    merge_metrics,
    segment_loss,
    summarize_metrics,
)

__all__ = [
    "METRIC_NAMES",
    "BackendUnavailableError",
    "KernelInputError",
    "linear_logprob",
    "merge_metrics",
    "segment_loss",
    "summarize_metrics",
]
