from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from cod_async.errors import StoreError
from cod_async.lifecycle.segment import SegmentKey
from cod_async.store.database import RunStore
from cod_async.store.schema import DATABASE_NAME, connect_reader, filesystem_kind, refuse_network_filesystem
from cod_async.store.trained import EMPTY_TRAINED_DIGEST, extend_trained_digest, plan_digest


def test_settings_that_make_an_acknowledgement_true(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    pragmas = {
        name: store._connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous", "foreign_keys", "user_version")
    }
    assert pragmas == {"journal_mode": "wal", "synchronous": 2, "foreign_keys": 1, "user_version": 3}
    store.close()


def test_one_writer_per_run(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(StoreError, match="another coordinator"):
        RunStore(tmp_path)
    store.close()
    RunStore(tmp_path).close()


def test_transaction_is_all_or_nothing(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with pytest.raises(ZeroDivisionError), store.transaction():
        store.set_meta("a", "1")
        _ = 1 / 0
    assert store.get_meta("a") is None
    with pytest.raises(StoreError, match="not written"), store.transaction():
        store.set_meta("b", "1")
        store._connection.execute("INSERT INTO meta VALUES ('b', '2')")
    assert store.get_meta("b") is None
    with store.transaction():
        store.set_meta("c", "1")
    store.close()
    again = RunStore(tmp_path)
    assert again.get_meta("c") == "1"
    again.close()


def test_full_disk_is_a_store_error_and_loses_nothing_committed(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    with store.transaction():
        store.set_meta("kept", "yes")
    store._connection.execute(
        f"PRAGMA max_page_count = {store._connection.execute('PRAGMA page_count').fetchone()[0]}"
    )
    with pytest.raises(StoreError, match="free disk space"), store.transaction():
        store.set_meta("big", "x" * 1_000_000)
    assert (store.get_meta("kept"), store.get_meta("big")) == ("yes", None)
    store.close()


def test_readers_refuse_what_is_not_a_run_database(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no run database"):
        connect_reader(tmp_path)
    (tmp_path / DATABASE_NAME).write_bytes(b"not a database at all, but long enough to look at" * 10)
    with pytest.raises(StoreError, match="cannot be read"):
        connect_reader(tmp_path)
    with pytest.raises(StoreError):
        RunStore(tmp_path)
    other = tmp_path / "other.sqlite"
    connection = sqlite3.connect(other)
    connection.execute("PRAGMA user_version = 99")
    connection.close()
    with pytest.raises(StoreError, match="schema version 99"):
        connect_reader(other)


def test_network_filesystems_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mounts = tmp_path / "mountinfo"
    nested = tmp_path / "data" / "run"
    nested.mkdir(parents=True)
    mounts.write_text(
        "21 1 8:1 / / rw - ext4 /dev/sda rw\n"
        f"22 21 0:40 / {tmp_path}/data rw,relatime shared:1 - nfs4 server:/export rw\n"
        "23 21 0:41 / /somewhere/else rw - tmpfs tmpfs rw\n"
    )
    assert filesystem_kind(nested, mounts) == "nfs4"
    assert filesystem_kind(tmp_path, mounts) == "ext4"
    assert filesystem_kind(tmp_path, tmp_path / "missing") is None
    monkeypatch.setattr("cod_async.store.schema.filesystem_kind", lambda path: "nfs4")
    with pytest.raises(StoreError, match=r"network filesystem \(nfs4\)"):
        refuse_network_filesystem(nested)


def test_size_counts_live_pages_and_the_log(tmp_path: Path) -> None:
    store = RunStore(tmp_path)
    before = store.num_bytes()
    with store.transaction():
        store.set_meta("big", "x" * 1_000_000)
    assert store.num_bytes() >= before + 1_000_000
    store.close()


def test_trained_digests() -> None:
    items = [(SegmentKey(1, 0, 0), 0, 0.5), (SegmentKey(0, 1, 2), 3, -0.25)]
    digest = plan_digest(items)
    assert digest == plan_digest(reversed(items))  # order of arrival does not matter
    # sha256 of the two records written out by hand little-endian in key order: 4 int64 and a float64 each
    assert digest == "dedf24bea90c9eab63847058269f189fe6d2eb50db6751c8f722be0bf68bfd30"
    for changed in (
        [(SegmentKey(1, 0, 0), 0, 0.5), (SegmentKey(0, 1, 2), 4, -0.25)],
        [(SegmentKey(1, 0, 0), 0, 0.5000001), (SegmentKey(0, 1, 2), 3, -0.25)],
        [(SegmentKey(1, 0, 1), 0, 0.5), (SegmentKey(0, 1, 2), 3, -0.25)],
        items[:1],
    ):
        assert plan_digest(changed) != digest
    assert EMPTY_TRAINED_DIGEST == ""
    # sha256("" + "abc") from any shell: printf abc | sha256sum
    assert (
        extend_trained_digest("", "abc") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    )


def test_deleting_a_segment_scans_no_table_that_refers_to_it(tmp_path: Path) -> None:
    """A lifecycle that starts anew deletes its segments: every reference to them is looked up by an index."""
    store = RunStore(tmp_path)
    read = store._connection.execute
    tables = [name for (name,) in read("SELECT name FROM sqlite_master WHERE type = 'table'")]
    num_found = 0
    for table in tables:
        columns = [row[3] for row in read(f"PRAGMA foreign_key_list({table})") if row[2] == "segments"]
        if columns:
            num_found += 1
            where = " AND ".join(f"{column} = 0" for column in columns)
            query = f"EXPLAIN QUERY PLAN SELECT 1 FROM {table} WHERE {where}"  # noqa: S608  (the schema's names)
            (plan,) = read(query).fetchall()
            assert plan[3].startswith("SEARCH"), (table, plan)
    assert num_found == 2
    store.close()
