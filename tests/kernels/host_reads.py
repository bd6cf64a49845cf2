"""Counts operations that make the host wait for a device: reading a number, shapes that depend on data."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

WAITING = (
    "_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "bincount", "_unique2",
    "unique_dim", "unique_consecutive", "repeat_interleave", "allclose",
)  # fmt: skip
MASKED = ("index", "index_put", "index_put_", "_index_put_impl_")
"""Indexing by a mask looks for its true elements inside the operation."""


def has_mask(arguments: Any) -> bool:
    """Return whether a boolean tensor is among the indices."""
    if isinstance(arguments, torch.Tensor):
        return arguments.dtype in (torch.bool, torch.uint8)
    return isinstance(arguments, list | tuple) and any(map(has_mask, arguments))


class HostReads(TorchDispatchMode):
    """Collects the names of such operations."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().split("::")[1].split(".")[0]
        if name in WAITING or (name in MASKED and has_mask(args[1])):
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def host_reads_of(run: Any) -> list[str]:
    """Return what ``run()`` had to wait for."""
    with HostReads() as mode, torch.no_grad():
        run()
    return mode.found
