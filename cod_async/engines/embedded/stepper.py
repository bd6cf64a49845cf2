"""One engine step as array operations: prefill what is missing, decode one token per row, append, find the
finished.

The stepper owns the weights, the cache and the slot table, and knows nothing of requests, sessions or
asyncio: it is told in which order rows arrived and answers with slot numbers.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from cod_async.config.schema import EngineConfig
from cod_async.engines.embedded.batching import compute_shape, prefill_groups
from cod_async.engines.embedded.cache import KVCache
from cod_async.engines.embedded.forward import FusedWeights, Rotary, decode, prefill
from cod_async.engines.embedded.sampler import sample, uniforms
from cod_async.engines.embedded.slots import IntArray, SlotTable
from cod_async.errors import EngineError
from cod_async.models.directory import weights_of
from cod_async.models.qwen3 import Qwen3


def _no_slots() -> IntArray:
    return np.empty(0, dtype=np.int64)


@dataclass(frozen=True)
class Sampled:
    """What a decode step did.

    Attributes:
        num_sampled: tokens appended.
        num_prompt: computed tokens that were prompt, or prefix computed again.
        stopped: int64, slots that sampled a stop token.
        exhausted: int64, slots that reached their limit without one.
        not_finite: int64, slots whose logits were not finite; nothing was appended there.
    """

    num_sampled: int = 0
    num_prompt: int = 0
    stopped: IntArray = field(default_factory=_no_slots)
    exhausted: IntArray = field(default_factory=_no_slots)
    not_finite: IntArray = field(default_factory=_no_slots)


class Stepper:
    """The model's state over all slots.

    Args:
        model: starting weights, copied.
        config: engine section.
        max_context_tokens: longest row.

    Raises:
        EngineError: batch invariance was asked for and does not hold on this machine.
    """

    def __init__(self, model: Qwen3, config: EngineConfig, max_context_tokens: int) -> None:
        self.weights = FusedWeights.of(model.config, weights_of(model))
        self.shape = compute_shape(config, max_context_tokens)
        self.table = SlotTable(self.shape.num_rows, max_context_tokens)
        self.rotary = Rotary(model.config, self.shape.num_positions, model.dtype)
        self.cache = KVCache(
            model.config.num_hidden_layers,
            self.shape.num_rows,
            model.config.num_key_value_heads,
            model.config.head_dim,
            max_positions=self.shape.num_positions,
            initial_positions=self.shape.initial_positions,
            dtype=model.dtype,
        )
        if self.shape.is_fixed:
            check_invariance(self.weights, self.rotary, self.cache)

    def rows_to_prefill(self) -> IntArray:
        """Running slots that lack more than one token, ascending; none in fixed shapes."""
        table = self.table
        if self.shape.is_fixed:
            return _no_slots()
        return np.flatnonzero(table.is_running & (table.known - table.length > 1))

    def prefill(self, rows: IntArray) -> int:
        """Compute all but the last known token of ``rows`` (in order of arrival), within the step's budget.

        Returns:
            Number of tokens computed.
        """
        table, num_computed = self.table, 0
        missing = table.known - 1 - table.length
        for slots, num_new in prefill_groups(rows, missing, self.shape.prefill_tokens):
            starts, width = table.length[slots], int(num_new.max())
            columns = np.minimum(starts[:, None] + np.arange(width), table.max_context_tokens - 1)
            self.cache.reserve(int((starts + num_new).max()))
            prefill(
                self.weights,
                self.rotary,
                self.cache,
                torch.from_numpy(table.tokens[slots[:, None], columns]),
                torch.from_numpy(starts),
                torch.from_numpy(num_new),
                torch.from_numpy(slots),
            )
            table.length[slots] += num_new
            num_computed += int(num_new.sum())
        return num_computed

    def decode(self) -> Sampled:
        """Compute one token for every running row that lacks exactly one; in fixed shapes for all running
        rows.

        Rows whose last known token was computed sample the next one.
        """
        table = self.table
        is_active = table.is_running
        if not self.shape.is_fixed:
            is_active = is_active & (table.known - table.length == 1)
        active = np.flatnonzero(is_active)
        if not active.size:
            return Sampled()
        rows = self.shape.rows_for(active)
        positions = table.length[rows]
        length = self.shape.length_for(int(positions.max()) + 1)
        self.cache.reserve(length)
        is_leading = rows.size == rows[-1] + 1
        logits = decode(
            self.weights,
            self.rotary,
            self.cache,
            torch.from_numpy(table.tokens[rows, positions]),
            torch.from_numpy(positions),
            rows.size if is_leading else torch.from_numpy(rows),
            length,
        )
        index = table.known[rows] - table.prompt[rows]
        tokens, logprobs = sample(
            logits, table.temperature[rows], table.top_p[rows], uniforms(table.stream[rows], index)
        )
        table.length[active] += 1
        chosen = is_active[rows]
        return self._append(active, tokens[chosen], logprobs[chosen])

    def _append(self, rows: IntArray, tokens: IntArray, logprobs: np.ndarray) -> Sampled:
        """Append what was sampled to the rows that are ready for it."""
        table = self.table
        known = table.known[rows]
        is_ready = table.length[rows] == known
        num_prompt = int(((known == table.prompt[rows]) | ~is_ready).sum())
        if not is_ready.all():
            rows, tokens, logprobs = rows[is_ready], tokens[is_ready], logprobs[is_ready]
        is_finite = np.isfinite(logprobs)
        not_finite = _no_slots()
        if not is_finite.all():
            not_finite = rows[~is_finite]
            rows, tokens, logprobs = rows[is_finite], tokens[is_finite], logprobs[is_finite]
        is_stop, is_full = table.append(rows, tokens, logprobs)
        return Sampled(
            num_sampled=int(rows.size),
            num_prompt=num_prompt,
            stopped=rows[is_stop],
            exhausted=rows[is_full & ~is_stop],
            not_finite=not_finite,
        )


@torch.inference_mode()
def check_invariance(weights: FusedWeights, rotary: Rotary, cache: KVCache) -> None:
    """Compute the same short row in every slot, then beside random rows, and compare bitwise; clears the
    cache.

    Raises:
        EngineError: a row's logits depend on its slot or on its neighbours, so the promise cannot be kept.
    """
    rows, vocab_size = cache.num_slots, weights.config.vocab_size
    generator = torch.Generator().manual_seed(0)
    noise = torch.randint(0, vocab_size, (2, rows), generator=generator)
    probe = rows // 2
    alone: list[torch.Tensor] = []
    is_equal = True
    for is_mixed in (False, True):
        for position in range(2):
            tokens = noise[position] if is_mixed else noise[position, probe].repeat(rows)
            places = torch.full((rows,), position)
            logits = decode(weights, rotary, cache, tokens, places, rows, cache.max_positions)
            if is_mixed:
                is_equal = is_equal and torch.equal(logits[probe], alone[position][probe])
            else:
                is_equal = is_equal and bool((logits == logits[:1]).all())
                alone.append(logits)
    for slot in range(rows):
        cache.clear(slot)
    if not is_equal:
        raise EngineError(
            "is_batch_invariant: on this machine a row's logits depend on its slot or its neighbours in "
            f"batches of {rows} rows; use one thread, another max_running, or switch the option off"
        )
