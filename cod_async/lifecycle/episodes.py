"""What both kinds of episodes are made of: the player, the row as it grows, the finished episode.

Token ids go in and come out; turn k+1 of an episode is turn k's ids, the sampled ids, and the ids of the
template's delta, so an episode is one row with several action spans and nothing that was sampled is ever
tokenised again. The episodes themselves are in :mod:`.solving` and :mod:`.updating`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from cod_async.config.schema import LifecycleConfig
from cod_async.engines.base import Completion, Engine, SamplingParams
from cod_async.envs.base import Playable, TaskSpec
from cod_async.errors import EngineError, EngineMismatchError, InfrastructureError
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.hint import HintPrompts
from cod_async.lifecycle.rendering import Renderer
from cod_async.lifecycle.seeds import derived_seed
from cod_async.lifecycle.segment import (
    Finish,
    LifecycleState,
    Row,
    RowParent,
    Transcript,
    VersionSpan,
)
from cod_async.lifecycle.transcript import NO_PARENT, mark_after, system_digest

ShownHint = Callable[[int, str], str]
"""(position, carried hint) -> the hint that the solver is shown instead; the carried one stays as it is."""


@dataclass(frozen=True)
class LifecycleSpec:
    """One lifecycle to play: who it is, and its tasks.

    Attributes:
        run, group, member, lease_epoch, actor: identity, copied into every segment.
        tasks: the pack, one task per position (all of one environment, preset and pack seed).
        sampling_seed: the seed of every turn is derived from this, the ordinal and the turn (0 .. 2^63-1).
    """

    run: str
    group: int
    member: int
    lease_epoch: int
    actor: str
    tasks: tuple[TaskSpec, ...]
    sampling_seed: int


@dataclass(frozen=True)
class Player:
    """What all episodes of one lifecycle share."""

    spec: LifecycleSpec
    engine: Engine
    environment: Playable
    renderer: Renderer
    config: LifecycleConfig
    prompts: HintPrompts
    update_prompts: HintPrompts
    temperature: float
    top_p: float
    max_context_tokens: int
    shown_hint: ShownHint | None

    def params(self, max_tokens: int, num_row_tokens: int, ordinal: int, turn: int) -> SamplingParams:
        """Return sampling parameters that leave the completion inside the context."""
        return SamplingParams(
            max_tokens=min(max_tokens, self.max_context_tokens - num_row_tokens),
            stop_ids=self.renderer.stop_ids,
            temperature=self.temperature,
            top_p=self.top_p,
            seed=derived_seed(self.spec.sampling_seed, ordinal, turn),
        )

    async def generate(self, ids: Sequence[int], params: SamplingParams, session: str) -> Completion:
        """Generate; whatever the engine fails with becomes an infrastructure error, unless no later try can
        succeed.
        """
        try:
            completion = await self.engine.generate(ids, params, session=session)
        except EngineMismatchError:
            raise
        except EngineError as error:
            raise InfrastructureError(f"engine failed in session {session}: {error}") from error
        num_tokens = len(completion.token_ids)
        num_versioned = sum(span.num_tokens for span in completion.versions)
        if num_tokens == 0 or num_tokens != len(completion.logprobs) or num_tokens != num_versioned:
            raise InfrastructureError(
                f"engine answered session {session} with {num_tokens} tokens, "
                f"{len(completion.logprobs)} log-probs, versions for {num_versioned}"
            )
        return completion


@dataclass
class RowBuilder:
    """A row as it grows; context that no action follows is left off when it is sealed.

    With a ``parent``, ``token_ids`` begins with the parent's tokens, and what is sealed is the rest.
    """

    token_ids: list[int]
    parent: RowParent | None = None
    spans: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    versions: list[VersionSpan] = field(default_factory=list)

    def append(self, completion: Completion) -> None:
        """Add sampled tokens."""
        start = len(self.token_ids)
        self.token_ids += completion.token_ids
        if self.spans and self.spans[-1][1] == start:
            self.spans[-1] = (self.spans[-1][0], len(self.token_ids))
        else:
            self.spans.append((start, len(self.token_ids)))
        self.logprobs += completion.logprobs
        for span in completion.versions:
            if self.versions and self.versions[-1].version == span.version:
                span = VersionSpan(span.version, self.versions.pop().num_tokens + span.num_tokens)
            self.versions.append(span)

    def seal(self) -> Row:
        """Return the row, ending with its last action token."""
        base = 0 if self.parent is None else self.parent.num_tokens
        return Row(
            token_ids=Array.of(self.token_ids[base : self.spans[-1][1]], "<i4"),
            action_spans=tuple((start - base, stop - base) for start, stop in self.spans),
            behavior_logprobs=Array.of(self.logprobs, "<f4"),
            versions=tuple(self.versions),
            parent=self.parent,
        )


@dataclass(frozen=True)
class Episode:
    """What an episode came to, before it is sealed; no row if not even its first prompt fitted."""

    row: Row | None
    reward: float
    raw_reward: float
    finish: Finish
    state_after: LifecycleState
    metrics: dict[str, float]


def transcript_after(
    player: Player, state: LifecycleState, row: Row | None, system: str, outcome: str
) -> Transcript | None:
    """Return the conversation's mark after an episode, None with another carry."""
    if player.config.carry != "transcript":
        return None
    before = state.transcript or Transcript(mark=NO_PARENT)
    mark, is_stopped = before.mark, before.is_stopped
    if row is not None:
        mark = mark_after(row)
        is_stopped = (
            int(row.token_ids.numpy()[-1]) == player.renderer.end_of_turn_id
        )  # rows end with an action
    digest = system_digest(system) if before.mark.num_tokens == 0 else before.system_digest
    return Transcript(mark=mark, system_digest=digest, is_stopped=is_stopped, outcome=outcome)
