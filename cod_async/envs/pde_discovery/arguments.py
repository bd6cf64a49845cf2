"""Arguments of the four actions: strings and lists from the XML reader become checked values.

What is wrong here is a slip that the policy can repair: it is told what was expected and loses one step.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np

from cod_async.envs.pde_discovery.basis import INDEX, TERMS, Array, Equation
from cod_async.envs.pde_discovery.equation import has_symbols, parse, read_support
from cod_async.envs.pde_discovery.regression import Support, supports_of_dictionary
from cod_async.envs.pde_discovery.state import DataSet

LIST_TAGS = frozenset({"point_grid", "dictionary", "candidate_equations", "uncertain_terms"})
"""Arguments whose child elements form a list."""
DEFAULT_THRESHOLD = 0.05
MAX_CANDIDATES = 8
MAX_UNCERTAIN_TERMS = 4

_NUMBER = re.compile(r"[+-]?(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:[eE][+-]?[0-9]+)?", re.ASCII)
_RANGE = re.compile(r"merged_t([0-9]{1,3})_t([0-9]{1,3})", re.ASCII)
_MAX_SHOWN_CHARS = 60


class ArgumentMistake(Exception):
    """An argument that the policy may correct in its next step; the message tells how."""


class RegressionRequest(msgspec.Struct, frozen=True):
    """A checked ``run_sparse_regression``: which data, which sets of terms, and the threshold."""

    data_sets: tuple[DataSet, ...]
    supports: tuple[Support, ...]
    threshold: float


def quoted(value: Any) -> str:
    """Return a value of the policy's for a message: printable and short."""
    text = ascii(value)
    return text if len(text) <= _MAX_SHOWN_CHARS else text[:_MAX_SHOWN_CHARS] + "..."


def check_names(arguments: Mapping[str, Any], known: Sequence[str]) -> None:
    """Refuse arguments that an action does not have."""
    unknown = [name for name in arguments if name not in known]
    if unknown:
        raise ArgumentMistake(f"unknown argument {quoted(unknown[0])}; arguments are {', '.join(known)}")


def number(value: Any, name: str) -> float:
    """Read a decimal number such as 0.25 or 1e-3."""
    if isinstance(value, str) and len(value) <= 64 and _NUMBER.fullmatch(value.strip()):
        result = float(value)
        if math.isfinite(result):
            return result
    raise ArgumentMistake(f"{name} is {quoted(value)}; it must be a finite decimal number")


def points(value: Any, num_left: int) -> tuple[Array, Array]:
    """Read a ``point_grid``: x and t, float64 [N] each, 1 <= N <= ``num_left``."""
    example = '<point_grid><point x="0.4" t="0.01"/></point_grid>'
    if not isinstance(value, list) or not value:
        raise ArgumentMistake(f"point_grid must hold one or more point elements: {example}")
    if len(value) > num_left:
        raise ArgumentMistake(f"{len(value)} points were asked for, but {num_left} are left in this task")
    coordinates = []
    for place, point in enumerate(value, start=1):
        if not isinstance(point, dict) or set(point) != {"x", "t"}:
            raise ArgumentMistake(f"point {place} must have exactly x and t: {example}")
        x, t = number(point["x"], f"x of point {place}"), number(point["t"], f"t of point {place}")
        if not 0.0 < x < 1.0:
            raise ArgumentMistake(f"x of point {place} is {x:g}; it must lie inside 0 < x < 1")
        if not 0.0 <= t <= 1.0:
            raise ArgumentMistake(f"t of point {place} is {t:g}; it must lie in 0 <= t <= 1")
        coordinates.append((x, t))
    grid = np.array(coordinates, dtype=np.float64)
    return grid[:, 0], grid[:, 1]


def texts(value: Any, name: str, most: int) -> list[str]:
    """Read a list of at least one and at most ``most`` texts."""
    if not isinstance(value, list) or not value or not all(isinstance(item, str) for item in value):
        raise ArgumentMistake(f"{name} must hold one or more elements with text, such as <item>u**3</item>")
    if len(value) > most:
        raise ArgumentMistake(f"{name} has {len(value)} entries; at most {most} are allowed")
    return value


def terms(value: Any, name: str, most: int = len(TERMS)) -> list[int]:
    """Read a list of terms of the dictionary, as their indices."""
    found = []
    for text in texts(value, name, most):
        index = INDEX.get("".join(text.split()).lower())
        if index is None:
            raise ArgumentMistake(f"{name}: {quoted(text)} is not a term; terms are {', '.join(TERMS)}")
        found.append(index)
    return found


def is_true(value: Any, name: str) -> bool:
    """Read true or false."""
    word = value.strip().lower() if isinstance(value, str) else ""
    if word not in ("true", "false"):
        raise ArgumentMistake(f"{name} is {quoted(value)}; it must be true or false")
    return word == "true"


def chosen_data(value: Any, data_sets: Sequence[DataSet]) -> tuple[DataSet, ...]:
    """Find the data sets that a ``dataset_id`` names: all, those of a range of tasks, or one."""
    if not data_sets:
        raise ArgumentMistake("there are no data yet; use sample_pde_data first")
    if value in ("merged_all", "merged"):
        return tuple(data_sets)
    tasks = _RANGE.fullmatch(value) if isinstance(value, str) else None
    if tasks:
        first, last = sorted((int(tasks.group(1)), int(tasks.group(2))))
        found = tuple(one for one in data_sets if first <= one.task <= last)
    else:
        found = tuple(one for one in data_sets if one.name == value)
    if not found:
        names = ", ".join(one.name for one in data_sets)
        raise ArgumentMistake(f"no data set {quoted(value)}; there are merged_all, {names}")
    return found


def regression_request(
    arguments: Mapping[str, Any], data_sets: Sequence[DataSet], max_terms: int, has_alpha: bool
) -> RegressionRequest:
    """Read the arguments of ``run_sparse_regression``.

    Args:
        arguments: as written.
        data_sets: all data of the pack.
        max_terms: largest set of terms of a dictionary regression.
        has_alpha: whether an argument ``alpha`` exists (it has no effect).
    """
    known = [
        "dataset_id",
        "dictionary",
        "candidate_equations",
        "threshold",
        *(["alpha"] if has_alpha else []),
    ]
    check_names(arguments, known)
    for name in ("threshold", "alpha"):
        if name in arguments and number(arguments[name], name) < 0:
            raise ArgumentMistake(f"{name} is {quoted(arguments[name])}; it must not be negative")
    threshold = number(arguments["threshold"], "threshold") if "threshold" in arguments else DEFAULT_THRESHOLD
    chosen = chosen_data(arguments.get("dataset_id", "merged_all"), data_sets)
    dictionary = terms(arguments["dictionary"], "dictionary") if "dictionary" in arguments else None
    if "candidate_equations" not in arguments:
        every = range(len(TERMS)) if dictionary is None else dictionary
        return RegressionRequest(chosen, tuple(supports_of_dictionary(every, max_terms)), threshold)
    supports = []
    for text in texts(arguments["candidate_equations"], "candidate_equations", MAX_CANDIDATES):
        names = read_support(text)
        if names is None:
            raise ArgumentMistake(
                f"candidate {quoted(text)} is not a sum of terms such as 0.8*u**2 + 1.1*u**7"
            )
        support = tuple(INDEX[name] for name in names if dictionary is None or INDEX[name] in dictionary)
        if support:
            supports.append(support)
    if not supports:
        raise ArgumentMistake("no candidate has a term of the given dictionary")
    return RegressionRequest(chosen, tuple(dict.fromkeys(supports)), threshold)


def preferred_equation(arguments: Mapping[str, Any]) -> Equation:
    """Read the arguments of ``update_scientific_context``: the equation to commit."""
    check_names(arguments, ("preferred_equation", "note", "uncertain_terms"))
    text = arguments.get("preferred_equation")
    if not isinstance(text, str) or not text.strip():
        raise ArgumentMistake("preferred_equation is missing; write the equation to commit, as text")
    if not isinstance(arguments.get("note", ""), str):
        raise ArgumentMistake("note must be a single text")
    if "uncertain_terms" in arguments:
        terms(arguments["uncertain_terms"], "uncertain_terms", MAX_UNCERTAIN_TERMS)
    equation = parse(text)
    if equation is None and has_symbols(text):
        raise ArgumentMistake(f"{quoted(text)} has symbols for coefficients; write the fitted numbers")
    if equation is None:
        raise ArgumentMistake(f"{quoted(text)} is not an equation; write it as the regression prints it")
    return equation
