"""FrozenLake-Obscure with ChatML through the real processes; what was stored is checked against the rules.

The checks read the run database alone and know the rules by themselves: prompts as text in the template's
form, the hidden mapping from the pack's seed, rewards by the penalty formula, and every solve episode played
again in a fresh environment. One run plays with an untrained model (every answer is garbage), one with a
hand-made player that does a bit of everything.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import math
import os
import random
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import msgspec
import pytest
import torch
from frozen_lake_world import write_player

from cod_async.config import load_config, load_resolved
from cod_async.config.schema import Config
from cod_async.envs import registry
from cod_async.envs.base import Environment, TaskSpec
from cod_async.lifecycle.rendering import ChatMLRenderer, load_renderer
from cod_async.lifecycle.segment import Row, Segment, Version
from cod_async.models.directory import load_model
from cod_async.store.schema import connect_reader
from cod_async.weights.load import load_weights
from cod_async.weights.publish import read_manifest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/ci/frozen_lake_cpu.toml"
START, END = "=== HINTS BEGIN ===", "=== HINTS END ==="
NOTHING_YET = "Hints: (nothing has been noted so far)"
NONE_AVAILABLE = "Hints: (no hints are available)"
MOVED = re.compile(r"action was Direction (\d)\. It moved you from \((\d), (\d)\) to \((\d), (\d)\)")
STAYED = re.compile(r"action was Direction (\d)\. You are still at \((\d), (\d)\)")
STEPS = {"Down": (1, 0), "Right": (0, 1), "Up": (-1, 0), "Left": (0, -1)}
TEMPLATE = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
NEXT_TURN = "\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"


@dataclass
class Run:
    """A finished run, opened for looking."""

    run_dir: Path
    config: Config
    renderer: ChatMLRenderer
    lifecycles: dict[tuple[int, int], list[Segment]]
    records: dict[int, list[dict[str, float]]]
    pack_seeds: dict[int, int]

    def environment(self) -> Environment:
        chosen = self.config.environments[0]
        spec = registry.get(chosen.name)
        return spec.make(spec.options(chosen.preset, chosen.options))

    def task(self, group: int, position: int) -> TaskSpec:
        chosen = self.config.environments[0]
        return TaskSpec(
            environment=chosen.name,
            preset=chosen.preset,
            options=chosen.options,
            record=self.records[group][position],
            pack_seed=self.pack_seeds[group],
            position=position,
            pack_size=self.config.lifecycle.pack_size,
        )

    def text(self, ids: list[int]) -> str:
        return self.renderer.tokenizer.decode(ids)


def _train(tmp_path: Path, *overrides: str) -> Run:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    settings = [
        f'run.output_dir="{tmp_path}"',
        "evaluation.is_enabled=false",
        "observe.has_plots=false",
        *overrides,
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    done = subprocess.run(
        [sys.executable, "-m", "cod_async", "train", str(CONFIG), *flags],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=280,
    )
    assert done.returncode == 0, f"{done.stdout[-3000:]}{done.stderr[-3000:]}"
    return _open(tmp_path / "frozen_lake_cpu")


def _open(run_dir: Path) -> Run:
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["ledger"]["balanced"]
    lifecycles: dict[tuple[int, int], list[Segment]] = collections.defaultdict(list)
    with contextlib.closing(connect_reader(run_dir)) as connection:
        for (body,) in connection.execute(
            "SELECT body FROM segments JOIN payloads USING (payload) ORDER BY grp, member, ordinal"
        ):
            segment = msgspec.msgpack.decode(body, type=Segment)
            lifecycles[segment.key.group, segment.key.member].append(segment)
        groups = connection.execute("SELECT grp, records_json, pack_seed FROM groups").fetchall()
        (num_trained,) = connection.execute("SELECT count(*) FROM groups WHERE state = 'trained'").fetchone()
    config = load_resolved(run_dir)
    assert num_trained == config.run.num_steps * config.learner.groups_per_step
    renderer = load_renderer(run_dir / "model", config.model.renderer)
    assert isinstance(renderer, ChatMLRenderer)
    return Run(
        run_dir=run_dir,
        config=config,
        renderer=renderer,
        lifecycles=dict(lifecycles),
        records={group: [json.loads(text) for text in json.loads(records)] for group, records, _ in groups},
        pack_seeds={group: int(seed) for group, _, seed in groups},
    )


# ------------------------------------------------------------------------------------------------- the checks


def _check_row(run: Run, segment: Segment) -> Row:
    """The row is well formed; its action spans end with a stop token or at a length limit; return it."""
    (row,) = segment.rows
    ids, lifecycle = row.token_ids.numpy().tolist(), run.config.lifecycle
    limit = lifecycle.max_response_tokens if segment.kind == "solve" else lifecycle.max_hint_tokens
    assert row.num_tokens == row.action_spans[-1][1] <= run.config.model.max_context_tokens
    assert sum(stop - start for start, stop in row.action_spans) == row.num_action_tokens
    assert sum(span.num_tokens for span in row.versions) == row.num_action_tokens
    assert all(math.isfinite(value) and value <= 0 for value in row.behavior_logprobs.numpy().tolist())
    for start, stop in row.action_spans:
        assert 1 <= stop - start <= limit
        assert ids[stop - 1] in run.renderer.stop_ids or stop - start == limit
        assert not run.renderer.stop_ids & set(ids[start : stop - 1])
    for name in ("is_context_overflow", "is_hint_dropped", "num_trajectory_chars_cut"):
        assert not segment.metrics.get(name), f"the context is too small: {name}"
    return row


def _check_solve(run: Run, segment: Segment, carried: str) -> str:
    """A solve episode played again in a fresh environment is the same, to the last prompt token."""
    row, config = _check_row(run, segment), run.config.lifecycle
    ids = row.token_ids.numpy().tolist()
    environment = run.environment()
    observation = environment.reset(run.task(segment.key.group, segment.position))
    rules = environment.system_prompt().strip()
    opening = run.text(ids[: row.action_spans[0][0]])
    system, user = re.fullmatch(  # type: ignore[union-attr]
        re.escape(TEMPLATE).replace(r"\{system\}", "(.*)").replace(r"\{user\}", "(.*)"), opening, re.DOTALL
    ).groups()
    assert system.startswith(rules) and system.endswith(f"\n\n{carried}") and user == observation.strip()
    assert system.removeprefix(rules).lstrip().startswith("## ")  # the hint section; no length section
    seen, messages, result = opening, [("user", observation)], None
    for number, (start, stop) in enumerate(row.action_spans):
        assert result is None, "the policy went on after the end of the game"
        response = run.renderer.decode_response(ids[start:stop])
        messages.append(("assistant", response))
        step = asyncio.run(environment.step(response))
        if step.is_done:
            result = step
            assert number == len(row.action_spans) - 1
            break
        messages.append(("user", step.observation))
        follow = NEXT_TURN.format(user=step.observation.strip())
        if ids[stop - 1] != run.renderer.end_of_turn_id:
            follow = "<|im_end|>" + follow
        context = run.text(ids[stop : row.action_spans[number + 1][0]])
        assert context == follow
        seen += response + context
    assert result is not None and result.finish == segment.finish and result.raw_reward == segment.raw_reward
    num_turns = len(row.action_spans)
    penalty = config.solve_penalty * num_turns / environment.max_steps
    expected = max(0.0, segment.raw_reward - penalty) if segment.raw_reward > 0 else 0.0
    assert segment.reward == pytest.approx(expected, abs=1e-12) and 0.0 <= segment.reward <= 1.0
    assert (segment.raw_reward == 1.0) == (segment.finish == "success")
    if segment.finish == "format_error":
        assert segment.reward == 0.0
    _check_mapping(run, segment, environment, seen)
    _check_pending(segment, environment, messages, rules)
    return segment.state_after.hint


def _check_mapping(run: Run, segment: Segment, environment: Environment, seen: str) -> None:
    """The moves that the policy was shown are those of the mapping that the pack's seed stands for."""
    moves = ["Down", "Right", "Up", "Left"]
    random.Random(run.pack_seeds[segment.key.group]).shuffle(moves)
    assert segment.pack_seed == run.pack_seeds[segment.key.group]
    assert environment.hidden() == {"mapping": moves}
    view = environment.task_view()
    size = len(view["map"])
    assert size == run.records[segment.key.group][segment.position]["size"]
    for code, *numbers in MOVED.findall(seen):
        row, col, new_row, new_col = map(int, numbers)
        assert (new_row - row, new_col - col) == STEPS[moves[int(code) - 1]]
    for code, *numbers in STAYED.findall(seen):
        row, col = map(int, numbers)
        delta = STEPS[moves[int(code) - 1]]
        assert not (0 <= row + delta[0] < size and 0 <= col + delta[1] < size)
    symbols = {" P \t", " G \t", " O \t", " _ \t"}
    for line in (line for line in seen.split("\n") if line.endswith("\t")):
        cells = re.findall(r" . \t", line)
        assert "".join(cells) == line and set(cells) <= symbols and len(cells) == size


def _check_pending(
    segment: Segment, environment: Environment, messages: list[tuple[str, str]], rules: str
) -> None:
    """The update will see rules, each observation with the response to it, reward and feedback."""
    pending = segment.state_after.pending
    assert (pending is None) == segment.is_last
    if pending is None:
        return
    assert pending.reward == segment.reward and pending.feedback == environment.feedback()
    pairs = list(zip(messages[::2], messages[1::2], strict=True))
    steps = [
        f"Step {number}\nObservation: {user.strip()}\nAction: {response.strip() or '(none was taken)'}"
        for number, ((_, user), (_, response)) in enumerate(pairs, start=1)
    ]
    assert pending.trajectory == "\n\n".join([f"Rules given to the solver:\n{rules}", *steps])


def _check_update(run: Run, segment: Segment, before: Segment, carried: str) -> str:
    """An update is one response to the record of the solve before it; return the hint that it leaves."""
    row, pending = _check_row(run, segment), before.state_after.pending
    ((start, stop),) = row.action_spans
    ids = row.token_ids.numpy().tolist()
    opening = run.text(ids[:start])
    assert pending is not None
    assert opening.startswith("<|im_start|>system\n") and opening.endswith(TEMPLATE.rpartition("{user}")[2])
    user = opening.partition("<|im_end|>\n<|im_start|>user\n")[2]
    parts = (carried, pending.trajectory, f"Reward: {before.reward:.3f}\nFeedback: {pending.feedback}")
    places = [user.find(part) for part in parts]
    assert -1 not in places and places == sorted(places)
    response = run.renderer.decode_response(ids[start:stop])
    once = response.count(START) == 1 and response.count(END) == 1
    body = response.partition(START)[2].partition(END)[0].strip() if once else ""
    assert segment.reward == segment.raw_reward == (0.0 if body else -run.config.lifecycle.hint_penalty)
    assert segment.finish == ("success" if body else "format_error")
    hint = f"Hints: {body}" if body else NONE_AVAILABLE
    assert segment.state_after.hint == hint
    return hint


def _check_lifecycles(run: Run) -> collections.Counter[str]:
    """Check every stored lifecycle from its first segment; return how often each finish came."""
    num_episodes = 2 * run.config.lifecycle.pack_size - 1
    finishes: collections.Counter[str] = collections.Counter()
    for (group, _), segments in run.lifecycles.items():
        carried, before = NOTHING_YET, None
        assert [segment.key.ordinal for segment in segments] == list(range(len(segments)))
        for segment in segments:
            ordinal = segment.key.ordinal
            kind = "update" if ordinal % 2 else "solve"
            assert (segment.kind, segment.position) == (kind, ordinal // 2)
            assert segment.is_last == (ordinal == num_episodes - 1)
            assert segment.state_after.next_ordinal == ordinal + 1
            finishes[f"{kind} {segment.finish}"] += 1
            finishes[f"{kind} turns {len(segment.rows[0].action_spans)}"] += 1
            if kind == "solve":
                assert _check_solve(run, segment, carried) == carried
                assert segment.state_after.task_rewards[-1] == segment.reward
            else:
                assert before is not None
                carried = _check_update(run, segment, before, carried)
            before = segment
        assert len(run.records[group]) == run.config.lifecycle.pack_size
    return finishes


def _check_logprobs(run: Run, at_most: int = 24) -> int:
    """Behaviour log-probs are those of a plain forward under the version they claim; count them."""
    model = load_model(run.run_dir / "model")
    by_version: dict[Version, list[Row]] = collections.defaultdict(list)
    for segments in run.lifecycles.values():
        for row in (row for segment in segments for row in segment.rows if len(row.versions) == 1):
            by_version[row.versions[0].version].append(row)
    num_checked = 0
    for version, rows in sorted(by_version.items()):
        model.load_state_dict(load_weights(run.run_dir, read_manifest(run.run_dir, version)), strict=False)
        for row in rows[:: max(1, len(rows) * len(by_version) // at_most)]:
            ids = torch.tensor([row.token_ids.numpy().tolist()])
            with torch.no_grad():
                logprobs = torch.log_softmax(
                    model.logits(ids)[0].double() / run.config.engine.temperature, dim=-1
                )
            places = [place for start, stop in row.action_spans for place in range(start, stop)]
            current = logprobs[[place - 1 for place in places], ids[0, places]]
            behavior = torch.tensor(row.behavior_logprobs.numpy().tolist(), dtype=torch.float64)
            torch.testing.assert_close(behavior, current, atol=1e-4, rtol=1e-4)
            num_checked += len(places)
    return num_checked


# -------------------------------------------------------------------------------------------------- the tests


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_hand_made_player(tmp_path: Path) -> None:
    write_player(tmp_path / "player", load_config([CONFIG]))
    run = _train(tmp_path, f'model.path="{tmp_path / "player"}"', "lifecycle.group_size=4")
    finishes = _check_lifecycles(run)
    for what in ("success", "failure", "format_error", "turns 1", "turns 2", "turns 3"):
        assert finishes[f"solve {what}"], f"no solve episode had {what}: {finishes}"
    assert finishes["update success"] and finishes["update format_error"], finishes
    rewards = {segment.reward for segments in run.lifecycles.values() for segment in segments}
    assert len(rewards) > 3, rewards
    assert _check_logprobs(run) > 20


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_untrained_model(tmp_path: Path) -> None:
    run = _train(tmp_path, "run.num_steps=2")
    finishes = _check_lifecycles(run)
    assert finishes["solve format_error"] == finishes["solve turns 1"] > 0
    assert finishes["update format_error"] == finishes["update turns 1"] > 0
    assert _check_logprobs(run) > 100
