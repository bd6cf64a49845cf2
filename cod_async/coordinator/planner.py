"""Admission and selection under the staleness bound, as pure functions of small integers.

Two rules keep every trained token within ``max_lag`` steps of the weights that train on it, without throwing
work away. *Admission*: a group starts only if, trained in order, its turn comes while its oldest token is
young enough; the capacity rule is that of AReaL (arXiv 2505.24298), counted in groups. *Selection*: steps
take closed groups oldest first, and in mode ``wait`` a step is held back rather than filled with young groups
while older ones that could not be served later are still being played (earliest deadline first: a set of
groups can be served by ``g`` per step if and only if, for every t, at most ``g * (t - s + 1)`` of them must
be trained by step t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

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
    """

    groups_per_step: int
    max_lag: int
    plan_ahead_steps: int
    num_steps: int
    on_bound: Literal["wait", "expire"] = "wait"

    @classmethod
    def of(cls, config: Config) -> Limits:
        """Read the limits from a configuration; ``plan_ahead_steps = -1`` is max(1, max_lag // 2), or 0."""
        staleness = config.staleness
        ahead = staleness.plan_ahead_steps
        if ahead < 0:
            ahead = max(1, staleness.max_lag // 2)
        return cls(
            groups_per_step=config.learner.groups_per_step,
            max_lag=staleness.max_lag,
            plan_ahead_steps=min(ahead, staleness.max_lag),
            num_steps=config.run.num_steps,
            on_bound=staleness.on_bound,
        )


class GroupView(msgspec.Struct, frozen=True):
    """One untrained group, as selection sees it.

    Attributes:
        group: index.
        is_closed: whether its credit is known.
        birth: step of the surviving history that its oldest token counts as; for an open group that of its
            floor, None
            when it has not started.
        is_settled: False when ``birth`` may still turn out younger (see :mod:`cod_async.store.lineage`).
    """

    group: int
    is_closed: bool
    birth: int | None
    is_settled: bool = True


class Choice(msgspec.Struct, frozen=True):
    """What selection decided.

    Attributes:
        selected: groups of the step, oldest first; empty when the step has to wait.
        stale: groups that no step may train on any more.
        reason: why the step waits: ``too_few_closed``, ``older_groups_open``, ``unknown_weights``; or empty.
    """

    selected: tuple[int, ...] = ()
    stale: tuple[int, ...] = ()
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
    return is_near and turn <= published_step + limits.max_lag and turn < limits.num_steps


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
    chosen = [g for g in usable if g.is_closed][: limits.groups_per_step]
    stale_groups = tuple(sorted(stale))
    if len(chosen) < limits.groups_per_step:
        return Choice(stale=stale_groups, reason="unknown_weights" if deferred else "too_few_closed")
    if limits.on_bound == "wait" and not _leaves_room(usable, chosen, step, limits):
        return Choice(stale=stale_groups, reason="older_groups_open")
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
    for last in {_birth(group) + limits.max_lag for group in usable}:
        due = [group for group in usable if _birth(group) + limits.max_lag <= last]
        needed = min(per_step, len(due) - per_step * (last - step))
        if sum(group.group in taken for group in due) < needed:
            return False
    return True
