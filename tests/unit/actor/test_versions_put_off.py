"""Versions and engines that take them up when they see fit."""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

import pytest
from actor_world import RUN, make_lease, playing, tiny_model

from cod_async.actor.failures import Failures
from cod_async.errors import SupersededError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import weights_of
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import publish
from cod_async.wire.messages import LeaseRef, NewVersion


def _publish(folder: Path, step: int) -> Manifest:
    return publish(folder, RUN, Version(0, step), weights_of(tiny_model(folder, seed=step)), 4)


def test_an_engine_that_puts_a_switch_off_is_told_of_newer_versions(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def test() -> None:
        announced: list[int] = []
        called: list[int] = []
        is_enough = asyncio.Event()
        async with playing(tmp_path) as world:
            update = world.engine.update_weights

            def announce(manifest: Manifest) -> None:
                announced.append(manifest.version.step)
                if manifest.version.step == 3:
                    is_enough.set()

            async def update_weights(manifest: Manifest) -> None:
                called.append(manifest.version.step)
                await is_enough.wait()
                await update(manifest)

            monkeypatch.setattr(world.engine, "announce", announce)
            monkeypatch.setattr(world.engine, "update_weights", update_weights)
            await world.until(lambda: world.coordinator.heartbeats)
            for step in (1, 2, 3):
                world.coordinator.say(NewVersion(manifest=_publish(tmp_path, step)))
                await world.until(lambda step=step: step in announced + called)
            await world.until(lambda: world.coordinator.last.engine_version == Version(0, 3))
            assert called == [1, 3] and announced == [2, 3]

    asyncio.run(asyncio.wait_for(test(), 60))


def test_a_lifecycle_goes_on_when_the_engine_got_a_version_by_itself(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            world.coordinator.give(make_lease(0, version=2))
            await world.until(
                lambda: world.coordinator.heartbeats and world.coordinator.last.held == [LeaseRef(0, 0, 0)]
            )
            world.engine.swap_weights(weights_of(tiny_model(tmp_path, seed=2)), Version(0, 2))
            await world.until(lambda: (0, 0, 4) in world.played())

    asyncio.run(asyncio.wait_for(test(), 60))


def test_announcements_do_not_undo_the_waits_of_an_engine_that_takes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    waits: list[float] = []
    tried: list[int] = []
    woken = 0

    async def test() -> None:
        nonlocal woken
        async with playing(tmp_path) as world:
            worker = world.worker
            wait = worker._wait_to_retry
            is_over = asyncio.Event()

            async def wait_to_retry(wait_s: float, failures: Failures) -> None:
                """The real waits, of which those that may not be cut end when the test says so."""
                nonlocal woken
                waits.append(wait_s)
                if failures.is_wait_cuttable:
                    await wait(60.0, failures)
                    woken += 1
                    return
                waiting = asyncio.create_task(wait(60.0, failures))
                over = asyncio.create_task(is_over.wait())
                await asyncio.wait({waiting, over}, return_when=asyncio.FIRST_COMPLETED)
                woken += waiting.done()
                waiting.cancel()
                is_over.clear()

            async def update_weights(manifest: Manifest) -> None:
                tried.append(manifest.version.step)
                raise WeightsError("no server took the new weights up: engine-0 is down")

            monkeypatch.setattr(worker, "_wait_to_retry", wait_to_retry)
            monkeypatch.setattr(world.engine, "update_weights", update_weights)
            await world.until(lambda: world.coordinator.heartbeats)
            world.coordinator.say(NewVersion(manifest=_publish(tmp_path, 1)))
            await world.until(lambda: tried == [1] and len(waits) == 1)
            world.coordinator.say(NewVersion(manifest=_publish(tmp_path, 2)))
            await world.until(lambda: tried == [1, 2] and len(waits) == 2)  # the first may be the cure
            for step in (3, 4, 5):
                world.coordinator.say(NewVersion(manifest=_publish(tmp_path, step)))
                await world.until(lambda step=step: worker._wanted.version.step == step)
            await world.heartbeats()
            assert tried == [1, 2] and woken == 1
            is_over.set()
            await world.until(lambda: len(tried) == 3)
            assert tried[2] == 5  # the newest, when the wait is over

    with caplog.at_level(logging.DEBUG, logger="cod_async.actor.worker"):
        asyncio.run(asyncio.wait_for(test(), 60))
    lines = [record for record in caplog.records if "not taken" in record.getMessage()]
    assert [record.levelno for record in lines] == [logging.WARNING, *[logging.DEBUG] * (len(lines) - 1)]
    assert waits[:3] == [0.2, 0.5, 1.0]


def test_a_pull_given_up_for_a_newer_version_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            fetched: list[int] = []
            is_announced = asyncio.Event()

            async def fetch(manifest: Manifest) -> None:
                fetched.append(manifest.version.step)
                if manifest.version.step == 1:
                    await is_announced.wait()
                    raise SupersededError("version 0.1: given up for the newer version 0.2")

            monkeypatch.setattr(world.worker._source, "fetch", fetch)
            await world.until(lambda: world.coordinator.heartbeats)
            world.coordinator.say(NewVersion(manifest=_publish(tmp_path, 1)))
            await world.until(lambda: fetched == [1])
            world.coordinator.say(NewVersion(manifest=_publish(tmp_path, 2)))
            await world.until(lambda: world.worker._wanted.version.step == 2)
            is_announced.set()
            await world.until(lambda: world.coordinator.last.engine_version == Version(0, 2))
            assert fetched == [1, 2]

    asyncio.run(asyncio.wait_for(test(), 60))
    assert "not taken" not in caplog.text
