"""Lifecycles that fail for reasons that are not the policy's."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec
import pytest
from actor_world import make_lease, playing

from cod_async.actor.meter import Meter, MeteredEngine
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.envs import registry
from cod_async.envs.base import StepResult
from cod_async.envs.hidden_buttons import SPEC
from cod_async.envs.hidden_buttons.env import HiddenButtons
from cod_async.lifecycle.segment import Version, VersionSpan
from cod_async.wire.messages import LeaseRef


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


class Flaky(HiddenButtons):
    """Fails the next ``num_failures`` steps, or when it is made, or carries too much state."""

    num_failures: ClassVar[int] = 0
    num_made: ClassVar[int] = 0
    num_broken_makes: ClassVar[int] = 0
    num_snapshot_bytes: ClassVar[int] = 0

    def __init__(self, options: Mapping[str, Any]) -> None:
        super().__init__(options)
        Flaky.num_made += 1
        if Flaky.num_made <= Flaky.num_broken_makes:
            raise KeyError("broken")

    async def step(self, response: str) -> StepResult:
        if Flaky.num_failures > 0:
            Flaky.num_failures -= 1
            raise OSError("the simulator died")
        return await super().step(response)

    def snapshot(self) -> bytes:
        return b"x" * Flaky.num_snapshot_bytes


@pytest.fixture(autouse=True)
def flaky(monkeypatch: pytest.MonkeyPatch) -> type[Flaky]:
    spec = msgspec.structs.replace(SPEC, make=Flaky)
    monkeypatch.setattr(registry, "get", lambda name: spec)
    for name in ("num_failures", "num_made", "num_broken_makes", "num_snapshot_bytes"):
        monkeypatch.setattr(Flaky, name, 0)
    return Flaky


def test_a_failing_episode_is_retried_in_a_fresh_environment(tmp_path: Path, flaky: type[Flaky]) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            flaky.num_failures = 2
            world.coordinator.give(make_lease(0))
            await world.until(lambda: (0, 0, 4) in world.played())
            assert flaky.num_made == 3
            assert world.played() == [(0, 0, ordinal) for ordinal in range(5)]
            assert world.coordinator.returns == []
            await world.heartbeats()
            assert world.coordinator.last.counters["discarded_tokens_infrastructure"] > 0

    run(test())


def test_an_episode_that_keeps_failing_gives_the_lease_back(tmp_path: Path, flaky: type[Flaky]) -> None:
    async def test() -> None:
        async with playing(tmp_path, actors={"lifecycles_per_process": 1}) as world:
            flaky.num_failures = 3  # two retries are allowed
            world.coordinator.give(make_lease(0), make_lease(1))
            await world.until(lambda: (1, 0, 4) in world.played())
            (returned,) = world.coordinator.returns
            assert returned.lease == LeaseRef(0, 0, 0) and returned.reason == "infrastructure"
            assert "OSError: the simulator died" in returned.detail
            assert all(key[0] == 1 for key in world.played())

    run(test())


@pytest.mark.parametrize(("num_broken", "is_given_back"), [(2, False), (3, True)])
def test_an_environment_that_cannot_be_made_is_a_failure_of_its_lease_only(
    tmp_path: Path, flaky: type[Flaky], num_broken: int, is_given_back: bool
) -> None:
    async def test() -> None:
        async with playing(tmp_path, actors={"lifecycles_per_process": 1}) as world:
            flaky.num_broken_makes = num_broken
            world.coordinator.give(make_lease(0), make_lease(1))
            await world.until(lambda: (1, 0, 4) in world.played())
            assert bool(world.coordinator.returns) == is_given_back
            assert ((0, 0, 4) in world.played()) != is_given_back

    run(test())


def test_a_segment_that_can_never_be_sent_gives_the_lease_back(tmp_path: Path, flaky: type[Flaky]) -> None:
    async def test() -> None:
        async with playing(
            tmp_path, transport={"max_message_bytes": 4096}, actors={"lifecycles_per_process": 1}
        ) as world:
            flaky.num_snapshot_bytes = 5000
            world.coordinator.give(make_lease(0))
            await world.until(lambda: world.coordinator.returns)
            flaky.num_snapshot_bytes = 0
            assert world.coordinator.returns[0].detail.startswith("too_large")
            await world.heartbeats()
            assert world.coordinator.last.counters["discarded_segments_undeliverable"] == 1
            world.coordinator.give(make_lease(1))
            await world.until(lambda: (1, 0, 4) in world.played())

    run(test())


@pytest.mark.parametrize("records", [("[]",), ("{",), ()])
def test_a_lease_that_is_no_lease_is_given_back(tmp_path: Path, records: tuple[str, ...]) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            world.coordinator.give(
                msgspec.structs.replace(make_lease(0), records_json=records), make_lease(1)
            )
            await world.until(lambda: world.coordinator.returns and (1, 0, 4) in world.played())
            assert world.coordinator.returns[0].lease == LeaseRef(0, 0, 0)

    run(test())


class CountingEngine:
    """Samples as many tokens as it is asked for."""

    version = Version(0, 0)
    max_context_tokens = 64

    def __init__(self) -> None:
        self.counters = EngineCounters()

    async def generate(
        self, token_ids: object, params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        n = params.max_tokens
        self.counters.sampled_tokens += n
        return Completion([1] * n, [-1.0] * n, (VersionSpan(self.version, n),), "stop")


def test_meter_follows_every_token() -> None:
    async def test() -> None:
        engine = CountingEngine()
        engine.counters.sampled_tokens = 100  # before this worker
        meter = Meter(engine)  # type: ignore[arg-type]
        one, two = (MeteredEngine(engine, meter) for _ in range(2))  # type: ignore[arg-type]

        counters = meter.counters

        def ask(num_tokens: int) -> SamplingParams:
            return SamplingParams(max_tokens=num_tokens, stop_ids=frozenset())

        await one.generate([1], ask(5))
        await two.generate([1], ask(7))
        engine.counters.sampled_tokens += 3  # a request that runs now
        assert (counters()["sampled_tokens"], counters()["open_tokens"]) == (15.0, 15.0)
        engine.counters.aborted_tokens += 3
        assert (counters()["aborted_tokens"], counters()["open_tokens"]) == (3.0, 12.0)
        two.discard("cancelled")
        two.discard("cancelled")
        assert (counters()["discarded_tokens_cancelled"], counters()["open_tokens"]) == (7.0, 5.0)
        assert one.open_tokens == 5 and two.open_tokens == 0

    asyncio.run(test())
