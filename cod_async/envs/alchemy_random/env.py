"""The game: combine two elements a round until the target is made, with a recipe book nobody shows.

All names and their tiers are visible, and so is what one owns; the only hidden thing is which pairs make
what. The recipe book is one for all tasks of a pack, so a recipe found in one task is worth carrying to the
next one, whose target is another element, or one that was made before.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import msgspec

from cod_async.envs.alchemy_random.options import AlchemyOptions, parse_options
from cod_async.envs.alchemy_random.world import Pair, World, pair_of, supply, world_for_pack
from cod_async.envs.base import Environment, StepResult, TaskSpec
from cod_async.envs.checks import is_int
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.parsing import extract_between
from cod_async.lifecycle.segment import Finish
from cod_async.lifecycle.texts import prompt_messages, prompt_text

_PROMPTS = Path(__file__).parent / "prompts"
MAX_ECHO_CHARS = 24
"""Characters of an unknown name that are repeated to the policy."""
_system_template = functools.partial(prompt_text, _PROMPTS, "system.txt")
messages = functools.partial(prompt_messages, _PROMPTS)
"""Return the sentences of this environment by name (``prompts/messages.json``)."""


def parse_attempt(response: str) -> tuple[str, str] | None:
    """Read the two names of a response, stripped and in lower case, or None if it has no valid pair.

    The content of the only answer-tag pair must be two non-empty names with one plus sign between them.
    """
    content = extract_between(response, "<answer>", "</answer>")
    if content is None or content.count("+") != 1:
        return None
    first, second = (part.strip().lower() for part in content.split("+"))
    return (first, second) if first and second else None


def echo(name: str) -> str:
    """Return a name from the policy's text, fit to stand in a prompt: short, letters and digits only."""
    kept = "".join(c if c.isalnum() or c in " -_" else "?" for c in name[:MAX_ECHO_CHARS])
    return kept if len(name) <= MAX_ECHO_CHARS else kept + "..."


class Attempt(msgspec.Struct, frozen=True):
    """What one round came to, as the policy is told.

    Attributes:
        first, second: the two names in the order of the answer, in lower case.
        missing: what was not at hand, in words; empty for a pair that was tried.
        product: what the pair made; None for nothing.
    """

    first: str
    second: str
    missing: tuple[str, ...] = ()
    product: str | None = None

    @property
    def pair(self) -> Pair:
        """The two names in alphabetical order."""
        return pair_of(self.first, self.second)


class AlchemyRandom(Environment):
    """Making target elements with hidden recipes.

    Args:
        options: a preset merged with overrides, see :class:`~.options.AlchemyOptions`.

    Raises:
        EnvironmentInputError: unknown, mistyped or contradictory options.
    """

    name: ClassVar[str] = "alchemy_random"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options: AlchemyOptions = parse_options(options)
        self._world = World(tiers=(), recipes={}, targets=())
        self._target = ""
        self._inventory: dict[str, int] = {}
        self._attempts: list[Attempt] = []
        self._finish: Finish | None = None

    @property
    def max_steps(self) -> int:
        """Most policy responses in one task (``max_rounds``)."""
        return self._options.max_rounds

    @property
    def is_limited(self) -> bool:
        """Whether attempts use up their inputs."""
        return self._options.material_mode == "limited"

    @property
    def tiers(self) -> tuple[tuple[str, ...], ...]:
        """The tier table as the policy sees it: names in alphabetical order, tier 0 first."""
        # The order in which names were drawn would tell noise elements from useful ones.
        return tuple(tuple(sorted(names)) for names in self._world.tiers)

    @property
    def target(self) -> str:
        """The element to make."""
        return self._target

    @property
    def inventory(self) -> dict[str, int]:
        """Copies of each element at hand, >= 1 each, alphabetical; a copy of the dictionary."""
        return dict(sorted(self._inventory.items()))

    @property
    def attempts(self) -> tuple[Attempt, ...]:
        """The rounds of the current task so far."""
        return tuple(self._attempts)

    @property
    def num_rounds(self) -> int:
        """Rounds used in the current task."""
        return len(self._attempts)

    def is_feasible(self, pair: Pair) -> bool:
        """Return whether the elements of a pair are at hand, in enough copies."""
        return not self._missing(*pair)

    def reset(self, task: TaskSpec) -> str:
        """Draw the pack's world, lay out the task's materials and return the first observation.

        Raises:
            EnvironmentInputError: the record lacks a field, has one too many, or a value is out of range; or
                worlds of these options do not have a distinct target for every task of the pack.
        """
        _check_record(task.record)
        self._world = world_for_pack(self._options, task.pack_seed, task.pack_size)
        self._target = self._world.targets[task.position % len(self._world.targets)]
        copies = supply(self._options, self._world, self._target, task.record["seed"])
        self._inventory = dict.fromkeys(self._world.tiers[0], copies)
        self._attempts = []
        self._finish = None
        return self._observation()

    def system_prompt(self) -> str:
        """Return the rules with the tier table and the target of the current task."""
        text = messages()
        table = [text["tier"].format(tier=i, names=", ".join(names)) for i, names in enumerate(self.tiers)]
        return _system_template().format(
            target=self._target,
            target_tier=self._world.tier_of(self._target),
            tiers="\n".join(table),
            materials=text[f"materials_{self._options.material_mode}"],
            max_rounds=self.max_steps,
        )

    async def step(self, response: str) -> StepResult:
        """Try the pair of one response.

        Raises:
            RuntimeError: the task is over or was never started (a caller's mistake).
        """
        if not self._target or self._finish is not None:
            raise RuntimeError("alchemy_random: step() without a running task; call reset() first")
        names = parse_attempt(response)
        if names is None:
            self._finish = "format_error"
            return self._result(messages()["invalid"])
        self._attempts.append(self._attempt(*names))
        if self._target in self._inventory:
            self._finish = "success"
        elif self._is_out_of_materials():
            self._finish = "failure"
        elif self.num_rounds >= self.max_steps:
            self._finish = "out_of_steps"
        return self._result(self._observation())

    def _missing(self, first: str, second: str) -> tuple[str, ...]:
        """Return what a pair lacks, in words: names, or one name twice."""
        lacking = tuple(dict.fromkeys(echo(name) for name in (first, second) if name not in self._inventory))
        if not lacking and self.is_limited and first == second and self._inventory[first] < 2:
            lacking = (messages()["missing_copy"].format(name=first),)
        return lacking

    def _attempt(self, first: str, second: str) -> Attempt:
        """Try a pair: use up its inputs in limited mode, and add what it makes."""
        missing = self._missing(first, second)
        if missing:
            return Attempt(first=echo(first), second=echo(second), missing=missing)
        if self.is_limited:
            for name in (first, second):
                self._inventory[name] -= 1
                if not self._inventory[name]:
                    del self._inventory[name]
        product = self._world.recipes.get(pair_of(first, second))
        if product is not None:
            copies = self._inventory.get(product, 0)
            self._inventory[product] = copies + 1 if self.is_limited else 1
        return Attempt(first=first, second=second, product=product)

    def _is_out_of_materials(self) -> bool:
        """Return whether no pair is feasible: any two copies are one, equal or not."""
        return self.is_limited and sum(self._inventory.values()) < 2

    def _result(self, observation: str) -> StepResult:
        if self._finish is None:
            return StepResult(observation=observation, is_done=False)
        tried = [attempt for attempt in self._attempts if not attempt.missing]
        return StepResult(
            observation=observation,
            is_done=True,
            raw_reward=1.0 if self._finish == "success" else 0.0,
            finish=self._finish,
            metrics={
                "target_tier": float(self._world.tier_of(self._target)),
                "num_recipes_used": float(len({a.pair for a in tried if a.product is not None})),
                "num_pairs_failed": float(len({a.pair for a in tried if a.product is None})),
                "num_missing_inputs": float(len(self._attempts) - len(tried)),
            },
        )

    def _last_sentence(self) -> str:
        """Say what the last attempt came to."""
        text, last = messages(), self._attempts[-1]
        if last.missing:
            missing = text["and"].join(last.missing)
            return text["missing"].format(first=last.first, second=last.second, missing=missing)
        key = "nothing" if last.product is None else "made"
        return text[key].format(first=last.first, second=last.second, product=last.product)

    def _lists(self) -> list[str]:
        """Return the recipes found and the pairs that failed in this task, each once, alphabetically."""
        text = messages()
        tried = {attempt.pair: attempt.product for attempt in self._attempts if not attempt.missing}
        recipes = [text["recipe"].format(first=a, second=b, product=c) for (a, b), c in tried.items() if c]
        failed = [text["pair"].format(first=a, second=b) for (a, b), c in tried.items() if not c]
        lines = []
        if recipes:
            lines.append(text["recipes_found"].format(recipes="; ".join(sorted(recipes))))
        if failed:
            lines.append(text["pairs_failed"].format(pairs="; ".join(sorted(failed))))
        return lines

    def _observation(self) -> str:
        """Say the round, what the last attempt came to, the target, what is at hand, and what is asked."""
        text = messages()
        parts = []
        if self._finish is None:
            parts.append(text["counter"].format(round=self.num_rounds + 1, max_rounds=self.max_steps))
        if self._attempts:
            parts.append(self._last_sentence())
        parts.append(text["target"].format(target=self._target))
        item = text["inventory_item_limited" if self.is_limited else "inventory_item"]
        items = [item.format(name=name, count=count) for name, count in self.inventory.items()]
        parts.append(text["inventory"].format(inventory=", ".join(items) or text["inventory_empty"]))
        if self._options.has_attempt_lists:
            parts += self._lists()
        ending = {"success": "solved", "failure": "out_of_materials", "out_of_steps": "out_of_rounds"}
        parts.append(
            text["ask" if self._finish is None else ending[self._finish]].format(target=self._target)
        )
        return "\n".join(parts)

    def feedback(self) -> str:
        """Return what the updater is told: made, invalid answer, out of materials or rounds, or cut off."""
        if self._finish == "format_error":
            sentence = messages()["invalid"]
        else:
            endings = {"success": "success", "failure": "out_of_materials", "out_of_steps": "out_of_rounds"}
            ending = "cut_off" if self._finish is None else endings[self._finish]
            sentence = messages()[f"feedback_{ending}"].format(
                target=self._target, round=self.num_rounds, max_rounds=self.max_steps
            )
        if self._options.is_last_result_told and self._attempts and self._finish != "format_error":
            sentence += " " + self._last_sentence()
        return sentence

    def hidden(self) -> dict[str, Any]:
        """Return ``{"tiers": [[name]], "recipes": [[first, second, product]]}`` in the order of drawing."""
        return {
            "tiers": [list(names) for names in self._world.tiers],
            "recipes": [[first, second, product] for (first, second), product in self._world.recipes.items()],
        }

    def task_view(self) -> dict[str, Any]:
        """Return ``{"target": name}``."""
        return {"target": self._target}


def _check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that is not exactly (seed)."""
    problems = []
    unknown = sorted(set(record) - {"seed"})
    if unknown:
        problems.append(f"unknown field {', '.join(unknown)}; the only field is seed")
    seed = record.get("seed")
    if not is_int(seed) or not 0 <= seed < 1 << 64:
        problems.append(f"seed is {seed!r}; it must be an integer from 0 to 2^64-1")
    if problems:
        raise EnvironmentInputError(
            [f"environment alchemy_random: record: {problem}" for problem in problems]
        )
