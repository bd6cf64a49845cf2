"""The words of each theme, the hidden worlds under them, and the options.

A world matches n items with n places, one to one. Its number (rank), how a pack seed chooses it, and which
ranks are held out are those of the permutation worlds of :mod:`cod_async.envs.hidden_buttons`, so that themes
differ in words alone: a difference between two of them is a difference in what was learned, not in the game.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any, Literal

import msgspec

from cod_async.envs.hidden_buttons import worlds as buttons
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

ThemeName = Literal["rooms", "machines"]


class Theme(msgspec.Struct, frozen=True):
    """The words of a theme; no word occurs in two of them, nor in hidden_buttons.

    Attributes:
        noun: what a place is called in a task.
        items: what is chosen, in the order in which larger worlds take them up.
        places: what a goal can be, in the same way; as many as items.
    """

    noun: str
    items: tuple[str, ...]
    places: tuple[str, ...]


THEMES: dict[ThemeName, Theme] = {
    "rooms": Theme(
        noun="room",
        items=("red", "blue", "green", "gold", "black", "pink"),
        places=("Hall", "Attic", "Cellar", "Study", "Garden", "Tower"),
    ),
    "machines": Theme(
        noun="machine",
        items=("wrench", "hammer", "pliers", "saw", "drill", "file"),
        places=("Pump", "Loom", "Crane", "Mill", "Lathe", "Press"),
    ),
}
"""Keys that open rooms; tools that repair machines."""

MAX_ITEMS = 6
"""Most items of a world; every theme has so many."""

SHARED_NOUN = "goal"
"""What hidden_buttons calls the place to reach."""


class Options(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The options of a preset.

    Attributes:
        theme: the words: ``rooms`` or ``machines``.
        has_own_noun: whether a task names the kind of place (``Task room Hall``), or says ``goal`` as in
            hidden_buttons (``Task goal Hall``), so that all families open a task with the same words.
        num_items: items, and as many places (2 .. 6).
        num_tries: tries per task (1 .. 9).
        retry_reward: reward of a success that is not on the first try (0 .. 1); the first earns 1.
        held_out_frac: share of the worlds kept from training (0 .. 0.9), rounded down; with 0 both splits are
            equal.
    """

    theme: ThemeName = "rooms"
    has_own_noun: bool = True
    num_items: int = 5
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
                problems.append(f"environment hidden_matches: {name} is {value!r}: {error}")
        if problems:
            raise EnvironmentInputError(problems)
        made = msgspec.convert(dict(options), cls)
        rules = (
            ("num_items", 2 <= made.num_items <= MAX_ITEMS, f"2 to {MAX_ITEMS}"),
            ("num_tries", 1 <= made.num_tries <= 9, "1 to 9"),
            ("retry_reward", 0 <= made.retry_reward <= 1, "0 to 1"),
            ("held_out_frac", 0 <= made.held_out_frac <= 0.9, "0 to 0.9"),
        )
        problems = [
            f"environment hidden_matches: {name} is {getattr(made, name)}; it must be in {allowed}"
            for name, is_fine, allowed in rules
            if not is_fine
        ]
        if problems:
            raise EnvironmentInputError(problems)
        return made

    @property
    def noun(self) -> str:
        """What a place is called in a task."""
        return THEMES[self.theme].noun if self.has_own_noun else SHARED_NOUN

    @property
    def items(self) -> tuple[str, ...]:
        """Items of these worlds."""
        return THEMES[self.theme].items[: self.num_items]

    @property
    def places(self) -> tuple[str, ...]:
        """Places of these worlds."""
        return THEMES[self.theme].places[: self.num_items]

    @property
    def permutations(self) -> buttons.Options:
        """The options of hidden_buttons whose permutations these worlds are."""
        return buttons.Options(num_buttons=self.num_items, held_out_frac=self.held_out_frac)


def mapping_of(options: Options, pack_seed: int) -> dict[str, str]:
    """Return item -> place in the world of a pack seed, in the theme's order of items."""
    permutations = options.permutations
    directions = buttons.mapping_of(permutations, buttons.world_of(permutations, pack_seed))
    places = (options.places[buttons.DIRECTIONS.index(direction)] for direction in directions)
    return dict(zip(options.items, places, strict=True))


def goal_of(options: Options, record: Mapping[str, Any]) -> str:
    """Return the goal of a data record.

    Raises:
        EnvironmentInputError: the record is not ``{"seed": integer}``.
    """
    seed = record.get("seed")
    if set(record) != {"seed"} or not isinstance(seed, int) or isinstance(seed, bool):
        raise EnvironmentInputError(
            f'hidden_matches: the record is {dict(record)}; it must be {{"seed": integer}}'
        )
    return options.places[hash64(f"place:{seed}") % options.num_items]


def _check(options: Mapping[str, Any], split: str) -> Options:
    if split not in ("train", "held_out"):
        raise EnvironmentInputError(f"hidden_matches: no split {split!r}; splits are train, held_out")
    return Options.of(options)


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed whose world belongs to the split: ``seed`` if it does, else one hashed from it.

    Raises:
        EnvironmentInputError: unknown split, or wrong options.
    """
    permutations = msgspec.structs.asdict(_check(options, split).permutations)
    return buttons.pack_seed_for(permutations, split, seed)


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Yield data records without end; a record only sets the goal, so both splits draw from all goals.

    Raises:
        EnvironmentInputError: unknown split, or wrong options.
    """
    theme, index = _check(options, split).theme, 0
    while True:
        # exact in any JSON reader
        yield {"seed": hash64(f"{theme} record:{split}:{seed}:{index}") >> 11}
        index += 1


def all_words(options: Options) -> tuple[str, ...]:
    """Return the theme's own words in these worlds: noun, items, places, facts."""
    facts = (f"{item}={place}" for item in options.items for place in options.places)
    return tuple(chain((options.noun,), options.items, options.places, facts))
