"""Families of hidden equations: which terms occur together with which signs, and how large u may start.

A family is a data file in ``families/`` with its templates (signs only, magnitudes are drawn per pack). The
largest initial amplitude U for which every equation of a family stays inside the state bound is found by
bisection over all corners of the box of magnitudes. It is the same for all packs, takes seconds, and decides
every world, so the file carries it for the settings of the presets; for other settings it is computed once
and remembered under the digest of what it depends on.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
import json
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from cod_async.envs.base import canonical_json
from cod_async.envs.pde_discovery.basis import INDEX, Equation, Reaction
from cod_async.envs.pde_discovery.solver import COARSE_T, COARSE_X, is_stable
from cod_async.errors import EnvironmentInputError

_FOLDER = Path(__file__).parent / "families"

FamilyName = Literal["train", "eval"]
FAMILIES: tuple[FamilyName, ...] = ("train", "eval")
"""Families that are shipped."""

MIN_MAGNITUDE, MAX_MAGNITUDE = 0.5, 2.0
"""Magnitudes of coefficients are drawn from this interval and rounded to two decimals."""
NUM_BISECTION_PARTS = 64
"""The amplitude is bisected until it is known to a 64th of the state bound."""

Template = dict[str, int]
"""Term -> sign (+1 or -1), in dictionary order."""


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What a file's largest amplitude was computed for, and the amplitude U itself."""

    min_terms: int
    max_terms: int
    state_bound: float
    max_amplitude: float


class Family(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One data file."""

    name: str
    description: str
    calibration: Calibration
    templates: tuple[Template, ...]


@functools.cache
def load(name: FamilyName) -> Family:
    """Read a shipped family.

    Raises:
        EnvironmentInputError: no such family, or the file is broken (the message says how).
    """
    if name not in FAMILIES:
        raise EnvironmentInputError(f"no family {name!r}; families are {', '.join(FAMILIES)}")
    path = _FOLDER / f"{name}.json"
    try:
        family = msgspec.json.decode(path.read_bytes(), type=Family, strict=True)
    except (OSError, msgspec.DecodeError) as error:
        raise EnvironmentInputError(f"family file {path}: {error}; install the package again") from error
    problems = [
        f"family file {path}: template {number} is {template}; it needs known terms in dictionary order with "
        "signs 1 or -1"
        for number, template in enumerate(family.templates)
        if not template
        or not set(template) <= set(INDEX)
        or list(template) != sorted(template, key=INDEX.__getitem__)
        or not set(template.values()) <= {1, -1}
    ]
    if problems:
        raise EnvironmentInputError(problems)
    return family


def eligible(name: FamilyName, min_terms: int, max_terms: int) -> tuple[Template, ...]:
    """Return the templates of a family with ``min_terms`` to ``max_terms`` terms, in file order."""
    return tuple(t for t in load(name).templates if min_terms <= len(t) <= max_terms)


def digest(templates: tuple[Template, ...]) -> str:
    """Return the SHA-256 of templates and their order, as 64 hex digits."""
    return hashlib.sha256(
        canonical_json([list(template.items()) for template in templates]).encode()
    ).hexdigest()


def max_amplitude(name: FamilyName, min_terms: int, max_terms: int, state_bound: float) -> float:
    """Return U, the largest initial amplitude at which all eligible equations stay inside the bound.

    Args:
        name: family.
        min_terms: fewest terms of the templates that count.
        max_terms: most terms of the templates that count.
        state_bound: B > 0; |u| must stay below it.

    Raises:
        EnvironmentInputError: no template is eligible, or no positive amplitude is safe.
    """
    known = load(name).calibration
    if (known.min_terms, known.max_terms, known.state_bound) == (min_terms, max_terms, state_bound):
        return known.max_amplitude
    return calibrate(json.dumps(eligible(name, min_terms, max_terms)), state_bound)


@functools.lru_cache(maxsize=32)
def calibrate(templates_json: str, state_bound: float) -> float:
    """Find U by bisection, from nothing but templates and bound (pure; some seconds on one core).

    Args:
        templates_json: templates as a JSON list of maps, so that the call can be remembered.
        state_bound: B > 0.

    Returns:
        The safe end of the last bracket, a multiple of B / 64 below B.

    Raises:
        EnvironmentInputError: there are no templates, or no positive amplitude was found safe.
    """
    templates: list[Template] = json.loads(templates_json)
    if not templates:
        raise EnvironmentInputError("pde_discovery: no template of the family has an allowed number of terms")
    reaction = Reaction(corners(templates))
    num_columns = sum(2 ** len(template) for template in templates)
    bump = np.sin(np.pi * np.linspace(0.0, 1.0, COARSE_X))
    safe, unsafe = 0.0, state_bound
    while unsafe - safe > state_bound / NUM_BISECTION_PARTS:  # six halvings
        middle = (safe + unsafe) / 2.0
        initial = np.repeat(middle * bump[:, None], num_columns, axis=1)
        if is_stable(initial, reaction, COARSE_T, state_bound, has_bounded_right=False):
            safe = middle
        else:
            unsafe = middle
    if safe <= 0.0:
        raise EnvironmentInputError(
            f"pde_discovery: state_bound is {state_bound}; no initial amplitude keeps all equations in it"
        )
    return safe


def corners(templates: list[Template]) -> list[Equation]:
    """Return, template by template, the equations with every magnitude at one end of its interval."""
    return [
        {term: sign * magnitude for (term, sign), magnitude in zip(template.items(), magnitudes, strict=True)}
        for template in templates
        for magnitudes in itertools.product((MIN_MAGNITUDE, MAX_MAGNITUDE), repeat=len(template))
    ]
