"""How much memory a chunk takes, and so how many rows it may have.

What a call holds beyond its inputs and gradients is one chunk's buffers, whatever the number of rows. The
engines allocate from the tables here and nothing else of that size, so that the arithmetic is the allocation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

Buffers = dict[str, tuple[tuple[int, ...], torch.dtype]]
"""Shape and dtype by name."""

ALIGNMENT = 64
"""Rows of logits are padded to a multiple of this many elements, and so are aligned for any vocabulary."""

PLAIN_BYTES = 5 << 29
"""Budget of a chunk of float32 logits: 2.5 GiB."""

FUSED_BYTES = 11 << 28
"""Budget of a chunk of bf16 exponentials and what goes with them: 2.75 GiB."""

MIN_ROWS, MAX_ROWS = 128, 8192


def padded(size: int) -> int:
    """Return ``size`` rounded up to a multiple of :data:`ALIGNMENT`."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def plain_buffers(rows: int, vocab_size: int) -> Buffers:
    """Return what the plain first product needs on a device: float32 logits, overwritten by gradients."""
    return {"logits": ((rows, padded(vocab_size)), torch.float32)}


def fused_buffers(
    rows: int, vocab_size: int, width: int, dtype: torch.dtype, *, tile_vocab: int, has_entropy: bool
) -> Buffers:
    """Return what the fused first product needs when it keeps the exponentials for the gradients.

    Args:
        rows: C, of a chunk.
        vocab_size: V, rows of the head here.
        width: H.
        dtype: of the hidden states; exponentials have it too.
        tile_vocab: columns of a tile; each has one partial sum per row.
        has_entropy: whether there is a second set of partial sums.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return forward_buffers(rows, vocab_size, dtype, tile_vocab=tile_vocab, has_entropy=has_entropy) | {
        "exponentials": ((rows, padded(vocab_size)), dtype),
        "products": ((rows, width), wide),
        "scaled_hidden": ((rows, width), dtype),
    }


def forward_buffers(
    rows: int, vocab_size: int, dtype: torch.dtype, *, tile_vocab: int, has_entropy: bool
) -> Buffers:
    """Return what the fused first product needs when nothing is differentiated: partial sums alone."""
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    return {"partials": ((1 + has_entropy, -(-vocab_size // tile_vocab), padded(rows)), wide)}


def num_bytes(buffers: Buffers) -> int:
    """Return the size of all buffers together."""
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in buffers.values())


def allocate(buffers: Buffers, device: torch.device) -> dict[str, Tensor]:
    """Return the buffers, not initialized."""
    return {name: torch.empty(shape, dtype=dtype, device=device) for name, (shape, dtype) in buffers.items()}


def _rows(budget_bytes: int, row_bytes: int) -> int:
    rows = budget_bytes // row_bytes // MIN_ROWS * MIN_ROWS
    return max(MIN_ROWS, min(MAX_ROWS, rows))


def plain_chunk_rows(vocab_size: int) -> int:
    """Return the rows of a chunk of float32 logits within :data:`PLAIN_BYTES`: a multiple of 128, <= 8192."""
    return _rows(PLAIN_BYTES, num_bytes(plain_buffers(1, vocab_size)))


def fused_chunk_rows(vocab_size: int, width: int, dtype: torch.dtype, tile_vocab: int) -> int:
    """Return the rows of a chunk of exponentials within :data:`FUSED_BYTES`: a multiple of 128, <= 8192.

    The entropy's partial sums are counted in always, so that asking for it does not change the other results.
    """
    rows = fused_buffers(MIN_ROWS, vocab_size, width, dtype, tile_vocab=tile_vocab, has_entropy=True)
    return _rows(FUSED_BYTES, num_bytes(rows) // MIN_ROWS)
