"""Closing groups: when a baseline is frozen, what every segment is credited with, and what is left out by
name.

``close = all``: a group closes when every member has ended or was given up. ``close = quorum``: also when
enough members have ended and ``after_s`` have passed since the group's first lease. The others are *late*:
they play on and are credited against the frozen baseline when they end, or, with ``late = drop``, they are
fenced and dropped as ``late_group``. A late lifecycle is never handed out again.

A segment without an equal to compare with is dropped as ``singleton_group``; one whose return never closed is
dropped for the reason its lifecycle was given up; one without generated tokens counts for its lifecycle's
returns but has nothing to train on (``no_action_tokens``), and so does one with tokens of versions too far
apart (``version_spread``).
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from cod_async.algo.advantages import GroupBaseline
from cod_async.algo.credit import MemberRewards, credit_group, credit_member
from cod_async.config.schema import Config, CreditAssignmentConfig
from cod_async.coordinator.core import Core
from cod_async.coordinator.mix import Place
from cod_async.lifecycle.segment import SegmentKey
from cod_async.store.segments import SegmentRow
from cod_async.store.work import GroupRow, LeaseRow
from cod_async.wire.messages import LeaseRef

_Frozen = list[tuple[str, int, GroupBaseline]]
MIN_COMPARED = 2
"""Members that a baseline needs."""


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
        self._leave_behind(running, "late_group")
        self._close(group, row.pack_size)

    def settled(self, group: int, member: int) -> None:
        """A lifecycle ended or was given up: close its group if that is due, or credit it if it came late."""
        row = self._core.store.work.group(group)
        if row is not None and row.state == "open":
            self.maybe_close(group)
        elif row is not None:
            self._credit_late(row, member)

    def can_close_now(self, group: int) -> bool:
        """Whether enough members of an open group have ended for a baseline."""
        leases = self._core.store.work.leases(group)
        num_ended = sum(lease.state == "ended" for lease in leases)
        return num_ended >= min(MIN_COMPARED, self._core.config.lifecycle.group_size)

    def close_now(self, group: int) -> None:
        """Close an open group with the members that have ended, because only the next step can use it.

        Those still running are late if the group's rule knows late members, else they are dropped as
        ``stale``.
        """
        row = self._core.store.work.group(group)
        if row is None or row.state != "open":
            return
        leases = self._core.store.work.leases(group)
        self._leave_behind([lease for lease in leases if lease.state in ("free", "held")], "stale")
        self._close(group, row.pack_size)

    def drop(self, group: int, reason: str) -> None:
        """Give up a whole group: running lifecycles are fenced, what is not trained is dropped."""
        self._cut_off_all(group, reason)
        self.drop_segments([row.key for row in self._core.store.segments.of_group(group)], reason)
        self._core.store.work.set_group_state(group, "dropped", reason)
        self._forget_clock(group)
        self._core.changed()

    def drop_stale_segments(self, group: int, keys: Sequence[SegmentKey]) -> None:
        """Drop the segments of a closed group that became too old; without any left the group is dropped."""
        self.drop_segments(keys, "stale")
        self._core.changed()
        if not self._core.store.segments.oldest_versions(group, "ready"):
            self._end_late(group)
            self._core.store.work.set_group_state(group, "dropped", "stale")

    def drop_unplanned(self, keys: Sequence[SegmentKey], reason: str) -> None:
        """Drop the segments of a plan that was undone; a group of which nothing else is trained, or could be
        because a late member ended after the plan was made, goes with them.
        """
        self.drop_segments(keys, reason)
        for group in sorted({key.group for key in keys}):
            oldest_versions = self._core.store.segments.oldest_versions
            if not oldest_versions(group, "trained") and not oldest_versions(group, "ready"):
                self._end_late(group)
                self._core.store.work.set_group_state(group, "dropped", reason)
        self._core.changed()

    def drop_segments(self, keys: Sequence[SegmentKey], reason: str) -> None:
        """Drop segments that wait or are ready, and count them."""
        dropped = self._core.store.segments.drop(keys, reason)
        if dropped:
            num_tokens = sum(one.num_action_tokens for one in dropped)
            places = [Place(*one) for one in dropped]
            self._core.count_drop(reason, len(dropped), num_tokens, places)

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

    def _leave_behind(self, running: Sequence[LeaseRow], reason: str) -> None:
        """Decide what becomes of the members that run when their group closes."""
        groups = self._core.config.groups
        for lease in running:
            is_late = groups.close == "quorum" and groups.late == "train" and lease.state == "held"
            if not is_late:  # one that nobody plays cannot come late, it would have to be handed out first
                self._cut_off(lease, "late_group" if groups.close == "quorum" else reason)

    def _end_late(self, group: int) -> None:
        """End the late members of a group: what they would be compared with is not trained."""
        self._cut_off_all(group, "late_group")
        rows = self._core.store.segments.of_group(group)
        self.drop_segments([row.key for row in rows if row.state == "waiting"], "late_group")

    def _cut_off_all(self, group: int, reason: str) -> None:
        for lease in self._core.store.work.leases(group):
            if lease.state in ("free", "held"):
                self._cut_off(lease, reason)

    def _cut_off(self, lease: LeaseRow, reason: str) -> None:
        self._core.forecast.gone(lease.group, lease.member, is_cut_off=True)
        if lease.state == "held" and lease.session is not None and self._core.is_live(lease.session):
            ref = LeaseRef(lease.group, lease.member, lease.lease_epoch)
            self._core.out.fence(lease.session, ref, reason)
        self._core.store.work.settle(lease, "given_up", reason)

    def _close(self, group: int, pack_size: int) -> None:
        """Freeze the baseline, credit every segment, drop what cannot be credited; late members play on."""
        store = self._core.store
        leases = {lease.member: lease for lease in store.work.leases(group)}
        late = {member for member, lease in leases.items() if lease.state == "held"}
        rows = [row for row in store.segments.of_group(group) if row.key.member not in late]
        credited = [row for row in rows if leases[row.key.member].reason != "late_group"]
        result = credit_group(_members(credited), pack_size, self._settings)
        credits = {(c.member, c.kind, c.position): c for c in result.episodes}
        config = self._core.config  # a teacher needs no equals to compare with
        is_compared = config.lifecycle.group_size > 1 and not config.loss.is_distilled
        num_ready = 0
        dropped: dict[str, list[SegmentKey]] = {}
        for row in rows:
            credit = credits.get((row.key.member, row.kind, row.position))
            reason = self._unfit(row)
            if credit is None:
                dropped.setdefault(leases[row.key.member].reason or "unfinished", []).append(row.key)
            elif is_compared and result.baselines[row.kind, row.position].degenerate == "singleton":
                dropped.setdefault("singleton_group", []).append(row.key)
            elif reason:
                dropped.setdefault(reason, []).append(row.key)
            else:
                store.segments.set_ready(row.key, credit.return_, credit.baseline, credit.advantage)
                num_ready += 1
        for reason, keys in dropped.items():
            self.drop_segments(keys, reason)
        if late and num_ready:
            frozen: _Frozen = [(*place, baseline) for place, baseline in sorted(result.baselines.items())]
            store.work.freeze(group, msgspec.json.encode(frozen).decode())
            self._core.tally["late_lifecycles"] += len(late)
        elif late:
            self._end_late(group)
        store.work.set_group_state(
            group, "closed" if num_ready else "dropped", "" if num_ready else "no_segments"
        )
        self._core.tally["closed_groups" if num_ready else "dropped_groups"] += 1
        self._forget_clock(group)
        self._core.changed()

    def _credit_late(self, group: GroupRow, member: int) -> None:
        """Credit a member that came to its end after its group had closed."""
        store = self._core.store
        lease = store.work.lease(group.group, member)
        rows = [row for row in store.segments.of_group(group.group) if row.key.member == member]
        waiting = [row for row in rows if row.state == "waiting"]
        if lease is None or not waiting:
            return
        text = store.work.frozen(group.group)
        frozen = msgspec.json.decode(text, type=_Frozen) if text and group.state != "dropped" else []
        baselines = {
            (kind, position): baseline
            for kind, position, baseline in frozen
            if baseline.num_members >= MIN_COMPARED  # one alone was dropped: nothing to compare with
        }
        credits = {
            (credit.kind, credit.position): credit
            for one in _members(rows)
            for credit in credit_member(one, group.pack_size, baselines, self._settings)
        }
        dropped: dict[str, list[SegmentKey]] = {}
        for row in waiting:
            credit = credits.get((row.kind, row.position))
            reason = self._unfit(row)
            if credit is None:  # its return never closed, or fewer than two in time got that far
                is_alone = lease.state == "ended" and bool(frozen)
                name = "singleton_group" if is_alone else lease.reason or "late_group"
                dropped.setdefault(name, []).append(row.key)
            elif reason:
                dropped.setdefault(reason, []).append(row.key)
            else:
                store.segments.set_ready(
                    row.key, credit.return_, credit.baseline, credit.advantage, is_late=True
                )
        for reason, keys in dropped.items():
            self.drop_segments(keys, reason)
        self._core.changed()

    def _unfit(self, row: SegmentRow) -> str:
        """Return why a segment that has its credit is not trained all the same, or nothing."""
        if row.num_action_tokens == 0:
            return "no_action_tokens"
        cap, tree = self._core.config.staleness.max_version_spread, self._core.tree
        if cap is None or tree is None:
            return ""
        births = [tree.birth(span.version).step for span in row.versions]
        return "version_spread" if max(births) - min(births) > cap else ""


def _members(rows: Sequence[SegmentRow]) -> list[MemberRewards]:
    """Collect the rewards of each lifecycle; ``rows`` are sorted by key, so episodes come in order."""
    tasks: dict[int, list[float]] = {}
    updates: dict[int, list[float]] = {}
    for row in rows:
        into = tasks if row.kind == "solve" else updates
        into.setdefault(row.key.member, []).append(row.reward)
    members = sorted(tasks)
    return [MemberRewards(m, tuple(tasks[m]), tuple(updates.get(m, ()))) for m in members]
