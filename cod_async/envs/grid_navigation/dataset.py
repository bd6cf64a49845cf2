"""The data set of Grid Navigation: one line per task, a seed, from which start, goal and rounds are drawn.

For seed 42 the rows are those of the paper's reference: 54,000 distinct seeds below ten million, the first
50,000 for training, the last 4,000 held out. Maps are not part of the data set; they come from pack seeds.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cod_async.envs.grid_navigation.options import parse_options
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

NUM_TRAIN_ROWS = 50_000
NUM_HELD_OUT_ROWS = 4_000
SPLITS = ("train", "held_out")
_NUM_ROWS = NUM_TRAIN_ROWS + NUM_HELD_OUT_ROWS
_SEED_RANGE = 10_000_000


@functools.lru_cache(maxsize=16)
def _seeds(seed: int) -> dict[str, npt.NDArray[np.int64]]:
    drawn = np.random.default_rng(seed).choice(_SEED_RANGE, size=_NUM_ROWS, replace=False)
    return {"train": drawn[:NUM_TRAIN_ROWS], "held_out": drawn[NUM_TRAIN_ROWS:]}


def _check_split(split: str) -> None:
    if split not in SPLITS:
        raise EnvironmentInputError(
            f"environment grid_navigation: no split {split!r}; splits are {', '.join(SPLITS)}"
        )


def _rows(options: Mapping[str, Any], split: str, seed: int) -> npt.NDArray[np.int64]:
    parse_options(options)
    _check_split(split)
    if seed < 0:
        raise EnvironmentInputError(
            f"environment grid_navigation: the data seed is {seed}; it must not be negative"
        )
    return _seeds(seed)[split]


def num_records(options: Mapping[str, Any], split: str) -> int:
    """Return the number of rows of a split.

    Raises:
        EnvironmentInputError: unknown split.
    """
    _check_split(split)
    return NUM_TRAIN_ROWS if split == "train" else NUM_HELD_OUT_ROWS


def record_at(options: Mapping[str, Any], split: str, seed: int, row: int) -> dict[str, Any]:
    """Return one data record by its row number, modulo their number.

    Args:
        options: checked; the rows depend on none of them.
        split: ``train`` (50,000 rows) or ``held_out`` (4,000 rows, the reference's test set).
        seed: >= 0; 42 is the reference's.
        row: >= 0.

    Raises:
        EnvironmentInputError: unknown split, negative seed, or wrong options.
    """
    rows = _rows(options, split, seed)
    return {"seed": int(rows[row % len(rows)])}


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over the data set, again and again; arguments as for :func:`record_at`."""
    rows = _rows(options, split, seed)  # checks now, not at the first record
    return ({"seed": int(rows[row % len(rows)])} for row in itertools.count())


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed (0 .. 2^64-1) for a split: even for training, odd for held-out packs.

    The rest is a hash of the environment's name, the split and the seed. A map depends on its pack seed
    alone, so no map seed of one split ever occurs in the other.

    Raises:
        EnvironmentInputError: unknown split or wrong options.
    """
    parse_options(options)
    _check_split(split)
    return hash64(f"grid_navigation/{split}/{seed}") & ~1 | (split == "held_out")
