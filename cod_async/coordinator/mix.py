"""Is what is trained a fair sample of what was generated? The two mixes compared, over a window of steps.

*Generated* are the segments whose fate is known: trained for the first time, or dropped. What is still under
way is left out, because a pipeline always holds more early positions than late ones. The difference between
two mixes is their total variation, half the sum of |p - q| over all places, between 0 (the same) and 1. The
counts of every step stand in its report, so that a restarted coordinator has the window again.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import msgspec

MIN_STEPS = 10
"""Fewer steps say nothing about a mix, unless the window is shorter."""
REJOINED = 0.5
"""Mixes that parted have met again at this share of the threshold."""


class Place(NamedTuple):
    """What the mix knows of a segment: its episode kind, its position, its length."""

    kind: str
    position: int
    num_action_tokens: int


class MixCounts(msgspec.Struct):
    """Segments by place (``solve/0``) and by length (power of two of the action tokens, rounded down)."""

    trained: dict[str, int] = {}
    dropped: dict[str, int] = {}
    trained_lengths: dict[str, int] = {}
    dropped_lengths: dict[str, int] = {}

    def count(self, places: Iterable[Place], *, is_trained: bool) -> None:
        """Count segments that have met their fate."""
        by_place = self.trained if is_trained else self.dropped
        by_length = self.trained_lengths if is_trained else self.dropped_lengths
        for place in places:
            name, length = f"{place.kind}/{place.position}", str(place.num_action_tokens.bit_length())
            by_place[name] = by_place.get(name, 0) + 1
            by_length[length] = by_length.get(length, 0) + 1


class MixGap(NamedTuple):
    """Total variation between trained and generated: of positions, of lengths; None when nothing was."""

    positions: float | None
    lengths: float | None

    @property
    def worst(self) -> float:
        """The larger of the two, 0 when neither is known."""
        return max((gap for gap in self if gap is not None), default=0.0)


class MixWindow:
    """The counts of the last steps.

    Args:
        num_steps: length of the window.
    """

    def __init__(self, num_steps: int) -> None:
        self._steps: deque[MixCounts] = deque(maxlen=num_steps)
        self._sum: dict[str, Counter[str]] = {name: Counter() for name in MixCounts.__struct_fields__}

    def restore(self, reports: Iterable[Mapping[str, Any]]) -> None:
        """Take the window from the reports of the last steps, oldest first."""
        self._steps.clear()
        self._sum = {name: Counter() for name in MixCounts.__struct_fields__}
        for report in reports:
            try:
                self.add(msgspec.convert(report.get("mix", {}), MixCounts))
            except msgspec.ValidationError:
                continue  # a report of another version

    @property
    def has_enough(self) -> bool:
        """Whether the window holds enough steps for an event."""
        return len(self._steps) >= min(MIN_STEPS, self._steps.maxlen or MIN_STEPS)

    def add(self, counts: MixCounts) -> MixGap:
        """Add a step, forget the one that leaves the window, and compare."""
        if len(self._steps) == self._steps.maxlen:
            for name, total in self._sum.items():
                total.subtract(getattr(self._steps[0], name))
        self._steps.append(counts)
        for name, total in self._sum.items():
            total.update(getattr(counts, name))
        return MixGap(
            _gap(self._sum["trained"], self._sum["dropped"]),
            _gap(self._sum["trained_lengths"], self._sum["dropped_lengths"]),
        )


def _gap(trained: Counter[str], dropped: Counter[str]) -> float | None:
    """Return the total variation between ``trained`` and ``trained + dropped``, each as shares."""
    num_trained, num_dropped = trained.total(), dropped.total()
    if not num_trained:
        return None
    num_generated = num_trained + num_dropped
    return 0.5 * sum(
        abs(trained[name] / num_trained - (trained[name] + dropped[name]) / num_generated)
        for name in trained.keys() | dropped.keys()
    )


def gap_event(gap: MixGap, threshold: float, *, has_parted: bool) -> str:
    """Return the event that a new gap is: ``mix_parted``, ``mix_rejoined``, or nothing new."""
    if not has_parted and gap.worst > threshold:
        return "mix_parted"
    if has_parted and gap.worst <= REJOINED * threshold:
        return "mix_rejoined"
    return ""
