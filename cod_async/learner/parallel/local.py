"""This rank's part of a tensor that may be sharded, and all of it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor


def local(tensor: Tensor) -> Tensor:
    """Return this rank's part of a sharded tensor, and any other tensor as it is; no copy."""
    any_tensor: Any = tensor
    part: Tensor = any_tensor.to_local() if hasattr(tensor, "to_local") else tensor
    return part


def whole(tensor: Tensor) -> Tensor:
    """Return all of a sharded tensor on every rank, and any other tensor as it is; all ranks must ask."""
    any_tensor: Any = tensor
    full: Tensor = any_tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return full


class WholeTensors(Mapping[str, Tensor]):
    """Tensors that are made whole when they are asked for, one at a time; all ranks must ask alike."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        """Return the whole tensor, on every rank."""
        return whole(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        """Yield the names."""
        return iter(self._tensors)

    def __len__(self) -> int:
        """Return how many there are."""
        return len(self._tensors)


def like(part: Tensor, sharded: Tensor, mesh: Any = None) -> Tensor:
    """Return ``part`` as this rank's share of a tensor that is sharded as ``sharded`` is.

    Args:
        part: this rank's share, on the mesh's kind of device.
        sharded: any tensor; without shards ``part`` is returned as it is.
        mesh: over the same ranks, for a part on another kind of device; that of ``sharded`` when None.
    """
    if not hasattr(sharded, "to_local"):
        return part
    from torch.distributed.tensor import DTensor

    of: Any = sharded
    found: Tensor = DTensor.from_local(
        part,
        of.device_mesh if mesh is None else mesh,
        of.placements,
        run_check=False,
        shape=of.shape,
        stride=of.stride(),
    )
    return found
