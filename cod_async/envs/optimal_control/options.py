"""Options of Optimal Control: what a preset fixes and a config may override, checked all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cod_async.envs.checks import OptionCheck
from cod_async.envs.optimal_control.dynamics import b_candidates, b_lengths

MAX_HORIZON = 64
"""Longest horizon, in steps; the best open-loop controls still fit an expression."""


class ControlOptions(msgspec.Struct, frozen=True):
    """Checked options.

    Attributes:
        horizon: steps of every task (1 .. 64).
        x0_max, v0_max, x_target_max: initial position, initial velocity and target position of the data
            records are uniform within plus and minus these.
        a_min, a_max: the hidden ``a`` of a pack is uniform in this range.
        b_min, b_max, b_margin: the hidden ``b`` is uniform in this range without (-b_margin, b_margin).
        effort_weight: weight of the sum of squared controls in the loss.
        process_noise_std: standard deviation of Gaussian noise added to the velocity at each step.
        is_previous_controller_shown: whether the task message repeats the lifecycle's last controller that
            ran to the end, with its task and outcome.
        format_error_reward: reward of a response without a readable controller (-1 .. 0).
        action_error_reward: reward of a controller that fails during the rollout (-1 .. 0).
        parity: keep the quirks of the paper's reference implementation that the README lists.
    """

    horizon: int
    x0_max: float
    v0_max: float
    x_target_max: float
    a_min: float
    a_max: float
    b_min: float
    b_max: float
    b_margin: float
    effort_weight: float
    process_noise_std: float
    is_previous_controller_shown: bool
    format_error_reward: float
    action_error_reward: float
    parity: bool

    @property
    def a_range(self) -> tuple[float, float]:
        """(a_min, a_max)."""
        return self.a_min, self.a_max

    @property
    def b_range(self) -> tuple[float, float]:
        """(b_min, b_max)."""
        return self.b_min, self.b_max

    @property
    def b_signs(self) -> tuple[bool, bool]:
        """Whether a negative and whether a positive ``b`` is possible."""
        left, right = b_lengths(self.b_range, self.b_margin)
        if left == right == 0.0:
            candidates = b_candidates(self.b_range, self.b_margin)
            return min(candidates) < 0.0, max(candidates) > 0.0
        return left > 0.0, right > 0.0


def _preset(horizon: int, x0_max: float, v0_max: float, x_target_max: float) -> dict[str, Any]:
    return {
        "horizon": horizon,
        "x0_max": x0_max,
        "v0_max": v0_max,
        "x_target_max": x_target_max,
        "a_min": 0.55,
        "a_max": 1.2,
        "b_min": -1.5,
        "b_max": 1.5,
        "b_margin": 0.35,
        "effort_weight": 0.03,
        "process_noise_std": 0.0,
        "is_previous_controller_shown": True,
        "format_error_reward": -0.1,
        "action_error_reward": 0.0,
        "parity": False,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "easy": _preset(8, 1.0, 0.5, 3.0),
    "medium": _preset(12, 2.0, 1.0, 5.0),
    "hard": _preset(12, 2.0, 1.5, 8.0),
}
"""Three sizes of task over the same hidden worlds; ``hard`` is the paper's setting."""

_RANGES = {
    "x0_max": (0.0, 1000.0),
    "v0_max": (0.0, 1000.0),
    "x_target_max": (0.0, 1000.0),
    "a_min": (-2.0, 2.0),
    "a_max": (-2.0, 2.0),
    "b_min": (-10.0, 10.0),
    "b_max": (-10.0, 10.0),
    "b_margin": (0.0, 10.0),
    "effort_weight": (1e-6, 100.0),
    "process_noise_std": (0.0, 10.0),
    "format_error_reward": (-1.0, 0.0),
    "action_error_reward": (-1.0, 0.0),
}
_FLAGS = ("is_previous_controller_shown", "parity")


def parse_options(options: Mapping[str, Any]) -> ControlOptions:
    """Check a preset merged with overrides; missing options are those of ``hard``.

    Raises:
        EnvironmentInputError: every problem at once: unknown names, wrong types, values out of range,
            reversed ranges, no possible ``b``.
    """
    check = OptionCheck("optimal_control", PRESETS["hard"], options)
    check.integers({"horizon": (1, MAX_HORIZON)})
    check.numbers(_RANGES)
    check.switches(_FLAGS)
    check.ordered({"a_min": "a_max", "b_min": "b_max"})
    if not check.problems:
        check.problems += _impossible_b(check.values)
    checked: dict[str, Any] = {k: float(v) if k in _RANGES else v for k, v in check.finish().items()}
    return ControlOptions(**checked)


def _impossible_b(values: Mapping[str, Any]) -> list[str]:
    """Return what is wrong if no ``b`` of the range has the demanded magnitude."""
    b_range, margin = (float(values["b_min"]), float(values["b_max"])), float(values["b_margin"])
    if any(b_lengths(b_range, margin)) or b_candidates(b_range, margin):
        return []
    return [f"b_margin is {margin}, but no b from {b_range[0]} to {b_range[1]} has that magnitude; lower it"]
