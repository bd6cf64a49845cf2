"""Rewards and metrics of a committed equation against the hidden one.

``R = 1 / (1 + |c - c*|_1 / |c*|_1 + max(0, |S| - |S*|))`` over the fifteen coefficients c of the dictionary,
with S the terms of an equation and a star for the hidden one. A term too many costs more than a term too few.
"""

from __future__ import annotations

import msgspec
import numpy as np

from cod_async.envs.pde_discovery.basis import Equation, vector

SENTINEL = 100.0
"""What the reference reports as error and loss of a task without a commit (option ``parity``)."""


class Score(msgspec.Struct, frozen=True):
    """How good a committed equation is.

    Attributes:
        l1_error: |c - c*|_1 / |c*|_1, >= 0.
        num_extra_terms: max(0, |S| - |S*|).
        is_structure_right: whether the terms are exactly the hidden ones.
        coefficient_error: mean of |c - c*| / |c*| over the hidden terms; None unless the structure is right.
    """

    l1_error: float
    num_extra_terms: int
    is_structure_right: bool
    coefficient_error: float | None

    @property
    def loss(self) -> float:
        """Coefficient error plus terms too many, >= 0."""
        return self.l1_error + self.num_extra_terms

    @property
    def reward(self) -> float:
        """R in (0, 1]."""
        return 1.0 / (1.0 + self.loss)


def score(equation: Equation, truth: Equation) -> Score:
    """Compare a committed equation with the hidden one (which has at least one term)."""
    error, true = vector(equation) - vector(truth), vector(truth)
    is_right = set(equation) == set(truth)
    relative = None
    if is_right:
        hidden = true != 0.0
        relative = float(np.mean(np.abs(error[hidden]) / np.abs(true[hidden])))
    return Score(
        l1_error=float(np.sum(np.abs(error)) / np.sum(np.abs(true))),
        num_extra_terms=max(0, len(equation) - len(truth)),
        is_structure_right=is_right,
        coefficient_error=relative,
    )


def metrics(result: Score | None, is_parity: bool) -> dict[str, float]:
    """Return the metrics of a finished task.

    Without a commit there is no error to report, so errors are left out; the reference reports sentinels,
    which spoil every mean they enter.
    """
    if result is None:
        if not is_parity:
            return {"structure_recovered": 0.0}
        return {
            "structure_recovered": 0.0,
            "coefficient_error": 1.0,
            "l1_error": SENTINEL,
            "num_extra_terms": 0.0,
            "loss": SENTINEL,
        }
    values = {
        "structure_recovered": float(result.is_structure_right),
        "l1_error": result.l1_error,
        "num_extra_terms": float(result.num_extra_terms),
        "loss": result.loss,
    }
    if result.coefficient_error is not None or is_parity:
        values["coefficient_error"] = 1.0 if result.coefficient_error is None else result.coefficient_error
    return values
