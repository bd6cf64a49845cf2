"""How long what is running will still take, learned from what has ended.

For every environment and episode ordinal the newest few hundred lifecycles are kept: seconds from the start
of that episode to the end of the lifecycle. A running lifecycle's forecast is the quantile of those that took
longer than it has taken already, so it grows as the lifecycle overruns, and where none took longer there is
no forecast. Lifecycles that were cut off count with the time they had taken: without them the long ones would
never be learned. A group closes with its slowest member: if each of n members is in time with probability
q^(1/n), all are with probability q. Everything here is a guess that is made again after a restart; what keeps
the lag bound is selection.
"""

from __future__ import annotations

import time
from bisect import bisect_right, insort
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from cod_async.coordinator.planner import Closing

MAX_SAMPLES = 256
"""Lifecycles remembered per environment and episode ordinal."""
MIN_SAMPLES = 16
"""With fewer of them there is no forecast."""
LIKELY = 0.5
"""Share of groups that have closed by the likely end of their forecast."""
MAX_PLACES = 4096
"""Environments times ordinals remembered."""

World = tuple[str, str]
"""Environment and preset."""


class Samples:
    """The newest ``MAX_SAMPLES`` durations of one kind, in seconds."""

    def __init__(self) -> None:
        self._newest: deque[float] = deque()
        self._sorted: list[float] = []

    def add(self, seconds: float) -> None:
        """Add one; the oldest goes."""
        if len(self._newest) == MAX_SAMPLES:
            old = self._newest.popleft()
            del self._sorted[bisect_right(self._sorted, old) - 1]
        self._newest.append(seconds)
        insort(self._sorted, seconds)

    def __len__(self) -> int:
        """Number of durations known."""
        return len(self._newest)

    def quantile(self, share: float, longer_than_s: float = -1.0) -> float | None:
        """Return the smallest duration that at least ``share`` of those above ``longer_than_s`` do not
        exceed; None if there are none.
        """
        first = bisect_right(self._sorted, longer_than_s)
        num_left = len(self._sorted) - first
        if not num_left:
            return None
        return self._sorted[first + min(num_left - 1, int(share * num_left))]


class _Life(NamedTuple):
    """One running lifecycle: where its lease began, and the episode it is in since when."""

    world: World
    first_ordinal: int
    began_at: float
    ordinal: int
    since: float
    walls: tuple[tuple[int, float], ...]


class Forecast:
    """Durations learned online, and the running lifecycles.

    Args:
        share: of groups that shall finish within their forecast.
        now: monotonic clock in seconds.
    """

    def __init__(self, share: float, now: Callable[[], float] = time.monotonic) -> None:
        self._share = share
        self._now = now
        self._samples: dict[tuple[World, int], Samples] = {}
        self._lives: dict[tuple[int, int], _Life] = {}
        self._steps = Samples()

    # --------------------------------------------------------------------------------------------- learning

    def began(self, group: int, member: int, world: World, ordinal: int) -> None:
        """A lease was granted; the lifecycle goes on with episode ``ordinal``."""
        now = self._now()
        self._lives[group, member] = _Life(world, ordinal, now, ordinal, now, ())

    def sealed(self, group: int, member: int, next_ordinal: int, wall_s: float, is_last: bool) -> None:
        """A segment of a running lifecycle was committed; it took ``wall_s``."""
        life = self._lives.get((group, member))
        if life is None:
            return
        walls = (*life.walls, (life.ordinal, wall_s))
        if is_last:
            del self._lives[group, member]
            self._learn(life.world, walls, 0.0)
        else:
            self._lives[group, member] = life._replace(ordinal=next_ordinal, since=self._now(), walls=walls)

    def gone(self, group: int, member: int, *, is_cut_off: bool) -> None:
        """A lifecycle is not running any more. One that was cut off had not ended after all this time."""
        life = self._lives.pop((group, member), None)
        if life is not None and is_cut_off:
            elapsed_s = self._now() - life.since
            self._learn(life.world, (*life.walls, (life.ordinal, elapsed_s)), 0.0)

    def step_taken(self, seconds: float) -> None:
        """The learner took a step that cost so many seconds, waiting excluded."""
        if 0 <= seconds < float("inf"):
            self._steps.add(seconds)

    def _learn(self, world: World, walls: tuple[tuple[int, float], ...], rest_s: float) -> None:
        for ordinal, wall_s in reversed(walls):
            rest_s += wall_s
            at = world, ordinal
            if at not in self._samples and len(self._samples) >= MAX_PLACES:
                self._samples.clear()  # an environment with such lifecycles cannot be forecast anyway
            self._samples.setdefault(at, Samples()).add(rest_s)

    # ------------------------------------------------------------------------------------------ forecasting

    @property
    def step_s(self) -> float:
        """Median seconds of a step that does not wait; 0 when unknown."""
        return (self._steps.quantile(0.5) or 0.0) if len(self._steps) else 0.0

    def of_new(self, world: World, num_members: int, ordinal: int = 0) -> Closing | None:
        """Return the forecast for a group of which ``num_members`` start at episode ``ordinal`` now."""
        samples = self._samples.get((world, ordinal))
        if samples is None or len(samples) < MIN_SAMPLES:
            return None
        soon, late = (samples.quantile(share) for share in self._shares(num_members))
        return None if soon is None or late is None else Closing(soon, late)

    def of_running(self, group: int, members: Iterable[int]) -> Closing | None:
        """Return the forecast for an open group whose given members are running.

        None when nothing is known of one of them, or it has taken longer than any that ended.
        """
        lives = [self._lives.get((group, member)) for member in members]
        soon_s = late_s = 0.0
        now = self._now()
        for life in lives:
            samples = None if life is None else self._samples.get((life.world, life.ordinal))
            if life is None or samples is None or len(samples) < MIN_SAMPLES:
                return None
            elapsed_s = now - life.since
            soon, late = (samples.quantile(share, elapsed_s) for share in self._shares(len(lives)))
            if soon is None or late is None:
                return None
            soon_s, late_s = max(soon_s, soon - elapsed_s), max(late_s, late - elapsed_s)
        return Closing(soon_s, late_s)

    def overdue(self, factor: float) -> list[tuple[int, int]]:
        """Return the running (group, member) that have taken ``factor`` times what they should have."""
        now, found = self._now(), []
        for at, life in self._lives.items():
            samples = self._samples.get((life.world, life.first_ordinal))
            if samples is not None and len(samples) >= MIN_SAMPLES:
                usual_s = samples.quantile(self._share)
                if usual_s is not None and now - life.began_at > factor * usual_s:
                    found.append(at)
        return sorted(found)

    def _shares(self, num_members: int) -> tuple[float, float]:
        """Return one member's quantiles at which a group of so many has closed: likely, almost surely."""
        each = 1.0 / max(1, num_members)
        return LIKELY**each, self._share**each
