"""Options of Terminal: what a preset fixes and a config may override, checked all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cod_async.envs.checks import OptionCheck

MAX_STEPS = 1_000
"""Largest step budget that is accepted."""

PRESETS: dict[str, dict[str, Any]] = {
    "default": {"max_steps": 12, "composite_frac": 0.5, "parity": False},
}
"""The paper's evaluation setting."""


class TerminalOptions(msgspec.Struct, frozen=True):
    """Checked options.

    Attributes:
        max_steps: most policy responses (command lines) per task, 1 .. 1000.
        composite_frac: probability that a task is one of the eight composite types, 0 .. 1.
        parity: keep the simulator defects of the paper's reference (the README lists them) instead of doing
            what a real shell does.
    """

    max_steps: int
    composite_frac: float
    parity: bool


def parse_options(options: Mapping[str, Any]) -> TerminalOptions:
    """Check a preset merged with overrides; missing options are those of ``default``.

    Raises:
        EnvironmentInputError: every problem at once: unknown names, wrong types, values out of range.
    """
    check = OptionCheck("terminal", PRESETS["default"], options)
    check.integers({"max_steps": (1, MAX_STEPS)})
    check.numbers({"composite_frac": (0, 1)})
    check.switches(("parity",))
    values = check.finish()
    return TerminalOptions(**{**values, "composite_frac": float(values["composite_frac"])})
