"""Options of PDE Discovery: what a preset fixes and a config may override, checked all at once."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from cod_async.envs.checks import OptionCheck
from cod_async.envs.pde_discovery.basis import TERMS
from cod_async.envs.pde_discovery.families import FAMILIES, FamilyName, eligible

NAME = "pde_discovery"
MAX_STEPS = 50
"""Largest step budget that is accepted; it bounds the data and the snapshot of a pack."""
MAX_POINTS = 50
"""Largest sample budget of a task that is accepted, in points."""
MAX_TERMS = 4
"""Largest number of terms that is accepted; a dictionary regression fits all sets up to this size."""
MAX_MODES = 32
"""Most sine modes of an initial state that are accepted; the grid has 257 nodes."""
MAX_PACK_SIZE = 64
"""Largest pack; its data are listed in one observation."""


class PdeOptions(msgspec.Struct, frozen=True):
    """Checked options.

    Attributes:
        family: which data file of ``families/`` hidden equations are drawn from.
        min_terms, max_terms: number of terms of a hidden equation, both inclusive (1 .. 4); ``max_terms`` is
            also the largest set of terms that a dictionary regression fits.
        state_bound: B > 0; |u| stays below it. With the preset's value and its numbers of terms the
            calibrated amplitude is read from the family's file, otherwise it is computed (about a second).
        min_modes, max_modes: sine modes of an initial state, both inclusive.
        max_steps: most policy responses per task.
        max_points: points that may be sampled per task.
        u_noise: standard deviation of the noise on measured u, >= 0; the noise on y has a quarter of it.
        condition_threshold: kappa above which the regression reports a condition penalty, > 0.
        rows_per_pack: 0: data rows are (seed), and the world of a pack comes from its pack seed. S > 0: data
            rows are stratified, S consecutive rows name the world they belong to, and a pack may not mix
            worlds.
        parity: reproduce defects of the paper's reference implementation (the README lists them).
    """

    family: FamilyName
    min_terms: int
    max_terms: int
    state_bound: float
    min_modes: int
    max_modes: int
    max_steps: int
    max_points: int
    u_noise: float
    condition_threshold: float
    rows_per_pack: int
    parity: bool


def _preset(**changes: Any) -> dict[str, Any]:
    return {
        "family": "train",
        "min_terms": 1,
        "max_terms": 2,
        "state_bound": 3.0,
        "min_modes": 1,
        "max_modes": 2,
        "max_steps": 6,
        "max_points": 6,
        "u_noise": 0.002,
        "condition_threshold": 100.0,
        "rows_per_pack": 0,
        "parity": False,
        **changes,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "train": _preset(),
    "eval": _preset(family="eval", max_terms=3, rows_per_pack=8),
}
"""The paper's training setting, and its evaluation on sets of terms that training never meets."""

_INTEGERS = {
    "min_terms": (1, MAX_TERMS),
    "max_terms": (1, MAX_TERMS),
    "min_modes": (1, MAX_MODES),
    "max_modes": (1, MAX_MODES),
    "max_steps": (1, MAX_STEPS),
    "max_points": (1, MAX_POINTS),
    "rows_per_pack": (0, MAX_PACK_SIZE),
}
_NUMBERS = {"state_bound": (0.1, 10.0), "u_noise": (0.0, 10.0), "condition_threshold": (1.0, 1e12)}


def parse_options(options: Mapping[str, Any]) -> PdeOptions:
    """Check a preset merged with overrides; missing options are those of ``train``.

    Raises:
        EnvironmentInputError: every problem at once: unknown names, wrong types, values out of range,
            contradictions.
    """
    check = OptionCheck(NAME, PRESETS["train"], options)
    check.choices({"family": FAMILIES})
    check.integers(_INTEGERS)
    check.numbers(_NUMBERS)
    check.switches(("parity",))
    check.ordered({"min_terms": "max_terms", "min_modes": "max_modes"})
    values = check.values
    if not check.problems and not eligible(values["family"], values["min_terms"], values["max_terms"]):
        check.problems.append(
            f"family {values['family']} has no equation of {values['min_terms']} to {values['max_terms']} "
            f"terms (of {len(TERMS)} in the dictionary); widen min_terms and max_terms"
        )
    checked: dict[str, Any] = {k: float(v) if k in _NUMBERS else v for k, v in check.finish().items()}
    return PdeOptions(**checked)
