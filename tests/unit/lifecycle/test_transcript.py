"""The transcript carry: one growing conversation, sealed as deltas that add up to it again."""

from __future__ import annotations

import asyncio
import hashlib
import random
from typing import Any

import msgspec
import pytest
from scripted_engine import ScriptedEngine, buttons_reply

from cod_async.config.schema import LifecycleConfig
from cod_async.envs.base import TaskSpec
from cod_async.envs.hidden_buttons import SPEC, HiddenButtons
from cod_async.errors import InputError
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.rendering import Renderer
from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play
from cod_async.lifecycle.segment import LifecycleState, Segment
from cod_async.lifecycle.transcript import assembled, continued, token_ids_of

CONFIG = LifecycleConfig(carry="transcript", max_response_tokens=8, max_hint_tokens=10)
WITH_UPDATES = msgspec.structs.replace(CONFIG, has_transcript_updates=True)


def _spec(pack_size: int = 4) -> LifecycleSpec:
    tasks = tuple(
        TaskSpec("hidden_buttons", "cross", {}, {"seed": 10 + position}, 5, position, pack_size)
        for position in range(pack_size)
    )
    return LifecycleSpec("run", 3, 1, 2, "actor-0", tasks, 99)


def _reply(text: str, rng: random.Random) -> str:
    """Sometimes too long, so that responses are cut and the next turn has to supply their end."""
    if text.rstrip().endswith("Write . <asst>"):
        return buttons_reply(" Write 1=Up", rng)
    goal = text.rpartition("goal ")[2].split()[0]
    return "Up " * 12 if rng.random() < 0.3 else f"{goal} : {rng.randint(1, 5)}"


def _run(
    engine: ScriptedEngine, state: LifecycleState | None = None, config: LifecycleConfig = CONFIG, **more: Any
) -> list[Segment]:
    environment = HiddenButtons(SPEC.options("cross"))
    limit = more.pop("max_context_tokens", 512)

    async def collect() -> list[Segment]:
        start = initial_state(environment) if state is None else state
        episodes = play(
            more.get("spec", _spec()),
            start,
            engine=engine,
            environment=environment,
            renderer=engine.renderer,
            config=config,
            temperature=1.0,
            top_p=1.0,
            max_context_tokens=limit,
        )
        return [msgspec.structs.replace(segment, wall_s=0.0) async for segment in episodes]

    return asyncio.run(collect())


def _whole(segments: list[Segment]) -> list[int]:
    return [token for s in segments for row in s.rows for token in row.token_ids.numpy().tolist()]


@pytest.mark.parametrize("config", [CONFIG, WITH_UPDATES])
def test_deltas_add_up_to_one_conversation(terse: Renderer, config: LifecycleConfig) -> None:
    engine = ScriptedEngine(terse, _reply)
    segments = _run(engine, config=config)
    step = 1 if config.has_transcript_updates else 2
    assert [s.key.ordinal for s in segments] == list(range(0, 7, step))
    whole = _whole(segments)
    base = 0
    digest = ""
    calls = iter(engine.calls)
    for segment in segments:
        (row,) = segment.rows
        delta = row.token_ids.numpy().tolist()
        assert row.parent is not None
        assert (row.parent.num_tokens, row.parent.digest) == (base, digest)
        for start, stop in row.action_spans:
            prompt, _, _ = next(calls)
            assert prompt == whole[: base + start]  # every prompt is the whole conversation so far
            assert len(prompt) + stop - start <= len(whole)
        digest = hashlib.sha256(digest.encode() + b"\0" + row.token_ids.data).hexdigest()
        base += len(delta)
        after = segment.state_after.transcript
        assert after is not None and after.token_ids is None  # only the mark travels
        assert (after.mark.num_tokens, after.mark.digest) == (base, digest)
    assert next(calls, None) is None
    assert len({session for _, _, session in engine.calls}) == 1  # the engine keeps what it computed
    assert not engine.open_sessions


def test_the_next_task_hears_what_became_of_the_last(terse: Renderer) -> None:
    segments = _run(ScriptedEngine(terse, _reply))
    text = terse.tokenizer.decode(_whole(segments))
    assert text.count("<bos>") == 1
    assert text.count("reward") == 3  # between four tasks; the last outcome is told to nobody


@pytest.mark.parametrize("config", [CONFIG, WITH_UPDATES])
def test_goes_on_from_every_segment(terse: Renderer, config: LifecycleConfig) -> None:
    whole = _run(ScriptedEngine(terse, _reply), config=config)
    for cut in range(1, len(whole)):
        state = assembled(whole[cut - 1].state_after, whole[:cut])
        rest = _run(ScriptedEngine(terse, _reply), state, config)
        assert rest == whole[cut:]


def test_continuing_step_by_step_equals_assembling(terse: Renderer) -> None:
    segments = _run(ScriptedEngine(terse, _reply))
    state = initial_state(HiddenButtons(SPEC.options("cross")))
    for count, segment in enumerate(segments, start=1):
        state = continued(state, segment)
        assert state == assembled(segment.state_after, segments[:count])
        assert token_ids_of(state) == _whole(segments[:count])


def test_deltas_that_do_not_chain_are_refused(terse: Renderer) -> None:
    segments = _run(ScriptedEngine(terse, _reply))
    last = segments[-1].state_after
    with pytest.raises(InputError, match="does not follow"):
        assembled(last, [segments[0], segments[2], segments[3]])
    with pytest.raises(InputError, match="do not add up"):
        assembled(last, segments[:3])
    (row,) = segments[1].rows
    ids = row.token_ids.numpy().tolist()
    forged = msgspec.structs.replace(row, token_ids=Array.of([*ids[:-1], ids[-1] ^ 1], "<i4"))
    swapped = msgspec.structs.replace(segments[1], rows=(forged,))
    with pytest.raises(InputError, match="does not follow"):
        assembled(last, [segments[0], swapped, *segments[2:]])
    with pytest.raises(InputError, match="cannot be continued"):
        _run(ScriptedEngine(terse, _reply), segments[0].state_after)


def test_a_full_context_loses_the_remaining_tasks_without_a_token(terse: Renderer) -> None:
    complete = _run(ScriptedEngine(terse, _reply))
    limit = sum(s.num_tokens for s in complete[:2]) + 2
    segments = _run(ScriptedEngine(terse, _reply), max_context_tokens=limit)
    assert [s.key.ordinal for s in segments] == [0, 2, 4, 6]
    assert segments[:1] == complete[:1]
    for segment in segments[2:]:
        assert (segment.finish, segment.reward, segment.rows) == ("context_overflow", 0.0, ())
    assert sum(s.num_tokens for s in segments) <= limit
    assert segments[-1].is_last


def test_rules_that_change_are_told_again(terse: Renderer) -> None:
    """An environment may put a task's target into its rules: they must not be lost after the first task."""

    class Talkative(HiddenButtons):
        def system_prompt(self) -> str:
            return f"Log {self.task_view()['goal']} ."

    def played(environment: HiddenButtons) -> list[Segment]:
        engine = ScriptedEngine(terse, _reply)

        async def collect() -> list[Segment]:
            return [
                segment
                async for segment in play(
                    _spec(),
                    initial_state(environment),
                    engine=engine,
                    environment=environment,
                    renderer=terse,
                    config=CONFIG,
                    temperature=1.0,
                    top_p=1.0,
                    max_context_tokens=512,
                )
            ]

        return asyncio.run(collect())

    told = terse.tokenizer.decode(_whole(played(Talkative(SPEC.options("cross")))))
    goals = []
    for task in _spec().tasks:
        environment = Talkative(SPEC.options("cross"))
        environment.reset(task)
        goals.append(environment.task_view()["goal"])
    assert len(set(goals)) > 1
    expected = [goal for index, goal in enumerate(goals) if index == 0 or goal != goals[0]]
    words = told.split()
    assert [words[i + 1] for i, word in enumerate(words) if word == "Log"] == expected
