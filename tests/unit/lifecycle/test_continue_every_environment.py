"""Every registered environment goes on from every sealed segment as if nothing had happened."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import islice

import msgspec
import pytest
from scripted_engine import ScriptedEngine

from cod_async.config.schema import EnvironmentConfig, LifecycleConfig
from cod_async.envs import registry
from cod_async.envs.base import (
    Closing,
    Environment,
    EnvironmentSpec,
    Opening,
    Playable,
    PromptStyle,
    StepResult,
    TaskSpec,
)
from cod_async.envs.worker import WorkerPool, make_environment
from cod_async.lifecycle.hint import HintPrompts, prompts_for
from cod_async.lifecycle.rendering import Renderer
from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play
from cod_async.lifecycle.segment import LifecycleState, Segment

PACK_SIZE = 3


def lifecycle(spec: EnvironmentSpec, preset: str, seed: int) -> LifecycleSpec:
    options = spec.options(preset)
    pack_seed = spec.pack_seed_for(options, "train", seed)
    records = islice(spec.records(options, "train", seed), PACK_SIZE)
    tasks = tuple(
        TaskSpec(spec.name, preset, {}, record, pack_seed, i, PACK_SIZE) for i, record in enumerate(records)
    )
    return LifecycleSpec("run", 0, 0, 0, "actor", tasks, seed)


class Twins:
    """An environment in a worker process and the same in this one; they must answer alike."""

    def __init__(self, isolated: Playable, direct: Environment) -> None:
        self.isolated, self.direct = isolated, direct
        self.is_response_cut = False
        self.name: str = isolated.name
        self.prompt_style: PromptStyle = isolated.prompt_style
        self.is_resumable: bool = isolated.is_resumable
        self.is_step_penalized: bool = isolated.is_step_penalized
        assert self.name == direct.name and self.prompt_style == direct.prompt_style
        assert self.is_resumable == direct.is_resumable
        assert self.is_step_penalized == direct.is_step_penalized
        assert type(isolated.update_prompts()) is type(direct.update_prompts())

    def update_prompts(self) -> HintPrompts | None:
        return self.isolated.update_prompts()

    def snapshot(self) -> bytes:
        assert self.isolated.snapshot() == self.direct.snapshot()
        return self.isolated.snapshot()

    async def start(self, task: TaskSpec, state: bytes) -> Opening:
        opening = await self.isolated.start(task, state)
        assert opening == await self.direct.start(task, state)
        return opening

    async def step(self, response: str) -> StepResult:
        self.isolated.is_response_cut = self.direct.is_response_cut = self.is_response_cut
        result = await self.isolated.step(response)
        assert result == await self.direct.step(response)
        return result

    async def finish(self, messages: list[tuple[str, str]] | None, has_feedback: bool) -> Closing:
        closing = await self.isolated.finish(messages, has_feedback)
        assert closing == await self.direct.finish(messages, has_feedback)
        return closing

    async def close(self) -> None:
        await self.isolated.close()


async def run(
    spec: EnvironmentSpec,
    lived: LifecycleSpec,
    environment: Environment | Twins,
    renderer: Renderer,
    state: LifecycleState,
) -> list[Segment]:
    """Play with the environment's own random policy, driven by nothing but prompt and seed."""
    prompts = prompts_for(environment.prompt_style)
    seen = environment.direct if isinstance(environment, Twins) else environment

    def reply(text: str, rng: random.Random) -> str:
        is_update = "Write Hints" in text if environment.prompt_style == "terse" else prompts.start in text
        if is_update:
            number = rng.randint(1, 4)
            return (
                "no block"
                if rng.random() < 0.2
                else f"{prompts.start} {number} = {prompts.label} {prompts.end}"
            )
        return spec.policies["random"](rng.getrandbits(32))(seen, text, {})

    engine = ScriptedEngine(renderer, reply, max_context_tokens=20_000)
    stream = play(
        lived,
        state,
        engine=engine,
        environment=environment,
        renderer=renderer,
        config=LifecycleConfig(max_response_tokens=200, max_hint_tokens=200, length_notice_tokens=100),
        temperature=1.0,
        top_p=1.0,
        max_context_tokens=20_000,
    )
    return [msgspec.structs.replace(segment, wall_s=0.0) async for segment in stream]


def check_rows(segments: Sequence[Segment]) -> None:
    for segment in segments:
        assert segment.finish != "context_overflow" and len(segment.rows) == 1
        assert len(segment.rows[0].action_spans) == segment.metrics["num_steps"]


@pytest.mark.parametrize(
    ("name", "preset"), [(name, preset) for name in registry.names() for preset in registry.get(name).presets]
)
def test_continuing_changes_nothing(name: str, preset: str, terse: Renderer, chatml: Renderer) -> None:
    spec = registry.get(name)
    for seed in range(2):
        lived = lifecycle(spec, preset, seed)
        environment = spec.make(spec.options(preset))
        if not environment.is_resumable:
            pytest.skip(f"{name} says that it cannot be resumed")
        renderer = terse if environment.prompt_style == "terse" else chatml
        whole = asyncio.run(run(spec, lived, environment, renderer, initial_state(environment)))
        check_rows(whole)
        assert len(whole) == 2 * PACK_SIZE - 1
        for i, segment in enumerate(whole):
            fresh = spec.make(spec.options(preset))
            rest = asyncio.run(run(spec, lived, fresh, renderer, segment.state_after))
            assert rest == whole[i + 1 :]


def test_continuing_in_another_worker_changes_nothing_either(terse: Renderer, chatml: Renderer) -> None:
    """Every environment, at once in two workers of each, in step with one in this process."""

    async def live(name: str, pool: WorkerPool) -> None:
        spec = registry.get(name)
        preset = spec.default_preset
        lived = lifecycle(spec, preset, 5)
        limits = (EnvironmentConfig(name=name, preset=preset, isolation="process", num_workers=2),)

        async def made() -> Twins:
            isolated = await make_environment(lived.tasks[0], limits, pool)
            return Twins(isolated, spec.make(spec.options(preset)))

        first = await made()
        renderer = terse if first.prompt_style == "terse" else chatml
        whole = await run(spec, lived, first, renderer, initial_state(first))
        check_rows(whole)
        await (await made()).close()  # lies in the other worker
        for i, segment in enumerate(whole if first.is_resumable else ()):
            other = await made()
            assert await run(spec, lived, other, renderer, segment.state_after) == whole[i + 1 :]
            await other.close()
        await first.close()

    async def live_all() -> None:
        pool = WorkerPool()
        try:
            await asyncio.gather(*(live(name, pool) for name in registry.names()))
        finally:
            await pool.aclose()
        assert not any("lost" in name for name in pool.counters())

    asyncio.run(live_all())
