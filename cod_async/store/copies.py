"""Copies of the run database, one beside each checkpoint, so that the loss of its disk costs only what came
after.

The coordinator copies over its own connection, a few pages at a time: SQLite then carries every later commit
of that connection into the copy, so the copy ends as the database of one moment and nobody holds a
transaction open meanwhile. (A reader's backup begins anew with each commit and never ends under load; one
that reads everything in a single transaction lets the write-ahead log grow for as long as it takes, as
``VACUUM INTO`` does.) A copy is taken after its checkpoint was recorded, so it holds the plans up to it and
every segment acknowledged until then, and perhaps some more: going on from the checkpoint rolls that back as
usual.

``checkpoints/step_…/database/`` holds ``run.sqlite`` and ``copy.json``. Half-made copies have another name.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import re
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from cod_async.durable import commit_folder, remove_folder
from cod_async.lifecycle.segment import Version
from cod_async.store.schema import DATABASE_NAME, PAGE_BYTES

log = logging.getLogger(__name__)

COPY_FOLDER = "database"
RECORD_FILE = "copy.json"
STEP_PAGES = 16
"""Half a megabyte is copied under the connection's lock at a time. With 200,000 segments (1.7 GB) commits
beside a copy took 4 ms in the middle and 12 ms in 99 of 100 cases, in the best of several runs; the range is
in docs/checkpoints.md."""
SYNC_BYTES = 8 << 20
"""What was copied is flushed this often, outside the lock: once too much waits for the disk, a copied page
would wait too, and a commit with it (0.7 to 2.8 s were measured)."""
MAX_PAUSE_S = 0.05
"""The copy rests after each piece for as long as the piece took, at most this long."""
_BUSY_S = 0.002
_PATH = re.compile(r"^checkpoints/step_\d{8,}-L\d+\Z")


class Frontier(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How far the planner and the learner had come, for people.

    Attributes:
        version: (lineage, step) that the learner worked on.
        next_group: index of the next group to plan.
        groups: number of groups by state.
        num_segments: segments in the database.
    """

    version: Version | None
    next_group: int
    groups: dict[str, int]
    num_segments: int


class CopyRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What ``copy.json`` says.

    Attributes:
        run: run id.
        checkpoint: version of the checkpoint that it belongs to.
        taken_at: when the copy was complete, seconds since the epoch, for people.
        sha256: of the file.
        num_bytes: of the file.
        frontier: what is in it.
    """

    run: str
    checkpoint: Version
    taken_at: float
    sha256: str
    num_bytes: int
    frontier: Frontier


class CopyAbortedError(Exception):
    """The copy was given up because the process ends."""


def copy_database(connection: sqlite3.Connection, target: Path, should_stop: Callable[[], bool]) -> None:
    """Copy a database into a new file while its connection is used on another thread.

    Args:
        connection: the database's writer.
        target: new file.
        should_stop: looked at between pieces.

    Raises:
        OSError: the file cannot be written.
        sqlite3.Error: the same, or the database cannot be read.
        CopyAbortedError: it should stop.
    """
    # Nobody else opens the target, and it may be on a disk without locks.
    name = f"{target.resolve().as_uri()}?vfs=unix-none"
    with contextlib.closing(sqlite3.connect(name, uri=True, isolation_level=None)) as copy:
        copy.execute(f"PRAGMA page_size = {PAGE_BYTES}")
        copy.execute("PRAGMA journal_mode = OFF")
        copy.execute("PRAGMA synchronous = OFF")
        handle = os.open(target, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            pace = _Pace(handle, should_stop)
            connection.backup(copy, pages=STEP_PAGES, progress=pace.between, sleep=_BUSY_S)
        finally:
            os.close(handle)


class _Pace:
    """Rests, flushes and looks whether to stop between two pieces of a copy."""

    def __init__(self, handle: int, should_stop: Callable[[], bool]) -> None:
        self._handle = handle
        self._should_stop = should_stop
        self._since_bytes = 0
        self._began = time.monotonic()

    def between(self, status: int, remaining: int, total: int) -> None:
        if self._should_stop():
            raise CopyAbortedError
        took_s = time.monotonic() - self._began
        self._since_bytes += STEP_PAGES * PAGE_BYTES
        if self._since_bytes >= SYNC_BYTES:
            os.fsync(self._handle)
            self._since_bytes = 0
        time.sleep(min(MAX_PAUSE_S, took_s))
        self._began = time.monotonic()


def frontier_of(path: Path) -> Frontier:
    """Return what a database that nobody writes to holds."""
    with contextlib.closing(
        sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro&immutable=1", uri=True)
    ) as connection:

        def ask(query: str, *values: int) -> int | None:
            found = connection.execute(query, values).fetchone()
            return None if found is None or found[0] is None else int(found[0])

        lineage = ask("SELECT max(lineage) FROM lineages")
        version = None
        if lineage is not None:
            last = ask("SELECT max(step) FROM steps WHERE lineage = ? AND state = 'done'", lineage)
            start = ask("SELECT branch_step FROM lineages WHERE lineage = ?", lineage) or 0
            version = Version(lineage, start if last is None else last + 1)
        groups = connection.execute("SELECT state, count(*) FROM groups GROUP BY state ORDER BY state")
        return Frontier(
            version=version,
            next_group=ask("SELECT coalesce(max(grp), -1) + 1 FROM groups") or 0,
            groups={str(state): int(count) for state, count in groups},
            num_segments=ask("SELECT count(*) FROM segments") or 0,
        )


def copy_folder(run_dir: Path, checkpoint_path: str) -> Path:
    """Return where the copy that belongs to a checkpoint lies."""
    return run_dir / checkpoint_path / COPY_FOLDER


class DatabaseCopies:
    """Copies the database beside checkpoints, on a thread, one copy at a time.

    Args:
        connection: the database's writer; SQLite lets threads take turns on it.
        run_dir: the run folder.
        run: run id.
        keep: which checkpoints keep a copy.

    Attributes:
        news: what became of copies, ``{name, ...}`` each; whoever reports them takes them away.
    """

    def __init__(
        self, connection: sqlite3.Connection, run_dir: Path, run: str, keep: Literal["none", "newest", "all"]
    ) -> None:
        self._connection = connection
        self._run_dir = run_dir
        self._run = run
        self._keep = keep
        if sqlite3.threadsafety < 3 and keep != "none":
            log.warning("this Python's SQLite is not made for threads: the run database is not copied")
            self._keep = "none"
        self._wanted: tuple[Version, str] | None = None
        self._guard = threading.Lock()
        self._thread: threading.Thread | None = None
        self._is_stopping = threading.Event()
        self.news: list[dict[str, object]] = []

    def request(self, version: Version, path: str) -> None:
        """Copy the database beside a recorded checkpoint; of several that wait, the newest is served.

        Args:
            version: of the checkpoint.
            path: its folder, relative to the run folder.
        """
        if self._keep == "none" or not _PATH.match(path) or not (self._run_dir / path).is_dir():
            return
        with self._guard:
            self._wanted = (version, path)
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="database-copy")
                self._thread.start()

    def close(self, wait_s: float) -> None:
        """Wait for the copy under way and give it up after ``wait_s``; then nothing uses the database."""
        thread = self._thread
        if thread is not None:
            thread.join(wait_s)
            self._is_stopping.set()
            thread.join()

    def _serve(self) -> None:
        while True:
            with self._guard:
                wanted, self._wanted = self._wanted, None
                if wanted is None or self._is_stopping.is_set():
                    self._thread = None
                    return
            self._copy(*wanted)

    def _copy(self, version: Version, path: str) -> None:
        """Make one copy; one that fails is named, and the copies before it stay."""
        folder = copy_folder(self._run_dir, path)
        temporary = folder.with_name(f"{COPY_FOLDER}.partial")
        started = time.monotonic()
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(mode=0o700)
            record = self._fill(temporary, version)
            remove_folder(folder)
            commit_folder(temporary, folder)
        except CopyAbortedError:
            shutil.rmtree(temporary, ignore_errors=True)
            log.info("run %s: the copy beside checkpoint %s was given up", self._run, version)
            return
        except (OSError, sqlite3.Error) as error:
            shutil.rmtree(temporary, ignore_errors=True)
            if not folder.parent.is_dir():
                log.info("run %s: checkpoint %s was removed before its copy was made", self._run, version)
                return
            log.error(
                "run %s: the run database was NOT copied beside checkpoint %s: %s; earlier copies stay, the "
                "next checkpoint tries again",
                *(self._run, version, error),
            )
            self._tell("database_copy_failed", version, error=str(error)[:200])
            return
        wall_s = time.monotonic() - started
        log.info(
            "run %s: the run database is copied beside checkpoint %s (%.1f MB, %.1f s)",
            *(self._run, version, record.num_bytes / 1e6, wall_s),
        )
        self._tell("database_copied", version, num_bytes=record.num_bytes, wall_s=round(wall_s, 3))
        if self._keep == "newest":
            for other in sorted((self._run_dir / path).parent.glob(f"*/{COPY_FOLDER}*")):
                if other != folder:  # half-made ones of a process that was killed, too
                    remove_folder(other)

    def _fill(self, folder: Path, version: Version) -> CopyRecord:
        target = folder / DATABASE_NAME
        copy_database(self._connection, target, self._is_stopping.is_set)
        with target.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        record = CopyRecord(
            run=self._run,
            checkpoint=version,
            taken_at=time.time(),
            sha256=digest,
            num_bytes=target.stat().st_size,
            frontier=frontier_of(target),
        )
        (folder / RECORD_FILE).write_bytes(msgspec.json.format(msgspec.json.encode(record), indent=1))
        return record

    def _tell(self, name: str, version: Version, **fields: object) -> None:
        self.news.append({"name": name, "lineage": version.lineage, "step": version.step, **fields})
