"""Options of Terminal: what a preset fixes and a config may override, checked all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cod_async.errors import EnvironmentInputError

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
    default = PRESETS["default"]
    problems: list[str] = []
    unknown = sorted(set(options) - set(default))
    if unknown:
        problems.append(f"unknown option {', '.join(unknown)}; options are {', '.join(sorted(default))}")
    values = {**default, **{key: options[key] for key in options if key in default}}
    max_steps, frac, parity = (values[key] for key in ("max_steps", "composite_frac", "parity"))
    if type(max_steps) is not int or not 1 <= max_steps <= MAX_STEPS:
        problems.append(f"max_steps is {max_steps!r}; it must be an integer from 1 to {MAX_STEPS}")
    if type(frac) not in (int, float) or not 0 <= frac <= 1:
        problems.append(f"composite_frac is {frac!r}; it must be a number from 0 to 1")
    if type(parity) is not bool:
        problems.append(f"parity is {parity!r}; it must be true or false")
    if problems:
        raise EnvironmentInputError([f"environment terminal: {problem}" for problem in problems])
    return TerminalOptions(max_steps=max_steps, composite_frac=float(frac), parity=parity)
