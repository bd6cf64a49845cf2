"""Digests of sets of named tensors: equal ones mean equal weights, whoever wrote the file.

The digest of tensors runs over name, dtype, shape and raw little-endian bytes in name order, so it depends
neither on the order of a state dict nor on how tensors are spread over shards.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping

import torch


def tensor_bytes(tensor: torch.Tensor) -> memoryview:
    """Return the raw bytes of a tensor in row-major order (no copy for a contiguous CPU tensor)."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().data


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 (hex) over (name, dtype, shape, bytes) of all tensors, in name order."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        header = [name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)]
        digest.update(json.dumps(header, separators=(",", ":")).encode() + b"\n")
        digest.update(tensor_bytes(tensor))
    return digest.hexdigest()
