"""How the tokens of a packed micro-batch are shared by ranks.

*Ulysses* (arXiv 2309.14509) gives every rank a contiguous part; for attention the ranks exchange heads for
tokens, so that each computes whole rows with a part of the heads. *Ring* (arXiv 2310.01889) leaves queries
where they are and passes keys and values around; so that causal work is even, rank r of n has the r-th and
the (2n-1-r)-th of 2n parts.
"""

from __future__ import annotations

from typing import Any, Literal

import torch

from cod_async.models.layout import SequenceShard

SequenceMode = Literal["ulysses", "ring"]

RING_TOKENS_PER_RANK = 32_768
"""From so many tokens per rank on, transfers hide behind products even between machines: a step with t
tokens takes 2 t^2 Hq D operations and moves 4 t Hkv D bytes in bfloat16; with 4e14 operations/s and
2.5e10 bytes/s both take equally long at 32,000 tokens with one query head per key head."""


def choose_mode(num_heads: int, num_kv_heads: int, size: int, num_tokens: int) -> SequenceMode:
    """Return how attention should cross ranks.

    Ulysses where heads divide among the ranks. The exception are very long rows of models with few key heads:
    around the ring a rank sends ``2 Hkv D`` numbers of each of its tokens n - 1 times, with ulysses
    ``(2 Hq + 2 max(Hkv, n)) D / n`` to each of n - 1 others. Where the ring sends less than half of that, and
    its transfers hide behind its products (:data:`RING_TOKENS_PER_RANK`), it is taken.

    Args:
        num_heads: query heads.
        num_kv_heads: key and value heads.
        size: ranks that share rows.
        num_tokens: of a whole micro-batch.
    """
    if num_heads % size:
        return "ring"
    ring_heads = 2 * num_kv_heads * size
    ulysses_heads = 2 * num_heads + 2 * max(num_kv_heads, size)
    if 2 * ring_heads <= ulysses_heads and num_tokens >= RING_TOKENS_PER_RANK * size:
        return "ring"
    return "ulysses"


def padded_tokens(num_tokens: int, size: int, mode: SequenceMode) -> int:
    """Return how many tokens a micro-batch has with padding: a multiple of ``size`` (ulysses) or ``2 * size``
    (ring).
    """
    unit = _unit(size, mode)
    return -(-num_tokens // unit) * unit


def make_shard(
    num_tokens: int, rank: int, size: int, mode: SequenceMode, group: Any, device: torch.device | str
) -> SequenceShard:
    """Return a rank's part of a packed micro-batch.

    Args:
        num_tokens: of the micro-batch, with padding (:func:`padded_tokens`).
        rank: of this process in ``group``.
        size: ranks in ``group``.
        mode: how attention crosses ranks.
        group: process group of the ranks that share rows; None: all processes.
        device: where ``places`` shall be.

    Raises:
        ValueError: the tokens do not divide, or the rank is not in the group.
    """
    if not 0 <= rank < size:
        raise ValueError(f"rank {rank} of {size} ranks: ranks count from 0")
    if num_tokens < 1 or num_tokens % _unit(size, mode):
        raise ValueError(
            f"{num_tokens} tokens do not divide among {size} ranks with {mode}: pad to "
            f"{padded_tokens(max(num_tokens, 1), size, mode)}"
        )
    places = torch.cat([torch.arange(start, stop) for start, stop in parts_of(num_tokens, rank, size, mode)])
    return SequenceShard(group, rank, size, mode, num_tokens, places.to(device))


def parts_of(num_tokens: int, rank: int, size: int, mode: SequenceMode) -> list[tuple[int, int]]:
    """Return where a rank's parts begin and end in the micro-batch, in the order it has them."""
    length = num_tokens // _unit(size, mode)
    numbers = [rank] if mode == "ulysses" else [rank, 2 * size - 1 - rank]
    return [(number * length, (number + 1) * length) for number in numbers]


def _unit(size: int, mode: SequenceMode) -> int:
    return size if mode == "ulysses" else 2 * size
