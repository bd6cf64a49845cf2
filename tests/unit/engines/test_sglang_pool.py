"""Several servers: who gets which request, and what happens when one of them dies, hangs or lags."""

from __future__ import annotations

import asyncio
import random
from contextlib import AsyncExitStack, suppress
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cod_async.actor.meter import Meter, MeteredEngine
from cod_async.engines.sglang import slot
from cod_async.engines.sglang.affinity import Affinity, Load, lifecycle_of
from cod_async.errors import EngineError, WeightsError
from cod_async.lifecycle.segment import Version

from .sglang_helpers import World, make_config, params, prompt_of, run, until, world


def session(group: int, member: int, ordinal: int = 0) -> str:
    return f"run/g{group}.m{member}.e1.o{ordinal}"


def test_sessions_name_their_lifecycle_and_group() -> None:
    assert lifecycle_of("a/g3.m4.e5.o6") == ("a/g3.m4", "a/g3")
    assert lifecycle_of("a/g3.m4.e9.o1") == ("a/g3.m4", "a/g3")
    assert lifecycle_of("something else") == ("something else", None)


def test_affinity_keeps_lifecycles_and_groups_together_while_there_is_room() -> None:
    affinity = Affinity(100)
    loads = {"a": Load(0, 0), "b": Load(0, 0)}
    both = ("a", "b")
    home = affinity.place(session(1, 0), loads, serving=both, room=2)
    assert home is not None
    other = "b" if home == "a" else "a"
    loads[home] = Load(1, 1)
    assert affinity.place(session(1, 1), loads, serving=both, room=2) == home
    loads[home] = Load(2, 2)
    assert affinity.place(session(1, 2), loads, serving=both, room=2) == other  # no room
    assert affinity.place(session(1, 0, 5), loads, serving=both, room=2) == home  # a lifecycle stays
    # Its server holds new sessions back: it goes elsewhere if there is room, else it waits.
    loads = {other: Load(2, 2)}
    assert affinity.place(session(1, 0, 6), loads, serving=both, room=2) is None
    assert affinity.place(session(1, 0, 6), loads, serving=(other,), room=2) == other  # it is gone
    assert (
        affinity.place(session(1, 0, 7), {home: Load(0, 0), other: Load(1, 0)}, serving=both, room=2) == other
    )
    assert affinity.place(session(9, 9), {}, serving=both, room=2) is None
    assert affinity.place(None, {"a": Load(0, 3), "b": Load(9, 2)}, serving=both, room=1) == "b"


def test_affinity_is_bounded() -> None:
    affinity = Affinity(10)
    for number in range(1000):
        affinity.place(session(number, 0), {"a": Load(0, 0)}, serving=("a",), room=2)
    assert len(affinity._lifecycles) == len(affinity._groups) == 10


def test_lifecycles_stay_and_hit_the_cache(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 3, actors={"lifecycles_per_process": 12}) as made:
            engine = made.engine
            places: dict[int, set[int]] = {}

            async def live(group: int, member: int) -> None:
                for ordinal in range(3):
                    row = prompt_of(group, 40)
                    for _ in range(3):
                        name = session(group, member, ordinal)
                        completion = await engine.generate(row, params(6), session=name)
                        made.check(row, completion)
                        row = [*row, *completion.token_ids, 5]
                    await engine.close_session(session(group, member, ordinal))

            await asyncio.gather(*(live(group, member) for group in range(3) for member in range(4)))
            for number, server in enumerate(made.servers):
                for body in server.bodies("/generate"):
                    group = next(g for g in range(3) if body["input_ids"][:40] == prompt_of(g, 40))
                    places.setdefault(group, set()).add(number)
            assert sum(len(body.bodies("/generate")) for body in made.servers) == 3 * 4 * 9
            extra = engine.extra_counters
            # Two turns of three extend a row; the rest begin as their group did.
            assert extra["cached_tokens"] / extra["prompt_tokens"] > 0.8
            assert all(len(where) <= 2 for where in places.values())

    run(main())


def test_a_server_dies_in_the_middle_and_another_takes_over(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 2, token_s=0.001) as made:
            engine = made.engine
            tasks = [
                asyncio.create_task(engine.generate(prompt_of(i), params(80), session=session(i, 0)))
                for i in range(6)
            ]
            await until(lambda: all(len(server.running) >= 2 for server in made.servers))
            victim = made.servers[0]
            num_running = len(victim.running)
            await victim.stop_listening()
            completions = await asyncio.gather(*tasks)
            for number, completion in enumerate(completions):
                made.check(prompt_of(number), completion)
                assert len(completion.token_ids) == 80
            assert engine.extra_counters["num_request_retries"] == num_running
            await until(lambda: made.slot(0).state == "down")
            assert engine.extra_counters["num_servers_lost"] == 1
            asked = sum(len(server.bodies("/generate")) for server in made.servers)
            assert asked == 6 + num_running
            assert engine.counters.sampled_tokens - engine.counters.aborted_tokens == 6 * 80
            # Sessions went along, and go on where they are now.
            row = [*prompt_of(0), *completions[0].token_ids]
            made.check(row, await engine.generate(row, params(5), session=session(0, 0)))

    run(main())


@pytest.mark.parametrize("how", ["is_hung", "is_wedged"])
def test_a_wedged_server_is_given_up(tmp_path: Path, how: str) -> None:
    async def main() -> None:
        quick = {"probe_timeout_s": 0.05, "control_timeout_s": 0.2}
        async with world(tmp_path, 2, token_s=0.001, server=quick) as made:
            engine, victim = made.engine, made.servers[0]
            tasks = [
                asyncio.create_task(engine.generate(prompt_of(i), params(60), session=session(i, 0)))
                for i in range(4)
            ]
            await until(lambda: all(server.running for server in made.servers))
            setattr(victim.faults, how, True)
            victim.faults.stall_after_tokens = 0
            for number, completion in enumerate(await asyncio.gather(*tasks)):
                made.check(prompt_of(number), completion)
            assert made.slot(0).state == "down" and "probes" in made.slot(0).trouble
            await engine.update_weights(made.publish(1))
            setattr(victim.faults, how, False)
            victim.faults.stall_after_tokens = None
            await made.until_up(0)  # it came to itself, and was brought up to date
            assert made.slot(0).version == Version(0, 1)

    run(main())


def test_a_server_comes_back_elsewhere_with_other_keys_and_old_weights(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 1) as made, AsyncExitStack() as stack:
            engine = made.engine
            await engine.update_weights(made.publish(1))
            await made.servers[0].stop_listening()
            waiting = asyncio.create_task(engine.generate(prompt_of(1), params(4)))
            await until(lambda: made.slot().state == "down")
            made.records[0] = made.records[0].__class__(
                name="engine-0", url="http://127.0.0.1:9", state="starting"
            )
            new = await made.add(stack, api_key="new", admin_key="newer")
            made.records[0] = made.record(new, "engine-0", instance="2")
            del made.records[1]
            completion = await waiting
            assert completion.versions[0].version == Version(0, 1)  # verified, not what it came up with
            made.check(prompt_of(1), completion)
            assert new.label == "L0-S1"

    run(main())


def test_another_server_behind_the_record_replaces_a_healthy_one(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 1, token_s=0.001) as made, AsyncExitStack() as stack:
            task = asyncio.create_task(made.engine.generate(prompt_of(1), params(200)))
            await made.servers[0].until_tokens(2)
            new = await made.add(stack, api_key="new", admin_key="newer")
            made.records[:] = [made.record(new, "engine-0", instance="2")]
            made.check(prompt_of(1), await task)
            assert new.bodies("/generate")

    run(main())


def test_a_server_that_starts_later_joins(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 1) as made, AsyncExitStack() as stack:
            await made.engine.update_weights(made.publish(1))
            await made.add(stack)
            await until(lambda: "engine-1" in made.engine.pool.slots)
            await made.until_up(1)
            assert made.slot(1).version == Version(0, 1)

    run(main())


def test_a_server_that_hangs_in_an_update_holds_nobody_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 2, max_versions_behind=1, server={"update_timeout_s": 30.0}) as made:
            engine, (slow, quick) = made.engine, made.servers
            slow.update_gate = asyncio.Event()
            await engine.update_weights(made.publish(1))
            assert engine.version == Version(0, 1) and made.slot(0).state == "updating"
            for step in (2, 3):
                await engine.update_weights(made.publish(step))
                completion = await engine.generate(prompt_of(step), params(4))
                assert completion.versions[0].version == Version(0, step) == engine.version
            assert len(slow.bodies("/update_weights_from_disk")) == 1
            assert not slow.bodies("/generate")
            slow.update_gate.set()
            await until(lambda: made.slot(0).version == Version(0, 3))
            # What came between was replaced by what came later.
            labels = [body["weight_version"] for body in slow.bodies("/update_weights_from_disk")]
            assert labels == ["L0-S1", "L0-S3"]
            assert [body["weight_version"] for body in quick.bodies("/update_weights_from_disk")] == [
                "L0-S1",
                "L0-S2",
                "L0-S3",
            ]

    run(main())


@pytest.mark.parametrize("when", ["verifying", "updating"])
def test_a_server_that_wedges_while_its_weights_change_is_let_go(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    monkeypatch.setattr(slot, "RETIRE_S", 0.05)

    async def main() -> None:
        quick = {"probe_timeout_s": 0.05, "control_timeout_s": 0.2, "update_timeout_s": 30.0}
        made = World(tmp_path, make_config(server=quick))
        async with AsyncExitStack() as stack:
            server = await made.add(stack)
            if when == "verifying":
                server.faults.hung_paths = frozenset(["/weights_checker"])
            engine = await made.open()
            updating: asyncio.Task[None] | None = None
            if when == "updating":
                await made.until_up()
                server.update_gate = asyncio.Event()
                updating = asyncio.create_task(engine.update_weights(made.publish(1)))
            await until(lambda: server.is_paused and made.slot().updater.is_switching)
            server.faults.is_hung = True
            await until(lambda: made.slot().state == "down")
            # What kept its weights current ends, whatever the server answers; two would be at it later.
            async with asyncio.timeout(5):
                await until(lambda: not made.slot()._retired)
            server.faults.is_hung, server.faults.hung_paths = False, frozenset()
            if server.update_gate is not None:
                server.update_gate.set()
            await made.until_up()
            completion = await engine.generate(prompt_of(1), params(5))
            made.check(prompt_of(1), completion)
            await engine.aclose()
            if updating is not None:
                await asyncio.gather(updating, return_exceptions=True)

    run(main())


def test_closing_while_a_connection_is_being_made_to_a_server_that_is_gone(tmp_path: Path) -> None:
    async def main() -> None:
        made = World(tmp_path, make_config(server={"control_timeout_s": 0.2, "update_timeout_s": 30.0}))
        async with AsyncExitStack() as stack:
            server = await made.add(stack)
            server.faults.hung_paths = frozenset(["/end_weight_update"])
            opening = asyncio.create_task(made.open())
            await until(lambda: "/end_weight_update" in server.paths())
            server.faults.is_hung = True
            opening.cancel()
            done, _ = await asyncio.wait([opening], timeout=5)
            assert done and opening.cancelled()

    run(main())


def test_what_a_given_up_connection_leaves_late_says_nothing_about_the_next(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as made:
            updater = made.slot().updater
            updater.is_switching, updater.hold = True, "turns"
            given_up = made.engine.pool._shared.connect(made.records[0])
            updater._left(given_up)
            assert updater.is_switching and updater.hold == "turns"
            assert updater._client is not None
            updater._left(updater._client)
            assert not updater.is_switching and updater.hold is None
            await given_up.aclose()

    run(main())


def test_a_server_that_falls_behind_is_drained_until_it_has_caught_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 2, max_versions_behind=1) as made:
            engine, (bad, _) = made.engine, made.servers
            for number in range(8):
                await engine.generate(prompt_of(number), params(3), session=session(number, 0))
            assert all(slot.sessions for slot in engine.pool.slots.values())
            bad.faults.update_message = "Failed to get weights iterator: no"
            await engine.update_weights(made.publish(1))
            await until(lambda: made.slot(0).state == "up")
            assert engine.version == Version(0, 0) and made.slot(0).trouble
            await engine.update_weights(made.publish(2))
            await until(lambda: made.slot(0).state == "draining")
            assert engine.version == Version(0, 2)
            num_before = len(bad.bodies("/generate"))
            for number in range(8):
                completion = await engine.generate(prompt_of(number), params(3), session=session(number, 0))
                assert completion.versions[0].version == Version(0, 2)
            assert len(bad.bodies("/generate")) == num_before
            bad.faults.update_message = ""
            await engine.update_weights(made.publish(2))  # the same again: whoever failed tries again
            await made.until_up(0)
            assert made.slot(0).version == Version(0, 2)

    run(main())


def test_at_the_boundary_a_lost_session_does_not_go_on_under_other_weights(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 2, on_publish="at_segment_boundary") as made:
            engine = made.engine
            await engine.generate(prompt_of(1), params(3), session="s")
            home = 0 if made.slot(0).sessions else 1
            update = asyncio.create_task(engine.update_weights(made.publish(1)))
            await until(lambda: made.slot(1 - home).version == Version(0, 1))
            await made.servers[home].stop_listening()
            with pytest.raises(EngineError, match="lost its server"):
                await engine.generate(prompt_of(1), params(3), session="s")
            await engine.close_session("s")
            completion = await engine.generate(prompt_of(1), params(3), session="s")
            assert completion.versions[0].version == Version(0, 1)
            await update

    run(main())


def test_with_no_server_left_requests_fail_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, 2, server={"down_timeout_s": 0.1}) as made:
            for server in made.servers:
                await server.stop_listening()
            with pytest.raises(EngineError, match="no server was usable"):
                await made.engine.generate(prompt_of(1), params(3))
            with pytest.raises(WeightsError, match="engine-0 is down"):
                await made.engine.update_weights(made.publish(1))
            assert made.engine.version == Version(0, 0)
            for server in made.servers:
                await server.listen()
            await made.until_up()
            completion = await made.engine.generate(prompt_of(1), params(3))
            assert completion.versions[0].version == Version(0, 1)

    run(main())


def test_no_started_server_in_time(tmp_path: Path) -> None:
    async def main() -> None:
        made = World(tmp_path, make_config(server={"start_timeout_s": 0.05}))
        with pytest.raises(EngineError, match="none was started"):
            await made.open()

    run(main())


class _Schedule:
    """A random life of an engine, with the actor's meter beside it."""

    def __init__(self, made: World, seed: int) -> None:
        self.made, self.random = made, random.Random(seed)
        self.meter = Meter(made.engine)
        self.tasks: list[asyncio.Task[None]] = []
        self.step = 0

    def check(self) -> None:
        counts = self.meter.counters()
        assert all(value >= 0 for name, value in counts.items())
        discarded = sum(value for name, value in counts.items() if name.startswith("discarded_tokens"))
        assert counts["sampled_tokens"] == (
            counts["open_tokens"] + counts["outbox_tokens"] + discarded + counts["aborted_tokens"]
        )

    async def live(self, number: int) -> None:
        engine = MeteredEngine(self.made.engine, self.meter)
        name = session(number % 3, number)
        row = prompt_of(number)
        try:
            for _ in range(3):
                completion = await engine.generate(row, params(self.random.randint(1, 30)), session=name)
                self.check()
                self.made.check(row, completion)
                row = [*row, *completion.token_ids]
        except EngineError:
            self.check()
        finally:
            engine.discard("test")
            await engine.close_session(name)
            self.check()

    async def update(self) -> None:
        self.step += 1
        with suppress(WeightsError):
            await self.made.engine.update_weights(self.made.publish(self.step))
        self.check()

    async def act(self, action: str, number: int) -> None:
        server = self.made.servers[number % len(self.made.servers)]
        if action == "generate":
            self.tasks.append(asyncio.create_task(self.live(len(self.tasks))))
        elif action == "cancel" and self.tasks:
            self.tasks[number % len(self.tasks)].cancel()
        elif action == "update":
            self.tasks.append(asyncio.create_task(self.update()))
        elif action == "kill":
            await server.stop_listening()
        elif action == "start" and server._runner is None:
            await server.listen()
        elif action == "break":
            server.faults.drops["/generate"] = 1
        for _ in range(number):
            await asyncio.sleep(0)
            self.check()


@settings(
    max_examples=12,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    seed=st.integers(0, 1000),
    mode=st.sampled_from(["retract", "in_place", "wait", "at_segment_boundary"]),
    actions=st.lists(
        st.tuples(
            st.sampled_from(
                ["generate", "generate", "generate", "cancel", "update", "kill", "start", "break"]
            ),
            st.integers(0, 40),
        ),
        min_size=5,
        max_size=25,
    ),
)
def test_every_token_is_accounted_for_whatever_happens(
    tmp_path_factory: pytest.TempPathFactory, seed: int, mode: str, actions: list[tuple[str, int]]
) -> None:
    async def main() -> None:
        folder = tmp_path_factory.mktemp("run")
        async with world(folder, 2, on_publish=mode, server={"down_timeout_s": 5.0}) as made:
            schedule = _Schedule(made, seed)
            for action, number in actions:
                await schedule.act(action, number)
            for server in made.servers:
                if server._runner is None:
                    await server.listen()
            ends = await asyncio.gather(*schedule.tasks, return_exceptions=True)
            for end in ends:
                assert end is None or isinstance(end, asyncio.CancelledError), end
            await until(lambda: not any(slot.running for slot in made.engine.pool.slots.values()))
            schedule.check()
            assert schedule.meter.counters()["open_tokens"] == 0
            assert not made.engine._busy_sessions and not made.engine.pool._open

    run(main())
