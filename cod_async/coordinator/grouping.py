"""Closing groups: when a baseline is frozen, what every segment is credited with, and what is left out by
name.

``close = all``: a group closes when every member has ended or was given up. ``close = quorum``: also when
enough members have ended and ``after_s`` have passed since the group's first lease; the others are fenced and
dropped as ``late_group``. A segment without an equal to compare with is dropped as ``singleton_group``; one
whose return never closed is dropped for the reason its lifecycle was given up; one without generated tokens
counts for its lifecycle's returns but has nothing to train on (``no_action_tokens``).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cod_async.algo.credit import MemberRewards, credit_group
from cod_async.config.schema import Config, CreditAssignmentConfig
from cod_async.coordinator.core import Core
from cod_async.lifecycle.segment import SegmentKey
from cod_async.store.segments import SegmentRow
from cod_async.store.work import LeaseRow
from cod_async.wire.messages import LeaseRef


def credit_settings(config: Config) -> CreditAssignmentConfig:
    """Return the settings of credit assignment; without carry every task stands alone, so its return is its
    reward.
    """
    if config.lifecycle.carry == "none":
        return msgspec.structs.replace(config.credit_assignment, style="sliding_window_mean", window=1)
    return config.credit_assignment


class Grouping:
    """Everything about groups. The caller owns the transaction."""

    def __init__(self, core: Core) -> None:
        self._core = core
        self._settings = credit_settings(core.config)
        self._first_lease_at: dict[int, float] = {}
        self._undue: set[int] = set()
        """Groups whose quorum may not close them yet; afterwards only what their members do can."""
        for group, state, floor in core.store.work.untrained():
            if state == "open" and floor is not None:
                self.started(group)  # a restart begins the wait anew: nobody knows how long it was down

    def started(self, group: int) -> None:
        """Note that a lease of the group was granted."""
        if self._core.config.groups.close == "quorum" and group not in self._first_lease_at:
            self._first_lease_at[group] = self._core.now()
            self._undue.add(group)

    def tick(self) -> None:
        """Close the groups whose quorum is complete and has waited long enough."""
        due = [group for group in self._undue if self._is_due(group)]
        for group in sorted(due):
            self._undue.discard(group)
            self.maybe_close(group)

    def maybe_close(self, group: int) -> None:
        """Close a group if its rule says so."""
        row = self._core.store.work.group(group)
        if row is None or row.state != "open":
            return
        leases = self._core.store.work.leases(group)
        running = [lease for lease in leases if lease.state in ("free", "held")]
        if running and not self._has_quorum(group, leases):
            return
        for lease in running:
            self._cut_off(lease, "late_group")
        self._close(group, row.pack_size)

    def drop(self, group: int, reason: str) -> None:
        """Give up a whole group: running lifecycles are fenced, what is not trained is dropped."""
        for lease in self._core.store.work.leases(group):
            if lease.state in ("free", "held"):
                self._cut_off(lease, reason)
        rows = self._core.store.segments.of_group(group)
        self._drop_segments([row.key for row in rows], reason)
        self._core.store.work.set_group_state(group, "dropped", reason)
        self._forget_clock(group)
        self._core.changed()

    def drop_stale_segments(self, group: int, keys: Sequence[SegmentKey]) -> None:
        """Drop the segments of a closed group that became too old; without any left the group is dropped."""
        self._drop_segments(keys, "stale")
        self._core.changed()
        if not self._core.store.segments.oldest_ready(group):
            self._core.store.work.set_group_state(group, "dropped", "stale")

    # -------------------------------------------------------------------------------------------------------
    # closing

    def _has_quorum(self, group: int, leases: Sequence[LeaseRow]) -> bool:
        num_ended = sum(lease.state == "ended" for lease in leases)
        return num_ended >= self._core.config.groups.quorum_members and self._is_due(group)

    def _is_due(self, group: int) -> bool:
        """Whether a quorum of the group may close it: enough time has passed since its first lease."""
        started = self._first_lease_at.get(group)
        return started is not None and self._core.now() - started >= self._core.config.groups.after_s

    def _forget_clock(self, group: int) -> None:
        self._first_lease_at.pop(group, None)
        self._undue.discard(group)

    def _cut_off(self, lease: LeaseRow, reason: str) -> None:
        if lease.state == "held" and lease.session is not None and self._core.is_live(lease.session):
            ref = LeaseRef(lease.group, lease.member, lease.lease_epoch)
            self._core.out.fence(lease.session, ref, reason)
        self._core.store.work.settle(lease, "given_up", reason)

    def _close(self, group: int, pack_size: int) -> None:
        """Freeze the baseline, credit every segment, drop what cannot be credited."""
        store = self._core.store
        rows = store.segments.of_group(group)
        reasons = {lease.member: lease.reason for lease in store.work.leases(group)}
        credited = [row for row in rows if reasons[row.key.member] != "late_group"]
        result = credit_group(_members(credited), pack_size, self._settings)
        credits = {(c.member, c.kind, c.position): c for c in result.episodes}
        is_compared = self._core.config.lifecycle.group_size > 1
        num_ready = 0
        dropped: dict[str, list[SegmentKey]] = {}
        for row in rows:
            credit = credits.get((row.key.member, row.kind, row.position))
            if credit is None:
                dropped.setdefault(reasons[row.key.member] or "unfinished", []).append(row.key)
            elif is_compared and result.baselines[row.kind, row.position].degenerate == "singleton":
                dropped.setdefault("singleton_group", []).append(row.key)
            elif row.num_action_tokens == 0:
                dropped.setdefault("no_action_tokens", []).append(row.key)
            else:
                store.segments.set_ready(row.key, credit.return_, credit.baseline, credit.advantage)
                num_ready += 1
        for reason, keys in dropped.items():
            self._drop_segments(keys, reason)
        store.work.set_group_state(
            group, "closed" if num_ready else "dropped", "" if num_ready else "no_segments"
        )
        self._core.tally["closed_groups" if num_ready else "dropped_groups"] += 1
        self._forget_clock(group)
        self._core.changed()

    def _drop_segments(self, keys: Sequence[SegmentKey], reason: str) -> None:
        num_segments, num_tokens = self._core.store.segments.drop(keys, reason)
        if num_segments:
            self._core.count_drop(reason, num_segments, num_tokens)


def _members(rows: Sequence[SegmentRow]) -> list[MemberRewards]:
    """Collect the rewards of each lifecycle; ``rows`` are sorted by key, so episodes come in order."""
    tasks: dict[int, list[float]] = {}
    updates: dict[int, list[float]] = {}
    for row in rows:
        into = tasks if row.kind == "solve" else updates
        into.setdefault(row.key.member, []).append(row.reward)
    members = sorted(tasks)
    return [MemberRewards(m, tuple(tasks[m]), tuple(updates.get(m, ()))) for m in members]
