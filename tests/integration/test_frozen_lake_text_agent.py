"""FrozenLake-Obscure through the real rollout, played by a note-taker that reads nothing but its prompts.

The engine below turns token ids back to text and answers like a careful, simple-minded model: it plans on the
drawn map with what its hint says about the actions, tries an unknown action when it must, and writes down
every move it can read from the trajectory. If its reward rises with position, the prompts, the trajectory,
the feedback and the hint block carry all that connecting the dots needs; if the hint is blanked, the rise
must vanish.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Sequence
from pathlib import Path

from cod_async.config.schema import EnvironmentConfig, LifecycleConfig
from cod_async.engines.base import Completion, EngineCounters, SamplingParams
from cod_async.envs.frozen_lake_obscure import SPEC
from cod_async.lifecycle.episodes import LifecycleSpec, ShownHint
from cod_async.lifecycle.hint import prompts_for
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.lifecycle.rollout import initial_state, play
from cod_async.lifecycle.segment import Segment, Version, VersionSpan
from cod_async.models.tokenizers import write_chatml_tokenizer
from cod_async.weights.manifest import Manifest

PROMPTS = prompts_for("full")
MOVED = re.compile(r"action was Direction (\d)\. It moved you from \((\d), (\d)\) to \((\d), (\d)\)")
FACT = re.compile(r"Direction (\d) moves P (up|down|left|right)\.")
NAMES = {(-1, 0): "up", (1, 0): "down", (0, -1): "left", (0, 1): "right"}
DELTAS = {name: delta for delta, name in NAMES.items()}


def facts_in(text: str) -> dict[str, str]:
    """Read facts from hints and from reported moves, later ones last."""
    facts = dict(FACT.findall(text))
    for code, *numbers in MOVED.findall(text):
        row, col, new_row, new_col = map(int, numbers)
        facts[code] = NAMES[new_row - row, new_col - col]
    return facts


def solve(text: str) -> str:
    """Take the next action: along a shortest path if its direction is known, else an untried action."""
    facts = facts_in(text)
    drawn = text.split("The lake now:\n")[-1].splitlines()
    grid = []
    for line in drawn:
        if "\t" not in line:
            break
        grid.append([cell.strip() for cell in line.split("\t")[:-1]])
    goal, player = (
        next((r, c) for r, row in enumerate(grid) for c, cell in enumerate(row) if cell == symbol)
        for symbol in "GP"
    )
    distance = {goal: 0}
    queue = deque([goal])
    while queue:
        r, c = queue.popleft()
        for dr, dc in NAMES:
            cell = (r + dr, c + dc)
            inside = 0 <= cell[0] < len(grid) and 0 <= cell[1] < len(grid)
            if inside and cell not in distance and grid[cell[0]][cell[1]] != "O":
                distance[cell] = distance[r, c] + 1
                queue.append(cell)
    known = [
        (distance[player[0] + DELTAS[move][0], player[1] + DELTAS[move][1]], code)
        for code, move in sorted(facts.items())
        if (player[0] + DELTAS[move][0], player[1] + DELTAS[move][1]) in distance
    ]
    if known and min(known)[0] < distance[player]:
        return f"I know the way. <answer>Direction {min(known)[1]}</answer>"
    tried = re.findall(r"action was Direction (\d)\. You are still", text.split("The lake now:\n", 1)[1])
    untried = [code for code in "1234" if code not in facts]
    code = next((code for code in untried if code not in tried), (untried or ["1"])[0])
    return f"I try it out. <answer>Direction {code}</answer>"


def update(text: str) -> str:
    """Write down everything known."""
    facts = facts_in(text)
    lines = [f"- Direction {code} moves P {move}." for code, move in sorted(facts.items())]
    return "\n".join(["What I know:", PROMPTS.start, *(lines or ["- nothing yet"]), PROMPTS.end])


class TextAgentEngine:
    """Implements the Engine protocol by text functions; every log-prob is 0 because nothing is random."""

    def __init__(self, renderer: Renderer) -> None:
        self.counters = EngineCounters()
        self.version = Version(0, 0)
        self.max_context_tokens = 30_000
        self.renderer = renderer

    @property
    def extra_counters(self) -> dict[str, float]:
        return {}

    async def generate(
        self, token_ids: Sequence[int], params: SamplingParams, *, session: str | None = None
    ) -> Completion:
        text = self.renderer.tokenizer.decode(token_ids)
        reply = update(text) if PROMPTS.start in text else solve(text)
        ids = [*self.renderer.tokenizer.encode(reply), self.renderer.end_of_turn_id]
        assert len(ids) <= params.max_tokens
        return Completion(
            token_ids=ids,
            logprobs=[0.0] * len(ids),
            versions=(VersionSpan(self.version, len(ids)),),
            finish="stop",
        )

    async def close_session(self, session: str) -> None:
        return None

    async def update_weights(self, manifest: Manifest) -> None:
        return None

    def announce(self, manifest: Manifest) -> None:
        return None

    async def aclose(self) -> None:
        return None


async def lifecycle(renderer: Renderer, group: int, shown_hint: ShownHint | None) -> list[Segment]:
    plan = plan_pack([EnvironmentConfig(name=SPEC.name, preset="easy")], 4, 42, group)
    environment = SPEC.make(SPEC.options(plan.preset, plan.options))
    spec = LifecycleSpec(
        run="r", group=group, member=0, lease_epoch=0, actor="a", tasks=plan.tasks(), sampling_seed=group
    )
    segments = play(
        spec,
        initial_state(environment),
        engine=TextAgentEngine(renderer),
        environment=environment,
        renderer=renderer,
        config=LifecycleConfig(max_response_tokens=500, max_hint_tokens=1000),
        temperature=1.0,
        top_p=1.0,
        max_context_tokens=30_000,
        shown_hint=shown_hint,
    )
    return [segment async for segment in segments]


def curve(renderer: Renderer, num_packs: int, shown_hint: ShownHint | None = None) -> list[float]:
    rewards = [0.0] * 4
    for group in range(num_packs):
        segments = asyncio.run(lifecycle(renderer, group, shown_hint))
        assert [segment.kind for segment in segments] == ["solve", "update"] * 3 + ["solve"]
        for segment in segments:
            assert segment.finish != "format_error" and len(segment.rows) == 1
            if segment.kind == "solve":
                assert 1 <= len(segment.rows[0].action_spans) <= 8
                rewards[segment.position] += segment.reward / num_packs
            else:
                assert segment.reward == 0.0
    return rewards


def test_note_taker_connects_the_dots_from_text_alone(tmp_path: Path) -> None:
    write_chatml_tokenizer(tmp_path, [SPEC.make(SPEC.options("easy")).system_prompt()] * 3, 340, 32_000)
    renderer = load_renderer(tmp_path)
    carried = curve(renderer, 60)
    assert carried[0] < 0.6 and carried[3] > carried[0] + 0.2
    blanked = curve(renderer, 60, lambda position, hint: PROMPTS.initial)
    assert blanked[0] == carried[0] and abs(sum(blanked[1:]) / 3 - blanked[0]) < 0.15
