"""The data set of Alchemy-Random: one line per task, only a seed.

The hidden world and the target come from the pack; a row's seed decides nothing but the supply of raw
elements in limited mode. For data seed 42 the rows are those of the paper's reference: 54,000 different
integers below 10^7, drawn by NumPy's legacy generator, the first 50,000 for training and the rest for
testing.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cod_async.envs.alchemy_random.options import parse_options
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

NUM_TRAIN_ROWS = 50_000
NUM_HELD_OUT_ROWS = 4_000
SPLITS = ("train", "held_out")
REFERENCE_SEED = 42
_SEED_RANGE = 10_000_000


@functools.lru_cache(maxsize=16)
def _seeds(seed: int) -> npt.NDArray[np.int64]:
    """Return all rows of a data seed.

    The reference shuffles the whole range, which holds every thread of the process for a second; only its own
    seed is drawn that way.
    """
    count = NUM_TRAIN_ROWS + NUM_HELD_OUT_ROWS
    if seed != REFERENCE_SEED:
        return np.random.default_rng(seed).choice(_SEED_RANGE, count, replace=False)
    rows = np.arange(_SEED_RANGE, dtype=np.int32)
    np.random.RandomState(seed).shuffle(rows)  # the draws of choice(range, count, replace=False)
    return rows[:count].astype(np.int64)  # a copy; frees the range


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise EnvironmentInputError(f"no split {split!r}; splits are {', '.join(SPLITS)}")


def split_seeds(split: str, seed: int) -> npt.NDArray[np.int64]:
    """Return the seeds of one split: int64, (50000,) for ``train`` or (4000,) for ``held_out``, 0 .. 10^7-1.

    Args:
        split: ``train`` or ``held_out`` (the reference's test rows); no seed is in both.
        seed: >= 0; 42 is the reference's. Seeds of 2^32 and above are hashed to 32 bits.

    Raises:
        EnvironmentInputError: unknown split or a negative seed.
    """
    _check_split(split)
    if seed < 0:
        raise EnvironmentInputError(f"the data seed is {seed}; it must not be negative")
    if seed >= 1 << 32:
        seed = hash64(str(seed)) >> 32
    rows = _seeds(seed)
    return rows[:NUM_TRAIN_ROWS] if split == "train" else rows[NUM_TRAIN_ROWS:]


def num_records(options: Mapping[str, Any], split: str) -> int:
    """Return the number of rows of a split."""
    _check_split(split)
    return NUM_TRAIN_ROWS if split == "train" else NUM_HELD_OUT_ROWS


def record_at(options: Mapping[str, Any], split: str, seed: int, row: int) -> dict[str, Any]:
    """Return one data record by its row number, modulo their number; arguments as for :func:`split_seeds`."""
    parse_options(options)
    seeds = split_seeds(split, seed)
    return {"seed": int(seeds[row % len(seeds)])}


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over the data set, again and again; see :func:`split_seeds`."""
    parse_options(options)
    seeds = split_seeds(split, seed)  # checks now, not at the first record

    def walk() -> Iterator[dict[str, Any]]:
        while True:
            for value in seeds:
                yield {"seed": int(value)}

    return walk()


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed (0 .. 2^64-1) for a split: a hash of both.

    Splits share no pack seed, and a pack seed decides every name and recipe, so no held-out world is met in
    training.

    Raises:
        EnvironmentInputError: unknown split or wrong options.
    """
    _check_split(split)
    parse_options(options)
    return hash64(f"alchemy_random/{split}/{seed}")
