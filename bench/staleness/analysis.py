"""From finished runs to numbers: what they end at, how long they took, whether the lag cost anything.

*Late reward* is the mean over the positions after the first, the part that memory can earn. A run's training
curve is its late reward in a trailing window; it *reaches the bar* at the first whole window that is at the
bar or above, counted in steps taken, so the lag's delay between playing and training is part of it.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from typing import Any, Literal, NamedTuple

from bench.staleness.learning import RunResult, late_of
from bench.staleness.worlds import WORLDS, RunSpec

WINDOW_STEPS = 10
"""Steps in the window of a training curve."""
PAIRED_PACKS = 512
"""Runs with at least as many evaluation packs are the paired comparison, the others are the grid."""
MAX_LOSS = 0.05
"""Acceptance: upper 95 % bound of the loss in late reward."""
MAX_MORE_FRAC = 0.25
"""Acceptance: more steps to the bar than at lag 0, beside as many as the lag."""
T_95 = (
    6.314,
    2.920,
    2.353,
    2.132,
    2.015,
    1.943,
    1.895,
    1.860,
    1.833,
    1.812,
    1.796,
    1.782,
    1.771,
    1.761,
    1.753,
)
T_975 = (
    12.706,
    4.303,
    3.182,
    2.776,
    2.571,
    2.447,
    2.365,
    2.306,
    2.262,
    2.228,
    2.201,
    2.179,
    2.160,
    2.145,
    2.131,
)
"""The 0.95 and 0.975 quantiles of Student's t with 1, 2, 3 ... degrees of freedom."""

Outcome = Literal["learned", "unlearned", "slow", "stopped"]


def curve(rewards: Sequence[Sequence[float]]) -> list[float]:
    """Return the trailing mean of the late reward; element i is that of steps i .. i + WINDOW_STEPS - 1."""
    late = [late_of(row) for row in rewards]
    return [statistics.fmean(late[end - WINDOW_STEPS : end]) for end in range(WINDOW_STEPS, len(late) + 1)]


def steps_to_bar(result: RunResult) -> int | None:
    """Return the number of steps taken when the training curve first reached the bar of its world."""
    bar = WORLDS[result.spec.world].bar
    for index, value in enumerate(curve(result.steps.rewards)):
        if value >= bar:
            return index + WINDOW_STEPS
    return None


def outcome(result: RunResult) -> Outcome:
    """Return how a run ended.

    ``learned``: the last weights evaluate at the bar or above. ``unlearned``: they do not, although training
    had reached it: a collapse. ``slow``: never reached. ``stopped``: by numbers that are not finite.
    """
    if result.error or result.after is None:
        return "stopped"
    if result.after.late >= WORLDS[result.spec.world].bar:
        return "learned"
    return "slow" if steps_to_bar(result) is None else "unlearned"


def deepest_fall(result: RunResult) -> float:
    """Return how far the training curve fell at most below what it had reached before; 0 if never."""
    best = worst = 0.0
    for value in curve(result.steps.rewards):
        best = max(best, value)
        worst = max(worst, best - value)
    return worst


def metric_median(result: RunResult, name: str) -> float | None:
    """Return the median over the steps that trained on data as old as the lag; None without any."""
    values = [
        value
        for step, value in enumerate(result.steps.metrics.get(name, []))
        if value is not None and step >= result.spec.lag
    ]
    return statistics.median(values) if values else None


def metric_lowest(result: RunResult, name: str) -> float | None:
    """Return the smallest value over the run; None without any."""
    values = [value for value in result.steps.metrics.get(name, []) if value is not None]
    return min(values, default=None)


class Paired(NamedTuple):
    """A lag beside lag 0, over the seeds that both have.

    Attributes:
        recipe, world, lag, lr: what was compared.
        seeds: in order.
        late, late_0: late reward at the end, by seed.
        steps, steps_0: to the bar, by seed; None: never.
        loss: mean of late_0 - late.
        bound: its upper 95 % bound, one-sided: it is above it with a probability of 5 %. Student's t over
            seeds; infinite below two seeds, like the next.
        interval_end: upper end of the two-sided 95 % interval.
        more_steps: mean of steps, and the most that is allowed, from the mean of steps_0; None if one of the
            runs never reached the bar.
        is_met: both of the acceptance's bars.
    """

    recipe: str
    world: str
    lag: int
    lr: float
    seeds: list[int]
    late: list[float]
    late_0: list[float]
    steps: list[int | None]
    steps_0: list[int | None]
    loss: float
    bound: float
    interval_end: float
    more_steps: tuple[float, float] | None
    is_met: bool


def bound_of(differences: Sequence[float], quantiles: Sequence[float] = T_95) -> float:
    """Return an upper bound of a mean: of the mean, plus a quantile times its standard error.

    Args:
        differences: one for each seed; the bound of fewer than two is infinite.
        quantiles: of Student's t, by degrees of freedom; the last one holds for all that follow, where it is
            a little too large.
    """
    n = len(differences)
    if n < 2:
        return math.inf
    quantile = quantiles[min(n - 1, len(quantiles)) - 1]
    return statistics.fmean(differences) + quantile * statistics.stdev(differences) / math.sqrt(n)


def pair(results: Iterable[RunResult]) -> list[Paired]:
    """Compare every lag with lag 0, among runs that are equal but for lag and seed."""
    cells: dict[tuple[Any, ...], dict[int, dict[int, RunResult]]] = {}
    for result in results:
        spec = result.spec
        name = (spec.world, spec.recipe, spec.lr, spec.num_steps, spec.num_eval_packs)
        cells.setdefault(name, {}).setdefault(spec.lag, {})[spec.seed] = result
    found = []
    for (world, recipe, lr, _, _), by_lag in cells.items():
        for lag in sorted(by_lag):
            seeds = sorted(by_lag[lag].keys() & by_lag.get(0, {}).keys())
            if lag and seeds:
                stale, fresh = ([by_lag[of][seed] for seed in seeds] for of in (lag, 0))
                found.append(_paired(recipe, world, lag, lr, seeds, stale, fresh))
    return found


def _paired(
    recipe: str,
    world: str,
    lag: int,
    lr: float,
    seeds: list[int],
    stale: Sequence[RunResult],
    fresh: Sequence[RunResult],
) -> Paired:
    late, late_0 = ([final_late(result) for result in results] for results in (stale, fresh))
    steps, steps_0 = ([steps_to_bar(result) for result in results] for results in (stale, fresh))
    differences = [before - after for before, after in zip(late_0, late, strict=True)]
    reached, reached_0 = ([n for n in of if n is not None] for of in (steps, steps_0))
    more_steps = None
    if len(reached) == len(reached_0) == len(seeds):
        allowed = (1 + MAX_MORE_FRAC) * statistics.fmean(reached_0) + lag
        more_steps = (statistics.fmean(reached), allowed)
    bound, interval_end = bound_of(differences), bound_of(differences, T_975)
    is_fast = more_steps is not None and more_steps[0] <= more_steps[1]
    return Paired(
        recipe, world, lag, lr, seeds, late, late_0, steps, steps_0,
        statistics.fmean(differences), bound, interval_end, more_steps, is_fast and bound <= MAX_LOSS,
    )  # fmt: skip


def final_late(result: RunResult) -> float:
    """Return the late reward of the last weights; 0 if they cannot be played, the least there is."""
    return 0.0 if result.after is None else result.after.late


class Cell(NamedTuple):
    """Runs of one recipe at one lag, over seeds.

    Attributes:
        num: runs.
        late: mean late reward at the end; ``late_worst`` that of the worst seed.
        outcomes: runs by outcome.
        steps: mean steps to the bar over the runs that reached it, or None; ``num_reached`` of them.
        fall: deepest fall of a training curve, over seeds.
        drift: median over steps, then mean over seeds, of the KL drift per version, in nats; None at lag 0.
        staleness: the same of the KL itself, between the policy that spoke and the one trained.
        ess: the same of the effective sample fraction; ``ess_lowest`` its lowest step of any seed.
        masked: the same of the fraction of tokens without pull.
    """

    num: int
    late: float
    late_worst: float
    outcomes: dict[str, int]
    steps: float | None
    num_reached: int
    fall: float
    drift: float | None
    staleness: float | None
    ess: float | None
    ess_lowest: float | None
    masked: float | None

    @property
    def num_learned(self) -> int:
        """Runs whose last weights are at the bar."""
        return self.outcomes.get("learned", 0)


def cell(results: Sequence[RunResult]) -> Cell:
    """Summarize runs that are equal but for the seed."""
    late = [final_late(result) for result in results]
    reached = [steps for result in results if (steps := steps_to_bar(result)) is not None]
    outcomes: dict[str, int] = {}
    for result in results:
        outcomes[outcome(result)] = outcomes.get(outcome(result), 0) + 1
    lowest = [value for r in results if (value := metric_lowest(r, "ess_frac")) is not None]

    def median_of(name: str) -> float | None:
        values = [value for result in results if (value := metric_median(result, name)) is not None]
        return statistics.fmean(values) if values else None

    return Cell(
        num=len(results),
        late=statistics.fmean(late),
        late_worst=min(late),
        outcomes=outcomes,
        steps=statistics.fmean(reached) if reached else None,
        num_reached=len(reached),
        fall=max(deepest_fall(result) for result in results),
        drift=median_of("kl_drift_per_version_nats"),
        staleness=median_of("staleness_k3_nats"),
        ess=median_of("ess_frac"),
        ess_lowest=min(lowest, default=None),
        masked=median_of("masked_frac"),
    )


def grids(results: Iterable[RunResult]) -> dict[tuple[str, float], dict[str, dict[int, list[RunResult]]]]:
    """Return (world, rate) -> recipe -> lag -> runs by seed, of all that is not the paired comparison."""
    found: dict[tuple[str, float], dict[str, dict[int, list[RunResult]]]] = {}
    for result in sorted(results, key=_order):
        spec = result.spec
        if spec.num_eval_packs < PAIRED_PACKS:
            by_recipe = found.setdefault((spec.world, spec.lr), {})
            by_recipe.setdefault(spec.recipe, {}).setdefault(spec.lag, []).append(result)
    return found


def _order(result: RunResult) -> tuple[str, float, int, int]:
    spec: RunSpec = result.spec
    return (spec.world, spec.lr, spec.lag, spec.seed)
