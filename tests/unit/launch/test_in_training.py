"""Which versions are evaluated beside training, and what is forgotten when the learner goes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from cod_async.config import load_config, save_resolved
from cod_async.config.schema import Config
from cod_async.launch.in_training import InTraining, Journal, Waiting, notice
from cod_async.lifecycle.segment import Version


def point(lineage: int, step: int) -> dict[str, Any]:
    return {
        "version": f"{lineage}.{step}",
        "lineage": lineage,
        "step": step,
        "wall_s": 1.0,
        "rows": [],
        "reports": [],
    }


def test_due_versions_are_the_first_to_reach_a_multiple() -> None:
    journal, due = Journal(), []
    for step in (0, 1, 9, 11, 12, 19, 20, 45):
        notice(journal, Version(0, step), 10, {})
        if journal.pending is not None:
            due.append(journal.pending.version.step)
            journal.pending = None
    assert due == [0, 11, 20, 45]
    assert journal.num_skipped == 1  # 30 was passed between two looks


def test_the_newest_replaces_what_waits() -> None:
    journal = Journal()
    notice(journal, Version(0, 0), 10, {})
    journal.running, journal.pending = journal.pending, None
    assert notice(journal, Version(0, 10), 10, {}) == []
    assert notice(journal, Version(0, 20), 10, {}) == [Version(0, 10)]
    assert journal.pending == Waiting(version=Version(0, 20)) and journal.num_skipped == 1


def test_an_abandoned_history_is_forgotten() -> None:
    journal = Journal(points=[point(0, 0), point(0, 10), point(0, 20)], newest=Version(0, 30))
    journal.running, journal.pending = Waiting(version=Version(0, 20)), Waiting(version=Version(0, 30))
    # Lineage 1 left lineage 0 at step 15: 20 and 30 did not happen, and are due again.
    assert notice(journal, Version(1, 15), 10, {1: 15}) == [Version(0, 30)]
    assert [p["step"] for p in journal.points] == [0, 10]
    assert journal.running is not None and journal.running.is_abandoned and journal.pending is None
    assert notice(journal, Version(1, 20), 10, {}) == [] and journal.pending == Waiting(
        version=Version(1, 20)
    )
    # Two resumes between two looks; the earlier branch point counts.
    journal.points = [point(0, 0), point(0, 10), point(1, 20)]
    notice(journal, Version(3, 20), 10, {2: 8, 3: 12})
    assert [p["step"] for p in journal.points] == [0] and journal.pending == Waiting(version=Version(3, 20))


def test_a_resume_from_the_newest_forgets_nothing() -> None:
    journal = Journal(points=[point(0, 0), point(0, 10)], newest=Version(0, 10))
    journal.running = Waiting(version=Version(0, 10))
    notice(journal, Version(1, 14), 10, {1: 12})
    assert len(journal.points) == 2 and not journal.running.is_abandoned and journal.pending is None


@settings(deadline=None)
@given(st.lists(st.integers(0, 6), max_size=30), st.integers(1, 7), st.lists(st.booleans(), max_size=30))
def test_every_due_number_is_evaluated_or_skipped(jumps: list[int], every: int, frees: list[bool]) -> None:
    journal, step, evaluated = Journal(), 0, 0
    notice(journal, Version(0, 0), every, {})
    for jump, is_free in zip(jumps, frees, strict=False):
        if is_free and journal.pending is not None:
            evaluated, journal.pending = evaluated + 1, None
        step += jump
        notice(journal, Version(0, step), every, {})
    evaluated += journal.pending is not None
    assert evaluated + journal.num_skipped == step // every + 1


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return load_config(
        [],
        [
            'environments=[{name="hidden_buttons", preset="door"}]', f'run.output_dir="{tmp_path}"',
            "evaluation.every_steps=10",
        ],
    )  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path, config: Config) -> Path:
    folder = tmp_path / "run"
    for name in ("model", "weights/L0000-S00000010", "evaluation/in_training/models/0.10"):
        (folder / name).mkdir(parents=True)
    save_resolved(config, folder)
    (folder / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    save_file({"w": torch.ones(2)}, folder / "weights" / "L0000-S00000010" / "model.safetensors")
    return folder


def journal_of(run_dir: Path) -> Journal:
    return msgspec.json.decode((run_dir / "evaluation" / "in_training.json").read_bytes(), type=Journal)


def test_a_killed_launcher_goes_on_where_it_was(run_dir: Path, config: Config) -> None:
    before = Journal(
        every_steps=10, points=[point(0, 0)], newest=Version(0, 20), num_skipped=3,
        running=Waiting(version=Version(0, 10), attempts=2), pending=Waiting(version=Version(0, 20)),
    )  # fmt: skip
    (run_dir / "evaluation" / "in_training.json").write_bytes(msgspec.json.encode(before))
    (run_dir / "metrics.jsonl").write_bytes(b'{"kind": "step", "step": 0}\n{"kind": "st')  # torn by the kill
    again = InTraining(run_dir, config, lambda line: None, lambda: 5.0)
    assert not again.is_idle
    lines = (run_dir / "metrics.jsonl").read_bytes().splitlines()
    told = json.loads(lines[-1])  # the line that the kill prevented, not glued to the torn one
    assert (told["kind"], told["version"], told["time_s"]) == ("evaluation", "0.0", 5.0) and len(lines) == 3
    # The pinned folder of 0.20 is gone, so that version is skipped; 0.10 gets its attempts anew.
    InTraining(run_dir, config, lambda line: None, lambda: 5.0)
    assert len((run_dir / "metrics.jsonl").read_bytes().splitlines()) == 3


def test_a_model_that_cannot_be_evaluated_is_counted_and_does_not_stop_anything(
    run_dir: Path, config: Config
) -> None:
    told: list[str] = []
    beside = InTraining(run_dir, config, told.append, lambda: 0.0)
    try:
        while not told:  # the weights are no model: the child refuses them, twice
            beside.poll()
            if beside._child is not None:
                beside._child.wait()
        beside.poll()
        assert beside.is_idle and "failed with code 2" in told[0]
    finally:
        beside.close()
    journal = journal_of(run_dir)
    assert (journal.num_failed, journal.points, journal.newest) == (1, [], Version(0, 10))
    assert not (run_dir / "evaluation" / "in_training" / "models" / "0.10").exists()
    assert "tokenizer" in (run_dir / "logs" / "evaluation.log").read_text()


def test_another_suite_starts_other_curves(run_dir: Path, config: Config) -> None:
    before = Journal(suite="old.toml", every_steps=10, points=[point(0, 0)], newest=Version(0, 0))
    (run_dir / "evaluation" / "in_training.json").write_bytes(msgspec.json.encode(before))
    beside = InTraining(run_dir, config, lambda line: None, lambda: 0.0)
    assert beside.is_idle and not (run_dir / "metrics.jsonl").exists()


def test_the_starting_weights_come_first_however_fast_training_is(run_dir: Path, config: Config) -> None:
    for step in (0, 1, 2):
        folder = run_dir / f"weights/L0000-S{step:08d}"
        folder.mkdir()
        save_file({"w": torch.full((2,), float(step))}, folder / "model.safetensors")
    beside = InTraining(run_dir, config, lambda line: None, lambda: 0.0)
    try:
        beside.poll()
        assert journal_of(run_dir).running == Waiting(version=Version(0, 0), attempts=1)
    finally:
        beside.close()
