"""The disk of the run database is lost in the middle of a run: ``--resume`` says so, goes on from the copy
beside the newest checkpoint, and the books balance.
"""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from resume_report import CONFIG, _command, _environment, _signal_all

from cod_async.store.ledger import ledger_with_problems
from cod_async.store.restoring import newest_copy
from cod_async.store.schema import DATABASE_NAME

TIMEOUT_S = 240.0


def wait_for_copy(run_dir: Path, launcher: subprocess.Popen[bytes], log: Path) -> None:
    """Return when the database was copied and a step was taken after that."""
    deadline = time.monotonic() + TIMEOUT_S
    while time.monotonic() < deadline:
        assert launcher.poll() is None, log.read_text(errors="replace")[-4000:]
        metrics = run_dir / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        names = [json.loads(line) for line in lines if line.endswith("}")]
        copied = [line["step"] for line in names if line.get("name") == "database_copied"]
        taken = [line["step"] for line in names if line.get("kind") == "step"]
        if copied and taken and max(taken) > min(copied):
            return
        time.sleep(0.02)
    raise TimeoutError(f"no copy was made; see {log}")


@pytest.mark.slow
@pytest.mark.fault
@pytest.mark.timeout(400)
def test_a_lost_database_costs_what_came_after_the_copy(tmp_path: Path) -> None:
    config = tmp_path / "run.toml"
    config.write_text(CONFIG.format(output_dir=tmp_path, num_steps=12, checkpoint_every_steps=3, model=""))
    run_dir, log = tmp_path / "lost", tmp_path / "log"
    arguments = ("train", str(config), "--name", "lost", "--set", "staleness.max_lag=2")
    with log.open("wb") as output:
        launcher = subprocess.Popen(
            _command(*arguments), stdout=output, stderr=output, env=_environment(), cwd=tmp_path
        )
        try:
            wait_for_copy(run_dir, launcher, log)
        finally:
            _signal_all(launcher, signal.SIGKILL)
            launcher.wait()
    copied = newest_copy(run_dir, "lost")[1]
    for suffix in ("", "-wal", "-shm"):
        (run_dir / f"{DATABASE_NAME}{suffix}").unlink(missing_ok=True)
    resumed = subprocess.run(
        _command("train", "--resume", str(run_dir)),
        capture_output=True, text=True, env=_environment(), cwd=tmp_path, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    said = resumed.stdout + resumed.stderr
    assert resumed.returncode == 0, said[-4000:]
    assert f"{DATABASE_NAME} is missing: restored from the copy beside checkpoint {copied.checkpoint}" in said
    assert "LOST is everything that was delivered or trained after that copy" in said
    assert f"going on from checkpoint {copied.checkpoint} (step {copied.checkpoint.step})" in said
    assert "written by 1 rank, as many as now" in said
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished"
    answer, problems = ledger_with_problems(run_dir)
    assert problems == [] and answer["balanced"]
    assert (run_dir / "final" / "model.safetensors").is_file()
