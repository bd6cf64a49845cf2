"""A fixed FrozenLake pack, played through the real rollout: every solve episode takes exactly five turns.

The player knows the hidden mapping and walks about without ever reaching the goal or a hole; it thinks aloud
for a sentence or a few, and writes hints. Prompts, rendering, rows and spans are what the rollout makes of
it. The same rows exist a second time as other agents would have recorded them: one row per turn, each with
the whole history in front.
"""

from __future__ import annotations

import asyncio
import random
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import msgspec

from cod_async.config.schema import EnvironmentConfig, LifecycleConfig
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.envs import registry
from cod_async.envs.frozen_lake_obscure.env import FrozenLakeObscure
from cod_async.envs.frozen_lake_obscure.oracle import answer
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.hint import prompts_for
from cod_async.lifecycle.packs import PackPlan, plan_pack
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.lifecycle.rollout import LifecycleSpec, initial_state, play
from cod_async.lifecycle.segment import Row, Segment, Version, VersionSpan
from cod_async.models.tokenizers import write_chatml_tokenizer
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import TrainItem

NUM_TURNS = 5
PACK_SIZE = 5
MAX_CONTEXT_TOKENS = 4096
VOCAB_SIZE = 2048
SEED = 11

THOUGHTS = (
    "The goal is below me and to the right, so I need a code that moves down.",
    "That code did not move me; it points at the edge of the lake.",
    "There is a hole beside me, I had better not go that way.",
    "I have not tried this code yet, and every cell around me is safe.",
    "Going back costs one step, but it keeps me out of the hole.",
)
"""What the player says before it answers, one to three of them."""


@dataclass
class ScriptedEngine:
    """Answers with the tokens of a script; every log-prob is -1 until a model has been asked.

    Attributes:
        environment: the game, which the script may look into.
        renderer: makes tokens of the script's text.
        choices: draws among safe moves and thoughts.
    """

    environment: FrozenLakeObscure
    renderer: Renderer
    choices: random.Random
    counters: EngineCounters = field(default_factory=EngineCounters)
    max_context_tokens: int = MAX_CONTEXT_TOKENS

    @property
    def extra_counters(self) -> dict[str, float]:
        """No more numbers."""
        return {}

    @property
    def version(self) -> Version:
        """The starting weights."""
        return Version(0, 0)

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        """Answer with the script's next text: a move in solve episodes, a hint in updates."""
        is_update = session is not None and int(session.rpartition(".o")[2]) % 2 == 1
        text = self._hint() if is_update else self._move()
        ids = [*self.renderer.tokenizer.encode(text), self.renderer.end_of_turn_id]
        return Completion(ids, [-1.0] * len(ids), (VersionSpan(self.version, len(ids)),), "stop")

    def _move(self) -> str:
        lake, player = self.environment.lake, self.environment.player
        mapping = self.environment.hidden()["mapping"]
        safe = [code for code in range(4) if lake.at(lake.destination(player, mapping[code])) not in "GH"]
        thoughts = self.choices.sample(THOUGHTS, self.choices.randint(1, 3))
        return " ".join([*thoughts, answer(self.choices.choice(safe) + 1)])

    def _hint(self) -> str:
        prompts = prompts_for(self.environment.prompt_style)
        code = self.choices.randint(1, 4)
        return f"{prompts.start}\n- Direction {code} has not moved me into a hole yet.\n{prompts.end}"

    async def close_session(self, session: str) -> None:
        """Nothing is kept."""

    async def update_weights(self, manifest: Manifest) -> None:
        """Refuse: a script has no weights."""
        raise NotImplementedError("a scripted engine has no weights")

    def announce(self, manifest: Manifest) -> None:
        """Nothing to do."""

    async def aclose(self) -> None:
        """Nothing to close."""


@dataclass(frozen=True)
class Recording:
    """The solve episodes of a group.

    Attributes:
        whole: one row per episode, as the rollout records it.
        per_turn: the same, one row per turn.
        vocab_size: of the tokenizer.
    """

    whole: list[TrainItem]
    per_turn: list[TrainItem]
    vocab_size: int


def split_turns(row: Row) -> tuple[Row, ...]:
    """Return a row's turns as rows of their own, each with everything before it as context."""
    ids, behavior = row.token_ids.numpy(), row.behavior_logprobs.numpy()
    versions = [span.version for span in row.versions for _ in range(span.num_tokens)]
    turns = []
    done = 0
    for start, stop in row.action_spans:
        count = stop - start
        turns.append(
            Row(
                token_ids=Array.of(ids[:stop], "<i4"),
                action_spans=((start, stop),),
                behavior_logprobs=Array.of(behavior[done : done + count], "<f4"),
                versions=tuple(VersionSpan(version, 1) for version in versions[done : done + count]),
            )
        )
        done += count
    return tuple(turns)


def _tokenizer(folder: Path, plan: PackPlan) -> Renderer:
    """Write a byte-level ChatML tokenizer made from the pack's own texts, and load it."""
    texts = list(THOUGHTS) * 4
    for task in plan.tasks():
        spec = registry.get(task.environment)
        environment = spec.make(spec.options(task.preset, task.options))
        observation = environment.reset(task)
        prompts = prompts_for(environment.prompt_style)
        texts += [prompts.solve_system(environment.system_prompt(), prompts.initial), observation]
    write_chatml_tokenizer(folder, texts, VOCAB_SIZE, MAX_CONTEXT_TOKENS)
    return load_renderer(folder, "chatml")


async def _play(plan: PackPlan, member: int, renderer: Renderer) -> list[Segment]:
    tasks = plan.tasks()
    options = registry.get(tasks[0].environment).options(tasks[0].preset, tasks[0].options)
    environment = FrozenLakeObscure(options)
    engine = ScriptedEngine(environment, renderer, random.Random(f"{SEED}/{member}"))
    spec = LifecycleSpec("bench", 0, member, 0, "bench", tasks, SEED)
    lifecycle = play(
        spec,
        initial_state(environment),
        engine=engine,
        environment=environment,
        renderer=renderer,
        config=LifecycleConfig(pack_size=PACK_SIZE, max_response_tokens=512, max_hint_tokens=512),
        temperature=1.0,
        top_p=1.0,
        max_context_tokens=MAX_CONTEXT_TOKENS,
    )
    return [segment async for segment in lifecycle]


def record(group_size: int) -> Recording:
    """Play a group of the pack and return its solve episodes; equal calls give equal recordings.

    Raises:
        RuntimeError: an episode did not take exactly five turns.
    """
    options = {"agent_max_steps": NUM_TURNS, "env_max_steps": NUM_TURNS}
    mixture = [EnvironmentConfig(name="frozen_lake_obscure", preset="easy", options=options)]
    plan = plan_pack(mixture, PACK_SIZE, SEED, group=0)
    with tempfile.TemporaryDirectory() as folder:
        renderer = _tokenizer(Path(folder), plan)
    choices = random.Random(SEED)
    whole = []
    for member in range(group_size):
        for segment in asyncio.run(_play(plan, member, renderer)):
            if segment.kind != "solve":
                continue
            if len(segment.rows[0].action_spans) != NUM_TURNS:
                raise RuntimeError(f"{segment.key} has {len(segment.rows[0].action_spans)} turns")
            whole.append(
                TrainItem(
                    key=segment.key,
                    kind="solve",
                    position=segment.position,
                    rows=segment.rows,
                    advantage=choices.gauss(0.0, 1.0),
                    lag_steps=0.0,
                )
            )
    per_turn = [msgspec.structs.replace(item, rows=split_turns(item.rows[0])) for item in whole]
    return Recording(whole, per_turn, renderer.tokenizer.vocab_size)
