"""A tiny model and small conveniences for the engine's tests."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from pathlib import Path
from typing import Any

import torch

from cod_async.config.schema import EngineConfig
from cod_async.engines.base import Completion, SamplingParams
from cod_async.engines.embedded import EmbeddedEngine
from cod_async.lifecycle.segment import Version
from cod_async.models.qwen3 import Qwen3, Qwen3Config

VOCAB = 37
CONTEXT = 48


def make_model(seed: int = 0, *, num_kv_heads: int = 2) -> Qwen3:
    """A model whose next-token distributions are neither flat nor certain."""
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=num_kv_heads,
        head_dim=8,
        tie_word_embeddings=seed % 2 == 0,
    )
    model = Qwen3(config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                parameter.mul_(8)
    return model.eval()


def make_engine(
    model: Qwen3 | None = None,
    *,
    context: int = CONTEXT,
    run_dir: Path = Path("."),
    **changes: Any,
) -> EmbeddedEngine:
    config = EngineConfig(**({"max_running": 4} | changes))
    return EmbeddedEngine(
        model or make_model(),
        config,
        max_context_tokens=context,
        version=Version(0, 0),
        run_dir=run_dir,
    )


def params(max_tokens: int = 8, seed: int = 0, stop: Sequence[int] = (), **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_ids=frozenset(stop), seed=seed, **changes)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))


def reference_logprobs(
    model: Qwen3, prompt: Sequence[int], completion: Completion, temperature: float = 1.0
) -> torch.Tensor:
    """float64 log-probs of the completion by a plain forward over the whole row."""
    wide = Qwen3(model.config).double().eval()
    wide.load_state_dict(model.state_dict())
    row = torch.tensor([[*prompt, *completion.token_ids]])
    with torch.no_grad():
        logprobs = torch.log_softmax(wide.logits(row)[0] / temperature, dim=-1)
    first = len(prompt)
    return logprobs[torch.arange(first - 1, row.shape[1] - 1), row[0, first:]]


def random_prompt(seed: int, length: int) -> list[int]:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def check_ledger(engine: EmbeddedEngine) -> None:
    counters = engine.counters
    assert counters.sampled_tokens == (
        engine.returned_tokens + counters.aborted_tokens + engine.in_flight_tokens
    )


async def steps(count: int) -> None:
    """Let the engine take about ``count`` steps."""
    for _ in range(count):
        await asyncio.sleep(0)
