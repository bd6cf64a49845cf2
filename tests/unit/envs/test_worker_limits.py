"""Environments behind limits: whatever they do, it is an infrastructure failure of the right episodes."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
from third_party import NAME, install, order

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import Playable, StepResult, TaskSpec
from cod_async.envs.worker import WorkerPool, make_environment, process, settings_for
from cod_async.errors import EnvironmentInputError, InfrastructureError

LIMIT_S = 1.0
MEMORY_BYTES = 512 << 20


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield install(tmp_path / "site", monkeypatch)
    registry.forget()


def task(commands: Path | str, **options: Any) -> TaskSpec:
    spec = registry.get(NAME)
    merged = {"commands": str(commands), **options}
    record = next(iter(spec.records(spec.options("door"), "train", 0)))
    return TaskSpec(NAME, "door", merged, record, pack_seed=3, position=0, pack_size=3)


def settings(**changes: Any) -> tuple[EnvironmentConfig]:
    values = {"step_timeout_s": LIMIT_S, "memory_bytes": MEMORY_BYTES, "num_workers": 1} | changes
    return (EnvironmentConfig(name=NAME, preset="door", **values),)


@asynccontextmanager
async def pool_of() -> AsyncIterator[WorkerPool]:
    pool = WorkerPool()
    try:
        yield pool
    finally:
        await pool.aclose()


def run(test: Callable[[WorkerPool], Awaitable[None]]) -> None:
    """Run a test with a pool, after which no child process is left."""

    async def whole() -> None:
        before = set(psutil.Process().children(recursive=True))
        async with pool_of() as pool:
            await asyncio.wait_for(test(pool), 60)
        assert set(psutil.Process().children(recursive=True)) <= before

    asyncio.run(whole())


async def play(environment: Playable, told: TaskSpec, state: bytes = b"") -> tuple[Any, ...]:
    opening = await environment.start(told, state)
    results: list[StepResult] = []
    while not results or not results[-1].is_done:
        results.append(await environment.step(f"Up : {len(results) + 1}"))
    return opening, results, await environment.finish([("user", opening.observation)], True)


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_both_ways_give_the_same(isolation: str, commands: Path) -> None:
    async def test(pool: WorkerPool) -> None:
        told = task("", has_prompts=True)
        environment = await make_environment(told, settings(isolation=isolation), pool)
        direct = registry.get(NAME).make(registry.get(NAME).options("door", told.options))
        assert (environment.name, environment.prompt_style) == (NAME, "terse")
        assert environment.is_resumable and environment.is_step_penalized
        assert environment.snapshot() == direct.snapshot() == b"\x010"
        prompts = environment.update_prompts()
        assert prompts is not None and prompts.initial == "[ none yet ]"
        for state in (b"", b"\x015"):
            assert await play(environment, told, state) == await play(direct, told, state)
        assert environment.snapshot() == direct.snapshot() == b"\x016"
        await environment.close()
        assert bool(pool.pids()) == (isolation == "process")

    run(test)


def test_who_is_isolated(commands: Path) -> None:
    async def test(pool: WorkerPool) -> None:
        assert registry.get(NAME).needs_limits  # it is of another package and says nothing
        assert not registry.get("hidden_buttons").needs_limits
        await make_environment(task(""), settings(isolation="inline"), pool)
        ours = TaskSpec("hidden_buttons", "door", {}, {"seed": 0}, 0, 0, 1)
        await make_environment(ours, (), pool)
        assert pool.pids() == []
        await make_environment(task(""), settings(), pool)
        await make_environment(task(""), (), pool)  # without configuration (evaluation): the defaults
        assert len(pool.pids()) == 2  # other limits, another worker

    run(test)


def test_settings_of_a_task() -> None:
    one, two, three = (
        EnvironmentConfig(name=name, preset=preset, options=options)
        for name, preset, options in [("a", "x", {}), ("a", "x", {"n": 1}), ("b", "x", {})]
    )
    told = TaskSpec("a", "x", {"n": 1}, {}, 0, 0, 1)
    assert settings_for((one, two, three), told) is two
    assert settings_for((one, three), told) is one
    assert settings_for((three,), told) == EnvironmentConfig(name="a", preset="x", options={"n": 1})


@pytest.mark.parametrize("isolation", ["inline", "process"])
def test_what_it_raises_fails_its_own_episode_only(isolation: str, commands: Path) -> None:
    faults = [
        ("make", "raise", "OSError: the simulator died"),
        ("reset", "raise", "OSError: the simulator died"),
        ("feedback", "raise", "OSError: the simulator died"),
        ("step", "raise", "OSError: the simulator died"),
        ("step", "exit", "SystemExit: 3"),
        ("step", "type", "observation is a NoneType"),
        ("step", "finish", "finish is 'bored'"),
    ]

    async def test(pool: WorkerPool) -> None:
        told = task(commands)
        other = await make_environment(told, settings(isolation=isolation), pool)
        await other.start(told, b"")
        for place, fault, words in faults:
            order(commands, place, fault)
            with pytest.raises(InfrastructureError, match=words):
                await play(await make_environment(told, settings(isolation=isolation), pool), told)
            assert not list(commands.glob("*.*"))
        await other.step("Up : 1")
        assert not any("lost" in name for name in pool.counters())

    run(test)


def test_input_errors_come_through_as_such(commands: Path) -> None:
    async def test(pool: WorkerPool) -> None:
        environment = await make_environment(task(commands), settings(), pool)
        order(commands, "reset", "input")
        with pytest.raises(EnvironmentInputError) as caught:
            await environment.start(task(commands), b"")
        assert caught.value.problems == ("the record is odd", "and so is the preset")
        with pytest.raises(EnvironmentInputError, match="unknown option"):
            await make_environment(task(commands, nonsense=1), settings(), pool)

    run(test)


def test_what_cannot_be_sent_is_said(commands: Path) -> None:
    async def test(pool: WorkerPool) -> None:
        environment = await make_environment(task(commands), settings(), pool)
        await environment.start(task(commands), b"")
        order(commands, "step", "surrogate")
        with pytest.raises(InfrastructureError, match="cannot be sent"):
            await environment.step("Up : 1")

    run(test)


@pytest.mark.parametrize(
    ("place", "fault", "reason", "words"),
    [
        ("step", "hang", "timeout", "a step took longer than 1 s"),
        ("step", "wait", "timeout", "a step took longer than 1 s"),
        ("feedback", "hang", "timeout", "ending a task took longer than 1 s"),
        ("step", "memory", "memory", "ran out of memory"),
        ("step", "crash", "died", "ended by itself"),
    ],
)
def test_what_ends_a_worker_costs_each_lifecycle_in_it_one_episode(
    place: str, fault: str, reason: str, words: str, commands: Path
) -> None:
    async def test(pool: WorkerPool) -> None:
        limit_s = 60.0 if reason != "timeout" else LIMIT_S  # filling memory takes its time on a busy machine
        told, wanted = task(commands), settings(step_timeout_s=limit_s)
        one, other = [await make_environment(told, wanted, pool) for _ in range(2)]
        (before,) = pool.pids()
        *_, closing = await play(other, told)
        await other.start(told, closing.snapshot)
        order(commands, place, fault)
        with pytest.raises(InfrastructureError, match=words):
            await play(one, told)
        with pytest.raises(InfrastructureError, match=r"worker has ended|worker \d+ was lost"):
            await other.step("Up : 1")
        again = await make_environment(told, wanted, pool)  # from the last sealed state, on another worker
        *_, closing = await play(again, told, closing.snapshot)
        assert closing.snapshot == b"\x012"
        assert pool.counters() == {
            "environment_workers_started": 2.0,
            f"environment_workers_lost_{reason}": 1.0,
        }
        (after,) = pool.pids()
        assert after != before and not psutil.pid_exists(before)

    run(test)


def test_the_whole_tree_is_killed(commands: Path) -> None:
    async def test(pool: WorkerPool) -> None:
        environment = await make_environment(task(commands), settings(), pool)
        await environment.start(task(commands), b"")
        order(commands, "step", "daemon")
        with pytest.raises(InfrastructureError, match="took longer"):
            await environment.step("Up : 1")
        gone = [int(pid) for pid in (commands / "pids").read_text().split()]
        assert len(gone) == 3
        await until_gone(gone)

    run(test)


def test_an_actor_that_is_killed_leaves_nobody_behind(commands: Path) -> None:
    """Its worker hangs and has a child: the kernel ends both when the actor's end of a pipe closes."""
    code = f"""
import asyncio
from pathlib import Path
from cod_async.envs.base import TaskSpec
from cod_async.envs.worker import WorkerPool, make_environment
commands = {str(commands)!r}
told = TaskSpec({NAME!r}, "door", {{"commands": commands}}, {{"seed": 0}}, 0, 0, 1)
async def main():
    environment = await make_environment(told, (), WorkerPool())
    (Path(commands) / "reset.daemon.1").touch()
    await environment.start(told, b"")
asyncio.run(main())
"""
    paths = os.pathsep.join([str(commands.parent), *sys.path])
    actor = subprocess.Popen([sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": paths})

    async def wait() -> None:
        while not (commands / "pids").exists():
            assert actor.poll() is None
            await asyncio.sleep(0.01)
        actor.send_signal(signal.SIGKILL)
        actor.wait()
        worker, child, _ = (int(pid) for pid in (commands / "pids").read_text().split())
        await until_gone([worker, child])
        os.kill(int((commands / "pids").read_text().split()[2]), signal.SIGKILL)  # had left its group

    asyncio.run(asyncio.wait_for(wait(), 60))


async def until_gone(pids: list[int]) -> None:
    """Wait until processes that were killed are; the test's time limit is the bound."""

    def lives(pid: int) -> bool:
        try:
            return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return False

    while any(map(lives, pids)):
        await asyncio.sleep(0.01)


def test_waiting_for_others_does_not_count(commands: Path) -> None:
    """Eight steps of 0.15 s in one worker: the last is answered after the limit, and took a part of it."""

    async def test(pool: WorkerPool) -> None:
        environments = [await make_environment(task(commands), settings(), pool) for _ in range(8)]
        for environment in environments:
            await environment.start(task(commands), b"")
        order(commands, "step", "slow", 8)
        await asyncio.gather(*(environment.step("Up : 1") for environment in environments))
        assert pool.counters() == {"environment_workers_started": 1.0}

    run(test)


def test_a_lifecycle_that_is_called_off_stops_its_step(commands: Path) -> None:
    async def test(pool: WorkerPool) -> None:
        one, other = [await make_environment(task(commands), settings(), pool) for _ in range(2)]
        for environment in (one, other):
            await environment.start(task(commands), b"")
        order(commands, "step", "wait")
        step = asyncio.create_task(one.step("Up : 1"))
        while list(commands.glob("step.*")):
            await asyncio.sleep(0.005)
        step.cancel()
        with pytest.raises(asyncio.CancelledError):
            await step
        await one.close()
        await one.close()
        (worker,) = pool._workers[NAME, MEMORY_BYTES]
        while worker._pending or not list(commands.glob("closed-*")):
            await asyncio.sleep(0.005)
        assert worker.num_instances == 1 and worker.end is None
        assert (await other.step("Up : 1")).observation

    run(test)


def test_a_worker_that_says_nothing_is_hung(commands: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def test(pool: WorkerPool) -> None:
        environment = await make_environment(task(commands), settings(), pool)
        monkeypatch.setattr(process, "QUIET_S", 0.2)
        (pid,) = pool.pids()
        os.kill(pid, signal.SIGSTOP)
        with pytest.raises(InfrastructureError, match="said nothing"):
            await environment.start(task(commands), b"")
        assert pool.counters()["environment_workers_lost_timeout"] == 1

    run(test)


def test_lifecycles_are_spread_over_the_workers_that_are_allowed(commands: Path) -> None:
    async def test(pool: WorkerPool) -> None:
        made = [await make_environment(task(commands), settings(num_workers=2), pool) for _ in range(5)]
        loads = sorted(worker.num_instances for worker in pool._workers[NAME, MEMORY_BYTES])
        assert loads == [2, 3]
        for environment in made:
            await environment.close()
        assert [worker.num_instances for worker in pool._workers[NAME, MEMORY_BYTES]] == [0, 0]
        await pool.aclose()  # which lets environments that are still open close themselves
        with pytest.raises(InfrastructureError, match="were closed"):
            await make_environment(task(commands), settings(), pool)
        assert len(list(commands.glob("closed-*"))) == 5

    run(test)


def test_inline_steps_that_await_too_long_are_cancelled(commands: Path) -> None:
    async def test(pool: WorkerPool) -> None:
        limits = settings(isolation="inline", step_timeout_s=0.05)
        environment = await make_environment(task(commands), limits, pool)
        await environment.start(task(commands), b"")
        order(commands, "step", "wait")
        with pytest.raises(InfrastructureError, match=r"a step took longer than 0.05 s"):
            await environment.step("Up : 1")

    run(test)
