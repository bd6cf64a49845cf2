"""Advantages: an episode's return minus what its group got at the same place.

The baseline is taken over the lifecycles of one group per (kind, position), one value per lifecycle. Two
groups carry no signal and are named instead of hidden: a ``singleton`` (nobody to compare with) and one with
``equal_returns``; both have advantage 0 and stay in the step, so that the token normalisation is that of the
data.

Source: arXiv 2606.20002 (group mean, the episode itself included, no standard deviation); leave-one-out and
the two standard deviations are options.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

import msgspec

from cod_async.algo.statistics import sample_std
from cod_async.config.schema import CreditAssignmentConfig

Degenerate = Literal["singleton", "equal_returns"]

STD_EPSILON = 1e-6
"""Added to a standard deviation before dividing by it."""


class GroupBaseline(msgspec.Struct, frozen=True):
    """The frozen statistics of one (kind, position) of a closed group.

    Attributes:
        num_members: lifecycles that entered (>= 1).
        total: sum of their returns.
        std: unbiased standard deviation of their returns.
        degenerate: why the group carries no signal, or None.
    """

    num_members: int
    total: float
    std: float
    degenerate: Degenerate | None

    @classmethod
    def of(cls, returns: Sequence[float]) -> GroupBaseline:
        """Freeze the baseline of a closed group from one return per member."""
        if len(returns) < 2:
            degenerate: Degenerate | None = "singleton"
        elif all(value == returns[0] for value in returns):
            degenerate = "equal_returns"
        else:
            degenerate = None
        return cls(len(returns), math.fsum(returns), sample_std(returns), degenerate)

    def baseline(self, return_: float, settings: CreditAssignmentConfig, *, is_late: bool = False) -> float:
        """Return the baseline of a member with return ``return_``.

        Args:
            return_: the member's own return.
            settings: ``leave_one_out`` leaves the member itself out; everything else is the group's mean.
            is_late: the member was not there when the group closed, so there is nothing of it to leave out.
        """
        if self.degenerate == "equal_returns" and not is_late:
            return return_  # exact 0 advantage; the mean of equal numbers may be off by a rounding
        if settings.baseline != "leave_one_out" or is_late:
            return self.total / self.num_members
        if self.num_members < 2:
            return return_
        return (self.total - return_) / (self.num_members - 1)

    def advantage(self, return_: float, settings: CreditAssignmentConfig, *, is_late: bool = False) -> float:
        """Return (return − baseline), divided by (group std + 1e-6) when ``settings.std`` is ``group``.

        A late member of a group whose returns were all equal is not divided: that spread is no scale for a
        return that did not enter it, and would make an advantage of a million.
        """
        advantage = return_ - self.baseline(return_, settings, is_late=is_late)
        if settings.std != "group" or (is_late and self.std <= STD_EPSILON):
            return advantage
        return advantage / (self.std + STD_EPSILON)
