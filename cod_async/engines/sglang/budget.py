"""What a switch with ``retract`` costs, and when it is worth that.

Retracting throws the KV cache of all running rows away: every token of their contexts is computed again. A
switch is put off while that would be more than ``max_frac`` of what the server has generated since its last
switch, so re-prefill stays a bounded share of the work however long the contexts are. Nothing running means
nothing to compute again. How far running requests have come is estimated from the speed of those that have
ended, because reading every stream just to know would cost more than the estimate's error.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol


class Running(Protocol):
    """A running request: tokens of its prompt, most tokens it may generate."""

    num_prompt: int
    max_tokens: int

    @property
    def elapsed_s(self) -> float:
        """Seconds since it began."""
        ...


class ReprefillBudget:
    """Weighs running contexts against generated tokens, both in tokens.

    Args:
        max_frac: largest share of the generated tokens that may be computed again (> 0).
    """

    def __init__(self, max_frac: float) -> None:
        self._max_frac = max_frac
        self._since_switch_tokens = 0.0
        self._ended_tokens = 0
        self._ended_s = 0.0

    def ended(self, num_tokens: int, elapsed_s: float) -> None:
        """A request ended after so long, with so many generated tokens."""
        self._since_switch_tokens += num_tokens
        self._ended_tokens += num_tokens
        self._ended_s += elapsed_s

    def progress(self, request: Running) -> float:
        """Estimate how many tokens a running request has generated; 0 while no request has ended."""
        if self._ended_s <= 0:
            return 0.0
        return min(float(request.max_tokens), request.elapsed_s * self._ended_tokens / self._ended_s)

    def switched(self, running: Iterable[Running]) -> None:
        """A switch was done. What these had generated before it is taken off: it will count when they end."""
        self._since_switch_tokens = -sum(map(self.progress, running))

    def allows(self, running: Iterable[Running]) -> bool:
        """Whether a switch now, with these running, stays within the budget."""
        context_tokens, generated_tokens = 0.0, self._since_switch_tokens
        for request in running:
            made = self.progress(request)
            context_tokens += request.num_prompt + made
            generated_tokens += made
        return context_tokens <= self._max_frac * generated_tokens
