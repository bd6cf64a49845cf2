"""Bad values on a device, found without stalling it: the first bad row is kept there and read once per step.

On the CPU ops look at values at once and raise. On CUDA they make wrong rows NaN, so that no wrong number can
pass for a right one, and note the first such row here; :func:`raise_faults` reads the notes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cod_kernels.dispatch import KernelInputError

FAULTS = (
    "linear_logprob: targets[{}] is outside the vocabulary",
    "linear_logprob: the log-prob of row {} is not finite; hidden, weight or bias hold NaN or infinity "
    "there, or temperature is not positive",
)
"""Messages; the place in the tuple is the fault's code."""

OUTSIDE_VOCABULARY, NOT_FINITE = 0, 1

_NONE = torch.iinfo(torch.int64).max
_notes: dict[torch.device, Tensor] = {}


def note_fault(code: int, is_bad: Tensor) -> None:
    """Keep the index of the first true element; nothing is read back.

    Args:
        code: place in :data:`FAULTS`.
        is_bad: bool [T].
    """
    device = is_bad.device
    if device not in _notes:
        _notes[device] = torch.full((len(FAULTS),), _NONE, dtype=torch.int64, device=device)
    index = torch.arange(is_bad.numel(), device=device)
    first = torch.where(is_bad, index, _NONE).min()
    _notes[device][code] = torch.minimum(_notes[device][code], first)


def raise_faults(device: torch.device) -> None:
    """Raise for what was noted on ``device`` since the last call, and forget it; synchronises once.

    Raises:
        KernelInputError: names the argument and the first bad row of its call.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    notes = _notes.pop(device, None)
    if notes is None:
        return
    for text, index in zip(FAULTS, notes.tolist(), strict=True):
        if index != _NONE:
            raise KernelInputError(text.format(index))
