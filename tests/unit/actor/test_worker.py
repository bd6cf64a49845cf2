"""The actor worker over a real link: order, acks, fences, sessions, versions, the end."""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import msgspec
import pytest
from actor_world import RUN, Coordinator, make_lease, playing, same, tiny_model

from cod_async.errors import ProtocolRefusedError
from cod_async.lifecycle.segment import Segment, Version
from cod_async.models.directory import weights_of
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import publish, version_folder
from cod_async.wire.messages import Fence, LeaseRef, Leases, NewVersion, Refused, Stop

ALL = list(range(5))
"""Ordinals of a lifecycle of three tasks."""


def run(test: Coroutine[Any, Any, None]) -> None:
    asyncio.run(asyncio.wait_for(test, 60))


def _of_epoch(coordinator: Coordinator, epoch: int) -> list[Segment]:
    return [segment for segment in coordinator.segments if segment.lease_epoch == epoch]


def _publish(folder: Path, step: int) -> Manifest:
    return publish(folder, RUN, Version(0, step), weights_of(tiny_model(folder, seed=step)), 2)


# ---------------------------------------------------------------------------------------------------- playing


def test_leases_are_played_in_order_one_at_a_time(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path, actors={"lifecycles_per_process": 1}) as world:
            world.coordinator.give(*(make_lease(group) for group in range(3)))
            await world.until(lambda: len(world.coordinator.segments) == 15)
            assert world.played() == [(group, 0, ordinal) for group in range(3) for ordinal in ALL]
            assert [s.is_last for s in world.coordinator.segments] == ([False] * 4 + [True]) * 3
            assert all(request.num_lifecycles == 1 for request in world.coordinator.requests)

    run(test())


def test_a_lifecycle_continued_from_any_segment_is_the_same(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            coordinator.give(make_lease(0))
            await world.until(lambda: len(coordinator.segments) == 5)
            whole = list(coordinator.segments)
            for start in (1, 2, 3, 4):
                coordinator.give(make_lease(0, epoch=start, state=whole[start - 1].state_after))
                await world.until(lambda start=start: len(_of_epoch(coordinator, start)) == 5 - start)
                assert all(map(same, _of_epoch(coordinator, start), whole[start:]))

    run(test())


def test_at_most_one_episode_ahead_of_the_acknowledgements(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(make_lease(0))
            for num_acked in range(4):
                await world.until(lambda n=num_acked: len(coordinator.segments) == n + 2)
                await world.until_idle()
                assert len(coordinator.segments) == num_acked + 2
                assert coordinator.last.counters["open_tokens"] == 0
                coordinator.ack(limit=1)
            await world.until_idle()
            assert len(coordinator.segments) == 5

    run(test())


def test_the_outbox_has_a_ceiling_and_nothing_is_lost_at_it(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path, actors={"max_outbox_segments": 2, "lifecycles_per_process": 4}) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(*(make_lease(group) for group in range(4)))
            await world.until(lambda: len(coordinator.segments) == 2)
            await world.until_idle()
            assert len(coordinator.segments) == 2 == world.worker._client.num_unacked
            assert coordinator.last.counters["sampled_tokens"] == coordinator.last.counters["outbox_tokens"]
            coordinator.resume_acks()
            await world.until(lambda: len(coordinator.segments) == 20)
            assert sorted(world.played()) == [(group, 0, ordinal) for group in range(4) for ordinal in ALL]
            # Two in the link, and each lifecycle may hold one that waits for room.
            assert max(h.counters.get("outbox_segments", 0) for _, h in coordinator.heartbeats) <= 2 + 4

    run(test())


# --------------------------------------------------------------------------------------------- losing a lease


def test_a_fence_ends_the_lifecycle_and_makes_room(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path, actors={"lifecycles_per_process": 1}) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(make_lease(0), make_lease(1))
            await world.until(lambda: len(coordinator.segments) == 2)
            await world.until(lambda: coordinator.last.held == [LeaseRef(0, 0, 0)])
            coordinator.fence(LeaseRef(0, 0, 0))
            await world.until(lambda: len(coordinator.segments) == 4)
            coordinator.resume_acks()
            await world.until(lambda: world.played()[-1] == (1, 0, 4))
            assert [key for key in world.played() if key[0] == 0] == [(0, 0, 0), (0, 0, 1)]

    run(test())


def test_a_fence_that_overtakes_the_grant_is_remembered(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            await world.until(lambda: coordinator.requests and coordinator.sessions)
            fenced, good = make_lease(0, epoch=3), make_lease(0, 1)
            # In one turn of the link's thread: the fence is handled before the answer reaches its asker.
            link, session = coordinator._link, coordinator.sessions[-1]
            (number,) = coordinator._parked

            def grant_and_fence() -> None:
                coordinator._parked.clear()
                link.send(session, Leases(request=number, leases=[fenced, good]))
                link.send(session, Fence(leases=[fenced.ref], reason="test"))

            coordinator.do(grant_and_fence)
            await world.until(lambda: (0, 1, 4) in world.played())
            await world.heartbeats()
            assert coordinator.last.held == []
            assert {key[1] for key in world.played()} <= {0, 1}
            assert (0, 0, 1) not in world.played()

    run(test())


def test_a_dropped_segment_ends_its_lifecycle(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path, actors={"lifecycles_per_process": 1}) as world:
            coordinator = world.coordinator
            coordinator.drops[LeaseRef(0, 0, 0)] = "late_group"
            coordinator.give(make_lease(0), make_lease(1))
            await world.until(lambda: (1, 0, 4) in world.played())
            assert len([key for key in world.played() if key[0] == 0]) <= 2
            assert coordinator.returns == []

    run(test())


def test_a_replaced_session_drops_leases_and_delivers_what_was_sealed(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(make_lease(0), make_lease(1))
            await world.until(lambda: len(coordinator.segments) == 4)
            coordinator.restart(is_remembering=False)
            await world.until(lambda: len(coordinator.sessions) == 2 and len(coordinator.held_back) == 4)
            await world.heartbeats()
            session, heartbeat = coordinator.heartbeats[-1]
            assert session == coordinator.sessions[-1] and heartbeat.held == []
            coordinator.give(make_lease(0, epoch=1, state=coordinator.segments[0].state_after))
            coordinator.resume_acks()
            await world.until(lambda: len([key for key in world.played() if key[0] == 0]) == 5)
            assert len([key for key in world.played() if key[0] == 1]) == 2

    run(test())


def test_a_coordinator_that_comes_back_is_told_of_returned_leases_again(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            bad = make_lease(7)
            coordinator.give(msgspec.structs.replace(bad, preset="x"))
            await world.until(lambda: coordinator.returns)
            assert coordinator.returns[0].lease == bad.ref
            assert (
                coordinator.returns[0].reason == "infrastructure"
                and "preset" in coordinator.returns[0].detail
            )
            coordinator.restart(is_remembering=True)
            await world.until(lambda: len(coordinator.returns) == 2)
            assert coordinator.returns[1] == coordinator.returns[0]
            coordinator.give(make_lease(0))
            await world.until(lambda: len(coordinator.segments) == 5)

    run(test())


# --------------------------------------------------------------------------------------------------- versions


def test_versions_are_taken_up_and_waited_for(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            coordinator.give(make_lease(0, version=2), make_lease(1))
            await world.until(lambda: (1, 0, 4) in world.played())
            assert {key[0] for key in world.played()} == {1}
            await world.until(lambda: coordinator.last.held == [LeaseRef(0, 0, 0)])
            for step in (1, 2):
                coordinator.say(NewVersion(manifest=_publish(tmp_path, step)))
            await world.until(lambda: (0, 0, 4) in world.played())
            for segment in coordinator.segments:
                expected = 2 if segment.key.group == 0 else 0
                assert {s.version for row in segment.rows for s in row.versions} == {Version(0, expected)}
            await world.until(lambda: coordinator.last.engine_version == Version(0, 2))

    run(test())


def test_a_version_that_cannot_be_loaded_is_skipped_for_a_newer_one(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            await world.until(lambda: coordinator.heartbeats)
            gone = _publish(tmp_path, 1)
            for path in (tmp_path / version_folder(Version(0, 1))).iterdir():
                path.unlink()
            coordinator.say(NewVersion(manifest=gone))
            await world.heartbeats(4)
            assert coordinator.last.engine_version == Version(0, 0)
            coordinator.say(NewVersion(manifest=_publish(tmp_path, 2)))
            await world.until(lambda: coordinator.last.engine_version == Version(0, 2))
            coordinator.give(make_lease(0, version=2))
            await world.until(lambda: (0, 0, 4) in world.played())

    run(test())


# ---------------------------------------------------------------------------------------------------- the end


def test_stop_delivers_what_is_sealed_and_says_bye(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(*(make_lease(group) for group in range(3)))
            await world.until(lambda: len(coordinator.segments) == 6)
            coordinator.say(Stop(reason="enough"))
            await world.until(lambda: coordinator.last.held == [])
            assert not world.task.done()
            coordinator.resume_acks()
            assert await world.ended() == 0
            await world.until(lambda: coordinator.byes)
            (bye,) = coordinator.byes
            assert bye.counters["sealed_segments"] == len(coordinator.settled) == 6
            assert coordinator.returns == []

    run(test())


@pytest.mark.parametrize("is_told_by_signal", [False, True])
def test_what_waits_for_room_is_delivered_before_the_end(tmp_path: Path, is_told_by_signal: bool) -> None:
    async def test() -> None:
        async with playing(tmp_path, actors={"max_outbox_segments": 1}) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(*(make_lease(group) for group in range(3)))
            await world.until_idle()
            sealed = coordinator.last.counters["sealed_segments"]
            assert sealed > 1 == len(coordinator.segments)
            if is_told_by_signal:
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                coordinator.say(Stop(reason="enough"))
            await world.until(lambda: coordinator.last.held == [])
            coordinator.resume_acks()
            assert await world.ended() == 0
            await world.until(lambda: coordinator.byes)
            assert len(coordinator.segments) == len(coordinator.settled) == sealed
            assert coordinator.byes[0].counters["sealed_segments"] == sealed
            assert len(coordinator.returns) == (3 if is_told_by_signal else 0)

    run(test())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_returns_leases_delivers_and_says_bye(tmp_path: Path, number: signal.Signals) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(make_lease(0), make_lease(1))
            await world.until(lambda: len(coordinator.segments) == 4)
            os.kill(os.getpid(), number)
            await world.until(lambda: len(coordinator.returns) == 2)
            assert {(r.lease, r.reason) for r in coordinator.returns} == {
                (LeaseRef(0, 0, 0), "draining"),
                (LeaseRef(1, 0, 0), "draining"),
            }
            coordinator.resume_acks()
            assert await world.ended() == 0
            await world.until(lambda: coordinator.byes)
            assert len(coordinator.settled) == 4

    run(test())


def test_a_silent_coordinator_does_not_hold_the_end_up(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path, run={"grace_s": 0.6}) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(make_lease(0))
            await world.until(lambda: len(coordinator.segments) == 2)
            await world.until(lambda: coordinator.last.counters.get("outbox_segments") == 2)
            coordinator.say(Stop(reason="enough"))
            assert await world.ended() == 0
            await world.until(lambda: coordinator.byes)
            counters = coordinator.byes[0].counters
            assert counters["discarded_segments_undelivered"] == 2

    run(test())


def test_a_fatal_refusal_ends_the_actor_with_its_reason(tmp_path: Path) -> None:
    async def test() -> None:
        async with playing(tmp_path) as world:
            coordinator = world.coordinator
            coordinator.is_acking = False
            coordinator.give(make_lease(0), make_lease(1))
            await world.until(lambda: len(coordinator.segments) == 4)
            coordinator.say(Refused(code="quarantined", detail="no more", is_fatal=True))
            with pytest.raises(ProtocolRefusedError, match="quarantined: no more"):
                await world.ended()
            left = [repr(task.get_coro()) for task in asyncio.all_tasks() if not task.done()]
            assert not [name for name in left if "Worker" in name or "Engine" in name], left

    run(test())
