"""What ``cod env list``, ``show`` and ``play`` answer, as JSON-able values; ``cod`` only prints them.

``show`` builds a task exactly as a rollout would and shows what is hidden in it; ``play`` lets a scripted
policy live
through whole packs and returns its reward at each position: the floor (``random``) and the ceiling
(``oracle``) of a learning curve, without any model.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from cod_async.algo.statistics import mean_and_sem
from cod_async.config.schema import EnvironmentConfig, LifecycleConfig, PackStrategy
from cod_async.envs import registry
from cod_async.envs.base import Environment, EnvironmentSpec, Policy, TaskSpec
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.packs import SPLITS, STRATEGIES, PackPlan, Split, plan_pack
from cod_async.lifecycle.rewards import penalized_reward
from cod_async.lifecycle.seeds import stable_seed

MAX_PACK_SIZE = 10_000
"""Largest pack that ``show`` and ``play`` accept."""


def list_environments() -> list[dict[str, Any]]:
    """Return ``[{name, presets, positions, hidden}]`` of all registered environments, by name.

    Returns:
        ``presets``: preset names; ``positions``: default pack size; ``hidden``: one sentence on what is
        hidden.

    Raises:
        EnvironmentInputError: a registered environment cannot be loaded; the message names it.
    """
    specs = [registry.get(name) for name in registry.names()]
    return [
        {
            "name": spec.name,
            "presets": list(spec.presets),
            "positions": spec.default_pack_size,
            "hidden": spec.hidden,
        }
        for spec in specs
    ]


def show(
    name: str,
    preset: str | None = None,
    pack_seed: int = 0,
    record: Mapping[str, Any] | None = None,
    position: int = 0,
    pack_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Build one task and return ``{environment, hidden, task}``.

    Args:
        name: registry name.
        preset: preset name; None takes the environment's default.
        pack_seed: seed of the hidden world, 0 .. 2^64-1.
        record: the fields of one data record; None takes the first training record of data seed 0.
        position: task index in the pack, 0-based.
        pack_size: tasks in the pack; None takes the environment's default.
        options: overrides of the preset's options.

    Raises:
        EnvironmentInputError: anything of the above is unknown or out of range; the message lists what
            exists.
    """
    spec = registry.get(name)
    preset, pack_size, problems = _resolve(spec, preset, pack_size)
    if not 0 <= pack_seed < 1 << 64:
        problems.append(f"pack seed is {pack_seed}; it must be an integer from 0 to 2^64-1")
        pack_seed = 0
    if not 0 <= position < pack_size:
        problems.append(f"position is {position}; a pack of {pack_size} has positions 0 to {pack_size - 1}")
        position = 0
    merged, environment = _make(spec, preset, options, problems)
    if environment is not None:
        with _noted(problems):
            environment.reset(
                TaskSpec(
                    environment=name,
                    preset=preset,
                    options=dict(options or {}),
                    record=dict(next(iter(spec.records(merged, "train", 0))) if record is None else record),
                    pack_seed=pack_seed,
                    position=position,
                    pack_size=pack_size,
                )
            )
    if problems or environment is None:
        raise EnvironmentInputError(problems)
    return {"environment": name, "hidden": environment.hidden(), "task": environment.task_view()}


def play(
    name: str,
    preset: str | None = None,
    pack_size: int | None = None,
    policy: str = "random",
    num_packs: int = 100,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
    *,
    options: Mapping[str, Any] | None = None,
    split: str = "train",
    solve_penalty: float | None = None,
    strategy: str = "cod",
) -> dict[str, Any]:
    """Let a scripted policy play one lifecycle of each of ``num_packs`` packs.

    Args:
        name: registry name.
        preset: preset name; None takes the environment's default.
        pack_size: tasks in a pack; None takes the environment's default.
        policy: a policy of the environment; every one has ``random`` and ``oracle``.
        num_packs: packs to play, each with its own hidden world.
        seed: packs and the policy's choices depend on it alone.
        on_progress: called with (packs done, packs in all) after each pack.
        options: overrides of the preset's options.
        split: ``train`` or ``held_out`` packs.
        solve_penalty: share of the reward that a success loses when it takes all steps; None takes the
            default of the configuration, so that the numbers lie on the scale of a run's curves. 0 gives raw
            rewards.
        strategy: packs of different tasks, or Ralph packs of one task again and again.

    Returns:
        ``{"reward_by_position": [{"mean", "sem"}], "episodes_per_s"}``; ``sem`` is the standard error of the
        mean, 0 for a single pack.

    Raises:
        EnvironmentInputError: unknown environment, preset, option or policy, or a number out of range.
    """
    spec = registry.get(name)
    preset, pack_size, problems = _resolve(spec, preset, pack_size)
    if policy not in spec.policies:
        known = ", ".join(sorted(spec.policies))
        problems.append(f"environment {name}: no policy {policy!r}; policies are {known}")
    if num_packs < 1:
        problems.append(f"the number of packs is {num_packs}; it must be at least 1")
    if split not in SPLITS:
        problems.append(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    if strategy not in STRATEGIES:
        problems.append(f"no pack strategy {strategy!r}; strategies are {', '.join(STRATEGIES)}")
    if seed < 0:
        problems.append(f"the seed is {seed}; it must not be negative")
    overrides = dict(options or {})
    merged, _ = _make(spec, preset, overrides, problems)
    if problems:
        raise EnvironmentInputError(problems)
    default = LifecycleConfig()
    config = LifecycleConfig(solve_penalty=default.solve_penalty if solve_penalty is None else solve_penalty)
    mixture = [EnvironmentConfig(name=name, preset=preset, options=overrides)]

    async def play_all() -> list[list[float]]:
        rewards = []
        for group in range(num_packs):
            plan = plan_pack(
                mixture, pack_size, seed, group, cast(Split, split), strategy=cast(PackStrategy, strategy)
            )
            act = spec.policies[policy](stable_seed("policy", seed, group))
            rewards.append(await _play_pack(spec.make(merged), plan, act, config))
            if on_progress is not None:
                on_progress(group + 1, num_packs)
        return rewards

    started_s = time.perf_counter()
    rewards = asyncio.run(play_all())
    elapsed_s = max(time.perf_counter() - started_s, 1e-9)
    return {
        "reward_by_position": [
            {"mean": mean, "sem": sem} for mean, sem in map(mean_and_sem, zip(*rewards, strict=True))
        ],
        "episodes_per_s": num_packs * pack_size / elapsed_s,
    }


async def _play_pack(
    environment: Environment, plan: PackPlan, act: Policy, config: LifecycleConfig
) -> list[float]:
    """Play one lifecycle and return its penalised rewards; the policy's memory lasts as long."""
    memory: dict[str, Any] = {}
    rewards = []
    for task in plan.tasks():
        observation = environment.reset(task)
        num_steps = 0
        while True:
            result = await environment.step(act(environment, observation, memory))
            num_steps += 1
            if result.is_done:
                break
            observation = result.observation
        memory["feedback"] = environment.feedback()
        reward = result.raw_reward
        if environment.is_step_penalized:
            # Scripted responses have no tokens, so their length costs nothing.
            reward = penalized_reward(reward, [0] * num_steps, environment.max_steps, config)
        rewards.append(reward)
    return rewards


def _resolve(spec: EnvironmentSpec, preset: str | None, pack_size: int | None) -> tuple[str, int, list[str]]:
    """Fill in an environment's defaults; a wrong pack size is a problem, and counts as the default."""
    problems = []
    if pack_size is not None and not 1 <= pack_size <= MAX_PACK_SIZE:
        problems.append(f"pack size is {pack_size}; it must be from 1 to {MAX_PACK_SIZE}")
        pack_size = None
    preset = spec.default_preset if preset is None else preset
    return preset, spec.default_pack_size if pack_size is None else pack_size, problems


def _make(
    spec: EnvironmentSpec, preset: str, options: Mapping[str, Any] | None, problems: list[str]
) -> tuple[dict[str, Any], Environment | None]:
    """Merge the options and make the environment, or None if they are wrong."""
    with _noted(problems):
        merged = spec.options(preset, options)
        return merged, spec.make(merged)
    return {}, None


@contextmanager
def _noted(problems: list[str]) -> Iterator[None]:
    """Add what is wrong with the input to ``problems`` instead of raising it."""
    try:
        yield
    except EnvironmentInputError as error:
        problems.extend(error.problems)
