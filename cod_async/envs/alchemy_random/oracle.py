"""Scripted policies: the floor and the ceilings of a learning curve.

``random`` combines any feasible pair. ``oracle`` is told the recipes and follows a shortest synthesis: what a
policy with a perfect hint reaches. ``explorer`` is told nothing that the policy is not shown: it follows a
shortest synthesis of recipes it has seen, and otherwise tries pairs it has not tried yet, those first that
could make the target at once. It carries what it has seen from task to task, so its curve rises with the
position. It is a sensible player, not an optimal one: a bound for nobody, but a mark that a model with
working hints should come near to.
"""

from __future__ import annotations

import random
from typing import Any

from cod_async.envs.alchemy_random.env import AlchemyRandom, messages
from cod_async.envs.alchemy_random.planning import shortest_plan
from cod_async.envs.alchemy_random.world import Pair
from cod_async.envs.base import Environment, Policy, TaskSpec
from cod_async.lifecycle.hint import prompts_for


def answer(pair: Pair) -> str:
    """Return the response that combines a pair."""
    return f"<answer>{pair[0]} + {pair[1]}</answer>"


def feasible_pairs(environment: AlchemyRandom) -> list[Pair]:
    """Return the pairs that can be combined now, alphabetically; none once the materials have run out."""
    names = list(environment.inventory)
    pairs = [(first, second) for i, first in enumerate(names) for second in names[i:]]
    return [pair for pair in pairs if environment.is_feasible(pair)]


def random_policy(seed: int) -> Policy:
    """Return the policy that combines a feasible pair, drawn uniformly."""
    generator = random.Random(seed)

    def act(environment: Environment, observation: str, memory: Any) -> str:
        return answer(generator.choice(feasible_pairs(_game(environment))))

    return act


def oracle_policy(seed: int) -> Policy:
    """Return the policy that knows the recipes and follows a shortest synthesis; the seed has no effect.

    Where the target is out of reach (too little is left) it combines the first feasible pair.
    """

    def act(environment: Environment, observation: str, memory: Any) -> str:
        game = _game(environment)
        recipes = {(first, second): product for first, second, product in game.hidden()["recipes"]}
        plan = _plan(game, recipes, game.target)
        return answer(plan[0] if plan else feasible_pairs(game)[0])

    return act


def truth_hint(environment: Environment, task: TaskSpec) -> str:
    """Return the hint of a perfect updater: the recipe book. Resets the environment."""
    environment.reset(task)
    lines = [messages()["hint_recipes"]]
    lines += [
        messages()["hint_recipe"].format(first=first, second=second, product=product)
        for first, second, product in environment.hidden()["recipes"]
    ]
    return prompts_for(environment.prompt_style).carried("\n".join(lines))


def _game(environment: Environment) -> AlchemyRandom:
    if not isinstance(environment, AlchemyRandom):
        raise TypeError(f"this policy plays alchemy_random, not {type(environment).__name__}")
    return environment


def _plan(game: AlchemyRandom, recipes: dict[Pair, str], name: str) -> list[Pair] | None:
    """Return a shortest synthesis of an element that is not at hand, within the rounds that are left."""
    return shortest_plan(
        recipes,
        game.tiers,
        game.inventory,
        name,
        is_limited=game.is_limited,
        max_rounds=game.max_steps - game.num_rounds,
    )


class Notes:
    """What an explorer has seen of a world: recipes, pairs that make nothing, and its last answer."""

    def __init__(self) -> None:
        self.recipes: dict[Pair, str] = {}
        self.failed: set[Pair] = set()
        self._last: tuple[Pair, str] | None = None

    def note_answer(self, pair: Pair, target: str) -> None:
        """Remember an answer until its result is known."""
        self._last = (pair, target)

    def learn(self, game: AlchemyRandom, feedback: str) -> None:
        """Take in the result of the last answer: shown, or, at the end of a task, implied by the feedback.

        After a task that ended without the target the result of its last answer stays unknown.
        """
        if self._last is None:
            return
        pair, target = self._last
        self._last = None
        if game.attempts:
            product = game.attempts[-1].product
            if product is None:
                self.failed.add(pair)
            else:
                self.recipes[pair] = product
        elif feedback.startswith(messages()["feedback_success"].format(target=target)):
            self.recipes[pair] = target

    def is_known(self, pair: Pair) -> bool:
        """Return whether the result of a pair has been seen."""
        return pair in self.recipes or pair in self.failed


def explorer_policy(seed: int) -> Policy:
    """Return the policy that finds out recipes as it goes and carries them; the seed breaks ties."""
    generator = random.Random(seed)

    def act(environment: Environment, observation: str, memory: dict[str, Any]) -> str:
        game = _game(environment)
        notes: Notes = memory.setdefault("notes", Notes())
        notes.learn(game, str(memory.get("feedback", "")))
        plan = _plan(game, notes.recipes, game.target)
        pair = plan[0] if plan else _experiment(game, notes, generator)
        notes.note_answer(pair, game.target)
        return answer(pair)

    return act


def _experiment(game: AlchemyRandom, notes: Notes, generator: random.Random) -> Pair:
    """Choose what to try: untried pairs of the tier right below the target, else of the tiers further down.

    On the way down, an element of a tier that is not at hand but can be made by known recipes is made first,
    because with it come untried pairs.
    """
    tier_of = {name: tier for tier, names in enumerate(game.tiers) for name in names}
    feasible = feasible_pairs(game)
    untried = [pair for pair in feasible if not notes.is_known(pair)]
    for tier in range(tier_of[game.target] - 1, -1, -1):
        level = [pair for pair in untried if tier_of[pair[0]] == tier_of[pair[1]] == tier]
        if level:
            return generator.choice(level)
        for name in game.tiers[tier]:
            plan = None if name in game.inventory else _plan(game, notes.recipes, name)
            if plan:
                return plan[0]
    return generator.choice(untried or feasible)
