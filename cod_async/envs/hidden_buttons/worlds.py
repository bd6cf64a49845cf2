"""The hidden worlds: which button does what, which worlds are held out, and how seeds choose among them.

A world is a number (its rank). In a ``permutation`` world of n buttons it is the rank of a permutation of n
directions in lexicographic order; in a ``door`` world it is the index of the one button that leads in. Which
ranks are held out is fixed once and for all, so that no run ever trains on them.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping
from functools import lru_cache
from typing import Any, Literal

import msgspec

from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

DIRECTIONS = ("Up", "Down", "Left", "Right", "In", "Out", "Front", "Back", "Home")
"""Directions in the order in which worlds with more buttons take them up; also the most buttons."""

DOOR_GOAL, DOOR_SHUT = "In", "Shut"
"""What the one right button of a door world does, and what all others do."""

# Chosen so that among the 24 held-out worlds of 5 buttons every (button, direction) pair occurs 4 to 6 times:
# a model that only learned which button is likelier for a direction gains nothing on either side of the
# split.
_SPLIT_SALT = "held out 670"

WorldKind = Literal["permutation", "door"]


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of a preset.

    Attributes:
        world: ``permutation`` (every button has its own direction, the goal varies) or ``door`` (one button
            leads in, the goal is always that one, and every press reveals it).
        num_buttons: buttons, numbered from 1 (2 .. 9).
        num_tries: presses per task (1 .. 9).
        retry_reward: reward of a success that is not on the first press (0 .. 1); the first press earns 1.
        held_out_frac: share of the worlds kept from training (0 .. 0.9), rounded down; with 0 both splits are
            equal.
    """

    world: WorldKind = "permutation"
    num_buttons: int = 5
    num_tries: int = 2
    retry_reward: float = 0.5
    held_out_frac: float = 0.2

    @classmethod
    def of(cls, options: Mapping[str, Any]) -> Options:
        """Check and convert merged options.

        Raises:
            EnvironmentInputError: all options that are wrong, each with its value and range.
        """
        problems = []
        for name, value in options.items():  # one at a time, because msgspec stops at the first problem
            try:
                msgspec.convert({name: value}, cls)
            except msgspec.ValidationError as error:
                problems.append(f"environment hidden_buttons: {name}: {error}")
        if problems:
            raise EnvironmentInputError(problems)
        made = msgspec.convert(dict(options), cls)
        rules = (
            ("num_buttons", 2 <= made.num_buttons <= len(DIRECTIONS), f"2 to {len(DIRECTIONS)}"),
            ("num_tries", 1 <= made.num_tries <= 9, "1 to 9"),
            ("retry_reward", 0 <= made.retry_reward <= 1, "0 to 1"),
            ("held_out_frac", 0 <= made.held_out_frac <= 0.9, "0 to 0.9"),
        )
        problems = [
            f"environment hidden_buttons: {name} is {getattr(made, name)}; it must be in {allowed}"
            for name, is_fine, allowed in rules
            if not is_fine
        ]
        if problems:
            raise EnvironmentInputError(problems)
        return made

    @property
    def num_worlds(self) -> int:
        """Number of different hidden worlds."""
        return self.num_buttons if self.world == "door" else math.factorial(self.num_buttons)

    @property
    def num_held_out(self) -> int:
        """Number of worlds kept from training; at least one world always remains for it."""
        return min(int(self.num_worlds * self.held_out_frac + 1e-9), self.num_worlds - 1)

    @property
    def directions(self) -> tuple[str, ...]:
        """Directions that goals and buttons have in these worlds."""
        return (DOOR_GOAL,) if self.world == "door" else DIRECTIONS[: self.num_buttons]


def _unrank(rank: int, num_items: int) -> list[int]:
    """Return the permutation of 0 .. n-1 with this lexicographic rank."""
    items, chosen = list(range(num_items)), []
    for remaining in range(num_items, 0, -1):
        index, rank = divmod(rank, math.factorial(remaining - 1))
        chosen.append(items.pop(index))
    return chosen


@lru_cache(maxsize=16)
def held_out_worlds(options: Options) -> frozenset[int]:
    """Return the ranks that are never trained on (up to some seconds for 9 buttons, once per process)."""
    if not options.num_held_out:
        return frozenset()
    salt = f"{_SPLIT_SALT}:{options.num_buttons}" + (":door" if options.world == "door" else "")
    order = sorted(
        range(options.num_worlds), key=lambda rank: hashlib.sha256(f"{salt}:{rank}".encode()).digest()
    )
    return frozenset(order[: options.num_held_out])


def world_of(options: Options, pack_seed: int) -> int:
    """Return the rank of the world that a pack seed stands for."""
    return hash64(f"world:{pack_seed}") % options.num_worlds


def mapping_of(options: Options, world: int) -> tuple[str, ...]:
    """Return what each button does, button 1 first."""
    if options.world == "door":
        return tuple(DOOR_GOAL if index == world else DOOR_SHUT for index in range(options.num_buttons))
    return tuple(DIRECTIONS[index] for index in _unrank(world, options.num_buttons))


def goal_of(options: Options, record: Mapping[str, Any]) -> str:
    """Return the goal of a data record.

    Raises:
        EnvironmentInputError: the record is not ``{"seed": integer}``.
    """
    seed = record.get("seed")
    if set(record) != {"seed"} or not isinstance(seed, int) or isinstance(seed, bool):
        raise EnvironmentInputError(
            f'hidden_buttons: the record is {dict(record)}; it must be {{"seed": integer}}'
        )
    return options.directions[hash64(f"goal:{seed}") % len(options.directions)]


def _check_split(split: str) -> None:
    if split not in ("train", "held_out"):
        raise EnvironmentInputError(f"hidden_buttons: no split {split!r}; splits are train, held_out")


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed whose world belongs to the split: ``seed`` if it does, else one hashed from it.

    Raises:
        EnvironmentInputError: unknown split, or wrong options.
    """
    _check_split(split)
    made = Options.of(options)
    held_out = held_out_worlds(made)
    candidate, attempt = seed, 0
    while held_out and (world_of(made, candidate) in held_out) != (split == "held_out"):
        attempt += 1
        candidate = hash64(f"pack:{seed}:{attempt}")
    return candidate


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield data records without end; a record only sets the goal, so both splits draw from all goals.

    Raises:
        EnvironmentInputError: unknown split, or wrong options.
    """
    _check_split(split)
    Options.of(options)
    index = 0
    while True:
        yield {"seed": hash64(f"record:{split}:{seed}:{index}") >> 11}  # exact in any JSON reader
        index += 1
