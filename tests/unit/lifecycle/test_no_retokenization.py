"""What was sampled is what is sealed: ids never go through text and back.

The tokenizers here punish whoever tries: one decodes several ids to the same text, one has ids without any
text, and the chat template of the third takes thinking out of past turns when it renders them again.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from cod_async.config.schema import LifecycleConfig
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.envs.base import TaskSpec
from cod_async.envs.hidden_buttons import SPEC, HiddenButtons
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play
from cod_async.lifecycle.segment import Segment, Version, VersionSpan
from cod_async.models.tokenizers import write_chatml_tokenizer
from cod_async.weights.manifest import Manifest

NUM_NAMELESS = 16
"""Ids of the model beyond the tokenizer's vocabulary: an embedding is often padded."""

# As families with a thinking switch write it: the think block of an earlier turn is dropped from history.
STRIPPING_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set text = message['content'] -%}"
    "{%- if message['role'] == 'assistant' and '</think>' in text and not loop.last -%}"
    "{%- set text = text.split('</think>')[-1].lstrip('\\n') -%}"
    "{%- endif -%}"
    "{{- '<|im_start|>' + message['role'] + '\\n' + text + '<|im_end|>' + '\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}"
    "{{- '<|im_start|>assistant\\n' -}}"
    "{%- if enable_thinking is defined and not enable_thinking -%}"
    "{{- '<think>\\n\\n</think>\\n\\n' -}}"
    "{%- endif -%}"
    "{%- endif -%}"
)
TEXTS = ["In : 1 Up : 2 Left : 3 Right : 4 goal hint notes [ 1=Up 2=In ] the the then there"] * 6


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stripping")
    write_chatml_tokenizer(path, TEXTS, 400, 4096)
    file = path / "tokenizer_config.json"
    settings = json.loads(file.read_text())
    file.write_text(json.dumps(settings | {"chat_template": STRIPPING_TEMPLATE}))
    return path


@pytest.fixture(scope="module")
def renderer(model_dir: Path) -> Renderer:
    return load_renderer(model_dir)


class SamplingEngine:
    """Samples ids at random, or as told, and remembers what it was asked and what it gave."""

    def __init__(self, renderer: Renderer, seed: int, said: Sequence[Sequence[int]] = ()) -> None:
        self.counters = EngineCounters()
        self.calls: list[tuple[list[int], list[int], list[float]]] = []
        self._rng = random.Random(seed)
        self._renderer = renderer
        self._said = list(said)

    @property
    def extra_counters(self) -> dict[str, float]:
        return {}

    @property
    def version(self) -> Version:
        return Version(0, 1)

    @property
    def max_context_tokens(self) -> int:
        return 4096

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        size = self._renderer.tokenizer.vocab_size + NUM_NAMELESS
        if self._said:
            ids = list(self._said.pop(0))
        else:
            ids = [self._rng.randrange(3, size) for _ in range(params.max_tokens - 1)]
        stops = [place for place, token in enumerate(ids) if token in params.stop_ids]
        ids = ids[: stops[0]] if stops else ids
        ids = [*ids[: params.max_tokens - 1], self._renderer.end_of_turn_id]
        logprobs = [-self._rng.random() for _ in ids]
        self.calls.append((list(token_ids), ids, logprobs))
        return Completion(ids, logprobs, (VersionSpan(Version(0, 1), len(ids)),), "stop")

    async def close_session(self, session: str) -> None:
        return None

    async def update_weights(self, manifest: Manifest) -> None:
        raise NotImplementedError

    def announce(self, manifest: Manifest) -> None:
        return None

    async def aclose(self) -> None:
        return None


def play_lifecycle(engine: SamplingEngine, renderer: Renderer, **config: Any) -> list[Segment]:
    tasks = tuple(
        TaskSpec("hidden_buttons", "cross", {}, {"seed": 10 + position}, 5, position, 3)
        for position in range(3)
    )
    settings = LifecycleConfig(
        **({"pack_size": 3, "max_response_tokens": 24, "max_hint_tokens": 24} | config)
    )
    environment = HiddenButtons(SPEC.options("cross"))

    async def collect() -> list[Segment]:
        episodes = play(
            LifecycleSpec("run", 0, 0, 0, "actor-0", tasks, 7),
            initial_state(environment),
            engine=engine,
            environment=environment,
            renderer=renderer,
            config=settings,
            temperature=1.0,
            top_p=1.0,
            max_context_tokens=4096,
        )
        return [segment async for segment in episodes]

    return asyncio.run(collect())


def check_rows(engine: SamplingEngine, segments: Sequence[Segment]) -> None:
    """Every row is what was asked and what was sampled, id by id, and the log-probs belong to these ids."""
    calls = iter(engine.calls)
    conversation: list[int] = []
    for segment in segments:
        (row,) = segment.rows
        ids = row.token_ids.numpy().tolist()
        base = conversation if row.parent is not None else []
        logprobs: list[float] = []
        for start, stop in row.action_spans:
            prompt, sampled, told = next(calls)
            assert [*base, *ids[:start]] == prompt
            assert ids[start:stop] == sampled
            logprobs += told
        assert row.behavior_logprobs.numpy().tolist() == pytest.approx(logprobs)
        conversation = [*base, *ids]
    assert next(calls, None) is None


@pytest.mark.parametrize("carry", ["hint", "transcript", "none"])
def test_sealed_rows_hold_ids_that_do_not_survive_text(renderer: Renderer, carry: str) -> None:
    tokenizer = renderer.tokenizer
    num_lost = 0
    for seed in range(6):
        engine = SamplingEngine(renderer, seed)
        check_rows(engine, play_lifecycle(engine, renderer, carry=carry))
        for _, sampled, _ in engine.calls:
            # Whoever re-tokenises gets other ids, in number too: bytes merge, and nameless ids are gone.
            num_lost += tokenizer.encode(tokenizer.decode(sampled)) != sampled
    assert num_lost > 6


def test_ids_without_a_text_are_sealed_too(renderer: Renderer) -> None:
    size = renderer.tokenizer.vocab_size
    nameless = [size + place for place in range(NUM_NAMELESS)]
    assert renderer.tokenizer.decode(nameless) == ""
    engine = SamplingEngine(renderer, 0, [nameless] * 5)
    segments = play_lifecycle(engine, renderer)
    check_rows(engine, segments)
    for segment in segments:
        assert segment.rows[0].num_action_tokens == NUM_NAMELESS + 1


def test_merges_inside_a_response_are_not_redone(renderer: Renderer) -> None:
    tokenizer = renderer.tokenizer
    whole = tokenizer.encode("the goal")
    spelled = [token for letter in "the goal" for token in tokenizer.encode(letter)]
    assert tokenizer.decode(spelled) == tokenizer.decode(whole) and len(spelled) > len(whole)
    engine = SamplingEngine(renderer, 0, [spelled] * 5)
    segments = play_lifecycle(engine, renderer)
    check_rows(engine, segments)
    assert {segment.rows[0].num_action_tokens for segment in segments} == {len(spelled) + 1}


def test_thinking_stays_in_the_row_although_the_template_strips_it(
    model_dir: Path, renderer: Renderer
) -> None:
    from transformers import AutoTokenizer

    tokenizer = renderer.tokenizer
    begin, end = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    thoughts = [begin, *tokenizer.encode("\nthe goal\n"), end, *tokenizer.encode("\n\nIn : 1")]
    turns = [[*thoughts, *tokenizer.encode(f" {turn}"), renderer.end_of_turn_id] for turn in range(3)]
    ids = renderer.open("Rules.", "First")
    for turn, sampled in enumerate(turns):
        before = list(ids)
        ids = [*ids, *sampled, *renderer.next_turn(f"Reply {turn}", True)]
        assert ids[: len(before)] == before
        assert ids[len(before) : len(before) + len(sampled)] == sampled
    assert ids.count(end) == 3 + 4  # three of the policy's, and one empty block before each response
    # The template itself, asked for the same conversation, has dropped them: it must not be asked.
    messages = [{"role": "system", "content": "Rules."}, {"role": "user", "content": "First"}]
    for turn, sampled in enumerate(turns):
        messages.append({"role": "assistant", "content": renderer.decode_response(sampled)})
        messages.append({"role": "user", "content": f"Reply {turn}"})
    auto: Any = AutoTokenizer.from_pretrained(str(model_dir))
    text = auto.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=False, enable_thinking=False
    )
    assert text.count("</think>") == 1 and "the goal" not in text
    assert tokenizer.decode(ids).count("the goal") == 3


@pytest.mark.parametrize("carry", ["hint", "transcript"])
def test_a_lifecycle_of_thinking_turns_is_sealed_whole(renderer: Renderer, carry: str) -> None:
    tokenizer = renderer.tokenizer
    begin, end = tokenizer.token_id("<think>"), tokenizer.token_id("</think>")
    said = [begin, *tokenizer.encode("the"), end, *tokenizer.encode("In : 1")]
    engine = SamplingEngine(renderer, 0, [said] * 64)
    segments = play_lifecycle(engine, renderer, carry=carry)
    check_rows(engine, segments)
    for segment in segments:
        row = segment.rows[0]
        ids = row.token_ids.numpy().tolist()
        for start, stop in row.action_spans:
            assert ids[start:stop] == [*said, renderer.end_of_turn_id]
