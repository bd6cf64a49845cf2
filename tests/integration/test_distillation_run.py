"""Two teachers, one student, the real processes: what the student says comes nearer to its teachers, and all
of it is accounted for.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from statistics import mean
from typing import Any

import pytest
import torch

from cod_async.bootstrap.run import run_bootstrap
from cod_async.config.load import load_config
from cod_async.launch.run_folder import child_environment, cod_command
from cod_async.models.directory import load_model, save_model
from cod_async.store.inspect import inspect_run, lifecycle_segments

ROOT = Path(__file__).resolve().parents[2]
CONFIG = ROOT / "configs" / "ci" / "opd_door.toml"
NUM_STEPS = 15
TIMEOUT_S = 300.0

pytestmark = [pytest.mark.slow, pytest.mark.timeout(400)]


def make_models(folder: Path) -> tuple[Path, list[Path]]:
    """A student that has hardly seen the format, and two teachers that are surer of what it would say."""
    student = folder / "student"
    run_bootstrap(load_config([CONFIG]), student, lambda values: None)
    teachers = []
    for preset, sharpness in (("door", 1.5), ("cross", 1.6)):
        teacher = folder / preset
        shutil.copytree(student, teacher)
        model = load_model(student)
        with torch.no_grad():
            model.model.norm.weight.mul_(sharpness)  # the logits of every token are multiplied by it
        save_model(teacher, model)
        teachers.append(teacher)
    return student, teachers


def train(folder: Path, *settings: str) -> subprocess.CompletedProcess[str]:
    arguments = [part for setting in settings for part in ("--set", setting)]
    return subprocess.run(
        cod_command("train", str(CONFIG), "--set", f'run.output_dir="{folder}"', *arguments),
        env={**child_environment(1), "NO_COLOR": "1"},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )


def steps_of(run_dir: Path) -> list[dict[str, Any]]:
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record for record in records if record["kind"] == "step"]


def test_the_student_comes_nearer_to_its_teachers(tmp_path: Path) -> None:
    student, (door, cross) = make_models(tmp_path)
    done = train(
        tmp_path,
        f'model.path="{student}"',
        f'distillation.teachers.0.path="{door}"',
        f'distillation.teachers.1.path="{cross}"',
        f"run.num_steps={NUM_STEPS}",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    run_dir = tmp_path / "opd_door"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "finished" and summary["ledger"]["balanced"] is True
    segments = summary["ledger"]["segments"]
    assert segments["trained"] == NUM_STEPS * 64 * 5 and segments["dropped"] == {}  # groups of one count
    assert all(entry["restarts"] == 0 for entry in summary["processes"])
    steps = [step["learner"] for step in steps_of(run_dir)]
    assert len(steps) == NUM_STEPS
    for name in ("loss", "distillation_k3_nats"):
        # 0.25 of it is left as a rule; the divergence of one step is that of a few hundred tokens.
        assert mean(s[name] for s in steps[-4:]) < 0.6 * mean(s[name] for s in steps[:4]), name
    names = {name for step in steps for name in step if name.startswith("distillation_kl_nats_")}
    assert names == {f"distillation_kl_nats_hidden_buttons.{preset}" for preset in ("door", "cross")}
    assert all(step["policy_loss"] == 0 for step in steps)  # rewards are logged and nothing else
    assert all(step["reward_by_position"][0] is not None for step in steps_of(run_dir))
    check_scores(run_dir, {"door": door, "cross": cross})


@torch.no_grad()
def check_scores(run_dir: Path, teachers: dict[str, Path]) -> None:
    """What the database holds is what the teacher of each world says, update episodes included."""
    models = {preset: load_model(path) for preset, path in teachers.items()}
    seen = set()
    for group in range(8):
        for segment in lifecycle_segments(run_dir, group, 0):
            (row,) = segment.rows
            ids = torch.from_numpy(row.token_ids.numpy().astype("int64"))
            found = torch.log_softmax(models[segment.preset].logits(ids[None])[0].double(), -1)
            truth = [
                found[position - 1, ids[position]].item()
                for start, stop in row.action_spans
                for position in range(start, stop)
            ]
            scores = row.teacher_logprobs.numpy()  # type: ignore[union-attr]
            assert scores.tolist() == pytest.approx(truth, abs=1e-4)
            seen.add((segment.preset, segment.kind))
    assert len(seen) == 4
    assert "teacher_logprobs" in inspect_run(run_dir, "g000000.m00.o00")["rows"][0]


def test_a_teacher_of_another_vocabulary_is_refused_before_anything_starts(tmp_path: Path) -> None:
    student, (door, cross) = make_models(tmp_path)
    text = (cross / "tokenizer.json").read_text()
    (cross / "tokenizer.json").write_text(text.replace('"<eot>"', '"<end>"'))
    done = train(
        tmp_path,
        f'model.path="{student}"',
        f'distillation.teachers.0.path="{door}"',
        f'distillation.teachers.1.path="{cross}"',
    )
    assert done.returncode == 2
    assert "distillation.teachers.1.path" in done.stderr and "another tokenizer" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "opd_door").exists()
