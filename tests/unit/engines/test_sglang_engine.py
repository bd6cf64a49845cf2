"""One server: versions, modes of switching, checks at the door, counters, closing."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from cod_async.engines.base import Completion
from cod_async.engines.sglang.budget import ReprefillBudget
from cod_async.engines.sglang.engine import SGLangEngine
from cod_async.engines.sglang.records import ServerRecord
from cod_async.errors import EngineClosedError, EngineError, EngineMismatchError, InputError, WeightsError
from cod_async.lifecycle.segment import Version, VersionSpan

from .sglang_helpers import (
    API_KEY,
    CONTEXT,
    VOCAB,
    WatchedServer,
    World,
    make_config,
    make_model_dir,
    params,
    prompt_of,
    run,
    until,
    world,
)


def check_ledger(engine: SGLangEngine, completions: Iterable[Completion]) -> None:
    returned = sum(len(completion.token_ids) for completion in completions)
    assert engine.counters.sampled_tokens == returned + engine.counters.aborted_tokens


def test_a_server_with_the_starting_weights_is_verified_and_named(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as made:
            engine, server = made.engine, made.servers[0]
            assert engine.version == Version(0, 0) and engine.max_context_tokens == CONTEXT
            assert server.label == server.scheduler_label == "L0-S0" and not server.is_paused
            assert "/weights_checker" in server.paths()
            prompt = prompt_of(1)
            first = await engine.generate(prompt, params(7), session="run/g1.m0.e1.o0")
            assert first.versions == (VersionSpan(Version(0, 0), 7),) and first.finish == "length"
            made.check(prompt, first)
            row = prompt + first.token_ids + [3, 4]
            second = await engine.generate(row, params(5), session="run/g1.m0.e1.o0")
            made.check(row, second)
            assert {body["extra_key"] for body in server.bodies("/generate")} == {"L0-S0"}
            counters, extra = engine.counters, engine.extra_counters
            assert (counters.sampled_tokens, counters.aborted_tokens) == (12, 0)
            cached = (
                len(row) - 3
            )  # the last token of a completion is in no cache, and neither are the new ids
            assert counters.prefilled_tokens == len(prompt) + len(row) - cached
            assert extra["cached_tokens"] == cached and extra["prompt_tokens"] == len(prompt) + len(row)
            assert counters.busy_s > 0 and counters.num_weight_updates == 0
            await engine.close_session("run/g1.m0.e1.o0")
            await engine.close_session("unknown")

    run(main())


def test_a_server_with_other_weights_takes_nothing_until_a_version_is_published(tmp_path: Path) -> None:
    async def main() -> None:
        made = World(tmp_path, make_config())
        async with AsyncExitStack() as stack:
            server = await made.add(stack, model_dir=make_model_dir(tmp_path / "other", 5))
            server.label = server.scheduler_label = "L0-S0"  # it says so, which proves nothing
            engine = await made.open()
            stack.push_async_callback(engine.aclose)
            waiting = asyncio.create_task(engine.generate(prompt_of(1), params(4)))
            await until(lambda: made.slot().trouble != "")
            assert made.slot().state == "updating" and not server.bodies("/generate")
            await engine.update_weights(made.publish(3))
            completion = await waiting
            assert completion.versions == (VersionSpan(Version(0, 3), 4),) and engine.version == Version(0, 3)
            made.check(prompt_of(1), completion)

    run(main())


def test_whoever_died_in_the_middle_of_an_update_is_cleaned_up_after(tmp_path: Path) -> None:
    async def main() -> None:
        made = World(tmp_path, make_config())
        async with AsyncExitStack() as stack:
            server = await made.add(stack)
            server.is_paused = server.is_update_open = True
            server.cache["L0-S0"] = [prompt_of(1, 40)]
            engine = await made.open()
            stack.push_async_callback(engine.aclose)
            completion = await engine.generate(prompt_of(1, 40), params(4))
            made.check(prompt_of(1, 40), completion)
            assert engine.extra_counters["cached_tokens"] == 0  # nobody knows what had made those blocks
            assert not server.is_paused and not server.is_update_open

    run(main())


@pytest.mark.parametrize("mode", ["auto", "retract", "in_place"])
def test_running_requests_go_on_across_a_switch(tmp_path: Path, mode: str) -> None:
    async def main() -> None:
        async with world(tmp_path, on_publish=mode, token_s=0.001) as made:
            engine, server = made.engine, made.servers[0]
            warm = await engine.generate(prompt_of(9), params(3))  # some speed and budget to begin with
            tasks = [asyncio.create_task(engine.generate(prompt_of(i), params(120))) for i in range(3)]
            await server.until(lambda: len(server.running) == 3)
            await server.until_tokens(5)
            await engine.update_weights(made.publish(1))
            assert engine.version == Version(0, 1) and engine.counters.num_weight_updates == 1
            completions = await asyncio.gather(*tasks)
            for number, completion in enumerate(completions):
                assert [span.version for span in completion.versions] == [Version(0, 0), Version(0, 1)]
                made.check(prompt_of(number), completion)
            fresh = await engine.generate(prompt_of(0), params(3))
            assert fresh.versions == (VersionSpan(Version(0, 1), 3),)
            assert server.bodies("/generate")[-1]["extra_key"] == "L0-S1"
            again = engine.extra_counters["reprefilled_tokens"]
            expected = sum(6 + completion.versions[0].num_tokens for completion in completions)
            assert again == (0 if mode == "in_place" else expected)
            assert engine.counters.prefilled_tokens == 5 * 6 + again
            assert engine.extra_counters["switch_pause_s"] > 0
            check_ledger(engine, [warm, *completions, fresh])
            bodies = server.bodies("/update_weights_from_disk")
            assert [body["flush_cache"] for body in bodies] == [mode != "in_place"]

    run(main())


def test_no_request_starts_under_the_old_namespace_after_a_switch(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, token_s=0.0005) as made:
            engine, server = made.engine, made.servers[0]
            stop = False

            async def chat(number: int) -> list[Completion]:
                completions = []
                while not stop:
                    completions.append(await engine.generate(prompt_of(number), params(9)))
                return completions

            chats = [asyncio.create_task(chat(number)) for number in range(4)]
            for step in (1, 2, 3):
                await server.until(lambda: len(server.running) >= 2)
                await engine.update_weights(made.publish(step))
            stop = True
            completions = [made for part in await asyncio.gather(*chats) for made in part]
            check_ledger(engine, completions)
            now = "L0-S0"
            for what, detail in server.events:
                if what == "update":
                    now = detail[0]
                elif what == "start":
                    assert detail == now
            assert now == "L0-S3"

    run(main())


def test_wait_switches_between_completions(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, on_publish="wait", token_s=0.001) as made:
            engine, server = made.engine, made.servers[0]
            running = [asyncio.create_task(engine.generate(prompt_of(i), params(40))) for i in range(2)]
            await server.until(lambda: len(server.running) == 2)
            update = asyncio.create_task(engine.update_weights(made.publish(1)))
            await until(lambda: made.slot().updater.hold == "turns")
            later = asyncio.create_task(engine.generate(prompt_of(5), params(5), session="s"))
            await until(update.done)
            assert all(task.done() for task in running)
            for number, completion in enumerate(await asyncio.gather(*running)):
                assert completion.versions == (VersionSpan(Version(0, 0), 40),)
                made.check(prompt_of(number), completion)
            completion = await later
            assert completion.versions == (VersionSpan(Version(0, 1), 5),)
            assert ("update", ("L0-S1", 0)) in server.events
            assert "/pause_generation" not in server.paths()[server.paths().index("/generate") :]
            assert not server.bodies("/update_weights_from_disk")[0]["flush_cache"]
            # Both versions' blocks are still there, apart.
            assert set(server.cache) == {"L0-S0", "L0-S1"}
            await engine.generate(prompt_of(0), params(5))
            assert engine.extra_counters["cached_tokens"] == 0

    run(main())


def test_at_segment_boundary_no_session_spans_versions(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, on_publish="at_segment_boundary") as made:
            engine, server = made.engine, made.servers[0]
            versions: dict[str, set[Version]] = {}

            async def episode(name: str, num_turns: int) -> None:
                row = prompt_of(len(name))
                for _ in range(num_turns):
                    completion = await engine.generate(row, params(6), session=name)
                    made.check(row, completion)
                    versions.setdefault(name, set()).update(span.version for span in completion.versions)
                    row += [*completion.token_ids, 7]
                await engine.close_session(name)

            tasks = []
            for step in range(1, 5):
                tasks += [asyncio.create_task(episode(f"r/g{step}.m{i}.e1.o0", 3)) for i in range(3)]
                await until(lambda: bool(made.slot().sessions))
                await engine.update_weights(made.publish(step))
            await asyncio.gather(*tasks)
            assert all(len(seen) == 1 for seen in versions.values()) and len(versions) == 12
            assert len(set.union(*versions.values())) > 1
            assert [detail[1] for what, detail in server.events if what == "update"] == [0, 0, 0, 0]
            assert engine.version == Version(0, 4)

    run(main())


@pytest.mark.parametrize("mode", ["wait", "at_segment_boundary"])
def test_holds_are_bounded_in_time_and_in_publications(tmp_path: Path, mode: str) -> None:
    async def main(folder: Path, **changes: Any) -> None:
        async with world(folder, on_publish=mode, token_s=0.002, **changes) as made:
            engine = made.engine
            task = asyncio.create_task(engine.generate(prompt_of(1), params(200), session="s"))
            await made.servers[0].until_tokens(3)
            updates = [asyncio.create_task(engine.update_weights(made.publish(step))) for step in (1, 2)]
            await until(lambda: engine.version == Version(0, 2))
            assert not task.done()
            await asyncio.gather(*updates)
            completion = await task
            made.check(prompt_of(1), completion)
            assert [span.version.step for span in completion.versions][-1] == 2
            assert made.servers[0].bodies("/update_weights_from_disk")[-1]["flush_cache"]

    run(main(tmp_path / "time", hold_timeout_s=0.03))
    run(main(tmp_path / "publications", max_versions_behind=1))


class Row:
    def __init__(self, num_prompt: int, max_tokens: int, elapsed_s: float) -> None:
        self.num_prompt, self.max_tokens, self.elapsed_s = num_prompt, max_tokens, elapsed_s


def test_budget_arithmetic() -> None:
    budget = ReprefillBudget(0.1)
    assert budget.allows([])
    assert not budget.allows([Row(1, 100, 9.0)])  # nothing generated yet
    budget.ended(900, 90.0)  # ten tokens per second
    assert budget.progress(Row(5, 100, 3.0)) == pytest.approx(30)
    assert budget.progress(Row(5, 20, 3.0)) == 20
    # context 62 + 30 of 0.1 * (900 + 30) = 93 tokens
    assert budget.allows([Row(62, 100, 3.0)])
    assert not budget.allows([Row(64, 100, 3.0)])
    budget.switched([Row(62, 100, 3.0)])
    # 30 of the next request's tokens were before the switch: 0.1 * (100 - 30) = 7
    budget.ended(100, 10.0)
    assert budget.allows([Row(7, 100, 0.0)])
    assert not budget.allows([Row(8, 100, 0.0)])


def test_a_switch_is_put_off_while_it_would_cost_too_much(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, max_reprefill_frac=0.5, token_s=0.001) as made:
            engine, server = made.engine, made.servers[0]
            long = asyncio.create_task(engine.generate(prompt_of(1, 100), params(250)))
            await server.until_tokens(1)
            update = asyncio.create_task(engine.update_weights(made.publish(1)))
            await until(lambda: engine.extra_counters["num_switches_put_off"] == 1)
            first = await engine.generate(prompt_of(2), params(20))  # nothing else waits for it
            assert first.versions == (VersionSpan(Version(0, 0), 20),) and not update.done()
            completion = await long
            await update
            assert [span.version.step for span in completion.versions] == [0]
            assert engine.version == Version(0, 1)

    run(main())


def test_a_switch_is_not_put_off_beyond_the_allowed_publications(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, max_reprefill_frac=1e-6, max_versions_behind=2, token_s=0.002) as made:
            engine, server = made.engine, made.servers[0]
            task = asyncio.create_task(engine.generate(prompt_of(1), params(250)))
            await server.until_tokens(1)
            for step in (1, 2):
                engine.announce(made.publish(step))
                await until(
                    lambda step=step: engine.extra_counters["num_switches_put_off"] == step  # type: ignore[misc]
                )
            assert engine.version == Version(0, 0)
            await engine.update_weights(made.publish(3))
            assert not task.done() and engine.version == Version(0, 3)
            completion = await task
            assert [span.version.step for span in completion.versions] == [0, 3]
            made.check(prompt_of(1), completion)

    run(main())


def test_tokens_without_a_version_of_ours_are_refused(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as made:
            engine, server = made.engine, made.servers[0]
            await engine.update_weights(made.publish(1))
            for label in ("default", "L9-S9", "making-L0-S1"):
                server.scheduler_label = label
                with pytest.raises(EngineError, match="no token without a version"):
                    await engine.generate(prompt_of(1), params(6))
                completion = await engine.generate(prompt_of(1), params(6))  # it was brought there anew
                assert completion.versions == (VersionSpan(Version(0, 1), 6),)
            assert engine.counters.aborted_tokens == 18
            check_ledger(engine, [completion] * 3)

    run(main())


def test_what_the_server_gives_up_is_asked_again(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, token_s=0.001) as made:
            engine, server = made.engine, made.servers[0]
            task = asyncio.create_task(engine.generate(prompt_of(1), params(60)))
            await server.until_tokens(4)
            (item,) = server.running.values()
            await server._abort_requests([item])
            completion = await task
            made.check(prompt_of(1), completion)
            assert len(completion.token_ids) == 60 and engine.counters.aborted_tokens >= 4
            check_ledger(engine, [completion])
            assert engine.extra_counters["num_request_retries"] == 1

    run(main())


def test_a_request_that_breaks_servers_is_given_up(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as made:
            made.servers[0].faults.statuses["/generate"] = [500] * 4
            with pytest.raises(EngineError, match="4 attempts were broken off"):
                await made.engine.generate(prompt_of(1), params(6))
            made.check(prompt_of(1), await made.engine.generate(prompt_of(1), params(6)))
            made.servers[0].faults.statuses["/generate"] = [422]
            with pytest.raises(EngineError, match="422"):
                await made.engine.generate(prompt_of(1), params(6))
            assert made.servers[0].faults.statuses["/generate"] == []  # asked once

    run(main())


def test_requests_are_checked_before_anything_is_sent(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as made:
            engine = made.engine
            for prompt, changes in (
                ([], {}),
                ([VOCAB], {}),
                ([-1], {}),
                ([1] * CONTEXT, {}),
                ([1], {"max_tokens": 0}),
                ([1], {"temperature": 0.0}),
                ([1], {"temperature": float("inf")}),
                ([1], {"top_p": 0.0}),
            ):
                with pytest.raises(EngineError):
                    await engine.generate(prompt, params(**changes))
            assert not made.servers[0].bodies("/generate")
            completion = await engine.generate(prompt_of(1, CONTEXT - 3), params(50))
            assert len(completion.token_ids) == 3 and completion.finish == "length"
            task = asyncio.create_task(engine.generate(prompt_of(1), params(5), session="s"))
            await asyncio.sleep(0)
            with pytest.raises(EngineError, match="already has a request"):
                await engine.generate(prompt_of(1), params(5), session="s")
            await task

    run(main())


def test_cancelling_aborts_at_the_server_and_counts_what_was_seen(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, token_s=0.001) as made:
            engine, server = made.engine, made.servers[0]
            task = asyncio.create_task(engine.generate(prompt_of(1), params(300), session="s"))
            await server.until_tokens(60)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            await until(lambda: not made.slot().running)
            assert "/abort_request" in server.paths() and not server.running
            assert not made.slot().sessions
            assert engine.counters.sampled_tokens == engine.counters.aborted_tokens > 0

    run(main())


def test_closing_ends_everything(tmp_path: Path) -> None:
    async def main() -> None:
        before = asyncio.all_tasks()
        async with world(tmp_path, token_s=0.001) as made:
            engine, server = made.engine, made.servers[0]
            warm = await engine.generate(prompt_of(9), params(3))
            running = asyncio.create_task(engine.generate(prompt_of(1), params(300)))
            await server.until_tokens(3)
            server.update_gate = asyncio.Event()
            update = asyncio.create_task(engine.update_weights(made.publish(1)))
            await until(lambda: server.is_paused)
            waiting = asyncio.create_task(engine.generate(prompt_of(2), params(300)))
            await asyncio.sleep(0)
            await engine.aclose()
            for task in (running, waiting, update):
                with pytest.raises(EngineClosedError):
                    await task
            assert not server.is_paused and server.paths().count("/continue_generation") == 3
            with pytest.raises(EngineClosedError):
                await engine.generate(prompt_of(1), params(3))
            with pytest.raises(EngineClosedError):
                await engine.update_weights(made.publish(1))
            await engine.aclose()
            server.update_gate.set()
            check_ledger(engine, [warm])
        names = {task.get_name() for task in asyncio.all_tasks() - before}
        assert not any(name.startswith(("slot", "attempt", "weights", "old", "server rec")) for name in names)

    run(main())


def test_failed_updates_keep_what_is_known(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path) as made:
            engine, server = made.engine, made.servers[0]
            server.faults.update_message = "Failed to get weights iterator: no such thing"
            manifest = made.publish(1)
            with pytest.raises(WeightsError, match="no such thing"):
                await engine.update_weights(manifest)
            assert engine.version == Version(0, 0) and made.slot().state == "up"
            completion = await engine.generate(prompt_of(1), params(4))
            assert completion.versions == (VersionSpan(Version(0, 0), 4),)
            # It may have loaded a part: nobody gets tokens of that.
            server.faults.update_message = "out of memory"
            with pytest.raises(WeightsError, match="out of memory"):
                await engine.update_weights(manifest)
            assert made.slot().version is None and server.label == "making-L0-S1"
            server.faults.update_message = ""
            await engine.update_weights(manifest)
            assert engine.version == Version(0, 1)

            # The server takes it, but has something else then.
            server.checksums = lambda _: dict.fromkeys(
                ("model.norm.weight", "model.layers.0.input_layernorm.weight"), "0" * 16
            )
            with pytest.raises(WeightsError, match="checksum"):
                await engine.update_weights(made.publish(2))
            assert made.slot().state == "updating" and made.slot().version is None
            waiting = asyncio.create_task(engine.generate(prompt_of(1), params(4)))
            server.checksums = WatchedServer().checksums
            assert (await waiting).versions == (VersionSpan(Version(0, 2), 4),)

            # Gone from the disk before it was taken.
            manifest = made.publish(3)
            (tmp_path / manifest.shards[0].file).unlink()
            with pytest.raises(WeightsError, match="pruned"):
                await engine.update_weights(manifest)
            await engine.update_weights(made.publish(4))
            await engine.update_weights(made.publish(4))  # again: nothing to do
            await engine.update_weights(manifest)  # older: ignored
            assert engine.version == Version(0, 4) and engine.counters.num_weight_updates == 3

    run(main())


def test_an_old_server_is_refused_by_name_unless_it_is_idle_for_updates(tmp_path: Path) -> None:
    async def main() -> None:
        made = World(tmp_path / "refused", make_config(urls=("http://x:1",)))
        async with AsyncExitStack() as stack:
            await made.add(stack, release="0.5.18")
            with pytest.raises(InputError, match=r'0\.5\.18.*on_publish = "auto"'):
                await made.open()
        made = World(tmp_path / "wait", make_config(on_publish="wait"))
        async with AsyncExitStack() as stack:
            await made.add(stack, release="0.5.18")
            engine = await made.open()
            stack.push_async_callback(engine.aclose)
            first = await engine.generate(prompt_of(1), params(5))
            await engine.update_weights(made.publish(1))
            second = await engine.generate(prompt_of(1), params(5))
            assert [c.versions[0].version.step for c in (first, second)] == [0, 1]
            made.check(prompt_of(1), second)

    run(main())


def test_all_that_is_wrong_with_attached_servers_is_listed(tmp_path: Path) -> None:
    async def main() -> None:
        made = World(tmp_path, make_config(urls=("http://x:1",)))
        async with AsyncExitStack() as stack:
            await made.add(stack)
            await made.add(stack, architecture="LlamaForCausalLM", context_tokens=100)
            await made.add(stack, model_dir=make_model_dir(tmp_path / "big", vocab_size=512))
            await made.add(stack, release="0.5.16")
            gone = await made.add(stack)
            await made.add(stack, api_key="another")
            made.records[5] = ServerRecord(name="engine-5", url=made.servers[5].url, api_key=API_KEY)
            await gone.stop_listening()
            with pytest.raises(InputError) as caught:
                await made.open()
            text = str(caught.value)
            assert len(caught.value.problems) == 6
            for part in ("LlamaForCausalLM", "rows of", "vocab_size 512", "0.5.16", gone.url, "key"):
                assert part in text
            assert made.servers[0].url not in text

    run(main())


def test_a_wrong_key_later_on_ends_the_engine(tmp_path: Path) -> None:
    async def main() -> None:
        async with world(tmp_path, server={"probe_every_s": 30.0}) as made:
            made.servers[0].api_key = "changed"
            with pytest.raises(EngineMismatchError):
                await made.engine.generate(prompt_of(1), params(4))
            with pytest.raises(EngineMismatchError):
                await made.engine.update_weights(made.publish(1))

    run(main())
