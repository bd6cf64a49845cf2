"""Conversations of more than 32,000 tokens through the real processes, with an actor killed on the way.

What the run left in its database is checked against the rules: deltas chain up, every task played again in a
fresh environment gives the same reward, behaviour log-probs are those of a plain forward over the whole
conversation, and the gradient of the stored batch is that of one row per segment.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import hashlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest
import torch
from frozen_lake_world import write_player

from cod_async.config import load_config, load_resolved
from cod_async.config.schema import Config
from cod_async.envs import registry
from cod_async.envs.base import TaskSpec
from cod_async.learner.packing import flatten
from cod_async.learner.step import Trainer
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.rendering import load_renderer
from cod_async.lifecycle.segment import Row, Segment
from cod_async.models.directory import load_model
from cod_async.store.schema import connect_reader
from cod_async.wire.messages import TrainItem

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/ci/transcript_cpu.toml"
NUM_TASKS = 128
NUM_COMPARED = 2
"""Segments whose gradient is also taken from a row of their own; it costs a pass over thousands of tokens."""

Lifecycles = dict[tuple[int, int], list[Segment]]


def _train(folder: Path, model_dir: Path) -> Path:
    """Train one step, killing the actor once it is well into its lifecycles; return the run folder."""
    settings = [
        f'run.output_dir="{folder}"',
        f'model.path="{model_dir}"',
        f"lifecycle.pack_size={NUM_TASKS}",
        "run.num_steps=1",
        "observe.has_plots=false",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    run_dir = folder / "transcript_cpu"
    log = folder / "train.log"
    with log.open("w") as out:
        train = subprocess.Popen(
            [sys.executable, "-m", "cod_async", "train", str(CONFIG), *flags],
            stdout=out,
            stderr=subprocess.STDOUT,
            env=environment,
            cwd=folder,
        )
        try:
            os.kill(_actor_after(run_dir, num_segments=30, train=train), signal.SIGKILL)
            assert train.wait(timeout=400) == 0, log.read_text()[-3000:]
        finally:
            if train.poll() is None:
                train.terminate()
                train.wait(timeout=60)
    return run_dir


def _actor_after(run_dir: Path, num_segments: int, train: subprocess.Popen[bytes]) -> int:
    """Wait until so many segments are committed; return the actor's process id."""
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and train.poll() is None:
        with contextlib.suppress(Exception), contextlib.closing(connect_reader(run_dir)) as connection:
            (count,) = connection.execute("SELECT count(*) FROM segments").fetchone()
            if count >= num_segments:
                found = re.search(
                    r"actor-0 started \(pid (\d+)\)", (run_dir.parent / "train.log").read_text()
                )
                assert found is not None
                return int(found.group(1))
        time.sleep(0.1)
    raise AssertionError(f"no {num_segments} segments came; the launcher ended with {train.poll()}")


def _read(run_dir: Path) -> tuple[Lifecycles, list[list[dict[str, float]]], int]:
    lifecycles: Lifecycles = collections.defaultdict(list)
    with contextlib.closing(connect_reader(run_dir)) as connection:
        for (body,) in connection.execute(
            "SELECT body FROM segments JOIN payloads USING (payload) WHERE grp = 0 ORDER BY member, ordinal"
        ):
            segment = msgspec.msgpack.decode(body, type=Segment)
            lifecycles[segment.key.group, segment.key.member].append(segment)
        groups = connection.execute("SELECT records_json, pack_seed FROM groups WHERE grp = 0").fetchall()
        ((records, seed),) = groups
    return dict(lifecycles), [[json.loads(text) for text in json.loads(records)]], int(seed)


def _assembled(segments: list[Segment]) -> tuple[list[int], list[int]]:
    """Put deltas end to end, checking the chain by hand; return the ids and where each delta begins."""
    ids: list[int] = []
    starts, digest = [], ""
    for segment in segments:
        (row,) = segment.rows
        assert row.parent is not None
        assert (row.parent.num_tokens, row.parent.digest) == (len(ids), digest)
        digest = hashlib.sha256(digest.encode() + b"\0" + row.token_ids.data).hexdigest()
        starts.append(len(ids))
        ids += row.token_ids.numpy().tolist()
    return ids, starts


def _replay(segments: list[Segment], config: Config, run_dir: Path, records: list[dict[str, float]]) -> None:
    """Play every task again with the stored responses, in one environment object per lifecycle."""
    renderer = load_renderer(run_dir / "model", config.model.renderer)
    chosen = config.environments[0]
    spec = registry.get(chosen.name)
    environment = spec.make(spec.options(chosen.preset, chosen.options))
    ids, starts = _assembled(segments)
    told = ""
    for segment, base in zip(segments, starts, strict=True):
        task = TaskSpec(
            chosen.name,
            chosen.preset,
            {},
            records[segment.position],
            segment.pack_seed,
            segment.position,
            NUM_TASKS,
        )
        observation = environment.reset(task)
        (row,) = segment.rows
        first = row.action_spans[0][0]
        opening = renderer.tokenizer.decode(ids[base : base + first])
        assert observation.strip() in opening and told in opening
        assert opening.count("system\n") == (base == 0)  # the rules are told once
        result = None
        for start, stop in row.action_spans:
            result = asyncio.run(environment.step(renderer.decode_response(ids[base + start : base + stop])))
        assert result is not None and result.is_done
        assert (result.finish, result.raw_reward) == (segment.finish, segment.raw_reward)
        told = f"Reward: {segment.reward:.3f}. {environment.feedback()}"


def _check_logprobs(segments: list[Segment], run_dir: Path, config: Config) -> None:
    model = load_model(run_dir / "model")
    ids, starts = _assembled(segments)
    with torch.no_grad():
        hidden = model(torch.tensor([ids]))[0]
    for segment, base in list(zip(segments, starts, strict=True))[::13]:
        (row,) = segment.rows
        places = [base + p for start, stop in row.action_spans for p in range(start, stop)]
        logits = hidden[[p - 1 for p in places]].double() @ model.head_weight.double().T
        expected = torch.log_softmax(logits / config.engine.temperature, -1)
        ours = expected[range(len(places)), [ids[p] for p in places]]
        behavior = torch.tensor(row.behavior_logprobs.numpy().tolist(), dtype=torch.float64)
        torch.testing.assert_close(behavior, ours, atol=1e-4, rtol=1e-4)


def _check_gradient(segments: list[Segment], run_dir: Path, config: Config) -> None:
    """By linearity a few segments suffice: all others get advantage 0 in both forms."""
    ids, starts = _assembled(segments)
    chosen = sorted(random.Random(5).sample(range(1, len(segments)), NUM_COMPARED))
    deltas, apart = [], []
    for index, (segment, base) in enumerate(zip(segments, starts, strict=True)):
        (row,) = segment.rows
        advantage = (-1.0) ** index if index in chosen else 0.0
        item = TrainItem(
            key=segment.key, kind="solve", position=index, rows=(row,), advantage=advantage, lag_steps=0.0
        )
        deltas.append(item)
        if index in chosen:
            whole = Row(
                token_ids=Array.of(ids[: base + row.num_tokens], "<i4"),
                action_spans=tuple((start + base, stop + base) for start, stop in row.action_spans),
                behavior_logprobs=row.behavior_logprobs,
                versions=row.versions,
            )
            apart.append(msgspec.structs.replace(item, rows=(whole,)))
    gradients = []
    counts = []
    for items in (deltas, apart):
        model = load_model(run_dir / "model")
        trainer = Trainer.create(model, config.learner, config.loss, config.engine.temperature)
        flat = flatten(items, vocab_size=int(model.head_weight.shape[0]))
        assert flat.lengths.max() > 1_000
        trainer.accumulate(flat)
        counts.append(flat.num_action_tokens)
        gradients.append([p.grad for p in model.parameters() if p.grad is not None])
    scale = counts[0] / counts[1]  # the token mean counts the tokens of zero advantage as well
    for ours, truth in zip(*gradients, strict=True):
        assert (ours * scale - truth).norm() <= 1e-4 * truth.norm() + 1e-7


@pytest.mark.slow
@pytest.mark.timeout(560)
def test_conversations_of_32_000_tokens(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    write_player(tmp_path / "player", load_config([CONFIG]))
    run_dir = _train(tmp_path, tmp_path / "player")
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["ledger"]["balanced"]
    assert sum(process["restarts"] for process in summary["processes"]) >= 1
    config = load_resolved(run_dir)
    lifecycles, records, _ = _read(run_dir)
    assert len(lifecycles) == config.lifecycle.group_size
    for segments in lifecycles.values():
        assert [s.position for s in segments] == list(range(NUM_TASKS))
        assert len(_assembled(segments)[0]) >= 32_000
        _replay(segments, config, run_dir, records[0])
    assert any(len({s.lease_epoch for s in segments}) > 1 for segments in lifecycles.values())  # taken over
    rewards = {s.reward for segments in lifecycles.values() for s in segments}
    assert len(rewards) > 1, rewards  # some tasks end well
    metrics = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    (step,) = [line for line in metrics if line["kind"] == "step"]
    assert step["num_segments"] == 2 * NUM_TASKS and step["learner"]["grad_norm"] > 0
    first = lifecycles[0, 0]
    _check_logprobs(first, run_dir, config)
    _check_gradient(first, run_dir, config)
