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
from typing import overload

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


class Ranking(Sequence[Candidate]):
    """Scored equations, best first, of which only those that are looked at are ever built.

    Args:
        supports: sets of terms.
        printed: coefficients as written, those of each support one after the other.
        errors: largest absolute error of each.
        order: places in the other lists, best first.
    """

    def __init__(
        self,
        supports: Sequence[Support],
        printed: Sequence[float],
        errors: Sequence[float],
        order: Sequence[int],
    ) -> None:
        self._supports, self._printed = supports, printed
        self._errors, self._order = errors, order
        self._starts = list(itertools.accumulate(map(len, supports), initial=0))

    def __len__(self) -> int:
        return len(self._order)

    @overload
    def __getitem__(self, place: int) -> Candidate: ...
    @overload
    def __getitem__(self, place: slice) -> list[Candidate]: ...
    def __getitem__(self, place: int | slice) -> Candidate | list[Candidate]:
        if isinstance(place, slice):
            return [self[index] for index in range(len(self))[place]]
        i = self._order[place]
        values = self._printed[self._starts[i] : self._starts[i + 1]]
        pairs = zip(self._supports[i], values, strict=True)
        return Candidate({TERMS[k]: v for k, v in pairs if abs(v) > MIN_COEFFICIENT}, self._errors[i])


class Regression(msgspec.Struct, frozen=True):
    """Outcome of one regression.

    Attributes:
        candidates: distinct scored equations, best first (never empty).
        condition: condition number of the normalized columns of the best equation (1 .. 1e12).
    """

    candidates: Sequence[Candidate]
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
    printed = printed_digits([value for fit in fits.values() for value in fit])
    coefficients = _dense(list(fits), printed)
    errors: list[float] = np.max(np.abs(y[:, None] - columns @ coefficients), axis=0).tolist()
    order = sorted(range(len(errors)), key=errors.__getitem__)  # stable: small supports first among equals
    ranking = Ranking(list(fits), printed, errors, _without_repeats(order, errors, coefficients))
    best = [INDEX[term] for term in ranking[0].equation]
    return Regression(ranking, condition_number(columns[:, best], is_rank_checked))


def _dense(supports: Sequence[Support], printed: Sequence[float]) -> Array:
    """Return the coefficients of every term in every equation, float64 [15, len(supports)]."""
    coefficients = np.zeros((len(TERMS), len(supports)))
    rows = list(itertools.chain.from_iterable(supports))
    places = np.repeat(np.arange(len(supports)), [len(support) for support in supports])
    coefficients[rows, places] = printed
    coefficients += 0.0  # no negative zeros
    return coefficients


def _without_repeats(order: Sequence[int], errors: Sequence[float], coefficients: Array) -> list[int]:
    """Leave out equations that rounding has made equal to an earlier one; their errors are equal too."""
    kept: list[int] = []
    for _, tied in itertools.groupby(order, key=errors.__getitem__):
        places = list(tied)
        if len(places) > 1:
            firsts: dict[bytes, int] = {}
            for i in places:
                firsts.setdefault(coefficients[:, i].tobytes(), i)
            places = list(firsts.values())
        kept += places
    return kept


def printed_digits(values: Sequence[float]) -> list[float]:
    """Return ``float(f"{round(value, 3):.3g}")`` of each value, in one go.

    Numbers below 10 are rounded as integers, thousandths of one; k/1000 is the float nearest to that decimal,
    so nothing is lost. What comes near a tie, and every larger number, is left to Python.
    """
    given = np.array(values, dtype=np.float64)
    scaled = np.abs(given) * 1e3
    with np.errstate(invalid="ignore"):  # infinities; they are left to Python
        thousandths = np.rint(scaled)
        is_easy = (
            (thousandths < 9_990.0) & (np.abs(scaled - thousandths) < 0.499) & (thousandths % 10.0 != 5.0)
        )
    is_long = thousandths >= 1_000.0
    digits = np.where(is_long, np.rint(thousandths / 10.0) / 100.0, thousandths / 1e3)
    found: list[float] = np.copysign(digits, given).tolist()
    for index in np.flatnonzero(~is_easy).tolist():
        found[index] = float(f"{round(values[index], 3):.3g}")
    return found


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
    for support, fit, has_small in fitter.fit_all(supports, threshold):
        while has_small:  # each turn drops a term
            support = tuple(k for k, value in zip(support, fit, strict=True) if abs(value) >= threshold)
            fit = fitter.fit(support)
            has_small = min(map(abs, fit), default=math.inf) < threshold
        final[support] = fit
    return final


class _Fitter:
    """Least squares with a tiny ridge on one data set."""

    def __init__(self, columns: Array, y: Array) -> None:
        self._columns, self._y = columns, y
        self._gram = columns.T @ columns + RIDGE * np.eye(columns.shape[1])
        self._right = columns.T @ y
        self._known: dict[Support, list[float]] = {(): []}

    def fit_all(
        self, supports: Iterable[Support], threshold: float
    ) -> list[tuple[Support, list[float], bool]]:
        """Fit many supports, those of equal size in one call; small ones come first.

        Returns:
            (support, its fit, whether a coefficient is smaller than ``threshold``) of each.
        """
        by_size: dict[int, list[Support]] = {}
        for support in supports:
            by_size.setdefault(len(support), []).append(support)
        found: list[tuple[Support, list[float], bool]] = [((), [], False) for _ in by_size.pop(0, [])]
        for _, group in sorted(by_size.items()):
            index = np.array(group, dtype=np.intp)
            grams = self._gram[index[:, :, None], index[:, None, :]]
            try:
                solved = np.linalg.solve(grams, self._right[index][:, :, None])[:, :, 0]
            except np.linalg.LinAlgError:  # at least one is singular
                solved = np.array([self._solve(support) for support in group])
            fits = solved.tolist()
            self._known.update(zip(group, fits, strict=True))
            has_small = (np.abs(solved) < threshold).any(axis=1).tolist()
            found += zip(group, fits, has_small, strict=True)
        return found

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
