"""PDE Discovery's equations as text, its sparse regression, and its score, against hand-worked values."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from cod_async.envs.pde_discovery.basis import TERMS, Array, Equation, evaluate, features, vector
from cod_async.envs.pde_discovery.equation import (
    as_written,
    has_symbols,
    is_equal,
    parse,
    read_support,
    render,
)
from cod_async.envs.pde_discovery.regression import (
    RIDGE,
    Candidate,
    alternative,
    condition_number,
    margin,
    regress,
    supports_of_dictionary,
)
from cod_async.envs.pde_discovery.scoring import metrics, score


@pytest.mark.parametrize(
    ("text", "equation"),
    [
        ("0.61*u - 1.35*u**4", {"u": 0.61, "u**4": -1.35}),
        ("f(u) = -0.9*u**3 - 0.56*sin(u)", {"u**3": -0.9, "sin(u)": -0.56}),
        ("F(U)=1.5*SIN(2*U)+.5*TANH(U)", {"sin(2*u)": 1.5, "tanh(u)": 0.5}),
        ("0.7*exp(u)-1", {"exp(u)-1": 0.7}),
        ("0.7*(exp(u)-1) + 1e-1*(log(1+u**2))", {"exp(u)-1": 0.7, "log(1+u**2)": 0.1}),
        ("-0.7*exp(u)-1-2*u", {"u": -2.0, "exp(u)-1": -0.7}),
        ("2*u**2/(1+u**2) + 3*(u/(1+u+u**2))", {"u**2/(1+u**2)": 2.0, "u/(1+u+u**2)": 3.0}),
        ("1*u + 2*u", {"u": 3.0}),
        ("1*u + 2*u**2 - 1*u", {"u**2": 2.0}),
        ("\n 0.5 * u\t+ -0.3*u**3", {"u": 0.5, "u**3": -0.3}),
        ("1.03e+03*u", {"u": 1030.0}),
        ("1*u+-1*u**2+-1*u**3", None),  # one such join is a slip, two are not
        ("1*u--1*u**2", None),
        ("1*u-+1*u**2", None),
        ("+-1*u", None),
        ("u - u**3", None),
        ("2*u3*u", None),
        ("1*u 2*u**2", None),
        ("1*u*u", None),
        ("1*u**6", None),
        ("1*u**22", None),
        ("1*(u)", None),
        ("1*cos(u)", None),
        ("1*u^2", None),
        ("1*u+", None),
        ("1*u+0.2", None),
        ("u*1", None),
        ("c1*u", None),
        ("g(u)=1*u", None),
        ("f(u)=f(u)=1*u", None),
        ("1e999*u", None),
        ("nan*u", None),
        ("inf*u", None),
        ("1_0*u", None),
        ("\u0661*u", None),
        ("0*u", None),
        ("1e-13*u", None),
        ("1*u-1*u", None),
        ("0", None),
        ("", None),
        ("f(u)=", None),
        ("9" * 5000 + "*u", None),
    ],
)
def test_parse(text: str, equation: Equation | None) -> None:
    assert parse(text) == equation
    if equation is not None:
        assert list(parse(text) or {}) == [term for term in TERMS if term in equation]


@pytest.mark.parametrize(
    ("text", "support"),
    [
        ("u - c1*u**3", ("u", "u**3")),
        ("f(u) = a*(exp(u)-1) + b*u", ("u", "exp(u)-1")),
        ("alpha*u/(1+u**2) + u**4/(1+u**4)", ("u/(1+u**2)", "u**4/(1+u**4)")),
        ("2u - 3sin(2*u)", ("u", "sin(2*u)")),
        ("1e-3*u + tanh(u)", ("u", "tanh(u)")),
        ("u**2*c_1", ("u**2",)),
        ("-u", ("u",)),
        ("0.5*u + 0.1*u**2", ("u", "u**2")),
        ("coef_2*log(1+u**2)", ("log(1+u**2)",)),
        ("cos(u)", None),
        ("sinh(u)", None),
        ("u**6 + u", None),
        ("u^3", None),
        ("u/2", None),
        ("u*sin(u)", None),
        ("u sin(u)", None),
        ("sin(u)**2", None),
        ("foo*u", None),
        ("3", None),
        ("beta", None),
        ("u + v", None),
        ("", None),
    ],
)
def test_read_support(text: str, support: tuple[str, ...] | None) -> None:
    assert read_support(text) == support


def test_symbols_are_told_from_functions() -> None:
    for text in ("c*u", "c1*u", "C_2*u", "a*u", "b *tanh(u)", "alpha*u", "Beta*u", "gamma*u", "coef1*u"):
        assert has_symbols(text)
    for text in (render(dict.fromkeys(TERMS, 1.0)), "tanh(u) + log(1+u**2)", "abc*u"):
        assert not has_symbols(text)


def test_render() -> None:
    assert render({"u**3": -1.0004, "u": 0.12345}) == "f(u) = 0.123*u - 1*u**3"
    assert render({"exp(u)-1": -1234.0, "sin(u)": 0.5}) == "f(u) = 0.5*sin(u) - 1.23e+03*(exp(u)-1)"
    assert render({}) == "f(u) = 0"
    everything = dict.fromkeys(TERMS, -0.25)
    assert parse(render(everything)) == everything


def test_equal_equations() -> None:
    assert is_equal({"u": 1.0, "u**2": 2.0}, {"u**2": 2.0 * (1 + 5e-10), "u": 1.0})
    assert not is_equal({"u": 1.0}, {"u": 1.0 + 1e-8})
    assert not is_equal({"u": 1.0}, {"u": 1.0, "u**2": 1e-11})


ALL_PAIRS = supports_of_dictionary(range(15), 2)


def data(equation: Equation, num: int = 24, noise: float = 0.0, seed: int = 0) -> tuple[Array, Array]:
    generator = np.random.default_rng(seed)
    u = generator.uniform(0.05, 2.6, num)
    return u, evaluate(equation, u) + noise * generator.standard_normal(num)


def test_supports_of_a_dictionary() -> None:
    assert len(ALL_PAIRS) == 120 and len(supports_of_dictionary(range(15), 3)) == 575
    assert supports_of_dictionary([3, 1, 1], 5) == [(1,), (3,), (1, 3)]


@pytest.mark.parametrize(
    "equation",
    [
        {"u": 0.61, "u**4": -1.35},
        {"u**5": -1.07, "u**2/(1+u**2)": 1.88},
        {"sin(u)": 1.35},
        {"u": -2.0, "u/(1+u+u**2)": 0.5},
    ],
)
def test_exact_data_give_the_exact_equation(equation: Equation) -> None:
    result = regress(*data(equation), ALL_PAIRS, 0.05)
    assert result.best.equation == equation and result.best.max_error < 1e-12
    second = result.second()
    assert second is not None and set(second.equation) != set(equation)
    assert margin(result.best.max_error, second) > 1e3


def test_every_candidate_against_a_plain_least_squares_fit() -> None:
    """Same sets, same dropping, same rounding, fitted by another method; scores are of what is printed."""
    u, y = data({"u": 1.3, "u**3": -0.9}, 30, 0.01)
    result = regress(u, y, supports_of_dictionary(range(6), 3), 0.05)
    columns = features(u)
    expected: dict[str, float] = {}
    for support in supports_of_dictionary(range(6), 3):
        while True:
            fit = np.linalg.lstsq(columns[:, support], y, rcond=None)[0]
            kept = tuple(k for k, c in zip(support, fit, strict=True) if abs(c) >= 0.05)
            if kept == support:
                break
            support = kept
        text = render({TERMS[k]: round(float(c), 3) for k, c in zip(support, fit, strict=True)})
        expected[text] = float(np.max(np.abs(y - evaluate(parse(text) or {}, u))))
    got = {render(c.equation): c.max_error for c in result.candidates}
    assert got == pytest.approx(expected, abs=1e-12)
    errors = [candidate.max_error for candidate in result.candidates]
    assert errors == sorted(errors) and result.best.max_error == min(expected.values())


def test_order_of_data_and_terms_does_not_matter() -> None:
    u, y = data({"tanh(u)": 0.9, "u**2": -1.4}, 12, 1e-3)
    first = regress(u, y, ALL_PAIRS, 0.05)
    order = np.random.default_rng(1).permutation(12)
    second = regress(u[order], y[order], ALL_PAIRS[::-1], 0.05)
    assert second.best.equation == first.best.equation
    assert second.best.max_error == pytest.approx(first.best.max_error, rel=1e-9)


def test_thresholds_drop_terms_and_may_leave_nothing() -> None:
    u, y = data({"u": 1.0, "u**2": 0.04})
    both = ((0, 1),)
    assert regress(u, y, both, 0.0).best.equation == {"u": 1.0, "u**2": 0.04}
    assert list(regress(u, y, both, 0.05).best.equation) == ["u"]
    empty = regress(u, y, both, 1e9)
    assert empty.best.equation == {} and empty.best.max_error == np.max(np.abs(y))
    assert empty.condition == 1.0 and empty.second() is None


def test_degenerate_data() -> None:
    zero = np.zeros(3)
    assert regress(zero, zero, ALL_PAIRS, 0.05).best == Candidate({}, 0.0)
    one = regress(np.array([0.5]), np.array([0.25]), supports_of_dictionary(range(15), 3), 0.05)
    assert math.isfinite(one.best.max_error) and len(one.candidates) > 100
    tiny = regress(np.array([1e-13, -1e-13]), np.array([1.0, 2.0]), ALL_PAIRS, 0.05)
    assert tiny.best.equation == {} and tiny.best.max_error == 2.0
    wide = regress(*data({"u": 1.0}, 5), [tuple(range(15))], 0.0)
    assert math.isfinite(wide.best.max_error)


def test_margins() -> None:
    assert margin(0.1, Candidate({}, 0.3)) == pytest.approx(2.0)
    assert margin(0.3, Candidate({}, 0.1)) == pytest.approx(-2 / 3)
    assert margin(0.0, Candidate({}, 0.1)) == math.inf
    assert margin(0.0, Candidate({}, 0.0)) == margin(0.1, None) == 0.0


def test_alternatives_have_other_terms() -> None:
    """The reference compares orders of terms, so an equation may count as its own alternative."""
    ranked = [Candidate({"u": 1.0, "sin(u)": 1.0}, 0.1), Candidate({"u**2": 1.0}, 0.2)]
    assert alternative(ranked, ranked[0].equation) is ranked[1]
    assert alternative(ranked, ranked[0].equation, is_order_confused=True) is ranked[0]
    assert alternative(ranked, {"u**2": 2.0}, is_order_confused=True) is ranked[0]
    assert alternative(ranked[:1], ranked[0].equation) is None


def test_condition_numbers() -> None:
    columns = np.array([[1.0, 1.0], [0.0, 1.0]])  # normalized: angle of 45 degrees
    expected = math.sqrt((1 + math.sqrt(0.5)) / (1 - math.sqrt(0.5)))
    assert condition_number(columns) == pytest.approx(expected, rel=1e-12)
    assert condition_number(columns * np.array([1e3, 1e-3])) == pytest.approx(expected, rel=1e-9)
    assert condition_number(columns[:, :1]) == 1.0
    assert condition_number(np.array([[1.0, 1.0], [1.0, 1.0]])) == 1e12
    # One point cannot tell two terms apart; the reference reports a perfect 1.
    assert condition_number(np.array([[1.0, 2.0]])) == 1e12
    assert condition_number(np.array([[1.0, 2.0]]), is_rank_checked=False) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("equation", "reward"),
    [
        ({"u": 1.0, "u**3": -1.0}, 1.0),
        ({"u": 1.0}, 1 / 1.5),
        ({"u": 1.0, "u**3": -1.0, "u**5": 0.05}, 1 / 2.025),
        ({"sin(u)": 1.0, "u**3": -1.0}, 0.5),
        ({"u": 0.9, "u**3": -1.1}, 1 / 1.1),
    ],
)
def test_reward(equation: Equation, reward: float) -> None:
    result = score(equation, {"u": 1.0, "u**3": -1.0})
    assert result.reward == pytest.approx(reward, rel=1e-12)
    assert result.is_structure_right == (set(equation) == {"u", "u**3"})


def test_metrics_without_a_commit_have_no_sentinels() -> None:
    assert metrics(None, is_parity=False) == {"structure_recovered": 0.0}
    assert metrics(None, is_parity=True) == {
        "structure_recovered": 0.0,
        "coefficient_error": 1.0,
        "l1_error": 100.0,
        "num_extra_terms": 0.0,
        "loss": 100.0,
    }
    truth = {"u": 1.0, "u**3": -2.0}
    right = metrics(score({"u": 1.1, "u**3": -2.0}, truth), is_parity=False)
    assert right["coefficient_error"] == pytest.approx(0.05) and right["l1_error"] == pytest.approx(0.1 / 3)
    wrong = score({"u": 1.0, "u**2": 1.0, "u**4": 1.0}, truth)
    assert metrics(wrong, is_parity=False) == {
        "structure_recovered": 0.0,
        "l1_error": pytest.approx(4 / 3),
        "num_extra_terms": 1.0,
        "loss": pytest.approx(7 / 3),
    }
    assert metrics(wrong, is_parity=True)["coefficient_error"] == 1.0


def test_vector_is_in_dictionary_order() -> None:
    for (k, term), value in itertools.product(enumerate(TERMS), (0.5, -2.0)):
        expected = np.zeros(15)
        expected[k] = value
        assert np.array_equal(vector({term: value}), expected)


def plainly_ranked(u: Array, y: Array, supports: list[tuple[int, ...]]) -> list[Candidate]:
    """Threshold 0, one support after the other: fit, print, score, sort, and keep the first of equal ones."""
    columns = features(u)
    gram, right = columns.T @ columns + RIDGE * np.eye(len(TERMS)), columns.T @ y
    found = []
    for support in sorted(supports, key=len):
        fit = np.linalg.solve(gram[np.ix_(support, support)], right[list(support)])
        equation = as_written(
            {TERMS[k]: round(value, 3) for k, value in zip(support, fit.tolist(), strict=True)}
        )
        found.append(Candidate(equation, float(np.max(np.abs(y - evaluate(equation, u))))))
    ranked: dict[tuple[tuple[str, float], ...], Candidate] = {}
    for candidate in sorted(found, key=lambda one: one.max_error):
        ranked.setdefault(tuple(candidate.equation.items()), candidate)
    return list(ranked.values())


@pytest.mark.parametrize(("num_points", "scale"), [(48, 2.7), (6, 2.7), (2, 0.4), (30, 0.02)])
def test_ranking_is_that_of_one_support_at_a_time(num_points: int, scale: float) -> None:
    generator = np.random.default_rng(num_points)
    u = generator.uniform(0.01, scale, num_points)
    y = 1.3 * u - 0.4 * u**3 + generator.normal(0.0, 5e-4, num_points)
    supports = supports_of_dictionary(range(len(TERMS)), 2)
    ranking = regress(u, y, supports, 0.0).candidates
    plain = plainly_ranked(u, y, supports)
    assert len(ranking) == len(plain) <= len(supports)
    # Sums in another order change the last digits of an error, so nearly equal ones may change places.
    got = {tuple(one.equation.items()): one.max_error for one in ranking}
    expected = {tuple(one.equation.items()): one.max_error for one in plain}
    assert got.keys() == expected.keys()
    assert all(got[key] == pytest.approx(expected[key], rel=1e-9, abs=1e-12) for key in got)
    errors = [one.max_error for one in ranking]
    assert (
        errors == sorted(errors) and list(ranking)[3:7] == ranking[3:7] and ranking[-1] == list(ranking)[-1]
    )


def test_equations_that_rounding_makes_equal_are_ranked_once() -> None:
    u = np.linspace(0.1, 2.0, 12)
    ranking = regress(u, 0.5 * u, [(0,), (0, 2), (0, 3), (2,)], 0.0).candidates  # u, u and u**3, ...
    shown = [render(one.equation) for one in ranking]
    assert shown[0] == "f(u) = 0.5*u" and shown.count("f(u) = 0.5*u") == 1 and len(shown) == 2
    with pytest.raises(IndexError):
        ranking[2]
