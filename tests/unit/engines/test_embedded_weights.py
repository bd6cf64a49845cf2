"""Weight switches between two tokens: versions, modes, failures, and divergence."""

from __future__ import annotations

import asyncio
import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from msgspec.structs import replace

from cod_async.engines.base import Completion
from cod_async.engines.embedded import EmbeddedEngine, load_engine
from cod_async.engines.embedded.scheduler import Request, Scheduler
from cod_async.engines.embedded.slots import SlotTable
from cod_async.errors import EngineClosedError, EngineError, InputError, WeightsError
from cod_async.lifecycle.segment import Version, VersionSpan
from cod_async.models.directory import save_model, weights_of
from cod_async.models.qwen3 import Qwen3
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import publish

from .helpers import (
    check_ledger,
    make_engine,
    make_model,
    params,
    random_prompt,
    reference_logprobs,
    run,
    steps,
)

NEW = Version(0, 1)


def other_model(seed: int = 2) -> Qwen3:
    """Other weights of the shape of ``make_model(0)``."""
    return make_model(seed)


def publish_model(run_dir: Path, model: Qwen3, version: Version = NEW) -> Manifest:
    return publish(run_dir, "test", version, weights_of(model), keep_versions=4)


def assert_span_logprobs(
    model: Qwen3, prompt: list[int], completion: Any, first: int, last: int, atol: float = 1e-5
) -> None:
    expected = reference_logprobs(model, prompt, completion)[first:last]
    found = torch.tensor(completion.logprobs[first:last], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("on_publish", ["auto", "in_place", "retract"])
def test_running_rows_go_on_with_truthful_versions(on_publish: str, is_batch_invariant: bool) -> None:
    old, new = make_model(0), other_model()

    async def main() -> None:
        engine = make_engine(old, on_publish=on_publish, is_batch_invariant=is_batch_invariant)
        prompts = [random_prompt(i, 4 + i) for i in range(3)]
        tasks = [
            asyncio.create_task(engine.generate(p, params(30, seed=i), session=str(i)))
            for i, p in enumerate(prompts)
        ]
        await steps(15)
        engine.swap_weights(weights_of(new), NEW)
        assert engine.version == NEW and engine.counters.num_weight_updates == 1
        for prompt, completion in zip(prompts, await asyncio.gather(*tasks), strict=True):
            before = completion.versions[0].num_tokens
            assert completion.versions == (
                VersionSpan(Version(0, 0), before),
                VersionSpan(NEW, 30 - before),
            )
            assert_span_logprobs(old, prompt, completion, 0, before)
            if on_publish == "retract":
                assert_span_logprobs(new, prompt, completion, before, 30)
            else:
                expected = reference_logprobs(new, prompt, completion)[before:]
                difference = (torch.tensor(completion.logprobs[before:]) - expected).abs().max()
                assert difference > 1e-3  # old keys and values are still in use
        # Idle sessions: retract makes the next turn one of the new weights alone.
        row = prompts[0] + list((await tasks[0]).token_ids)
        turn = await engine.generate(row, params(5, seed=9), session="0")
        assert turn.versions == (VersionSpan(NEW, 5),)
        if on_publish == "retract":
            assert_span_logprobs(new, row, turn, 0, 5)
        fresh = await engine.generate(prompts[1], params(5), session="fresh")
        assert_span_logprobs(new, prompts[1], fresh, 0, 5)
        check_ledger(engine)

    run(main())


def test_a_published_version_is_taken_up_while_rows_are_running(tmp_path: Path) -> None:
    old, new = make_model(0), other_model()

    async def main() -> None:
        engine = make_engine(old, run_dir=tmp_path, on_publish="retract")
        manifest = publish_model(tmp_path, new)
        update = asyncio.create_task(engine.update_weights(manifest))
        completions = []
        while not (update.done() and completions[-1].versions[0].version == NEW):
            completions.append(await engine.generate([1, 2, 3], params(40, seed=len(completions))))
        await update
        for completion in completions:
            first = completion.versions[0].num_tokens if completion.versions[0].version != NEW else 0
            assert sum(span.num_tokens for span in completion.versions) == 40
            assert_span_logprobs(old, [1, 2, 3], completion, 0, first)
            assert_span_logprobs(new, [1, 2, 3], completion, first, 40)
        assert engine.version == NEW
        check_ledger(engine)
        await engine.update_weights(manifest)  # again: nothing to do
        assert engine.counters.num_weight_updates == 1

    run(main())


def test_retract_counts_its_prefills() -> None:
    async def main() -> None:
        engine = make_engine(on_publish="retract")
        task = asyncio.create_task(engine.generate(random_prompt(0, 10), params(20)))
        while engine.in_flight_tokens < 6:
            await asyncio.sleep(0)
        assert engine.counters.prefilled_tokens == 10
        engine.swap_weights(weights_of(other_model()), NEW)
        await task
        # prompt and five sampled tokens again; the sixth was to be computed anyway
        assert engine.counters.prefilled_tokens == 10 + 10 + 6 - 1

    run(main())


def test_two_switches_in_one_completion_and_none_in_another() -> None:
    async def main() -> None:
        engine = make_engine()
        task = asyncio.create_task(engine.generate([1, 2, 3], params(20, seed=4)))
        for step in (1, 2):
            target = 6 * step
            while engine.in_flight_tokens < target:
                await asyncio.sleep(0)
            engine.swap_weights(weights_of(other_model(2 * step)), Version(0, step))
            engine.swap_weights(weights_of(other_model(2 * step)), Version(1, step))  # nothing in between
        completion = await task
        assert completion.versions == (
            VersionSpan(Version(0, 0), 6),
            VersionSpan(Version(1, 1), 6),
            VersionSpan(Version(1, 2), 8),
        )

    run(main())


async def held_update(engine: EmbeddedEngine, model: Qwen3) -> asyncio.Task[None]:
    """An update to NEW whose weights are loaded and which now has to wait for running requests."""
    weights = engine._fuse(weights_of(model), NEW)
    update = asyncio.create_task(engine._take_up(weights, NEW, "digest"))
    await asyncio.sleep(0)
    assert engine._scheduler.hold is not None and not update.done()
    return update


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_wait_switches_between_completions_and_recomputes_idle_sessions(is_batch_invariant: bool) -> None:
    old, new = make_model(0), other_model()

    async def main() -> None:
        engine = make_engine(old, on_publish="wait", is_batch_invariant=is_batch_invariant)
        first = await engine.generate([1, 2, 3], params(4), session="idle")
        row = [1, 2, 3, *first.token_ids, 7]
        running = asyncio.create_task(engine.generate([9, 8], params(40), session="running"))
        await steps(3)
        update = await held_update(engine, new)
        # Neither a turn of an open session nor a new session may start: both would go on for ever.
        turn = asyncio.create_task(engine.generate(row, params(6), session="idle"))
        fresh = asyncio.create_task(engine.generate([4, 5], params(4)))
        dropped = asyncio.create_task(engine.generate([6], params(4), session="dropped"))
        await steps(4)
        assert not running.done() and not update.done() and engine.version == Version(0, 0)
        dropped.cancel()
        completion = await running
        assert completion.versions == (VersionSpan(Version(0, 0), 40),)
        assert_span_logprobs(old, [9, 8], completion, 0, 40)
        await update
        for prompt, task in ((row, turn), ([4, 5], fresh)):
            answer = await task
            assert answer.versions == (VersionSpan(NEW, len(answer.token_ids)),)
            assert_span_logprobs(new, prompt, answer, 0, len(answer.token_ids))
        check_ledger(engine)
        assert engine.in_flight_tokens == 0 and engine.counters.aborted_tokens == 0

    run(main())


def test_a_turn_cancelled_while_held_frees_the_slot_of_its_session() -> None:
    async def main() -> None:
        engine = make_engine(on_publish="wait", max_running=2)
        await engine.generate([1, 2, 3], params(4), session="idle")
        running = asyncio.create_task(engine.generate([9, 8], params(40)))
        await steps(3)
        update = await held_update(engine, other_model())
        turn = asyncio.create_task(engine.generate([1, 2, 3, 4], params(4), session="idle"))
        await steps(2)
        turn.cancel()
        await asyncio.gather(turn, update, running, return_exceptions=True)
        check_ledger(engine)
        assert engine.counters.aborted_tokens == 0  # the four tokens of the turn before were handed over
        assert engine.version == NEW and engine._scheduler.hold is None
        assert sorted(engine._scheduler._free) == [0, 1] and not engine._scheduler._sessions

    run(main())


def test_wait_is_bounded_and_then_computes_running_rows_again(caplog: pytest.LogCaptureFixture) -> None:
    old, new = make_model(0), other_model()

    async def main() -> None:
        engine = make_engine(old, on_publish="wait", context=256)
        running = asyncio.create_task(engine.generate([9, 8], params(200)))
        await steps(3)
        update = await held_update(engine, new)
        assert engine._held is not None
        engine._switch_late(engine._held.done)  # what the timer of the hold does
        await update
        assert not running.done()
        completion = await running
        first = completion.versions[0].num_tokens
        assert [span.version for span in completion.versions] == [Version(0, 0), NEW]
        assert_span_logprobs(old, [9, 8], completion, 0, first)
        assert_span_logprobs(new, [9, 8], completion, first, 200)

    run(main())
    assert "running completions held version 0.1 back" in caplog.text


def test_boundary_holds_until_open_sessions_close(tmp_path: Path) -> None:
    old, new = make_model(0), other_model()

    async def main() -> None:
        engine = make_engine(old, run_dir=tmp_path, on_publish="at_segment_boundary")
        first = await engine.generate([1, 2, 3], params(4), session="old")
        update = asyncio.create_task(engine.update_weights(publish_model(tmp_path, new)))
        while not engine._scheduler.hold:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(engine.generate([4, 5], params(4), session="new"))
        await steps(10)
        assert not waiting.done() and engine.version == Version(0, 0)
        row = [1, 2, 3, *first.token_ids]
        second = await engine.generate(row, params(4), session="old")  # the open episode goes on
        assert second.versions == (VersionSpan(Version(0, 0), 4),)
        assert not update.done()
        await engine.close_session("old")
        await update
        assert engine.version == NEW
        completion = await waiting
        assert completion.versions == (VersionSpan(NEW, 4),)
        assert_span_logprobs(new, [4, 5], completion, 0, 4)

    run(main())


def test_boundary_ends_with_a_cancelled_episode_and_with_sessionless_requests(tmp_path: Path) -> None:
    async def main() -> None:
        engine = make_engine(run_dir=tmp_path, on_publish="at_segment_boundary")
        session = asyncio.create_task(engine.generate([1], params(40), session="s"))
        loose = asyncio.create_task(engine.generate([2], params(40)))
        await steps(3)
        update = asyncio.create_task(engine.update_weights(publish_model(tmp_path, other_model())))
        session.cancel()
        await asyncio.gather(session, return_exceptions=True)
        assert (await loose).versions == (VersionSpan(Version(0, 0), 40),)
        await update
        assert engine.version == NEW

    run(main())


def test_boundary_is_bounded_and_newer_versions_replace_older(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async def main() -> None:
        engine = make_engine(run_dir=tmp_path, on_publish="at_segment_boundary")
        await engine.generate([1], params(4), session="forgotten")
        manifests = [publish_model(tmp_path, other_model(2 * step), Version(0, step)) for step in (1, 2)]
        first = asyncio.create_task(engine.update_weights(manifests[0]))
        while not engine._scheduler.hold:
            await asyncio.sleep(0.001)
        # of the second; the first would be held for ten minutes
        engine._config = replace(engine._config, hold_timeout_s=0.01)
        await asyncio.gather(first, engine.update_weights(manifests[1]))
        assert engine.version == Version(0, 2) and engine.counters.num_weight_updates == 1
        completion = await engine.generate([1, 2], params(4), session="other")
        assert completion.versions == (VersionSpan(Version(0, 2), 4),)

    run(main())
    assert "held version 0.2 back" in caplog.text


def test_a_cancelled_hold_lets_sessions_in(tmp_path: Path) -> None:
    async def main() -> None:
        engine = make_engine(run_dir=tmp_path, on_publish="at_segment_boundary")
        await engine.generate([1], params(4), session="open")
        update = asyncio.create_task(engine.update_weights(publish_model(tmp_path, other_model())))
        while not engine._scheduler.hold:
            await asyncio.sleep(0.001)
        waiting = asyncio.create_task(engine.generate([2], params(4), session="waiting"))
        await steps(3)
        update.cancel()
        assert (await waiting).versions == (VersionSpan(Version(0, 0), 4),)
        await engine.close_session("open")
        await engine.close_session("waiting")
        assert engine.version == Version(0, 0)

    run(main())


def damage(run_dir: Path, manifest: Manifest) -> None:
    path = run_dir / manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))


def test_failed_loads_keep_the_old_weights(tmp_path: Path) -> None:
    old = make_model(0)

    async def main() -> None:
        engine = make_engine(old, run_dir=tmp_path)
        damaged = publish_model(tmp_path, other_model())
        damage(tmp_path, damaged)
        missing = publish_model(tmp_path, other_model(4), Version(0, 2))
        (tmp_path / missing.shards[0].file).unlink()
        tensors = dict(weights_of(other_model(6)))
        del tensors["model.norm.weight"]
        foreign = publish(tmp_path, "test", Version(0, 3), tensors, keep_versions=4)
        task = asyncio.create_task(engine.generate([1, 2], params(40)))
        for manifest in (damaged, missing, foreign):
            with pytest.raises(WeightsError):
                await engine.update_weights(manifest)
        with pytest.raises(WeightsError, match=r"model\.norm\.weight is missing"):
            engine.swap_weights(tensors, NEW)
        completion = await task
        assert engine.version == Version(0, 0) and engine.counters.num_weight_updates == 0
        assert_span_logprobs(old, [1, 2], completion, 0, 40)

    run(main())


def test_closing_ends_a_hold(tmp_path: Path) -> None:
    async def main() -> None:
        engine = make_engine(run_dir=tmp_path, on_publish="at_segment_boundary")
        await engine.generate([1], params(4), session="open")
        manifest = publish_model(tmp_path, other_model())
        update = asyncio.create_task(engine.update_weights(manifest))
        while not engine._scheduler.hold:
            await asyncio.sleep(0.001)
        await engine.aclose()
        with pytest.raises(EngineClosedError):
            await update
        with pytest.raises(EngineClosedError):
            await engine.update_weights(manifest)

    run(main())


def test_diverged_weights_are_an_error_and_good_ones_cure_it() -> None:
    good = make_model(0)
    bad = {name: tensor * float("nan") for name, tensor in weights_of(good).items()}

    async def main(engine: EmbeddedEngine) -> None:
        before = await engine.generate([1, 2, 3], params(6), session="s")
        running = asyncio.create_task(engine.generate([3, 4], params(40), session="r"))
        await steps(4)
        engine.swap_weights(bad, NEW)
        with pytest.raises(EngineError, match="not finite"):
            await running
        with pytest.raises(EngineError, match="not finite"):
            await engine.generate([1, 2, 3], params(6), session="t")
        check_ledger(engine)
        assert engine.in_flight_tokens == 0
        engine.swap_weights(weights_of(good), Version(0, 2))
        for key in ("r", "t", None):
            again = await engine.generate([1, 2, 3], params(6), session=key)
            assert again.token_ids == before.token_ids

    run(main(make_engine(good)))
    run(main(make_engine(good, is_batch_invariant=True)))


def test_engine_from_a_directory(tmp_path: Path) -> None:
    model = make_model(1)
    save_model(tmp_path / "model", model)
    engine = load_engine(
        tmp_path / "model", make_engine()._config, max_context_tokens=32, version=Version(2, 5)
    )
    assert engine.version == Version(2, 5) and engine.max_context_tokens == 32
    completion = run(engine.generate([1, 2], params(6)))
    assert_span_logprobs(model, [1, 2], completion, 0, 6)
    with pytest.raises(InputError):
        load_engine(tmp_path / "nothing", make_engine()._config, max_context_tokens=32)


def test_held_turns_with_a_slot_do_not_wait_behind_a_request_without_one() -> None:
    table = SlotTable(2, 16)
    scheduler = Scheduler(2, table)

    async def main() -> None:
        number = itertools.count()

        def ask(key: str) -> Request:
            future: asyncio.Future[Completion] = asyncio.get_running_loop().create_future()
            prompt = np.array([1, 2], dtype=np.int64)
            request = Request(next(number), prompt, params(4), future, scheduler.session_for(key))
            scheduler.submit(request)
            return request

        first, second = ask("first"), ask("second")
        scheduler.admit(1)
        scheduler.finish(second, 1)
        scheduler.hold = "turns"
        newcomer, turn = ask("newcomer"), ask("second")
        scheduler.hold = None  # the switch was forced, the first one is still running
        scheduler.admit(2)
        assert set(scheduler.running()) == {first, turn}
        assert list(scheduler.waiting) == [newcomer]

    run(main())
