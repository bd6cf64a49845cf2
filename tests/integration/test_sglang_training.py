"""A whole training run on a real SGLang server, which is killed in the middle of it.

One run shows what matters together: actors stream from the server, the learner's weights enter it in
flight, rewards move, the server's death costs the completions that were running and nothing else, and what
the learner was given is what the server sampled, under the versions that the tokens name.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import msgspec
import numpy as np
import psutil
import pytest
import sglang_world
import torch

from cod_async.lifecycle.segment import Segment, Version
from cod_async.models.directory import load_model
from cod_async.store.schema import connect_reader
from cod_async.weights.load import load_weights
from cod_async.weights.publish import read_manifest

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs/ci/sglang_cpu.toml"
KILL_AT_STEP = 5
MAX_WALL_S = 900.0
MAX_LOGPROB_ERROR = 1e-4
NUM_CHECKED = 60
MAX_CUT_TOKENS = 64 * 12
"""Lifecycles at once, each with one completion of at most so many tokens."""

pytestmark = [pytest.mark.sglang, pytest.mark.slow, pytest.mark.timeout(MAX_WALL_S + 60)]


@dataclass(frozen=True)
class Finished:
    """The run folder, what the launcher printed, and whom the fault killed."""

    run_dir: Path
    output: str
    killed: list[int]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Finished]:
    """Train; kill every process of the server once some steps are taken."""
    sglang_world.require_environment()
    folder = tmp_path_factory.mktemp("sglang-training")
    settings = [
        f'run.output_dir="{folder}"',
        f'engine.python="{sglang_world.PYTHON}"',
        "weights.keep_versions=100",  # to compute log-probs again under every version
        "evaluation.num_packs=32",
        "observe.has_plots=false",
    ]
    flags = [part for setting in settings for part in ("--set", setting)]
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "OMP_NUM_THREADS": "1",
    }
    output = folder / "launcher.log"
    with output.open("wb") as stream:
        launcher = subprocess.Popen(
            [sys.executable, "-m", "cod_async", "train", str(CONFIG), "--name", "run", *flags],
            stdin=subprocess.DEVNULL, stdout=stream, stderr=stream, env=environment, cwd=folder,
        )  # fmt: skip
        try:
            killed = _kill_server(launcher, folder / "run")
            code = launcher.wait(MAX_WALL_S)
        finally:
            if launcher.poll() is None:
                launcher.send_signal(signal.SIGTERM)
                launcher.wait(60)
    text = output.read_text(errors="replace")
    assert code == 0, text[-4000:]
    yield Finished(folder / "run", text, killed)


def _kill_server(launcher: subprocess.Popen[bytes], run_dir: Path) -> list[int]:
    """Kill the server, but not its host, after some steps; return the pids."""
    deadline = time.monotonic() + MAX_WALL_S
    while time.monotonic() < deadline and launcher.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            last = (run_dir / "metrics.jsonl").read_text().rstrip().rpartition("\n")[2]
            if json.loads(last).get("step", 0) >= KILL_AT_STEP:
                host = json.loads((run_dir / "engines" / "engine-0.json").read_text())["pid"]
                victims = psutil.Process(host).children(recursive=True)
                for victim in victims:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        victim.kill()
                return [victim.pid for victim in victims]
        time.sleep(0.2)
    raise AssertionError(f"step {KILL_AT_STEP} was not reached")


def _segments(run_dir: Path) -> list[Segment]:
    with contextlib.closing(connect_reader(run_dir)) as connection:
        bodies = connection.execute(
            "SELECT body FROM segments JOIN payloads USING (payload) WHERE state = 'trained' "
            "ORDER BY grp, member, ordinal"
        ).fetchall()
    return [msgspec.msgpack.decode(body, type=Segment) for (body,) in bodies]


def test_it_learns_and_the_books_are_balanced(finished: Finished) -> None:
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["ledger"]["balanced"]
    after = [cell["mean"] for cell in summary["reward_by_position"]["held_out"]]
    blanked = [cell["mean"] for cell in summary["reward_by_position"]["hint_blanked"]]
    assert np.mean(after[1:]) - after[0] > 0.3 and np.mean(after[1:]) - np.mean(blanked[1:]) > 0.3
    assert summary["lag"]["max"] >= 1 and summary["policy_versions"] > KILL_AT_STEP


def test_the_death_of_the_server_costs_what_was_running(finished: Finished) -> None:
    assert len(finished.killed) >= 2  # the server and its scheduler at least
    summary = json.loads((finished.run_dir / "summary.json").read_text())
    restarts = {process["name"]: process["restarts"] for process in summary["processes"]}
    assert restarts.pop("engine-0") == 1 and set(restarts.values()) == {0}
    ledger = summary["ledger"]
    # The actor waited for the server and asked again: no episode was lost, no segment was refused or dropped.
    assert set(ledger["segments"]["dropped"]) <= {"run_over"} and ledger["segments"]["lost"] == {}
    # Completions that were cut off: at most one for each lifecycle at play.
    print(f"lost tokens: {ledger['tokens']['lost']}")
    assert sum(ledger["tokens"]["lost"].values()) <= MAX_CUT_TOKENS


def test_every_token_is_what_its_version_says(finished: Finished) -> None:
    """Behaviour log-probs are those of a plain forward of the version that each token names."""
    model = load_model(finished.run_dir / "model")
    segments = _segments(finished.run_dir)
    versions: set[Version] = set()
    worst, num_tokens, num_spanning = 0.0, 0, 0
    spanning = [s for s in segments if any(len(row.versions) > 1 for row in s.rows)]
    chosen = [*spanning[:NUM_CHECKED], *segments[:: max(1, len(segments) // NUM_CHECKED)]]
    for segment in chosen:
        for row in segment.rows:
            ids = torch.from_numpy(row.token_ids.numpy().astype(np.int64))[None]
            positions = np.concatenate([np.arange(start, stop) for start, stop in row.action_spans])
            reported, at = row.behavior_logprobs.numpy(), 0
            num_spanning += len(row.versions) > 1
            for span in row.versions:
                versions.add(span.version)
                tensors = load_weights(
                    finished.run_dir, read_manifest(finished.run_dir, span.version), is_digest_checked=False
                )
                model.load_state_dict(tensors, strict=False)
                with torch.no_grad():
                    hidden = model(ids)[0]
                    logprobs = torch.log_softmax(hidden.double() @ model.head_weight.double().T, -1)
                where = positions[at : at + span.num_tokens]
                expected = logprobs[where - 1, ids[0, where]].numpy()
                worst = max(worst, float(np.abs(expected - reported[at : at + span.num_tokens]).max()))
                at += span.num_tokens
            assert at == row.num_action_tokens
            num_tokens += at
    print(f"{num_tokens} tokens of {len(versions)} versions, {num_spanning} rows of two: worst {worst:.1e}")
    assert len(versions) > KILL_AT_STEP and num_tokens > 200
    assert worst <= MAX_LOGPROB_ERROR
