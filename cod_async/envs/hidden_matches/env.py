"""The environment itself, its presets and its scripted policies.

A task names a place; the policy tries items until one fits or its tries are used up. Which item fits which
place is hidden, differs from pack to pack, and is the same for all tasks of a pack. It is the game of
:mod:`cod_async.envs.hidden_buttons` in other words (``Hall : red`` answered by ``red=Attic``), made to ask
whether what was learned in one set of words holds in another.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from cod_async.envs.base import Environment, EnvironmentSpec, Policy, PromptStyle, StepResult, TaskSpec
from cod_async.envs.hidden_matches.worlds import Options, goal_of, mapping_of, pack_seed_for, records
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.hint import prompts_for

BAD = "bad"
"""Feedback on a response that does not parse."""


def try_text(goal: str, item: str) -> str:
    """Return the response that tries an item, restating the goal."""
    return f"{goal} : {item}"


class HiddenMatches(Environment):
    """One lifecycle's view of a hidden-matches world.

    Args:
        options: merged options of a preset, see :class:`~cod_async.envs.hidden_matches.worlds.Options`.
    """

    name: ClassVar[str] = "hidden_matches"
    prompt_style: ClassVar[PromptStyle] = "terse"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = Options.of(options)
        self._mapping: dict[str, str] = {}
        self._goal = ""
        self._answers: list[str] = []

    def reset(self, task: TaskSpec) -> str:
        """Start a task and return ``Task <noun> <place>``."""
        self._goal = goal_of(self._options, task.record)
        self._mapping = mapping_of(self._options, task.pack_seed)
        self._answers = []
        return f"Task {self._options.noun} {self._goal}"

    def system_prompt(self) -> str:
        """Return nothing: at this size the rules are learned, not read."""
        return ""

    async def step(self, response: str) -> StepResult:
        """Try an item; see :meth:`press`."""
        return self.press(response)

    def press(self, response: str) -> StepResult:
        """Apply ``<place> : <item>`` and answer with one fact; anything else is a format error.

        Raises:
            EnvironmentInputError: no task was started.
        """
        if not self._goal:
            raise EnvironmentInputError("hidden_matches: reset must start a task before step")
        words = response.split()
        is_parsed = len(words) == 3 and words[0] in self._options.places and words[1] == ":"
        if not is_parsed or words[2] not in self._mapping:
            self._answers.append(BAD)
            return StepResult(
                observation=BAD, is_done=True, finish="format_error", metrics={"is_first_try": 0.0}
            )
        is_first = not self._answers
        fact = self.fact(words[2])
        self._answers.append(fact)
        if self._mapping[words[2]] == self._goal:
            return StepResult(
                observation=fact,
                is_done=True,
                raw_reward=1.0 if is_first else self._options.retry_reward,
                finish="success",
                metrics={"is_first_try": float(is_first)},
            )
        if len(self._answers) < self._options.num_tries:
            return StepResult(observation=fact, is_done=False)
        return StepResult(
            observation=fact, is_done=True, finish="out_of_steps", metrics={"is_first_try": 0.0}
        )

    def fact(self, item: str) -> str:
        """Return what trying an item reveals: the place it fits."""
        return f"{item}={self._mapping[item]}"

    def truth(self) -> str:
        """Return all facts of the world in the theme's order: the body of a perfect hint."""
        return " ".join(self.fact(item) for item in self._options.items)

    def feedback(self) -> str:
        """Return the last answer: the fact that the last try revealed, or ``bad``."""
        return self._answers[-1] if self._answers else ""

    def trajectory(self, messages: list[tuple[str, str]]) -> str | None:
        """Return ``Log <noun> <place>`` and the answers before the last one, which is the feedback."""
        return " ; ".join([f"Log {self._options.noun} {self._goal}", *self._answers[:-1]])

    @property
    def max_steps(self) -> int:
        """Tries per task."""
        return self._options.num_tries

    @property
    def items(self) -> tuple[str, ...]:
        """Items to choose from."""
        return self._options.items

    def hidden(self) -> dict[str, Any]:
        """Return ``{"mapping": {item: place}}``."""
        return {"mapping": dict(self._mapping)}

    def task_view(self) -> dict[str, Any]:
        """Return ``{"goal": place}``."""
        return {"goal": self._goal}


def random_policy(seed: int) -> Policy:
    """Return the floor: any item, every time."""
    rng = random.Random(f"hidden_matches random {seed}")

    def act(environment: Environment, observation: str, memory: Any) -> str:
        assert isinstance(environment, HiddenMatches)  # noqa: S101 - registered for this class only
        return try_text(environment.task_view()["goal"], rng.choice(environment.items))

    return act


def oracle_policy(seed: int) -> Policy:
    """Return the ceiling of an honest player: it remembers every fact of the pack and never tries in vain.

    The memory is a dict across the pack. The policy looks at the hidden world only through what its own tries
    reveal: an item known to fit is tried, else one that is not known to fit elsewhere.
    """
    return _rememberer(random.Random(f"hidden_matches oracle {seed}"), has_pack_memory=True)


def forgetful_policy(seed: int) -> Policy:
    """Return the ceiling of a player without hints: as the oracle, but every task starts from nothing."""
    return _rememberer(random.Random(f"hidden_matches forgetful {seed}"), has_pack_memory=False)


def _rememberer(rng: random.Random, has_pack_memory: bool) -> Policy:
    def act(environment: Environment, observation: str, memory: Any) -> str:
        assert isinstance(environment, HiddenMatches)  # noqa: S101 - registered for this class only
        if not has_pack_memory and observation.startswith("Task"):
            memory.clear()
        facts: dict[str, str] = memory.setdefault("facts", {})
        goal = environment.task_view()["goal"]
        known = [item for item, place in facts.items() if place == goal]
        item = known[0] if known else rng.choice([item for item in environment.items if item not in facts])
        facts[item] = environment.fact(item).partition("=")[2]
        return try_text(goal, item)

    return act


def truth_hint(environment: Environment, task: TaskSpec) -> str:
    """Return the hint of a perfect updater: every fact of the task's world. Resets the environment."""
    assert isinstance(environment, HiddenMatches)  # noqa: S101 - registered for this class only
    environment.reset(task)
    return prompts_for(environment.prompt_style).carried(environment.truth())


def _preset(theme: str) -> dict[str, Any]:
    return {
        "theme": theme,
        "has_own_noun": True,
        "num_items": 5,
        "num_tries": 2,
        "retry_reward": 0.5,
        "held_out_frac": 0.2,
    }


SPEC = EnvironmentSpec(
    name="hidden_matches",
    presets={theme: _preset(theme) for theme in ("rooms", "machines")},
    hidden="which key opens which room, or which tool repairs which machine",
    default_preset="rooms",
    default_pack_size=4,
    make=HiddenMatches,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={"random": random_policy, "oracle": oracle_policy, "forgetful": forgetful_policy},
    truth_hint=truth_hint,
    has_held_out_worlds=lambda options: bool(options["held_out_frac"]),
    bootstrap_module="cod_async.envs.hidden_matches.documents",
)
