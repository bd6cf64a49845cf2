"""Any recorded step of a run through real processes is computed again to the bit."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import pytest

from cod_async.launch.run_folder import child_environment, cod_command
from cod_async.lifecycle.segment import SegmentKey
from cod_async.store.inspect import inspect_run
from cod_async.store.token_records import read_file, read_token_records

ROOT = Path(__file__).resolve().parents[2]
DOOR = str(ROOT / "configs" / "ci" / "door.toml")
TIMEOUT_S = 300.0
SETS = (
    "evaluation.is_enabled=false",
    "observe.num_transcripts=0",
    "bootstrap.num_steps=40",
    "learner.checkpoint_every_steps=2",
    "weights.keep_versions=2",
    "learner.has_token_records=true",
    "learner.trace_every_steps=2",
)


def cod(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        cod_command(*arguments),
        env={**child_environment(1), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )


def train(*arguments: str, num_steps: int) -> None:
    done = cod("train", *arguments, "--set", f"run.num_steps={num_steps}")
    assert done.returncode == 0, done.stdout + done.stderr


def replay(run_dir: Path, step: int, *more: str) -> dict[str, Any]:
    done = cod("replay", str(run_dir), "--step", str(step), *more, "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_any_step_of_a_door_run_replays_to_the_bit(tmp_path: Path) -> None:
    run_dir = tmp_path / "door"
    sets = [part for one in (f'run.output_dir="{tmp_path}"', *SETS) for part in ("--set", one)]
    train(DOOR, *sets, num_steps=2)
    train("--resume", str(run_dir), num_steps=5)
    starts = {}
    for step in (0, 1, 2, 4):  # first, one in the middle, the one after checkpoint and resume, last
        out = tmp_path / f"{step}.safetensors"
        answer = replay(run_dir, step, "--out", str(out))
        assert answer["is_equal"] is True and answer["notes"] == []
        names = {one["name"] for one in answer["compared"]}
        assert {"weights", "gradients", "loss", "grad_norm", "entropy", "masked_frac"} <= names
        starts[step] = (answer["start"]["kind"], answer["start"]["num_steps"], answer["version"]["lineage"])
        # the records that the run wrote are those of the replay
        lineage = answer["version"]["lineage"]
        kept = run_dir / "token_records" / f"step_{step:08d}-L{lineage}.safetensors"
        assert out.read_bytes() == kept.read_bytes()
    assert starts[0] == ("model", 0, 0)
    assert starts[1] == ("model", 1, 0)
    assert starts[2] == ("checkpoint", 0, 1)  # saved when the first launch was over
    assert starts[4] in (("published", 0, 1), ("checkpoint", 0, 1))

    refused = cod("replay", str(run_dir), "--step", "5")
    assert refused.returncode == 2 and "the run has steps 0 to 4" in refused.stderr
    trace = json.loads((run_dir / "traces" / "step_00000004.json").read_text())
    spans = {event["name"] for event in trace["traceEvents"] if event["ph"] == "X"}
    assert {"wait", "pack", "forward", "head_loss", "backward", "optimizer", "publish"} <= spans

    trained = [one for one in inspect_run(run_dir, limit=1 << 20)["segments"] if one["state"] == "trained"]
    newest = trained[0]  # of the last step
    group, member, ordinal = (int(part[1:]) for part in newest["segment"].split("."))
    (record,) = read_token_records(run_dir, SegmentKey(group, member, ordinal))
    assert record.version.step == 4 and len(record.state_names) == newest["num_action_tokens"]
    again = read_file(tmp_path / "4.safetensors", record.key)
    assert again is not None and again.tokens["logprob"].tolist() == record.tokens["logprob"].tolist()
