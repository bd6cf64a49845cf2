"""``cod train`` from the outside: it learns, it can be interrupted, killed and resumed, and it leaves nobody
behind.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import pytest

from cod_async.launch.run_folder import child_environment, cod_command

ROOT = Path(__file__).resolve().parents[2]
DOOR = str(ROOT / "configs" / "ci" / "door.toml")
TIMEOUT_S = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    environment = {**child_environment(1), "NO_COLOR": "1"}
    with log.open("ab") as out:
        return subprocess.Popen(
            cod_command("train", *arguments),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


def processes_of(run_dir: Path) -> list[int]:
    """Every process whose command line names the run folder."""
    found = []
    for process in psutil.process_iter(["pid", "cmdline", "status"]):
        command = process.info["cmdline"] or []
        if str(run_dir) in command and process.info["status"] != psutil.STATUS_ZOMBIE:
            found.append(process.info["pid"])
    return found


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def num_steps(run_dir: Path) -> int:
    metrics = run_dir / "metrics.jsonl"
    return metrics.read_text().count('"kind":"step"') if metrics.exists() else 0


def summary_of(run_dir: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
    return values


@pytest.mark.learning
def test_door_is_learned_through_the_whole_pipeline(tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "door"
    process = start(DOOR, "--set", f'run.output_dir="{tmp_path}"', log=log)
    assert process.wait(TIMEOUT_S) == 0, log.read_text()
    summary = summary_of(run_dir)
    assert summary["status"] == "finished" and summary["num_steps"] == 40
    assert summary["gap"]["after"] > 0.3 and summary["gap"]["held_out"] > 0.3
    assert abs(summary["gap"]["before"]) < 0.2 and abs(summary["gap"]["hint_blanked"]) < 0.2
    assert summary["ledger"]["balanced"] is True
    assert summary["ledger"]["segments"]["trained"] == 40 * 8 * 8 * 7
    assert 0 < summary["lag"]["mean"] <= summary["lag"]["max"] <= 2
    assert {entry["role"] for entry in summary["processes"]} == {"coordinator", "learner", "actor"}
    assert all(entry["restarts"] == 0 for entry in summary["processes"])
    for name in (
        "plots/quickstart.png",
        "final/model.safetensors",
        "run.sqlite",
        "config.json",
        "versions.json",
    ):
        assert (run_dir / name).is_file(), name
    assert len(list((run_dir / "transcripts").glob("*.md"))) == 2
    assert list((run_dir / "tensorboard").iterdir())
    assert processes_of(run_dir) == []


@pytest.mark.fault
def test_interrupted_killed_and_resumed(tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "door"
    sets = [
        "--set",
        "evaluation.is_enabled=false",
        "--set",
        "run.num_steps=12",
        "--set",
        "observe.num_transcripts=0",
    ]
    process = start(DOOR, "--set", f'run.output_dir="{tmp_path}"', *sets, log=log)
    wait_until(lambda: num_steps(run_dir) >= 3, log)
    process.send_signal(signal.SIGINT)
    assert process.wait(TIMEOUT_S) == 130, log.read_text()
    assert processes_of(run_dir) == []
    first = summary_of(run_dir)
    assert first["status"] == "interrupted"
    assert first["ledger"]["balanced"] is True

    process = start("--resume", str(run_dir), log=log)
    wait_until(lambda: num_steps(run_dir) >= first["num_steps"] + 2, log)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()

    process = start("--resume", str(run_dir), log=log)  # waits for the orphans of the killed launcher to end
    assert process.wait(TIMEOUT_S) == 0, log.read_text()
    last = summary_of(run_dir)
    assert last["status"] == "finished" and last["num_steps"] == 12
    assert last["ledger"]["balanced"] is True
    assert last["ledger"]["segments"]["trained"] == 12 * 8 * 8 * 7
    assert processes_of(run_dir) == []
    # Asking for the same again trains nothing; asking for more goes on.
    trained = num_steps(run_dir)
    assert start("--resume", str(run_dir), log=log).wait(TIMEOUT_S) == 0, log.read_text()
    assert num_steps(run_dir) == trained
    assert start("--resume", str(run_dir), "--set", "run.num_steps=14", log=log).wait(TIMEOUT_S) == 0, (
        log.read_text()
    )
    assert summary_of(run_dir)["num_steps"] == 14
