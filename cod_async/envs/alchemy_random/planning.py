"""Shortest syntheses: which pairs to combine, in which order, to get a target in the fewest rounds.

With unlimited materials a product is made once and then used any number of times, so a synthesis is a set of
elements to make, closed downwards, and the rounds are its size. With limited materials every use consumes a
copy, so a synthesis is a binary tree whose leaves are copies at hand, and the rounds are the leaves minus
one. Both are found by iterative deepening over the number of rounds, which makes the first plan found a
shortest one. The search is exact until its node budget is spent; the worlds of the presets need a small
fraction of it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cod_async.envs.alchemy_random.world import Pair, makers_of, reachable_from

MAX_NODES = 50_000
"""Search nodes per plan; beyond them the search gives up and returns None."""

_NEVER = 1 << 30


class _BudgetError(Exception):
    """The node budget is spent."""


class _Search:
    """One search; what both kinds of materials share: recipes worth looking at, and the node budget."""

    def __init__(self, recipes: Mapping[Pair, str], inventory: Mapping[str, int]) -> None:
        reachable = reachable_from(inventory, recipes)
        usable = {
            (first, second): product
            for (first, second), product in recipes.items()
            if first in reachable and second in reachable
        }
        self.inventory = dict(inventory)
        self.makers = makers_of(usable)
        self._nodes_left = MAX_NODES

    def count_node(self) -> None:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise _BudgetError


class _Unlimited(_Search):
    """Elements to make are settled from the highest tier down, so each is settled once."""

    def __init__(
        self, recipes: Mapping[Pair, str], inventory: Mapping[str, int], tier_of: Mapping[str, int]
    ) -> None:
        super().__init__(recipes, inventory)
        self._tier_of = tier_of

    def plan(self, pending: frozenset[str], num_rounds: int) -> list[Pair] | None:
        """Return pairs, last to combine first, that make all of ``pending`` in at most ``num_rounds``."""
        self.count_node()
        if not pending:
            return []
        if len(pending) > num_rounds:
            return None
        name = max(pending, key=lambda one: (self._tier_of[one], one))
        for pair in self.makers.get(name, ()):
            new = {part for part in pair if part not in self.inventory}
            rest = self.plan((pending - {name}) | new, num_rounds - 1)
            if rest is not None:
                return [pair, *rest]
        return None


class _Limited(_Search):
    """A tree over copies at hand; ``leaves`` are what the open places still to fill must not exceed."""

    def __init__(self, recipes: Mapping[Pair, str], inventory: Mapping[str, int]) -> None:
        super().__init__(recipes, inventory)
        # Fewest leaves of each element: one if at hand, else of its cheapest recipe. A product is of a higher
        # tier than its inputs, so as many sweeps as there are products settle all of them.
        self.fewest = dict.fromkeys(inventory, 1)
        for _ in range(len(self.makers)):
            before = dict(self.fewest)
            for name, pairs in self.makers.items():
                for first, second in pairs:
                    leaves = self.fewest.get(first, _NEVER) + self.fewest.get(second, _NEVER)
                    self.fewest[name] = min(self.fewest.get(name, _NEVER), leaves)
            if self.fewest == before:
                break

    def plan(self, places: Sequence[str], num_leaves: int) -> list[Pair] | None:
        """Return pairs, last to combine first, that fill all places with at most ``num_leaves`` copies."""
        self.count_node()
        if not places:
            return []
        if sum(self.fewest.get(name, _NEVER) for name in places) > num_leaves:
            return None
        name, rest = places[-1], places[:-1]
        if self.inventory.get(name, 0):
            self.inventory[name] -= 1
            found = self.plan(rest, num_leaves - 1)
            self.inventory[name] += 1
            if found is not None:
                return found
        for pair in self.makers.get(name, ()):
            found = self.plan([*rest, *pair], num_leaves)
            if found is not None:
                return [pair, *found]
        return None


def shortest_plan(
    recipes: Mapping[Pair, str],
    tiers: Sequence[Sequence[str]],
    inventory: Mapping[str, int],
    target: str,
    *,
    is_limited: bool,
    max_rounds: int,
) -> list[Pair] | None:
    """Return a synthesis with the fewest rounds.

    Args:
        recipes: the recipes that may be used; any subset of a world's.
        tiers: names by tier.
        inventory: copies at hand (>= 1) of each element.
        target: an element that is not at hand.
        is_limited: whether combining uses up its inputs.
        max_rounds: most rounds of the synthesis.

    Returns:
        The pairs in the order in which to combine them, or None if the target cannot be made within
        ``max_rounds`` (or the node budget is spent).
    """
    try:
        if is_limited:
            limited = _Limited(recipes, inventory)
            most = min(sum(inventory.values()), max_rounds + 1)
            for num_leaves in range(limited.fewest.get(target, _NEVER), most + 1):
                found = limited.plan([target], num_leaves)
                if found is not None:
                    return found[::-1]
            return None
        tier_of = {name: tier for tier, names in enumerate(tiers) for name in names}
        unlimited = _Unlimited(recipes, inventory, tier_of)
        if target not in unlimited.makers:
            return None
        for num_rounds in range(1, min(max_rounds, len(unlimited.makers)) + 1):
            found = unlimited.plan(frozenset([target]), num_rounds)
            if found is not None:
                return found[::-1]
        return None
    except _BudgetError:
        return None
