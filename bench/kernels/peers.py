"""Other people's fused log-probs, where they are installed beside us; a missing one is said to be missing.

Each entry takes (hidden, weight, targets, coefficients) and runs forward and backward of the sum of
coefficient x log-prob, or of the plain mean where the peer offers no more (marked ``mean only``). Argument
lists of some peers change from release to release, so those are filled by name.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Peer = Callable[[Tensor, Tensor, Tensor, Tensor], Any]
GRPO_ROWS = 8
"""Rows that a peer with one advantage per row gets the tokens in."""


def by_name(function: Any, known: dict[str, Any]) -> list[Any]:
    """Return positional arguments for ``function.apply``, filled by the names in ``function.forward``.

    Raises:
        TypeError: an argument without default is not known: the peer has changed.
    """
    filled: list[Any] = []
    for name, parameter in list(inspect.signature(function.forward).parameters.items())[1:]:
        if name in known:
            filled.append(known[name])
        elif parameter.default is not inspect.Parameter.empty:
            filled.append(parameter.default)
        else:
            raise TypeError(f"{function.__name__} has an argument {name!r} that this adaptor does not know")
    return filled


def _cut_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("cut_cross_entropy")
    loss = module.linear_cross_entropy(hidden, weight, targets, reduction="none", filter_eps=None)
    (loss.float() * -coefficients).sum().backward()


def _cut_cross_entropy_filtered(
    hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor
) -> None:
    module = importlib.import_module("cut_cross_entropy")
    loss = module.linear_cross_entropy(hidden, weight, targets, reduction="none")
    (loss.float() * -coefficients).sum().backward()


def _liger(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("liger_kernel.transformers")
    module.LigerFusedLinearCrossEntropyLoss()(weight, hidden, targets).backward()


def _liger_scaled(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    """On Hopper with nvidia-cutlass-dsl its CuTe kernel, elsewhere its torch fallback."""
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    nll = module.LigerFusedLinearScaledCrossEntropyFunction.apply(hidden, weight, targets)
    (nll.float() * -coefficients).sum().backward()


def _liger_fallback(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("liger_kernel.ops.fused_linear_scaled_cross_entropy")
    nll = module._FusedLinearPPOFallbackFunction.apply(hidden, weight, targets, 1.0, -100, False)
    (nll.float() * -coefficients).sum().backward()


def _liger_grpo(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("liger_kernel.chunked_loss")
    loss = module.LigerFusedLinearGRPOLoss(beta=0.0, use_ref_model=False, loss_type="dapo")
    result = loss(
        _input=hidden.view(GRPO_ROWS, -1, hidden.shape[1]),
        lin_weight=weight,
        selected_token_ids=targets.view(GRPO_ROWS, -1),
        attention_mask=torch.ones_like(targets).view(GRPO_ROWS, -1),
        advantages=coefficients.view(GRPO_ROWS, -1).mean(1),
    )
    (result[0] if isinstance(result, tuple) else result).backward()


def _verl(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("verl.utils.kernel.linear_cross_entropy")
    known = {
        "hidden": hidden,
        "weight": weight,
        "labels": targets,
        "temperature": 1.0,
        "reduction": "none",
        "dist_process_group": None,
    }
    function = module.LinearCrossEntropy
    logprob, _ = function.apply(*by_name(function, known))
    (logprob * coefficients).sum().backward()


def _trl(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    function = importlib.import_module("trl.kernels.chunked_logprob").ChunkedLogProbFunction
    known = {
        "hidden": hidden,
        "weight": weight,
        "bias": None,
        "targets": targets,
        "temperature": 1.0,
        "final_logit_softcapping": None,
        "logit_scale": 1.0,
    }
    try:
        arguments = by_name(function, known)
    except TypeError:  # release 1.16
        arguments = [hidden, weight, None, targets, 1.0, 8192, None, 1.0, ("entropy",)]
    (function.apply(*arguments)[0] * coefficients).sum().backward()


def _prime(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("prime_rl.trainer.models.layers.lm_head")
    function = module._SequenceChunkedLogProbEntropyFn
    known = {
        "hidden": hidden,
        "weight": weight,
        "labels": targets,
        "inv_temperature": torch.ones_like(coefficients),
        "chunk_size": 8192,
    }
    (function.apply(*by_name(function, known))[0] * coefficients).sum().backward()


def _quack(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    module = importlib.import_module("quack.linear_cross_entropy")
    module.chunked_linear_cross_entropy(hidden, weight, targets, reduction="mean").backward()


def _torch_native(hidden: Tensor, weight: Tensor, targets: Tensor, coefficients: Tensor) -> None:
    loss = torch.nn.functional.linear_cross_entropy(hidden, weight, targets)  # type: ignore[attr-defined]
    loss.backward()


PEERS: dict[str, tuple[str, Peer]] = {
    "cut-cross-entropy (exact)": ("cut_cross_entropy", _cut_cross_entropy),
    "verl Triton": ("verl", _verl),
    "liger scaled cross-entropy": ("liger_kernel", _liger_scaled),
    "quack (mean only)": ("quack", _quack),
    "TRL chunked log-prob": ("trl", _trl),
    "prime-rl chunked log-prob": ("prime_rl", _prime),
    "liger scaled, torch fallback": ("liger_kernel", _liger_fallback),
    "liger Triton FLCE (mean only)": ("liger_kernel", _liger),
    "liger chunked GRPO (advantage per row)": ("liger_kernel", _liger_grpo),
    "cut-cross-entropy (drops small gradients)": ("cut_cross_entropy", _cut_cross_entropy_filtered),
}
"""By name: the package it needs, and the call; the fastest first, because time may run out on the last."""


def installed() -> tuple[dict[str, Peer], list[str]]:
    """Return (peers by name, names of those that are missing)."""
    present = {name: run for name, (module, run) in PEERS.items() if importlib.util.find_spec(module)}
    missing = [name for name in PEERS if name not in present]
    if hasattr(torch.nn.functional, "linear_cross_entropy"):
        present["torch linear_cross_entropy (mean only)"] = _torch_native
    else:
        missing.append("torch linear_cross_entropy (mean only)")
    return present, missing
