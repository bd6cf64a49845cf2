"""A learner of several processes in a whole run: trained, killed in part, interrupted, and nobody left."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import psutil
import pytest
from test_train_command import DOOR, TIMEOUT_S, num_steps, processes_of, start, summary_of, wait_until

from cod_async.weights.load import load_weights
from cod_async.weights.publish import published_versions, read_manifest

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SETS = [
    *("--set", "learner.data_parallel=2"),
    *("--set", 'learner.device="cpu"'),  # a machine with one GPU has none for the second rank
    *("--set", "learner.checkpoint_every_steps=2"),
    *("--set", "evaluation.is_enabled=false"),
    *("--set", "bootstrap.num_steps=30"),
    *("--set", "observe.num_transcripts=0"),
    *("--set", "observe.has_plots=false"),
]


def rank_process(run_dir: Path, rank: int) -> int:
    """The process id of a rank of the learner; 0 while there is none."""
    for process in psutil.process_iter(["pid", "cmdline"]):
        command = process.info["cmdline"] or []
        if str(run_dir) in command and command[-2:] == ["--rank", str(rank)]:
            return int(process.info["pid"])
    return 0


@pytest.mark.fault
@pytest.mark.learning
def test_two_ranks_train_survive_a_killed_rank_and_leave_nobody(tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "door"
    process = start(DOOR, "--set", f'run.output_dir="{tmp_path}"', "--set", "run.num_steps=8", *SETS, log=log)
    wait_until(lambda: num_steps(run_dir) >= 3, log)
    os.kill(rank_process(run_dir, 1), signal.SIGKILL)
    assert process.wait(TIMEOUT_S) == 0, log.read_text()
    assert processes_of(run_dir) == []
    summary = summary_of(run_dir)
    assert summary["status"] == "finished"
    assert summary["ledger"]["balanced"] is True
    (learner,) = (entry for entry in summary["processes"] if entry["role"] == "learner")
    assert learner["restarts"] == 1
    assert "rank 1 was killed by SIGKILL" in (run_dir / "logs" / "learner.log").read_text()
    assert not list(run_dir.glob(".ranks-*"))
    # The version that was published last by both ranks is whole, and a model directory with an index.
    version = published_versions(run_dir)[-1]
    manifest = read_manifest(run_dir, version)
    assert version.step == 8
    assert len(manifest.shards) == 2
    index = json.loads(
        (run_dir / manifest.shards[0].file).with_name("model.safetensors.index.json").read_text()
    )
    assert set(index["weight_map"]) == set(load_weights(run_dir, manifest))


@pytest.mark.fault
def test_a_signal_ends_all_ranks_in_order(tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "door"
    process = start(
        DOOR, "--set", f'run.output_dir="{tmp_path}"', "--set", "run.num_steps=50", *SETS, log=log
    )
    wait_until(lambda: num_steps(run_dir) >= 1, log)
    process.send_signal(signal.SIGTERM)
    assert process.wait(TIMEOUT_S) == 143, log.read_text()
    assert processes_of(run_dir) == []
    steps = summary_of(run_dir)["num_steps"]
    checkpoints = sorted((run_dir / "checkpoints").iterdir())
    assert checkpoints[-1].name == f"step_{steps:08d}-L0"
