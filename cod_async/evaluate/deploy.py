"""CoD-Deploy: frozen weights play lifecycles, and the reward is reported by position in the lifecycle.

A lifecycle is played exactly as in training, by the same rollout loop against the same engine; nothing is
trained. The *pack* is the unit of the standard error, because the lifecycles of a pack share one hidden
world. Controls ask whether the hint is what helps: ``blanked`` shows every solver the initial placeholder,
``swapped`` shows it the hint that a pack with another hidden world had at the same position, ``truth`` shows
it the hidden world itself. In all of them the writer keeps its own history, so that only what the solver
reads differs.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from cod_async.algo.statistics import mean_and_sem
from cod_async.config.schema import Config
from cod_async.envs.base import EnvironmentSpec, TaskSpec
from cod_async.errors import InputError, WorkError
from cod_async.evaluate.report import Report, Row, gap, pack_means, report_to_json
from cod_async.evaluate.request import (
    CONTROLS,
    SPLITS,
    Control,
    EvaluationRequest,
    Progress,
    Split,
    check_request,
    donors,
    plan,
    sampling_seed,
    world,
)
from cod_async.lifecycle.segment import Segment, Version

__all__ = [
    "CONTROLS",
    "SPLITS",
    "Control",
    "EvaluationRequest",
    "Progress",
    "Split",
    "check_request",
    "evaluate",
    "evaluate_request",
]


@dataclass
class _Pass:
    """Everything gathered over one pass: rewards [pack][member][position] and the hints that solvers had."""

    rewards: list[list[list[float]]]
    hints: list[list[dict[int, str]]]
    num_updates: int = 0
    num_well_formed: int = 0
    num_solves: int = 0
    num_steps: int = 0
    num_hint_tokens: int = 0
    num_tokens: int = 0
    wall_s: float = 0.0


@dataclass
class _Setting:
    """What all passes of a request share."""

    request: EvaluationRequest
    config: Config
    spec: EnvironmentSpec
    options: dict[str, Any]
    tasks: list[tuple[TaskSpec, ...]]
    donors: list[int]
    engine: Any
    renderer: Any
    initial_hint: str
    on_progress: Progress | None
    passes: dict[str, _Pass] = field(default_factory=dict)


def evaluate_request(
    model_dir: Path, config: Config, request: EvaluationRequest, on_progress: Progress | None = None
) -> list[Report]:
    """Run every control of a request with one model and return one report per control, in the request's
    order.

    Args:
        model_dir: Hugging Face model directory with tokenizer.
        config: supplies lifecycle, engine and model settings; nothing else is read.
        request: what to evaluate.
        on_progress: called about once a second with ``{split, control, done, total}`` lifecycles.

    Raises:
        InputError: unknown environment, preset, option, control or an impossible control.
        WorkError: the engine failed.
    """
    from cod_async.engines.embedded import EmbeddedEngine
    from cod_async.envs import registry
    from cod_async.lifecycle.hint import prompts_for
    from cod_async.lifecycle.rendering import load_renderer
    from cod_async.models.directory import load_model

    check_request(request)
    if config.engine.kind != "embedded":
        raise InputError(
            f"engine.kind is {config.engine.kind!r}, but evaluation plays on the embedded engine; "
            "set engine.kind to 'embedded'"
        )
    spec = registry.get(request.environment)
    options = spec.options(request.preset, request.options)
    tasks = plan(request, config)
    is_swapped = "swapped" in request.controls
    environment = spec.make(options)
    setting = _Setting(
        request=request,
        config=config,
        spec=spec,
        options=options,
        tasks=tasks,
        donors=donors([world(spec, options, pack[0]) for pack in tasks]) if is_swapped else [],
        engine=EmbeddedEngine(
            load_model(model_dir),
            config.engine,
            max_context_tokens=config.model.max_context_tokens,
            version=Version(lineage=0, step=0),
            run_dir=model_dir,
        ),
        renderer=load_renderer(model_dir, config.model.renderer),
        initial_hint=prompts_for(environment.prompt_style).initial,
        on_progress=on_progress,
    )
    return asyncio.run(_run(setting))


def evaluate(
    model_dir: Path,
    config: Config,
    *,
    environment: str,
    preset: str,
    options: Mapping[str, Any] | None = None,
    split: Split = "train",
    control: Control = "normal",
    num_packs: int = 256,
    lifecycles_per_pack: int = 2,
    seed: int = 0,
    checkpoint: str = "model",
    on_progress: Progress | None = None,
) -> dict[str, Any]:
    """Evaluate one control and return its :class:`~cod_async.evaluate.report.Report` as JSON-able values.

    See :class:`EvaluationRequest` for the arguments and :func:`evaluate_request` for the errors; to run
    several controls or splits use :func:`cod_async.evaluate.jobs.run_jobs`, which shares passes and
    processes.
    """
    request = EvaluationRequest(
        environment=environment,
        preset=preset,
        options=dict(options or {}),
        split=split,
        controls=(control,),
        num_packs=num_packs,
        lifecycles_per_pack=lifecycles_per_pack,
        seed=seed,
        checkpoint=checkpoint,
    )
    return report_to_json(evaluate_request(model_dir, config, request, on_progress)[0])


async def _run(setting: _Setting) -> list[Report]:
    request = setting.request
    order: list[Control] = list(request.controls)
    if "swapped" in order and "normal" not in order:
        order.insert(0, "normal")
    order.sort(key=lambda control: control != "normal")
    try:
        for control in order:
            setting.passes[control] = await _play_pass(setting, control)
    finally:
        await setting.engine.aclose()
    return [_report(setting, control) for control in request.controls]


def _shown_hint(
    setting: _Setting, control: Control, pack: int, member: int
) -> Callable[[int, str], str] | None:
    """Return what replaces the hint that the solver of one lifecycle is shown, or None to leave it."""
    if control == "normal":
        return None
    if control == "blanked":
        return lambda position, hint: setting.initial_hint
    if control == "truth":
        return lambda position, hint: _truth(setting, pack, position)
    donor_hints = setting.passes["normal"].hints[setting.donors[pack]][member]
    return lambda position, hint: donor_hints[position]


def _truth(setting: _Setting, pack: int, position: int) -> str:
    """Return the hint that states the hidden world of one task."""
    if setting.spec.truth_hint is None:
        raise InputError(f"control 'truth': environment {setting.spec.name} has no truth hint")
    return setting.spec.truth_hint(setting.spec.make(setting.options), setting.tasks[pack][position])


async def _play_pass(setting: _Setting, control: Control) -> _Pass:
    """Play every lifecycle once, ``engine.max_running`` at a time."""
    request = setting.request
    members = request.lifecycles_per_pack
    out = _Pass(
        rewards=[[[] for _ in range(members)] for _ in setting.tasks],
        hints=[[{} for _ in range(members)] for _ in setting.tasks],
    )
    jobs = iter([(pack, member) for pack in range(len(setting.tasks)) for member in range(members)])
    total, done, started, told = len(setting.tasks) * members, 0, time.perf_counter(), 0.0

    async def worker() -> None:
        nonlocal done, told
        for pack, member in jobs:
            await _play_one(setting, control, pack, member, out)
            done += 1
            now = time.perf_counter()
            if setting.on_progress is not None and (now - told > 1.0 or done == total):
                told = now
                setting.on_progress(
                    {"split": request.split, "control": control, "done": done, "total": total}
                )

    num_workers = min(total, setting.config.engine.max_running)
    try:
        async with asyncio.TaskGroup() as group:
            for _ in range(num_workers):
                group.create_task(worker())
    except ExceptionGroup as errors:
        # One failure ends the evaluation; callers catch the narrow class, not a group of it.
        raise errors.exceptions[0] from None
    out.wall_s = time.perf_counter() - started
    return out


async def _play_one(setting: _Setting, control: Control, pack: int, member: int, out: _Pass) -> None:
    """Play one lifecycle and add what came of it."""
    from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play

    config = setting.config
    environment = setting.spec.make(setting.options)
    spec = LifecycleSpec(
        run="evaluation",
        group=pack,
        member=member,
        lease_epoch=0,
        actor="evaluate",
        tasks=setting.tasks[pack],
        sampling_seed=sampling_seed(setting.request.seed, pack, member),
    )
    state = initial_state(environment)
    own_hints = out.hints[pack][member]
    replace = _shown_hint(setting, control, pack, member)

    def shown(position: int, hint: str) -> str:
        own_hints[position] = hint
        return hint if replace is None else replace(position, hint)

    async for segment in play(
        spec,
        state,
        engine=setting.engine,
        environment=environment,
        renderer=setting.renderer,
        config=config.lifecycle,
        temperature=config.engine.temperature,
        top_p=config.engine.top_p,
        max_context_tokens=config.model.max_context_tokens,
        before_episode=None,
        shown_hint=shown,
    ):
        _count(segment, out)
        if segment.kind == "solve":
            out.rewards[pack][member].append(segment.reward)
    if len(out.rewards[pack][member]) != len(spec.tasks):
        raise WorkError(f"lifecycle {pack}.{member} ended after {len(out.rewards[pack][member])} tasks")


def _count(segment: Segment, out: _Pass) -> None:
    out.num_tokens += segment.num_tokens
    if segment.kind == "update":
        out.num_updates += 1
        out.num_well_formed += segment.finish == "success"
        out.num_hint_tokens += segment.num_action_tokens
    else:
        out.num_solves += 1
        out.num_steps += sum(len(row.action_spans) for row in segment.rows)


def _report(setting: _Setting, control: Control) -> Report:
    request, found = setting.request, setting.passes[control]
    by_pack = pack_means(found.rewards)
    gaps = [gap(pack) for pack in by_pack]
    gap_mean, gap_sem = mean_and_sem(gaps)
    rows = []
    for position in range(len(by_pack[0])):
        mean, sem = mean_and_sem([pack[position] for pack in by_pack])
        rows.append(
            Row(
                environment=request.environment,
                preset=request.preset,
                split=request.split,
                mode="none" if setting.config.lifecycle.carry == "none" else "cod",
                control=control,
                checkpoint=request.checkpoint,
                position=position,
                mean=mean,
                sem=sem,
                n=len(by_pack),
            )
        )
    return Report(
        rows=tuple(rows),
        split=request.split,
        control=control,
        gap=gap_mean,
        gap_sem=gap_sem,
        well_formed_frac=found.num_well_formed / found.num_updates if found.num_updates else 1.0,
        steps_mean=found.num_steps / max(1, found.num_solves),
        hint_tokens_mean=found.num_hint_tokens / max(1, found.num_updates),
        num_lifecycles=len(by_pack) * request.lifecycles_per_pack,
        num_tokens=found.num_tokens,
        wall_s=found.wall_s,
    )
