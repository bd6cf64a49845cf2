"""Episodes are scored before they are sealed; a teacher in trouble costs time and never becomes data."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
import torch
from actor_world import CONTEXT, make_config, make_lease, playing, tiny_model

from cod_async.actor.teaching import Teachers, open_teachers
from cod_async.config.schema import Config, DistillationConfig, EnvironmentConfig, LossConfig, TeacherConfig
from cod_async.engines.embedded.scoring import EmbeddedScorer
from cod_async.errors import EngineDownError, EngineMismatchError, InputError
from cod_async.lifecycle.segment import Segment, Version
from cod_async.models.directory import save_model
from cod_async.models.qwen3 import Qwen3
from cod_async.models.tokenizers import write_word_tokenizer
from cod_async.wire.validate import validate_segment

AT = ("hidden_buttons", "door")
TEMPERATURE = 0.8


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


class Moody:
    """Scores a token with -(position + 1) / 100; fails as it is told, and waits while ``gate`` is shut."""

    def __init__(self) -> None:
        self.errors: list[Exception] = []
        self.error: Exception | None = None
        self.gate = asyncio.Event()
        self.gate.set()
        self.rows: list[list[int]] = []
        self.num_closed = 0

    async def score(
        self, token_ids: Sequence[int], spans: Sequence[tuple[int, int]], temperature: float
    ) -> list[float]:
        assert temperature == TEMPERATURE
        self.rows.append(list(token_ids))
        await self.gate.wait()
        if self.error is not None:
            raise self.error
        if self.errors:
            raise self.errors.pop(0)
        return [-(position + 1) / 100 for start, stop in spans for position in range(start, stop)]

    async def aclose(self) -> None:
        self.num_closed += 1


def teachers_of(scorer: Any, max_retries: int = 2) -> Teachers:
    return Teachers({AT: scorer}, temperature=TEMPERATURE, max_retries=max_retries, waits_s=(0.0,))


def logprobs_of(segment: Segment) -> list[float]:
    (row,) = segment.rows
    assert row.teacher_logprobs is not msgspec.UNSET
    return row.teacher_logprobs.numpy().tolist()  # type: ignore[no-any-return]


def make_teacher(folder: Path, seed: int = 7) -> Qwen3:
    model = tiny_model(folder, seed)
    save_model(folder, model)
    return model


def test_every_episode_is_scored_by_the_model(tmp_path: Path) -> None:
    async def test() -> None:
        (tmp_path / "teacher").mkdir()
        model = make_teacher(tmp_path / "teacher")
        teachers = teachers_of(EmbeddedScorer(tmp_path / "teacher"))
        async with playing(tmp_path, teachers=teachers) as world:
            world.coordinator.leases += [make_lease(0), make_lease(0, 1)]
            await world.until(lambda: len(world.coordinator.segments) == 10)
            await world.heartbeats()
            counters = world.coordinator.last.counters
        segments = world.coordinator.segments
        assert {segment.kind for segment in segments} == {"solve", "update"}
        for segment in segments:
            (row,) = segment.rows
            ids = torch.from_numpy(row.token_ids.numpy().astype("int64"))
            with torch.no_grad():
                found = torch.log_softmax(model.logits(ids[None])[0].double() / TEMPERATURE, -1)
            positions = [p for start, stop in row.action_spans for p in range(start, stop)]
            truth = [found[p - 1, ids[p]].item() for p in positions]
            assert logprobs_of(segment) == pytest.approx(truth, abs=1e-5)
            gap = row.behavior_logprobs.numpy().astype(float) - np.array(truth)
            assert segment.teacher_gap_nats == pytest.approx(gap.mean(), abs=1e-5)
            validate_segment(segment, run="t", pack_size=3, is_distilled=True, newest=Version(0, 0))
        assert counters["teacher_scored_tokens"] == sum(segment.num_action_tokens for segment in segments)
        assert counters["num_teacher_retries"] == 0

    run(test())


def test_a_teacher_that_fails_now_and_then_is_asked_again(tmp_path: Path) -> None:
    async def test() -> None:
        scorer = Moody()
        scorer.errors = [EngineDownError("gone for a moment")] * 2
        async with playing(tmp_path, teachers=teachers_of(scorer)) as world:
            world.coordinator.leases.append(make_lease(0))
            await world.until(lambda: len(world.coordinator.segments) == 5)
            await world.heartbeats()
            assert world.coordinator.last.counters["num_teacher_retries"] == 2
        assert world.played() == [(0, 0, ordinal) for ordinal in range(5)]
        assert scorer.rows[0] == scorer.rows[1] == scorer.rows[2] != scorer.rows[3]
        assert scorer.num_closed == 1

    run(test())


def test_a_teacher_that_stays_away_is_infrastructure_and_nothing_is_sent(tmp_path: Path) -> None:
    async def test() -> None:
        scorer = Moody()
        scorer.error = EngineDownError("nobody there")
        async with playing(tmp_path, teachers=teachers_of(scorer)) as world:
            world.coordinator.leases.append(make_lease(0))
            await world.until(lambda: world.coordinator.returns)
            (returned,) = world.coordinator.returns
            assert returned.reason == "infrastructure"
            assert "teacher failed 3 times: nobody there" in returned.detail
            assert world.coordinator.segments == []
            assert len(scorer.rows) == 3 * 3  # three tries of the episode, three of each row
            await world.heartbeats()
            assert world.coordinator.last.counters["discarded_tokens_infrastructure"] > 0
            scorer.error = None
            world.coordinator.leases.append(make_lease(1))
            await world.until(lambda: len(world.coordinator.segments) == 5)

    run(test())


def test_a_teacher_that_can_never_answer_ends_the_actor(tmp_path: Path) -> None:
    async def test() -> None:
        scorer = Moody()
        scorer.error = EngineMismatchError("another model by now")
        async with playing(tmp_path, teachers=teachers_of(scorer)) as world:
            world.coordinator.leases.append(make_lease(0))
            with pytest.raises(EngineMismatchError, match="another model"):
                await world.ended()
            assert world.coordinator.segments == []

    run(test())


def test_others_go_on_while_one_is_scored(tmp_path: Path) -> None:
    async def test() -> None:
        slow, quick = Moody(), Moody()
        slow.gate.clear()
        cross = EnvironmentConfig(name="hidden_buttons", preset="cross")
        by_preset = {AT: slow, ("hidden_buttons", "cross"): quick}
        teachers = Teachers(by_preset, temperature=TEMPERATURE, max_retries=0)
        async with playing(tmp_path, teachers=teachers) as world:
            world.coordinator.leases += [make_lease(0), make_lease(1, environment=cross)]
            await world.until(lambda: len(world.coordinator.segments) >= 3 and slow.rows)
            assert {segment.preset for segment in world.coordinator.segments} == {"cross"}
            slow.gate.set()
            await world.until(lambda: len(world.coordinator.segments) == 10)

    run(test())


def test_a_delta_of_a_transcript_is_scored_after_the_whole_conversation(tmp_path: Path) -> None:
    async def test() -> None:
        scorer = Moody()
        async with playing(
            tmp_path, teachers=teachers_of(scorer), lifecycle={"carry": "transcript"}
        ) as world:
            world.coordinator.leases.append(make_lease(0))
            await world.until(lambda: world.coordinator.segments and world.coordinator.segments[-1].is_last)
        conversation: list[int] = []
        assert len(world.coordinator.segments) > 1
        for segment, asked in zip(world.coordinator.segments, scorer.rows, strict=True):
            (row,) = segment.rows
            base = len(conversation)
            conversation += row.token_ids.numpy().tolist()
            assert asked == conversation
            positions = [base + p for start, stop in row.action_spans for p in range(start, stop)]
            assert logprobs_of(segment) == pytest.approx([-(p + 1) / 100 for p in positions])

    run(test())


# Opening


def distilling(*teachers: TeacherConfig, **changes: Any) -> Config:
    config = make_config()
    return msgspec.structs.replace(
        config,
        loss=LossConfig(preset="opd"),
        distillation=DistillationConfig(teachers=teachers),
        **changes,
    )


def test_teachers_are_opened_by_environment_and_shared_by_path(tmp_path: Path) -> None:
    make_teacher(tmp_path)
    cross = EnvironmentConfig(name="hidden_buttons", preset="cross")
    one = TeacherConfig(environment="hidden_buttons", path=str(tmp_path))
    config = distilling(one)
    both = msgspec.structs.replace(config, environments=(*config.environments, cross))

    async def test() -> None:
        assert await open_teachers(make_config(), tmp_path) is None
        teachers = await open_teachers(both, tmp_path)
        assert teachers is not None
        first, second = (teachers._scorers["hidden_buttons", preset] for preset in ("door", "cross"))
        assert first is second
        await teachers.aclose()

    run(test())


def test_teachers_of_another_tongue_are_refused_all_at_once(tmp_path: Path) -> None:
    student, other, wide = (tmp_path / name for name in ("student", "other", "wide"))
    for folder in (student, other, wide):
        folder.mkdir()
        make_teacher(folder)
    write_word_tokenizer(other, ["strange", "words"], CONTEXT)
    text = (wide / "config.json").read_text()
    (wide / "config.json").write_text(text.replace('"vocab_size": ', '"vocab_size": 1'))
    config = distilling(
        TeacherConfig(environment="hidden_buttons", preset="door", path=str(other)),
        TeacherConfig(environment="hidden_buttons", preset="cross", path=str(wide)),
    )
    cross = EnvironmentConfig(name="hidden_buttons", preset="cross")
    both = msgspec.structs.replace(config, environments=(*config.environments, cross))

    async def test() -> None:
        with pytest.raises(InputError) as caught:
            await open_teachers(both, student)
        first, second = caught.value.problems
        assert "another tokenizer" in first and str(other) in first
        assert "vocabulary of 1" in second and str(wide) in second

    run(test())
