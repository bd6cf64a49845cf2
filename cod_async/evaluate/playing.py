"""Playing one lifecycle with frozen weights, exactly as in training: the same rollout, the same engine.

What evaluation adds is what the solver is shown. The writer always keeps its own history, so between two
controls only what the solver reads differs. An episode that fails as infrastructure is played again from the
last sealed one with a fresh environment, as an actor would; it is never scored.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from cod_async.config.schema import Config, EngineConfig
from cod_async.envs.base import Playable
from cod_async.envs.worker import WorkerPool, make_environment
from cod_async.errors import InfrastructureError, WorkError
from cod_async.evaluate.environments import truth_of, world_of
from cod_async.evaluate.results import LifecycleResult
from cod_async.evaluate.suite import Control
from cod_async.lifecycle.packs import PackPlan
from cod_async.lifecycle.segment import LifecycleState, Segment, Version

if TYPE_CHECKING:
    from cod_async.engines.base import Engine
    from cod_async.lifecycle.rendering import Renderer


class Unit(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One lifecycle to play.

    Attributes:
        number: tells it from all others that were handed out by the same agenda.
        key: what identifies it among all lifecycles of these weights.
        what: see :class:`~cod_async.evaluate.results.LifecycleResult`.
        setting: index of its setting; the receiver has the settings' configurations.
        plan: its pack.
        member: which lifecycle of the pack.
        sampling_seed: seed of everything that is sampled in it.
        control: what its solver is shown.
        hints: with control ``swapped``, the hints to show, by position.
    """

    number: int
    key: str
    what: dict[str, str | int]
    setting: int
    plan: PackPlan
    member: int
    sampling_seed: int
    control: Control
    hints: tuple[str, ...] | None = None


@dataclass
class _Record:
    """What has been seen of a lifecycle so far."""

    segments: list[Segment] = field(default_factory=list)
    hints: dict[int, str] = field(default_factory=dict)


def open_engine(model_dir: Path, engine: EngineConfig, max_context_tokens: int) -> Engine:
    """Load a model into an embedded engine of this process, whatever ``engine.kind`` is for training: frozen
    weights need no servers.

    Raises:
        InputError: not a model directory.
    """
    from cod_async.engines.embedded import EmbeddedEngine
    from cod_async.models.directory import load_model

    return EmbeddedEngine(
        load_model(model_dir),
        engine,
        max_context_tokens=max_context_tokens,
        version=Version(lineage=0, step=0),
        run_dir=model_dir,
    )


async def play_unit(
    unit: Unit, config: Config, engine: Engine, renderer: Renderer, workers: WorkerPool
) -> LifecycleResult:
    """Play one lifecycle to its end.

    Args:
        unit: what to play.
        config: the complete configuration of its setting.
        engine: where tokens come from.
        renderer: the model's template family.
        workers: where environments under limits are played.

    Raises:
        InfrastructureError: an episode kept failing after ``actors.max_retries`` retries.
        InputError: it cannot be played with this configuration.
    """
    from cod_async.lifecycle.rollout import initial_state
    from cod_async.lifecycle.transcript import continued

    started_s = time.perf_counter()
    tasks = unit.plan.tasks()
    state: LifecycleState | None = None
    record, environment = _Record(), None
    num_retries = num_failures = 0
    while True:
        has_progressed = is_resumable = False
        try:
            environment = await make_environment(tasks[0], config.environments, workers)
            is_resumable = environment.is_resumable
            if state is None or not is_resumable:
                state, record = initial_state(environment), _Record()
            async for segment in _episodes(unit, state, environment, record, config, engine, renderer):
                record.segments.append(segment)
                state, has_progressed = continued(state, segment), True
            break
        except InfrastructureError:
            num_retries += 1
            num_failures = 1 if has_progressed and is_resumable else num_failures + 1
            if num_failures > config.actors.max_retries:
                raise
        finally:
            if environment is not None:
                await environment.close()
                environment = None
    world = ""
    if config.lifecycle.carry == "hint" and unit.control == "normal" and unit.member == 0:
        world = world_of(tasks[0])
    return _result(unit, record, world, num_retries, time.perf_counter() - started_s)


def _episodes(
    unit: Unit,
    state: LifecycleState,
    environment: Playable,
    record: _Record,
    config: Config,
    engine: Engine,
    renderer: Renderer,
) -> AsyncIterator[Segment]:
    """Return the segments still to come."""
    from cod_async.lifecycle.hint import prompts_for
    from cod_async.lifecycle.rollout import LifecycleSpec, play

    tasks = unit.plan.tasks()
    initial = prompts_for(environment.prompt_style).initial

    def shown(position: int, hint: str) -> str:
        record.hints[position] = hint
        if unit.control == "blanked":
            return initial
        if unit.control == "swapped":
            assert unit.hints is not None  # noqa: S101
            return unit.hints[position]
        return truth_of(tasks[position]) if unit.control == "truth" else hint

    spec = LifecycleSpec(
        run=f"evaluation-{unit.control}-{unit.setting}-{unit.sampling_seed}",
        group=unit.plan.group,
        member=unit.member,
        lease_epoch=0,
        actor="evaluate",
        tasks=tasks,
        sampling_seed=unit.sampling_seed,
    )
    return play(
        spec,
        state,
        engine=engine,
        environment=environment,
        renderer=renderer,
        config=config.lifecycle,
        temperature=config.engine.temperature,
        top_p=config.engine.top_p,
        max_context_tokens=config.model.max_context_tokens,
        shown_hint=shown if config.lifecycle.carry == "hint" else None,
    )


def _result(unit: Unit, record: _Record, world: str, num_retries: int, wall_s: float) -> LifecycleResult:
    """Return what a finished lifecycle came to.

    Raises:
        WorkError: it ended before its last task.
    """
    solves = [segment for segment in record.segments if segment.kind == "solve"]
    updates = {segment.position: segment for segment in record.segments if segment.kind == "update"}
    num_tasks = unit.plan.pack_size
    if len(solves) != num_tasks:
        raise WorkError(f"lifecycle {unit.what} ended after {len(solves)} of {num_tasks} tasks")
    return LifecycleResult(
        key=unit.key,
        what=unit.what,
        rewards=tuple(segment.reward for segment in solves),
        raw_rewards=tuple(segment.raw_reward for segment in solves),
        finishes=tuple(segment.finish for segment in solves),
        num_responses=tuple(int(segment.metrics.get("num_steps", 0)) for segment in solves),
        updates=tuple(updates[p].finish if p in updates else None for p in range(num_tasks)),
        num_hint_tokens=sum(segment.num_action_tokens for segment in updates.values()),
        num_tokens=sum(segment.num_tokens for segment in record.segments),
        hints=tuple(record.hints[p] for p in range(num_tasks))
        if unit.control == "normal" and record.hints
        else (),
        world=world,
        num_retries=num_retries,
        wall_s=wall_s,
    )
