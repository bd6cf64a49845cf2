"""The shapes the engine computes in: how many rows, how long, and which prompts share a rectangle.

Ordinary shapes follow the load: the attended length grows in steps, a decode batch is the leading slots as a
view when most of them are busy and a gathered copy when few are, and prompts of similar length are computed
together. Batch invariant shapes never change. That rows do not influence each other there rests on two facts:
matrix products of a fixed shape treat all rows alike, and element-wise kernels treat all elements alike as
long as their number is a multiple of the vector width (a shorter tail is computed by other code, with other
rounding), hence the rounding to 32.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from cod_async.config.schema import EngineConfig
from cod_async.engines.embedded.slots import IntArray

LENGTH_STEP = 16
"""The attended length grows in steps of this many positions."""

INITIAL_POSITIONS = 64
"""Positions per slot that are allocated at once."""

PREFILL_TOKENS_PER_STEP = 4096
"""Most prompt tokens computed in one step, so that long prompts do not hold up running rows for long."""

INVARIANT_MULTIPLE = 32
"""Rows and positions of the fixed shape are multiples of this (two AVX-512 vectors of float32)."""


def _round_up(value: int, multiple: int) -> int:
    return -(-value // multiple) * multiple


@dataclass(frozen=True)
class ComputeShape:
    """Sizes of the engine's tensors.

    Attributes:
        is_fixed: whether every step computes all rows over all positions.
        num_rows: rows of the tables and the cache; those beyond ``max_running`` only pad.
        num_positions: most positions of the cache.
        initial_positions: positions allocated at once.
        prefill_tokens: budget of a step.
    """

    is_fixed: bool
    num_rows: int
    num_positions: int
    initial_positions: int
    prefill_tokens: int = PREFILL_TOKENS_PER_STEP

    def length_for(self, num_positions: int) -> int:
        """Attended length for rows of up to ``num_positions`` tokens."""
        if self.is_fixed:
            return self.num_positions
        return min(_round_up(num_positions, LENGTH_STEP), self.num_positions)

    def rows_for(self, active: IntArray) -> IntArray:
        """Rows to compute for the active slots (ascending, not empty): a superset, ascending."""
        if self.is_fixed:
            return np.arange(self.num_rows)
        leading = int(active[-1]) + 1
        return np.arange(leading) if 2 * active.size >= leading else active


def compute_shape(config: EngineConfig, max_context_tokens: int) -> ComputeShape:
    """Return the shapes for an engine section and a context length."""
    if config.is_batch_invariant:
        rows = _round_up(config.max_running, INVARIANT_MULTIPLE)
        positions = _round_up(max_context_tokens, INVARIANT_MULTIPLE)
        return ComputeShape(True, rows, positions, positions)
    positions = _round_up(max_context_tokens, LENGTH_STEP)
    return ComputeShape(False, config.max_running, positions, INITIAL_POSITIONS)


def prefill_groups(rows: IntArray, missing: IntArray, budget: int) -> Iterator[tuple[IntArray, IntArray]]:
    """Split prompts into rectangles of similar width.

    Args:
        rows: slots with missing tokens, in order of arrival.
        missing: int64 over all slots, tokens to compute.
        budget: most tokens in all groups together; a longer prompt is cut and goes on in the next step.

    Yields:
        (slots int64 [n], tokens to compute now int64 [n]); padding is at most about half of a rectangle.
    """
    counts = missing[rows]
    room = budget - (np.cumsum(counts) - counts)
    rows, counts = rows[room > 0], np.minimum(counts, room)[room > 0]
    order = np.argsort(counts, kind="stable")
    rows, counts = rows[order], counts[order]
    start = 0
    while start < rows.size:
        widest = 2 * int(counts[start]) + 8
        end = int(np.searchsorted(counts, widest, side="right"))
        yield rows[start:end], counts[start:end]
        start = end
