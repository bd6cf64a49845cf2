"""Scripted policies: the floor, the ceiling, and honest learners in between.

``random`` measures anywhere, fits random terms and commits what comes out. ``oracle`` knows the hidden
equation and commits the best of all equations that a regression on the data so far has fitted: noise is all
that keeps it from 1. ``tool_top`` is not told the equation and trusts the instrument: six points at t = 0,
where the field has not decayed yet, then the top of the full regression. ``explorer`` is not told the
equation either, but weighs the data by their noise (it knows how large that is, and which magnitudes occur)
and prefers few terms, then has the instrument fit its choice. Both use all data of the pack, so their curves
show what perfect bookkeeping is worth.
"""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from typing import Any

import numpy as np

from cod_async.envs.base import Environment, Policy, TaskSpec
from cod_async.envs.pde_discovery.basis import TERMS, Array, features
from cod_async.envs.pde_discovery.env import PdeDiscovery
from cod_async.envs.pde_discovery.equation import render
from cod_async.envs.pde_discovery.families import MAX_MAGNITUDE, MIN_MAGNITUDE
from cod_async.envs.pde_discovery.regression import Support, supports_of_dictionary
from cod_async.envs.pde_discovery.scoring import score
from cod_async.lifecycle.hint import prompts_for

EARLY_X = (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)
"""Where the scripted learners measure, all at t = 0."""
U_NOISE, Y_NOISE = 0.002, 0.0005
"""Standard deviations of the noise in the presets, known to ``explorer``."""
_PRIOR_SCALE = 1.3  # root mean square of a coefficient: of a uniform magnitude from 0.5 to 2
_BEST = re.compile(r"^Best: (f\(u\) = .+)$", re.MULTILINE)


def sample(points: Sequence[tuple[float, float]]) -> str:
    """Return the response that measures at (x, t) points."""
    grid = "".join(f'<point x="{x}" t="{t}"/>' for x, t in points)
    return _answer("sample_pde_data", f"<point_grid>{grid}</point_grid>")


def run_regression(candidates: Sequence[str] = ()) -> str:
    """Return the response that fits candidates, or every small set of terms, to all data of the pack."""
    listed = "".join(f"<equation>{text}</equation>" for text in candidates)
    return _answer(
        "run_sparse_regression", f"<candidate_equations>{listed}</candidate_equations>" if listed else ""
    )


def commit(equation: str) -> str:
    """Return the response that commits an equation."""
    return _answer("update_scientific_context", f"<preferred_equation>{equation}</preferred_equation>")


def _answer(action: str, inside: str) -> str:
    return f"<answer><{action}>{inside}</{action}></answer>"


def _game(environment: Environment) -> PdeDiscovery:
    if not isinstance(environment, PdeDiscovery):
        raise TypeError(f"this policy plays pde_discovery, not {type(environment).__name__}")
    return environment


def _sample_early(game: PdeDiscovery) -> str:
    return sample([(x, 0.0) for x in EARLY_X[: game.num_points_left]])


def random_policy(seed: int) -> Policy:
    """Return the policy that measures one to six random points, fits one to three random terms and commits.

    Now and then it measures or fits once more, or looks at the pack's evidence.
    """
    generator = random.Random(seed)

    def act(environment: Environment, observation: str, memory: Any) -> str:
        game = _game(environment)
        if generator.random() < 0.1:
            return _answer("summarize_pack_evidence", "")
        best = _BEST.search(observation)
        if game.has_regression and best and best.group(1) != "f(u) = 0" and generator.random() < 0.8:
            return commit(best.group(1))
        if game.has_points and (game.num_points_left == 0 or generator.random() < 0.7):
            chosen = generator.sample(TERMS, generator.randint(1, game.max_terms))
            return run_regression([" + ".join(chosen)])
        num_points = generator.randint(1, max(1, game.num_points_left))
        spots = [
            (round(generator.uniform(0.01, 0.99), 3), round(generator.random(), 3)) for _ in range(num_points)
        ]
        return sample(spots)

    return act


def oracle_policy(seed: int) -> Policy:
    """Return the policy that commits the fitted equation of the highest reward; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: Any) -> str:
        game = _game(environment)
        if not game.has_points:
            return _sample_early(game)
        if not game.has_regression:
            return run_regression()
        truth = game.hidden()["equation"]
        fitted = [equation for equation in game.fitted_equations if equation]
        return commit(render(max(fitted, key=lambda equation: score(equation, truth).reward)))

    return act


def tool_top_policy(seed: int) -> Policy:
    """Return the policy that commits the instrument's best equation; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: Any) -> str:
        game = _game(environment)
        if not game.has_points:
            return _sample_early(game)
        best = _BEST.search(observation)
        return commit(best.group(1)) if game.has_regression and best else run_regression()

    return act


def explorer_policy(seed: int) -> Policy:
    """Return the policy that chooses terms by their evidence; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: dict[str, Any]) -> str:
        game = _game(environment)
        if not game.has_points:
            memory["has_chosen"] = False
            return _sample_early(game)
        if not game.has_regression:
            return run_regression()
        best = _BEST.search(observation)
        if memory["has_chosen"] and best:
            return commit(best.group(1))
        memory["has_chosen"] = True
        u, y = read_table(observation)
        chosen = most_likely_support(u, y, game.max_terms)
        return run_regression([" + ".join(TERMS[k] for k in chosen)])

    return act


def read_table(observation: str) -> tuple[Array, Array]:
    """Read u and y from the table of a regression's result: float64 [N] each."""
    rows = [line.split(" | ") for line in observation.splitlines() if line.startswith("ds_t")]
    return np.array([float(row[3]) for row in rows]), np.array([float(row[4]) for row in rows])


def most_likely_support(u: Array, y: Array, max_terms: int) -> Support:
    """Return the set of terms with the most evidence for it in noisy data.

    Both u and y are noisy, so a residual has the variance (U_NOISE f'(u))^2 + Y_NOISE^2, which depends on f:
    fits are re-weighted a few times. Sets are compared by their evidence in Laplace's approximation, with a
    normal prior on coefficients and a penalty on magnitudes that the hidden equation cannot have.

    Args:
        u: data, float64 [N], N >= 1.
        y: data, float64 [N].
        max_terms: largest set.
    """
    step = 1e-5
    values, slopes = features(u), (features(u + step) - features(u - step)) / (2.0 * step)
    best: Support = (0,)
    best_score = np.inf
    for size in range(1, max_terms + 1):
        supports = [s for s in supports_of_dictionary(range(len(TERMS)), size) if len(s) == size]
        index = np.array(supports)
        scores = _evidence(np.moveaxis(values[:, index], 0, 1), np.moveaxis(slopes[:, index], 0, 1), y)
        place = int(np.argmin(scores))
        if scores[place] < best_score:
            best, best_score = supports[place], float(scores[place])
    return best


def _evidence(values: Array, slopes: Array, y: Array) -> Array:
    """Return -2 log evidence (smaller is better) of C sets of K terms on N data.

    Args:
        values: terms at the data, float64 [C, N, K].
        slopes: their derivatives, float64 [C, N, K].
        y: float64 [N].
    """
    prior = np.eye(values.shape[2]) / _PRIOR_SCALE**2
    variance = np.full(values.shape[:2], U_NOISE**2 + Y_NOISE**2)
    coefficients, precision = np.zeros(values.shape[::2]), np.broadcast_to(prior, (len(values), *prior.shape))
    for _ in range(5):
        weighted = values / variance[:, :, None]
        precision = np.einsum("cnk,cnl->ckl", weighted, values) + prior
        right = np.einsum("cnk,n->ck", weighted, y)
        coefficients = np.linalg.solve(precision, right[:, :, None])[:, :, 0]
        slope = np.einsum("cnk,ck->cn", slopes, np.clip(coefficients, -3.0, 3.0))
        variance = (U_NOISE * slope) ** 2 + Y_NOISE**2
    residual = y - np.einsum("cnk,ck->cn", values, coefficients)
    magnitude = np.abs(coefficients)
    outside = np.maximum(MIN_MAGNITUDE - magnitude, 0.0) + np.maximum(magnitude - MAX_MAGNITUDE, 0.0)
    spread = np.sqrt(np.diagonal(np.linalg.inv(precision), axis1=1, axis2=2))
    fit: Array = np.sum(residual**2 / variance + np.log(variance), axis=1)
    fit += np.sum(coefficients**2, axis=1) / _PRIOR_SCALE**2 + np.sum((outside / spread) ** 2, axis=1)
    fit += np.linalg.slogdet(precision)[1] - np.linalg.slogdet(prior)[1]
    return fit


def truth_hint(environment: Environment, task: TaskSpec) -> str:
    """Return the hint of a perfect updater: the hidden equation. Resets the environment."""
    environment.reset(task)
    truth = render(environment.hidden()["equation"])
    body = (
        f"- The equation of this pack is {truth}.\n"
        "- Measure at t = 0, run a regression with exactly these terms as the only candidate, and commit "
        "what it prints."
    )
    return prompts_for(environment.prompt_style).carried(body)
