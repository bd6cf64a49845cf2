"""Every preset takes a real step on real Door lifecycles that the engine's weights have left behind."""

from __future__ import annotations

import asyncio
import copy
import math
from pathlib import Path

import msgspec
import pytest
import torch

from cod_async.algo.credit import MemberRewards, credit_group
from cod_async.bootstrap.run import run_bootstrap
from cod_async.config.presets import PRESETS
from cod_async.config.schema import (
    BootstrapConfig,
    Config,
    CreditAssignmentConfig,
    EngineConfig,
    EnvironmentConfig,
    LearnerConfig,
    LifecycleConfig,
    LossConfig,
    ModelConfig,
)
from cod_async.engines.embedded import EmbeddedEngine
from cod_async.envs import registry
from cod_async.envs.base import TaskSpec
from cod_async.learner.packing import flatten
from cod_async.learner.step import Trainer
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.rendering import load_renderer
from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play
from cod_async.lifecycle.segment import Row, Segment, Version
from cod_async.models.directory import load_model
from cod_async.models.qwen3 import Qwen3
from cod_async.wire.messages import TrainItem

DOOR = EnvironmentConfig(name="hidden_buttons", preset="door")
CONFIG = Config(
    environments=(DOOR,),
    lifecycle=LifecycleConfig(pack_size=3, group_size=4, max_response_tokens=6, max_hint_tokens=12),
    model=ModelConfig(max_context_tokens=96),
    engine=EngineConfig(max_running=16),
    bootstrap=BootstrapConfig(num_steps=1, documents_per_step=8, qa_loss_gate=100.0, warmup_steps=0),
)
GROUPS, OLD, NEW = 3, Version(0, 0), Version(0, 4)


async def _lifecycle(engine: EmbeddedEngine, folder: Path, group: int, member: int) -> list[Segment]:
    plan = plan_pack((DOOR,), 3, 0, group)
    tasks = tuple(
        TaskSpec(plan.environment, plan.preset, plan.options, record, plan.pack_seed, position, 3)
        for position, record in enumerate(plan.records)
    )
    spec = registry.get(DOOR.name)
    environment = spec.make(spec.options(DOOR.preset, {}))
    segments = play(
        LifecycleSpec("t", group, member, 0, "a", tasks, 100 * group + member),
        initial_state(environment),
        engine=engine,
        environment=environment,
        renderer=load_renderer(folder),
        config=CONFIG.lifecycle,
        temperature=1.0,
        top_p=1.0,
        max_context_tokens=96,
    )
    return [segment async for segment in segments]


async def _play(folder: Path) -> list[list[Segment]]:
    engine = EmbeddedEngine(
        load_model(folder), CONFIG.engine, max_context_tokens=96, version=OLD, run_dir=folder
    )
    try:
        return await asyncio.gather(
            *(_lifecycle(engine, folder, group, member) for group in range(GROUPS) for member in range(4))
        )
    finally:
        await engine.aclose()


def _taught(row: Row) -> Row:
    """The row with the word of a teacher, which the preset opd alone reads."""
    teacher = Array.of(1.5 * row.behavior_logprobs.numpy() - 0.1, "<f4")
    return msgspec.structs.replace(row, teacher_logprobs=teacher)


def _items(lifecycles: list[list[Segment]]) -> list[TrainItem]:
    items = []
    for group in range(GROUPS):
        members = [segments for segments in lifecycles if segments[0].key.group == group]
        rewards = [
            MemberRewards(
                segments[0].key.member,
                tuple(s.reward for s in segments if s.kind == "solve"),
                tuple(s.reward for s in segments if s.kind == "update"),
            )
            for segments in members
        ]
        credit = credit_group(rewards, 3, CreditAssignmentConfig())
        advantages = {(c.member, c.kind, c.position): c.advantage for c in credit.episodes}
        items += [
            TrainItem(
                key=segment.key,
                kind=segment.kind,
                position=segment.position,
                rows=tuple(_taught(row) for row in segment.rows),
                advantage=advantages[segment.key.member, segment.kind, segment.position],
                lag_steps=float(NEW.step - OLD.step),
            )
            for segments in members
            for segment in segments
        ]
    return sorted(items, key=lambda item: item.key)


@pytest.fixture(scope="module")
def played(tmp_path_factory: pytest.TempPathFactory) -> tuple[Qwen3, list[TrainItem]]:
    """Items played by a model, and that model four large steps of plain policy gradient later."""
    folder = tmp_path_factory.mktemp("door")
    run_bootstrap(CONFIG, folder)
    items = _items(asyncio.run(_play(folder)))
    model = load_model(folder)
    trainer = Trainer.create(model, LearnerConfig(lr=1e-2), LossConfig(clip="none"), 1.0)
    flat = flatten(items, vocab_size=int(model.head_weight.shape[0]), version=OLD)
    first = trainer.take_step(flat, 0)
    assert first["mismatch_abs_nats"] < 1e-4  # engine and trainer, the same weights
    assert "staleness_abs_nats" not in first
    for step in range(1, NEW.step):
        trainer.take_step(flat, step)
    return model, items


@pytest.mark.parametrize("num_parts", [1, 3])
@pytest.mark.parametrize("name", PRESETS)
def test_a_stale_step_on_door(played: tuple[Qwen3, list[TrainItem]], name: str, num_parts: int) -> None:
    model, items = copy.deepcopy(played[0]), played[1]
    flat = flatten(items, vocab_size=int(model.head_weight.shape[0]), version=NEW)
    before = [p.detach().clone() for p in model.parameters()]
    learner = LearnerConfig(lr=1e-3, tokens_per_micro_batch=256, minibatches_per_step=num_parts)
    metrics = Trainer.create(model, learner, LossConfig(preset=name), 1.0).take_step(flat, NEW.step)
    assert all(math.isfinite(value) for value in metrics.values())
    assert any(not torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))
    assert metrics["num_updates"] == num_parts
    assert metrics["lag_3_4_tokens_frac"] == 1
    assert metrics["staleness_k3_nats"] > 1e-4
    assert "mismatch_abs_nats" not in metrics
    assert metrics["ess_frac"] < 0.999


def test_what_no_engine_says_is_refused_by_the_segments_name(played: tuple[Qwen3, list[TrainItem]]) -> None:
    from cod_async.errors import NumericsError, WorkError

    items = list(played[1])
    row = items[7].rows[0]
    count = row.num_action_tokens

    def spoiled(**changes: object) -> list[TrainItem]:
        changed = msgspec.structs.replace(row, **changes)
        rows = (changed, *items[7].rows[1:])
        return [*items[:7], msgspec.structs.replace(items[7], rows=rows), *items[8:]]

    def flat(of: list[TrainItem]) -> None:
        flatten(of, vocab_size=10_000, version=NEW)

    for value, kind, message in (
        (math.nan, NumericsError, "a log-prob is nan"),
        (-math.inf, NumericsError, "a log-prob is -inf"),
        (0.5, WorkError, "a log-prob is 0.5, above 0"),
    ):
        with pytest.raises(kind, match=f"segment {items[7].key}: {message}"):
            flat(spoiled(behavior_logprobs=Array.of([-1.0] * (count - 1) + [value], "<f4")))
    with pytest.raises(WorkError, match=f"has {count} log-probs and versions for 0"):
        flat(spoiled(versions=()))
    (span,) = row.versions
    future = msgspec.structs.replace(span, version=Version(0, 5))
    with pytest.raises(WorkError, match=r"has tokens of version 0\.5, the learner is at 0\.4"):
        flat(spoiled(versions=(future,)))
    flat(spoiled(behavior_logprobs=Array.of([1e-7] * count, "<f4")))  # rounding of an engine
