"""Teachers: both kinds against a plain forward of transformers in float64, and what they do in trouble."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from fake_sglang import FakeServer

from cod_async.config.schema import (
    Config,
    DistillationConfig,
    EngineConfig,
    EnvironmentConfig,
    LossConfig,
    ModelConfig,
    TeacherConfig,
)
from cod_async.engines.base import Scorer, scored_positions
from cod_async.engines.embedded.scoring import EmbeddedScorer
from cod_async.engines.sglang.scoring import SGLangScorer
from cod_async.errors import (
    EngineClosedError,
    EngineDownError,
    EngineError,
    EngineMismatchError,
    InputError,
)
from cod_async.models.directory import save_model
from cod_async.models.tokenizers import write_word_tokenizer
from tests.unit.engines.helpers import CONTEXT, make_model

Spans = list[tuple[int, int]]
WORDS = tuple(f"word{number}" for number in range(20))
SCENARIO_S = 60.0


@pytest.fixture(scope="module")
def teacher_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_teacher(tmp_path_factory.mktemp("teacher"))


def make_teacher(folder: Path, words: Sequence[str] = WORDS, seed: int = 3) -> Path:
    write_word_tokenizer(folder, words, CONTEXT)
    save_model(folder, make_model(seed))
    return folder


@cache
def reference(model_dir: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float64, local_files_only=True)


@torch.no_grad()
def true_logprobs(model_dir: Path, row: Sequence[int], temperature: float) -> list[float]:
    """Log-prob of each token of a row but the first."""
    logits = reference(model_dir)(input_ids=torch.tensor([list(row)])).logits[0] / temperature
    return torch.log_softmax(logits, -1)[:-1].gather(1, torch.tensor(row[1:])[:, None])[:, 0].tolist()  # type: ignore[no-any-return]


def expected(model_dir: Path, row: Sequence[int], spans: Spans, temperature: float) -> list[float]:
    found = true_logprobs(model_dir, row, temperature)
    return [found[position - 1] for start, stop in spans for position in range(start, stop)]


def rows_of(count: int, vocab_size: int = 37) -> list[tuple[list[int], Spans]]:
    rng = random.Random(count)
    rows = []
    for _ in range(count):
        row = [rng.randrange(vocab_size) for _ in range(rng.randrange(4, CONTEXT - 8))]
        row[-1] = vocab_size - 1
        middle = rng.randrange(2, len(row) - 1)
        rows.append((row, [(1, middle), (middle + 1, len(row))]))
    return rows


def run(story: Awaitable[Any]) -> Any:
    async def bounded() -> Any:
        async with asyncio.timeout(SCENARIO_S):
            return await story

    return asyncio.run(bounded())


def config_for(*teachers: TeacherConfig, context: int = CONTEXT, **distillation: Any) -> Config:
    return Config(
        environments=(EnvironmentConfig(name="hidden_buttons", preset="door"),),
        loss=LossConfig(preset="opd"),
        distillation=DistillationConfig(teachers=teachers, **distillation),
        model=ModelConfig(max_context_tokens=context),
        engine=EngineConfig(server=msgspec.structs.replace(EngineConfig().server, connect_timeout_s=2.0)),
    )


def with_server(
    teacher_dir: Path,
    story: Callable[[FakeServer, Scorer], Awaitable[None]],
    *,
    context: int = CONTEXT,
    **distillation: Any,
) -> None:
    """Run a story with a fake server that knows the true log-probs, and a scorer on it."""

    async def play() -> None:
        server = FakeServer(
            vocab_size=37,
            model_dir=teacher_dir,
            api_key="key",
            context_tokens=200,
            scores=lambda row: true_logprobs(teacher_dir, row, 1.0),
        )
        async with server:
            teacher = TeacherConfig(environment="hidden_buttons", url=server.url)
            config = config_for(teacher, context=context, **distillation)
            scorer = await SGLangScorer.open(teacher, "key", config, teacher_dir)
            try:
                await story(server, scorer)
            finally:
                await scorer.aclose()

    run(play())


async def all_scores(scorer: Scorer, rows: Sequence[tuple[list[int], Spans]], t: float) -> list[list[float]]:
    return await asyncio.gather(*(scorer.score(row, spans, t) for row, spans in rows))


# One contract, two kinds


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("tokens_per_batch", [1, 130, 8192])
def test_embedded_scores_are_those_of_the_model(
    teacher_dir: Path, temperature: float, tokens_per_batch: int
) -> None:
    rows = rows_of(9)
    exact = EmbeddedScorer(teacher_dir, tokens_per_batch=tokens_per_batch, dtype=torch.float64)
    plain = EmbeddedScorer(teacher_dir, tokens_per_batch=tokens_per_batch)

    async def both() -> tuple[list[list[float]], list[list[float]]]:
        found = await all_scores(exact, rows, temperature), await all_scores(plain, rows, temperature)
        await exact.aclose()
        await plain.aclose()
        return found

    in_double, in_single = run(both())
    assert plain.num_passes == {1: 9, 8192: 1}.get(tokens_per_batch, plain.num_passes)
    assert 1 < plain.num_passes < 9 or tokens_per_batch != 130
    for (row, spans), wide, narrow in zip(rows, in_double, in_single, strict=True):
        truth = expected(teacher_dir, row, spans, temperature)
        assert wide == pytest.approx(truth, abs=2e-6)  # the head's product is in float32
        assert narrow == pytest.approx(truth, abs=1e-4)


def test_server_scores_are_those_of_the_model(teacher_dir: Path) -> None:
    rows = rows_of(9)

    async def story(server: FakeServer, scorer: Scorer) -> None:
        found = await all_scores(scorer, rows, 1.0)
        for (row, spans), values in zip(rows, found, strict=True):
            assert values == pytest.approx(expected(teacher_dir, row, spans, 1.0), abs=1e-12)
        bodies = server.bodies("/generate")
        assert len({body["rid"] for body in bodies}) == len(rows)
        assert all(body["sampling_params"]["max_new_tokens"] == 0 for body in bodies)

    with_server(teacher_dir, story)


BAD: tuple[tuple[list[int], Spans, float, str], ...] = (
    ([1, 2, 3], [], 1.0, "no tokens"),
    ([1, 2, 3], [(0, 2)], 1.0, r"\[0, 2\)"),
    ([1, 2, 3], [(2, 4)], 1.0, r"\[2, 4\)"),
    ([1, 2, 3], [(2, 2)], 1.0, r"\[2, 2\)"),
    ([1, 2, 3, 4], [(2, 4), (3, 4)], 1.0, "after 4"),
    ([1, 37, 3], [(1, 2)], 1.0, "outside"),
    ([1, -1, 3], [(1, 2)], 1.0, "outside"),
    ([1, 2, 3], [(1, 2)], 0.0, "temperature"),
    ([1, 2, 3], [(1, 2)], float("inf"), "temperature"),
)


def test_bad_arguments_are_refused_before_anything_is_computed(teacher_dir: Path) -> None:
    embedded = EmbeddedScorer(teacher_dir)

    async def story(server: FakeServer, scorer: Scorer) -> None:
        for row, spans, temperature, said in BAD:
            with pytest.raises(EngineError, match=said):
                await scorer.score(row, spans, temperature)
            with pytest.raises(EngineError, match=said):
                await embedded.score(row, spans, temperature)
        assert server.bodies("/generate") == []

    with_server(teacher_dir, story)
    assert embedded.num_passes == 0
    assert scored_positions([1, 2, 3, 4], [(1, 2), (3, 4)], 1.0, 5) == [1, 3]


# In this process


def test_alone_or_in_company_a_score_has_the_same_bits(teacher_dir: Path) -> None:
    rows = rows_of(6)
    scorer = EmbeddedScorer(teacher_dir, is_batch_invariant=True)

    async def twice() -> tuple[list[list[float]], list[list[float]]]:
        together = await all_scores(scorer, rows, 1.0)
        return together, [await scorer.score(row, spans, 1.0) for row, spans in reversed(rows)][::-1]

    together, alone = run(twice())
    assert together == alone
    assert scorer.num_passes == 12


def test_a_cancelled_row_is_left_out_and_a_closed_scorer_says_so(teacher_dir: Path) -> None:
    (row, spans), *_ = rows_of(1)
    scorer = EmbeddedScorer(teacher_dir, tokens_per_batch=1)

    async def story() -> None:
        asked = [asyncio.create_task(scorer.score(row, spans, 1.0)) for _ in range(3)]
        await asyncio.sleep(0)
        asked[1].cancel()
        assert await asked[0] == await asked[2]
        assert scorer.num_passes == 2
        waiting = [asyncio.create_task(scorer.score(row, spans, 1.0)) for _ in range(3)]
        await asyncio.sleep(0)
        await scorer.aclose()
        ends = await asyncio.gather(*waiting, return_exceptions=True)
        assert isinstance(ends[-1], EngineClosedError)
        with pytest.raises(EngineClosedError):
            await scorer.score(row, spans, 1.0)

    run(story())


def test_weights_that_are_damaged_fail_the_rows_and_nothing_else(tmp_path: Path) -> None:
    folder = make_teacher(tmp_path)
    scorer = EmbeddedScorer(folder)
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:200])
    (row, spans), *_ = rows_of(1)

    async def story() -> None:
        with pytest.raises(EngineError, match=r"model\.safetensors"):
            await scorer.score(row, spans, 1.0)
        weights.write_bytes(whole)
        assert len(await scorer.score(row, spans, 1.0)) == len(scored_positions(row, spans, 1.0, 37))

    run(story())


# On a server


def test_no_other_temperature_than_1_on_a_server(teacher_dir: Path) -> None:
    async def story(server: FakeServer, scorer: Scorer) -> None:
        with pytest.raises(EngineMismatchError, match="temperature 1 only"):
            await scorer.score([1, 2], [(1, 2)], 0.9)
        assert server.bodies("/generate") == []

    with_server(teacher_dir, story)


def shorten(body: dict[str, Any]) -> None:
    body["meta_info"]["input_token_logprobs"].pop()


def of_another_token(body: dict[str, Any]) -> None:
    body["meta_info"]["input_token_logprobs"][-1][1] ^= 1


def above_zero(body: dict[str, Any]) -> None:
    body["meta_info"]["input_token_logprobs"][-1][0] = 0.5


def missing(body: dict[str, Any]) -> None:
    body["meta_info"]["input_token_logprobs"][-1][0] = None


@pytest.mark.parametrize("change", [shorten, of_another_token, above_zero, missing])
def test_an_answer_that_does_not_hold_together_is_no_score(
    teacher_dir: Path, change: Callable[[dict[str, Any]], None]
) -> None:
    async def story(server: FakeServer, scorer: Scorer) -> None:
        server.faults.change = change
        with pytest.raises(EngineDownError, match="answered nonsense"):
            await scorer.score([1, 2, 3], [(1, 3)], 1.0)
        server.faults.change = None
        assert len(await scorer.score([1, 2, 3], [(1, 3)], 1.0)) == 2

    with_server(teacher_dir, story)


def test_trouble_of_a_server_is_named(teacher_dir: Path) -> None:
    async def story(server: FakeServer, scorer: Scorer) -> None:
        server.faults.statuses["/generate"] = [500, 400, 401]
        for kind, said in (
            (EngineDownError, "status 500"),
            (EngineError, "status 400"),
            (EngineMismatchError, r"distillation\.teachers"),
        ):
            with pytest.raises(kind, match=said):
                await scorer.score([1, 2, 3], [(1, 3)], 1.0)
        server.faults.hung_paths = {"/generate"}
        with pytest.raises(EngineDownError, match="did not answer within"):
            await scorer.score([1, 2, 3], [(1, 3)], 1.0)

    with_server(teacher_dir, story, request_timeout_s=0.3)


def test_a_teacher_that_has_other_weights_is_told(teacher_dir: Path) -> None:
    async def story(server: FakeServer, scorer: Scorer) -> None:
        await scorer.score([1, 2, 3], [(1, 3)], 1.0)
        server.label = server.scheduler_label = "L0-S7"
        with pytest.raises(EngineMismatchError, match=r"'L0-S7' now and had 'default'"):
            await scorer.score([1, 2, 3], [(1, 3)], 1.0)

    with_server(teacher_dir, story)


def test_a_server_has_so_many_rows_at_once(teacher_dir: Path) -> None:
    peak = 0

    async def story(server: FakeServer, scorer: Scorer) -> None:
        nonlocal peak
        whole = server._run

        async def watched(item: Any) -> None:
            nonlocal peak
            peak = max(peak, len(server.running) + 1)
            await whole(item)

        server._run = watched  # type: ignore[method-assign]
        await all_scores(scorer, rows_of(12), 1.0)

    with_server(teacher_dir, story, max_requests=2)
    assert 1 <= peak <= 2


def test_a_server_that_cannot_teach_is_refused(teacher_dir: Path, tmp_path: Path) -> None:
    other = make_teacher(tmp_path, words=[*WORDS[:-1], "odd"])

    async def story() -> list[str]:
        async with FakeServer(vocab_size=37, model_dir=other, context_tokens=40) as server:
            teacher = TeacherConfig(environment="hidden_buttons", url=server.url)
            with pytest.raises(InputError) as caught:
                await SGLangScorer.open(teacher, "", config_for(teacher), teacher_dir)
        return list(caught.value.problems)

    problems = run(story())
    assert len(problems) == 2
    assert "takes prompts of less than 34 tokens" in problems[0]
    assert "another tokenizer" in problems[1] and ("odd" in problems[1] or "word19" in problems[1])
