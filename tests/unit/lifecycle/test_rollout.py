"""The rollout loop against scripted engines: rows, rewards, continuation, failures, context limits."""

from __future__ import annotations

import asyncio
import random
from typing import Any

import numpy as np
import pytest
from scripted_engine import ScriptedEngine, buttons_reply

from cod_async.config.schema import LifecycleConfig
from cod_async.envs.base import StepResult, TaskSpec
from cod_async.envs.hidden_buttons import SPEC, HiddenButtons
from cod_async.errors import InfrastructureError, InputError
from cod_async.lifecycle.hint import TersePrompts
from cod_async.lifecycle.rendering import Renderer
from cod_async.lifecycle.rewards import penalized_reward, update_reward
from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play
from cod_async.lifecycle.seeds import derived_seed
from cod_async.lifecycle.segment import LifecycleState, PendingUpdate, Segment

PROMPTS = TersePrompts()
CONFIG = LifecycleConfig(max_response_tokens=8, max_hint_tokens=10, solve_penalty=0.1)


def make_spec(pack_seed: int = 5, pack_size: int = 4, sampling_seed: int = 99) -> LifecycleSpec:
    tasks = tuple(
        TaskSpec("hidden_buttons", "cross", {}, {"seed": 10 + position}, pack_seed, position, pack_size)
        for position in range(pack_size)
    )
    return LifecycleSpec("run", 3, 1, 2, "actor-0", tasks, sampling_seed)


def make_environment() -> HiddenButtons:
    return HiddenButtons(SPEC.options("cross"))


def run(
    engine: ScriptedEngine, spec: LifecycleSpec, state: LifecycleState | None = None, **changes: Any
) -> list[Segment]:
    """Play to the end and return the segments."""
    environment = changes.pop("environment", None) or make_environment()
    arguments: dict[str, Any] = {
        "engine": engine,
        "environment": environment,
        "renderer": engine.renderer,
        "config": CONFIG,
        "temperature": 1.0,
        "top_p": 1.0,
        "max_context_tokens": 64,
    } | changes

    async def collect() -> list[Segment]:
        start = initial_state(environment) if state is None else state
        return [segment async for segment in play(spec, start, **arguments)]

    return asyncio.run(collect())


def without_time(segments: list[Segment]) -> list[Segment]:
    import msgspec

    return [msgspec.structs.replace(segment, wall_s=0.0) for segment in segments]


def test_a_whole_lifecycle_in_order(terse: Renderer) -> None:
    engine = ScriptedEngine(terse, buttons_reply)
    segments = run(engine, make_spec())
    assert [s.key.ordinal for s in segments] == list(range(7))
    assert [(s.kind, s.position) for s in segments][:3] == [("solve", 0), ("update", 0), ("solve", 1)]
    assert [s.is_last for s in segments] == [False] * 6 + [True]
    assert segments[-1].state_after.next_ordinal == 7
    assert segments[-1].state_after.task_rewards == tuple(s.reward for s in segments[::2])
    assert {(s.run, s.key.group, s.key.member, s.lease_epoch, s.actor) for s in segments} == {
        ("run", 3, 1, 2, "actor-0")
    }
    assert {(s.environment, s.preset, s.pack_seed) for s in segments} == {("hidden_buttons", "cross", 5)}
    assert not engine.open_sessions
    assert engine.closed == [f"run/g3.m1.e2.o{ordinal}" for ordinal in range(7)]
    sessions = [session for _, _, session in engine.calls]
    assert len(set(sessions)) == 7
    seeds = [params.seed for _, params, _ in engine.calls]
    assert len(set(seeds)) == len(seeds) and all(0 <= seed < 2**63 for seed in seeds)


def test_rows_hold_what_was_sampled_and_nothing_else(terse: Renderer) -> None:
    for pack_seed in range(12):
        engine = ScriptedEngine(terse, buttons_reply)
        segments = run(engine, make_spec(pack_seed))
        calls = iter(engine.calls)
        for segment in segments:
            (row,) = segment.rows
            ids = row.token_ids.numpy().tolist()
            assert row.num_action_tokens == sum(stop - start for start, stop in row.action_spans)
            assert row.num_action_tokens == sum(span.num_tokens for span in row.versions)
            assert all(a.version != b.version for a, b in zip(row.versions, row.versions[1:], strict=False))
            assert row.action_spans[-1][1] == len(ids)
            assert np.all(row.behavior_logprobs.numpy() <= 0)
            assert segment.metrics["num_response_tokens"] == row.num_action_tokens
            assert segment.metrics["num_steps"] == len(row.action_spans)
            for start, stop in row.action_spans:
                prompt, params, _ = next(calls)
                assert ids[:start] == prompt  # every turn's prompt is the row so far, token for token
                assert ids[stop - 1] in terse.stop_ids or stop - start == params.max_tokens
        assert next(calls, None) is None


def test_prompts_say_what_the_design_says(terse: Renderer) -> None:
    def reply(text: str, rng: random.Random) -> str:
        return "[ 1=Up 2=In ]" if "Write" in text else "In : 9"

    engine = ScriptedEngine(terse, reply)
    segments = run(engine, make_spec())
    texts = [terse.tokenizer.decode(ids) for ids, _, _ in engine.calls]
    assert texts[0].startswith("<bos> Hints : null . Task goal ") and texts[0].endswith(" <asst>")
    assert texts[1].startswith("<bos> Write Hints : null . Log goal ")
    assert texts[1].endswith(" ; bad reward 0 . <asst>")
    assert texts[2].startswith("<bos> Hints : 1=Up 2=In . Task goal ")
    assert segments[0].finish == "format_error" and segments[0].metrics["is_format_error"] == 1
    assert segments[1].metrics["hint_num_facts"] == 2 and segments[1].metrics["hint_num_tokens"] == 4


def test_continuing_from_every_segment_changes_nothing(terse: Renderer) -> None:
    for pack_seed in (1, 2, 3):
        spec = make_spec(pack_seed)
        whole = without_time(run(ScriptedEngine(terse, buttons_reply), spec))
        for i, segment in enumerate(whole):
            rest = run(ScriptedEngine(terse, buttons_reply), spec, segment.state_after)
            assert without_time(rest) == whole[i + 1 :]


def test_a_lost_hint_is_replaced_and_punished(terse: Renderer) -> None:
    def reply(text: str, rng: random.Random) -> str:
        return "1=Up" if "null" in text and "Write" in text else "[ 3=In ]" if "Write" in text else "Up : 1"

    segments = run(ScriptedEngine(terse, reply), make_spec(pack_size=3))
    updates = segments[1::2]
    assert [u.reward for u in updates] == [-0.1, 0.0]
    assert [u.finish for u in updates] == ["format_error", "success"]
    assert [u.state_after.hint for u in updates] == [PROMPTS.failed, "Hints : 3=In"]
    assert updates[0].metrics["hint_num_facts"] == 0


@pytest.mark.parametrize(
    ("raw", "steps", "limit", "penalty", "expected"),
    [
        (1.0, 1, 8, 0.1, 0.9875),
        (1.0, 8, 8, 0.1, 0.9),
        (0.5, 2, 2, 0.0, 0.5),
        (0.5, 2, 2, 1.0, 0.0),
        (0.0, 2, 2, 0.1, 0.0),
        (-1.0, 1, 2, 0.1, -1.0),
    ],
)
def test_penalized_reward(raw: float, steps: int, limit: int, penalty: float, expected: float) -> None:
    assert penalized_reward(raw, [3] * steps, limit, LifecycleConfig(solve_penalty=penalty)) == pytest.approx(
        expected, abs=1e-12
    )


def test_length_costs_a_success() -> None:
    config = LifecycleConfig(solve_penalty=0.1, solve_length_free_tokens=100, solve_length_full_tokens=200)
    # lengths 50, 150, 900 lie 0, .5 and 1 on the way: mean .5; three of four steps: .75
    assert penalized_reward(1.0, [50, 150, 900], 4, config) == pytest.approx(
        1 - 0.1 * (0.5 + 0.75), abs=1e-12
    )
    assert penalized_reward(0.0, [900], 4, config) == 0.0


@pytest.mark.parametrize(
    ("is_well_formed", "num_tokens", "expected"),
    [
        (False, 15, -0.1),
        (True, 5, -0.1),
        (True, 10, 0.0),
        (True, 30, -0.05),
        (True, 40, -0.1),
        (True, 99, -0.1),
    ],
)
def test_length_of_an_update(is_well_formed: bool, num_tokens: int, expected: float) -> None:
    config = LifecycleConfig(
        hint_penalty=0.1, hint_length_free_tokens=20, hint_length_full_tokens=40, hint_min_tokens=10
    )
    assert update_reward(is_well_formed, num_tokens, config) == pytest.approx(expected, abs=1e-12)
    unset = LifecycleConfig(hint_penalty=0.1)
    assert update_reward(is_well_formed, num_tokens, unset) == (0.0 if is_well_formed else -0.1)


def test_penalties_reach_segments_and_the_updater(terse: Renderer) -> None:
    environment = make_environment()
    spec = make_spec()
    environment.reset(spec.tasks[0])
    goal, mapping = environment.task_view()["goal"], environment.hidden()["mapping"]
    right = mapping.index(goal) + 1
    wrong = right % 5 + 1

    def reply(text: str, rng: random.Random) -> str:
        return f"{goal} : {right if f'{wrong}=' in text else wrong}"

    first, update, *_ = run(ScriptedEngine(terse, reply), spec)
    assert (first.raw_reward, first.reward, first.finish) == (0.5, pytest.approx(0.4), "success")
    assert first.metrics["num_steps"] == 2 and first.metrics["is_first_try"] == 0
    assert first.state_after.pending is not None
    log = f"Log goal {goal} ; {wrong}={mapping[wrong - 1]} ; {right}={goal} reward .4 ."
    assert log in terse.tokenizer.decode(update.rows[0].token_ids.numpy().tolist())


def test_carry_none_plays_solves_only(terse: Renderer) -> None:
    config = LifecycleConfig(carry="none", max_response_tokens=8, max_hint_tokens=10)
    engine = ScriptedEngine(terse, buttons_reply)
    segments = run(engine, make_spec(), config=config)
    assert [s.key.ordinal for s in segments] == [0, 2, 4, 6]
    assert [s.is_last for s in segments] == [False, False, False, True]
    assert {s.state_after.hint for s in segments} == {PROMPTS.initial}
    assert all(s.state_after.pending is None for s in segments)
    assert [s.state_after.next_ordinal for s in segments] == [2, 4, 6, 7]
    rest = run(ScriptedEngine(terse, buttons_reply), make_spec(), segments[1].state_after, config=config)
    assert without_time(rest) == without_time(segments)[2:]


def test_shown_hint_reaches_the_solver_only(terse: Renderer) -> None:
    engine = ScriptedEngine(terse, lambda text, rng: "[ 1=Up ]" if "Write" in text else "Up : 2")
    segments = run(engine, make_spec(), shown_hint=lambda position, hint: PROMPTS.initial)
    texts = [terse.tokenizer.decode(ids) for ids, _, _ in engine.calls]
    assert all("Hints : null ." in text for text in texts if "Write" not in text)
    assert sum("Write Hints : 1=Up ." in text for text in texts) == 2
    assert segments[-1].state_after.hint == "Hints : 1=Up"


def test_before_episode_is_awaited_with_every_ordinal(terse: Renderer) -> None:
    engine = ScriptedEngine(terse, buttons_reply)
    seen: list[tuple[int, int]] = []

    async def gate(ordinal: int) -> None:
        await asyncio.sleep(0)
        seen.append((ordinal, len(engine.calls)))

    run(engine, make_spec(), before_episode=gate)
    assert [ordinal for ordinal, _ in seen] == list(range(7))
    assert seen[0] == (0, 0)


def test_engine_failures_are_infrastructure_and_sessions_are_released(terse: Renderer) -> None:
    for fail_at in range(4):
        engine = ScriptedEngine(terse, buttons_reply)
        engine.fail_at = fail_at
        with pytest.raises(InfrastructureError, match="scripted failure"):
            run(engine, make_spec())
        assert not engine.open_sessions


def test_cancelling_releases_the_session(terse: Renderer) -> None:
    engine = ScriptedEngine(terse, buttons_reply)
    engine.hang_at = 1

    async def scenario() -> None:
        environment = make_environment()

        async def drain() -> None:
            stream = play(
                make_spec(),
                initial_state(environment),
                engine=engine,
                environment=environment,
                renderer=terse,
                config=CONFIG,
                temperature=1.0,
                top_p=1.0,
                max_context_tokens=64,
            )
            async for _ in stream:
                pass

        task = asyncio.create_task(drain())
        while len(engine.calls) < 2:
            await asyncio.sleep(0)
        assert engine.open_sessions
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task

    asyncio.run(scenario())
    assert not engine.open_sessions


class Broken(HiddenButtons):
    """Breaks at one place."""

    def __init__(self, where: str) -> None:
        super().__init__(SPEC.options("cross"))
        self.where = where

    async def step(self, response: str) -> StepResult:
        if self.where == "step":
            raise RuntimeError("no such button")
        if self.where == "endless":
            return StepResult(observation="bad", is_done=False)
        if self.where == "nan":
            return StepResult(observation="bad", is_done=True, raw_reward=float("nan"))
        if self.where == "metric":
            return StepResult(observation="bad", is_done=True, metrics={"depth": float("inf")})
        return await super().step(response)

    def feedback(self) -> str:
        if self.where == "feedback":
            raise KeyError("lost")
        return super().feedback()


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("step", "RuntimeError: no such button"),
        ("feedback", "KeyError"),
        ("endless", "did not end"),
        ("nan", "nan"),
        ("metric", "depth"),
    ],
)
def test_environment_failures_are_infrastructure(where: str, message: str, terse: Renderer) -> None:
    engine = ScriptedEngine(terse, buttons_reply)
    with pytest.raises(InfrastructureError, match=message):
        run(engine, make_spec(), environment=Broken(where))
    assert not engine.open_sessions


def test_a_wrong_record_stays_wrong_input(terse: Renderer) -> None:
    task = TaskSpec("hidden_buttons", "cross", {}, {"sead": 1}, 5, 0, 1)
    spec = LifecycleSpec("run", 0, 0, 0, "a", (task,), 1)
    with pytest.raises(InputError, match="sead"):
        run(ScriptedEngine(terse, buttons_reply), spec)


def test_a_conversation_that_outgrows_the_context_ends_with_reward_zero(terse: Renderer) -> None:
    environment = make_environment()
    spec = make_spec()
    environment.reset(spec.tasks[0])
    mapping, goal = environment.hidden()["mapping"], environment.task_view()["goal"]
    wrong = mapping.index(goal) % 4 + 2 if mapping.index(goal) < 4 else 1
    assert mapping[wrong - 1] != goal
    engine = ScriptedEngine(terse, lambda text, rng: f"{goal} : {wrong}")
    opening = len(terse.open("Hints : null .", f"Task goal {goal}"))
    # opening + 4 sampled + 3 of the delta reach the limit: the second response has no room
    limit = opening + 7
    first = run(engine, make_spec(pack_size=1), max_context_tokens=limit)[0]
    assert (first.finish, first.raw_reward, first.reward) == ("context_overflow", 0.0, 0.0)
    assert first.metrics["is_context_overflow"] == 1 and first.metrics["num_steps"] == 1
    assert first.rows[0].num_tokens == opening + 4
    # one token more and the second response is cut to it
    second = run(engine, make_spec(pack_size=1), max_context_tokens=limit + 1)[0]
    assert second.rows[0].num_tokens == limit + 1 and second.finish == "format_error"


def test_a_first_prompt_that_cannot_fit_is_wrong_input(terse: Renderer) -> None:
    with pytest.raises(InputError, match=r"first prompt of hidden_buttons has 9 tokens.*_context_tokens = 9"):
        run(ScriptedEngine(terse, buttons_reply), make_spec(), max_context_tokens=9)


def test_the_engines_own_limit_holds_too(terse: Renderer) -> None:
    with pytest.raises(InputError, match="max_context_tokens = 9"):
        run(ScriptedEngine(terse, buttons_reply, max_context_tokens=9), make_spec())


def test_a_hint_that_leaves_no_room_gives_way(terse: Renderer) -> None:
    engine = ScriptedEngine(terse, buttons_reply)
    long_hint = PROMPTS.carried(" ".join(["1=Up"] * 50))
    state = LifecycleState(next_ordinal=2, hint=long_hint, task_rewards=(0.0,))
    segment = run(engine, make_spec(pack_size=2), state, max_context_tokens=40)[0]
    assert segment.metrics["is_hint_dropped"] == 1
    assert "Hints : none ." in terse.tokenizer.decode(engine.calls[0][0])
    assert segment.state_after.hint == long_hint


def test_a_long_trajectory_is_shortened_in_its_middle(chatml: Renderer) -> None:
    class Talker(HiddenButtons):
        def trajectory(self, messages: list[tuple[str, str]]) -> str | None:
            return "BEGIN " + "x y z " * 400 + "END"

    environment = Talker(SPEC.options("cross"))
    engine = ScriptedEngine(chatml, lambda text, rng: "[ 1=Up ]")
    segments = run(engine, make_spec(pack_size=2), environment=environment, max_context_tokens=200)
    update = segments[1]
    prompt = engine.calls[1][0]
    assert 180 <= len(prompt) <= 200 - CONFIG.max_hint_tokens
    text = chatml.tokenizer.decode(prompt)
    assert "BEGIN" in text and " cut " in text and "END" in text
    assert update.metrics["num_trajectory_chars_cut"] > 1000


def test_an_update_with_a_hint_that_leaves_no_room_forgets_it(terse: Renderer) -> None:
    engine = ScriptedEngine(terse, lambda text, rng: "[ 1=Up ]")
    pending = PendingUpdate(trajectory="Log goal Up ; 3=Left", reward=0.0, feedback="1=In")
    hint = PROMPTS.carried(" ".join(["1=Up"] * 50))
    state = LifecycleState(next_ordinal=1, hint=hint, task_rewards=(0.0,), pending=pending)
    segment = run(engine, make_spec(pack_size=2), state, max_context_tokens=40)[0]
    text = terse.tokenizer.decode(engine.calls[0][0])
    assert text == "<bos> Write Hints : none . Log goal Up ; 3=Left ; 1=In reward 0 . <asst>"
    assert segment.metrics["is_hint_dropped"] == 1 and segment.state_after.hint == "Hints : 1=Up"
    # the record goes before the room for the new hint does; no room at all is wrong input
    tight = run(engine, make_spec(pack_size=2), state, max_context_tokens=19)[0]
    assert tight.metrics["num_trajectory_chars_cut"] == len(pending.trajectory)
    with pytest.raises(InputError, match="update prompt of hidden_buttons has"):
        run(engine, make_spec(pack_size=2), state, max_context_tokens=12)


def test_seeds_depend_on_lifecycle_ordinal_and_turn() -> None:
    seeds = {derived_seed(a, b, c) for a in range(5) for b in range(7) for c in range(3)}
    assert len(seeds) == 105
    assert derived_seed(1, 23) != derived_seed(12, 3)
