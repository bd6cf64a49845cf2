"""The data set of Optimal Control: one line per task, (seed, x0, v0, x_target).

For data seed 42 the rows are those of the paper's reference: 50,000 train rows from one NumPy generator and
4,000 test rows from another, three uniform draws per row in the order x0, v0, x_target. Since a draw
consumes exactly one output of the generator, any row is reached by jumping ahead.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from cod_async.envs.optimal_control.dynamics import b_lengths
from cod_async.envs.optimal_control.options import ControlOptions, parse_options
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

NUM_TRAIN_ROWS = 50_000
NUM_HELD_OUT_ROWS = 4_000
SPLITS = ("train", "held_out")
_REFERENCE_SEEDS = {"train": 42, "held_out": 2024}
_DRAWS_PER_ROW = 3


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise EnvironmentInputError(f"no split {split!r}; splits are {', '.join(SPLITS)}")


def _generator_seed(split: str, seed: int) -> int:
    """Return the seed of a split's generator: the reference's for data seed 42, otherwise derived from it.

    Raises:
        EnvironmentInputError: unknown split or a negative seed.
    """
    _check_split(split)
    if seed < 0:
        raise EnvironmentInputError(f"the data seed is {seed}; it must not be negative")
    if seed == _REFERENCE_SEEDS["train"]:
        return _REFERENCE_SEEDS[split]
    return hash64(f"optimal_control/records/{split}/{seed}")


def num_records(options: Mapping[str, Any], split: str) -> int:
    """Return the number of rows of a split.

    Raises:
        EnvironmentInputError: unknown split.
    """
    _check_split(split)
    return NUM_TRAIN_ROWS if split == "train" else NUM_HELD_OUT_ROWS


def _row(options: ControlOptions, split: str, generator_seed: int, row: int) -> dict[str, Any]:
    row %= NUM_TRAIN_ROWS if split == "train" else NUM_HELD_OUT_ROWS
    bits = np.random.PCG64(generator_seed)  # the bit generator of numpy.random.default_rng
    bits.advance(_DRAWS_PER_ROW * row)
    generator = np.random.Generator(bits)
    x0, v0, x_target = (
        float(generator.uniform(-limit, limit))
        for limit in (options.x0_max, options.v0_max, options.x_target_max)
    )
    first_seed = 0 if split == "train" else NUM_TRAIN_ROWS
    return {"seed": first_seed + row, "x0": x0, "v0": v0, "x_target": x_target}


def record_at(options: Mapping[str, Any], split: str, seed: int, row: int) -> dict[str, Any]:
    """Return one data record by its row number, modulo their number.

    Args:
        options: a preset merged with overrides; the ranges are drawn from.
        split: ``train`` (50,000 rows) or ``held_out`` (4,000 rows, the reference's test set).
        seed: >= 0; 42 is the reference's.
        row: >= 0.

    Raises:
        EnvironmentInputError: wrong options, unknown split or a negative seed.
    """
    return _row(parse_options(options), split, _generator_seed(split, seed), row)


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over the data set, again and again; arguments as for :func:`record_at`."""
    checked, generator_seed = parse_options(options), _generator_seed(split, seed)  # checks now, not later

    def walk() -> Iterator[dict[str, Any]]:
        row = 0
        while True:
            yield _row(checked, split, generator_seed, row)
            row += 1

    return walk()


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed (0 .. 2^64-1) for a split: a hash of both, so that splits never share a pack seed.

    The hidden constants are real numbers, so worlds of different seeds differ; both splits draw them from the
    same ranges.

    Raises:
        EnvironmentInputError: unknown split or wrong options.
    """
    parse_options(options)
    _check_split(split)
    return hash64(f"optimal_control/{split}/{seed}")


def has_held_out_worlds(options: Mapping[str, Any]) -> bool:
    """Return whether training never meets the hidden constants of held-out packs: unless they are fixed."""
    checked = parse_options(options)
    has_many_b = any(b_lengths(checked.b_range, checked.b_margin))
    return checked.a_min < checked.a_max or has_many_b
