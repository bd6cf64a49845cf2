"""Sparse regression as the policy's instrument: fit sets of terms, rank the rounded equations by max error.

Every set of terms ("support") is fitted by least squares on raw columns with a tiny ridge; coefficients below
a threshold are dropped and the rest is fitted again. What is scored is the equation as it will be printed,
with its rounded coefficients, and the score is the largest absolute error on the data: no credit for fewer
terms. That the best score usually belongs to an equation with too many terms is a part of the difficulty, not
an oversight; a policy has to learn to compare smaller candidates.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Sequence

import msgspec
import numpy as np

from cod_async.envs.pde_discovery.basis import INDEX, TERMS, Array, Equation, features
from cod_async.envs.pde_discovery.equation import MIN_COEFFICIENT

RIDGE = 1e-8
"""Added to the diagonal of the normal equations."""
MIN_COLUMN_NORM = 1e-12
"""Terms whose column is smaller than this on the data are left out."""
MAX_CONDITION = 1e12
"""Largest condition number that is told apart from a singular matrix."""

Support = tuple[int, ...]
"""Indices of terms in the dictionary, ascending."""


class Candidate(msgspec.Struct, frozen=True):
    """A scored equation: its coefficients as written, and its largest absolute error on the data."""

    equation: Equation
    max_error: float


class Regression(msgspec.Struct, frozen=True):
    """Outcome of one regression.

    Attributes:
        candidates: distinct scored equations, best first (never empty).
        condition: condition number of the normalized columns of the best equation (1 .. 1e12).
    """

    candidates: tuple[Candidate, ...]
    condition: float

    @property
    def best(self) -> Candidate:
        """The candidate with the smallest error."""
        return self.candidates[0]

    def second(self) -> Candidate | None:
        """Return the best candidate with another set of terms than the best one, if there is one."""
        return alternative(self.candidates, self.best.equation)


def alternative(
    candidates: Sequence[Candidate], equation: Equation, is_order_confused: bool = False
) -> Candidate | None:
    """Return the best candidate whose set of terms differs from an equation's, or None.

    Args:
        candidates: best first.
        equation: which one they are to differ from.
        is_order_confused: compare the terms in dictionary order with those by length of their names, as the
            reference does: an equation of several terms then usually counts as its own alternative.
    """
    if is_order_confused:
        by_length = sorted(equation, key=lambda term: (-len(term), INDEX[term]))
        return next((c for c in candidates if list(c.equation) != by_length), None)
    return next((c for c in candidates if set(c.equation) != set(equation)), None)


def margin(max_error: float, other: Candidate | None) -> float:
    """Return by how much, relative to its own error, an equation beats another one.

    Returns:
        (other - own) / own; infinity if only the own error is 0; 0 without another one or if both are 0.
    """
    if other is None or other.max_error == max_error == 0.0:
        return 0.0
    return math.inf if max_error == 0.0 else (other.max_error - max_error) / max_error


def supports_of_dictionary(terms: Iterable[int], max_terms: int) -> list[Support]:
    """Return all non-empty sets of up to ``max_terms`` of the terms, small sets first."""
    chosen = sorted(set(terms))
    sizes = range(1, min(max_terms, len(chosen)) + 1)
    return [support for size in sizes for support in itertools.combinations(chosen, size)]


def regress(
    u: Array, y: Array, supports: Sequence[Support], threshold: float, is_rank_checked: bool = True
) -> Regression:
    """Fit and rank supports.

    Args:
        u: measured states, float64 [N], N >= 1.
        y: measured values of f(u), float64 [N].
        supports: sets of terms to fit, at least one.
        threshold: coefficients smaller than this are dropped, >= 0.
        is_rank_checked: see :func:`condition_number`.
    """
    columns = features(u)
    is_usable = np.linalg.norm(columns, axis=0) > MIN_COLUMN_NORM
    usable: Iterable[Support] = supports
    if not is_usable.all():
        usable = dict.fromkeys(tuple(k for k in support if is_usable[k]) for support in supports)
    fits = _fits(columns, y, usable, threshold)
    equations = [_as_printed(support, fit) for support, fit in fits.items()]
    errors = _max_errors(columns, y, equations)
    order = sorted(range(len(equations)), key=errors.__getitem__)  # stable: small supports first among equals
    ranked: dict[tuple[tuple[str, float], ...], Candidate] = {}
    for i in order:  # rounding may make two fits equal
        ranked.setdefault(tuple(equations[i].items()), Candidate(equations[i], errors[i]))
    candidates = tuple(ranked.values())
    best = [INDEX[term] for term in candidates[0].equation]
    return Regression(candidates, condition_number(columns[:, best], is_rank_checked))


def _as_printed(support: Support, fit: Sequence[float]) -> Equation:
    """Return a fit as it will be printed: three decimals, then three significant digits, without zeros."""
    equation: Equation = {}
    for index, value in zip(support, fit, strict=True):
        coefficient = round(value, 3)
        if not -1.0 < coefficient < 1.0:  # below, three decimals are three significant digits at most
            coefficient = float(f"{coefficient:.3g}")
        if abs(coefficient) > MIN_COEFFICIENT:
            equation[TERMS[index]] = coefficient
    return equation


def _max_errors(columns: Array, y: Array, equations: Sequence[Equation]) -> list[float]:
    """Return the largest absolute error of each equation on the data."""
    coefficients = np.zeros((len(TERMS), len(equations)))
    rows: list[int] = []
    places: list[int] = []
    values: list[float] = []
    for place, equation in enumerate(equations):
        rows += [INDEX[term] for term in equation]
        places += [place] * len(equation)
        values += equation.values()
    coefficients[rows, places] = values
    errors: list[float] = np.max(np.abs(y[:, None] - columns @ coefficients), axis=0).tolist()
    return errors


def condition_number(columns: Array, is_rank_checked: bool = True) -> float:
    """Return the condition number of columns scaled to norm 1, from 1 to 1e12.

    Args:
        columns: float64 [N, K].
        is_rank_checked: with fewer rows than columns the matrix is singular: 1e12. False takes the ratio of
            the min(N, K) singular values there are, which hides it (as the reference does).
    """
    num_rows, num_columns = columns.shape
    if num_columns == 0:
        return 1.0
    if is_rank_checked and num_rows < num_columns:
        return MAX_CONDITION
    norms = np.linalg.norm(columns, axis=0)
    values = np.linalg.svd(columns / np.maximum(norms, MIN_COLUMN_NORM), compute_uv=False)
    if values[-1] <= 1e-12:
        return MAX_CONDITION
    return float(min(max(values[0] / values[-1], 1.0), MAX_CONDITION))


def _fits(
    columns: Array, y: Array, supports: Iterable[Support], threshold: float
) -> dict[Support, list[float]]:
    """Fit supports, drop small coefficients and fit the rest again until none is small.

    Returns:
        The supports that are left (the empty one among them, if everything was dropped) and their fits.
    """
    fitter = _Fitter(columns, y)
    final: dict[Support, list[float]] = {}
    for support, fit in fitter.fit_all(supports):
        while min(map(abs, fit), default=math.inf) < threshold:  # each turn drops a term
            support = tuple(k for k, value in zip(support, fit, strict=True) if abs(value) >= threshold)
            fit = fitter.fit(support)
        final[support] = fit
    return final


class _Fitter:
    """Least squares with a tiny ridge on one data set."""

    def __init__(self, columns: Array, y: Array) -> None:
        self._columns, self._y = columns, y
        self._gram = columns.T @ columns + RIDGE * np.eye(columns.shape[1])
        self._right = columns.T @ y
        self._known: dict[Support, list[float]] = {(): []}

    def fit_all(self, supports: Iterable[Support]) -> list[tuple[Support, list[float]]]:
        """Fit many supports, those of equal size in one call; small ones come first."""
        by_size: dict[int, list[Support]] = {}
        for support in supports:
            by_size.setdefault(len(support), []).append(support)
        for size, group in by_size.items():
            if size == 0:
                continue
            index = np.array(group, dtype=np.intp)
            grams = self._gram[index[:, :, None], index[:, None, :]]
            try:
                fits = np.linalg.solve(grams, self._right[index][:, :, None])[:, :, 0].tolist()
            except np.linalg.LinAlgError:  # at least one is singular
                fits = [self._solve(support) for support in group]
            self._known.update(zip(group, fits, strict=True))
        return [(support, self._known[support]) for size in sorted(by_size) for support in by_size[size]]

    def fit(self, support: Support) -> list[float]:
        """Return the coefficients of one support."""
        if support not in self._known:
            self._known[support] = self._solve(support)
        return self._known[support]

    def _solve(self, support: Support) -> list[float]:
        index = list(support)
        try:
            solved = np.linalg.solve(self._gram[np.ix_(index, index)], self._right[index])
        except np.linalg.LinAlgError:
            solved = np.linalg.lstsq(self._columns[:, index], self._y, rcond=None)[0]
        fit: list[float] = solved.tolist()
        return fit
