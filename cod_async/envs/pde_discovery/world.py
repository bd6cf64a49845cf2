"""The hidden world of a pack: one sparse equation, and the initial states of its trajectories.

Every draw has a generator of its own, seeded by (environment seed, purpose), so worlds are equal wherever
they are rebuilt. Amplitudes are stratified: each of the M trajectories starts in another M-th of the safe
range, because a term such as u**5 cannot be told from another one where u stays small.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence

import msgspec
import numpy as np

from cod_async.envs.pde_discovery.basis import Array, Equation, Reaction
from cod_async.envs.pde_discovery.families import (
    MAX_MAGNITUDE,
    MIN_MAGNITUDE,
    FamilyName,
    Template,
    eligible,
    max_amplitude,
)
from cod_async.envs.pde_discovery.solver import COARSE_T, COARSE_X, NUM_T, NUM_X, is_stable, solve

MAX_ATTEMPTS = 128
"""Equations drawn until one is stable. With a calibrated amplitude the first one is (none of 740 packs
needed a second); after the last attempt the equation is taken as it is, and clipping keeps it finite."""
SOLVE_BATCH = 8
"""Trajectories solved together; a longer pack is solved in several batches, so memory stays bounded."""
_NUM_CACHED_BATCHES = 6  # 33 MB each for a full batch


class WorldKey(msgspec.Struct, frozen=True):
    """Everything that a world depends on.

    Attributes:
        environment_seed: seed of the equation and of all initial states (0 .. 2^64-1).
        template_index: which eligible template; None draws one.
        num_trajectories: M, the pack size.
        family, min_terms, max_terms, state_bound, min_modes, max_modes: as in the options.
    """

    environment_seed: int
    template_index: int | None
    num_trajectories: int
    family: FamilyName
    min_terms: int
    max_terms: int
    state_bound: float
    min_modes: int
    max_modes: int


class World(msgspec.Struct, frozen=True):
    """A hidden world.

    Attributes:
        key: what it was drawn from.
        template_index: the template among the eligible ones.
        equation: term -> coefficient, in dictionary order.
        amplitudes: largest initial value of u of each trajectory, before rounding to the grid (M floats).
    """

    key: WorldKey
    template_index: int
    equation: Equation
    amplitudes: tuple[float, ...]


def _generator(*parts: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(list(parts)))


def draw_equation(generator: np.random.Generator, template: Template) -> Equation:
    """Draw magnitudes for a template's signs, in dictionary order."""
    return {
        term: sign * round(float(generator.uniform(MIN_MAGNITUDE, MAX_MAGNITUDE)), 2)
        for term, sign in template.items()
    }


def draw_amplitudes(environment_seed: int, num_trajectories: int, largest: float) -> tuple[float, ...]:
    """Draw one amplitude in each of M equal bands of [0, largest], in shuffled order."""
    generator = _generator(environment_seed, 1)
    edges = np.linspace(0.0, largest, num_trajectories + 1).tolist()
    drawn = [float(generator.uniform(low, high)) for low, high in itertools.pairwise(edges)]
    generator.shuffle(drawn)
    return tuple(drawn)


def initial_state(
    environment_seed: int, trajectory: int, amplitude: float, modes: tuple[int, int], num_x: int
) -> Array:
    """Return u at t = 0: float64 [num_x], >= 0, largest value ``amplitude``, exactly 0 at both ends.

    A random sum of ``modes[0]`` to ``modes[1]`` sine modes, shifted to be non-negative and multiplied by
    sin(pi x). The shift and the scale are those of the grid, so another grid gives slightly other values.
    """
    generator = _generator(environment_seed, 2, trajectory)
    x = np.linspace(0.0, 1.0, num_x)
    num_modes = int(generator.integers(modes[0], modes[1] + 1))
    weights = generator.standard_normal(num_modes)
    wave = np.zeros(num_x)
    for mode, weight in enumerate(weights.tolist(), start=1):
        wave += weight * np.sin(mode * np.pi * x)
    largest = float(np.max(np.abs(wave)))
    if largest >= 1e-12:
        wave /= largest
    shape: Array = np.sin(np.pi * x) * (wave - wave.min())
    shape *= amplitude / float(shape.max())
    shape[0] = shape[-1] = 0.0
    return shape


def initial_states(
    key: WorldKey, amplitudes: Sequence[float], trajectories: Sequence[int], num_x: int
) -> Array:
    """Return the initial states of some trajectories as columns: float64 [num_x, len(trajectories)]."""
    modes = (key.min_modes, key.max_modes)
    columns = [initial_state(key.environment_seed, k, amplitudes[k], modes, num_x) for k in trajectories]
    return np.stack(columns, axis=1)


@functools.lru_cache(maxsize=256)
def make_world(key: WorldKey) -> World:
    """Draw the world of a pack (pure; remembered, as all lifecycles of a group live in the same one).

    Raises:
        EnvironmentInputError: no eligible template, or no safe amplitude.
    """
    templates = eligible(key.family, key.min_terms, key.max_terms)
    largest = max_amplitude(key.family, key.min_terms, key.max_terms, key.state_bound)
    amplitudes = draw_amplitudes(key.environment_seed, key.num_trajectories, largest)
    coarse = initial_states(key, amplitudes, range(key.num_trajectories), min(NUM_X, COARSE_X))
    generator = _generator(key.environment_seed, 0)
    index, equation = 0, Equation()
    for _ in range(MAX_ATTEMPTS):
        drawn = key.template_index
        index = int(generator.integers(len(templates))) if drawn is None else drawn
        equation = draw_equation(generator, templates[index])
        if is_stable(coarse, Reaction([equation]), min(NUM_T, COARSE_T), key.state_bound):
            break
    return World(key=key, template_index=index, equation=equation, amplitudes=amplitudes)


def field(world_key: WorldKey, trajectory: int) -> Array:
    """Return the dense solution of one trajectory: float64 [2001, 257], not writable.

    Its batch is solved when it is first asked for, and a few batches are remembered for other lifecycles.
    """
    return _solved_batch(world_key, trajectory // SOLVE_BATCH)[trajectory % SOLVE_BATCH]


@functools.lru_cache(maxsize=_NUM_CACHED_BATCHES)
def _solved_batch(key: WorldKey, batch: int) -> tuple[Array, ...]:
    world = make_world(key)
    first = batch * SOLVE_BATCH
    trajectories = range(first, min(first + SOLVE_BATCH, key.num_trajectories))
    initial = initial_states(key, world.amplitudes, trajectories, NUM_X)
    solved = solve(initial, Reaction([world.equation]), NUM_T, key.state_bound)
    # Copies, so that a lifecycle that keeps its trajectory does not keep the whole batch.
    fields = tuple(one.copy() for one in solved)
    for one in fields:
        one.flags.writeable = False
    return fields
