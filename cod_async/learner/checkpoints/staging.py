"""A copy of the training state in host memory, taken between two steps, so that it can be written beside
training.

On a CPU the loop waits for the copy. On CUDA the copy runs on a stream of its own into page-locked memory:
the loop goes on at once with the next forward pass, which only reads, and the device waits for the copy just
before the optimizer next changes anything (a hook of the optimizer sees to that). The memory is kept from
one checkpoint to the next, because page-locking it again would take longer than the copy.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from cod_async.learner.checkpoints.files import Piece

StagedPieces = dict[str, list[Piece]]
"""Parts in host memory by kind."""


class Staging:
    """Host memory for the parts of a state.

    Args:
        device: where the training state is; some of it may be in host memory anyway.
        optimizer: whose steps change the state. With hooks (``torch.optim.Optimizer``) copies from CUDA go on
            beside the next forward pass; without, they are waited for.
    """

    def __init__(self, device: torch.device, optimizer: Any) -> None:
        self._device = device
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None  # type: ignore[no-untyped-call]
        self._copied: torch.cuda.Event | None = None
        register = getattr(optimizer, "register_step_pre_hook", None)
        self._has_hook = register is not None
        if register is not None and self._stream is not None:
            register(self._before_step)

    def take(self, pieces: Mapping[str, Sequence[Piece]]) -> StagedPieces:
        """Copy parts to host memory; read the result after :meth:`finish` only.

        The copies of the last call are overwritten.

        Args:
            pieces: by kind; what they point to may change from the next optimizer step on.
        """
        if self._stream is None:
            return {kind: [self._copy(kind, piece) for piece in found] for kind, found in pieces.items()}
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            staged = {kind: [self._copy(kind, piece) for piece in found] for kind, found in pieces.items()}
            self._copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
            self._copied.record(self._stream)
        if not self._has_hook:
            self.finish()
        return staged

    def finish(self) -> None:
        """Wait until the last copies are there; any thread may ask."""
        copied = self._copied
        if copied is not None:
            copied.synchronize()

    def _copy(self, kind: str, piece: Piece) -> Piece:
        source = piece.data
        buffer = self._buffers.get((kind, piece.name))
        if buffer is None or buffer.shape != source.shape or buffer.dtype != source.dtype:
            is_pinned = source.device.type == "cuda"
            buffer = torch.empty(source.shape, dtype=source.dtype, device="cpu", pin_memory=is_pinned)
            self._buffers[kind, piece.name] = buffer
        buffer.copy_(source, non_blocking=True)
        return Piece(piece.name, piece.offsets, buffer)

    def _before_step(self, *_: Any) -> None:
        """Make the device wait for the copy before it changes what is being copied."""
        if self._copied is not None:
            torch.cuda.current_stream(self._device).wait_event(self._copied)
