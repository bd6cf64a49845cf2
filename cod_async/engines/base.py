"""What an engine owes the rollout loop: token ids in; token ids, log-probs and policy versions out.

The same protocol is spoken by the embedded torch engine and by SGLang. It never sees text, never
re-tokenises, and is truthful about versions: every generated token knows the weights that made it, also when
weights change in flight.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, Protocol

import msgspec

from cod_async.errors import EngineError
from cod_async.lifecycle.segment import Version, VersionSpan
from cod_async.weights.manifest import Manifest

CompletionFinish = Literal["stop", "length"]


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How to sample one completion.

    Attributes:
        max_tokens: most tokens to generate, including the stop token (>= 1).
        stop_ids: generation ends after any of these; the stop token is part of the completion.
        temperature: > 0; reported log-probs are those of the tempered distribution.
        top_p: in (0, 1]; log-probs are reported before the nucleus cut, so values under 1 are refused for
        training.
        seed: with equal weights, prompt and seed the embedded engine samples the same tokens (0 .. 2^63-1).
    """

    max_tokens: int
    stop_ids: frozenset[int]
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int = 0


class Completion(msgspec.Struct, frozen=True):
    """Generated tokens.

    Attributes:
        token_ids: N >= 1 ids, the stop token included when ``finish`` is ``stop``.
        logprobs: N floats <= 0, of the sampled tokens under the behaviour policy.
        versions: run-length coded versions of the N tokens.
        finish: ``stop`` (a stop id was sampled) or ``length`` (``max_tokens`` or the context was exhausted).
    """

    token_ids: list[int]
    logprobs: list[float]
    versions: tuple[VersionSpan, ...]
    finish: CompletionFinish


class EngineCounters(msgspec.Struct, kw_only=True):
    """Monotonic counters, kept by the engine independently of anything downstream.

    Attributes:
        sampled_tokens: every token ever sampled.
        prefilled_tokens: prompt tokens computed, re-prefills after a weight switch included.
        aborted_tokens: sampled tokens of requests that were cancelled.
        num_weight_updates: switches of weights.
        busy_s: seconds spent computing.
    """

    sampled_tokens: int = 0
    prefilled_tokens: int = 0
    aborted_tokens: int = 0
    num_weight_updates: int = 0
    busy_s: float = 0.0


class Engine(Protocol):
    """A text generator over token ids. All methods are called from one asyncio loop."""

    @property
    def counters(self) -> EngineCounters:
        """The engine's counters, live."""
        ...

    @property
    def extra_counters(self) -> dict[str, float]:
        """More numbers for heartbeats, by name; empty if the engine has no more than its counters."""
        ...

    @property
    def version(self) -> Version:
        """The policy version that the next token will be sampled from."""
        ...

    @property
    def max_context_tokens(self) -> int:
        """Longest row (prompt and completion) the engine can hold."""
        ...

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        """Generate one completion of ``token_ids``.

        Args:
            token_ids: the whole row so far; with the same ``session`` as before and extending that row, only
            the new tokens are computed.
            params: sampling parameters.
            session: key of a conversation whose KV cache is kept until :meth:`close_session`.

        Raises:
            EngineError: the engine failed; nothing was scored. Cancelling the awaiting task aborts the
            request.
        """
        ...

    async def close_session(self, session: str) -> None:
        """Release a conversation's cache; unknown sessions are ignored."""
        ...

    async def update_weights(self, manifest: Manifest) -> None:
        """Switch to a published version between two tokens; running requests go on.

        Raises:
            WeightsError: missing or wrong digest; the engine keeps its old weights.
        """
        ...

    def announce(self, manifest: Manifest) -> None:
        """A newer version was published while :meth:`update_weights` waits for an older one.

        An engine that puts switches off may go straight to it, which also ends that wait; others take it up
        when :meth:`update_weights` is called for it, and do nothing here.
        """
        ...

    async def aclose(self) -> None:
        """Stop; running requests raise EngineClosedError."""
        ...


class Scorer(Protocol):
    """A frozen model that says how likely it finds what others wrote. Methods are called from one asyncio
    loop, several at once.
    """

    async def score(
        self, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], temperature: float
    ) -> list[float]:
        """Return the log-probs of some tokens of a row, each given all tokens before it.

        Args:
            token_ids: the whole row.
            spans: half-open [start, stop) ranges of it, ascending and disjoint, from token 1 on.
            temperature: > 0; log-probs are those of the tempered distribution over the whole vocabulary.

        Returns:
            One finite number <= 0 per token of the spans, in order, in nats.

        Raises:
            EngineError: it could not be scored; another try may do.
            EngineMismatchError: and no other try will.
        """
        ...

    async def aclose(self) -> None:
        """Stop; running calls raise EngineClosedError."""
        ...


def scored_positions(
    token_ids: Sequence[int], spans: Sequence[tuple[int, int]], temperature: float, vocab_size: int
) -> list[int]:
    """Return the positions that a :class:`Scorer` is asked for, after a look at its arguments.

    Raises:
        EngineError: nothing to score, a span outside the row, an id outside the vocabulary, or no such
            temperature.
    """
    previous = 1
    for start, stop in spans:
        if not previous <= start < stop <= len(token_ids):
            raise EngineError(f"span [{start}, {stop}) after {previous} in a row of {len(token_ids)} tokens")
        previous = stop
    if not spans:
        raise EngineError("there are no tokens to score")
    if min(token_ids) < 0 or max(token_ids) >= vocab_size:
        raise EngineError(f"the row has token ids outside 0 .. {vocab_size - 1}")
    if not 0 < temperature < float("inf"):
        raise EngineError(f"temperature must be positive and finite, is {temperature}")
    return [position for start, stop in spans for position in range(start, stop)]
