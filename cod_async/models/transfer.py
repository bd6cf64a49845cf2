"""From host memory to a device without waiting: pinned and asynchronous for CUDA, plain for a CPU."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def send(tensor: Tensor, device: torch.device | str) -> Tensor:
    """Return a host tensor on ``device``, without making the host wait for what the device still computes."""
    if torch.device(device).type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


def upload(array: npt.NDArray[Any], device: torch.device | str) -> Tensor:
    """Return ``array`` on ``device``, as :func:`send` does."""
    return send(torch.from_numpy(array), device)
