"""The fifteen reaction terms, as functions of u: everything that may occur in a hidden equation.

All of them vanish at u = 0, so u = 0 on the boundary stays a solution. A set of equations is evaluated as one
:class:`Reaction` over columns of states, each column with its own coefficients, because trajectories and
candidate equations are always solved together.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]
Function = Callable[[Array], Array]

FUNCTIONS: dict[str, Function] = {
    "u": lambda u: u,
    "u**2": lambda u: u * u,
    "u**3": lambda u: u * u * u,
    "u**4": lambda u: (u * u) ** 2,
    "u**5": lambda u: (u * u) ** 2 * u,
    "u**7": lambda u: (u * u) ** 2 * (u * u * u),
    "sin(u)": lambda u: np.sin(u),
    "sin(2*u)": lambda u: np.sin(2.0 * u),
    "exp(u)-1": lambda u: np.expm1(u),
    "log(1+u**2)": lambda u: np.log1p(u * u),
    "tanh(u)": lambda u: np.tanh(u),
    "u/(1+u**2)": lambda u: u / (1.0 + u * u),
    "u**2/(1+u**2)": lambda u: u * u / (1.0 + u * u),
    "u**4/(1+u**4)": lambda u: (u * u) ** 2 / (1.0 + (u * u) ** 2),
    "u/(1+u+u**2)": lambda u: u / (1.0 + u + u * u),
}
"""Term name -> function, in dictionary order. Names are what equations are written with."""

TERMS: tuple[str, ...] = tuple(FUNCTIONS)
INDEX: dict[str, int] = {term: index for index, term in enumerate(TERMS)}

Equation = dict[str, float]
"""Term -> coefficient; absent terms are 0."""


def features(u: Array, terms: Sequence[str] = TERMS) -> Array:
    """Return the values of terms at N states: float64 [N, len(terms)], columns in the order of ``terms``."""
    return np.stack([FUNCTIONS[term](u) for term in terms], axis=1)


def evaluate(equation: Mapping[str, float], u: Array) -> Array:
    """Return f(u) of one equation, of the shape of ``u``; the empty equation is 0."""
    total = np.zeros_like(u)
    for term, coefficient in equation.items():
        total += coefficient * FUNCTIONS[term](u)
    return total


def vector(equation: Mapping[str, float]) -> Array:
    """Return the coefficients of an equation in dictionary order: float64 [15]."""
    values = np.zeros(len(TERMS))
    for term, coefficient in equation.items():
        values[INDEX[term]] = coefficient
    return values


class Reaction:
    """f(u) for states that are columns, column j with the coefficients of equation j.

    Args:
        equations: one per column, or a single one for any number of columns.
    """

    def __init__(self, equations: Sequence[Mapping[str, float]]) -> None:
        self._is_shared = len(equations) == 1
        self._parts: list[tuple[Function, npt.NDArray[np.intp], Array]] = []
        for term in TERMS:
            columns = [j for j, equation in enumerate(equations) if term in equation]
            if columns:
                coefficients = np.array([equations[j][term] for j in columns])
                self._parts.append((FUNCTIONS[term], np.array(columns, dtype=np.intp), coefficients))

    def __call__(self, u: Array) -> Array:
        """Return f(u), float64 of the shape [num_x, num_columns] of ``u``."""
        total = np.zeros_like(u)
        for function, columns, coefficients in self._parts:
            if self._is_shared:
                total += coefficients[0] * function(u)
            else:
                total[:, columns] += coefficients * function(u[:, columns])
        return total
