"""A tiny configuration, an engine whose answers are known, and evaluations played with them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cod_async.config.schema import (
    BootstrapConfig,
    Config,
    EngineConfig,
    EnvironmentConfig,
    LifecycleConfig,
    ModelConfig,
)
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.errors import InputError
from cod_async.evaluate.run import evaluate
from cod_async.evaluate.suite import Suite, SuiteEntry, resolve
from cod_async.evaluate.targets import Checkpoint
from cod_async.lifecycle.rendering import load_renderer
from cod_async.lifecycle.segment import Version, VersionSpan


def config_for(preset: str = "door", **lifecycle: Any) -> Config:
    settings = {"max_response_tokens": 6, "max_hint_tokens": 12, "solve_penalty": 0.0} | lifecycle
    return Config(
        environments=(EnvironmentConfig(name="hidden_buttons", preset=preset),),
        lifecycle=LifecycleConfig(**settings),
        model=ModelConfig(max_context_tokens=96),
        engine=EngineConfig(max_running=8, is_batch_invariant=True),
        bootstrap=BootstrapConfig(num_steps=1, documents_per_step=4, qa_loss_gate=100.0),
    )


class ScriptedEngine:
    """Presses the button that the shown hint names, else the first that it does not name; notes every fact
    it has seen.
    """

    def __init__(
        self, model: Any, config: EngineConfig, *, max_context_tokens: int, version: Version, run_dir: Path
    ):
        self.counters = EngineCounters()
        self.version = version
        self.max_context_tokens = max_context_tokens
        self.is_closed = False
        self.prompts: list[str] = []
        self.renderer = load_renderer(run_dir)

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        prompt = self.renderer.tokenizer.decode(token_ids)
        self.prompts.append(prompt)
        answer = self.write(prompt) if "Write" in prompt else self.press(prompt)
        ids = [*self.renderer.tokenizer.encode(answer), self.renderer.end_of_turn_id]
        return Completion(
            token_ids=ids,
            logprobs=[-0.5] * len(ids),
            versions=(VersionSpan(self.version, len(ids)),),
            finish="stop",
        )

    @staticmethod
    def press(prompt: str) -> str:
        goal = prompt.split("goal ")[1].split()[0]
        facts = dict(word.split("=")[::-1] for word in prompt.split("goal")[0].split() if "=" in word)
        untried = next((number for number in "12345" if number not in facts.values()), "1")
        return f"{goal} : {facts.get(goal, untried)}"

    @staticmethod
    def write(prompt: str) -> str:
        facts = dict.fromkeys(word for word in prompt.split() if "=" in word)
        return f"[ {' '.join(facts) or 'null'} ]"

    async def close_session(self, session: str) -> None:
        return None

    async def aclose(self) -> None:
        self.is_closed = True


def entry(preset: str = "door", **changes: Any) -> SuiteEntry:
    settings: dict[str, Any] = {"splits": ("train",), "num_packs": 6, "lifecycles_per_pack": 2}
    return SuiteEntry(environment="hidden_buttons", preset=preset, **(settings | changes))


def ask(
    model_dir: Path,
    folder: Path,
    *entries: SuiteEntry,
    config: Config | None = None,
    seeds: tuple[int, ...] = (1,),
    data_seed: int | None = None,
    **how: Any,
) -> dict[str, Any]:
    suite = Suite(name="test", entries=entries, seeds=seeds, data_seed=data_seed)
    settings, problems = resolve(suite, config or config_for())
    if problems:
        raise InputError(problems)
    return evaluate(suite, settings, [Checkpoint(label="m", model_dir=str(model_dir))], folder, **how)
