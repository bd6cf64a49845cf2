"""The data set of PDE Discovery: rows of seeds, and for evaluation the world that each row belongs to.

``rows_per_pack = 0``: a row is ``{"seed"}``. For data seed 42 the 50,000 train rows and the 32 held-out rows
have the seeds of the paper's reference; the seed of a row only decides its measurement noise, the world comes
from the pack seed. ``rows_per_pack = 8``: the benchmark of 4,000 rows, 500 packs of 8, in which pack p has
template p mod 25 and takes its environment seed from its first row; for data seed 20260902 the held-out rows
have the reference's seeds.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cod_async.envs.pde_discovery.families import eligible
from cod_async.envs.pde_discovery.options import NAME, PdeOptions, parse_options
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64, stable_seed

NUM_TRAIN_ROWS, NUM_HELD_OUT_ROWS = 50_000, 32
"""Rows of the plain data set."""
NUM_BENCHMARK_ROWS = 4_000
"""Rows of the stratified data set, rounded down to whole packs."""
BENCHMARK_SEED = 20260902
"""Data seed of the paper's evaluation rows; 42 is that of its training rows."""
SPLITS = ("train", "held_out")
_SEED_RANGE = 1 << 32


@functools.lru_cache(maxsize=16)
def _draw(seed: int, num_rows: int) -> npt.NDArray[np.int64]:
    """Draw distinct row seeds, 0 .. 2^32-1. The whole set depends on how many are drawn."""
    return np.random.default_rng(seed).choice(_SEED_RANGE, num_rows, replace=False)


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise EnvironmentInputError(f"environment {NAME}: no split {split!r}; splits are {', '.join(SPLITS)}")


def num_records(options: Mapping[str, Any], split: str) -> int:
    """Return the number of rows of a split.

    Raises:
        EnvironmentInputError: wrong options or an unknown split.
    """
    rows_per_pack = parse_options(options).rows_per_pack
    _check_split(split)
    if rows_per_pack:
        return NUM_BENCHMARK_ROWS - NUM_BENCHMARK_ROWS % rows_per_pack
    return NUM_TRAIN_ROWS if split == "train" else NUM_HELD_OUT_ROWS


def _row_seeds(options: PdeOptions, split: str, seed: int) -> npt.NDArray[np.int64]:
    _check_split(split)
    if seed < 0:
        raise EnvironmentInputError(f"environment {NAME}: the data seed is {seed}; it must not be negative")
    if not options.rows_per_pack:
        drawn = _draw(seed, NUM_TRAIN_ROWS + NUM_HELD_OUT_ROWS)
        return drawn[:NUM_TRAIN_ROWS] if split == "train" else drawn[NUM_TRAIN_ROWS:]
    # The reference draws one training row first, which nobody uses. It has no stratified training rows: ours
    # have a seed of their own, so that no training pack is a benchmark pack.
    if split == "train":
        seed = stable_seed(NAME, "stratified train", seed)
    drawn = _draw(seed, 1 + NUM_BENCHMARK_ROWS)[1:]
    return drawn[: len(drawn) - len(drawn) % options.rows_per_pack]


def _row(options: PdeOptions, seeds: npt.NDArray[np.int64], row: int) -> dict[str, Any]:
    row %= len(seeds)
    record = {"seed": int(seeds[row])}
    if options.rows_per_pack:
        num_templates = len(eligible(options.family, options.min_terms, options.max_terms))
        pack = row // options.rows_per_pack
        record |= {
            "pack_index": pack,
            "template_index": pack % num_templates,
            "instance": pack // num_templates,
            "environment_seed": int(seeds[pack * options.rows_per_pack]),
        }
    return record


def record_at(options: Mapping[str, Any], split: str, seed: int, row: int) -> dict[str, Any]:
    """Return one data record by its row number, modulo their number.

    Args:
        options: a preset merged with overrides.
        split: ``train`` or ``held_out``.
        seed: data seed, >= 0.
        row: >= 0.

    Raises:
        EnvironmentInputError: wrong options, unknown split or a negative seed.
    """
    parsed = parse_options(options)
    return _row(parsed, _row_seeds(parsed, split, seed), row)


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over the data set, again and again; arguments as for :func:`record_at`."""
    parsed = parse_options(options)
    seeds = _row_seeds(parsed, split, seed)  # checks now, not at the first record

    def walk() -> Iterator[dict[str, Any]]:
        row = 0
        while True:
            yield _row(parsed, seeds, row)
            row += 1

    return walk()


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed (0 .. 2^64-1): a hash of the split as well, so that splits share no pack seed.

    Raises:
        EnvironmentInputError: wrong options or an unknown split.
    """
    parse_options(options)
    _check_split(split)
    return hash64(f"{NAME}/{split}/{seed}")
