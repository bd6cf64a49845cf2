"""The run database as the coordinator uses it: one writer, one transaction per batch of messages.

Group commit is what makes honest acknowledgement affordable: everything that arrived in one poll is applied
in one transaction and flushed once, and only then is any of it acknowledged. A failed flush is never guessed
around: the transaction is rolled back, :class:`~cod_async.errors.StoreError` is raised, and the process is
expected to end.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from cod_async.errors import StoreError
from cod_async.store.copies import DatabaseCopies
from cod_async.store.history import HistoryTable
from cod_async.store.schema import DATABASE_NAME, connect_writer
from cod_async.store.segments import SegmentTable
from cod_async.store.sessions import SessionTable
from cod_async.store.work import WorkTable

_LOCK_NAME = "run.sqlite.lock"


class RunStore:
    """The run database, opened for writing. One process at a time, guarded by a lock file.

    Args:
        run_dir: run folder on a local disk.

    Raises:
        StoreError: another coordinator has the run, the folder is on a network filesystem, or the file is not
            a run
            database of this version.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / DATABASE_NAME
        self._lock = _take_lock(run_dir / _LOCK_NAME)
        try:
            self._connection = connect_writer(self.path)
        except BaseException:
            os.close(self._lock)
            raise
        self.sessions = SessionTable(self._connection)
        self.work = WorkTable(self._connection)
        self.segments = SegmentTable(self._connection)
        self.history = HistoryTable(self._connection)

    def close(self) -> None:
        """Close the database and release the run."""
        with contextlib.suppress(sqlite3.Error):
            self._connection.close()
        os.close(self._lock)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """Run a block atomically; when it returns, what it wrote is on the disk.

        Raises:
            StoreError: the database could not be read, written or flushed; nothing of the block happened.
        """
        with self.staged():
            yield
        self.commit()

    @contextlib.contextmanager
    def staged(self) -> Iterator[None]:
        """Run a block in a transaction that :meth:`commit` ends; if the block fails, nothing of it happened.

        Raises:
            StoreError: the database could not be read or written.
        """
        try:
            self._connection.execute("BEGIN IMMEDIATE")
        except sqlite3.Error as error:
            raise StoreError(
                f"{self.path}: no transaction ({error}); is another program writing to it?"
            ) from error
        with self._rolled_back_on_error():
            yield

    def commit(self) -> None:
        """Flush what was staged to the disk. May run on another thread while nobody else uses the store.

        Raises:
            StoreError: it could not be flushed; nothing of what was staged happened.
        """
        with self._rolled_back_on_error():
            self._connection.execute("COMMIT")

    @contextlib.contextmanager
    def _rolled_back_on_error(self) -> Iterator[None]:
        try:
            yield
        except BaseException as error:
            with contextlib.suppress(sqlite3.Error):
                self._connection.execute("ROLLBACK")
            if isinstance(error, sqlite3.Error):
                raise StoreError(
                    f"{self.path}: not written ({error}); free disk space or check the disk"
                ) from error
            raise

    def copies(self, run: str, keep: Literal["none", "newest", "all"]) -> DatabaseCopies:
        """Return what copies this database beside checkpoints; close it before the store."""
        return DatabaseCopies(self._connection, self.path.parent, run, keep)

    def get_meta(self, name: str) -> str | None:
        """Return a run-wide value, or None."""
        found = self._connection.execute("SELECT value FROM meta WHERE name = ?", (name,)).fetchone()
        return None if found is None else str(found[0])

    def set_meta(self, name: str, value: str) -> None:
        """Set a run-wide value."""
        self._connection.execute("INSERT OR REPLACE INTO meta VALUES (?, ?)", (name, value))

    def num_bytes(self) -> int:
        """Return the bytes in use: live pages of the database and the write-ahead log."""
        pragmas = ("page_count", "freelist_count", "page_size")
        pages, free, size = (int(self._connection.execute(f"PRAGMA {p}").fetchone()[0]) for p in pragmas)
        log = self.path.with_name(f"{self.path.name}-wal")
        return (pages - free) * size + (log.stat().st_size if log.exists() else 0)

    def prune_payloads(self, before_step: int) -> int:
        """Delete payloads that no resume can need: of segments trained before ``before_step``, and of dropped
        ones whose group has none trained later or still to be trained.

        Segments of groups that are still being worked on keep theirs. Returns the number deleted.
        """
        self._connection.execute("DROP TABLE IF EXISTS temp.doomed")
        self._connection.execute(
            # CROSS JOIN keeps this order: only segments that still have a payload are looked at, not all of
            # history.
            "CREATE TEMP TABLE doomed AS SELECT segments.payload, segments.grp, member, ordinal "
            "FROM segments INDEXED BY segments_payload CROSS JOIN groups USING (grp) "
            "WHERE segments.payload IS NOT NULL AND groups.state IN ('trained', 'dropped') "
            "AND ((segments.state = 'trained' AND segments.trained_step < ?) OR (segments.state = 'dropped' "
            # a transcript's dropped segments are the context of those that a resume may train again, and of
            # late ones that are not trained yet
            "AND NOT EXISTS (SELECT 1 FROM segments AS other WHERE other.grp = segments.grp "
            "AND (other.state IN ('waiting', 'ready', 'planned') "
            "OR (other.state = 'trained' AND other.trained_step >= ?)))))",
            (before_step, before_step),
        )
        self._connection.execute(
            "UPDATE segments SET payload = NULL WHERE (grp, member, ordinal) IN "
            "(SELECT grp, member, ordinal FROM temp.doomed)"
        )
        cursor = self._connection.execute(
            "DELETE FROM payloads WHERE payload IN (SELECT payload FROM temp.doomed)"
        )
        self._connection.execute("DROP TABLE temp.doomed")
        return cursor.rowcount


def _take_lock(path: Path) -> int:
    try:
        handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StoreError(
            f"{path}: cannot be written ({error.strerror}); the run folder must be writable"
        ) from error
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(handle)
        raise StoreError(f"{path}: another coordinator has this run; stop it first") from error
    return handle
