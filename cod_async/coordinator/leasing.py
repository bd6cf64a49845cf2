"""Leases: planning packs under the staleness bound, handing out lifecycles, taking them back, giving them up.

A lease is fenced by its epoch, which grows whenever the lease is taken away; whoever comes back with an older
epoch changes nothing. A lifecycle that is handed out again goes on after its last committed segment, or, if
its environment cannot be restored, starts anew, and the segments of the abandoned attempt are dropped
(``restarted``).

Under ``on_bound = expire`` a *forecast* (:mod:`cod_async.coordinator.forecast`) also has to allow it: a group
is not started while it would be trained in front of an older one for which it is then too late, and a
lifecycle is not handed out again when it cannot finish in time. Groups start strictly in order, so one that
has to wait is not overtaken by others that are shorter. While the learner waits and nobody plays an open
group, as after the death of the only actor, the forecast is not asked: what it forbids it would forbid for
ever.
"""

from __future__ import annotations

import logging
import math
from typing import NamedTuple

import msgspec

from cod_async.coordinator.core import Core
from cod_async.coordinator.grouping import Grouping
from cod_async.coordinator.planner import CLOSED, Closing, Running, is_out_of_reach, may_lease, may_start
from cod_async.envs import registry
from cod_async.envs.base import canonical_json, environment_errors
from cod_async.errors import CodError
from cod_async.lifecycle.packs import plan_pack, stable_seed
from cod_async.lifecycle.segment import Version
from cod_async.lifecycle.transcript import assembled
from cod_async.store.work import GroupRow, LeaseRow, NewGroup
from cod_async.wire.messages import Heartbeat, Lease, LeaseRef, LeaseRequest, LeaseReturn, Leases

log = logging.getLogger(__name__)

PARK_S = 1.0
"""An unanswerable LeaseRequest is answered with an empty list after this many seconds."""
MAX_TAKEOVERS = 100
"""A lifecycle whose actors die this often is given up as ``infrastructure``: it may be what kills them."""
MAX_LEASES_PER_REQUEST = 1024
PACE_AGE_S = 0.25
"""A forecast of everything that is under way serves the requests of this long."""
_WAITS_FOR_RUNNING = ("older_groups_open", "outside_window", "too_few_closed")
OVERDUE_INTERVAL_S = 0.25
"""While the learner waits, lifecycles that take too long are looked for this often."""
MAX_HELD_PER_HEARTBEAT = 4096
"""A heartbeat that names more leases has only this many of them checked."""


_encoder = msgspec.msgpack.Encoder()


class _Parked(NamedTuple):
    request: LeaseRequest
    since: float


class _Pace:
    """What is under way, as admission by forecast sees it; good for a moment."""

    def __init__(self, core: Core, published_step: int) -> None:
        self._core = core
        self.published_step = published_step
        self.step = core.step
        self.made_at = core.now()
        self._running: dict[int, Running] = {}
        self._is_idle = bool(core.waits_for)
        """Whether the learner waits and nobody plays an open group."""
        tree, work = core.tree, core.store.work
        assert tree is not None  # noqa: S101  (granting needs a lineage)
        for group, state, floor in work.untrained():
            if floor is not None and state != "planned":
                closing: Closing | None = CLOSED
                row = work.group(group)
                assert row is not None  # noqa: S101  (it is untrained)
                if state == "open":
                    playing = [lease.member for lease in work.leases(group) if lease.state == "held"]
                    # nobody knows when a group closes that waits to be handed out again
                    closing = core.forecast.of_running(group, playing) if playing else None
                    self._is_idle = self._is_idle and not playing
                birth = tree.birth(floor).step
                self._running[group] = Running(birth, closing, self._renewal_s(row))

    def _renewal_s(self, group: GroupRow) -> float:
        """Return the likely seconds of a whole group of the same environment."""
        world, size = (group.environment, group.preset), self._core.config.lifecycle.group_size
        closing = self._core.forecast.of_new(world, size)
        return math.inf if closing is None else closing.soon_s

    def has_started(self, group: int) -> bool:
        """Whether a lifecycle of the group was handed out before."""
        return group in self._running

    def allows(self, row: LeaseRow) -> bool:
        """Whether a free lifecycle may be handed out; where nothing is known, it may."""
        core = self._core
        group = core.store.work.group(row.group)
        assert group is not None  # noqa: S101  (foreign key)
        world, limits = (group.environment, group.preset), core.limits
        mine = self._running.get(row.group)
        if self._is_idle and mine is not None:
            return True
        if mine is not None:  # its group is under way and delays nobody any more: only its own time counts
            closing = core.forecast.of_new(world, 1, row.next_ordinal)
            if closing is None:
                return True
            new = Running(mine.birth, Closing(math.inf, closing.late_s))
            others = [other for at, other in self._running.items() if at != row.group]
            return may_start(new, others, core.step, core.forecast.step_s, limits)
        closing = core.forecast.of_new(world, core.config.lifecycle.group_size)
        new = Running(self.published_step, closing, self._renewal_s(group))
        others = list(self._running.values())
        is_allowed = self._is_idle or may_start(new, others, core.step, core.forecast.step_s, limits)
        if is_allowed:
            self._running[row.group] = new
        return is_allowed


class Leasing:
    """Everything about leases. The caller owns the transaction."""

    def __init__(self, core: Core, grouping: Grouping) -> None:
        self._core = core
        self._grouping = grouping
        self._parked: dict[int, _Parked] = {}
        self._answered: dict[int, int] = {}
        self._seen_generation = -1
        self._granted_at: dict[tuple[int, int], float] = {}
        self._looked_at = -OVERDUE_INTERVAL_S
        self._pace: _Pace | None = None
        self._is_resumable: dict[tuple[str, str, str], bool] = {}

    # ------------------------------------------------------------------------------------------------------
    # requests

    def request(self, session: int, request: LeaseRequest) -> None:
        """Take a LeaseRequest: answer it as before, now, or later from :meth:`tick`."""
        before = self._granted_before(session, request.request)
        if before:
            self._answer(session, request.request, before)
        elif request.request <= self._answered.get(session, -1):
            self._answer(session, request.request, [])
        else:
            before_parked = self._parked.get(session)
            if before_parked is None or before_parked.request.request != request.request:
                self._parked[session] = _Parked(request, self._core.now())
            self._serve(session)

    def tick(self) -> None:
        """Serve parked requests, expire lifecycles past their deadline."""
        now = self._core.now()
        if self._core.generation != self._seen_generation:
            self._seen_generation = self._core.generation
            for session in list(self._parked):
                self._serve(session)
        for session, parked in list(self._parked.items()):
            if now - parked.since >= PARK_S:
                self._answer(session, parked.request.request, [])
        deadline_s = self._core.config.groups.deadline_s
        while self._granted_at:
            at, granted = next(iter(self._granted_at.items()))  # in the order of granting: the oldest
            if now - granted <= deadline_s:
                break
            del self._granted_at[at]  # it may have been cut off with its group meanwhile
            lease = self._core.store.work.lease(*at)
            if lease is not None and lease.state == "held":
                self.give_up(lease, "deadline")
        self._give_up_overdue(now)

    def _give_up_overdue(self, now: float) -> None:
        """While the learner waits for running groups, give up what takes far longer than it ever does."""
        factor = self._core.config.groups.overdue_factor
        if factor <= 0 or self._core.waits_for not in _WAITS_FOR_RUNNING:
            return
        if now - self._looked_at < OVERDUE_INTERVAL_S:
            return
        self._looked_at = now
        for at in self._core.forecast.overdue(factor):
            lease = self._core.store.work.lease(*at)
            group = self._core.store.work.group(at[0])
            is_waited_for = group is not None and group.state == "open"
            if lease is not None and lease.state == "held" and is_waited_for:
                self.give_up(lease, "overdue")

    def restore_clocks(self) -> None:
        """After a restart every held lease has its whole deadline before it."""
        now = self._core.now()
        for lease in self._core.store.work.held_leases():
            self._granted_at[lease.group, lease.member] = now
            group = self._core.store.work.group(lease.group)
            if group is not None:
                world = group.environment, group.preset
                self._core.forecast.began(lease.group, lease.member, world, lease.next_ordinal)

    def heartbeat(self, session: int, heartbeat: Heartbeat) -> None:
        """Fence what the client believes to hold and does not; of a very long list, the first part."""
        if not heartbeat.held:
            return
        rows = self._core.store.work.held_leases(session)
        held = {(row.group, row.member, row.lease_epoch) for row in rows}
        for ref in heartbeat.held[:MAX_HELD_PER_HEARTBEAT]:
            if (ref.group, ref.member, ref.lease_epoch) not in held:
                lease = self._core.store.work.lease(ref.group, ref.member)
                has_ended = (
                    lease is not None and lease.state == "ended" and lease.lease_epoch == ref.lease_epoch
                )
                if not has_ended:  # an ended lifecycle's last ack may still be under way
                    self._core.out.fence(session, ref, "not_yours")

    def give_back(self, session: int, message: LeaseReturn) -> None:
        """Take back a lifecycle that its actor could not finish."""
        lease = self._core.store.work.lease(message.lease.group, message.lease.member)
        if lease is None or (lease.state, lease.session, lease.lease_epoch) != (
            "held",
            session,
            message.lease.lease_epoch,
        ):
            return  # repeated, or fenced meanwhile
        if message.reason == "infrastructure":
            self.retry(lease)
        else:
            self._free(lease)

    # --------------------------------------------------------------------------------------------------------
    # taking

    def take_session(self, session: int, reason: str) -> None:
        """Take every lease of a session that ended; other actors go on from the last committed segments."""
        for lease in self._core.store.work.held_leases(session):
            if lease.num_takeovers >= MAX_TAKEOVERS:
                self.give_up(lease, "infrastructure")
            else:
                self._free(lease, is_takeover=True)
                self._core.tally[f"leases_{reason}"] += 1
        self._parked.pop(session, None)
        self._answered.pop(session, None)

    def retry(self, lease: LeaseRow) -> None:
        """Take a lease back after a failure; give the lifecycle up when it failed too often."""
        if lease.num_retries >= self._core.config.actors.max_retries:
            self.give_up(lease, "infrastructure")
        else:
            self._fence_holder(lease, "retry")
            self._free(lease, is_retry=True)

    def give_up(self, lease: LeaseRow, reason: str) -> None:
        """Close an unfinished lifecycle for a named reason."""
        self._fence_holder(lease, reason)
        self._core.store.work.settle(lease, "given_up", reason)
        self._granted_at.pop((lease.group, lease.member), None)
        self._core.forecast.gone(lease.group, lease.member, is_cut_off=reason in ("deadline", "overdue"))
        self._grouping.settled(lease.group, lease.member)

    def ended(self, group: int, member: int) -> None:
        """A lifecycle came to its end; its deadline is over."""
        self._granted_at.pop((group, member), None)

    def call_back_unreachable(self) -> None:
        """After a rollback: take back running lifecycles whose turn is further off than the bound."""
        work = self._core.store.work
        ranks = {group: rank for rank, (group, _, _) in enumerate(work.untrained())}
        for lease in work.held_leases():
            if lease.group not in ranks:
                continue  # late: its group's turn has been
            if is_out_of_reach(ranks[lease.group], self._core.step, self._core.limits):
                self._fence_holder(lease, "rolled_back")
                self._free(lease)

    def _free(self, lease: LeaseRow, *, is_retry: bool = False, is_takeover: bool = False) -> None:
        group = self._core.store.work.group(lease.group)
        if group is not None and group.state != "open":
            self.give_up(lease, "late_group")  # its group has closed: nobody gets it again
            return
        self._core.forecast.gone(lease.group, lease.member, is_cut_off=False)
        self._core.store.work.free(lease, is_retry=is_retry, is_takeover=is_takeover)
        self._granted_at.pop((lease.group, lease.member), None)
        self._core.changed()

    def _fence_holder(self, lease: LeaseRow, reason: str) -> None:
        if lease.state == "held" and lease.session is not None and self._core.is_live(lease.session):
            ref = LeaseRef(lease.group, lease.member, lease.lease_epoch)
            self._core.out.fence(lease.session, ref, reason)

    # ------------------------------------------------------------------------------------------------------
    # granting

    def _serve(self, session: int) -> None:
        parked = self._parked[session]
        leases = self._grant(session, parked.request)
        if leases:
            self._answer(session, parked.request.request, leases)

    def _answer(self, session: int, request: int, leases: list[Lease]) -> None:
        self._parked.pop(session, None)
        self._answered[session] = max(request, self._answered.get(session, -1))
        self._core.out.send(session, Leases(request=request, leases=leases))

    def _grant(self, session: int, request: LeaseRequest) -> list[Lease]:
        """Hand out what the bounds allow: continued lifecycles first, then started groups, then new ones."""
        core = self._core
        if core.manifest is None or core.tree is None or core.finished is not None or core.should_stop:
            return []
        wanted = min(request.num_lifecycles, MAX_LEASES_PER_REQUEST)
        published = core.manifest.version
        granted: list[Lease] = []
        ranks = {group: rank for rank, (group, _, _) in enumerate(core.store.work.untrained())}
        room_bytes = core.config.transport.max_message_bytes // 2
        has_forecast = self._has_forecast
        hopeless: set[tuple[int, int]] = set()
        while len(granted) < wanted and room_bytes > 0:
            free = core.store.work.free_leases(wanted - len(granted) + len(hopeless))
            free = [row for row in free if (row.group, row.member) not in hopeless]
            for row in free[: wanted - len(granted)]:
                if not may_lease(ranks[row.group], core.step, published.step, core.limits):
                    return granted
                if has_forecast and not self._current_pace(published.step).allows(row):
                    if self._current_pace(published.step).has_started(row.group):
                        hopeless.add((row.group, row.member))
                        continue
                    return granted  # nothing overtakes it
                lease = self._lease(row, session, request.request, published)
                granted.append(lease)
                room_bytes -= len(_encoder.encode(lease))
                if room_bytes <= 0:
                    break  # the rest would not fit the answer: ask again
            if not free:
                if not may_lease(len(ranks), core.step, published.step, core.limits):
                    break
                ranks[self._plan_group()] = len(ranks)
        return granted

    def _current_pace(self, published_step: int) -> _Pace:
        """Return what is under way, looked up anew when time has passed or a step was taken."""
        core, pace = self._core, self._pace
        if (
            pace is None
            or (pace.step, pace.published_step) != (core.step, published_step)
            or core.now() - pace.made_at > PACE_AGE_S
        ):
            pace = self._pace = _Pace(core, published_step)
        return pace

    @property
    def _has_forecast(self) -> bool:
        """Whether a forecast has a say in what is handed out."""
        staleness = self._core.config.staleness
        return staleness.on_bound == "expire" and staleness.admission == "forecast"

    def _plan_group(self) -> int:
        core, config = self._core, self._core.config
        version = core.version
        assert version is not None  # noqa: S101  (granting needs a lineage)
        group = core.store.work.next_group()
        lifecycle = config.lifecycle
        plan = plan_pack(
            config.environments,
            lifecycle.pack_size,
            config.run.seed,
            group,
            strategy=lifecycle.packs,
            has_plain_seeds=lifecycle.has_plain_pack_seeds,
        )
        new = NewGroup(
            environment=plan.environment,
            preset=plan.preset,
            options_json=canonical_json(plan.options),
            records_json=tuple(canonical_json(record) for record in plan.records),
            pack_seed=plan.pack_seed,
            num_members=config.lifecycle.group_size,
            planned_at=version,
        )
        core.store.work.add_group(group, new)
        return group

    def _lease(self, row: LeaseRow, session: int, request: int, min_version: Version) -> Lease:
        """Grant one free lease."""
        work = self._core.store.work
        group = work.group(row.group)
        assert group is not None  # noqa: S101  (foreign key)
        if row.next_ordinal > 0 and not self._can_resume(group):
            row = self._restart(row)
        if group.floor is None or self._counts_as(min_version) < self._counts_as(group.floor):
            work.set_floor(row.group, min_version)
        work.grant(row, session, min_version, request)
        self._grouping.started(row.group)
        self._granted_at[row.group, row.member] = self._core.now()
        world = group.environment, group.preset
        self._core.forecast.began(row.group, row.member, world, row.next_ordinal)
        return self._describe(row, group, min_version)

    def _restart(self, row: LeaseRow) -> LeaseRow:
        """Make a free lifecycle start anew; return its lease at ordinal 0.

        Its segments are waiting, all of them, because a group with a free lease is open. So none of them is
        credited or planned, and none will be: they leave the segments for the refused ones, under the epoch
        that they were played under, and what is played from now on has their places to itself.
        """
        store = self._core.store
        num_segments, num_tokens = store.segments.restart(row.group, row.member, "restarted")
        self._core.count_drop("restarted", num_segments, num_tokens)
        self._core.tally["restarted_lifecycles"] += 1
        store.work.advance(row.group, row.member, 0)
        return msgspec.structs.replace(row, next_ordinal=0)

    def _counts_as(self, version: Version) -> int:
        """Return the step of the surviving history that tokens of ``version`` count as at the worst."""
        assert self._core.tree is not None  # noqa: S101  (granting needs a lineage)
        return self._core.tree.birth(version).step

    def _describe(self, row: LeaseRow, group: GroupRow, min_version: Version) -> Lease:
        segments = self._core.store.segments
        last = segments.last_payload(row.group, row.member)
        state = None if last is None else last.state_after
        if state is not None and state.transcript is not None:
            state = assembled(state, list(segments.payloads_of(row.group, row.member)))
        seed = stable_seed("sampling", self._core.config.run.seed, row.group, row.member) >> 2
        return Lease(
            ref=LeaseRef(row.group, row.member, row.lease_epoch),
            environment=group.environment,
            preset=group.preset,
            options_json=group.options_json,
            records_json=group.records_json,
            pack_seed=group.pack_seed,
            sampling_seed=seed,
            min_version=min_version,
            state=state,
        )

    def _granted_before(self, session: int, request: int) -> list[Lease]:
        """Return what this very request was answered with, as far as it still stands."""
        work = self._core.store.work
        leases = []
        for row, min_version in work.granted_under(session, request):
            group = work.group(row.group)
            if group is not None:
                leases.append(self._describe(row, group, min_version))
        return leases

    def _can_resume(self, group: GroupRow) -> bool:
        at = (group.environment, group.preset, group.options_json)
        if at not in self._is_resumable:
            try:
                with environment_errors(group.environment):
                    spec = registry.get(group.environment)
                    options = spec.options(group.preset, msgspec.json.decode(group.options_json))
                    self._is_resumable[at] = spec.make(options).is_resumable
            except CodError as error:  # what cannot even be made here had better start anew
                log.warning("run %s: lifecycles start anew: %s", self._core.run, error)
                self._is_resumable[at] = False
        return self._is_resumable[at]
