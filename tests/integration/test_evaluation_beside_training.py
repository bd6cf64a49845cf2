"""``cod train`` with evaluation beside it: results by step, through the launcher's death, and a sweep."""

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
TIMEOUT_S = 400.0
NUM_STEPS = 12

pytestmark = [pytest.mark.slow, pytest.mark.fault, pytest.mark.timeout(900)]


def start(*arguments: str, log: Path) -> subprocess.Popen[bytes]:
    with log.open("ab") as out:
        return subprocess.Popen(
            cod_command(*arguments),
            env=child_environment(1),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )


def wait_until(condition: Callable[[], bool], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.05)


def journal_of(run_dir: Path) -> dict[str, Any]:
    try:
        values: dict[str, Any] = json.loads((run_dir / "evaluation" / "in_training.json").read_text())
    except OSError:
        return {"points": [], "running": None}
    return values


def test_results_by_step_survive_the_launcher(tmp_path: Path) -> None:
    log, run_dir = tmp_path / "log", tmp_path / "door"
    suite = tmp_path / "suite.toml"
    suite.write_text(
        "seeds = [3]\n[defaults]\nnum_packs = 6\nlifecycles_per_pack = 1\n"
        '[[entries]]\nenvironment = "hidden_buttons"\npreset = "door"\ncontrols = ["normal", "blanked"]\n'
        '[[entries]]\nname = "loop"\nenvironment = "hidden_buttons"\npreset = "door"\n'
        'strategies = ["ralph_sample"]\n'
    )
    sets = [
        f'run.output_dir="{tmp_path}"', f"run.num_steps={NUM_STEPS}", "bootstrap.num_steps=30",
        "evaluation.is_enabled=false", "evaluation.every_steps=4", f'evaluation.suite="{suite}"',
        "observe.num_transcripts=0", "observe.plot_every_s=1000",
    ]  # fmt: skip
    flags = [word for value in sets for word in ("--set", value)]
    process = start("train", DOOR, *flags, log=log)
    # Killed while an evaluation is under way: its child must end, and its work go on after the resume.
    wait_until(lambda: journal_of(run_dir)["running"] is not None or process.poll() is not None, log)
    assert process.poll() is None, log.read_text()
    children = psutil.Process(process.pid).children(recursive=True)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    _, alive = psutil.wait_procs(children, timeout=60)
    assert alive == []

    process = start("train", "--resume", str(run_dir), log=log)
    assert process.wait(TIMEOUT_S) == 0, log.read_text()
    journal = journal_of(run_dir)
    points = journal["points"]
    steps = [point["step"] for point in points]
    assert steps[0] == 0 and steps[-1] == NUM_STEPS and steps == sorted(set(steps)), log.read_text()
    assert journal["running"] is None and journal["pending"] is None and journal["num_failed"] == 0
    # Due are 0, 4, 8 and 12; whatever was not evaluated was skipped because training was faster.
    assert len(points) + journal["num_skipped"] >= 4
    for point in points:
        modes = [(row["entry"], row["mode"], row["control"], row["n"]) for row in point["rows"]]
        assert modes == [
            *[
                ("hidden_buttons door", "cod", control, 6)
                for control in ("normal", "blanked")
                for _ in range(4)
            ],
            *[("loop", "ralph_sample", "normal", 6)] * 4,
        ]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["kind"] == "evaluation"]
    assert {line["version"] for line in told} >= {point["version"] for point in points}
    assert all(line["suite"] == str(suite) and line["rows"] for line in told)
    assert len([line for line in lines if line["kind"] == "step"]) >= NUM_STEPS
    summary = json.loads((run_dir / "summary.json").read_text())
    assert [point["step"] for point in summary["evaluation_in_training"]["points"]] == steps
    assert summary["ledger"]["balanced"] is True
    assert (run_dir / "plots" / "evaluation_in_training.png").is_file()
    assert not any((run_dir / "evaluation" / "in_training" / "models").iterdir())

    # The same suite over the saved checkpoints, in the same folder: equal weights under an equal suite have
    # their lifecycles there already.
    out = subprocess.run(
        cod_command(
            "eval", str(run_dir), "--suite", str(suite), "--checkpoints", f"0,{NUM_STEPS}",
            "--processes", "1", "--out", str(run_dir / "evaluation" / "in_training"), "--json",
        ),
        env=child_environment(1), capture_output=True, check=True, timeout=TIMEOUT_S,
    ).stdout  # fmt: skip
    answer = json.loads(out)
    assert answer["num_played"] == 0 and [entry["step"] for entry in answer["checkpoints"]] == [0, NUM_STEPS]
    means = {
        (row["step"], row["entry"], row["control"], row["position"]): row["mean"] for row in answer["rows"]
    }
    for point in (points[0], points[-1]):
        for row in point["rows"]:
            assert row["mean"] == means[point["step"], row["entry"], row["control"], row["position"]]
