"""Other people's fused log-probs, where they are installed beside us; a missing one is said to be missing.

Each entry takes (hidden, weight, targets, coefficients) and runs forward and backward of the sum of
coefficient x log-prob, or of the plain mean where the peer offers no more (marked ``mean only``).
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Peer = Callable[[Tensor, Tensor, Tensor, Tensor], Any]


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("cut_cross_entropy")
    loss = module.linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)
    (loss.float() * -coefficients).sum().backward()


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets).backward()


def _verl(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    logprob, _ = module.linear_cross_entropy(hidden, weight, targets, 1.0, "none", None)
    (logprob * coefficients).sum().backward()


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("trl.kernels.chunked_logprob")
    outputs = module.ChunkedLogProbFunction.apply(
        hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",)
    )
    (outputs[0] * coefficients).sum().backward()


def _quack(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy(hidden, weight, targets).backward()


def _torch_native(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    loss = torch.nn.functional.linear_cross_entropy(hidden, weight, targets)  # type: ignore[attr-defined]
    loss.backward()


PEERS: dict[str, tuple[str, Peer]] = {
    "cut-cross-entropy (exact)": ("cut_cross_entropy", _cut_cross_entropy),
    "liger Triton FLCE (mean only)": ("liger_kernel", _liger),
    "verl Triton": ("verl", _verl),
    "TRL chunked log-prob": ("trl", _trl),
    "quack (mean only)": ("quack", _quack),
}


def installed() -> tuple[dict[str, Peer], list[str]]:
    """Return (peers by name, names of those that are missing)."""
    present = {name: run for name, (module, run) in PEERS.items() if importlib.util.find_spec(module)}
    missing = [name for name in PEERS if name not in present]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        present["torch linear_cross_entropy (mean only)"] = _torch_native
    else:
        missing.append("torch linear_cross_entropy (mean only)")
    return present, missing
