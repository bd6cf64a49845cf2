"""One leased lifecycle on an actor: play, deliver, stay at most one episode ahead of the acknowledgements.

A :class:`Life` owns its environment and its place in the lifecycle. It retries an episode that failed as
infrastructure from the last sealed state with a fresh environment, and gives the lease back when retrying
does not help. It never scores a failure that was not the policy's.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Protocol

from cod_async.actor.meter import Meter, MeteredEngine
from cod_async.actor.teaching import Teachers
from cod_async.config.schema import Config, LifecycleConfig
from cod_async.engines.base import Engine
from cod_async.envs.base import Playable, TaskSpec
from cod_async.envs.worker import WorkerPool, make_environment
from cod_async.errors import InfrastructureError, InputError
from cod_async.lifecycle.packs import told_position
from cod_async.lifecycle.rendering import Renderer
from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play
from cod_async.lifecycle.segment import LifecycleState, Segment, Version
from cod_async.lifecycle.transcript import continued
from cod_async.wire.messages import Lease


class Delivery(Protocol):
    """Where sealed segments go."""

    async def deliver(self, segment: Segment) -> asyncio.Future[str | None]:
        """Put a segment into the outbox, waiting for room; the future settles with None or the drop
        reason.

        Raises:
            WireError: this segment can never be sent; it was thrown away and counted.
        """
        ...


class LifeOver(Exception):
    """The coordinator dropped one of this lifecycle's segments: whatever follows would be dropped as well."""


class Life:
    """A lifecycle under a lease.

    Args:
        lease: what to play.
        config: the run's configuration.
        run, actor: identity copied into segments.
        engine: the actor's shared engine.
        meter: the actor's counts.
        renderer: the model's template family.
        workers: where environments under limits are played.
        delivery: where sealed segments go.
        wait_for_version: returns once the engine is at the given version or newer.
        teachers: score every episode before it is sealed; None in runs that distill nothing.
    """

    def __init__(
        self,
        lease: Lease,
        *,
        config: Config,
        run: str,
        actor: str,
        engine: Engine,
        meter: Meter,
        renderer: Renderer,
        workers: WorkerPool,
        delivery: Delivery,
        wait_for_version: Callable[[Version], Awaitable[None]],
        teachers: Teachers | None = None,
    ) -> None:
        self.lease = lease
        self._config = config
        self._engine = MeteredEngine(engine, meter)
        self._renderer = renderer
        self._workers = workers
        self._delivery = delivery
        self._wait_for_version = wait_for_version
        self._teachers = teachers
        self._previous: asyncio.Future[str | None] | None = None
        self._latest: asyncio.Future[str | None] | None = None
        self._spec = LifecycleSpec(
            run=run,
            group=lease.ref.group,
            member=lease.ref.member,
            lease_epoch=lease.ref.lease_epoch,
            actor=actor,
            tasks=_tasks(lease, config.lifecycle),
            sampling_seed=lease.sampling_seed,
        )

    async def run(self) -> None:
        """Play the lifecycle to its end.

        Raises:
            LifeOver: the coordinator dropped a segment (fenced, stale, group closed).
            WireError: a segment can never be sent (too large, not finite).
            InfrastructureError: an episode kept failing after ``actors.max_retries`` retries, or failed once
                in an environment that cannot go on from a sealed state.
            InputError: the lease cannot be played at all with this configuration.
        """
        state = self.lease.state
        num_failures = 0
        try:
            while True:
                try:
                    await self._play(state)
                    return
                except _EpisodeFailed as failure:
                    self._engine.discard("infrastructure")
                    num_failures = 1 if failure.has_progressed else num_failures + 1
                    if num_failures > self._config.actors.max_retries or not failure.can_retry:
                        raise InfrastructureError(str(failure.__cause__)) from failure
                    state = failure.state
        finally:
            self._engine.discard("cancelled")

    async def _play(self, state: LifecycleState | None) -> None:
        """Play from ``state``, remembering where a failure struck."""
        has_progressed, can_retry = False, True
        environment: Playable | None = None
        try:
            environment = await make_environment(
                self._spec.tasks[0], self._config.environments, self._workers
            )
            can_retry = environment.is_resumable
            if state is None:
                state = initial_state(environment)
            episodes = play(
                self._spec,
                state,
                engine=self._engine,
                environment=environment,
                renderer=self._renderer,
                config=self._config.lifecycle,
                temperature=self._config.engine.temperature,
                top_p=self._config.engine.top_p,
                max_context_tokens=self._config.model.max_context_tokens,
                before_episode=self._before_episode,
            )
            async with aclosing(episodes):  # or its session would be closed while the next try is using it
                async for played in episodes:
                    segment = played
                    if self._teachers is not None:
                        segment = await self._teachers.scored(played, state)
                    self._engine.seal(segment)
                    state, has_progressed = continued(state, segment), True
                    self._previous, self._latest = self._latest, await self._delivery.deliver(segment)
        except InfrastructureError as error:
            can_retry = can_retry or state is None or state.next_ordinal == 0
            raise _EpisodeFailed(state, has_progressed, can_retry) from error
        finally:
            if environment is not None:
                await environment.close()

    async def _before_episode(self, ordinal: int) -> None:
        """Hold the next episode until the segment before the last is settled and the engine is new enough."""
        for settled in (self._previous, self._latest):
            if settled is not None and (settled is self._previous or settled.done()):
                reason = await asyncio.shield(settled)
                if reason is not None:
                    raise LifeOver(reason)
        await self._wait_for_version(self.lease.min_version)


class _EpisodeFailed(Exception):
    """An episode failed as infrastructure; ``state`` is where to try again, if ``can_retry``."""

    def __init__(self, state: LifecycleState | None, has_progressed: bool, can_retry: bool) -> None:
        super().__init__()
        self.state = state
        self.has_progressed = has_progressed
        self.can_retry = can_retry


def _tasks(lease: Lease, config: LifecycleConfig) -> tuple[TaskSpec, ...]:
    """Return the lease's pack.

    Raises:
        InputError: options or records are not JSON objects.
    """
    try:
        options = json.loads(lease.options_json)
        records = [json.loads(text) for text in lease.records_json]
    except ValueError as error:
        raise InputError(f"lease {lease.ref}: options or records are not JSON ({error})") from error
    if (
        not isinstance(options, dict)
        or not records
        or not all(isinstance(record, dict) for record in records)
    ):
        raise InputError(
            f"lease {lease.ref}: options and records must be JSON objects, and there must be records"
        )
    return tuple(
        TaskSpec(
            environment=lease.environment,
            preset=lease.preset,
            options=options,
            record=record,
            pack_seed=lease.pack_seed,
            position=told_position(config.packs, lease.ref.group, len(records), position),
            pack_size=len(records),
        )
        for position, record in enumerate(records)
    )
