"""Bad values on a device, found without stalling it: the first bad row is kept there and read once per step.

On the CPU ops look at values at once and raise. On CUDA they make wrong rows NaN, so that no wrong number can
pass for a right one, and note the first such row here; :func:`raise_faults` reads the notes. ``segment_loss``
needs no note: its metrics, which are read once per step anyway, hold the same.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cod_kernels.dispatch import KernelInputError

FAULTS = (
    "linear_logprob: targets[{}] is outside the vocabulary",
    "linear_logprob: the log-prob of row {} is not finite; hidden, weight or bias hold NaN or infinity "
    "there, or temperature is not positive",
    "segment_reduce: segment_ids[{}] is out of range, or below the one before it although is_sorted is set",
    "segment_reduce: values[{}] is not finite",
    "linear_logprob: the log-prob of row {} is below -104, out of reach of first_product='fused'; weight or "
    "bias hold infinity, or its target is foreign or corrupted, or pass first_product='plain'",
)
"""Messages; the place in the tuple is the fault's code."""

OUTSIDE_VOCABULARY, NOT_FINITE, BAD_SEGMENT_ID, BAD_VALUE, OUT_OF_REACH = range(5)

_NONE = torch.iinfo(torch.int64).max
_CALL_BITS = 40
"""A note is one integer, (number of the call, index in it); the smallest is the first of the first call."""

_notes: dict[torch.device, Tensor] = {}
_calls: dict[torch.device, list[int]] = {}


def note_fault(code: int, is_bad: Tensor) -> None:
    """Keep the call and the index of the first true element; nothing is read back.

    Args:
        code: place in :data:`FAULTS`.
        is_bad: bool [T].
    """
    device = is_bad.device
    if device not in _notes:
        _notes[device] = torch.full((len(FAULTS),), _NONE, dtype=torch.int64, device=device)
        _calls[device] = [0] * len(FAULTS)
    _calls[device][code] += 1
    start = _calls[device][code] << _CALL_BITS
    place = torch.arange(start, start + is_bad.numel(), device=device)
    first = torch.where(is_bad, place, _NONE).min()
    _notes[device][code] = torch.minimum(_notes[device][code], first)


def raise_faults(device: torch.device) -> None:
    """Raise for what was noted on ``device`` since the last call, and forget it; synchronises once.

    Raises:
        KernelInputError: names the argument, its first bad row, and the call of the op since the last check
            (counted from 1) that the row belongs to.
    """
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    notes = _notes.pop(device, None)
    if notes is None:
        return
    for text, note in zip(FAULTS, notes.tolist(), strict=True):
        if note != _NONE:
            call, index = note >> _CALL_BITS, note & ((1 << _CALL_BITS) - 1)
            raise KernelInputError(f"{text.format(index)} (call {call} since the last check)")
