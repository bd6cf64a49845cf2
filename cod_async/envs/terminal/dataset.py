"""The data set of Terminal: one row seed per task, from which machines, files and goal are rebuilt.

For data seed 42 the rows are those of the paper's reference, 50,000 for training and 4,000 held out. Row
seeds are distinct, so no task of one split occurs in the other. The order of the rows comes from iterating
over a set of integers, which CPython does in a fixed way; a test holds the digest of all rows.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from cod_async.envs.terminal.options import parse_options
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

NUM_TRAIN_ROWS = 50_000
NUM_HELD_OUT_ROWS = 4_000
SPLITS = ("train", "held_out")
_SEED_RANGE = 10_000_000


@functools.lru_cache(maxsize=8)
def _row_seeds(seed: int) -> npt.NDArray[np.int64]:
    """Return all row seeds in order: draw distinct integers with the legacy generator, then shuffle them."""
    generator = np.random.RandomState(seed)
    total = NUM_TRAIN_ROWS + NUM_HELD_OUT_ROWS
    drawn: set[int] = set()
    while len(drawn) < total:  # a draw for each one that is missing, so nothing is drawn in vain
        drawn.update(generator.randint(0, _SEED_RANGE, total - len(drawn)).tolist())
    order = np.array(list(drawn), dtype=np.int64)
    generator.shuffle(order)
    return order


def _check(split: str) -> None:
    if split not in SPLITS:
        raise EnvironmentInputError(f"no split {split!r}; splits are {', '.join(SPLITS)}")


def num_records(options: Mapping[str, Any], split: str) -> int:
    """Return the number of rows of a split."""
    _check(split)
    return NUM_TRAIN_ROWS if split == "train" else NUM_HELD_OUT_ROWS


def record_at(options: Mapping[str, Any], split: str, seed: int, row: int) -> dict[str, Any]:
    """Return row ``row`` >= 0, modulo the number of rows.

    Args:
        options: merged options of a preset.
        split: ``train`` (50,000 rows) or ``held_out`` (4,000 rows, the reference's test set).
        seed: >= 0; 42 is the reference's. Seeds of 2^32 and above are hashed to 32 bits.
        row: row number.

    Raises:
        EnvironmentInputError: wrong options, unknown split or a negative seed.
    """
    parse_options(options)
    _check(split)
    if seed < 0:
        raise EnvironmentInputError(f"the data seed is {seed}; it must not be negative")
    if seed >= 1 << 32:
        seed = hash64(str(seed)) >> 32
    offset = 0 if split == "train" else NUM_TRAIN_ROWS
    return {"seed": int(_row_seeds(seed)[offset + row % num_records(options, split)])}


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over the data set, again and again; arguments as for :func:`record_at`."""
    record_at(options, split, seed, 0)  # checks now, not at the first record

    def walk() -> Iterator[dict[str, Any]]:
        row = 0
        while True:
            yield record_at(options, split, seed, row)
            row += 1

    return walk()


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed (0 .. 2^64-1) of a split; Terminal's tasks do not depend on it.

    Raises:
        EnvironmentInputError: wrong options or an unknown split.
    """
    parse_options(options)
    _check(split)
    return hash64(f"terminal/{split}/{seed}")
