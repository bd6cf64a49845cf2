"""The judge is judged: a run that passes is tampered with, one broken promise at a time."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .checker import check_run

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(400)]
TRAINED = "SELECT grp, member, ordinal FROM segments WHERE state = 'trained' LIMIT 1"


@pytest.fixture
def tampered(
    toured: dict[str, Any], drill_folder: Path, tmp_path: Path
) -> Callable[[Callable[[sqlite3.Connection], object]], list[str]]:
    """Return a function that changes a copy of the toured run's database and returns what the judge finds."""
    assert toured["problems"] == []
    run, source = tmp_path / "run", drill_folder / "runs" / "tour-0"

    def not_needed(folder: str, names: list[str]) -> list[str]:
        return ["weights", "logs"] if Path(folder) == source else []  # checkpoints have weights of their own

    shutil.copytree(source, run, ignore=not_needed)

    def tamper(change: Callable[[sqlite3.Connection], object]) -> list[str]:
        database = sqlite3.connect(run / "run.sqlite", isolation_level=None)
        change(database)
        database.close()
        return check_run(run, drill_folder / "acks" / "tour-0").problems

    return tamper


def convicted(problems: list[str], words: str) -> bool:
    return any(words in problem for problem in problems)


def test_an_honest_copy_passes(tampered: Callable[..., list[str]]) -> None:
    assert tampered(lambda database: None) == []


def test_a_lost_acknowledged_segment_is_missed(tampered: Callable[..., list[str]]) -> None:
    def lose(database: sqlite3.Connection) -> None:
        key = database.execute(TRAINED).fetchone()
        for table in ("step_items", "segments"):
            database.execute(
                f"DELETE FROM {table} WHERE (grp, member, ordinal) = (?, ?, ?)",  # noqa: S608
                key,
            )

    problems = tampered(lose)
    assert convicted(problems, "was acknowledged, the database has None")
    assert convicted(problems, "recorded digests are not those of its items")


def test_training_twice_is_seen(tampered: Callable[..., list[str]]) -> None:
    def repeat(database: sqlite3.Connection) -> None:
        line, step, *item = database.execute(
            "SELECT * FROM step_items JOIN steps USING (lineage, step) WHERE state = 'done' ORDER BY step"
        ).fetchone()[:8]
        last = database.execute("SELECT max(step) FROM steps WHERE state = 'done'").fetchone()[0]
        newest = database.execute("SELECT max(lineage) FROM lineages").fetchone()[0]
        assert (line, step) != (newest, last)
        database.execute("INSERT INTO step_items VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (newest, last, *item))

    assert convicted(tampered(repeat), "is trained in")


def test_a_step_that_is_missing_or_not_rolled_back_is_seen(tampered: Callable[..., list[str]]) -> None:
    def revive(database: sqlite3.Connection) -> None:
        database.execute("UPDATE steps SET state = 'planned' WHERE step = 3")

    assert convicted(tampered(revive), "of the surviving history is planned")


def test_old_tokens_are_seen(tampered: Callable[..., list[str]]) -> None:
    def age(database: sqlite3.Connection) -> None:
        database.execute(
            "UPDATE segments SET version_tokens = '[[0, 0, 5]]' WHERE state = 'trained' AND trained_step = 20"
        )

    assert convicted(tampered(age), "lag 20 over 3")


def test_a_segment_of_somebody_who_had_lost_the_lease_is_seen(tampered: Callable[..., list[str]]) -> None:
    def swap(database: sqlite3.Connection) -> None:
        key = database.execute(TRAINED).fetchone()
        other = "SELECT max(session) FROM sessions WHERE role = 'learner'"
        database.execute(
            f"UPDATE segments SET session = ({other}) WHERE (grp, member, ordinal) = (?, ?, ?)",  # noqa: S608
            key,
        )

    assert convicted(tampered(swap), "was granted to")


def test_a_checkpoint_of_another_history_is_seen(tampered: Callable[..., list[str]], tmp_path: Path) -> None:
    path = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1] / "trainer.json"
    record = json.loads(path.read_text())
    path.write_text(json.dumps(record | {"trained_digest": "0" * 64}))
    assert convicted(tampered(lambda database: None), "not the digest of its history")
