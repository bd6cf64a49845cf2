"""Sessions: who was connected, until when, and what each client counted by itself."""

from __future__ import annotations

import sqlite3
import time
from typing import Literal, get_args

import msgspec

from cod_async.wire.messages import Role

SessionState = Literal["live", "ended", "lost"]
"""``live``: connected or expected back; ``ended``: said Bye; ``lost``: timed out, replaced or expelled."""

_SELECT = "SELECT session, role, name, instance, pid, host, state, reason, counters FROM sessions "


class SessionRow(msgspec.Struct, frozen=True):
    """One session as stored. ``counters`` is the client's newest report."""

    session: int
    role: Role
    name: str
    instance: int
    pid: int
    host: str
    state: SessionState
    reason: str
    counters: dict[str, float]


def _row(values: tuple[object, ...]) -> SessionRow:
    *head, counters = values
    decoded = msgspec.json.decode(str(counters), type=dict[str, float])
    return msgspec.convert(dict(zip(SessionRow.__struct_fields__, [*head, decoded], strict=True)), SessionRow)


class SessionTable:
    """Reads and writes of the ``sessions`` table; the caller owns the transaction."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def open(self, role: Role, name: str, instance: int, pid: int, host: str) -> int:
        """Add a live session and return its number, unique within the run and at least 1."""
        if role not in get_args(Role):
            raise ValueError(f"no role {role!r}")
        cursor = self._connection.execute(
            "INSERT INTO sessions (session, role, name, instance, pid, host, state, started_at) "
            "VALUES ((SELECT coalesce(max(session), 0) + 1 FROM sessions), ?, ?, ?, ?, ?, 'live', ?)",
            (role, name, instance, pid, host, time.time()),
        )
        return int(cursor.lastrowid or 0)

    def get(self, session: int) -> SessionRow | None:
        """Return one session, or None when the run never had it."""
        found = self._connection.execute(_SELECT + "WHERE session = ?", (session,)).fetchone()
        return None if found is None else _row(found)

    def live(self, role: Role | None = None, name: str | None = None) -> list[SessionRow]:
        """Return the live sessions, oldest first, optionally of one role and name."""
        rows = self._connection.execute(
            _SELECT + "WHERE state = 'live' AND (?1 IS NULL OR role = ?1) AND (?2 IS NULL OR name = ?2) "
            "ORDER BY session",
            (role, name),
        )
        return [_row(values) for values in rows]

    def report(self, session: int, counters: dict[str, float]) -> None:
        """Keep a client's newest counters; a delayed older report (with fewer segments) changes nothing."""
        row = self.get(session)
        if row is None or row.state != "live":
            return
        grown = all(
            counters.get(name, 0) >= row.counters.get(name, 0)
            for name in ("sealed_segments", "sampled_tokens")
        )
        if grown:
            text = msgspec.json.encode(counters).decode()
            self._connection.execute("UPDATE sessions SET counters = ? WHERE session = ?", (text, session))

    def close(self, session: int, state: SessionState, reason: str) -> bool:
        """End a live session as ``ended`` or ``lost``; return whether it was live."""
        cursor = self._connection.execute(
            "UPDATE sessions SET state = ?, reason = ?, ended_at = ? WHERE session = ? AND state = 'live'",
            (state, reason, time.time(), session),
        )
        return cursor.rowcount == 1
