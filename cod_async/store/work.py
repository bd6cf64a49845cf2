"""Groups and leases: what is being played, by whom, and how far each lifecycle has come."""

from __future__ import annotations

import sqlite3
import time
from typing import Literal

import msgspec

from cod_async.lifecycle.segment import Version

GroupState = Literal["open", "closed", "planned", "trained", "dropped"]
"""``open``: being played; ``closed``: baseline frozen; ``planned``: in the plan of a step; ``trained``;
``dropped``.
"""
LeaseState = Literal["free", "held", "ended", "given_up"]

_SELECT_GROUP = (
    "SELECT grp, environment, preset, options_json, records_json, pack_seed, pack_size, floor_lineage, "
    "floor_step, state FROM groups "
)
_SELECT_LEASE = (
    "SELECT grp, member, lease_epoch, session, state, next_ordinal, num_retries, num_takeovers, reason "
    "FROM leases "
)


class GroupRow(msgspec.Struct, frozen=True):
    """One group as stored. ``floor`` is the oldest version that any of its leases was granted at."""

    group: int
    environment: str
    preset: str
    options_json: str
    records_json: tuple[str, ...]
    pack_seed: int
    pack_size: int
    floor: Version | None
    state: GroupState


class LeaseRow(msgspec.Struct, frozen=True):
    """One lifecycle's lease. ``next_ordinal`` is that of the episode after the newest committed segment."""

    group: int
    member: int
    lease_epoch: int
    session: int | None
    state: LeaseState
    next_ordinal: int
    num_retries: int
    num_takeovers: int
    reason: str


class NewGroup(msgspec.Struct, frozen=True, kw_only=True):
    """A planned pack that becomes a group."""

    environment: str
    preset: str
    options_json: str
    records_json: tuple[str, ...]
    pack_seed: int
    num_members: int
    planned_at: Version


def _group(values: tuple[object, ...]) -> GroupRow:
    group, environment, preset, options, records, seed, size, lineage, step, state = values
    return msgspec.convert(
        {
            "group": group,
            "environment": environment,
            "preset": preset,
            "options_json": options,
            "records_json": msgspec.json.decode(str(records)),
            "pack_seed": int(str(seed)),
            "pack_size": size,
            "floor": None if lineage is None else {"lineage": lineage, "step": step},
            "state": state,
        },
        GroupRow,
    )


def _lease(values: tuple[object, ...]) -> LeaseRow:
    return LeaseRow(*values)  # type: ignore[arg-type]  # the columns are STRICT and checked


class WorkTable:
    """Reads and writes of ``groups``, ``leases`` and ``lease_epochs``; the caller owns the transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    # -------------------------------------------------------------------------------------------------------
    # groups

    def next_group(self) -> int:
        """Return the index of the next group to plan."""
        return int(self._connection.execute("SELECT coalesce(max(grp), -1) + 1 FROM groups").fetchone()[0])

    def add_group(self, group: int, new: NewGroup) -> None:
        """Add an open group with free leases for all of its members."""
        self._connection.execute(
            "INSERT INTO groups (grp, environment, preset, options_json, records_json, pack_seed, pack_size, "
            "planned_lineage, planned_step, state) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, 'open')",
            (
                group,
                new.environment,
                new.preset,
                new.options_json,
                msgspec.json.encode(new.records_json).decode(),
                str(new.pack_seed),
                len(new.records_json),
                new.planned_at.lineage,
                new.planned_at.step,
            ),
        )
        self._connection.executemany(
            "INSERT INTO leases (grp, member, lease_epoch, state, next_ordinal, num_retries, num_takeovers) "
            "VALUES (?, ?, 0, 'free', 0, 0, 0)",
            [(group, member) for member in range(new.num_members)],
        )

    def group(self, group: int) -> GroupRow | None:
        """Return one group, or None when it was never planned."""
        found = self._connection.execute(_SELECT_GROUP + "WHERE grp = ?", (group,)).fetchone()
        return None if found is None else _group(found)

    def untrained(self) -> list[tuple[int, GroupState, Version | None]]:
        """Return (group, state, floor) of every open, closed and planned group, by index."""
        rows = self._connection.execute(
            "SELECT grp, state, floor_lineage, floor_step FROM groups "
            "WHERE state IN ('open', 'closed', 'planned') ORDER BY grp"
        )
        return [(g, state, None if line is None else Version(line, step)) for g, state, line, step in rows]

    def set_group_state(self, group: int, state: GroupState, reason: str = "") -> None:
        """Move a group to another state."""
        self._connection.execute(
            "UPDATE groups SET state = ?, reason = ? WHERE grp = ?", (state, reason, group)
        )

    def set_floor(self, group: int, floor: Version) -> None:
        """Record the oldest version that a lease of the group was granted at."""
        self._connection.execute(
            "UPDATE groups SET floor_lineage = ?, floor_step = ? WHERE grp = ?",
            (floor.lineage, floor.step, group),
        )

    def freeze(self, group: int, baselines: str) -> None:
        """Keep the baselines of a closed group (JSON) for members that end later."""
        self._connection.execute("UPDATE groups SET baselines = ? WHERE grp = ?", (baselines, group))

    def frozen(self, group: int) -> str:
        """Return the baselines that a group was closed with; empty when no member was left running."""
        found = self._connection.execute("SELECT baselines FROM groups WHERE grp = ?", (group,)).fetchone()
        return "" if found is None else str(found[0])

    def count_groups(self) -> dict[str, int]:
        """Return the number of groups by state."""
        return dict(self._connection.execute("SELECT state, count(*) FROM groups GROUP BY state"))

    # -------------------------------------------------------------------------------------------------------
    # leases

    def lease(self, group: int, member: int) -> LeaseRow | None:
        """Return one lease, or None when there is no such lifecycle."""
        found = self._connection.execute(
            _SELECT_LEASE + "WHERE grp = ? AND member = ?", (group, member)
        ).fetchone()
        return None if found is None else _lease(found)

    def leases(self, group: int) -> list[LeaseRow]:
        """Return the leases of a group, by member."""
        rows = self._connection.execute(_SELECT_LEASE + "WHERE grp = ? ORDER BY member", (group,))
        return [_lease(values) for values in rows]

    def free_leases(self, limit: int) -> list[LeaseRow]:
        """Return up to ``limit`` lifecycles that nobody plays, lowest group first."""
        rows = self._connection.execute(
            _SELECT_LEASE + "WHERE state = 'free' ORDER BY grp, member LIMIT ?", (limit,)
        )
        return [_lease(values) for values in rows]

    def held_leases(self, session: int | None = None) -> list[LeaseRow]:
        """Return the leases that are held, by one session or by all."""
        rows = self._connection.execute(
            _SELECT_LEASE + "WHERE state = 'held' AND (?1 IS NULL OR session = ?1) ORDER BY grp, member",
            (session,),
        )
        return [_lease(values) for values in rows]

    def grant(self, lease: LeaseRow, session: int, min_version: Version, request: int) -> None:
        """Give a free lease to a session and remember the grant and the request it answers."""
        now = time.time()
        self._connection.execute(
            "UPDATE leases SET state = 'held', session = ?, granted_at = ? WHERE grp = ? AND member = ?",
            (session, now, lease.group, lease.member),
        )
        self._connection.execute(
            "INSERT INTO lease_epochs VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(lease.group, lease.member, lease.lease_epoch, session, request),
                *(min_version.lineage, min_version.step, now),
            ),
        )

    def free(self, lease: LeaseRow, *, is_retry: bool = False, is_takeover: bool = False) -> None:
        """Take a lease back: its epoch grows, so whoever holds the old one is fenced."""
        self._connection.execute(
            "UPDATE leases SET state = 'free', session = NULL, lease_epoch = lease_epoch + 1, "
            "num_retries = num_retries + ?, num_takeovers = num_takeovers + ? WHERE grp = ? AND member = ?",
            (int(is_retry), int(is_takeover), lease.group, lease.member),
        )

    def settle(self, lease: LeaseRow, state: Literal["ended", "given_up"], reason: str = "") -> None:
        """Close a lifecycle for good. Giving up also fences its holder by a new epoch."""
        self._connection.execute(
            "UPDATE leases SET state = ?, reason = ?, settled_at = ?, session = NULL, lease_epoch = "
            "lease_epoch + ? "
            "WHERE grp = ? AND member = ?",
            (state, reason, time.time(), int(state == "given_up"), lease.group, lease.member),
        )

    def advance(self, group: int, member: int, next_ordinal: int) -> None:
        """Record which episode comes after the newest committed segment."""
        self._connection.execute(
            "UPDATE leases SET next_ordinal = ? WHERE grp = ? AND member = ?", (next_ordinal, group, member)
        )

    def granted_under(self, session: int, request: int) -> list[tuple[LeaseRow, Version]]:
        """Return the leases granted in answer to a request that still stand, with their minimum versions."""
        rows = self._connection.execute(
            "SELECT grp, member, lease_epoch, leases.session, state, next_ordinal, num_retries, "
            "num_takeovers, reason, min_lineage, min_step "
            "FROM lease_epochs JOIN leases USING (grp, member, lease_epoch) "
            "WHERE lease_epochs.session = ? AND request = ? AND state = 'held' ORDER BY grp, member",
            (session, request),
        ).fetchall()
        return [(_lease(values[:-2]), Version(values[-2], values[-1])) for values in rows]

    def count_leases(self) -> dict[str, int]:
        """Return the number of held and free leases."""
        return {
            "held": self._connection.execute("SELECT count(*) FROM leases WHERE state = 'held'").fetchone()[
                0
            ],
            "free": self._connection.execute("SELECT count(*) FROM leases WHERE state = 'free'").fetchone()[
                0
            ],
        }
