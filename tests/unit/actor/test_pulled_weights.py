"""An actor that shares no disk with the learner: its versions come over the network."""

from __future__ import annotations

import asyncio
from pathlib import Path

import msgspec
import pytest
from actor_world import RUN, make_config, make_lease, playing, tiny_model
from pull_world import QUICK, OddSource, serving

from cod_async.actor.weights_source import FolderWeights, PulledWeights, open_weights_source
from cod_async.config.schema import WeightsConfig
from cod_async.errors import InputError
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import weights_of
from cod_async.weights.publish import publish, published_versions
from cod_async.weights.pull.cache import PullCache
from cod_async.weights.pull.client import Puller
from cod_async.wire.messages import NewVersion


def test_versions_are_pulled_then_loaded_and_the_costs_ride_on_heartbeats(tmp_path: Path) -> None:
    origin, here = tmp_path / "learner", tmp_path / "actor"
    origin.mkdir()
    here.mkdir()
    manifests = [
        publish(origin, RUN, Version(0, step), weights_of(tiny_model(origin, seed=step)), 4)
        for step in (1, 2)
    ]
    source = OddSource(origin, run=RUN)

    async def test(address: str) -> None:
        async with playing(here) as world:
            puller = Puller(PullCache(here, 2), lambda: address, patience=QUICK)
            world.worker._source = PulledWeights(here, lambda: puller)
            coordinator = world.coordinator
            await world.heartbeats()  # it has a session
            coordinator.say(NewVersion(manifest=manifests[0]))
            coordinator.give(make_lease(0, version=1))
            await world.until(lambda: len(coordinator.segments) == 5)
            for segment in coordinator.segments:
                assert {s.version for row in segment.rows for s in row.versions} == {Version(0, 1)}
            await world.heartbeats()
            assert coordinator.last.counters["weights_pulled_versions"] == 1
            assert coordinator.last.counters["weights_pulled_bytes"] == manifests[0].shards[0].num_bytes
            source.allowed = len(source.asked) + 1  # the actor ends in the middle of a pull
            coordinator.say(NewVersion(manifest=manifests[1]))
            await world.until(source.is_held.is_set)

    with serving(source) as served:
        asyncio.run(asyncio.wait_for(test(served.address), 60))
    assert published_versions(here) == [Version(0, 1)]


def test_where_weights_come_from_is_configured(tmp_path: Path) -> None:
    async def opened(**weights: str) -> object:
        config = msgspec.structs.replace(make_config(), weights=WeightsConfig(**weights))  # type: ignore[arg-type]
        source = open_weights_source(config, tmp_path, "actor-3")
        await source.aclose()
        return source

    folder = asyncio.run(opened())
    assert isinstance(folder, FolderWeights)
    assert folder.root == tmp_path
    own = asyncio.run(opened(source="pull"))
    assert isinstance(own, PulledWeights)
    assert own.root == tmp_path / "pulled" / "actor-3"
    shared = asyncio.run(opened(source="pull", cache_dir=str(tmp_path / "c"), pull_from="tcp://127.0.0.1:5"))
    assert isinstance(shared, PulledWeights)
    assert shared.root == tmp_path / "c"
    with pytest.raises(InputError, match="needs keys"):
        asyncio.run(opened(source="pull", pull_from="tcp://10.1.1.1:5"))
