"""A lost run database, put back from the copy beside a checkpoint.

Lost is: missing although there are checkpoints, or not a database any more. Nothing is thrown away: what is
left of it, and checkpoints that the copy knows nothing of, get another name. Lineages that may have been
opened since are never numbered again, so that no version has two meanings.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import sqlite3
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec

from cod_async.durable import fsync_path
from cod_async.errors import InputError
from cod_async.lifecycle.segment import Version
from cod_async.store.copies import COPY_FOLDER, RECORD_FILE, CopyRecord
from cod_async.store.metrics_log import METRICS_NAME
from cod_async.store.schema import DATABASE_NAME

log = logging.getLogger(__name__)

CHECKPOINTS_FOLDER = "checkpoints"
_CHECKPOINT = re.compile(r"^step_(\d{8,})-L(\d+)\Z")
_PUBLISHED = re.compile(r"^L(\d{4,})-S\d{8,}\Z")
_LOOKED_AT = (("lineages", "lineage"), ("groups", "grp"), ("payloads", "payload"), ("sessions", "session"))
_TAIL_BYTES = 4 << 20


class Restored(msgspec.Struct, frozen=True, kw_only=True):
    """What was put back.

    Attributes:
        record: of the copy.
        reason: what was wrong with the database.
        kept: where what was left of it is now; None if nothing was.
        set_aside: checkpoints that the copy does not know, under their new names.
        last_step: newest step that ``metrics.jsonl`` tells of, -1 if it tells of none.
    """

    record: CopyRecord
    reason: str
    kept: Path | None
    set_aside: tuple[Path, ...]
    last_step: int


def why_lost(run_dir: Path) -> str:
    """Return what is wrong with the database of a run that has checkpoints; empty if it opens, or if nothing
    can have been lost.
    """
    path = run_dir / DATABASE_NAME
    if not any(_checkpoints(run_dir)):
        return ""
    if not path.exists():
        return "is missing"
    try:
        with contextlib.closing(
            sqlite3.connect(f"{path.resolve().as_uri()}?mode=ro", uri=True)
        ) as connection:
            connection.execute("PRAGMA user_version").fetchone()
            if connection.execute("SELECT 1 FROM sqlite_master").fetchone() is None:
                return "is empty"
            for table, column in _LOOKED_AT:  # the last page of each
                connection.execute(f"SELECT max({column}) FROM {table}").fetchone()  # noqa: S608  (constants)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError) and "unable to open" not in str(error):
            return ""  # locked, or no permission: not lost, and the coordinator names it
        return f"does not open ({error})"
    return ""


def newest_copy(run_dir: Path, run: str) -> tuple[Path, CopyRecord]:
    """Return the newest copy whose digest holds: its file and its record.

    Raises:
        InputError: there is none, with what is wrong with those that there are.
    """
    problems: list[str] = []
    for _, folder in sorted(_checkpoints(run_dir), reverse=True):
        place = folder / COPY_FOLDER
        if not place.is_dir():
            continue
        try:
            record = msgspec.json.decode((place / RECORD_FILE).read_bytes(), type=CopyRecord)
            with (place / DATABASE_NAME).open("rb") as file:
                digest = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, msgspec.MsgspecError) as error:
            problems.append(f"{place}: {error}")
            continue
        if record.run != run:
            problems.append(f"{place}: a copy of run {record.run!r}, not {run!r}")
        elif digest != record.sha256:
            problems.append(f"{place / DATABASE_NAME}: does not match its digest")
        else:
            for problem in problems:
                log.warning("passing over a copy of the run database: %s", problem)
            return place / DATABASE_NAME, record
    problems.append(
        f"{run_dir}: the run database is lost and no checkpoint has a copy of it that can be used "
        "(store.checkpoint_copies); put the database back, or begin a new run from cod export"
    )
    raise InputError(problems)


def restore_database(run_dir: Path, run: str, reason: str) -> Restored:
    """Put the newest copy in the place of a lost database.

    Args:
        run_dir: the run folder, which no coordinator uses.
        run: run id.
        reason: from :func:`why_lost`.

    Raises:
        InputError: there is no copy, or it cannot be put there; everything is as it was.
    """
    source, record = newest_copy(run_dir, run)
    target = run_dir / DATABASE_NAME
    temporary = run_dir / f".{DATABASE_NAME}.restored.tmp"
    try:
        shutil.copyfile(source, temporary)
        known = _prepare(temporary, 1 + max(_lineages(run_dir), default=-1))
        fsync_path(temporary)
        kept = _put_aside(target)
        os.replace(temporary, target)
        set_aside = tuple(
            _rename(folder) for version, folder in sorted(_checkpoints(run_dir)) if version not in known
        )
        fsync_path(run_dir)
    except (OSError, sqlite3.Error) as error:
        temporary.unlink(missing_ok=True)
        raise InputError(
            f"{target}: cannot be restored from {source} ({error}); make room and try again"
        ) from error
    return Restored(
        record=record, reason=reason, kept=kept, set_aside=set_aside, last_step=_last_step(run_dir)
    )


def _prepare(path: Path, min_lineage: int) -> set[Version]:
    """Reserve lineages in a restored database; return the checkpoints that it knows."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute(
            "INSERT OR REPLACE INTO meta VALUES ('min_lineage', ?), ('finished', '')", (str(min_lineage),)
        )
        rows = connection.execute("SELECT lineage, step FROM checkpoints").fetchall()
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return {Version(lineage, step) for lineage, step in rows}


def _put_aside(target: Path) -> Path | None:
    """Rename a database and its log; a log without its database would be taken for that of the next one."""
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    kept: Path | None = None
    for suffix in ("", "-wal", "-shm"):
        path = target.with_name(target.name + suffix)
        if path.exists():
            place = target.with_name(f"{target.name}.lost-{stamp}{suffix}")
            os.replace(path, place)
            kept = kept or place
    return kept


def _rename(folder: Path) -> Path:
    place = folder.with_name(f"unknown-{folder.name}")
    shutil.rmtree(place, ignore_errors=True)
    os.replace(folder, place)
    return place


def _checkpoints(run_dir: Path) -> Iterator[tuple[Version, Path]]:
    root = run_dir / CHECKPOINTS_FOLDER
    for path in root.iterdir() if root.is_dir() else ():
        match = _CHECKPOINT.match(path.name)
        if match:
            yield Version(lineage=int(match[2]), step=int(match[1])), path


def _lineages(run_dir: Path) -> Iterator[int]:
    """Yield lineages that something in the run folder knows."""
    for version, _ in _checkpoints(run_dir):
        yield version.lineage
    weights = run_dir / "weights"
    for path in weights.iterdir() if weights.is_dir() else ():
        match = _PUBLISHED.match(path.name)
        if match:
            yield int(match[1])
    for line in _metrics_tail(run_dir):
        lineage = line.get("lineage")
        if isinstance(lineage, int):
            yield lineage


def _last_step(run_dir: Path) -> int:
    steps = [line["step"] for line in _metrics_tail(run_dir) if line.get("kind") == "step"]
    return max((step for step in steps if isinstance(step, int)), default=-1)


def _metrics_tail(run_dir: Path) -> Iterator[dict[str, object]]:
    """Yield the last records of ``metrics.jsonl``."""
    path = run_dir / METRICS_NAME
    if not path.is_file():
        return
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        for raw in file.read().split(b"\n"):
            with contextlib.suppress(ValueError):
                line = json.loads(raw)
                if isinstance(line, dict):
                    yield line
