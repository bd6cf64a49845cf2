"""A real SGLang server as a teacher, against a plain forward of transformers in float64."""

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
import torch
from msgspec.structs import replace
from sglang_world import CONTEXT_TOKENS, VOCAB_SIZE, require_environment, serving, tiny_model

from cod_async.config.schema import (
    Config,
    DistillationConfig,
    EnvironmentConfig,
    LossConfig,
    ModelConfig,
    TeacherConfig,
)
from cod_async.engines.sglang.scoring import SGLangScorer
from cod_async.errors import InputError

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


def expected(model_dir: Path, row: list[int], spans: list[tuple[int, int]]) -> list[float]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(str(model_dir), dtype=torch.float64, local_files_only=True)
    with torch.no_grad():
        logprobs = torch.log_softmax(model(input_ids=torch.tensor([row])).logits[0], -1)
    return [logprobs[p - 1, row[p]].item() for start, stop in spans for p in range(start, stop)]


def test_scores_are_those_of_the_model(tmp_path: Path) -> None:
    require_environment()
    model_dir = tiny_model(tmp_path / "teacher", seed=5)
    rng = random.Random(1)
    rows = [[rng.randrange(VOCAB_SIZE) for _ in range(length)] for length in (2, 40, 40, 700)]
    rows[2] = [*rows[1][:30], *rows[2][30:]]  # a cached prefix must not shorten the answer
    rows[3][650] = VOCAB_SIZE - 1  # the last id, which the server calls 0
    spans = [[(1, 2)], [(5, 9), (20, 40)], [(20, 35)], [(600, 610), (640, 700)]]

    async def scores(url: str, key: str) -> list[list[float]]:
        teacher = TeacherConfig(environment="hidden_buttons", url=url)
        config = Config(
            environments=(EnvironmentConfig(name="hidden_buttons", preset="door"),),
            loss=LossConfig(preset="opd"),
            distillation=DistillationConfig(teachers=(teacher,)),
            model=ModelConfig(max_context_tokens=CONTEXT_TOKENS - 8),
        )
        longer = replace(config, model=ModelConfig(max_context_tokens=CONTEXT_TOKENS))
        with pytest.raises(InputError, match="takes prompts of less than"):
            await SGLangScorer.open(teacher, key, longer, model_dir)
        with pytest.raises(InputError, match=r"distillation\.teachers"):
            await SGLangScorer.open(teacher, "another-key", config, model_dir)
        scorer = await SGLangScorer.open(teacher, key, config, model_dir)
        try:
            asked = (scorer.score(row, span, 1.0) for row, span in zip(rows, spans, strict=True))
            return await asyncio.gather(*asked)
        finally:
            await scorer.aclose()

    with serving(model_dir, tmp_path / "server.log") as server:
        found = asyncio.run(scores(server.url, server.api_key))
    for row, span, values in zip(rows, spans, found, strict=True):
        assert values == pytest.approx(expected(model_dir, row, span), abs=2e-4)
