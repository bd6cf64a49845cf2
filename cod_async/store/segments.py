"""Segments: the committed ones with their fate, and the refused ones with their reason."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal, NamedTuple

import msgspec

from cod_async.errors import StoreError
from cod_async.lifecycle.segment import EpisodeKind, Segment, SegmentKey, Version, VersionSpan

SegmentFate = Literal["waiting", "ready", "planned", "trained", "dropped"]
"""``waiting``: its group is open; ``ready``: has its advantage; ``planned``: in a step's plan; the rest is
final.
"""

_SELECT = (
    "SELECT grp, member, ordinal, lease_epoch, kind, position, reward, finish, is_last, num_tokens, "
    "num_action_tokens, "
    "oldest_lineage, oldest_step, newest_lineage, newest_step, version_tokens, return_value, advantage, "
    "is_late, state, drop_reason FROM segments "
)
_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(Segment)
_spans = msgspec.json.Decoder(tuple[tuple[int, int, int], ...])


class SegmentRow(msgspec.Struct, frozen=True):
    """What the coordinator needs of a committed segment, without its payload.

    Attributes:
        oldest, newest: policy versions among its action tokens.
        versions: action tokens per policy version.
        advantage: after the group's baseline, before RED; None while the group is open.
        is_late: its lifecycle ended after its group had closed; credited against the frozen baseline.
    """

    key: SegmentKey
    lease_epoch: int
    kind: EpisodeKind
    position: int
    reward: float
    finish: str
    is_last: bool
    num_tokens: int
    num_action_tokens: int
    oldest: Version
    newest: Version
    versions: tuple[VersionSpan, ...]
    return_value: float | None
    advantage: float | None
    is_late: bool
    state: SegmentFate
    drop_reason: str


class Dropped(NamedTuple):
    """What is counted of a segment that was dropped."""

    kind: str
    position: int
    num_action_tokens: int


class Refusal(msgspec.Struct, frozen=True):
    """A segment that was settled without being committed."""

    key: SegmentKey
    lease_epoch: int
    session: int
    reason: str
    detail: str
    num_action_tokens: int


def _row(values: tuple[object, ...]) -> SegmentRow:
    (grp, member, ordinal, epoch, kind, position, reward, finish, is_last, tokens, actions, *rest) = values
    (old_line, old_step, new_line, new_step, spans, return_value, advantage, is_late, state, reason) = rest
    return SegmentRow(
        key=SegmentKey(grp, member, ordinal),  # type: ignore[arg-type]  # the columns are STRICT and checked
        lease_epoch=epoch,  # type: ignore[arg-type]
        kind=kind,  # type: ignore[arg-type]
        position=position,  # type: ignore[arg-type]
        reward=reward,  # type: ignore[arg-type]
        finish=finish,  # type: ignore[arg-type]
        is_last=bool(is_last),
        num_tokens=tokens,  # type: ignore[arg-type]
        num_action_tokens=actions,  # type: ignore[arg-type]
        oldest=Version(old_line, old_step),  # type: ignore[arg-type]
        newest=Version(new_line, new_step),  # type: ignore[arg-type]
        versions=tuple(VersionSpan(Version(a, b), n) for a, b, n in _spans.decode(str(spans))),
        return_value=return_value,  # type: ignore[arg-type]
        advantage=advantage,  # type: ignore[arg-type]
        is_late=bool(is_late),
        state=state,  # type: ignore[arg-type]
        drop_reason=reason,  # type: ignore[arg-type]
    )


def select_rows(connection: sqlite3.Connection, clause: str, values: Sequence[int]) -> list[SegmentRow]:
    """Return the committed segments that a WHERE or ORDER clause (a constant of the caller) selects."""
    return [_row(found) for found in connection.execute(_SELECT + clause, values)]


def tokens_by_version(segment: Segment) -> dict[Version, int]:
    """Return the number of action tokens per policy version."""
    totals: dict[Version, int] = {}
    for row in segment.rows:
        for span in row.versions:
            totals[span.version] = totals.get(span.version, 0) + span.num_tokens
    return totals


class SegmentTable:
    """Reads and writes of ``segments``, ``payloads`` and ``refused_segments``; the caller owns the
    transaction.
    """

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def insert(self, segment: Segment, session: int, fallback: Version) -> None:
        """Commit a segment as ``waiting``; its key must be new.

        Args:
            segment: validated.
            session: session that delivered it.
            fallback: version to note for a segment without action tokens.
        """
        versions = tokens_by_version(segment) or {fallback: 0}
        oldest, newest = min(versions), max(versions)
        body = self._connection.execute("INSERT INTO payloads (body) VALUES (?)", (_encoder.encode(segment),))
        key = segment.key
        self._connection.execute(
            "INSERT INTO segments (grp, member, ordinal, lease_epoch, session, actor, kind, position, "
            "reward, "
            "raw_reward, finish, is_last, num_tokens, num_action_tokens, oldest_lineage, oldest_step, "
            "newest_lineage, "
            "newest_step, version_tokens, state, payload, received_at) "
            "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?, 'waiting', ?, ?)",
            (
                *(key.group, key.member, key.ordinal, segment.lease_epoch, session, segment.actor),
                *(segment.kind, segment.position, segment.reward, segment.raw_reward, segment.finish),
                *(int(segment.is_last), segment.num_tokens, segment.num_action_tokens),
                *(oldest.lineage, oldest.step, newest.lineage, newest.step),
                msgspec.json.encode([(v.lineage, v.step, n) for v, n in sorted(versions.items())]).decode(),
                body.lastrowid,
                time.time(),
            ),
        )

    def winner(self, key: SegmentKey) -> int | None:
        """Return the lease epoch of the committed segment with this key, or None."""
        found = self._connection.execute(
            "SELECT lease_epoch FROM segments WHERE grp = ? AND member = ? AND ordinal = ?",
            (key.group, key.member, key.ordinal),
        ).fetchone()
        return None if found is None else int(found[0])

    def refuse(self, refusal: Refusal) -> bool:
        """Settle a segment as refused; return False when this very segment was refused before."""
        key = refusal.key
        cursor = self._connection.execute(
            "INSERT OR IGNORE INTO refused_segments VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (
                *(key.group, key.member, key.ordinal, refusal.lease_epoch, refusal.session),
                *(refusal.reason, refusal.detail, refusal.num_action_tokens, time.time()),
            ),
        )
        return cursor.rowcount == 1

    def refusal(self, key: SegmentKey, lease_epoch: int) -> str | None:
        """Return the reason this segment was refused for, or None."""
        found = self._connection.execute(
            "SELECT reason FROM refused_segments WHERE grp = ? AND member = ? AND ordinal = ? AND "
            "lease_epoch = ?",
            (key.group, key.member, key.ordinal, lease_epoch),
        ).fetchone()
        return None if found is None else str(found[0])

    def of_group(self, group: int) -> list[SegmentRow]:
        """Return a group's committed segments by key."""
        return select_rows(self._connection, "WHERE grp = ? ORDER BY grp, member, ordinal", (group,))

    def oldest_versions(self, group: int, state: SegmentFate) -> set[Version]:
        """Return the oldest version of each segment of a group in one state, without repeats."""
        rows = self._connection.execute(
            "SELECT DISTINCT oldest_lineage, oldest_step FROM segments WHERE grp = ? AND state = ?",
            (group, state),
        )
        return {Version(lineage, step) for lineage, step in rows}

    def payload(self, key: SegmentKey) -> Segment:
        """Return a whole segment.

        Raises:
            StoreError: it is not there, or its payload was pruned after training.
        """
        found = self._connection.execute(
            "SELECT body FROM payloads JOIN segments USING (payload) WHERE grp = ? AND member = ? AND "
            "ordinal = ?",
            (key.group, key.member, key.ordinal),
        ).fetchone()
        if found is None:
            raise StoreError(
                f"segment {key}: no payload is kept; set store.retention to all to keep every payload"
            )
        return _decoder.decode(found[0])

    def last_payload(self, group: int, member: int) -> Segment | None:
        """Return the newest committed segment of a lifecycle, or None before its first."""
        found = self._connection.execute(
            "SELECT max(ordinal) FROM segments WHERE grp = ? AND member = ?", (group, member)
        ).fetchone()
        return None if found[0] is None else self.payload(SegmentKey(group, member, int(found[0])))

    def ordinals_between(self, group: int, member: int, after: int, before: int) -> list[int]:
        """Return the ordinals of a lifecycle's committed segments, both ends excluded, ascending."""
        rows = self._connection.execute(
            "SELECT ordinal FROM segments WHERE grp = ? AND member = ? AND ordinal > ? AND ordinal < ? "
            "ORDER BY ordinal",
            (group, member, after, before),
        )
        return [int(ordinal) for (ordinal,) in rows]

    def payloads_of(self, group: int, member: int) -> Iterator[Segment]:
        """Yield the committed segments of a lifecycle in order.

        Raises:
            StoreError: one of them has no payload any more.
        """
        ordinals = self._connection.execute(
            "SELECT ordinal FROM segments WHERE grp = ? AND member = ? ORDER BY ordinal", (group, member)
        ).fetchall()
        for (ordinal,) in ordinals:
            yield self.payload(SegmentKey(group, member, int(ordinal)))

    def set_ready(
        self,
        key: SegmentKey,
        return_value: float,
        baseline: float,
        advantage: float,
        *,
        is_late: bool = False,
    ) -> None:
        """Record a waiting segment's credit; it is trainable from now on."""
        self._connection.execute(
            "UPDATE segments SET state = 'ready', return_value = ?, baseline = ?, advantage = ?, is_late = ? "
            "WHERE grp = ? AND member = ? AND ordinal = ? AND state = 'waiting'",
            (return_value, baseline, advantage, int(is_late), key.group, key.member, key.ordinal),
        )

    def late_ready(self) -> list[SegmentRow]:
        """Return the ready segments of late members whose group was trained without them, by key."""
        clause = (
            "INDEXED BY segments_late WHERE state = 'ready' AND is_late = 1 "
            "AND (SELECT groups.state FROM groups WHERE groups.grp = segments.grp) = 'trained' "
            "ORDER BY grp, member, ordinal"
        )
        return select_rows(self._connection, clause, ())

    def kept(self, group: int) -> set[SegmentKey]:
        """Return a group's segments whose payload is kept."""
        rows = self._connection.execute(
            "SELECT grp, member, ordinal FROM segments WHERE grp = ? AND payload IS NOT NULL", (group,)
        )
        return {SegmentKey(*row) for row in rows}

    def unsettled(self) -> list[SegmentKey]:
        """Return every segment that is neither trained nor dropped nor in a plan, by key."""
        rows = self._connection.execute(
            "SELECT grp, member, ordinal FROM segments WHERE state IN ('waiting', 'ready') "
            "ORDER BY grp, member, ordinal"
        )
        return [SegmentKey(*row) for row in rows]

    def drop(self, keys: Iterable[SegmentKey], reason: str) -> list[Dropped]:
        """Drop waiting or ready segments for a named reason; return those that were."""
        dropped = []
        for key in keys:
            found = self._connection.execute(
                "UPDATE segments SET state = 'dropped', drop_reason = ? WHERE grp = ? AND member = ? AND "
                "ordinal = ? "
                "AND state IN ('waiting', 'ready') RETURNING kind, position, num_action_tokens",
                (reason, key.group, key.member, key.ordinal),
            ).fetchone()
            if found is not None:
                dropped.append(Dropped(*found))
        return dropped

    def restart(self, group: int, member: int, reason: str) -> tuple[int, int]:
        """Move the segments of a lifecycle that starts anew to the refused ones; return how many segments and
        action tokens that were.

        One winner per (lifecycle, ordinal) stays the rule: the abandoned attempt is no longer among the
        winners, and stays known under its lease epochs, so a repeated delivery of it is still recognized.
        Their payloads are deleted.

        Raises:
            StoreError: one of them is not waiting any more: a step may be trained on it.
        """
        at = (group, member)
        states = self._connection.execute(
            "SELECT DISTINCT state FROM segments WHERE grp = ? AND member = ?", at
        ).fetchall()
        if states not in ([], [("waiting",)]):
            raise StoreError(
                f"lifecycle g{group}.m{member} cannot start anew: it has segments that are {states}"
            )
        num_segments, num_tokens = self._connection.execute(
            "SELECT count(*), coalesce(sum(num_action_tokens), 0) FROM segments WHERE grp = ? AND member = ?",
            at,
        ).fetchone()
        payloads = self._connection.execute(
            "SELECT payload FROM segments WHERE grp = ? AND member = ? AND payload IS NOT NULL", at
        ).fetchall()
        self._connection.execute(
            "INSERT INTO refused_segments SELECT grp, member, ordinal, lease_epoch, session, ?, "
            "'its environment could not be restored', num_action_tokens, received_at "
            "FROM segments WHERE grp = ? AND member = ?",
            (reason, *at),
        )
        self._connection.execute("DELETE FROM segments WHERE grp = ? AND member = ?", at)
        self._connection.executemany("DELETE FROM payloads WHERE payload = ?", payloads)
        return int(num_segments), int(num_tokens)

    def totals(self) -> dict[str, tuple[int, int]]:
        """Return (segments, action tokens) by fate; dropped and refused ones as ``dropped:<reason>``."""
        rows = self._connection.execute(
            "SELECT CASE WHEN state = 'dropped' THEN 'dropped:' || drop_reason ELSE state END AS fate, "
            "count(*), "
            "coalesce(sum(num_action_tokens), 0) FROM segments GROUP BY fate "
        ).fetchall()
        rows += self._connection.execute(
            "SELECT 'dropped:' || reason, count(*), coalesce(sum(num_action_tokens), 0) FROM "
            "refused_segments "
            "GROUP BY reason"
        ).fetchall()
        totals: dict[str, tuple[int, int]] = {}
        for fate, num_segments, num_tokens in rows:
            before = totals.get(fate, (0, 0))
            totals[fate] = (before[0] + num_segments, before[1] + num_tokens)
        return totals
