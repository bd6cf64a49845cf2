"""Teachers at the actor: every episode is scored by the teacher of its environment before it is sealed.

Scoring happens while the lifecycle waits and others are played. A row that could not be scored is asked for
again a few times, after growing waits; then its episode has failed as infrastructure, as if its environment
had, and nothing of it is ever sent. A run without teachers has none of this.
"""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Mapping
from pathlib import Path

import msgspec

from cod_async.actor.failures import RETRY_S
from cod_async.config.check_distillation import teacher_problems
from cod_async.config.schema import Config, TeacherConfig
from cod_async.engines.base import Scorer
from cod_async.errors import (
    EngineClosedError,
    EngineError,
    EngineMismatchError,
    InfrastructureError,
    InputError,
)
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import LifecycleState, Row, Segment
from cod_async.lifecycle.transcript import token_ids_of


class Teachers:
    """The teachers of a run, one per environment; several environments may share one.

    Args:
        scorers: by (environment, preset).
        temperature: of the rollout.
        max_retries: a row is asked for so often again.
        waits_s: before the first, second, … of them; the last one from then on.
    """

    def __init__(
        self,
        scorers: Mapping[tuple[str, str], Scorer],
        *,
        temperature: float,
        max_retries: int,
        waits_s: tuple[float, ...] = RETRY_S,
    ) -> None:
        self._scorers = dict(scorers)
        self._temperature = temperature
        self._max_retries = max_retries
        self._waits_s = waits_s
        self._scored_tokens = 0
        self._num_retries = 0

    async def scored(self, segment: Segment, before: LifecycleState) -> Segment:
        """Return an episode with its teacher's log-probs.

        Args:
            segment: the episode; its rows may be deltas of a transcript.
            before: the lifecycle's state before it, which has the conversation that a delta goes on from.

        Raises:
            InfrastructureError: the teacher could not be asked, again and again.
            EngineMismatchError: no later try can succeed.
        """
        scorer = self._scorers[segment.environment, segment.preset]
        start_s = time.monotonic()
        rows = tuple([await self._scored_row(scorer, row, before) for row in segment.rows])
        wall_s = segment.wall_s + time.monotonic() - start_s  # forecasts of lifecycles count it in
        return msgspec.structs.replace(segment, rows=rows, wall_s=wall_s)

    async def _scored_row(self, scorer: Scorer, row: Row, before: LifecycleState) -> Row:
        token_ids: list[int] = row.token_ids.numpy().tolist()
        base = 0 if row.parent is None else row.parent.num_tokens
        if base:
            token_ids = token_ids_of(before) + token_ids
        spans = [(base + start, base + stop) for start, stop in row.action_spans]
        logprobs = await self._ask(scorer, token_ids, spans)
        if len(logprobs) != row.num_action_tokens:
            raise InfrastructureError(
                f"a teacher gave {len(logprobs)} log-probs for {row.num_action_tokens} action tokens"
            )
        self._scored_tokens += len(logprobs)
        return msgspec.structs.replace(row, teacher_logprobs=Array.of(logprobs, "<f4"))

    async def _ask(self, scorer: Scorer, token_ids: list[int], spans: list[tuple[int, int]]) -> list[float]:
        for number in range(self._max_retries + 1):
            try:
                return await scorer.score(token_ids, spans, self._temperature)
            except (EngineMismatchError, EngineClosedError):
                raise
            except EngineError as error:
                if number == self._max_retries:
                    raise InfrastructureError(f"teacher failed {number + 1} times: {error}") from error
                self._num_retries += 1
                await asyncio.sleep(self._waits_s[min(number, len(self._waits_s) - 1)])
        raise AssertionError("unreachable")

    def counters(self) -> dict[str, float]:
        """Return counters for the heartbeat."""
        return {
            "teacher_scored_tokens": float(self._scored_tokens),
            "num_teacher_retries": float(self._num_retries),
        }

    async def aclose(self) -> None:
        """Close all teachers."""
        unique = {id(scorer): scorer for scorer in self._scorers.values()}
        await asyncio.gather(*(scorer.aclose() for scorer in unique.values()))


async def open_teachers(config: Config, student_dir: Path) -> Teachers | None:
    """Return the teachers of a run, or None if it distills nothing.

    Args:
        config: the run's configuration.
        student_dir: model directory of the student.

    Raises:
        InputError: a teacher does not fit the student; all problems are listed.
        EngineError: a teacher's server does not answer.
    """
    if not config.loss.is_distilled:
        return None
    distillation = config.distillation
    scorers: dict[tuple[str, str], Scorer] = {}
    opened: dict[tuple[str, str], Scorer] = {}
    problems: list[str] = []
    for environment in config.environments:
        teacher = distillation.teacher_of(environment.name, environment.preset)
        if teacher is None:
            problems.append(f"{environment.name} {environment.preset} has no teacher")
            continue
        at = teacher.path, teacher.url
        try:
            if at not in opened:
                opened[at] = await _open(teacher, config, student_dir)
            scorers[environment.name, environment.preset] = opened[at]
        except InputError as error:
            problems += [problem for problem in error.problems if problem not in problems]
    if problems:
        await asyncio.gather(*(scorer.aclose() for scorer in opened.values()))
        raise InputError([f"distillation.teachers: {problem}" for problem in problems])
    return Teachers(scorers, temperature=config.engine.temperature, max_retries=distillation.max_retries)


async def _open(teacher: TeacherConfig, config: Config, student_dir: Path) -> Scorer:
    if teacher.url:
        from cod_async.engines.sglang.scoring import SGLangScorer

        key = os.environ.get(teacher.api_key_env, "") if teacher.api_key_env else ""
        return await SGLangScorer.open(teacher, key, config, student_dir)
    problems = teacher_problems(Path(teacher.path), student_dir, config.model.max_context_tokens)
    if problems:
        raise InputError(problems)
    from cod_async.engines.embedded.scoring import EmbeddedScorer

    return EmbeddedScorer(
        Path(teacher.path),
        tokens_per_batch=config.distillation.tokens_per_batch,
        is_batch_invariant=config.engine.is_batch_invariant,
    )
