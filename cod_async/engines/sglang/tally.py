"""What the servers of an actor did, added up: the engine's counters and more for heartbeats.

A token is counted at the moment that its fate is known: as sampled when its completion is handed over, as
sampled and aborted when it was seen and thrown away. So ``sampled = returned + aborted`` at every await
point, and what is still on its way counts nowhere.
"""

from __future__ import annotations

import time
from collections import Counter

from cod_async.engines.base import EngineCounters

EXTRA_NAMES = (
    "prompt_tokens",
    "cached_tokens",
    "reprefilled_tokens",
    "num_retractions",
    "num_request_retries",
    "num_servers_lost",
    "num_switches_put_off",
    "num_switches_failed",
    "switch_pause_s",
)
"""Extra counters, all present from the start."""


class Tally:
    """Counters shared by all servers of an engine."""

    def __init__(self) -> None:
        self._counters = EngineCounters()
        self._extra: Counter[str] = Counter()
        self._switch_pause_s = 0.0
        self._num_running = 0
        self._busy_until_s = 0.0

    @property
    def counters(self) -> EngineCounters:
        """The engine's counters; ``busy_s`` is brought up to now."""
        self._clock()
        return self._counters

    @property
    def extra(self) -> dict[str, float]:
        """Numbers beyond the protocol's, by name; they only grow."""
        values = {name: float(self._extra[name]) for name in EXTRA_NAMES}
        return values | {"switch_pause_s": self._switch_pause_s}

    def count(self, name: str, amount: int = 1) -> None:
        """Add to an extra counter."""
        self._extra[name] += amount

    def started(self) -> None:
        """A request went to a server."""
        self._clock()
        self._num_running += 1

    def ended(self) -> None:
        """A request ended, however it did."""
        self._clock()
        self._num_running -= 1

    def computed(self, *, num_prompt: int, num_cached: int, num_again: int, num_retractions: int) -> None:
        """A server reported what a request's prompt cost, in tokens."""
        self._counters.prefilled_tokens += num_prompt - num_cached + num_again
        self._extra["prompt_tokens"] += num_prompt
        self._extra["cached_tokens"] += num_cached
        self._extra["reprefilled_tokens"] += num_again
        self._extra["num_retractions"] += num_retractions

    def returned(self, num_tokens: int) -> None:
        """A completion is handed to its caller, without another await."""
        self._counters.sampled_tokens += num_tokens

    def aborted(self, num_tokens: int) -> None:
        """Tokens were seen and thrown away."""
        self._counters.sampled_tokens += num_tokens
        self._counters.aborted_tokens += num_tokens

    def switched(self, pause_s: float) -> None:
        """A server has new weights."""
        self._counters.num_weight_updates += 1
        self._switch_pause_s += pause_s

    def _clock(self) -> None:
        now_s = time.monotonic()
        if self._num_running:
            self._counters.busy_s += now_s - self._busy_until_s
        self._busy_until_s = now_s
