"""The actor's side of the ledger: every sampled token is accounted for, independently of the run database.

An engine counts what it samples. A :class:`Meter` follows each of those tokens until the coordinator has
settled the segment that it was sealed into, or it was thrown away for a named reason; a
:class:`MeteredEngine` is one lifecycle's view of the shared engine that does the following. The identity

    sampled = open + outbox + settled + discarded (by reason) + aborted by the engine

holds at every await point (a sealed segment that waits for room counts as in the outbox), so a coordinator
that adds up heartbeats can tell a lost token from a miscounted one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from cod_async.engines.base import Completion, Engine, EngineCounters, SamplingParams
from cod_async.lifecycle.segment import Segment, Version
from cod_async.weights.manifest import Manifest


class Meter:
    """Counts of one actor process, over all of its sessions. All numbers only grow, except the open and
    outbox gauges.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._sampled_before = engine.counters.sampled_tokens
        self._aborted_before = engine.counters.aborted_tokens
        self._returned_tokens = 0
        self._open_tokens = 0
        self._outbox_segments = 0
        self._outbox_tokens = 0
        self._sealed: Counter[str] = Counter()
        self._discarded: Counter[str] = Counter()

    def returned(self, num_tokens: int) -> None:
        """A completion of ``num_tokens`` came back and belongs to an episode that is not sealed yet."""
        self._returned_tokens += num_tokens
        self._open_tokens += num_tokens

    def sealed(self, segment: Segment) -> None:
        """An episode became a segment, which is in the outbox from now on."""
        self._sealed["segments"] += 1
        self._sealed["tokens"] += segment.num_action_tokens
        self._open_tokens -= segment.num_action_tokens
        self._outbox_segments += 1
        self._outbox_tokens += segment.num_action_tokens

    def settled(self, segment: Segment) -> None:
        """The coordinator has committed or refused a segment; from now on it is in its books."""
        self._outbox_segments -= 1
        self._outbox_tokens -= segment.num_action_tokens

    def discarded_open(self, num_tokens: int, reason: str) -> None:
        """An unsealed episode with ``num_tokens`` generated tokens was thrown away."""
        if num_tokens:
            self._discarded[f"discarded_tokens_{reason}"] += num_tokens
            self._open_tokens -= num_tokens

    def discarded_segment(self, segment: Segment, reason: str) -> None:
        """A sealed segment was thrown away before the coordinator settled it."""
        self.settled(segment)
        self._discarded[f"discarded_segments_{reason}"] += 1
        self._discarded[f"discarded_tokens_{reason}"] += segment.num_action_tokens

    def counters(self) -> dict[str, float]:
        """Return the counters that ride on heartbeats."""
        engine = self._engine.counters
        sampled = engine.sampled_tokens - self._sampled_before
        aborted = engine.aborted_tokens - self._aborted_before
        values = {
            "sampled_tokens": sampled,
            "aborted_tokens": aborted,
            "sealed_segments": self._sealed["segments"],
            "sealed_tokens": self._sealed["tokens"],
            "open_tokens": self._open_tokens + (sampled - aborted - self._returned_tokens),
            "outbox_segments": self._outbox_segments,
            "outbox_tokens": self._outbox_tokens,
            "prefilled_tokens": engine.prefilled_tokens,
            "num_weight_updates": engine.num_weight_updates,
            "engine_busy_s": engine.busy_s,
            **self._discarded,
        }
        return {name: float(value) for name, value in values.items()}


class MeteredEngine:
    """One lifecycle's engine: forwards everything, counts the tokens of its unsealed episode."""

    def __init__(self, engine: Engine, meter: Meter) -> None:
        self._engine = engine
        self._meter = meter
        self.open_tokens = 0

    @property
    def counters(self) -> EngineCounters:
        """The shared engine's counters."""
        return self._engine.counters

    @property
    def extra_counters(self) -> dict[str, float]:
        """The shared engine's further numbers."""
        return self._engine.extra_counters

    @property
    def version(self) -> Version:
        """The shared engine's version."""
        return self._engine.version

    @property
    def max_context_tokens(self) -> int:
        """The shared engine's context length."""
        return self._engine.max_context_tokens

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        """Generate and count; see :meth:`cod_async.engines.base.Engine.generate`."""
        completion = await self._engine.generate(token_ids, params, session=session)
        self.open_tokens += len(completion.token_ids)
        self._meter.returned(len(completion.token_ids))
        return completion

    def seal(self, segment: Segment) -> None:
        """The open episode became ``segment``."""
        self._meter.sealed(segment)
        self.open_tokens -= segment.num_action_tokens

    def discard(self, reason: str) -> None:
        """The open episode was thrown away."""
        self._meter.discarded_open(self.open_tokens, reason)
        self.open_tokens = 0

    async def close_session(self, session: str) -> None:
        """Release a conversation's cache."""
        await self._engine.close_session(session)

    async def update_weights(self, manifest: Manifest) -> None:
        """Not a lifecycle's business."""
        raise NotImplementedError("a lifecycle does not change the shared engine's weights")

    def announce(self, manifest: Manifest) -> None:
        """Not a lifecycle's business."""
        raise NotImplementedError("a lifecycle does not change the shared engine's weights")

    async def aclose(self) -> None:
        """Not a lifecycle's business."""
        raise NotImplementedError("a lifecycle does not close the shared engine")
