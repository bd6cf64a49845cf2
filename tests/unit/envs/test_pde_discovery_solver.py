"""PDE Discovery's solver against closed forms, an independent solver, and what the equations promise."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from cod_async.envs.pde_discovery.basis import Array, Equation, Reaction, evaluate
from cod_async.envs.pde_discovery.families import load
from cod_async.envs.pde_discovery.solver import interpolate, is_stable, residual, solve
from cod_async.envs.pde_discovery.world import WorldKey, field, make_world


def sine(num_x: int, mode: int = 1, amplitude: float = 1.0) -> Array:
    values: Array = amplitude * np.sin(mode * np.pi * np.linspace(0.0, 1.0, num_x))
    return values[:, None]


@pytest.mark.parametrize(("mode", "rate"), [(1, -1.5), (1, 2.0), (3, -0.5)])
def test_discrete_eigenmode(mode: int, rate: float) -> None:
    """f = rate u keeps a sine a sine; its factor per step has a closed form."""
    dx, dt = 1 / 256, 1 / 2000
    mu = 4 / dx**2 * np.sin(mode * np.pi * dx / 2) ** 2
    factor = (1 + dt * rate) / (1 + dt * mu)
    if (mode, rate) == (1, -1.5):
        assert factor == pytest.approx(0.9943431746938143, abs=1e-15)
    u = solve(sine(257, mode), Reaction([{"u": rate}]))[0]
    expected = factor ** np.arange(2001)[:, None] * sine(257, mode)[:, 0]
    assert np.max(np.abs(u - expected)) < 1e-11


def thomas(initial: Array, equation: Equation, num_t: int) -> Array:
    """Solve by elimination, point after point: the textbook way, and slow."""
    num_x = len(initial)
    dt, ratio = 1 / (num_t - 1), (num_x - 1) ** 2 / (num_t - 1)
    levels = [initial.copy()]
    for _ in range(num_t - 1):
        u = levels[-1]
        right = (u + dt * evaluate(equation, u))[1:-1].tolist()
        upper: list[float] = []
        carried: list[float] = []
        for value in right:
            pivot = 1 + 2 * ratio + ratio * (upper[-1] if upper else 0.0)
            carried.append((value + ratio * (carried[-1] if carried else 0.0)) / pivot)
            upper.append(-ratio / pivot)
        solution = [carried.pop()]
        for factor, value in zip(upper[-2::-1], carried[::-1], strict=True):
            solution.append(value - factor * solution[-1])
        levels.append(np.array([0.0, *solution[::-1], 0.0]))
    return np.array(levels)


def test_equals_an_elimination() -> None:
    equation = {"u": 0.7, "u**5": -1.1, "sin(2*u)": 1.3}
    start = (sine(33, 1, 1.4) + sine(33, 2, 0.3))[:, 0]
    assert (
        np.max(np.abs(solve(start[:, None], Reaction([equation]), 61)[0] - thomas(start, equation, 61)))
        < 1e-12
    )


def test_columns_do_not_mix() -> None:
    starts = np.hstack([sine(33, 1, a) for a in (0.2, 1.0, 2.1)])
    equations: list[Equation] = [{"u": 1.0, "u**3": -1.2}, {"tanh(u)": -0.5}, {"u": -0.7}]
    together = solve(starts, Reaction(equations), 41)
    for j, equation in enumerate(equations):
        alone = solve(starts[:, [j]], Reaction([equation]), 41)[0]
        assert np.max(np.abs(together[j] - alone)) < 1e-13


@pytest.mark.parametrize("family", ["train", "eval"])
def test_residual_is_the_reaction(family: str) -> None:
    """y equals f(u) to rounding on every interior node, for every template's terms."""
    templates = load(family).templates
    for template in templates[::6]:
        equation = {term: 1.1 * sign for term, sign in template.items()}
        u = solve(sine(257, 1, 1.5), Reaction([equation]), 201)[0]
        y = residual(u, Reaction([equation]))
        assert np.max(np.abs(y - evaluate(equation, u))[:, 1:-1]) < 1e-9
        assert not y[:, [0, -1]].any()
    u = solve(sine(33), Reaction([{"u": 2.0}]), 101)[0]
    assert np.max(np.abs(residual(u, Reaction([{"u": 2.0}])) - 2 * u)[:, 1:-1]) < 1e-10


def test_residual_on_the_worlds_that_are_sampled() -> None:
    for seed in (0, 1234):
        key = WorldKey(seed, None, 4, "train", 1, 2, 3.0, 1, 2)
        equation = make_world(key).equation
        u = field(key, 0)
        y = residual(u, Reaction([equation]))
        assert u.shape == (2001, 257) and np.max(np.abs(y - evaluate(equation, u))[:, 1:-1]) < 1e-9


def test_measured_values() -> None:
    key = WorldKey(1234, None, 4, "train", 1, 2, 3.0, 1, 2)
    u, y = interpolate(field(key, 0), Reaction([make_world(key).equation]), np.array([0.5]), np.array([0.05]))
    assert (u[0], y[0]) == pytest.approx((1.10332757, -0.7173344), abs=5e-8)


def test_interpolation_is_bilinear_everywhere() -> None:
    reaction = Reaction([{"u": 1.2, "u**4": -1.5}])
    u = solve(sine(33, 1, 1.8) + sine(33, 2, 0.4), reaction, 51)[0]
    y = residual(u, reaction)
    generator = np.random.default_rng(0)
    x = np.concatenate([generator.uniform(0, 1, 60), [1e-9, 1 - 1e-9, 1 / 32, 31 / 32, 0.5]])
    t = np.concatenate([generator.uniform(0, 1, 60), [1.0, 1.0, 0.0, 1 / 50, 0.99]])
    got_u, got_y = interpolate(u, reaction, x, t)
    for i, (x_i, t_i) in enumerate(zip(x, t, strict=True)):
        column, level = min(int(np.floor(x_i * 32 + 1e-12)), 31), min(int(np.floor(t_i * 50 + 1e-12)), 49)
        a, b = x_i * 32 - column, t_i * 50 - level
        for got, values in ((got_u[i], u), (got_y[i], y)):
            low, high = (values[n, column] * (1 - a) + values[n, column + 1] * a for n in (level, level + 1))
            assert got == pytest.approx(low * (1 - b) + high * b, abs=1e-10)


def test_maximum_principle_and_positivity() -> None:
    for equation in ({"u": -1.5}, {"u**3": -2.0, "tanh(u)": -0.5}, {"log(1+u**2)": -1.0}):
        u = solve(sine(65, 1, 2.0) + np.abs(sine(65, 3, 0.5)), Reaction([equation]), 101)[0]
        assert u.min() >= 0.0
        assert np.all(np.diff(u.max(axis=1)) <= 1e-15)


def test_symmetries_and_comparison() -> None:
    odd = Reaction([{"u": 1.5, "u**3": -1.1, "sin(2*u)": 0.6}])
    start = sine(65, 1, 1.1) + sine(65, 2, 0.4)
    u = solve(start, odd, 81)[0]
    assert np.max(np.abs(solve(-start, odd, 81)[0] + u)) < 1e-13
    assert np.max(np.abs(solve(start[::-1], odd, 81)[0][:, ::-1] - u)) < 1e-12
    larger = solve(start + sine(65, 1, 0.2), odd, 81)[0]
    assert np.all(larger - u >= -1e-14)


def test_energy_never_grows() -> None:
    """The scheme is a gradient descent: sum of |du|^2 / 2 - dx^2 F(u) with F' = f falls for a small step."""
    u = solve(sine(65, 1, 1.5) + sine(65, 3, 0.6), Reaction([{"u": 1.3, "u**3": -1.7}]), 401)[0]
    potential = 1.3 * u**2 / 2 - 1.7 * u**4 / 4
    energy = np.sum(np.diff(u, axis=1) ** 2, axis=1) / 2 - np.sum(potential, axis=1) / 64**2
    assert np.all(np.diff(energy) <= 1e-12)


def lines(start: Array, equation: Equation, num_steps: int) -> Array:
    """Integrate du/dt = D u + f(u) by Runge-Kutta steps of order four, to t = 0.1: no error in time left."""
    dx, dt = 1 / (len(start) - 1), 0.1 / num_steps

    def rate(u: Array) -> Array:
        out = np.zeros_like(u)
        out[1:-1] = (u[2:] - 2 * u[1:-1] + u[:-2]) / dx**2 + evaluate(equation, u[1:-1])
        return out

    u = start
    for _ in range(num_steps):
        a = rate(u)
        b = rate(u + dt / 2 * a)
        c = rate(u + dt / 2 * b)
        u = u + dt / 6 * (a + 2 * b + 2 * c + rate(u + dt * c))
    return u


def test_first_order_in_time() -> None:
    equation = {"u": 1.0, "u**3": -1.0}
    start = sine(33, 1, 1.5)
    exact = lines(start[:, 0], equation, 500)
    errors = [
        np.max(np.abs(solve(start, Reaction([equation]), num_t)[0][(num_t - 1) // 10] - exact))
        for num_t in (401, 801, 1601, 3201)
    ]
    for coarse, fine in itertools.pairwise(errors):
        assert coarse / fine == pytest.approx(2.0, abs=0.03)


def test_second_order_in_space() -> None:
    equation = {"u": 1.0, "u**3": -1.0}
    values = [lines(sine(num_x, 1, 1.5)[:, 0], equation, 1500)[(num_x - 1) // 2] for num_x in (9, 17, 33)]
    solved = [solve(sine(n, 1, 1.5), Reaction([equation]), 4001)[0][400][(n - 1) // 2] for n in (9, 17, 33)]
    for series in (values, solved):  # the steps in time cancel in the differences
        assert (series[0] - series[1]) / (series[1] - series[2]) == pytest.approx(4.0, abs=0.1)


def test_explosions_are_found_and_clipping_keeps_them_finite() -> None:
    growing = Reaction([{"u**7": 2.0}])
    assert not is_stable(sine(65, 1, 2.5), growing, 401, 3.0)
    assert not is_stable(sine(65, 1, 1e60), growing, 401, 1e300, has_bounded_right=False)
    assert is_stable(sine(65, 1, 2.5), Reaction([{"u": -1.0}]), 401, 3.0)
    assert not is_stable(sine(65, 1, 3.0), Reaction([{"u": -1.0}]), 401, 3.0)
    assert not is_stable(np.full((65, 1), np.nan), Reaction([{"u": -1.0}]), 401, 3.0)
    clipped = solve(sine(65, 1, 2.9), growing, 401, 3.0)
    assert np.max(np.abs(clipped)) <= 3.0
