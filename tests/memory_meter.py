"""How many bytes of tensors are alive, and how many were at once: for checks of what keeps memory.

Every operator's results are noted by weak references to their storages, so views count once and what is freed
counts no more. Nothing of the project takes part.
"""

from __future__ import annotations

from typing import Any

import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class MemoryMeter(TorchDispatchMode):
    """Counts storages made while it is entered.

    Attributes:
        peak_bytes: most bytes alive after any operator.
        largest_bytes: the largest single storage.
    """

    def __init__(self) -> None:
        super().__init__()
        self.peak_bytes = 0
        self.largest_bytes = 0
        self._refs: dict[int, tuple[StorageWeakRef, int]] = {}

    def live_bytes(self) -> int:
        """Return the bytes of all storages that are still alive."""
        self._refs = {key: (ref, size) for key, (ref, size) in self._refs.items() if not ref.expired()}
        return sum(size for _, size in self._refs.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {
            StorageWeakRef(x.untyped_storage()).cdata
            for x in tree_leaves((args, kwargs or {}))
            if isinstance(x, torch.Tensor)
        }
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                ref = StorageWeakRef(storage)
                if ref.cdata not in inputs or ref.cdata in self._refs:
                    self._refs[ref.cdata] = (ref, storage.nbytes())
                    self.largest_bytes = max(self.largest_bytes, storage.nbytes())
        self.peak_bytes = max(self.peak_bytes, self.live_bytes())
        return out
