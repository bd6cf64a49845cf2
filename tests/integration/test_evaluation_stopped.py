"""An evaluation that is killed in the middle and run again answers what an uninterrupted one answers."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from evaluation_world import config_for

from cod_async.bootstrap.run import run_bootstrap
from cod_async.launch.run_folder import child_environment, cod_command

TIMEOUT_S = 200.0
NUM_LIFECYCLES = 2 * 100 * 2 * 3
"""Splits, packs, lifecycles per pack, controls."""

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(600)]


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An untrained model whose every answer is drawn."""
    out = tmp_path_factory.mktemp("models") / "door"
    run_bootstrap(config_for("door"), out)
    return out


def start(model_dir: Path, folder: Path, *more: str) -> subprocess.Popen[bytes]:
    config = folder.parent / "config.toml"
    config.write_text(
        '[[environments]]\nname = "hidden_buttons"\npreset = "door"\n[model]\nmax_context_tokens = 96\n'
        "[lifecycle]\nmax_response_tokens = 6\nmax_hint_tokens = 12\n"
        "[engine]\nmax_running = 8\nis_batch_invariant = true\n"
    )
    arguments = ["eval", str(model_dir), "--config", str(config), "--packs", "100", "--lifecycles", "2"]
    arguments += ["--control", "normal", "--control", "blanked", "--control", "swapped", "--no-plots"]
    return subprocess.Popen(
        cod_command(*arguments, "--out", str(folder), "--json", *more),
        env=child_environment(1),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        preexec_fn=_hear_interrupts,
    )


def _hear_interrupts() -> None:
    """Undo what a shell does to jobs in the background, whose children would inherit it."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def finish(process: subprocess.Popen[bytes]) -> dict[str, Any]:
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 0, err.decode()
    answer: dict[str, Any] = json.loads(out)
    return answer


def num_lines(folder: Path) -> int:
    return sum(path.read_bytes().count(b"\n") for path in folder.glob("results/*.jsonl"))


def stop_midway(process: subprocess.Popen[bytes], folder: Path, at_least: int, signum: int) -> int:
    """Signal the evaluation once so many lifecycles are on disk; return how many were when it was gone."""
    deadline = time.monotonic() + TIMEOUT_S
    while num_lines(folder) < at_least:
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(signum)
    process.communicate(timeout=TIMEOUT_S)
    _, alive = psutil.wait_procs(children, timeout=30)
    assert alive == []  # workers end with their parent
    found = num_lines(folder)
    assert at_least <= found < NUM_LIFECYCLES
    return found


def test_killed_and_continued(model_dir: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = finish(start(model_dir, whole, "--processes", "1"))
    assert expected["num_played"] == NUM_LIFECYCLES and expected["num_kept"] == 0

    process = start(model_dir, parts, "--processes", "2")
    first = stop_midway(process, parts, 20, signal.SIGKILL)
    (path,) = parts.glob("results/*.jsonl")
    with path.open("ab") as file:  # what a power cut may leave behind
        file.write(b'0badc0de {"key": "torn')
    process = start(model_dir, parts, "--processes", "2")
    second = stop_midway(process, parts, first + 20, signal.SIGINT)
    assert process.returncode == 130
    answer = finish(start(model_dir, parts, "--processes", "2"))
    assert answer["num_kept"] == second and answer["num_played"] == NUM_LIFECYCLES - second
    assert answer["rows"] == expected["rows"] and answer["reports"] == expected["reports"]
    again = finish(start(model_dir, parts, "--processes", "2"))
    assert again["num_played"] == 0 and again["rows"] == expected["rows"]
