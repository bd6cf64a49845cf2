"""Which kernel computes attention here: the fastest one that gives the right numbers.

Whether a kernel exists for a device, a type and a width of heads depends on how torch was built and on the
machine. So each candidate computes one small tree, forward and backward, once per process, and is compared
with the plain kernel. One that raises or is wrong is passed over; the log says which is taken and why others
are not. The test runs on a thread of its own, because modes of torch belong to a thread: under selective
recomputation its results would be kept, and handed out in backward as those of a layer.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from cod_async.models.attention.blocks import backward_block, forward_blocks
from cod_async.models.attention.kernels import CpuFlash, Efficient, Kernel, Plain, VarlenFlash
from cod_async.models.attention.places import make_blocks
from cod_async.models.attention.rows import tree_passes

logger = logging.getLogger(__name__)

_CANDIDATES: dict[str, tuple[Kernel, ...]] = {"cpu": (CpuFlash(),), "cuda": (VarlenFlash(), Efficient())}
_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-2}
"""Largest difference from the plain kernel on numbers up to 1; products may be taken in TF32. Others: 0.1."""
_TREE = ((5, 2, 1, 40), (-1, 0, 0, 2))


def pick(device: torch.device, dtype: torch.dtype, head_dim: int) -> Kernel:
    """Return the fastest kernel that works for this device, type and width of a head."""
    return _pick(device.type, device.index, dtype, head_dim)


@lru_cache(maxsize=64)
def _pick(device_type: str, index: int | None, dtype: torch.dtype, head_dim: int) -> Kernel:
    device = torch.device(device_type) if index is None else torch.device(device_type, index)
    for kernel in _CANDIDATES.get(device_type, ()):
        problem = problem_of(kernel, device, dtype, head_dim)
        if problem is None:
            logger.info("attention on %s in %s with heads of %d: %s", device, dtype, head_dim, kernel.name)
            return kernel
        logger.info("attention on %s in %s: not %s, %s", device, dtype, kernel.name, problem)
    logger.warning("attention on %s in %s with heads of %d: plain, slow", device, dtype, head_dim)
    return Plain()


def problem_of(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> str | None:
    """Return why a kernel cannot compute a small tree forward and backward here, None if it can."""
    limit = _TOLERANCES.get(dtype, 0.1)

    def look() -> str | None:
        try:
            found = _numbers(kernel, device, dtype, head_dim)
        except (RuntimeError, NotImplementedError, TypeError) as error:
            lines = str(error).splitlines()
            return lines[0][:200] if lines else type(error).__name__
        expected = _numbers(Plain(), device, dtype, head_dim)
        # Python's max would drop a NaN that does not come first.
        gaps = [(a - b).abs().max() for a, b in zip(found, expected, strict=True)]
        worst = float(torch.stack(gaps).max())
        return None if worst <= limit else f"its numbers differ by {worst:.2g}, more than {limit:.2g}"

    return _on_fresh_thread(look)


def _on_fresh_thread(look: Callable[[], str | None]) -> str | None:
    """Return what ``look`` returns on a thread without modes, hooks or autocast; raise what it raises."""
    answers: list[str | None] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            answers.append(look())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=run, name="cod-attention-choice")
    thread.start()
    thread.join()
    if errors:
        raise errors[0]
    return answers[0]


@torch.no_grad()
def _numbers(kernel: Kernel, device: torch.device, dtype: torch.dtype, head_dim: int) -> list[Tensor]:
    """Return output, log-sum-exp and gradients of a small tree."""
    lengths, parents = _TREE
    blocks = make_blocks(tree_passes(lengths, parents), is_ragged=kernel.is_ragged, device=device)
    shapes = [(sum(lengths), heads, head_dim) for heads in (4, 2, 2, 4)]
    query, key, value, grad = (
        torch.arange(shape[0] * shape[1] * shape[2], dtype=torch.float64)
        .add(number)
        .sin()
        .view(shape)
        .to(device, dtype)
        for number, shape in enumerate(shapes)
    )
    scale = head_dim**-0.5
    out, lse = forward_blocks(kernel, blocks, query, key, value, scale)
    out = out.to(dtype)
    sums = [torch.zeros(shape, dtype=torch.float64, device=device) for shape in shapes[:3]]
    for block in blocks:
        parts = backward_block(kernel, block, grad, query, key, value, out, lse, scale)
        for total, part, places in zip(sums, parts, (block.queries, block.keys, block.keys), strict=True):
            places.add(total, part)
    return [out.double(), lse.double(), *sums]
