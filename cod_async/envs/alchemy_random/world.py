"""Worlds: elements in tiers, the recipe book, the targets of a pack, and how much raw material a task gets.

A world is drawn from the pack seed by one Mersenne generator in a fixed order, so that the worlds are those
of the paper's reference: number of tiers, raw elements, shrink, cross-tier probability, noise ratio (drawn
even where a range is a single value); names tier by tier; recipes tier by tier; noise; targets. Two quirks
of the reference are part of that and kept: with a tier gap of 1 cross-tier recipes never occur, and there are
only as many targets as elements above tier 0.
"""

from __future__ import annotations

import random
import string
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import msgspec

from cod_async.envs.alchemy_random.options import AlchemyOptions
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import stable_seed

Pair = tuple[str, str]
"""Two elements in alphabetical order, possibly the same one twice."""

MAX_TRIES = 50
"""Tries to find an unused pair for a recipe; after that the recipe is left out (the reference's number)."""
MAX_WORLDS = 1_000
"""Worlds that are drawn in search of one with enough distinct targets."""


class World(msgspec.Struct, frozen=True):
    """The hidden world of a pack.

    Attributes:
        tiers: names of the elements, tier 0 (raw) first; noise elements stand at the end of their tier.
        recipes: what each pair makes, in the order in which recipes were drawn.
        targets: the tasks' targets; the task at position j has number j modulo their number.
    """

    tiers: tuple[tuple[str, ...], ...]
    recipes: dict[Pair, str]
    targets: tuple[str, ...]

    def tier_of(self, name: str) -> int:
        """Return the tier of an element of this world, 0-based."""
        return next(tier for tier, names in enumerate(self.tiers) if name in names)


def pair_of(first: str, second: str) -> Pair:
    """Return the two names in alphabetical order."""
    return (first, second) if first <= second else (second, first)


def makers_of(recipes: Mapping[Pair, str]) -> dict[str, list[Pair]]:
    """Return the pairs that make each element, in the order of the recipes."""
    makers: dict[str, list[Pair]] = {}
    for pair, product in recipes.items():
        makers.setdefault(product, []).append(pair)
    return makers


def reachable_from(owned: Iterable[str], recipes: Mapping[Pair, str]) -> set[str]:
    """Return what can be made from ``owned`` elements in any number of rounds, themselves included."""
    reached = set(owned)
    while True:
        new = {
            product
            for (first, second), product in recipes.items()
            if product not in reached and first in reached and second in reached
        }
        if not new:
            return reached
        reached |= new


class _Draw:
    """One world in the making: the generator and what it has drawn so far."""

    def __init__(self, options: AlchemyOptions, seed: int) -> None:
        self._rng = random.Random(seed)
        self._max_tier_gap = options.max_tier_gap
        self._num_recipes = (options.num_recipes_min, options.num_recipes_max)
        self._num_noise_rounds = options.num_noise_rounds
        num_tiers = self._rng.randint(options.num_tiers_min, options.num_tiers_max)
        num_base = self._rng.randint(options.num_base_min, options.num_base_max)
        shrink = self._rng.uniform(options.shrink_min, options.shrink_max)
        self._cross_tier_prob = self._rng.uniform(options.cross_tier_prob_min, options.cross_tier_prob_max)
        self._noise_ratio = self._rng.uniform(options.noise_ratio_min, options.noise_ratio_max)
        sizes = [num_base]
        while len(sizes) < num_tiers:
            sizes.append(max(1, round(sizes[-1] * shrink)))
        self._names: set[str] = set()
        self.tiers = [[self._name() for _ in range(size)] for size in sizes]
        self.recipes: dict[Pair, str] = {}

    def _name(self) -> str:
        while True:
            length = self._rng.randint(3, 5)
            name = "".join(self._rng.choices(string.ascii_lowercase, k=length))
            if name not in self._names:
                self._names.add(name)
                return name

    def _second_input_tier(self, tier: int) -> int:
        """Return the tier of a second input: as a rule the one below, rarely one further down."""
        is_crossing = self._rng.random() < self._cross_tier_prob
        lowest, highest = max(0, tier - self._max_tier_gap), tier - 2
        if is_crossing and tier >= 2 and lowest <= highest:
            return self._rng.randint(lowest, highest)
        return tier - 1

    def _add_recipe(self, tier: int, product: str) -> bool:
        """Draw a recipe for an element of ``tier``; return False if no unused pair was found."""
        for _ in range(MAX_TRIES):
            first = self._rng.choice(self.tiers[tier - 1])
            second = self._rng.choice(self.tiers[self._second_input_tier(tier)])
            pair = pair_of(first, second)
            if pair not in self.recipes:
                self.recipes[pair] = product
                return True
        return False

    def add_recipes(self) -> None:
        """Draw the recipes of all elements above tier 0."""
        for tier in range(1, len(self.tiers)):
            for name in self.tiers[tier]:
                for _ in range(self._rng.randint(*self._num_recipes)):
                    self._add_recipe(tier, name)

    def add_noise(self) -> None:
        """Add useless elements; one whose recipe finds no unused pair is left out."""
        if self._noise_ratio <= 0:
            return
        counts = [round(len(names) * self._noise_ratio) for names in self.tiers]
        for noise_round in range(self._num_noise_rounds):
            added: list[tuple[int, str]] = []
            for tier in range(1, len(self.tiers)):
                for _ in range(counts[tier] if noise_round == 0 else round(counts[tier] * 0.5)):
                    name = self._name()
                    if self._add_recipe(tier, name):
                        added.append((tier, name))
            for tier, name in added:  # only now, so that a round does not build on itself
                self.tiers[tier].append(name)

    def targets(self, real: Sequence[Sequence[str]], count: int) -> list[str]:
        """Draw up to ``count`` different targets of the useful elements, higher tiers more often."""
        left = {tier: list(names) for tier, names in enumerate(real) if tier >= 1}
        drawn: list[str] = []
        while left and len(drawn) < count:
            tier = self._rng.choices(list(left), weights=[tier + 1 for tier in left])[0]
            name = self._rng.choice(left[tier])
            left[tier].remove(name)
            if not left[tier]:
                del left[tier]
            drawn.append(name)
        self._rng.shuffle(drawn)
        return drawn


def draw_world(options: AlchemyOptions, seed: int, pack_size: int) -> World:
    """Draw the world of a pack seed (0 .. 2^64-1), whatever its number of targets.

    Unless ``options.parity``, targets that cannot be made at all (their recipes found no unused pair) are
    taken out of the list; with the presets there are none.
    """
    draw = _Draw(options, seed)
    real = [tuple(names) for names in draw.tiers]
    draw.add_recipes()
    draw.add_noise()
    targets = draw.targets(real, pack_size)
    if not options.parity:
        reachable = reachable_from(real[0], draw.recipes)
        # The first element of tier 1 always has a recipe of raw elements: nothing was taken before it.
        targets = [name for name in targets if name in reachable] or [real[1][0]]
    return World(
        tiers=tuple(tuple(names) for names in draw.tiers), recipes=draw.recipes, targets=tuple(targets)
    )


def world_for_pack(options: AlchemyOptions, pack_seed: int, pack_size: int) -> World:
    """Return the world of a pack.

    With ``has_distinct_targets``, worlds with fewer targets than tasks are skipped; their successors' seeds
    are hashes of the pack seed and a counter.

    Raises:
        EnvironmentInputError: no world of these options has that many targets.
    """
    if not options.has_distinct_targets:
        return draw_world(options, pack_seed, pack_size)
    sizes = [options.num_base_max]
    while len(sizes) < options.num_tiers_max:
        sizes.append(max(1, round(sizes[-1] * options.shrink_max)))
    is_possible = sum(sizes[1:]) >= pack_size
    for attempt in range(MAX_WORLDS if is_possible else 0):
        seed = stable_seed("alchemy_random", pack_seed, attempt) if attempt else pack_seed
        world = draw_world(options, seed, pack_size)
        if len(world.targets) == pack_size:
            return world
    raise EnvironmentInputError(
        f"environment alchemy_random: has_distinct_targets is true, but worlds of these options have at most "
        f"{sum(sizes[1:])} elements to make and rarely that many; a pack of {pack_size} tasks needs "
        f"{pack_size}; make packs shorter or raise num_base_max, num_tiers_max or shrink_max"
    )


def exact_need(world: World, target: str) -> int:
    """Return the most copies of one raw element that the synthesis by first recipes uses up, >= 1.

    Every intermediate product is made as often as it is used, because use consumes it.
    """
    makers = makers_of(world.recipes)
    known: dict[str, Counter[str]] = {}

    def copies(name: str) -> Counter[str]:  # recurses at most once per tier: inputs are of lower tiers
        if name not in known:
            pairs = makers.get(name)
            known[name] = Counter([name]) if not pairs else copies(pairs[0][0]) + copies(pairs[0][1])
        return known[name]

    return max(copies(target).values())


def reference_need(world: World, target: str) -> int:
    """Return what the paper's reference takes for that number: every intermediate product is made once.

    Where one is used again, a further copy counts as if it were raw, so the number can be too small.
    """
    makers = makers_of(world.recipes)
    done: set[str] = set()
    stock: Counter[str] = Counter()
    missing: Counter[str] = Counter()

    def make(name: str) -> None:
        if name in done:
            return
        done.add(name)
        pairs = makers.get(name)
        if not pairs:
            return
        for part in pairs[0]:
            make(part)
        for part in pairs[0]:
            if stock[part] > 0:
                stock[part] -= 1
            else:
                missing[part] += 1
        stock[name] += 1

    make(target)
    return max(missing.values(), default=1)


def supply(options: AlchemyOptions, world: World, target: str, row_seed: int) -> int:
    """Return the copies of each raw element at the start of a task: 1 if materials are unlimited.

    The reference's number, and, unless ``options.parity``, never less than one synthesis uses up: of the
    tasks of hard packs of 8, 7 % get more than in the reference, the others the same.

    Args:
        options: mode, multiplier range and parity.
        world: the pack's world.
        target: an element of it above tier 0.
        row_seed: seed of the data record; decides the multiplier.
    """
    if options.material_mode == "unlimited":
        return 1
    need = reference_need(world, target)
    mult = random.Random(row_seed).uniform(options.material_mult_min, options.material_mult_max)
    copies = max(need, int(need * mult + 0.5))
    return copies if options.parity else max(copies, exact_need(world, target))
