"""Lineages, versions, checkpoints and steps: the history of the weights and of what they were trained on."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from typing import Any, Literal

import msgspec

from cod_async.lifecycle.segment import SegmentKey, Version
from cod_async.store.lineage import Branch, LineageTree
from cod_async.store.trained import EMPTY_TRAINED_DIGEST
from cod_async.weights.manifest import Manifest

StepState = Literal["planned", "done", "rolled_back"]


class StepRow(msgspec.Struct, frozen=True):
    """One step as stored. ``trained_digest`` is that of the history including this step."""

    version: Version
    plan_digest: str
    trained_digest: str
    state: StepState
    report: dict[str, Any]
    done_at: float | None = None


class StepItem(msgspec.Struct, frozen=True):
    """One segment of a step's plan."""

    key: SegmentKey
    lease_epoch: int
    advantage: float
    lag_steps: int
    is_replay: bool = False


class HistoryTable:
    """Reads and writes of the tables of the weights' history; the caller owns the transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    # -----------------------------------------------------------------------------------------------------
    # lineages

    def current_lineage(self) -> int | None:
        """Return the newest lineage, or None before the learner's first word."""
        value = self._connection.execute("SELECT max(lineage) FROM lineages").fetchone()[0]
        return None if value is None else int(value)

    def branch_step(self, lineage: int) -> int:
        """Return the step at which a lineage starts."""
        row = self._connection.execute(
            "SELECT branch_step FROM lineages WHERE lineage = ?", (lineage,)
        ).fetchone()
        return int(row[0])

    def parent(self, lineage: int) -> int | None:
        """Return the lineage that a lineage branched off, or None for the first."""
        row = self._connection.execute("SELECT parent FROM lineages WHERE lineage = ?", (lineage,)).fetchone()
        return None if row is None or row[0] is None else int(row[0])

    def lineage_of_nonce(self, nonce: str) -> tuple[int, int, int] | None:
        """Return (lineage, branch step, rolled-back steps) that an OpenLineage with this nonce opened, or
        None.
        """
        found = self._connection.execute(
            "SELECT lineage, branch_step, num_rolled_back FROM lineages WHERE nonce = ?", (nonce,)
        ).fetchone()
        return None if found is None else (int(found[0]), int(found[1]), int(found[2]))

    def open_lineage(self, parent: int | None, branch_step: int, nonce: str, num_rolled_back: int) -> int:
        """Add a lineage and return its number.

        It is one more than the newest, or a higher one where lineages are known to have been lost with a
        database (``meta``: ``min_lineage``).
        """
        current = self.current_lineage()
        found = self._connection.execute("SELECT value FROM meta WHERE name = 'min_lineage'").fetchone()
        lineage = max(0 if current is None else current + 1, 0 if found is None else int(found[0]))
        self._connection.execute(
            "INSERT INTO lineages VALUES (?, ?, ?, ?, ?, ?)",
            (lineage, parent, branch_step, nonce, num_rolled_back, time.time()),
        )
        return lineage

    def tree(self, publish_every_steps: int = 1) -> LineageTree | None:
        """Return all lineages seen from the newest, or None before the first."""
        current = self.current_lineage()
        if current is None:
            return None
        rows = self._connection.execute(
            "SELECT lineage, parent, branch_step FROM lineages WHERE parent IS NOT NULL"
        )
        branches = {lineage: Branch(parent, step) for lineage, parent, step in rows}
        digests = {
            Version(lineage, step): digest
            for lineage, step, digest in self._connection.execute(
                "SELECT lineage, step, digest FROM versions"
            )
        }
        return LineageTree(branches, current, digests, publish_every_steps)

    # ------------------------------------------------------------------------------------- versions and
    # checkpoints

    def add_version(self, manifest: Manifest) -> None:
        """Record a published version; it must be new."""
        version = manifest.version
        text = msgspec.json.encode(manifest).decode()
        self._connection.execute(
            "INSERT INTO versions VALUES (?, ?, ?, ?, ?)",
            (version.lineage, version.step, manifest.digest, text, time.time()),
        )

    def manifest(self, version: Version) -> Manifest | None:
        """Return the manifest of a version, or None."""
        found = self._connection.execute(
            "SELECT manifest FROM versions WHERE lineage = ? AND step = ?", (version.lineage, version.step)
        ).fetchone()
        return None if found is None else msgspec.json.decode(found[0], type=Manifest)

    def add_checkpoint(self, version: Version, path: str, digest: str, trained_digest: str) -> None:
        """Record a durable checkpoint; the same one again replaces the entry."""
        self._connection.execute(
            "INSERT OR REPLACE INTO checkpoints VALUES (?, ?, ?, ?, ?, ?)",
            (version.lineage, version.step, path, digest, trained_digest, time.time()),
        )

    def checkpoints(self) -> list[Version]:
        """Return the versions that were saved, in the order of saving."""
        rows = self._connection.execute("SELECT lineage, step FROM checkpoints ORDER BY lineage, step")
        return [Version(lineage, step) for lineage, step in rows]

    # --------------------------------------------------------------------------------------------------------
    # steps

    def current_step(self, lineage: int) -> int:
        """Return the step that the learner takes next on a lineage."""
        last = self._connection.execute(
            "SELECT max(step) FROM steps WHERE lineage = ? AND state = 'done'", (lineage,)
        ).fetchone()[0]
        return self.branch_step(lineage) if last is None else int(last) + 1

    def trained_digest(self, version: Version) -> str | None:
        """Return the digest of all that was trained before ``version``; None for an unknown history."""
        if version.step == 0:
            return EMPTY_TRAINED_DIGEST
        before = self.step_before(version)
        return None if before is None or before.done_at is None else before.trained_digest

    def step_before(self, version: Version) -> StepRow | None:
        """Return the step that led to ``version``, wherever on its ancestry it was taken; None if unknown."""
        lineage: int | None = version.lineage
        while lineage is not None:
            if not self.has_lineage(lineage):
                return None
            if version.step > self.branch_step(lineage):
                return self.step(Version(lineage, version.step - 1))
            lineage = self.parent(lineage)
        return None

    def has_lineage(self, lineage: int) -> bool:
        """Say whether the run has such a lineage."""
        return (
            self._connection.execute("SELECT 1 FROM lineages WHERE lineage = ?", (lineage,)).fetchone()
            is not None
        )

    def add_step(
        self,
        version: Version,
        plan_digest: str,
        trained_digest: str,
        items: Sequence[StepItem],
        report: dict[str, Any],
    ) -> None:
        """Record a step's plan and mark its segments as planned.

        Segments that the step uses again (``is_replay``) stay what they are, trained by an earlier step: they
        are written down apart, and a rollback of this step takes nothing but this use of them back.
        """
        at = (version.lineage, version.step)
        self._connection.execute(
            "INSERT INTO steps (lineage, step, plan_digest, trained_digest, state, report) "
            "VALUES (?, ?, ?, ?, 'planned', ?)",
            (*at, plan_digest, trained_digest, msgspec.json.encode(report).decode()),
        )
        for table, is_replay in (("step_items", False), ("step_replays", True)):
            self._connection.executemany(
                f"INSERT INTO {table} VALUES (?, ?, ?, ?, ?, ?, ?, ?)",  # noqa: S608  (one of two constants)
                [
                    (
                        *(*at, item.key.group, item.key.member, item.key.ordinal),
                        *(item.lease_epoch, item.advantage, item.lag_steps),
                    )
                    for item in items
                    if item.is_replay == is_replay
                ],
            )
        self._connection.executemany(
            "UPDATE segments SET state = 'planned' WHERE grp = ? AND member = ? AND ordinal = ?",
            [(i.key.group, i.key.member, i.key.ordinal) for i in items if not i.is_replay],
        )

    def step(self, version: Version) -> StepRow | None:
        """Return one step, or None when it was never planned."""
        found = self._connection.execute(
            "SELECT plan_digest, trained_digest, state, report, done_at FROM steps WHERE lineage = ? AND "
            "step = ?",
            (version.lineage, version.step),
        ).fetchone()
        if found is None:
            return None
        return StepRow(version, found[0], found[1], found[2], msgspec.json.decode(found[3]), found[4])

    def items(self, version: Version) -> list[StepItem]:
        """Return a step's plan, by key."""
        columns = "grp, member, ordinal, lease_epoch, advantage, lag_steps"
        rows = self._connection.execute(
            f"SELECT {columns}, 0 FROM step_items WHERE lineage = ?1 AND step = ?2 "  # noqa: S608
            f"UNION ALL SELECT {columns}, 1 FROM step_replays WHERE lineage = ?1 AND step = ?2 "
            "ORDER BY grp, member, ordinal",
            (version.lineage, version.step),
        )
        return [
            StepItem(SegmentKey(g, m, o), epoch, advantage, lag, bool(is_replay))
            for g, m, o, epoch, advantage, lag, is_replay in rows
        ]

    def uses_since(self, version: Version, first_step: int) -> list[tuple[int, int]]:
        """Return (group, number of steps that used it) of every group that was trained from ``first_step`` on
        in the history that ends at ``version``; every use of such a group lies in these steps.
        """
        trained: set[int] = set()
        uses: dict[int, int] = {}
        for lineage, step in self._tail(version, version.step - first_step):
            for table in ("step_items", "step_replays"):
                rows = self._connection.execute(
                    f"SELECT DISTINCT grp FROM {table} WHERE lineage = ? AND step = ?",  # noqa: S608
                    (lineage, step),
                )
                for (group,) in rows:
                    if table == "step_items":
                        trained.add(group)
                    uses[group] = uses.get(group, 0) + 1
        return [(group, uses[group]) for group in sorted(trained)]

    def finish_step(self, version: Version, report: dict[str, Any]) -> None:
        """Record that a planned step was taken: its segments and groups are trained."""
        at = (version.lineage, version.step)
        self._connection.execute(
            "UPDATE steps SET state = 'done', report = ?, done_at = ? WHERE lineage = ? AND step = ?",
            (msgspec.json.encode(report).decode(), time.time(), *at),
        )
        self._mark_trained(*at)

    def _mark_trained(self, lineage: int, step: int) -> None:
        self._connection.execute(
            "UPDATE segments SET state = 'trained', drop_reason = '', trained_lineage = ?1, trained_step = "
            "?2 "
            "WHERE (grp, member, ordinal) IN "
            "(SELECT grp, member, ordinal FROM step_items WHERE lineage = ?1 AND step = ?2)",
            (lineage, step),
        )
        self._connection.execute(
            "UPDATE groups SET state = 'trained' WHERE grp IN "
            "(SELECT DISTINCT grp FROM step_items WHERE lineage = ? AND step = ?)",
            (lineage, step),
        )

    def drop_plan(self, version: Version, reason: str) -> list[SegmentKey]:
        """Undo a plan that was not trained and will not be: another one can be made for its step.

        Returns:
            The segments that were planned; they are ready now, and the caller drops them. Segments that the
            plan would have used again stay trained.
        """
        at = (version.lineage, version.step)
        fresh = [item.key for item in self.items(version) if not item.is_replay]
        self._connection.execute(
            "INSERT INTO dropped_plans SELECT lineage, step, plan_digest, ?3, ?4, "
            "(SELECT coalesce(sum(num_action_tokens), 0) FROM step_items JOIN segments "
            "USING (grp, member, ordinal) WHERE lineage = ?1 AND step = ?2), ?5 "
            "FROM steps WHERE lineage = ?1 AND step = ?2",
            (*at, reason, len(fresh), time.time()),
        )
        self._release(*at)
        for table in ("step_items", "step_replays", "steps"):
            self._connection.execute(
                f"DELETE FROM {table} WHERE lineage = ? AND step = ?",  # noqa: S608  (one of three constants)
                at,
            )
        return fresh

    def has_dropped_plan(self, version: Version, plan_digest: str) -> bool:
        """Say whether this plan was dropped."""
        found = self._connection.execute(
            "SELECT 1 FROM dropped_plans WHERE lineage = ? AND step = ? AND plan_digest = ?",
            (version.lineage, version.step, plan_digest),
        ).fetchone()
        return found is not None

    def roll_back(self, parent: int | None, branch_step: int) -> int:
        """Make (``parent``, ``branch_step``) the end of history, before a new lineage opens there.

        Steps beyond it are recorded as rolled back and their segments become trainable again; a segment whose
        payload was pruned meanwhile is dropped as ``payload_pruned``. Should the branch lie on a lineage that
        was abandoned before, its steps come back to life, and their segments count as trained in them.

        Returns:
            The number of taken steps rolled back; a step that was only planned is undone too, but no work
            is lost with it.
        """
        surviving = self._path(parent, branch_step)
        rows = self._connection.execute(
            "SELECT lineage, step, state, done_at IS NOT NULL FROM steps"
        ).fetchall()
        undone = [
            (a, b, done) for a, b, state, done in rows if state != "rolled_back" and (a, b) not in surviving
        ]
        revived = [
            (a, b) for a, b, state, done in rows if state == "rolled_back" and done and (a, b) in surviving
        ]
        for lineage, step, _ in undone:
            self._connection.execute(
                "UPDATE steps SET state = 'rolled_back' WHERE lineage = ? AND step = ?", (lineage, step)
            )
            self._release(lineage, step)
        for lineage, step in revived:
            self._connection.execute(
                "UPDATE steps SET state = 'done' WHERE lineage = ? AND step = ?", (lineage, step)
            )
            self._mark_trained(lineage, step)
        return sum(done for _, _, done in undone)

    def _release(self, lineage: int, step: int) -> None:
        """Make the segments and groups of an undone step trainable again."""
        self._connection.execute(
            "UPDATE segments SET state = CASE WHEN payload IS NULL THEN 'dropped' ELSE 'ready' END, "
            "drop_reason = CASE WHEN payload IS NULL THEN 'payload_pruned' ELSE '' END, "
            "trained_lineage = NULL, trained_step = NULL WHERE state IN ('planned', 'trained') "
            "AND (grp, member, ordinal) IN "
            "(SELECT grp, member, ordinal FROM step_items WHERE lineage = ? AND step = ?)",
            (lineage, step),
        )
        self._connection.execute(
            # a group whose late members alone were in the undone step stays trained
            "UPDATE groups SET state = CASE "
            "WHEN EXISTS (SELECT 1 FROM segments WHERE segments.grp = groups.grp "
            "AND segments.state = 'trained') THEN 'trained' "
            "WHEN EXISTS (SELECT 1 FROM segments WHERE segments.grp = groups.grp "
            "AND segments.state = 'ready') THEN 'closed' ELSE 'dropped' END "
            "WHERE grp IN (SELECT DISTINCT grp FROM step_items WHERE lineage = ? AND step = ?)",
            (lineage, step),
        )

    def _tail(self, version: Version, num_steps: int) -> list[tuple[int, int]]:
        """Return up to ``num_steps`` last steps of the history that ends at ``version``, newest first."""
        found: list[tuple[int, int]] = []
        lineage: int | None = version.lineage
        end = version.step
        while lineage is not None and self.has_lineage(lineage) and len(found) < num_steps:
            start = min(end, self.branch_step(lineage))
            first = max(start, end - (num_steps - len(found)))
            found += [(lineage, step) for step in range(end - 1, first - 1, -1)]
            end, lineage = start, self.parent(lineage)
        return found

    def _path(self, lineage: int | None, end: int) -> set[tuple[int, int]]:
        """Return the steps that lead to version (``lineage``, ``end``)."""
        path: set[tuple[int, int]] = set()
        while lineage is not None:
            start = min(end, self.branch_step(lineage)) if self.has_lineage(lineage) else end
            path |= {(lineage, step) for step in range(start, end)}
            end, lineage = start, self.parent(lineage)
        return path

    # ------------------------------------------------------------------------------------------------------
    # reports

    def unreported_steps(self) -> list[StepRow]:
        """Return the done steps that have no line in the metrics file yet."""
        rows = self._connection.execute(
            "SELECT lineage, step FROM steps WHERE state = 'done' AND is_reported = 0 ORDER BY lineage, step"
        ).fetchall()
        return [row for a, b in rows if (row := self.step(Version(a, b))) is not None]

    def mark_reported(self, version: Version) -> None:
        """Note that a step has its line in the metrics file."""
        self._connection.execute(
            "UPDATE steps SET is_reported = 1 WHERE lineage = ? AND step = ?", (version.lineage, version.step)
        )

    def recent_reports(self, version: Version, num_steps: int) -> list[dict[str, Any]]:
        """Return the reports of the last ``num_steps`` done steps of the history that ends at ``version``."""
        rows = [self.step(Version(*at)) for at in reversed(self._tail(version, num_steps))]
        return [row.report for row in rows if row is not None and row.state == "done"]
