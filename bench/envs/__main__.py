"""``python -m bench.envs``: what the environments cost an actor, without a model; one or two minutes.

Every registered environment is played by its scripted policies, pack after pack as a rollout would plan them,
each pack with a hidden world that was never met before. All combinations take turns, in several rounds, so
that a busy machine hurts all alike; times are CPU time of this process, which a busy machine changes least.
Measured are

- episodes per CPU second, policy included and planning excluded, the median over rounds: episodes per core;
- milliseconds of one ``step``, of one ``reset`` after the first, and of the policy, per call over all rounds;
- pack set-up: making the environment, starting the first task of a new world, and its first step, where an
  environment may do what it put off until then; its largest value shows what is computed once per process;
- the largest state that a segment of it carries.

The mean raw reward is printed beside them: a speed of episodes that end at once is worth nothing.
"""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from bench.kernels.measure import BASELINES, device_name, header, slug, write
from cod_async.commands.output import console_for_people
from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import EnvironmentSpec
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.seeds import stable_seed

STEP_GOAL_MS = 5.0
"""Most a step may take on one core, at the 99th percentile."""
SETUP_GOAL_MS = 1500.0
"""Most the set-up of a pack may take on one core, its first step included, at the median (the differential
equations of ``pde_discovery``, which are solved when something is measured first)."""


@dataclass
class Times:
    """What one combination of environment, preset and policy took so far; ``_ms``: CPU time per call."""

    spec: EnvironmentSpec
    preset: str
    policy: str
    num_packs: int = 0
    num_episodes: int = 0
    cpu_s: float = 0.0
    episodes_per_cpu_s: list[float] = field(default_factory=list)
    setup_ms: list[float] = field(default_factory=list)
    first_step_ms: list[float] = field(default_factory=list)
    reset_ms: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    policy_ms: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    state_bytes: int = 0


def _ms_since(began: float) -> float:
    return (time.process_time() - began) * 1e3


async def play_pack(times: Times, pack_size: int, seed: int) -> None:
    """Play one lifecycle of the next pack and note what every call took."""
    name = times.spec.name
    mixture = [EnvironmentConfig(name=name, preset=times.preset)]
    plan = plan_pack(mixture, pack_size, seed, times.num_packs)
    act = times.spec.policies[times.policy](stable_seed("policy", seed, times.num_packs))
    memory: dict[str, Any] = {}
    began = pack_began = time.process_time()
    environment = times.spec.make(times.spec.options(times.preset))
    for position, task in enumerate(plan.tasks()):
        if position:
            began = time.process_time()
        observation = environment.reset(task)
        environment.system_prompt()
        (times.reset_ms if position else times.setup_ms).append(_ms_since(began))
        while True:
            began = time.process_time()
            response = act(environment, observation, memory)
            times.policy_ms.append(_ms_since(began))
            began = time.process_time()
            result = await environment.step(response)
            is_first = len(times.first_step_ms) <= times.num_packs
            (times.first_step_ms if is_first else times.step_ms).append(_ms_since(began))
            if result.is_done:
                break
            observation = result.observation
        memory["feedback"] = environment.feedback()
        times.rewards.append(result.raw_reward)
        times.state_bytes = max(times.state_bytes, len(environment.snapshot()))
    times.cpu_s += time.process_time() - pack_began
    times.num_packs += 1
    times.num_episodes += pack_size


def play_round(times: Times, pack_size: int, seed: int, seconds: float) -> None:
    """Play packs, at least one, until the time is over."""
    # A seed of its own, so that nothing is remembered from what another policy played.
    seed = stable_seed("bench", seed, times.spec.name, times.preset, times.policy)

    async def play() -> None:
        until = time.perf_counter() + seconds
        while True:
            await play_pack(times, pack_size, seed)
            if time.perf_counter() >= until:
                return

    num_before, cpu_before_s = times.num_episodes, times.cpu_s
    asyncio.run(play())
    cpu_s = max(times.cpu_s - cpu_before_s, 1e-9)
    times.episodes_per_cpu_s.append((times.num_episodes - num_before) / cpu_s)


def quantile(values: Sequence[float], share: float) -> float | None:
    """Return the smallest value that at least ``share`` of all do not exceed; None of nothing."""
    if not values:
        return None
    return sorted(values)[max(math.ceil(share * len(values)), 1) - 1]


def summary(times: Times) -> dict[str, Any]:
    """Return one row of the report."""

    def digits(value: float | None) -> float | None:
        return None if value is None else float(f"{value:.4g}")

    setups_ms = [a + b for a, b in zip(times.setup_ms, times.first_step_ms, strict=True)]
    return {
        "environment": times.spec.name,
        "preset": times.preset,
        "policy": times.policy,
        "num_packs": times.num_packs,
        "num_episodes": times.num_episodes,
        "num_steps": len(times.first_step_ms) + len(times.step_ms),
        "episodes_per_cpu_s": digits(statistics.median(times.episodes_per_cpu_s)),
        "step_ms": {
            "median": digits(quantile(times.step_ms, 0.5)),
            "p99": digits(quantile(times.step_ms, 0.99)),
        },
        "pack_setup_ms": {
            "median": digits(quantile(setups_ms, 0.5)),
            "max": digits(max(setups_ms)),
            "first_step_median": digits(quantile(times.first_step_ms, 0.5)),
        },
        "reset_ms": {
            "median": digits(quantile(times.reset_ms, 0.5)),
            "p99": digits(quantile(times.reset_ms, 0.99)),
        },
        "policy_ms": {"median": digits(quantile(times.policy_ms, 0.5))},
        "state_bytes": times.state_bytes,
        "mean_reward": digits(statistics.fmean(times.rewards)),
    }


def _cell(value: float | None, goal: float = math.inf) -> str:
    if value is None:
        return "-"
    text = f"{value:,.0f}" if value >= 100 else f"{value:.3g}"
    return f"[bold red]{text}[/]" if value > goal else text


def show(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the report; what misses its goal is red."""
    table = Table(title="environments on one core, without a model; CPU milliseconds")
    for name in ("environment", "preset", "policy"):
        table.add_column(name, overflow="fold")
    for name in ("episodes/s", "step", "p99", "set-up", "max", "reset", "policy", "state B", "reward"):
        table.add_column(name, justify="right")
    for row in rows:
        table.add_row(
            row["environment"],
            row["preset"],
            row["policy"],
            _cell(row["episodes_per_cpu_s"]),
            _cell(row["step_ms"]["median"]),
            _cell(row["step_ms"]["p99"], STEP_GOAL_MS),
            _cell(row["pack_setup_ms"]["median"], SETUP_GOAL_MS),
            _cell(row["pack_setup_ms"]["max"]),
            _cell(row["reset_ms"]["median"]),
            _cell(row["policy_ms"]["median"]),
            str(row["state_bytes"]),
            f"{row['mean_reward']:.3f}",
        )
    console_for_people().print(table)


def combinations(names: Sequence[str], has_all_presets: bool) -> tuple[list[Times], list[str]]:
    """Return every environment with its presets and policies, and what is wrong with the others."""
    found: list[Times] = []
    problems: list[str] = []
    for name in names:
        try:
            spec = registry.get(name)
        except EnvironmentInputError as error:
            problems += error.problems
            continue
        presets = list(spec.presets) if has_all_presets else [spec.default_preset]
        found += [Times(spec, preset, policy) for preset in presets for policy in sorted(spec.policies)]
    return found, problems


def main() -> int:
    """Measure, print a table, write JSON if asked; return 2 for a name that does not exist."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.envs", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", help="environments; all registered ones by default")
    parser.add_argument("--all-presets", action="store_true", help="not only each environment's default")
    parser.add_argument("--seconds", type=float, default=1.0, help="per combination and round")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pack-size", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path(),
        help="write results, to bench/baselines/<device>/envs.json by default",
    )
    arguments = parser.parse_args()
    if arguments.rounds < 1 or arguments.pack_size < 1 or arguments.seed < 0 or not arguments.seconds >= 0:
        parser.error("--rounds and --pack-size must be at least 1, --seed and --seconds not negative")
    everything, problems = combinations(arguments.names or registry.names(), arguments.all_presets)
    if problems:
        print("\n".join(problems), file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    for _ in range(arguments.rounds):
        for times in everything:
            play_round(times, arguments.pack_size, arguments.seed, arguments.seconds)
    rows = [summary(times) for times in everything]
    show(rows)
    if arguments.json is not None:
        device = torch.device("cpu")
        path = arguments.json
        if path == Path():
            path = BASELINES / slug(device_name(device)) / "envs.json"
        settings = {name: getattr(arguments, name) for name in ("seconds", "rounds", "pack_size", "seed")}
        goals = {"step_ms_p99": STEP_GOAL_MS, "pack_setup_ms_median": SETUP_GOAL_MS}
        document = {
            "bench": "envs",
            "load": round(os.getloadavg()[0], 2),
            "settings": settings,
            "goals": goals,
        }
        write(path, header(device) | document | {"results": rows})
        print(f"written to {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
