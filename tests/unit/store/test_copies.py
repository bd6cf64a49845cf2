"""A copy of the run database is one moment of it, made while it is written, and takes a lost one's place."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cod_async.errors import InputError, StoreError
from cod_async.lifecycle.segment import Version
from cod_async.store import copies as copies_module
from cod_async.store.copies import DatabaseCopies, copy_database, frontier_of
from cod_async.store.database import RunStore
from cod_async.store.restoring import newest_copy, restore_database, why_lost
from cod_async.store.schema import DATABASE_NAME, connect_reader
from cod_async.store.work import NewGroup


@pytest.fixture
def store(tmp_path: Path) -> Iterator[RunStore]:
    found = RunStore(tmp_path)
    with found.transaction():
        found.set_meta("run", "r")
        found.history.open_lineage(None, 0, "nonce-0", 0)
    yield found
    found.close()


def add_groups(store: RunStore, first: int, count: int) -> None:
    new = NewGroup(
        environment="e", preset="p", options_json="{}", records_json=("{}",) * 400, pack_seed=7,
        num_members=2, planned_at=Version(0, 0),
    )  # fmt: skip
    with store.transaction():
        for group in range(first, first + count):
            store.work.add_group(group, new)
        store.set_meta("last", str(first + count - 1))


def checkpoint(store: RunStore, run_dir: Path, version: Version) -> str:
    path = f"checkpoints/step_{version.step:08d}-L{version.lineage}"
    (run_dir / path).mkdir(parents=True)
    with store.transaction():
        store.history.add_checkpoint(version, path, "d", "t")
    return path


def taken(copies: DatabaseCopies, version: Version, path: str) -> None:
    """Have a copy made and wait for it."""
    copies.request(version, path)
    copies.close(60.0)


def test_a_copy_under_writing_is_one_moment(store: RunStore, tmp_path: Path) -> None:
    """Every transaction adds groups and says which was the last; a copy never has one without the other, and
    has everything from before it began.
    """
    add_groups(store, 0, 200)
    halt, wrote = threading.Event(), threading.Event()

    def write() -> None:
        group = 200
        while not halt.is_set():
            add_groups(store, group, 3)
            group += 3
            wrote.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert wrote.wait(30)
        for number in range(3):
            with contextlib.closing(connect_reader(tmp_path)) as connection:
                before = int(connection.execute("SELECT max(grp) FROM groups").fetchone()[0])
            target = tmp_path / f"copy-{number}.sqlite"
            copy_database(store._connection, target, lambda: False)
            with contextlib.closing(connect_reader(target)) as connection:
                assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
                last, groups, leases = connection.execute(
                    "SELECT (SELECT value FROM meta WHERE name = 'last'), (SELECT max(grp) FROM groups), "
                    "(SELECT count(*) FROM leases)"
                ).fetchone()
            assert int(last) == groups >= before
            assert leases == 2 * (groups + 1)
    finally:
        halt.set()
        writer.join()


def test_an_open_transaction_is_never_in_a_copy(store: RunStore, tmp_path: Path) -> None:
    add_groups(store, 0, 2)
    target = tmp_path / "copy.sqlite"
    waiting = threading.Event()
    # a piece is not copied while a transaction is open, so the first look comes when it is over
    copier = threading.Thread(
        target=copy_database, args=(store._connection, target, lambda: waiting.set() or False)
    )
    with store.staged():
        store.set_meta("last", "99")
        copier.start()
        waiting.wait(0.3)
    store._connection.execute("ROLLBACK")
    copier.join(30)
    assert frontier_of(target).next_group == 2
    with contextlib.closing(connect_reader(target)) as connection:
        assert connection.execute("SELECT value FROM meta WHERE name = 'last'").fetchone() == ("1",)


def test_the_record_says_what_is_in_the_copy_and_the_newest_alone_is_kept(
    store: RunStore, tmp_path: Path
) -> None:
    add_groups(store, 0, 3)
    first = checkpoint(store, tmp_path, Version(0, 2))
    copies = store.copies("r", "newest")
    taken(copies, Version(0, 2), first)
    assert (tmp_path / first / "database" / "run.sqlite").is_file()
    add_groups(store, 3, 2)
    second = checkpoint(store, tmp_path, Version(0, 4))
    (tmp_path / first / "database.partial").mkdir()  # of a process that was killed
    copies = store.copies("r", "newest")
    taken(copies, Version(0, 4), second)
    assert sorted(path.relative_to(tmp_path).as_posix() for path in tmp_path.glob("checkpoints/*/*")) == [
        f"{second}/database"
    ]
    file, record = newest_copy(tmp_path, "r")
    assert file.parent.parent == tmp_path / second
    assert (record.checkpoint, record.frontier.next_group) == (Version(0, 4), 5)
    assert (record.frontier.version, record.frontier.groups) == (Version(0, 0), {"open": 5})
    assert [event["name"] for event in copies.news] == ["database_copied"]


@pytest.mark.parametrize(("keep", "count"), [("none", 0), ("all", 2)])
def test_how_many_are_kept(store: RunStore, tmp_path: Path, keep: str, count: int) -> None:
    for step in (2, 4):
        path = checkpoint(store, tmp_path, Version(0, step))
        taken(store.copies("r", keep), Version(0, step), path)  # type: ignore[arg-type]
    assert len(list(tmp_path.glob("checkpoints/*/database"))) == count


def test_paths_outside_the_checkpoints_are_not_written_to(store: RunStore, tmp_path: Path) -> None:
    for path in ("..", "checkpoints/../model", "/tmp", "checkpoints/step_00000002-L0"):
        taken(store.copies("r", "all"), Version(0, 2), path)
    assert sorted(path.name for path in tmp_path.iterdir() if not path.name.startswith("run.sqlite")) == []


def test_a_copy_that_fails_is_named_and_the_one_before_it_stays(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = checkpoint(store, tmp_path, Version(0, 2))
    taken(store.copies("r", "newest"), Version(0, 2), first)
    second = checkpoint(store, tmp_path, Version(0, 4))

    def full(handle: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(copies_module.os, "fsync", full)
    monkeypatch.setattr(copies_module, "SYNC_BYTES", 1)
    copies = store.copies("r", "newest")
    taken(copies, Version(0, 4), second)
    (event,) = copies.news
    assert (event["name"], event["step"]) == ("database_copy_failed", 4)
    assert "No space left" in str(event["error"]) and "NOT copied" in caplog.text
    assert not list((tmp_path / second).iterdir())
    _, record = newest_copy(tmp_path, "r")
    assert record.checkpoint == Version(0, 2)


def test_a_copy_under_way_is_given_up_when_the_process_ends(
    store: RunStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    add_groups(store, 0, 500)
    path = checkpoint(store, tmp_path, Version(0, 2))
    began = threading.Event()
    monkeypatch.setattr(copies_module, "STEP_PAGES", 1)
    monkeypatch.setattr(
        copies_module.time, "sleep", lambda seconds: began.set() or threading.Event().wait(0.01)
    )
    copies = store.copies("r", "newest")
    copies.request(Version(0, 2), path)
    assert began.wait(30)
    copies.close(0.0)
    assert copies.news == [] and not list((tmp_path / path).iterdir())


# --------------------------------------------------------------------------------------------------------
# losing the database


def lose(run_dir: Path, how: str) -> None:
    path = run_dir / DATABASE_NAME
    raw = path.read_bytes()
    match how:
        case "missing":
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)
        case "emptied":
            path.write_bytes(b"")
        case "overwritten":
            path.write_bytes(b"not a database at all" * 4000)
        case "cut":
            path.write_bytes(raw[: len(raw) // 3])


@pytest.fixture
def copied_run(tmp_path: Path) -> Path:
    """A run whose database was copied beside checkpoint 0.2 and went on to 1.4."""
    store = RunStore(tmp_path)
    with store.transaction():
        store.set_meta("run", "r")
        store.history.open_lineage(None, 0, "nonce-0", 0)
    add_groups(store, 0, 3)
    path = checkpoint(store, tmp_path, Version(0, 2))
    taken(store.copies("r", "newest"), Version(0, 2), path)
    with store.transaction():
        store.history.open_lineage(0, 2, "nonce-1", 0)
    add_groups(store, 3, 1)
    checkpoint(store, tmp_path, Version(1, 4))
    (tmp_path / "weights" / "L0001-S00000004").mkdir(parents=True)
    (tmp_path / "metrics.jsonl").write_text(
        '{"kind": "step", "lineage": 2, "step": 5}\n{"kind": "step", "lineage": 2, "st'
    )
    store.close()
    return tmp_path


@pytest.mark.parametrize("how", ["missing", "emptied", "overwritten", "cut"])
def test_a_lost_database_is_put_back(copied_run: Path, how: str) -> None:
    assert why_lost(copied_run) == ""
    lose(copied_run, how)
    reason = why_lost(copied_run)
    assert reason
    restored = restore_database(copied_run, "r", reason)
    assert why_lost(copied_run) == ""
    assert restored.record.checkpoint == Version(0, 2) and restored.last_step == 5
    assert (restored.kept is None) == (how == "missing")
    assert [path.name for path in restored.set_aside] == ["unknown-step_00000004-L1"]
    store = RunStore(copied_run)
    try:
        assert store.work.next_group() == 3
        with store.transaction():  # 1 and 2 were lost with the database: their versions keep their meaning
            assert store.history.open_lineage(0, 2, "nonce-2", 0) == 3
        with store.transaction():
            assert store.history.open_lineage(3, 2, "nonce-3", 0) == 4
    finally:
        store.close()


def test_without_a_copy_nothing_is_made_up(copied_run: Path) -> None:
    record = copied_run / "checkpoints" / "step_00000002-L0" / "database" / "copy.json"
    lose(copied_run, "missing")
    with pytest.raises(InputError, match="a copy of run 'r', not 'other'"):
        restore_database(copied_run, "other", "is missing")
    with (record.parent / "run.sqlite").open("ab") as file:
        file.write(b"x")
    with pytest.raises(InputError, match="does not match its digest"):
        restore_database(copied_run, "r", "is missing")
    record.unlink()
    with pytest.raises(InputError, match="no checkpoint has a copy"):
        restore_database(copied_run, "r", "is missing")
    assert not (copied_run / DATABASE_NAME).exists()
    assert (copied_run / "checkpoints" / "step_00000004-L1").is_dir()


def test_a_run_that_has_not_begun_has_lost_nothing(tmp_path: Path) -> None:
    assert why_lost(tmp_path) == ""


def test_a_database_of_another_program_version_is_not_lost(copied_run: Path) -> None:
    with contextlib.closing(sqlite3.connect(copied_run / DATABASE_NAME)) as connection:
        connection.execute("PRAGMA user_version = 999")
        connection.commit()
    assert why_lost(copied_run) == ""
    with pytest.raises(StoreError, match="schema version 999"):
        connect_reader(copied_run)
