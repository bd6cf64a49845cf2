"""Memory beyond inputs and gradients: by the tables engines allocate from, and as the allocator saw it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from cod_kernels import LossOptions, linear_logprob, linear_segment_loss
from cod_kernels.linear_logprob.exponentials import TWIN_TILE
from cod_kernels.linear_logprob.memory import (
    allocate,
    forward_buffers,
    fused_buffers,
    fused_chunk_rows,
    num_bytes,
    plain_buffers,
    plain_chunk_rows,
)

LIMIT_BYTES = 3 << 30
BLAS_BYTES = 64 << 20  # cuBLAS keeps a workspace of 32 MiB per stream on Hopper
VOCAB = 151_936


@pytest.mark.parametrize("vocab", [32_000, 128_256, 151_643, VOCAB, 262_144])
@pytest.mark.parametrize("width", [1024, 4096, 8192, 16_384])
@pytest.mark.parametrize("has_entropy", [False, True])
def test_chunks_stay_below_three_gibibytes(vocab: int, width: int, has_entropy: bool) -> None:
    plain = plain_chunk_rows(vocab)
    assert num_bytes(plain_buffers(plain, vocab)) + BLAS_BYTES <= LIMIT_BYTES
    fused = fused_chunk_rows(vocab, width, torch.bfloat16, 128)
    for tile in (128, 256):
        table = fused_buffers(fused, vocab, width, torch.bfloat16, tile_vocab=tile, has_entropy=has_entropy)
        assert num_bytes(table) + BLAS_BYTES <= LIMIT_BYTES
    assert plain % 128 == fused % 128 == 0 and 0 < plain <= 8192 and 0 < fused <= 8192


def test_rows_of_a_chunk_at_the_reference_shape() -> None:
    """Twice as many rows in the same memory: 2 bytes per element instead of 4."""
    assert plain_chunk_rows(VOCAB) == 4352
    assert fused_chunk_rows(VOCAB, 4096, torch.bfloat16, 128) == 8192
    assert num_bytes(plain_buffers(4352, VOCAB)) == 4352 * VOCAB * 4
    table = fused_buffers(8192, VOCAB, 4096, torch.bfloat16, tile_vocab=256, has_entropy=False)
    assert num_bytes(table) == 8192 * (VOCAB * 2 + 4096 * 6 + 594 * 4)


def test_sizes_are_those_of_the_tensors() -> None:
    table = fused_buffers(5, 1000, 12, torch.bfloat16, tile_vocab=256, has_entropy=True)
    tensors = allocate(table, torch.device("cpu"))
    assert sum(t.numel() * t.element_size() for t in tensors.values()) == num_bytes(table)
    assert tensors["exponentials"].stride(0) % 64 == 0 and tensors["partials"].stride(1) % 64 == 0


def _peak_bytes(run: Callable[[], Any]) -> int:
    """Return the most that the allocator had given out at once during a call."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    assert record.profiler is not None and record.profiler.kineto_results is not None
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    held = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        top = max(top, held)
    return top


def test_the_allocator_agrees() -> None:
    """The twins on a whole vocabulary, two chunks of 128 rows in float32; T enters nowhere."""
    rows, width = 128, 8
    chunk_bytes = rows * VOCAB * 4
    tiles_bytes = 6 * rows * TWIN_TILE * 4  # logits, exponentials and what lies between, of one tile
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(VOCAB, width, generator=generator).requires_grad_()

    def step(count: int, first_product: Any) -> Callable[[], None]:
        hidden = torch.randn(count, width, generator=generator).requires_grad_()
        targets = torch.randint(VOCAB, (count,), generator=generator)
        zeros, ones, ids = torch.zeros(count), torch.ones(count), torch.arange(count)
        weight.grad = None  # now, so that the call does not begin by giving memory back

        def run() -> None:
            loss, *_ = linear_segment_loss(
                hidden, weight, targets, zeros, ids, ones, ones, options=LossOptions(clip="none"),
                chunk_rows=rows, first_product=first_product,
            )  # fmt: skip
            loss.backward()  # type: ignore[no-untyped-call]

        return run

    head_bytes = weight.numel() * 4
    table = fused_buffers(rows, VOCAB, width, torch.float32, tile_vocab=TWIN_TILE, has_entropy=False)
    for count in (rows, 2 * rows):
        fused = _peak_bytes(step(count, "fused")) - head_bytes
        assert chunk_bytes < fused < num_bytes(table) + tiles_bytes + (1 << 20)
        plain = _peak_bytes(step(count, "plain")) - head_bytes
        assert 2 * chunk_bytes < plain < 2 * chunk_bytes + (4 << 20)  # logits and their softmax
    hidden, targets = torch.randn(2 * rows, width), torch.arange(2 * rows)

    def forward() -> None:
        with torch.no_grad():
            linear_logprob(hidden, weight, targets, chunk_rows=rows, first_product="fused")

    partials = num_bytes(forward_buffers(rows, VOCAB, torch.float32, tile_vocab=TWIN_TILE, has_entropy=False))
    assert _peak_bytes(forward) < partials + tiles_bytes + (1 << 20) < chunk_bytes / 4
