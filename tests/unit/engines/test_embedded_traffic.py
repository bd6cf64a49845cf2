"""Random traffic: the token ledger balances after every step, and nothing is left behind."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.engines.base import Completion
from cod_async.errors import EngineClosedError, EngineError
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import weights_of

from .helpers import check_ledger, make_engine, make_model, params, random_prompt, run, steps

ACTION = st.one_of(
    st.tuples(st.just("generate"), st.integers(0, 5), st.integers(1, 12)),
    st.tuples(st.just("loose"), st.integers(1, 20), st.integers(1, 12)),
    st.tuples(st.just("cancel"), st.integers(0, 30), st.just(0)),
    st.tuples(st.just("close"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("swap"), st.just(0), st.just(0)),
    st.tuples(st.just("update"), st.just(0), st.just(0)),
    st.tuples(st.just("step"), st.integers(1, 6), st.just(0)),
)
MODELS = [weights_of(make_model(0)), weights_of(make_model(2))]
MODES = ["in_place", "retract", "wait", "at_segment_boundary"]


@settings(max_examples=60, deadline=None)
@given(st.lists(ACTION, max_size=60), st.sampled_from(MODES), st.booleans(), st.integers(1, 3))
def test_ledger_under_random_traffic(
    actions: list[tuple[str, int, int]], on_publish: str, is_batch_invariant: bool, max_running: int
) -> None:
    async def main() -> None:
        engine = make_engine(
            on_publish=on_publish, is_batch_invariant=is_batch_invariant, max_running=max_running
        )
        tasks: list[asyncio.Task[Completion]] = []
        rows: dict[int, list[int]] = {}
        updates: list[asyncio.Task[None]] = []
        num_swaps = 0
        for name, first, second in actions:
            if name == "generate":
                row = rows.setdefault(first, random_prompt(first, 3))
                row.append(second)
                if len(row) < 40:
                    request = engine.generate(row, params(second, seed=second), session=str(first))
                    tasks.append(asyncio.create_task(request))
            elif name == "loose":
                tasks.append(asyncio.create_task(engine.generate(random_prompt(1, first), params(second))))
            elif name == "cancel" and tasks:
                tasks[first % len(tasks)].cancel()
            elif name == "close":
                await engine.close_session(str(first))
            elif name == "swap":
                num_swaps += 1
                engine.swap_weights(MODELS[num_swaps % 2], Version(0, num_swaps))
            elif name == "update":  # what update_weights does once the file is loaded
                num_swaps += 1
                version = Version(0, num_swaps)
                weights = engine._fuse(MODELS[num_swaps % 2], version)
                updates.append(asyncio.create_task(engine._take_up(weights, version, "digest")))
            for _ in range(first if name == "step" else 0):
                await asyncio.sleep(0)
                check_ledger(engine)
        for key in range(6):  # before the rest is awaited: it may be held back until these are closed
            await engine.close_session(str(key))
        results = await asyncio.gather(*tasks, return_exceptions=True)
        check_results(results)
        await asyncio.gather(*updates)
        returned = sum(len(result.token_ids) for result in results if isinstance(result, Completion))
        assert engine.returned_tokens == returned and engine.in_flight_tokens == 0
        check_ledger(engine)
        for key in range(6):
            await engine.close_session(str(key))
        scheduler = engine._scheduler
        assert scheduler.hold is None and engine.counters.num_weight_updates <= num_swaps
        assert sorted(scheduler._free) == list(range(max_running))
        assert not scheduler._sessions and not scheduler._idle and not scheduler._evicted
        assert not engine._table.is_running.any()

    run(main())


def check_results(results: list[Any]) -> None:
    """Completions, cancellations, and turns that came while another was running; nothing else."""
    for result in results:
        if isinstance(result, Completion):
            assert len(result.token_ids) == len(result.logprobs) >= 1
            assert sum(span.num_tokens for span in result.versions) == len(result.token_ids)
            assert all(logprob <= 0 for logprob in result.logprobs)
        elif isinstance(result, EngineError):
            assert "already has a request" in str(result)
        else:
            assert isinstance(result, asyncio.CancelledError)


def test_cancelling_the_engines_task_leaves_nobody_waiting() -> None:
    async def main() -> None:
        engine = make_engine(max_running=1)
        tasks = [asyncio.create_task(engine.generate([1, 2], params(40))) for _ in range(2)]
        await steps(4)
        assert engine._task is not None
        engine._task.cancel()
        results = await asyncio.gather(*tasks, return_exceptions=True)
        assert all(isinstance(result, EngineClosedError) for result in results)
        check_ledger(engine)
        with pytest.raises(asyncio.CancelledError):
            await engine._task
        assert len((await engine.generate([1, 2], params(3))).token_ids) == 3  # a new task takes over

    run(main())
