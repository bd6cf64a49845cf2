"""Taking in segments: validate, fence, keep in order, write; everything else is settled with a named reason.

A segment is committed if it is the next one of a lifecycle that its sender holds under the present lease
epoch. Exactly one segment wins per (lifecycle, ordinal). One that came before its predecessor is kept in
memory, unacknowledged, until the predecessor is there; after a crash its sender sends it again.
"""

from __future__ import annotations

import logging
from collections import deque
from typing import NamedTuple

from cod_async.coordinator.core import Core
from cod_async.coordinator.grouping import Grouping
from cod_async.coordinator.leasing import Leasing
from cod_async.errors import WireError
from cod_async.lifecycle.segment import RowParent, Segment, Version
from cod_async.lifecycle.transcript import NO_PARENT
from cod_async.store.segments import Refusal, tokens_by_version
from cod_async.store.work import GroupRow, LeaseRow
from cod_async.wire.messages import LeaseRef, Refused, SegmentData
from cod_async.wire.validate import validate_segment

log = logging.getLogger(__name__)

MAX_STRIKES = 3
STRIKE_WINDOW_S = 60.0
MAX_EARLY_PER_LIFECYCLE = 4
MAX_REMEMBERED_WORLDS = 512
MAX_REMEMBERED_MARKS = 65_536
LOG_INTERVAL_S = 10.0
"""Drops are counted one by one and logged at most this often per actor and reason."""


def _holder(lease: LeaseRow) -> tuple[str, int | None, int]:
    return lease.state, lease.session, lease.lease_epoch


class _Early(NamedTuple):
    session: int
    seq: int
    segment: Segment


class Intake:
    """Everything that happens to a SegmentData. The caller owns the transaction."""

    def __init__(self, core: Core, leasing: Leasing, grouping: Grouping) -> None:
        self._core = core
        self._leasing = leasing
        self._grouping = grouping
        self._strikes: dict[int, deque[float]] = {}
        self._early: dict[tuple[int, int], list[_Early]] = {}
        self._logged_at: dict[tuple[str, str], float] = {}
        self._worlds: dict[int, GroupRow] = {}
        self._marks: dict[tuple[int, int], RowParent] = {}
        self.expelled: set[int] = set()

    def take(self, session: int, data: SegmentData) -> None:
        """Settle one segment, or keep it until its predecessor arrives."""
        segment = data.segment
        self._take_one(session, data.seq, segment)
        self._take_early(segment.key.group, segment.key.member)

    def tick(self) -> None:
        """Settle early segments whose lease was taken away while they waited."""
        for group, member in list(self._early):
            lease = self._core.store.work.lease(group, member)
            epochs = {early.segment.lease_epoch for early in self._early[group, member]}
            if lease is None or lease.state != "held" or epochs != {lease.lease_epoch}:
                self._take_early(group, member)

    def forget_session(self, session: int) -> None:
        """A session ended; what it sent too early will come again, or never."""
        self._strikes.pop(session, None)
        self.expelled.discard(session)
        for at, waiting in list(self._early.items()):
            kept = [early for early in waiting if early.session != session]
            if kept:
                self._early[at] = kept
            else:
                del self._early[at]

    def _take_early(self, group: int, member: int) -> None:
        """Look again at segments that waited for their predecessor."""
        while waiting := self._early.pop((group, member), None):
            waiting.sort(key=lambda early: early.segment.key.ordinal)
            for early in waiting:
                self._take_one(early.session, early.seq, early.segment)
            if len(self._early.get((group, member), ())) >= len(waiting):
                return

    def _take_one(self, session: int, seq: int, segment: Segment) -> None:
        core = self._core
        key, epoch = segment.key, segment.lease_epoch
        lease = core.store.work.lease(key.group, key.member)
        is_held = lease is not None and _holder(lease) == ("held", session, epoch)
        if lease is not None and is_held and key.ordinal >= lease.next_ordinal:
            # Not committed, as the lease would be further; not refused, as that would have cost the lease.
            self._take_held(session, seq, segment, lease)
            return
        before = core.store.segments.refusal(key, epoch)
        if before is not None:
            core.out.settle(session, seq, before)
        elif core.store.segments.winner(key) == epoch:
            core.out.settle(session, seq)
        elif lease is None:
            self._refuse(session, seq, segment, "unknown_lease", str(key), is_strike=True)
        elif not is_held:
            core.out.fence(session, LeaseRef(key.group, key.member, epoch), "fenced")
            self._refuse(session, seq, segment, "fenced", f"the lease is at epoch {lease.lease_epoch}")
        else:
            self._take_held(session, seq, segment, lease)

    def _take_held(self, session: int, seq: int, segment: Segment, lease: LeaseRow) -> None:
        core = self._core
        key = segment.key
        group = self._world_of(key.group)
        try:
            self._validate(segment, group)
        except WireError as error:
            self._refuse_and_take(session, seq, segment, error.code, error.detail)
            return
        if key.ordinal > lease.next_ordinal:
            self._keep_early(session, seq, segment)
            return
        if key.ordinal < lease.next_ordinal:
            detail = f"ordinal {key.ordinal}, the next one is {lease.next_ordinal}"
            self._refuse_and_take(session, seq, segment, "bad_ordinal", detail)
            return
        if not self._follows(segment):
            detail = f"{key} goes on from a conversation that is not the one committed before it"
            self._refuse_and_take(session, seq, segment, "bad_transcript", detail)
            return
        fallback = group.floor or core.version or Version(0, 0)
        core.store.segments.insert(segment, session, fallback)
        core.store.work.advance(key.group, key.member, segment.state_after.next_ordinal)
        self._remember(segment)
        core.out.settle(session, seq)
        core.tally["segments"] += 1
        core.tally["tokens"] += segment.num_tokens
        core.tally["action_tokens"] += segment.num_action_tokens
        next_ordinal = segment.state_after.next_ordinal
        core.forecast.sealed(key.group, key.member, next_ordinal, segment.wall_s, segment.is_last)
        if segment.is_last:
            core.store.work.settle(lease, "ended")
            self._leasing.ended(key.group, key.member)
            self._grouping.settled(key.group, key.member)

    def _follows(self, segment: Segment) -> bool:
        """Whether a segment of a transcript goes on from the conversation that was committed before it."""
        if segment.state_after.transcript is None or not segment.rows:
            return True
        if segment.key.ordinal == 0:  # whatever the conversation was before the lifecycle started anew
            return segment.rows[0].parent == NO_PARENT
        at = segment.key.group, segment.key.member
        if at not in self._marks:
            before = self._core.store.segments.last_payload(*at)
            transcript = None if before is None else before.state_after.transcript
            self._marks[at] = NO_PARENT if transcript is None else transcript.mark
        return segment.rows[0].parent == self._marks[at]

    def _remember(self, segment: Segment) -> None:
        """Note where the conversation of a lifecycle stands, if it is one; the database has it all."""
        transcript = segment.state_after.transcript
        if transcript is None:
            return
        if len(self._marks) >= MAX_REMEMBERED_MARKS:
            self._marks.clear()
        self._marks[segment.key.group, segment.key.member] = transcript.mark
        if segment.is_last:
            del self._marks[segment.key.group, segment.key.member]

    def _world_of(self, group: int) -> GroupRow:
        """Return a group's row; what is checked of it never changes, so the last few hundred are kept."""
        row = self._worlds.get(group)
        if row is None:
            row = self._core.store.work.group(group)
            assert row is not None  # noqa: S101  (foreign key)
            if len(self._worlds) >= MAX_REMEMBERED_WORLDS:
                self._worlds.clear()
            self._worlds[group] = row
        return row

    def _keep_early(self, session: int, seq: int, segment: Segment) -> None:
        waiting = self._early.setdefault((segment.key.group, segment.key.member), [])
        if any((early.session, early.seq) == (session, seq) for early in waiting):
            return
        if len(waiting) >= MAX_EARLY_PER_LIFECYCLE:
            detail = f"{len(waiting)} segments wait for their predecessor already"
            self._refuse_and_take(session, seq, segment, "out_of_order", detail)
            return
        waiting.append(_Early(session, seq, segment))
        self._core.tally["out_of_order"] += 1

    def _validate(self, segment: Segment, group: GroupRow) -> None:
        """Check what the segment claims.

        Raises:
            WireError: with the code that becomes the reason of the drop.
        """
        core = self._core
        lifecycle = core.config.lifecycle
        validate_segment(
            segment,
            run=core.run,
            pack_size=group.pack_size,
            group_size=lifecycle.group_size,
            max_context_tokens=core.config.model.max_context_tokens,
            is_transcript=lifecycle.carry == "transcript",
            is_distilled=core.config.loss.is_distilled,
        )
        world = (segment.environment, segment.preset, segment.pack_seed)
        if world != (group.environment, group.preset, group.pack_seed):
            raise WireError("wrong_world", f"{world}, the group's is {group.environment}, {group.preset}")
        stride = 1 if lifecycle.has_updates else 2
        next_ordinal = segment.state_after.next_ordinal
        if not segment.is_last and next_ordinal != segment.key.ordinal + stride:
            raise WireError("bad_state", f"next ordinal {next_ordinal} after {segment.key.ordinal}")
        for version in tokens_by_version(segment):
            if core.tree is None or not core.tree.is_published(version):
                raise WireError("unknown_version", f"tokens of version {version}, which was never published")

    def _refuse_and_take(self, session: int, seq: int, segment: Segment, reason: str, detail: str) -> None:
        """Refuse a segment of a held lease, and the lease with it: its lifecycle has a hole now."""
        self._refuse(session, seq, segment, reason, detail, is_strike=True)
        lease = self._core.store.work.lease(segment.key.group, segment.key.member)
        if lease is not None and lease.state == "held":
            self._leasing.retry(lease)

    def _refuse(
        self, session: int, seq: int, segment: Segment, reason: str, detail: str, is_strike: bool = False
    ) -> None:
        """Settle a segment as dropped; strikes in quick succession expel the sender."""
        core = self._core
        num_tokens = segment.num_action_tokens
        refusal = Refusal(segment.key, segment.lease_epoch, session, reason, detail[:1000], num_tokens)
        if core.store.segments.refuse(refusal):
            core.count_drop(reason, 1, num_tokens)
            _, name = core.sessions.get(session, ("actor", "?"))
            if core.now() - self._logged_at.get((name, reason), -LOG_INTERVAL_S) >= LOG_INTERVAL_S:
                if len(self._logged_at) >= MAX_REMEMBERED_WORLDS:
                    self._logged_at.clear()
                self._logged_at[name, reason] = core.now()
                log.log(
                    logging.WARNING if is_strike else logging.INFO,
                    "run %s: dropped segment %s (lease epoch %d) of %s: %s: %s",
                    *(core.run, segment.key, segment.lease_epoch, name, reason, detail[:200]),
                )
        core.out.settle(session, seq, reason)
        if is_strike:
            self._strike(session, reason)

    def _strike(self, session: int, reason: str) -> None:
        now = self._core.now()
        strikes = self._strikes.setdefault(session, deque(maxlen=MAX_STRIKES))
        strikes.append(now)
        if (
            len(strikes) == MAX_STRIKES
            and now - strikes[0] <= STRIKE_WINDOW_S
            and session not in self.expelled
        ):
            self.expelled.add(session)
            self._leasing.take_session(session, "quarantined")
            detail = f"{MAX_STRIKES} bad segments within {STRIKE_WINDOW_S:g} s, the last one: {reason}"
            self._core.out.send(session, Refused(code="quarantined", detail=detail, is_fatal=True))
            log.error("run %s: session %d is expelled: %s", self._core.run, session, detail)
