"""What is known of every slot, as arrays, so that a step costs array operations and no Python per sequence.

A slot holds one row. Of its ``known`` tokens, the first ``length`` have keys and values in the cache; a
running slot is ready to decode when exactly one known token is missing there. Sampling appends to ``tokens``,
so prompt, completion and the prefix that the next turn is compared with are one array. After a weight switch
in any mode but ``in_place``, ``length`` is set to 0 and the ordinary prefill does the rest.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cod_async.engines.base import SamplingParams
from cod_async.engines.embedded.sampler import stream_of

IntArray = npt.NDArray[np.int64]
_NO_TOKEN = -1


class SlotTable:
    """Arrays over ``num_rows`` slots for rows of at most ``max_context_tokens`` tokens.

    Attributes:
        tokens: int64 [R, C], known tokens of the row.
        logprobs: float32 [R, C], log-prob of the token at the same index; meaningful for sampled ones.
        length: int64 [R], tokens whose keys and values are in the cache.
        known: int64 [R], tokens known; ``length <= known - 1`` while running.
        prompt: int64 [R], tokens of the running request that were given.
        limit: int64 [R], the request ends when ``known`` reaches this.
        is_running: bool [R], whether a request is running here.
        temperature, top_p, stream, stops: sampling parameters of the running request.
    """

    def __init__(self, num_rows: int, max_context_tokens: int) -> None:
        self.tokens: IntArray = np.zeros((num_rows, max_context_tokens), dtype=np.int64)
        self.logprobs = np.zeros((num_rows, max_context_tokens), dtype=np.float32)
        self.length: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.known: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.prompt: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.limit: IntArray = np.zeros(num_rows, dtype=np.int64)
        self.is_running = np.zeros(num_rows, dtype=np.bool_)
        self.temperature = np.ones(num_rows, dtype=np.float32)
        self.top_p = np.ones(num_rows, dtype=np.float64)
        self.stream = np.zeros(num_rows, dtype=np.uint64)
        self.stops: IntArray = np.full((num_rows, 1), _NO_TOKEN, dtype=np.int64)

    @property
    def max_context_tokens(self) -> int:
        """Longest row, C."""
        return int(self.tokens.shape[1])

    def start(self, slot: int, prompt: IntArray, params: SamplingParams) -> None:
        """Begin a request in a slot, keeping the cache of the common prefix with the row that was there.

        At least one token is left to compute, because its logits are needed.
        """
        count = prompt.size
        shared = min(int(self.length[slot]), count - 1)
        different = np.flatnonzero(self.tokens[slot, :shared] != prompt[:shared])
        self.length[slot] = different[0] if different.size else shared
        self.tokens[slot, :count] = prompt
        self.known[slot] = self.prompt[slot] = count
        self.limit[slot] = min(count + params.max_tokens, self.max_context_tokens)
        self.temperature[slot] = params.temperature
        self.top_p[slot] = params.top_p
        self.stream[slot] = stream_of(params.seed)
        stops = sorted(params.stop_ids)
        if len(stops) > self.stops.shape[1]:
            grown = np.full((len(self.stops), len(stops)), _NO_TOKEN, dtype=np.int64)
            grown[:, : self.stops.shape[1]] = self.stops
            self.stops = grown
        self.stops[slot] = _NO_TOKEN
        self.stops[slot, : len(stops)] = stops
        self.is_running[slot] = True

    def append(
        self, rows: IntArray, tokens: IntArray, logprobs: npt.NDArray[np.float32]
    ) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.bool_]]:
        """Append one sampled token to each row.

        Returns:
            bool [N] twice: whether the token is one of the row's stop tokens, whether the limit is reached.
        """
        at = self.known[rows]
        self.tokens[rows, at] = tokens
        self.logprobs[rows, at] = logprobs
        at += 1
        self.known[rows] = at
        return (self.stops[rows] == tokens[:, None]).any(axis=1), at >= self.limit[rows]

    def stop(self, slot: int) -> None:
        """End the slot's request; its row and cache stay."""
        self.is_running[slot] = False
        self.temperature[slot] = 1.0  # a quiet slot must not switch on the slow paths of the sampler
        self.top_p[slot] = 1.0

    def forget(self, slot: int) -> None:
        """Forget the row of a quiet slot."""
        self.length[slot] = self.known[slot] = self.prompt[slot] = 0
        self.tokens[slot, 0] = 0
