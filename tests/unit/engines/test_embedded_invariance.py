"""Batch invariance, bitwise: neighbours, slots, arrival, eviction, takeover."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.engines.embedded import EmbeddedEngine, stepper
from cod_async.errors import EngineError
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import weights_of
from cod_async.models.qwen3 import Qwen3, Qwen3Config

from .helpers import make_engine, make_model, params, random_prompt, run, steps

Turn = tuple[list[int], list[float]]
NUM_TURNS = 3


def invariant_engine(model: Qwen3 | None = None, max_running: int = 5, **changes: object) -> EmbeddedEngine:
    return make_engine(model, context=64, max_running=max_running, is_batch_invariant=True, **changes)


async def play(
    engine: EmbeddedEngine, number: int, first_turn: int = 0, row: Sequence[int] = (), pause_steps: int = 0
) -> list[Turn]:
    """A three-turn session; may be taken up at a later turn from the row that led there."""
    row = list(row) or random_prompt(number, 3 + number % 7)
    turns: list[Turn] = []
    for turn in range(first_turn, NUM_TURNS):
        temperature = (1.0, 0.8)[number % 2]
        completion = await engine.generate(
            row,
            params(4 + number % 5, seed=100 * number + turn, temperature=temperature),
            session=str(number),
        )
        turns.append((completion.token_ids, completion.logprobs))
        row += completion.token_ids + random_prompt(1000 * number + turn, turn + 1)
        await steps(pause_steps)
    await engine.close_session(str(number))
    return turns


def play_alone(number: int) -> list[Turn]:
    turns: list[Turn] = run(play(invariant_engine(), number))
    return turns


def row_before(number: int, turn: int, turns: list[Turn]) -> list[int]:
    row = random_prompt(number, 3 + number % 7)
    for earlier in range(turn):
        row += turns[earlier][0] + random_prompt(1000 * number + earlier, earlier + 1)
    return row


ALONE = {number: play_alone(number) for number in range(8)}


@settings(max_examples=15, deadline=None)
@given(st.permutations(range(8)), st.lists(st.integers(0, 9), min_size=8, max_size=8), st.integers(0, 40))
def test_neighbours_slots_arrival_and_eviction_change_nothing(
    order: list[int], delays: list[int], abort_after: int
) -> None:
    async def delayed(engine: EmbeddedEngine, number: int, delay: int) -> list[Turn]:
        await steps(delay)
        return await play(engine, number)

    async def main() -> None:
        engine = invariant_engine()  # five slots, eight sessions
        noise = asyncio.create_task(engine.generate(random_prompt(77, 9), params(50, top_p=0.5)))
        tasks = [asyncio.create_task(delayed(engine, n, d)) for n, d in zip(order, delays, strict=True)]
        await steps(abort_after)
        noise.cancel()
        for number, turns in zip(order, await asyncio.gather(*tasks), strict=True):
            assert turns == ALONE[number]  # floats compared exactly
        await asyncio.gather(noise, return_exceptions=True)

    run(main())


@pytest.mark.parametrize(("number", "turn"), list(itertools.product((0, 3, 6), (1, 2))))
def test_takeover_by_another_engine_is_bitwise(number: int, turn: int) -> None:
    async def main() -> list[Turn]:
        engine = invariant_engine()
        others = [asyncio.create_task(play(engine, other)) for other in (1, 2)]
        taken = await play(engine, number, turn, row_before(number, turn, ALONE[number]))
        await asyncio.gather(*others)
        return taken

    assert run(main()) == ALONE[number][turn:]


def test_a_session_that_was_evicted_goes_on_bitwise() -> None:
    async def main() -> None:
        engine = invariant_engine(max_running=2)
        expected = {n: run_in_two_slots[n] for n in range(5)}
        results = await asyncio.gather(*(play(engine, number, pause_steps=60) for number in range(5)))
        assert dict(enumerate(results)) == expected
        assert engine.num_evictions > 0

    run_in_two_slots = {n: run(play(invariant_engine(max_running=2), n)) for n in range(5)}
    run(main())


def test_retract_makes_later_tokens_a_function_of_the_new_weights() -> None:
    """After a switch, log-probs equal those of an engine that never had other weights, given the same row."""
    new = make_model(2)

    async def switched() -> tuple[list[int], list[float]]:
        engine = invariant_engine(on_publish="retract")
        task = asyncio.create_task(engine.generate([5, 6, 7], params(14, seed=3)))
        while engine.in_flight_tokens < 8:
            await asyncio.sleep(0)
        engine.swap_weights(weights_of(new), Version(0, 1))
        completion = await task
        assert completion.versions[0].num_tokens == 8
        return completion.token_ids, completion.logprobs

    async def by_seeds() -> None:
        engine = invariant_engine(new, max_running=32)  # the same compute shape: rows are rounded up to 32
        num_checked = 0
        for index in range(8, 14):  # draw with many seeds until the same token comes up
            row = [5, 6, 7, *tokens[:index]]
            draws = await asyncio.gather(*(engine.generate(row, params(1, seed=s)) for s in range(160)))
            if logprobs[index] < -3.5:
                continue  # too rare to come up
            num_checked += 1
            same = [draw.logprobs[0] for draw in draws if draw.token_ids[0] == tokens[index]]
            assert same and set(same) == {logprobs[index]}
        assert num_checked >= 3

    tokens, logprobs = run(switched())
    run(by_seeds())


@pytest.mark.parametrize("hidden", [24, 64, 100])
@pytest.mark.parametrize("max_running", [1, 7, 33])
def test_shapes_that_do_not_fit_vector_widths(hidden: int, max_running: int) -> None:
    config = Qwen3Config(
        vocab_size=53,
        hidden_size=hidden,
        intermediate_size=3 * hidden + 2,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=3,
        head_dim=10,
    )
    model = Qwen3(config, torch.Generator().manual_seed(1))

    async def main() -> None:
        alone = await invariant_engine(model, max_running).generate([1, 2, 3], params(10, seed=5))
        engine = invariant_engine(model, max_running)
        tasks = [
            asyncio.create_task(engine.generate([i % 53, 4], params(30, seed=i)))
            for i in range(max_running - 1)
        ]
        await steps(5)
        beside = await engine.generate([1, 2, 3], params(10, seed=5))
        assert beside == alone
        await asyncio.gather(*tasks)

    run(main())


def test_a_machine_that_cannot_keep_the_promise_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    real = stepper.decode

    def uneven(*arguments: object) -> torch.Tensor:
        logits = real(*arguments)  # type: ignore[arg-type]
        logits[3] += 1e-6 * logits[3].abs().max()
        return logits

    monkeypatch.setattr(stepper, "decode", uneven)
    with pytest.raises(EngineError, match="is_batch_invariant"):
        invariant_engine()
