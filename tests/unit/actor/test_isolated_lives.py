"""An actor whose environment, from another package, lives in worker processes and misbehaves there."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from actor_world import make_lease, playing
from third_party import NAME, install, order

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import registry
from cod_async.wire.messages import LeaseRef


def run(test: Coroutine[Any, Any, None]) -> None:
    async def whole() -> None:
        before = set(psutil.Process().children(recursive=True))
        await asyncio.wait_for(test, 60)
        assert set(psutil.Process().children(recursive=True)) <= before

    asyncio.run(whole())


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield install(tmp_path / "site", monkeypatch)
    registry.forget()


def faulty(commands: Path, *, step_timeout_s: float = 60.0, **options: Any) -> EnvironmentConfig:
    return EnvironmentConfig(
        name=NAME,
        preset="door",
        options={"commands": str(commands), **options},
        step_timeout_s=step_timeout_s,
        memory_bytes=512 << 20,
        num_workers=1,
    )


@pytest.mark.parametrize(
    ("fault", "reason"), [("hang", "timeout"), ("memory", "memory"), ("crash", "died"), ("raise", "")]
)
def test_what_breaks_is_played_again_and_nobody_is_scored(
    fault: str, reason: str, tmp_path: Path, commands: Path
) -> None:
    async def test() -> None:
        # Only what hangs needs a short limit; filling memory can take seconds on a busy machine.
        environment = faulty(commands, step_timeout_s=1.0 if fault == "hang" else 60.0)
        leases = [make_lease(group, environment=environment) for group in range(3)]
        async with playing(tmp_path, environment) as world:
            order(commands, "step", fault)
            world.coordinator.give(*leases)
            await world.until(lambda: len(world.coordinator.segments) == 15)
            await world.heartbeats()
            assert not list(commands.glob("step.*"))  # it did happen
            assert sorted(world.played()) == [(g, 0, ordinal) for g in range(3) for ordinal in range(5)]
            assert world.coordinator.returns == []
            # Segments are the policy's alone: each task was finished by a press or by a format error.
            assert {s.finish for s in world.coordinator.segments} <= {
                "success",
                "format_error",
                "out_of_steps",
            }
            counters = world.coordinator.last.counters
            assert counters["discarded_tokens_infrastructure"] > 0
            lost = {name: n for name, n in counters.items() if name.startswith("environment_workers_lost")}
            assert lost == ({f"environment_workers_lost_{reason}": 1.0} if reason else {})
            assert counters["environment_workers_started"] == 1 + len(lost)

    run(test())


def test_one_that_keeps_breaking_is_given_back(tmp_path: Path, commands: Path) -> None:
    async def test() -> None:
        environment = faulty(commands)
        async with playing(tmp_path, environment, actors={"lifecycles_per_process": 1}) as world:
            order(commands, "reset", "crash", 3)  # two retries are allowed
            world.coordinator.give(*(make_lease(group, environment=environment) for group in range(2)))
            await world.until(lambda: (1, 0, 4) in world.played())
            (returned,) = world.coordinator.returns
            assert returned.lease == LeaseRef(0, 0, 0) and returned.reason == "infrastructure"
            assert "ended by itself" in returned.detail
            assert all(key[0] == 1 for key in world.played())

    run(test())


@pytest.mark.parametrize("is_first", [True, False])
def test_without_snapshots_a_failure_after_the_first_segment_gives_the_lease_back(
    is_first: bool, tmp_path: Path, commands: Path
) -> None:
    async def test() -> None:
        environment = faulty(commands, is_resumable=False)
        lease = make_lease(0, environment=environment)
        async with playing(tmp_path, environment) as world:
            if is_first:
                order(commands, "reset", "raise")
                world.coordinator.give(lease)
                await world.until(lambda: len(world.played()) == 5)
                assert world.coordinator.returns == []
            else:
                order(commands, "feedback", "raise")  # of the second task, at the earliest
                (commands / "feedback.raise.0").rename(commands / "later")
                world.coordinator.is_acking = False
                world.coordinator.give(lease)
                await world.until(lambda: len(world.played()) == 2)
                (commands / "later").rename(commands / "feedback.raise.0")
                world.coordinator.resume_acks()
                await world.until(lambda: world.coordinator.returns)
                assert len(world.played()) == 2
                assert "OSError" in world.coordinator.returns[0].detail

    run(test())
