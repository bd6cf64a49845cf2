"""The solve/update loop: one lifecycle, played against an engine and an environment, as sealed segments.

Every episode starts from the :class:`~cod_async.lifecycle.segment.LifecycleState` of the segment before it
and from nothing else, which is what makes it possible to go on from any sealed segment at another actor with
the same result. Seeds are derived from the lifecycle's sampling seed and the episode's ordinal, never from
what was played before. The episodes themselves are in :mod:`.solving` and :mod:`.updating`.
"""

from __future__ import annotations

import math
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import suppress

from cod_async.config.schema import LifecycleConfig
from cod_async.engines.base import Engine
from cod_async.envs.base import Playable, environment_errors
from cod_async.errors import EngineError, InfrastructureError
from cod_async.lifecycle.episodes import Episode, LifecycleSpec, Player, ShownHint
from cod_async.lifecycle.hint import prompts_for
from cod_async.lifecycle.rendering import Renderer
from cod_async.lifecycle.segment import (
    EpisodeKind,
    LifecycleState,
    Segment,
    SegmentKey,
    kind_and_position,
    num_episodes,
)
from cod_async.lifecycle.solving import solve
from cod_async.lifecycle.transcript import continued
from cod_async.lifecycle.updating import update

__all__ = [
    "LifecycleSpec",
    "ShownHint",
    "initial_state",
    "play",
]


def initial_state(environment: Playable) -> LifecycleState:
    """Return the state before solve 0: the placeholder hint, and the snapshot of the fresh environment."""
    with environment_errors(environment.name):
        snapshot = environment.snapshot()
    return LifecycleState(
        next_ordinal=0, hint=prompts_for(environment.prompt_style).initial, environment_state=snapshot
    )


def _seal(player: Player, ordinal: int, episode: Episode, wall_s: float) -> Segment:
    """Make the segment of a finished episode.

    Raises:
        InfrastructureError: the environment scored it with something that is not a finite number.
    """
    spec, (kind, position) = player.spec, kind_and_position(ordinal)
    metrics = {name: float(value) for name, value in episode.metrics.items()}
    wrong = [name for name, value in metrics.items() if not math.isfinite(value)]
    if wrong or not math.isfinite(episode.raw_reward):
        raise InfrastructureError(
            f"environment {player.environment.name} gave a reward of {episode.raw_reward}, "
            f"and values that are not finite for {wrong}"
        )
    task = spec.tasks[position]
    return Segment(
        run=spec.run,
        key=SegmentKey(group=spec.group, member=spec.member, ordinal=ordinal),
        lease_epoch=spec.lease_epoch,
        actor=spec.actor,
        environment=task.environment,
        preset=task.preset,
        pack_seed=task.pack_seed,
        kind=kind,
        position=position,
        rows=() if episode.row is None else (episode.row,),
        reward=float(episode.reward),
        raw_reward=float(episode.raw_reward),
        finish=episode.finish,
        is_last=episode.state_after.next_ordinal >= num_episodes(len(spec.tasks)),
        state_after=episode.state_after,
        metrics=metrics,
        wall_s=wall_s,
    )


def _session(spec: LifecycleSpec, ordinal: int) -> str:
    """Name the engine session that begins with an episode."""
    return f"{spec.run}/g{spec.group}.m{spec.member}.e{spec.lease_epoch}.o{ordinal}"


async def _play_episode(player: Player, kind: EpisodeKind, state: LifecycleState, session: str) -> Segment:
    """Play the next episode."""
    start_s = time.monotonic()
    play_kind = solve if kind == "solve" else update
    episode = await play_kind(player, state, state.next_ordinal, session)
    return _seal(player, state.next_ordinal, episode, time.monotonic() - start_s)


async def play(
    spec: LifecycleSpec,
    state: LifecycleState,
    *,
    engine: Engine,
    environment: Playable,
    renderer: Renderer,
    config: LifecycleConfig,
    temperature: float,
    top_p: float,
    max_context_tokens: int,
    before_episode: Callable[[int], Awaitable[None]] | None = None,
    shown_hint: ShownHint | None = None,
) -> AsyncGenerator[Segment, None]:
    """Play a lifecycle from ``state`` to its end, yielding every episode as a sealed segment.

    To go on after a failure, call it again with the ``state_after`` of the last segment and a *fresh*
    environment.

    Args:
        spec: the lifecycle; its pack size is ``len(spec.tasks)``.
        state: :func:`initial_state`, or the ``state_after`` of any sealed segment of this lifecycle (with
            carry ``transcript`` completed by :func:`cod_async.lifecycle.transcript.continued`).
        engine: where tokens come from.
        environment: this lifecycle's own environment; whoever made it closes it.
        renderer: the model's template family.
        config: rewards, penalties, lengths, and what is carried: ``hint``; ``none`` (no updates are played,
            the hint stays the placeholder, and solve j keeps ordinal 2j); ``transcript`` (one growing
            conversation, see :mod:`.transcript`; updates only if asked for).
        temperature: sampling temperature, > 0.
        top_p: nucleus cut in (0, 1].
        max_context_tokens: longest row; the engine's own limit holds too.
        before_episode: awaited with the ordinal before each episode (credit, version gates).
        shown_hint: evaluation controls, see :data:`ShownHint`.

    Raises:
        InfrastructureError: engine or environment failed; nothing was scored, the episode may be played
            again.
        InputError: a prompt cannot fit the context, or a record is wrong.
    """
    player = Player(
        spec=spec,
        engine=engine,
        environment=environment,
        renderer=renderer,
        config=config,
        prompts=prompts_for(environment.prompt_style),
        update_prompts=environment.update_prompts() or prompts_for(environment.prompt_style),
        temperature=temperature,
        top_p=top_p,
        max_context_tokens=min(max_context_tokens, engine.max_context_tokens),
        shown_hint=shown_hint,
    )
    session = _session(spec, state.next_ordinal)
    # Episodes of a transcript extend each other: the engine keeps what it computed.
    is_kept = config.carry == "transcript"
    try:
        while state.next_ordinal < num_episodes(len(spec.tasks)):
            if before_episode is not None:
                await before_episode(state.next_ordinal)
            if not is_kept:
                session = _session(spec, state.next_ordinal)
            try:
                segment = await _play_episode(
                    player, kind_and_position(state.next_ordinal)[0], state, session
                )
            finally:
                if not is_kept:
                    await _close(engine, session)
            state = continued(state, segment)
            yield segment
    finally:
        if is_kept:
            await _close(engine, session)


async def _close(engine: Engine, session: str) -> None:
    """Release an engine session whatever happened; a closed engine has already released everything."""
    with suppress(EngineError):
        await engine.close_session(session)
