"""The data set of FrozenLake-Obscure: one line per task, (seed, size, p), from which the map is rebuilt.

For seed 42 the rows are those of the paper's reference: 50,000 train rows and 4,000 test rows, drawn by
NumPy's legacy generator column by column in a fixed order (train seeds, test seeds, train sizes, test sizes,
train p, test p).
"""

from __future__ import annotations

import functools
import random
from collections.abc import Iterator, Mapping
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt

from cod_async.envs.frozen_lake_obscure.mapgen import MAPPINGS, mapping_for_seed
from cod_async.envs.frozen_lake_obscure.options import FrozenLakeOptions, parse_options
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

NUM_TRAIN_ROWS = 50_000
NUM_HELD_OUT_ROWS = 4_000
SPLITS = ("train", "held_out")
_SEED_RANGE = 100_000


class Columns(msgspec.Struct, frozen=True):
    """One split, N rows: ``seeds`` int64, ``sizes`` int64 (cells), ``ps`` float64 (probability of frozen)."""

    seeds: npt.NDArray[np.int64]
    sizes: npt.NDArray[np.int64]
    ps: npt.NDArray[np.float64]

    def row(self, index: int) -> dict[str, Any]:
        """Return row ``index`` modulo N as a data record."""
        index %= len(self.seeds)
        return {"seed": int(self.seeds[index]), "size": int(self.sizes[index]), "p": float(self.ps[index])}


@functools.lru_cache(maxsize=16)
def _columns(seed: int, size_min: int, size_max: int, p_min: float, p_max: float) -> dict[str, Columns]:
    generator = np.random.RandomState(seed)
    counts = (NUM_TRAIN_ROWS, NUM_HELD_OUT_ROWS)
    seeds = [generator.randint(0, _SEED_RANGE, count) for count in counts]
    sizes = [generator.randint(size_min, size_max + 1, count) for count in counts]
    ps = [generator.uniform(p_min, p_max, count) for count in counts]
    return {split: Columns(seeds=seeds[i], sizes=sizes[i], ps=ps[i]) for i, split in enumerate(SPLITS)}


def columns(options: FrozenLakeOptions, split: str, seed: int) -> Columns:
    """Return one split of the data set.

    Args:
        options: sizes and p are drawn from their ranges.
        split: ``train`` (50,000 rows) or ``held_out`` (4,000 rows, the reference's test set).
        seed: >= 0; 42 is the reference's. Seeds of 2^32 and above are hashed to 32 bits.

    Raises:
        EnvironmentInputError: unknown split or a negative seed.
    """
    if split not in SPLITS:
        raise EnvironmentInputError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    if seed < 0:
        raise EnvironmentInputError(f"the data seed is {seed}; it must not be negative")
    if seed >= 1 << 32:
        seed = hash64(str(seed)) >> 32
    return _columns(seed, options.size_min, options.size_max, float(options.p_min), float(options.p_max))[
        split
    ]


def record_at(options: Mapping[str, Any], split: str, seed: int, row: int) -> dict[str, Any]:
    """Return one data record by its row number, modulo their number; arguments as for :func:`columns`."""
    return columns(parse_options(options), split, seed).row(row)


def num_records(options: Mapping[str, Any], split: str) -> int:
    """Return the number of rows of a split."""
    return NUM_TRAIN_ROWS if split == "train" else NUM_HELD_OUT_ROWS


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over the data set, again and again; arguments as for :func:`columns`."""
    split_columns = columns(parse_options(options), split, seed)  # checks now, not at the first record

    def walk() -> Iterator[dict[str, Any]]:
        row = 0
        while True:
            yield split_columns.row(row)
            row += 1

    return walk()


@functools.cache
def _held_out_mappings(count: int) -> frozenset[tuple[str, ...]]:
    """Return the mappings that training never meets: the first ``count`` of a fixed shuffle of the 24."""
    order = list(MAPPINGS)
    random.Random("frozen_lake_obscure/held_out").shuffle(order)
    return frozenset(order[:count])


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed (0 .. 2^64-1) for a split: a hash of both, so that splits never share a pack seed.

    By default all 24 mappings occur in both splits, as in the paper: what a policy can learn by heart is that
    there are 24, not which one holds in a pack; held-out tasks differ by their maps. With
    ``num_held_out_mappings`` seeds are hashed on until their mapping belongs to the split.

    Raises:
        EnvironmentInputError: unknown split or wrong options.
    """
    if split not in SPLITS:
        raise EnvironmentInputError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    held_out = _held_out_mappings(parse_options(options).num_held_out_mappings)
    attempt = 0
    while True:  # each attempt succeeds with probability >= 1/24
        text = f"frozen_lake_obscure/{split}/{seed}/{attempt}"
        pack_seed = hash64(text)
        if not held_out or (mapping_for_seed(pack_seed) in held_out) == (split == "held_out"):
            return pack_seed
        attempt += 1
