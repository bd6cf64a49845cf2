"""Terminal: data set against the reference's published rows, options, and tasks frozen as drawn."""

from __future__ import annotations

import hashlib
import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from cod_async.envs.base import TaskSpec
from cod_async.envs.terminal import SPEC
from cod_async.envs.terminal.draft import DIRECTORY_NAMES, FILE_NAMES, MODES, REMOTE_USERS
from cod_async.envs.terminal.env import TerminalSimulator
from cod_async.envs.terminal.goals import are_met
from cod_async.envs.terminal.recipes import COMPOSITE, SINGLE
from cod_async.envs.terminal.tasks import make_task
from cod_async.errors import EnvironmentInputError

OPTIONS = SPEC.options("default")


def seeds(split: str, num: int) -> list[int]:
    return [record["seed"] for record in itertools.islice(SPEC.records(OPTIONS, split, 42), num)]


def test_data_set_of_the_reference() -> None:
    assert seeds("train", 3) == [5107385, 8126198, 5182337]
    assert seeds("held_out", 1) == [2625487]


def test_all_rows_are_frozen_and_distinct() -> None:
    train, held_out = seeds("train", 50_000), seeds("held_out", 4_000)
    assert len(set(train) | set(held_out)) == 54_000
    assert min(train) >= 0 and max(train) < 10_000_000
    digest = hashlib.sha256(json.dumps([*train, *held_out]).encode()).hexdigest()
    assert digest == "9ce62afb813736c4fef0f7bb1fda06d8194e254dd8508562784463cf041c1c81"


def test_records_start_over_and_are_reached_directly() -> None:
    assert SPEC.record_at is not None and SPEC.num_records is not None
    assert SPEC.num_records(OPTIONS, "train") == 50_000 and SPEC.num_records(OPTIONS, "held_out") == 4_000
    assert SPEC.record_at(OPTIONS, "held_out", 42, 10**12 * 4_000) == {"seed": 2625487}
    assert SPEC.record_at(OPTIONS, "train", 42, 50_001) == {"seed": 8126198}
    assert SPEC.record_at(OPTIONS, "train", 1 << 40, 0) != SPEC.record_at(OPTIONS, "train", 42, 0)


def test_bad_data_arguments() -> None:
    for call in (SPEC.records, SPEC.pack_seed_for):
        with pytest.raises(EnvironmentInputError, match="splits are train, held_out"):
            call(OPTIONS, "test", 0)
    with pytest.raises(EnvironmentInputError, match="negative"):
        SPEC.records(OPTIONS, "train", -1)


def test_pack_seeds_of_the_splits_differ() -> None:
    made = {
        SPEC.pack_seed_for(OPTIONS, split, seed) for split in ("train", "held_out") for seed in range(100)
    }
    assert len(made) == 200 and all(0 <= seed < 1 << 64 for seed in made)


def test_all_option_problems_are_listed_at_once() -> None:
    with pytest.raises(EnvironmentInputError) as caught:
        TerminalSimulator({"max_steps": 0, "composite_frac": 1.5, "parity": 1, "steps": 3})
    words = ["unknown option steps", "max_steps is 0", "composite_frac is 1.5", "parity is 1"]
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem
    for bad in (
        {"max_steps": True},
        {"max_steps": 1e3},
        {"composite_frac": float("nan")},
        {"composite_frac": "x"},
    ):
        with pytest.raises(EnvironmentInputError):
            TerminalSimulator({**OPTIONS, **bad})


def test_preset_of_the_paper() -> None:
    assert OPTIONS == {"max_steps": 12, "composite_frac": 0.5, "parity": False}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, ["seed is None"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"seed": True}, ["seed is True"]),
        ({"seed": 1.0, "type": "upload"}, ["unknown field type", "seed is 1.0"]),
    ],
)
def test_bad_records_are_refused_with_every_field(record: dict[str, Any], words: list[str]) -> None:
    environment = TerminalSimulator(OPTIONS)
    with pytest.raises(EnvironmentInputError) as caught:
        environment.reset(TaskSpec("terminal", "default", {}, record, 0, 0, 8))
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem


def test_pools_have_the_reference_sizes() -> None:
    assert (len(FILE_NAMES), len(DIRECTORY_NAMES), len(REMOTE_USERS), len(MODES)) == (25, 20, 7, 8)
    assert (len(SINGLE), len(COMPOSITE)) == (9, 8)


GOLDEN = Path(__file__).parents[2] / "golden" / "terminal_tasks.json"


def test_tasks_are_frozen() -> None:
    """One task of each type as drawn; the order of all draws is part of the data set."""
    environment = TerminalSimulator(OPTIONS)
    golden = json.loads(GOLDEN.read_text(encoding="utf-8"))
    assert {view["type"] for view in golden} == {*SINGLE, *COMPOSITE}
    for view in golden:
        environment.reset(TaskSpec("terminal", "default", {}, {"seed": view.pop("seed")}, 0, 0, 8))
        now = environment.task_view()
        assert {key: now[key] for key in view} == view


def test_files_of_a_task_are_frozen() -> None:
    """Distractors are drawn last; a digest over many tasks catches any change of any draw."""
    lines = []
    for seed in seeds("train", 600):
        task = make_task(seed, 0.5)
        lines += [f"{place.side} {place.path} {place.mode} {place.content is None}" for place in task.places]
        lines += [
            f"{goal.kind} {goal.side} {goal.path} {goal.mode} {len(goal.entries)}" for goal in task.goals
        ]
    assert (
        hashlib.sha256("\n".join(lines).encode()).hexdigest()
        == "e02f91c5f9b8ba52f633bd29e5ce656fdd8bc224a424bb19268d8f9cd9e67c35"
    )


def test_shares_of_types_and_machines() -> None:
    tasks = [make_task(seed, 0.5) for seed in seeds("train", 3_000)]
    share = sum(task.is_composite for task in tasks) / len(tasks)
    assert share == pytest.approx(0.5, abs=0.04)  # four standard errors
    for pool, get in (((*SINGLE, *COMPOSITE), "type"), (("windows", "mac", "linux"), "local_os")):
        counts = {name: sum(getattr(task, get) == name for task in tasks) for name in pool}
        assert sum(counts.values()) == len(tasks) and min(counts.values()) > 110
    assert {int(task.remote_host.rpartition(".")[2]) for task in tasks} == set(range(10, 100))
    assert not any(task.is_composite for task in (make_task(seed, 0.0) for seed in range(50)))
    assert all(task.is_composite for task in (make_task(seed, 1.0) for seed in range(50)))


def test_no_task_is_solved_at_its_start_and_windows_packs_zip() -> None:
    for seed in seeds("train", 1_500):
        task = make_task(seed, 0.5)
        assert not are_met(task.goals, task.world(False)), task
        if task.local_os == "windows" and task.type in ("pack_upload", "pack_upload_extract"):
            assert task.words["name"].endswith(".zip")
        if task.local_os == "windows" and task.type == "chmod":
            assert task.paths["source"].side == "remote"
