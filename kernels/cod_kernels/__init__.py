"""The learner's two central operations: log-probs of chosen tokens from hidden states, and the segment loss
on them.

Each op has a folder: ``reference.py`` is readable torch and the definition, ``kernel.py`` the Triton
kernels, ``op.py`` the autograd function and its dispatch, ``README.md`` the formulas, costs and tolerances.
The package depends on torch alone, and on Triton where it runs on CUDA.
"""

from __future__ import annotations

from cod_kernels.dispatch import BackendUnavailableError, KernelInputError
from cod_kernels.faults import raise_faults
from cod_kernels.linear_logprob.fused import linear_segment_loss
from cod_kernels.linear_logprob.op import linear_logprob
from cod_kernels.segment_loss.op import (
    METRIC_NAMES,
    merge_metrics,
    segment_loss,
    summarize_metrics,
)
from cod_kernels.segment_loss.reference import LossOptions
from cod_kernels.segment_reduce.op import segment_reduce

__all__ = [
    "METRIC_NAMES",
    "BackendUnavailableError",
    "KernelInputError",
    "LossOptions",
    "linear_logprob",
    "linear_segment_loss",
    "merge_metrics",
    "raise_faults",
    "segment_loss",
    "segment_reduce",
    "summarize_metrics",
]
