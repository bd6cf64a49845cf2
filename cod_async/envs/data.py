"""What the data sets of environments have in common: two splits, data seeds, the paper's number of rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

SPLITS = ("train", "held_out")
NUM_TRAIN_ROWS = 50_000
NUM_HELD_OUT_ROWS = 4_000
"""Rows of the data sets that the paper's reference draws."""


def check_split(split: str, who: str = "") -> None:
    """Refuse a split that does not exist; ``who`` begins the message.

    Raises:
        EnvironmentInputError: unknown split.
    """
    if split not in SPLITS:
        raise EnvironmentInputError(f"{who}no split {split!r}; splits are {', '.join(SPLITS)}")


def check_data_seed(seed: int, who: str = "") -> None:
    """Refuse a negative data seed; ``who`` begins the message.

    Raises:
        EnvironmentInputError: negative seed.
    """
    if seed < 0:
        raise EnvironmentInputError(f"{who}the data seed is {seed}; it must not be negative")


def legacy_seed(seed: int) -> int:
    """Return a seed >= 0 as NumPy's legacy generator takes it: those of 2^32 and above are hashed."""
    return hash64(str(seed)) >> 32 if seed >= 1 << 32 else seed


def num_paper_rows(options: Mapping[str, Any], split: str) -> int:
    """Return the number of rows of a split of 50,000 and 4,000 rows, whatever the options.

    Raises:
        EnvironmentInputError: unknown split.
    """
    check_split(split)
    return NUM_TRAIN_ROWS if split == "train" else NUM_HELD_OUT_ROWS
