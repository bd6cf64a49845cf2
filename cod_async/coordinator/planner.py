"""Admission and selection under the staleness bound, as pure functions of small integers.

Two rules keep every trained token within ``max_lag`` steps of the weights that train on it, without throwing
work away. *Admission*: a group starts only if, trained in order, its turn comes while its oldest token is
young enough; the capacity rule is that of AReaL (arXiv 2505.24298), counted in groups. *Selection*: steps
take closed groups oldest first, and in mode ``wait`` a step is held back rather than filled with young groups
while older ones that could not be served later are still being played (earliest deadline first: a set of
groups can be served by ``g`` per step if and only if, for every t, at most ``g * (t - s + 1)`` of them must
be trained by step t). In mode ``expire`` the same test says when an open group has to be closed with the
members that have ended, because no later step could use it; and a *forecast* of when the running groups will
close says whether one more group would be trained in front of an older one for which it is then too late.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal, NamedTuple

import msgspec

from cod_async.config.schema import Config


class Limits(msgspec.Struct, frozen=True, kw_only=True):
    """The numbers that admission and selection obey.

    Attributes:
        groups_per_step: closed groups that a step trains on.
        max_lag: bound on learner step minus the step a token counts as, in steps.
        plan_ahead_steps: steps' worth of groups under way beyond the current step.
        num_steps: steps of the whole run; nothing is started that could only be trained after them.
        on_bound: wait for groups that would become too old, or let them expire.
        pause_lag: with ``wait``, the lag at which the learner already pauses; at most ``max_lag``, -1: there.
        window_groups: a step takes closed groups among so many oldest ones; 0: no window.
    """

    groups_per_step: int
    max_lag: int
    plan_ahead_steps: int
    num_steps: int
    on_bound: Literal["wait", "expire"] = "wait"
    pause_lag: int = -1
    window_groups: int = 0

    @classmethod
    def of(cls, config: Config) -> Limits:
        """Read the limits from a configuration; ``plan_ahead_steps = -1`` is max(1, max_lag // 2), or 0."""
        staleness = config.staleness
        return cls(
            groups_per_step=config.learner.groups_per_step,
            max_lag=staleness.max_lag,
            plan_ahead_steps=_ahead(staleness.plan_ahead_steps, staleness.max_lag),
            num_steps=config.run.num_steps,
            on_bound=staleness.on_bound,
            window_groups=staleness.window_groups,
        )

    def steered(self, lag: int, plan_ahead_steps: int) -> Limits:
        """Return the limits under a lower lag that the autopilot asks for.

        What was started under a higher one may still be trained up to ``max_lag``: nothing expires by it.
        """
        lag = min(lag, self.max_lag)
        ahead = _ahead(plan_ahead_steps, lag)
        return msgspec.structs.replace(self, plan_ahead_steps=ahead, pause_lag=lag)

    @property
    def admission_lag(self) -> int:
        """The lag that work is started for."""
        return self.max_lag if self.pause_lag < 0 else self.pause_lag


def _ahead(plan_ahead_steps: int, lag: int) -> int:
    return min(max(1, lag // 2) if plan_ahead_steps < 0 else plan_ahead_steps, lag)


class GroupView(msgspec.Struct, frozen=True):
    """One untrained group, as selection sees it.

    Attributes:
        group: index.
        is_closed: whether its credit is known.
        birth: step of the surviving history that its oldest token counts as; for an open group that of its
            floor, None
            when it has not started.
        is_settled: False when ``birth`` may still turn out younger (see :mod:`cod_async.store.lineage`).
        is_closable: whether it is open and could close with the members that have ended.
    """

    group: int
    is_closed: bool
    birth: int | None
    is_settled: bool = True
    is_closable: bool = False


class Closing(NamedTuple):
    """Forecast of the seconds until a group closes: as likely as not by ``soon_s``, almost surely by
    ``late_s``.
    """

    soon_s: float
    late_s: float


CLOSED = Closing(0.0, 0.0)


class Running(NamedTuple):
    """One untrained group that has started, as admission by forecast sees it.

    Attributes:
        birth: step that its oldest token counts as.
        closing: when it will close, :data:`CLOSED` when it has; None when nothing is known of it.
        renewal_s: likely seconds of a whole group that starts in its place; infinite when unknown.
    """

    birth: int
    closing: Closing | None
    renewal_s: float = math.inf

    def num_closed(self, within_s: float) -> float:
        """Return how many groups will have closed in this one's place: itself, and those that follow it."""
        if self.closing is None or self.closing.soon_s > within_s:
            return 0.0
        return 1.0 + (within_s - self.closing.soon_s) / max(self.renewal_s, 1e-9)


class Choice(msgspec.Struct, frozen=True):
    """What selection decided.

    Attributes:
        selected: groups of the step, oldest first; empty when the step has to wait.
        stale: groups that no step may train on any more.
        last_call: open groups that only this step can use, with the members that have ended; to be closed,
            and then the choice made again.
        reason: why the step waits: ``too_few_closed``, ``older_groups_open``, ``outside_window``,
            ``unknown_weights``; or empty.
    """

    selected: tuple[int, ...] = ()
    stale: tuple[int, ...] = ()
    last_call: tuple[int, ...] = ()
    reason: str = ""


def turn_of(rank: int, step: int, limits: Limits) -> int:
    """Return the step that trains the group with ``rank`` untrained groups before it, if all go in order."""
    return step + rank // limits.groups_per_step


def may_lease(rank: int, step: int, published_step: int, limits: Limits) -> bool:
    """Say whether lifecycles of a group may be handed out now.

    Args:
        rank: number of untrained groups with a lower index.
        step: the learner's current step.
        published_step: newest published step of the current lineage; the lease's tokens are at least that
            young.
        limits: the bounds.
    """
    turn = turn_of(rank, step, limits)
    is_near = rank < (limits.plan_ahead_steps + 1) * limits.groups_per_step
    return is_near and turn <= published_step + limits.admission_lag and turn < limits.num_steps


def may_start(new: Running, others: Sequence[Running], step: int, step_s: float, limits: Limits) -> bool:
    """Say whether one more group can be trained within the bound, and pushes no running one past it.

    Until a group closes, the learner takes at most the steps that the groups closed by then are good
    for, and at most those it has time for. For the group that is asked about, the late end of the
    forecast counts; for those that may be trained in front of it, the likely one, each with the groups
    that will follow in its place. With n groups under way, each of which takes ``soon_s``, some n *
    late_s / soon_s close while a slow one takes ``late_s``: so many may be under way that this is no
    more than the bound allows.

    The answer is yes whenever fewer groups than one step's worth are under way, so that admission by forecast
    alone never stops a run, however wrong the forecast is. A group that is past help, or of which nothing is
    known, holds nobody back.

    Args:
        new: the group that would start; nothing is known against one without a forecast.
        others: the started groups that no step has taken yet.
        step: the learner's current step.
        step_s: seconds of a step that does not wait; 0 when unknown.
        limits: the bounds.
    """
    if len(others) < limits.groups_per_step or new.closing is None:
        return True

    def lag(of: Running, others: Sequence[Running]) -> int:
        until_s = 0.0 if of.closing is None else of.closing.late_s
        num_steps = int(math.fsum(other.num_closed(until_s) for other in others) / limits.groups_per_step)
        if step_s > 0:
            num_steps = min(num_steps, int(until_s / step_s) + 1)
        return step + num_steps - of.birth

    bound = limits.admission_lag
    if lag(new, others) > bound:
        return False
    for index, other in enumerate(others):
        if other.closing is not None and other.closing.late_s >= new.closing.soon_s:
            rest = [*others[:index], *others[index + 1 :]]
            if lag(other, rest) <= bound < lag(other, [*rest, new]):
                return False
    return True


def is_out_of_reach(rank: int, step: int, limits: Limits) -> bool:
    """Say whether tokens generated at ``step`` for this group would be too old when its turn comes.

    After a rollback this tells which running lifecycles have to be called back until their turn is nearer.
    """
    return turn_of(rank, step, limits) > step + limits.max_lag


def choose_groups(
    groups: Sequence[GroupView], step: int, limits: Limits, *, may_defer: bool = True
) -> Choice:
    """Choose the groups of ``step``.

    Args:
        groups: every untrained group except those of a plan that is already made.
        step: the step to be taken.
        limits: the bounds.
        may_defer: keep groups that look too old but may turn out younger; False when nothing else can happen
            any more.
    """
    started = [group for group in groups if group.birth is not None]
    stale = {g.group for g in started if _is_too_old(g, step, limits) and (g.is_settled or not may_defer)}
    deferred = {g.group for g in started if _is_too_old(g, step, limits)} - stale
    usable = sorted(
        (g for g in started if g.group not in stale and g.group not in deferred),
        key=lambda g: (_birth(g), g.group),
    )
    window = usable[: limits.window_groups] if limits.window_groups else usable
    chosen = [g for g in window if g.is_closed][: limits.groups_per_step]
    stale_groups = tuple(sorted(stale))
    if len(chosen) < limits.groups_per_step:
        num_closed = sum(g.is_closed for g in usable)
        reason = "outside_window" if num_closed >= limits.groups_per_step else "too_few_closed"
        return Choice(stale=stale_groups, reason="unknown_weights" if deferred else reason)
    if not _leaves_room(usable, chosen, step, limits):
        if limits.on_bound == "wait":
            return Choice(stale=stale_groups, reason="older_groups_open")
        oldest = usable[: limits.groups_per_step]
        last_call = tuple(g.group for g in oldest if g.is_closable)
        if last_call:
            return Choice(stale=stale_groups, last_call=last_call)
    return Choice(selected=tuple(g.group for g in chosen), stale=stale_groups)


def _birth(group: GroupView) -> int:
    assert group.birth is not None  # noqa: S101  (callers pass started groups)
    return group.birth


def _is_too_old(group: GroupView, step: int, limits: Limits) -> bool:
    return step - _birth(group) > limits.max_lag


def _leaves_room(usable: Sequence[GroupView], chosen: Sequence[GroupView], step: int, limits: Limits) -> bool:
    """Whether after this step every usable group can still be trained in time, ``groups_per_step`` at a time.

    Where that is impossible whatever is chosen (a rollback made more groups than can be used), a step full of
    the oldest ones is the best there is.
    """
    taken = {group.group for group in chosen}
    per_step = limits.groups_per_step
    # the autopilot's lag makes the learner pause, but nothing is cut off by it
    lag = limits.admission_lag if limits.on_bound == "wait" else limits.max_lag
    for last in {_birth(group) + lag for group in usable}:
        due = [group for group in usable if _birth(group) + lag <= last]
        needed = min(per_step, len(due) - per_step * max(0, last - step))
        if sum(group.group in taken for group in due) < needed:
            return False
    return True
