"""What a completion is: log-probs, stops, prefixes, queueing, eviction, cancelling, counters."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
import torch

from cod_async.engines.base import Completion, Engine
from cod_async.engines.embedded import EmbeddedEngine
from cod_async.errors import EngineClosedError, EngineError
from cod_async.lifecycle.segment import Version, VersionSpan

from .helpers import (
    CONTEXT,
    VOCAB,
    check_ledger,
    make_engine,
    make_model,
    params,
    random_prompt,
    reference_logprobs,
    run,
    steps,
)


def assert_logprobs(model: Any, prompt: list[int], completion: Completion, temperature: float = 1.0) -> None:
    expected = reference_logprobs(model, prompt, completion, temperature)
    torch.testing.assert_close(
        torch.tensor(completion.logprobs, dtype=torch.float64), expected, rtol=0, atol=1e-5
    )


@pytest.mark.parametrize("is_batch_invariant", [False, True])
@pytest.mark.parametrize("num_kv_heads", [1, 2, 4])
def test_logprobs_of_ragged_sessions_equal_a_float64_forward(
    is_batch_invariant: bool, num_kv_heads: int
) -> None:
    model = make_model(1, num_kv_heads=num_kv_heads)

    async def session(engine: EmbeddedEngine, number: int) -> None:
        row = random_prompt(number, 3 + 2 * number)
        for turn in range(3):
            temperature = [1.0, 0.7, 1.6][(number + turn) % 3]
            completion = await engine.generate(
                row, params(3 + number, seed=10 * number + turn, temperature=temperature), session=str(number)
            )
            assert len(completion.token_ids) == 3 + number and completion.finish == "length"
            assert completion.versions == (VersionSpan(Version(0, 0), 3 + number),)
            assert_logprobs(model, row, completion, temperature)
            row += completion.token_ids + random_prompt(100 + number, number % 3)
        await engine.close_session(str(number))

    async def main() -> None:
        engine = make_engine(model, is_batch_invariant=is_batch_invariant, context=64)
        await asyncio.gather(*(session(engine, number) for number in range(6)))
        check_ledger(engine)
        assert engine.in_flight_tokens == 0
        await engine.aclose()

    run(main())


def test_is_an_engine_and_float64_agrees_to_float32_output() -> None:
    model = make_model()
    engine: Engine = make_engine(model.double())
    completion = run(engine.generate([1, 2, 3], params(20)))
    expected = reference_logprobs(model, [1, 2, 3], completion)
    assert torch.equal(torch.tensor(completion.logprobs), expected.float())


def test_stop_and_length_and_context() -> None:
    async def main() -> None:
        engine = make_engine()
        free = await engine.generate([5, 6, 7], params(20, seed=3))
        stop = free.token_ids[6]
        first = free.token_ids.index(stop)
        stopped = await engine.generate([5, 6, 7], params(20, seed=3, stop=(stop, VOCAB + 5)))
        assert stopped.token_ids == free.token_ids[: first + 1] and stopped.finish == "stop"
        exact = await engine.generate([5, 6, 7], params(first + 1, seed=3, stop=(stop,)))
        assert exact.finish == "stop"  # a stop token at the limit is still a stop
        full = await engine.generate(random_prompt(0, CONTEXT - 1), params(20))
        assert len(full.token_ids) == 1 and full.finish == "length"
        row = random_prompt(1, CONTEXT - 5)
        last = await engine.generate(row, params(20), session="a")
        assert len(last.token_ids) == 5
        assert_logprobs(make_model(), row, last)

    run(main())


def test_seeds_decide_and_sessions_do_not() -> None:
    async def main() -> None:
        engine = make_engine()
        prompt = [4, 8, 15]
        again = [await engine.generate(prompt, params(12, seed=7)) for _ in range(2)]
        assert again[0].token_ids == again[1].token_ids
        assert (await engine.generate(prompt, params(12, seed=8))).token_ids != again[0].token_ids
        first = await engine.generate(prompt, params(5, seed=7), session="s")
        assert first.token_ids == again[0].token_ids[:5]
        # The same session with another history: only the common prefix is reused.
        edited = [4, 8, 16, 23]
        in_session = await engine.generate(edited, params(12, seed=7), session="s")
        assert in_session.token_ids == (await engine.generate(edited, params(12, seed=7))).token_ids
        repeated = await engine.generate(prompt, params(12, seed=7), session="s")
        assert repeated.token_ids == again[0].token_ids

    run(main())


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_turns_compute_only_new_tokens(is_batch_invariant: bool) -> None:
    async def main() -> None:
        engine = make_engine(is_batch_invariant=is_batch_invariant)
        row = random_prompt(2, 10)
        completion = await engine.generate(row, params(6), session="s")
        assert engine.counters.prefilled_tokens == 10
        row += [*completion.token_ids, 1, 2, 3]
        await engine.generate(row, params(2), session="s")
        # the last sampled token was never computed, and three are new
        assert engine.counters.prefilled_tokens == 10 + 1 + 3
        assert engine.counters.sampled_tokens == engine.returned_tokens == 8

    run(main())


def test_queue_is_first_come_first_served_and_bounded_by_slots() -> None:
    async def main() -> None:
        engine = make_engine(max_running=2)
        done: list[int] = []

        async def one(number: int) -> None:
            await engine.generate(random_prompt(number, 4), params(5, seed=number))
            done.append(number)

        tasks = [asyncio.create_task(one(number)) for number in range(7)]
        for _ in range(4):
            await asyncio.sleep(0)
            assert engine.in_flight_tokens <= 2 * 5
        await asyncio.gather(*tasks)
        assert done == list(range(7))

    run(main())


def test_idle_sessions_are_evicted_and_come_back() -> None:
    model = make_model(3)

    async def session(engine: EmbeddedEngine, number: int) -> None:
        row = random_prompt(number, 6)
        for turn in range(4):
            completion = await engine.generate(row, params(4, seed=turn), session=str(number))
            assert_logprobs(model, row, completion)
            row += [*completion.token_ids, turn]
            await asyncio.sleep(0)  # others get in between

    async def main() -> None:
        engine = make_engine(model, max_running=2)
        await asyncio.gather(*(session(engine, number) for number in range(5)))  # never closed
        assert engine.num_evictions > 0
        check_ledger(engine)

    run(main())


def test_one_request_per_session_at_a_time() -> None:
    async def main() -> None:
        engine = make_engine()
        first = asyncio.create_task(engine.generate([1, 2], params(8), session="s"))
        await steps(3)
        with pytest.raises(EngineError, match="already has a request"):
            await engine.generate([1, 2], params(8), session="s")
        await engine.close_session("s")  # closes when the request is done
        await engine.close_session("unknown")
        assert len((await first).token_ids) == 8
        assert not engine._scheduler.has_open_episode

    run(main())


@pytest.mark.parametrize("is_batch_invariant", [False, True])
def test_cancel_running_waiting_and_just_finished(is_batch_invariant: bool) -> None:
    async def main() -> None:
        engine = make_engine(max_running=2, is_batch_invariant=is_batch_invariant)
        tasks = [
            asyncio.create_task(engine.generate(random_prompt(i, 5), params(30, seed=i), session=str(i)))
            for i in range(4)
        ]
        await steps(12)
        assert engine.in_flight_tokens > 0
        check_ledger(engine)
        in_flight = engine.in_flight_tokens
        tasks[0].cancel()  # running
        tasks[3].cancel()  # waiting
        results = await asyncio.gather(tasks[0], tasks[3], return_exceptions=True)
        assert all(isinstance(result, asyncio.CancelledError) for result in results)
        assert 0 < engine.counters.aborted_tokens < in_flight + 4
        check_ledger(engine)
        completions = await asyncio.gather(tasks[1], tasks[2])
        assert [len(completion.token_ids) for completion in completions] == [30, 30]
        check_ledger(engine)
        # Cancelled after its tokens were handed over, before it woke up.
        aborted = engine.counters.aborted_tokens
        late = asyncio.create_task(engine.generate([1], params(3), session="late"))
        while not engine._unclaimed:
            await asyncio.sleep(0)
            if engine._unclaimed:
                late.cancel()
        with pytest.raises(asyncio.CancelledError):
            await late
        assert engine.counters.aborted_tokens == aborted + 3
        check_ledger(engine)
        for key in ("1", "2"):
            await engine.close_session(key)
        assert not engine._scheduler.has_open_episode and engine.in_flight_tokens == 0
        assert sorted(engine._scheduler._free) == [0, 1]

    run(main())


def test_close_fails_everything_and_is_final() -> None:
    async def main() -> None:
        engine = make_engine(max_running=1)
        tasks = [asyncio.create_task(engine.generate([i], params(30))) for i in range(3)]
        await steps(4)
        await engine.aclose()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineClosedError) for result in results)
        check_ledger(engine)
        assert engine.in_flight_tokens == 0
        with pytest.raises(EngineClosedError):
            await engine.generate([1], params())
        await engine.aclose()

    run(main())


def test_idle_engine_has_no_task_and_works_in_another_loop() -> None:
    engine = make_engine()

    async def once() -> list[int]:
        completion = await engine.generate([1, 2], params(4))
        await steps(2)
        assert len(asyncio.all_tasks()) <= 2  # this one and wait_for's
        assert engine._task is None or engine._task.done()
        return completion.token_ids

    assert run(once()) == run(once())


@pytest.mark.parametrize(
    ("prompt", "changes", "message"),
    [
        ([], {}, "empty"),
        ([1] * CONTEXT, {}, "leaves no room"),
        ([VOCAB], {}, "outside"),
        ([-1], {}, "outside"),
        ([1], {"max_tokens": 0}, "max_tokens"),
        ([1], {"temperature": 0.0}, "temperature"),
        ([1], {"temperature": float("nan")}, "temperature"),
        ([1], {"top_p": 0.0}, "top_p"),
    ],
)
def test_impossible_requests_are_refused(prompt: list[int], changes: dict[str, Any], message: str) -> None:
    engine = make_engine()
    with pytest.raises(EngineError, match=message):
        run(engine.generate(prompt, params(**changes), session="s"))
    assert not engine._scheduler.has_open_episode


def test_long_prompts_are_cut_into_steps_and_memory_grows() -> None:
    model = make_model(5)

    async def main() -> None:
        engine = make_engine(model, context=6000, max_running=3)
        prompts = [random_prompt(7, 5000), random_prompt(8, 30), random_prompt(9, 700)]
        before = engine._stepper.cache.num_bytes
        completions = await asyncio.gather(*(engine.generate(prompt, params(3)) for prompt in prompts))
        assert engine._stepper.cache.num_bytes > before
        for prompt, completion in zip(prompts, completions, strict=True):
            assert_logprobs(model, prompt, completion)

    run(main())


def test_a_failing_step_fails_its_requests_and_not_the_engine(caplog: pytest.LogCaptureFixture) -> None:
    async def main() -> None:
        engine = make_engine()
        task = asyncio.create_task(engine.generate([1, 2, 3], params(30)))
        await steps(5)
        weights = engine._stepper.weights
        engine._stepper.weights = None  # type: ignore[assignment]
        with pytest.raises(EngineError, match="step failed"):
            await task
        engine._stepper.weights = weights
        check_ledger(engine)
        assert len((await engine.generate([1, 2, 3], params(4))).token_ids) == 4

    run(main())
    assert "an engine step failed" in caplog.text
