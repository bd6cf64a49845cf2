"""Credit assignment in its two stages.

Stage one needs a closed group: rewards become returns, the group's baseline is frozen, and every member has
its advantage (:func:`credit_group`; :func:`credit_member` for members that end after the group closed). Stage
two needs the episodes selected for one optimiser step: division by the step's standard deviation if asked
for, and RED (:func:`weigh_selection`). :func:`assign_credit` is both at once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence

import msgspec

from cod_async.algo.advantages import STD_EPSILON, Degenerate, GroupBaseline
from cod_async.algo.red import red_temperature, reweight
from cod_async.algo.returns import lifecycle_returns
from cod_async.algo.statistics import sample_std
from cod_async.config.schema import CreditAssignmentConfig
from cod_async.lifecycle.segment import EpisodeKind

BATCH_SET = "batch"
"""Name of the one RED set at level ``batch``."""


class MemberRewards(msgspec.Struct, frozen=True):
    """The rewards of one lifecycle of a group.

    Attributes:
        member: index in the group.
        task_rewards: finished solve episodes, in order; shorter than the pack when the lifecycle was given
            up.
        update_rewards: finished update episodes, in order.
    """

    member: int
    task_rewards: tuple[float, ...]
    update_rewards: tuple[float, ...]


class EpisodeCredit(msgspec.Struct, frozen=True):
    """What stage one says about one episode. ``advantage`` is before the step's std and before RED."""

    member: int
    kind: EpisodeKind
    position: int
    return_: float
    baseline: float
    advantage: float


class GroupCredit(msgspec.Struct, frozen=True):
    """Stage one of a group.

    Attributes:
        episodes: members in the order given, episodes by ordinal; episodes whose return never closed are
            missing.
        baselines: the frozen baseline per (kind, position), for members that come later.
    """

    episodes: tuple[EpisodeCredit, ...]
    baselines: dict[tuple[str, int], GroupBaseline]

    @property
    def degenerate(self) -> dict[tuple[str, int], Degenerate]:
        """The (kind, position) places that carry no signal, and why."""
        return {place: b.degenerate for place, b in self.baselines.items() if b.degenerate is not None}


class SelectedEpisode(msgspec.Struct, frozen=True):
    """One episode of a step's selection, as stage two needs it.

    Attributes:
        return_: its return (for the step's standard deviation).
        advantage: from stage one.
        num_tokens: its generated tokens.
        pack: id of its group or pack (RED level ``pack``).
        taskset: its environment or taskset (RED level ``taskset``).
        lifecycle: id of its lifecycle inside the pack (one value per lifecycle with the non-causal baseline).
    """

    return_: float
    advantage: float
    num_tokens: int
    pack: Hashable
    taskset: Hashable = None
    lifecycle: Hashable = None


class SelectionCredit(msgspec.Struct, frozen=True):
    """Stage two of a step.

    Attributes:
        advantages: after the step's standard deviation (if any), in the order given.
        weighted_advantages: after RED; what the learner trains on.
        red_temperatures: (set, temperature or None) in order of first appearance; empty when RED is off.
        std: the step's standard deviation of returns, or None when not asked for.
    """

    advantages: tuple[float, ...]
    weighted_advantages: tuple[float, ...]
    red_temperatures: tuple[tuple[Hashable, float | None], ...]
    std: float | None


def credit_member(
    member: MemberRewards,
    pack_size: int,
    baselines: Mapping[tuple[str, int], GroupBaseline],
    settings: CreditAssignmentConfig,
    *,
    is_late: bool = True,
) -> tuple[EpisodeCredit, ...]:
    """Credit one member against frozen baselines; places that the closed group never reached are left out."""
    returns = lifecycle_returns(member.task_rewards, member.update_rewards, pack_size, settings)
    kinds: tuple[EpisodeKind, EpisodeKind] = ("solve", "update")
    places = [(kind, j) for j in range(pack_size) for kind in kinds]
    return tuple(
        EpisodeCredit(
            member=member.member,
            kind=kind,
            position=position,
            return_=returns[kind, position],
            baseline=baselines[kind, position].baseline(returns[kind, position], settings, is_late=is_late),
            advantage=baselines[kind, position].advantage(returns[kind, position], settings, is_late=is_late),
        )
        for kind, position in places
        if (kind, position) in returns and (kind, position) in baselines
    )


def credit_group(
    members: Sequence[MemberRewards], pack_size: int, settings: CreditAssignmentConfig
) -> GroupCredit:
    """Stage one: returns, baselines and advantages of a closed group.

    Args:
        members: the lifecycles that are in when the group closes; one that was given up may be shorter.
        pack_size: tasks in a whole lifecycle.
        settings: style, baseline, and std ``none`` or ``group`` (``batch`` is stage two's).
    """
    by_place: dict[tuple[str, int], list[float]] = {}
    for member in members:
        returns = lifecycle_returns(member.task_rewards, member.update_rewards, pack_size, settings)
        for place, value in returns.items():
            by_place.setdefault(place, []).append(value)
    baselines = {place: GroupBaseline.of(values) for place, values in by_place.items()}
    episodes: list[EpisodeCredit] = []
    for member in members:
        episodes += credit_member(member, pack_size, baselines, settings, is_late=False)
    return GroupCredit(episodes=tuple(episodes), baselines=baselines)


def weigh_selection(
    selection: Sequence[SelectedEpisode], settings: CreditAssignmentConfig
) -> SelectionCredit:
    """Stage two: the step's standard deviation (std ``batch``) and RED over the step's sets.

    With the non-causal baseline the standard deviation counts each lifecycle once, since all of its episodes
    share one return.

    Raises:
        OverflowError: an advantage is too large for RED's exponential; scale the rewards down.
    """
    std = None
    advantages = [episode.advantage for episode in selection]
    if settings.std == "batch":
        if settings.baseline == "non_causal":
            returns = list({(e.pack, e.lifecycle): e.return_ for e in selection}.values())
        else:
            returns = [episode.return_ for episode in selection]
        std = sample_std(returns)
        advantages = [advantage / (std + STD_EPSILON) for advantage in advantages]
    if settings.red == "off":
        return SelectionCredit(tuple(advantages), tuple(advantages), (), std)
    sets: dict[Hashable, list[int]] = {}
    for index, episode in enumerate(selection):
        name = {"batch": BATCH_SET, "pack": episode.pack, "taskset": episode.taskset}[settings.red_level]
        sets.setdefault(name, []).append(index)
    weighted = list(advantages)
    temperatures: list[tuple[Hashable, float | None]] = []
    for name, indices in sets.items():
        temperature = red_temperature(
            [advantages[i] for i in indices],
            [selection[i].num_tokens for i in indices],
            parity=settings.parity,
        )
        temperatures.append((name, temperature))
        for i in indices:
            weighted[i] = reweight(advantages[i], temperature)
    return SelectionCredit(tuple(advantages), tuple(weighted), tuple(temperatures), std)


def assign_credit(
    groups: Sequence[tuple[Hashable, Sequence[MemberRewards], int]],
    num_tokens: Mapping[tuple[Hashable, int, EpisodeKind, int], int],
    settings: CreditAssignmentConfig,
    *,
    tasksets: Mapping[tuple[Hashable, int], Hashable] | None = None,
) -> tuple[list[tuple[Hashable, EpisodeCredit]], SelectionCredit]:
    """Both stages over whole groups that are selected together.

    Args:
        groups: (pack id, members, pack size) each.
        num_tokens: generated tokens by (pack id, member, kind, position).
        settings: the whole of credit assignment.
        tasksets: taskset by (pack id, member); missing ones count as one taskset, None.

    Returns:
        (pack id, stage-one credit) per episode, and stage two over them in the same order.
    """
    episodes = [
        (pack, episode)
        for pack, members, pack_size in groups
        for episode in credit_group(members, pack_size, settings).episodes
    ]
    selection = [
        SelectedEpisode(
            return_=episode.return_,
            advantage=episode.advantage,
            num_tokens=num_tokens[pack, episode.member, episode.kind, episode.position],
            pack=pack,
            taskset=(tasksets or {}).get((pack, episode.member)),
            lifecycle=episode.member,
        )
        for pack, episode in episodes
    ]
    return episodes, weigh_selection(selection, settings)
