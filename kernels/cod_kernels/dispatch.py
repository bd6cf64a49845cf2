"""Which implementation an op runs, and how it refuses bad input.

``auto`` means Triton on CUDA and the torch twin elsewhere. There is no silent fallback: where the Triton
kernel of an op does not exist, ``auto`` on CUDA raises and the caller has to ask for ``torch`` by name.
"""

from __future__ import annotations

from typing import Literal

import torch

Backend = Literal["auto", "torch", "triton"]


class KernelInputError(ValueError):
    """An argument of an op is wrong; the message names it and, for values, the first offending index."""


class BackendUnavailableError(RuntimeError):
    """The implementation that was asked for does not exist here; the message says what to pass instead."""


def choose_backend(
    op: str, backend: str, device: torch.device, *, has_triton_kernel: bool
) -> Literal["torch", "triton"]:
    """Return the implementation to run.

    Args:
        op: name of the op, for messages.
        backend: ``auto``, ``torch`` or ``triton``.
        device: where the op's arguments are.
        has_triton_kernel: whether the op has a Triton kernel in this version.

    Raises:
        KernelInputError: unknown backend.
        BackendUnavailableError: Triton is wanted, and there is no kernel or no CUDA device.
    """
    if backend not in ("auto", "torch", "triton"):
        raise KernelInputError(f"{op}: backend is {backend!r}; it must be 'auto', 'torch' or 'triton'")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    if device.type != "cuda":
        raise BackendUnavailableError(
            f"{op}: backend 'triton' needs CUDA tensors, got {device.type}; pass backend='torch'"
        )
    if not has_triton_kernel:
        raise BackendUnavailableError(
            f"{op}: has no Triton kernel in this version; "
            "pass backend='torch' to run the (slower) torch twin on CUDA"
        )
    return "triton"


def require(condition: bool, message: str) -> None:
    """Raise :class:`KernelInputError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise KernelInputError(message)


def first_index(mask: torch.Tensor) -> int:
    """Return the index of the first true element of a one-dimensional mask (synchronises)."""
    return int(torch.nonzero(mask)[0, 0])
