"""Terminal's scripted policies: a solution of every type on every operating system, and the floor."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import commands
from cod_async.envs.base import TaskSpec
from cod_async.envs.terminal import SPEC
from cod_async.envs.terminal.env import TerminalSimulator
from cod_async.envs.terminal.machine import OS_NAMES
from cod_async.envs.terminal.oracle import answer, oracle_policy, solution
from cod_async.envs.terminal.recipes import COMPOSITE, SINGLE
from cod_async.envs.terminal.tasks import make_task
from cod_async.lifecycle.packs import plan_pack


def means(reply: dict[str, Any]) -> list[float]:
    return [entry["mean"] for entry in reply["reward_by_position"]]


@pytest.mark.parametrize("is_parity", [False, True])
def test_every_type_is_solved_on_every_system(is_parity: bool) -> None:
    """Three tasks of each of the 51 pairs: without one failing line, and only by the last line."""
    wanted = {(name, os): 3 for name in (*SINGLE, *COMPOSITE) for os in OS_NAMES}
    environment = TerminalSimulator(SPEC.options("default", {"parity": is_parity}))
    for seed in range(3_000):
        task = make_task(seed, 0.5)
        if wanted[task.type, task.local_os] == 0:
            continue
        wanted[task.type, task.local_os] -= 1
        environment.reset(TaskSpec("terminal", "default", {}, {"seed": seed}, 0, 0, 8))
        lines = [line for line in solution(environment) if line != "exit"]
        finishes = []
        for line in solution(environment):
            result = asyncio.run(environment.step(answer(line)))
            finishes.append(result.finish if result.is_done else None)
            if result.is_done:
                break
        assert finishes[-1] == "success" and result.raw_reward == 1.0, (task, lines)
        assert result.metrics["num_error_lines"] == 0.0 and result.metrics["early_completion"] == 1.0
        if not any(wanted.values()):
            return
    raise AssertionError(wanted)


def test_solutions_also_work_as_one_line() -> None:
    for seed in range(150):
        environment = TerminalSimulator(SPEC.options("default"))
        environment.reset(TaskSpec("terminal", "default", {}, {"seed": seed}, 0, 0, 8))
        result = asyncio.run(environment.step(answer(" && ".join(solution(environment)))))
        assert result.finish == "success", environment.task


def test_ceiling_and_floor() -> None:
    assert means(commands.play("terminal", "default", 4, "oracle", 25, 42)) == [1.0] * 4
    floor = means(commands.play("terminal", "default", 8, "random", 100, 42))
    assert sum(floor) / 8 < 0.15


def test_play_depends_on_its_seed_alone() -> None:
    first, second = (commands.play("terminal", "default", 2, "random", 20, 5) for _ in range(2))
    assert first["reward_by_position"] == second["reward_by_position"]


def test_continuing_from_every_position_equals_the_uninterrupted_run() -> None:
    plan = plan_pack([EnvironmentConfig(name="terminal", preset="default")], 4, 3, 1)

    def run(start: int, state: bytes) -> list[list[str]]:
        environment = SPEC.make(SPEC.options("default"))
        environment.restore(state)
        act, memory = oracle_policy(0), dict[str, Any]()
        played = []
        for task in plan.tasks()[start:]:
            texts = [environment.reset(task), environment.system_prompt()]
            while True:
                result = asyncio.run(environment.step(act(environment, texts[-1], memory)))
                texts.append(result.observation)
                if result.is_done:
                    break
            played.append([*texts, environment.feedback(), environment.snapshot().hex()])
        return played

    whole = run(0, b"")
    for position in range(1, 4):
        assert run(position, b"") == whole[position:]
