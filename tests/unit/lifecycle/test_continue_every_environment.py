"""Every registered environment goes on from every sealed segment as if nothing had happened."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from itertools import islice

import msgspec
import pytest
from scripted_engine import ScriptedEngine

from cod_async.config.schema import LifecycleConfig
from cod_async.envs import registry
from cod_async.envs.base import Environment, EnvironmentSpec, TaskSpec
from cod_async.lifecycle.hint import prompts_for
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


def run(
    spec: EnvironmentSpec,
    lived: LifecycleSpec,
    environment: Environment,
    renderer: Renderer,
    state: LifecycleState,
) -> list[Segment]:
    """Play with the environment's own random policy, driven by nothing but prompt and seed."""
    prompts = prompts_for(environment.prompt_style)

    def reply(text: str, rng: random.Random) -> str:
        is_update = "Write Hints" in text if environment.prompt_style == "terse" else prompts.start in text
        if is_update:
            number = rng.randint(1, 4)
            return (
                "no block"
                if rng.random() < 0.2
                else f"{prompts.start} {number} = {prompts.label} {prompts.end}"
            )
        return spec.policies["random"](rng.getrandbits(32))(environment, text, {})

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

    async def collect() -> list[Segment]:
        return [msgspec.structs.replace(segment, wall_s=0.0) async for segment in stream]

    return asyncio.run(collect())


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
        whole = run(spec, lived, environment, renderer, initial_state(environment))
        check_rows(whole)
        assert len(whole) == 2 * PACK_SIZE - 1
        for i, segment in enumerate(whole):
            fresh = spec.make(spec.options(preset))
            assert run(spec, lived, fresh, renderer, segment.state_after) == whole[i + 1 :]
