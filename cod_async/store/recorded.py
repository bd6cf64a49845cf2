"""The steps of a run as they were recorded, and whether they can be computed again.

A step can be replayed when the payloads that it trained on are kept and its starting weights can be had: they
are on disk, or an older state is, and every step between can be replayed too. This module knows the history
and the payloads; which weights lie on disk is the learner's to look up. Nothing here writes.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from cod_async.errors import InputError
from cod_async.lifecycle.segment import SegmentKey, Version
from cod_async.store.batches import step_items
from cod_async.store.history import HistoryTable, StepRow
from cod_async.store.schema import connect_reader
from cod_async.store.segments import SegmentTable
from cod_async.wire.messages import TrainItem


@dataclass(frozen=True)
class Stretch:
    """Part of a history on one lineage: its versions ``start`` to ``end``, its steps ``start`` to
    ``end`` - 1.
    """

    lineage: int
    start: int
    end: int


class RecordedRun:
    """Reads the recorded steps of a run; every method opens the database for a moment only.

    Args:
        path: run folder.
        is_transcript: whether the run's segments are deltas of growing conversations.

    Raises:
        StoreError: there is no run database in it.
    """

    def __init__(self, path: Path, *, is_transcript: bool) -> None:
        self._path = path
        self._is_transcript = is_transcript
        with self._open():
            pass

    def version(self, step: int, lineage: int | None = None) -> Version:
        """Return the version that a step started from.

        Args:
            step: number of the step.
            lineage: that it was taken on; None: the surviving history's.

        Raises:
            InputError: no such step was taken, or only on a lineage that was rolled back and must be named.
        """
        with self._open() as connection:
            history = HistoryTable(connection)
            tree = history.tree()
            if tree is None:
                raise InputError(f"--step {step}: the run's learner took no step yet; wait for its first one")
            if lineage is not None:
                if not history.has_lineage(lineage):
                    raise InputError(
                        f"--lineage {lineage}: the run has lineages 0 to {tree.current}; give one of them"
                    )
                version = Version(lineage, step)
                if not _is_taken(history.step(version)):
                    raise InputError(
                        f"--step {step} --lineage {lineage}: that lineage has no such step; it has "
                        f"{_known(connection, lineage)}"
                    )
                return version
            version = tree.at(step)
            if _is_taken(history.step(version)):
                return version
            others = (Version(number, step) for number in range(tree.current + 1))
            rolled_back = [str(other.lineage) for other in others if _is_taken(history.step(other))]
            if rolled_back:
                raise InputError(
                    f"--step {step}: it was rolled back and is no part of the surviving history; add "
                    f"--lineage {' or '.join(rolled_back)}"
                )
            last = history.current_step(tree.current) - 1
            raise InputError(
                f"--step {step}: not taken; the run has steps 0 to {last}"
                if last >= 0
                else f"--step {step}: the run has no finished step"
            )

    def history(self, version: Version) -> list[Stretch]:
        """Return the history that leads to ``version``, newest stretch first; a version at the end of one
        stretch and at the start of the one before it in the list is the same weights under two names.

        Raises:
            InputError: the run has no such lineage.
        """
        found: list[Stretch] = []
        with self._open() as connection:
            history = HistoryTable(connection)
            lineage: int | None = version.lineage
            end = version.step
            while lineage is not None:
                if not history.has_lineage(lineage):
                    raise InputError(f"version {version}: the run database knows no lineage {lineage}")
                start = min(end, history.branch_step(lineage))
                found.append(Stretch(lineage, start, end))
                end, lineage = start, history.parent(lineage)
        return found

    def step(self, version: Version) -> StepRow:
        """Return a step that was taken.

        Raises:
            InputError: it was not.
        """
        with self._open() as connection:
            row = HistoryTable(connection).step(version)
        if row is None or not _is_taken(row):
            raise InputError(f"step {version}: the run database has no such step")
        return row

    def num_missing(self, version: Version) -> int:
        """Return how many segments of a step have no payload any more, its transcripts' context included."""
        with self._open() as connection:
            return len(_missing(connection, version, is_transcript=self._is_transcript))

    def items(self, version: Version) -> list[TrainItem]:
        """Return the batch of a step as the learner had it.

        Raises:
            InputError: payloads of it are gone.
        """
        with self._open() as connection:
            missing = _missing(connection, version, is_transcript=self._is_transcript)
            if missing:
                raise InputError(
                    f"step {version}: the payloads of {len(missing)} segments are gone, {missing[0]} among "
                    'them; only runs with store.retention = "all" keep every step'
                )
            return list(
                step_items(
                    HistoryTable(connection),
                    SegmentTable(connection),
                    version,
                    is_transcript=self._is_transcript,
                )
            )

    @contextlib.contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(connect_reader(self._path)) as connection:
            yield connection


def _is_taken(row: StepRow | None) -> bool:
    return row is not None and row.done_at is not None


def _known(connection: sqlite3.Connection, lineage: int) -> str:
    low, high = connection.execute(
        "SELECT min(step), max(step) FROM steps WHERE lineage = ? AND done_at IS NOT NULL", (lineage,)
    ).fetchone()
    return "none" if low is None else f"{low} to {high}"


def _missing(connection: sqlite3.Connection, version: Version, *, is_transcript: bool) -> list[SegmentKey]:
    """Return the segments that a step needs and that have no payload, by key."""
    rows = connection.execute(
        "SELECT DISTINCT segments.grp, segments.member, segments.ordinal FROM ("
        "SELECT grp, member, ordinal FROM step_items WHERE lineage = ?1 AND step = ?2 UNION "
        "SELECT grp, member, ordinal FROM step_replays WHERE lineage = ?1 AND step = ?2) AS planned "
        "JOIN segments ON segments.grp = planned.grp AND segments.member = planned.member "
        "AND (segments.ordinal = planned.ordinal OR (?3 AND segments.ordinal < planned.ordinal)) "
        "WHERE segments.payload IS NULL ORDER BY 1, 2, 3",
        (version.lineage, version.step, is_transcript),
    )
    return [SegmentKey(*row) for row in rows]
