"""``cod``, with actors that say what a script says: ``python tests/scripted_run.py train CONFIG ...``.

Launcher, coordinator, learner, actors, wire, store, rendering and tokenizer are the real ones. Only the
engine inside an actor is replaced: its completions are the tokens of a scripted player's text
(:mod:`scripted_world`), and their log-probs are those of the run's model under the version that the engine
holds, so the learner trains on exact log-probs of a policy that does not sample. What an update would learn
from such data means nothing; that every part handles it does.
"""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from unittest.mock import patch

import torch
from scripted_world import ScriptedTask, hint_response, tasks_of

from cod_async.config import load_resolved
from cod_async.config.schema import EngineConfig
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.errors import EngineClosedError
from cod_async.launch.run_folder import cod_command
from cod_async.lifecycle.rendering import load_renderer
from cod_async.lifecycle.segment import Version, VersionSpan, kind_and_position
from cod_async.models.directory import load_model, set_weights
from cod_async.weights.load import load_weights
from cod_async.weights.manifest import Manifest

_SESSION = re.compile(r".*/g(\d+)\.m(\d+)\.e\d+\.o(\d+)")


class ScriptedEngine:
    """Implements :class:`cod_async.engines.base.Engine`; see the module text."""

    def __init__(
        self, model_dir: Path, config: EngineConfig, *, max_context_tokens: int, run_dir: Path
    ) -> None:
        self.counters = EngineCounters()
        self.version = Version(0, 0)
        self.max_context_tokens = max_context_tokens
        self._run_dir = run_dir
        self._config = load_resolved(run_dir)
        self._renderer = load_renderer(model_dir, self._config.model.renderer)
        self._model = load_model(model_dir)
        self._tasks: dict[str, ScriptedTask] = {}
        self._is_closed = False
        # Some data sets take a second to prepare, in one call that lets no other thread of the process speak:
        # done before there is a link whose heartbeats would be late.
        for group in range(self._config.run.num_steps * self._config.learner.groups_per_step):
            tasks_of(self._config, group)

    @property
    def extra_counters(self) -> dict[str, float]:
        """Nothing beyond the counters."""
        return {}

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        """Return the script's next words in this session."""
        text = await self._next_text(str(session))
        await asyncio.sleep(0)
        if self._is_closed:
            raise EngineClosedError("the engine is closed")
        sampled = [*self._renderer.tokenizer.encode(text), self._renderer.end_of_turn_id]
        if len(sampled) > params.max_tokens:  # the script does not know what a cut response leads to
            raise ValueError(f"{session}: {len(sampled)} tokens, at most {params.max_tokens} are allowed")
        logprobs = self._logprobs(token_ids, sampled, params.temperature)
        self.counters.sampled_tokens += len(sampled)
        self.counters.prefilled_tokens += len(token_ids)
        return Completion(sampled, logprobs, (VersionSpan(self.version, len(sampled)),), "stop")

    async def _next_text(self, session: str) -> str:
        found = _SESSION.fullmatch(session)
        assert found is not None, session
        group, member, ordinal = map(int, found.groups())
        kind, position = kind_and_position(ordinal)
        if kind == "update":
            return hint_response(self._config, group, member, position)[0]
        if session not in self._tasks:
            task = ScriptedTask(self._config, group, member, position)
            await task.begin()
            self._tasks[session] = task
        return await self._tasks[session].respond()

    @torch.inference_mode()
    def _logprobs(self, prompt: Sequence[int], sampled: Sequence[int], temperature: float) -> list[float]:
        row = torch.tensor([[*prompt, *sampled]])
        hidden = self._model(row)[0, len(prompt) - 1 : -1]
        scores = torch.log_softmax(hidden @ self._model.head_weight.T / temperature, dim=-1)
        values: list[float] = scores.gather(-1, row[0, len(prompt) :, None])[:, 0].tolist()
        return values

    async def close_session(self, session: str) -> None:
        """Forget where the script stood."""
        self._tasks.pop(session, None)

    async def update_weights(self, manifest: Manifest) -> None:
        """Switch to a published version between two completions."""
        tensors = await asyncio.to_thread(load_weights, self._run_dir, manifest)
        set_weights(self._model, tensors, source=str(manifest.version))
        self.version = manifest.version
        self.counters.num_weight_updates += 1

    def announce(self, manifest: Manifest) -> None:
        """Nothing is put off here."""

    async def aclose(self) -> None:
        """Stop."""
        self._is_closed = True


def _command(*arguments: str) -> list[str]:
    """The launcher's command lines, with this file in the place of ``cod`` for actors."""
    if arguments[0] != "actor":
        return cod_command(*arguments)
    return [sys.executable, str(Path(__file__).resolve()), *arguments]


def main() -> int:
    from cod_async import cli

    with (
        patch("cod_async.launch.local.cod_command", _command),
        patch("cod_async.engines.embedded.load_engine", ScriptedEngine),
    ):
        return cli.main()


if __name__ == "__main__":
    sys.exit(main())
