"""An engine for rollout tests: a real implementation of the Engine protocol over scripted text."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Sequence

from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.errors import EngineError
from cod_async.lifecycle.rendering import Renderer
from cod_async.lifecycle.segment import Version, VersionSpan
from cod_async.weights.manifest import Manifest

Reply = Callable[[str, random.Random], str]


class ScriptedEngine:
    """Answers with ``reply(prompt text, rng)``, tokenised; the rng depends on prompt and seed alone."""

    def __init__(self, renderer: Renderer, reply: Reply, max_context_tokens: int = 512) -> None:
        self.counters = EngineCounters()
        self.renderer = renderer
        self.reply = reply
        self.context = max_context_tokens
        self.calls: list[tuple[list[int], SamplingParams, str | None]] = []
        self.open_sessions: set[str] = set()
        self.closed: list[str] = []
        self.fail_at: int | None = None
        self.hang_at: int | None = None

    @property
    def extra_counters(self) -> dict[str, float]:
        return {}

    @property
    def version(self) -> Version:
        return Version(0, len(self.calls) // 3)

    @property
    def max_context_tokens(self) -> int:
        return self.context

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        call = len(self.calls)
        self.calls.append((list(token_ids), params, session))
        assert params.max_tokens >= 1
        assert len(token_ids) + params.max_tokens <= self.context
        if session is not None:
            self.open_sessions.add(session)
        if call == self.hang_at:
            await asyncio.Event().wait()
        if call == self.fail_at:
            raise EngineError("scripted failure")
        rng = random.Random(f"{list(token_ids)} {params.seed} {params.temperature}")
        text = self.reply(self.renderer.tokenizer.decode(token_ids), rng)
        ids = [*self.renderer.tokenizer.encode(text), self.renderer.end_of_turn_id][: params.max_tokens]
        first = (len(ids) + 1) // 2
        spans = [VersionSpan(Version(0, params.seed % 3), first)]
        if len(ids) > first:
            spans.append(VersionSpan(Version(0, params.seed % 3 + 1), len(ids) - first))
        return Completion(
            token_ids=ids,
            logprobs=[-rng.random() for _ in ids],
            versions=tuple(spans),
            finish="stop" if ids[-1] in self.renderer.stop_ids else "length",
        )

    async def close_session(self, session: str) -> None:
        self.open_sessions.discard(session)
        self.closed.append(session)

    async def update_weights(self, manifest: Manifest) -> None:
        raise NotImplementedError

    def announce(self, manifest: Manifest) -> None:
        return None

    async def aclose(self) -> None:
        return None


def buttons_reply(text: str, rng: random.Random) -> str:
    """A player of hidden_buttons: random presses, honest or broken notes, now and then garbage."""
    if " Write " in text:
        if rng.random() < 0.25:
            return rng.choice(["", "[ ]", "] 1=Up [", "[ 1=Up", "[ 1=Up ] [ 2=In ]"])
        facts = [word for word in text.split() if "=" in word]
        return f"[ {' '.join(facts)} ]" if facts else "[ 1=Up ]"
    goal = text.split("goal ")[1].split()[0]
    return "Up Up" if rng.random() < 0.1 else f"{goal} : {rng.randint(1, 5)}"
