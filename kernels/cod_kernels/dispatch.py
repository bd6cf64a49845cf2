"""Which implementation an op runs, and how it refuses bad input.

``auto`` means Triton on CUDA and the torch twin elsewhere. There is no silent fallback: where Triton is not
installed, or would interpret its kernels, ``auto`` on CUDA raises and the caller has to ask for ``torch`` by
name.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
from typing import Literal

import torch

Backend = Literal["auto", "torch", "triton"]


class KernelInputError(ValueError):
    """An argument of an op is wrong; the message names it and, for values, the first offending index."""


class BackendUnavailableError(RuntimeError):
    """The implementation that was asked for does not exist here; the message says what to pass instead."""


def has_triton() -> bool:
    """Return whether Triton can be imported."""
    return importlib.util.find_spec("triton") is not None


def is_interpreting() -> bool:
    """Return whether Triton kernels run in its interpreter, which takes CPU tensors."""
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def on_device(tensor: torch.Tensor) -> contextlib.AbstractContextManager[object]:
    """Return a context that makes the tensor's CUDA device the current one; on other devices an empty one.

    Triton launches on the current device, whatever device the pointers it is given belong to.
    """
    return torch.cuda.device(tensor.device) if tensor.device.type == "cuda" else contextlib.nullcontext()


def choose_backend(
    op: str, backend: str, device: torch.device, *, has_triton_kernel: bool | None = None
) -> Literal["torch", "triton"]:
    """Return the implementation to run.

    Args:
        op: name of the op, for messages.
        backend: ``auto``, ``torch`` or ``triton``.
        device: where the op's arguments are.
        has_triton_kernel: whether a kernel can be had; whether Triton is installed when None.

    Raises:
        KernelInputError: unknown backend.
        BackendUnavailableError: Triton is wanted, and it is not installed, there is no CUDA device, or its
            interpreter would run kernels on CUDA tensors.
    """
    if backend not in ("auto", "torch", "triton"):
        raise KernelInputError(f"{op}: backend is {backend!r}; it must be 'auto', 'torch' or 'triton'")
    if backend == "torch" or (backend == "auto" and device.type != "cuda"):
        return "torch"
    if device.type != "cuda" and not is_interpreting():
        raise BackendUnavailableError(
            f"{op}: backend 'triton' needs CUDA tensors, got {device.type}; pass backend='torch'"
        )
    if not (has_triton() if has_triton_kernel is None else has_triton_kernel):
        raise BackendUnavailableError(
            f"{op}: Triton is not installed; install it, "
            "or pass backend='torch' to run the (slower) torch twin on CUDA"
        )
    if device.type == "cuda" and is_interpreting():
        raise BackendUnavailableError(
            f"{op}: TRITON_INTERPRET is set, so kernels would be interpreted on the host; unset it, "
            "or pass backend='torch' to run the (slower) torch twin on CUDA"
        )
    return "triton"


def require(condition: bool, message: str) -> None:
    """Raise :class:`KernelInputError` with ``message`` unless ``condition`` holds."""
    if not condition:
        raise KernelInputError(message)


def first_index(mask: torch.Tensor) -> int:
    """Return the index of the first true element of a one-dimensional mask (synchronises)."""
    return int(torch.nonzero(mask)[0, 0])
