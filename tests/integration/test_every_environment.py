"""Every environment in every preset through the real processes, played by scripts; an actor dies halfway.

The scripts are in ``tests/scripted_world.py``, the one part that is not real, the engine, in
``tests/scripted_run.py``. What the run left in its database is compared with the same policies playing the
same packs directly, without any of the pipeline: the same answers, rewards and endings, prompts that read as
they should, hints that arrive as they were written, log-probs that a plain forward gives again.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from scripted_world import PLAYERS, Player, hint_kind, hint_response, make_environment, tasks_of

from cod_async.config import load_config, load_resolved
from cod_async.config.schema import Config
from cod_async.envs import registry
from cod_async.envs.base import StepResult
from cod_async.lifecycle.hint import HintPrompts, prompts_for
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.lifecycle.segment import Segment
from cod_async.models.directory import load_model, set_weights
from cod_async.store.schema import connect_reader
from cod_async.weights.load import load_weights
from cod_async.weights.publish import read_manifest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/ci/every_environment.toml"
KILL_AFTER_SEGMENTS = 120
TEMPLATE = (
    "<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
    "<|im_start|>assistant\n<think>\n\n</think>\n\n"
)
NEXT_TURN = "\n<|im_start|>user\n{user}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
STEPS_ARE_PENALIZED = {
    "alchemy_random": True,
    "frozen_lake_obscure": True,
    "grid_navigation": False,
    "hidden_buttons": True,
    "hidden_matches": True,
    "learn2ask": False,
    "optimal_control": False,
    "pde_discovery": False,
    "terminal": False,
}
"""Which rewards lose ``solve_penalty * T / T_max``, as the paper's reference has it."""
NOTHING_YET = {"full": "Hints: (nothing has been noted so far)", "terse": "Hints : null"}
NONE_AVAILABLE = {"full": "Hints: (no hints are available)", "terse": "Hints : none"}


@dataclass(frozen=True)
class Turn:
    """An observation, the response to it, and what came of that."""

    observation: str
    response: str
    result: StepResult


@dataclass(frozen=True)
class Played:
    """One task as a policy played it directly."""

    system: str
    turns: tuple[Turn, ...]
    max_steps: int
    feedback: str
    trajectory: str


@dataclass(frozen=True)
class Run:
    """A finished run, opened for looking."""

    run_dir: Path
    config: Config
    renderer: Renderer
    lifecycles: dict[tuple[int, int], list[Segment]]
    summary: dict[str, Any]

    def environment_of(self, group: int) -> tuple[str, str]:
        task = tasks_of(self.config, group)[0]
        return task.environment, task.preset


def _prompts(run: Run, group: int) -> tuple[HintPrompts, HintPrompts]:
    """The prompts of solve and of update episodes."""
    _, environment = make_environment(tasks_of(run.config, group)[0])
    prompts = prompts_for(environment.prompt_style)
    return prompts, environment.update_prompts() or prompts


def _play_directly(config: Config, group: int, member: int) -> list[Played]:
    """Let a lifecycle's player play the pack as ``cod env play`` would."""
    tasks = tasks_of(config, group)
    spec, environment = make_environment(tasks[0])
    player, played = Player(spec, config, group, member), []
    for position, task in enumerate(tasks):
        observation = environment.reset(task)
        messages = [("user", observation)]
        turns: list[Turn] = []
        while not turns or not turns[-1].result.is_done:
            response = player.answer(position, environment, observation)
            result = asyncio.run(environment.step(response))
            turns.append(Turn(observation, response, result))
            observation = result.observation
            messages += [("assistant", response), ("user", observation)]
        player.hear(environment.feedback())
        system = environment.system_prompt()
        trajectory = environment.trajectory(messages[:-1])
        if trajectory is None:
            trajectory = prompts_for(environment.prompt_style).trajectory(system, messages[:-1])
        played.append(Played(system, tuple(turns), environment.max_steps, environment.feedback(), trajectory))
    return played


# ---------------------------------------------------------------------------------------------------- the run


def _kill_an_actor(run_dir: Path, train: subprocess.Popen[bytes], log: Path) -> None:
    """Kill the actor once some segments are committed and most of its lifecycles are under way."""
    deadline = time.monotonic() + 200
    while time.monotonic() < deadline and train.poll() is None:
        with contextlib.suppress(Exception), contextlib.closing(connect_reader(run_dir)) as connection:
            (count,) = connection.execute("SELECT count(*) FROM segments").fetchone()
            if count >= KILL_AFTER_SEGMENTS:
                found = re.search(r"actor-0 started \(pid (\d+)\)", log.read_text())
                assert found is not None
                os.kill(int(found.group(1)), signal.SIGKILL)
                return
        time.sleep(0.05)
    raise AssertionError(f"the launcher ended with {train.poll()}: {log.read_text()[-3000:]}")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("every")
    run_dir, log = folder / "every_environment", folder / "train.log"
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, str(ROOT / "tests/scripted_run.py"), "train", str(CONFIG)]
    with log.open("w") as out:
        train = subprocess.Popen(
            [*command, "--set", f'run.output_dir="{folder}"'],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
        try:
            _kill_an_actor(run_dir, train, log)
            assert train.wait(timeout=350) == 0, log.read_text()[-3000:]
        finally:
            if train.poll() is None:
                train.terminate()
                train.wait(timeout=60)
    yield _open(run_dir)


def _open(run_dir: Path) -> Run:
    lifecycles: dict[tuple[int, int], list[Segment]] = collections.defaultdict(list)
    with contextlib.closing(connect_reader(run_dir)) as connection:
        for (body,) in connection.execute(
            "SELECT body FROM segments JOIN payloads USING (payload) WHERE state = 'trained' "
            "ORDER BY grp, member, ordinal"
        ):
            segment = msgspec.msgpack.decode(body, type=Segment)
            lifecycles[segment.key.group, segment.key.member].append(segment)
    config = load_resolved(run_dir)
    renderer = load_renderer(run_dir / "model", config.model.renderer)
    summary: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return Run(run_dir, config, renderer, dict(lifecycles), summary)


# -------------------------------------------------------------------------------------------------- the tests


def test_the_run_meets_every_preset() -> None:
    config = load_config([CONFIG])
    wanted = {(name, preset) for name in registry.names() for preset in registry.get(name).presets}
    assert {(chosen.name, chosen.preset) for chosen in config.environments} == wanted
    assert set(STEPS_ARE_PENALIZED) == {name for name, _ in wanted}
    assert config.lifecycle.group_size == len(PLAYERS)

    def met(seed: int) -> set[tuple[str, str]]:
        groups = range(config.run.num_steps * config.learner.groups_per_step)
        plans = (plan_pack(config.environments, 1, seed, group) for group in groups)
        return {(plan.environment, plan.preset) for plan in plans}

    missing = wanted - met(config.run.seed)
    assert not missing, f"run.seed meets no pack of {sorted(missing)}; look for another one, or more steps"


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_everything_is_trained_on_once(run: Run) -> None:
    config, ledger = run.config, run.summary["ledger"]
    num_groups = config.run.num_steps * config.learner.groups_per_step
    ordinals = list(range(2 * config.lifecycle.pack_size - 1))
    assert set(run.lifecycles) == {(g, m) for g in range(num_groups) for m in range(len(PLAYERS))}
    for segments in run.lifecycles.values():
        assert [segment.key.ordinal for segment in segments] == ordinals
        assert [segment.is_last for segment in segments] == [k == ordinals[-1] for k in ordinals]
        assert all(segment.kind == ("update" if segment.key.ordinal % 2 else "solve") for segment in segments)
    assert run.summary["status"] == "finished" and ledger["balanced"]
    stored = [segment for segments in run.lifecycles.values() for segment in segments]
    assert ledger["segments"]["trained"] == len(stored) == num_groups * len(PLAYERS) * len(ordinals)
    assert ledger["tokens"]["trained"] == sum(segment.num_action_tokens for segment in stored)
    assert not ledger["segments"]["dropped"] and not ledger["segments"]["in_flight"]
    with contextlib.closing(connect_reader(run.run_dir)) as connection:
        (num_retries,) = connection.execute("SELECT sum(num_retries) FROM leases").fetchone()
        texts = connection.execute("SELECT counters FROM sessions WHERE role = 'actor'").fetchall()
    assert num_retries == 0  # no environment and no engine failed
    counters = [json.loads(text) for (text,) in texts]
    assert sum(values.get("environment_workers_started", 0) for values in counters) >= 2
    assert not [name for values in counters for name in values if "workers_lost" in name]
    (actor,) = (entry for entry in run.summary["processes"] if entry["role"] == "actor")
    assert actor["restarts"] == 1
    lines = (run.run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [record for record in map(json.loads, lines) if record["kind"] == "step"]
    assert len(steps) == config.run.num_steps
    assert sum(step["num_action_tokens"] for step in steps) == ledger["tokens"]["trained"]
    for step in steps:
        assert all(math.isfinite(value) for value in step["learner"].values()), step["learner"]
        assert step["learner"]["grad_norm"] > 0 and 0 <= step["lag_max"] <= config.staleness.max_lag


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_lifecycles_are_those_of_direct_play(run: Run) -> None:
    num_takeovers = 0
    finishes: dict[str, set[str]] = collections.defaultdict(set)
    for (group, member), segments in run.lifecycles.items():
        num_takeovers += len({segment.lease_epoch for segment in segments}) > 1
        played = _play_directly(run.config, group, member)
        prompts, update_prompts = _prompts(run, group)
        carried = NOTHING_YET[prompts.style]
        rewards: list[float] = []
        for segment in segments:
            task = played[segment.position]
            assert (segment.environment, segment.preset) == run.environment_of(group)
            if segment.kind == "solve":
                _check_solve(run, segment, task, prompts, carried)
                rewards.append(segment.reward)
                finishes[segment.environment].add(segment.finish)
            else:
                carried = _check_update(run, segment, task, update_prompts, carried, rewards[-1])
            assert segment.state_after.hint == carried
            assert segment.state_after.task_rewards == tuple(rewards)
    assert num_takeovers > 5
    for name, found in finishes.items():
        assert "success" in found and len(found) > 1, f"{name}: {found}"


def _check_solve(run: Run, segment: Segment, task: Played, prompts: HintPrompts, carried: str) -> None:
    """The row reads as the conversation of direct play; reward and end are its own, less the penalty."""
    first, last = task.turns[0], task.turns[-1].result
    system = prompts.solve_system(task.system, carried)
    assert system.startswith(task.system.strip()) and system.removesuffix(" .").endswith(carried)
    texts = [TEMPLATE.format(system=system.strip(), user=first.observation.strip())]
    texts += [NEXT_TURN.format(user=turn.observation.strip()) for turn in task.turns[1:]]
    _check_row(run, segment, texts, [turn.response for turn in task.turns])
    assert (segment.raw_reward, segment.finish) == (last.raw_reward, last.finish)
    reward = last.raw_reward
    if STEPS_ARE_PENALIZED[segment.environment] and reward > 0:
        reward = max(0.0, reward - 0.1 * len(task.turns) / task.max_steps)
    assert segment.reward == pytest.approx(reward, abs=1e-12)
    assert segment.metrics["num_steps"] == len(task.turns)


def _check_update(
    run: Run, segment: Segment, task: Played, prompts: HintPrompts, carried: str, reward: float
) -> str:
    """The row asks for and holds the hint that the script wrote; return the hint that is carried on."""
    key = segment.key
    response, body = hint_response(run.config, key.group, key.member, segment.position)
    assert (body is None) == (hint_kind(key.group, key.member, segment.position) == "malformed")
    system, user = prompts.update_messages(carried, task.trajectory, reward, task.feedback)
    _check_row(run, segment, [TEMPLATE.format(system=system.strip(), user=user.strip())], [response])
    assert carried in (user if prompts.style == "full" else system)
    says_reward = f"Reward: {reward:.3f}\n" in user
    assert says_reward == (prompts.style == "full" and segment.environment != "pde_discovery")
    assert segment.reward == segment.raw_reward == (-0.1 if body is None else 0.0)
    assert segment.finish == ("format_error" if body is None else "success")
    if body is None:
        return NONE_AVAILABLE[prompts.style]
    return f"Hints: {body.strip()}" if prompts.style == "full" else f"Hints : {' '.join(body.split())}"


def _check_row(run: Run, segment: Segment, contexts: list[str], responses: list[str]) -> None:
    """The tokens decode to contexts and responses in turn; action spans are the responses alone."""
    (row,) = segment.rows
    ids, place = row.token_ids.numpy().tolist(), 0
    end = run.renderer.end_of_turn_id
    assert len(row.action_spans) == len(contexts) == len(responses)
    for (start, stop), context, response in zip(row.action_spans, contexts, responses, strict=True):
        assert run.renderer.tokenizer.decode(ids[place:start]) == context
        assert run.renderer.tokenizer.decode(ids[start : stop - 1]) == response
        assert ids[stop - 1] == end and end not in ids[start : stop - 1]
        place = stop
    assert place == len(ids) <= run.config.model.max_context_tokens
    assert row.num_action_tokens == sum(stop - start for start, stop in row.action_spans)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_players_lie_between_floor_and_ceiling(run: Run) -> None:
    """``mixed`` between ``random`` and ``oracle`` in the mean; ``oracle`` above ``random`` everywhere."""
    rewards: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for (group, member), segments in run.lifecycles.items():
        name, _ = run.environment_of(group)
        rewards[PLAYERS[member], name] += [s.reward for s in segments if s.kind == "solve"]

    def mean(player: str, name: str) -> float:
        return sum(rewards[player, name]) / len(rewards[player, name])

    for name in STEPS_ARE_PENALIZED:
        ceiling = mean("oracle", name)
        assert mean("rubbish", name) <= mean("random", name) < ceiling >= mean("mixed", name), name
    floor, mixed, top = (
        sum(mean(player, name) for name in STEPS_ARE_PENALIZED) for player in ("random", "mixed", "oracle")
    )
    assert floor < mixed < top


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_logprobs_are_those_of_the_versions_they_name(run: Run) -> None:
    """One lifecycle of each group, by a plain forward in float64 under the weights of each turn."""
    models: dict[str, Any] = {}
    num_checked = 0
    for (group, member), segments in run.lifecycles.items():
        if member != group % len(PLAYERS):
            continue
        for segment in segments:
            (row,) = segment.rows
            ids = torch.tensor([row.token_ids.numpy().tolist()])
            places = [place for start, stop in row.action_spans for place in range(start, stop)]
            behavior = torch.tensor(row.behavior_logprobs.numpy().tolist(), dtype=torch.float64)
            done = 0
            for span in row.versions:
                if str(span.version) not in models:
                    model = load_model(run.run_dir / "model")
                    manifest = read_manifest(run.run_dir, span.version)
                    set_weights(model, load_weights(run.run_dir, manifest), source=str(span.version))
                    models[str(span.version)] = model.double()
                model = models[str(span.version)]
                chosen = places[done : done + span.num_tokens]
                with torch.no_grad():
                    scores = model(ids)[0, [place - 1 for place in chosen]] @ model.head_weight.T
                scores /= run.config.engine.temperature
                expected = torch.log_softmax(scores, dim=-1)[range(len(chosen)), ids[0, chosen]]
                torch.testing.assert_close(
                    behavior[done : done + span.num_tokens], expected, atol=1e-4, rtol=1e-4
                )
                done += span.num_tokens
            assert done == len(places)
            num_checked += done
    assert len(models) > 1 and num_checked > 2000
