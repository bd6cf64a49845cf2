"""The environment itself, its presets and its scripted policies.

A task names a goal direction; the policy presses numbered buttons until one leads there or its tries are used
up. What each button does is hidden, differs from pack to pack, and is the same for all tasks of a pack. Every
press is answered by one word that is both the observation and a fact worth noting (``3=Left``): the same word
appears in feedback, record and hint, because a tiny model can look up one word but hardly two.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any, ClassVar

from cod_async.envs.base import Environment, EnvironmentSpec, Policy, PromptStyle, StepResult, TaskSpec
from cod_async.envs.hidden_buttons.worlds import (
    DIRECTIONS,
    DOOR_GOAL,
    Options,
    goal_of,
    mapping_of,
    pack_seed_for,
    records,
    world_of,
)
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.hint import prompts_for

BAD = "bad"
"""Feedback on a response that does not parse."""


def press_text(goal: str, button: int) -> str:
    """Return the response that presses a button (1-based), restating the goal."""
    return f"{goal} : {button}"


class HiddenButtons(Environment):
    """One lifecycle's view of a hidden-buttons world.

    Args:
        options: merged options of a preset, see :class:`~cod_async.envs.hidden_buttons.worlds.Options`.
    """

    name: ClassVar[str] = "hidden_buttons"
    prompt_style: ClassVar[PromptStyle] = "terse"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options = Options.of(options)
        self._mapping: tuple[str, ...] = ()
        self._goal = ""
        self._answers: list[str] = []

    def reset(self, task: TaskSpec) -> str:
        """Start a task and return ``Task goal <direction>``."""
        self._goal = goal_of(self._options, task.record)
        self._mapping = mapping_of(self._options, world_of(self._options, task.pack_seed))
        self._answers = []
        return f"Task goal {self._goal}"

    def system_prompt(self) -> str:
        """Return nothing: at this size the rules are learned, not read."""
        return ""

    async def step(self, response: str) -> StepResult:
        """Press a button; see :meth:`press`."""
        return self.press(response)

    def press(self, response: str) -> StepResult:
        """Apply ``<direction> : <button>`` and answer with one fact; anything else is a format error.

        Raises:
            EnvironmentInputError: no task was started.
        """
        if not self._goal:
            raise EnvironmentInputError("hidden_buttons: reset must start a task before step")
        button = self._parse(response)
        if button is None:
            self._answers.append(BAD)
            return StepResult(
                observation=BAD, is_done=True, finish="format_error", metrics={"is_first_try": 0.0}
            )
        is_first = not self._answers
        fact = self.fact(button)
        self._answers.append(fact)
        if self._mapping[button - 1] == self._goal:
            reward = 1.0 if is_first else self._options.retry_reward
            metrics = {"is_first_try": float(is_first)}
            return StepResult(
                observation=fact, is_done=True, raw_reward=reward, finish="success", metrics=metrics
            )
        if len(self._answers) < self._options.num_tries:
            return StepResult(observation=fact, is_done=False)
        return StepResult(
            observation=fact, is_done=True, finish="out_of_steps", metrics={"is_first_try": 0.0}
        )

    def fact(self, button: int) -> str:
        """Return what a press of a button (1-based) reveals: its direction, or the way in of a door world."""
        if self._options.world == "door":
            return f"{self._mapping.index(DOOR_GOAL) + 1}={DOOR_GOAL}"
        return f"{button}={self._mapping[button - 1]}"

    def _parse(self, response: str) -> int | None:
        words = response.split()
        if len(words) != 3 or words[0] not in DIRECTIONS or words[1] != ":":
            return None
        # isdecimal alone would let other scripts' digits pass
        if len(words[2]) != 1 or words[2] not in "123456789" or int(words[2]) > self._options.num_buttons:
            return None
        return int(words[2])

    def truth(self) -> str:
        """Return all facts of the world in button order: the body of a perfect hint."""
        facts = (self.fact(button) for button in range(1, self._options.num_buttons + 1))
        return " ".join(dict.fromkeys(facts))

    def feedback(self) -> str:
        """Return the last answer: the fact that the last press revealed, or ``bad``."""
        return self._answers[-1] if self._answers else ""

    def trajectory(self, messages: list[tuple[str, str]]) -> str | None:
        """Return ``Log goal <direction>`` and the answers before the last one, which is the feedback."""
        return " ; ".join([f"Log goal {self._goal}", *self._answers[:-1]])

    @property
    def max_steps(self) -> int:
        """Presses per task."""
        return self._options.num_tries

    @property
    def num_buttons(self) -> int:
        """Buttons to choose from."""
        return self._options.num_buttons

    def hidden(self) -> dict[str, Any]:
        """Return ``{"mapping": [what each button does, button 1 first]}``."""
        return {"mapping": list(self._mapping)}

    def task_view(self) -> dict[str, Any]:
        """Return ``{"goal": direction}``."""
        return {"goal": self._goal}


def _num_buttons(environment: Environment) -> int:
    assert isinstance(environment, HiddenButtons)  # noqa: S101 - policies are registered for this class only
    return environment.num_buttons


def random_policy(seed: int) -> Policy:
    """Return the floor: any button, every time."""
    rng = random.Random(f"hidden_buttons random {seed}")

    def act(environment: Environment, observation: str, memory: Any) -> str:
        return press_text(environment.task_view()["goal"], rng.randint(1, _num_buttons(environment)))

    return act


def oracle_policy(seed: int) -> Policy:
    """Return the ceiling of an honest player: it remembers every fact of the pack and never presses in vain.

    The memory is a dict across the pack. The policy looks at the hidden world only through what its own
    presses
    reveal: a known button for the goal is pressed, else one that is not known to do something else.
    """
    return _rememberer(random.Random(f"hidden_buttons oracle {seed}"), has_pack_memory=True)


def forgetful_policy(seed: int) -> Policy:
    """Return the ceiling of a player without hints: as the oracle, but every task starts from nothing."""
    return _rememberer(random.Random(f"hidden_buttons forgetful {seed}"), has_pack_memory=False)


def _rememberer(rng: random.Random, has_pack_memory: bool) -> Policy:
    def act(environment: Environment, observation: str, memory: Any) -> str:
        assert isinstance(environment, HiddenButtons)  # noqa: S101 - registered for this class only
        if not has_pack_memory and observation.startswith("Task"):
            memory.clear()
        facts: dict[int, str] = memory.setdefault("facts", {})
        goal = environment.task_view()["goal"]
        known = [button for button, direction in facts.items() if direction == goal]
        unknown = [button for button in range(1, environment.num_buttons + 1) if button not in facts]
        button = known[0] if known else rng.choice(unknown)
        revealed, _, direction = environment.fact(button).partition("=")
        facts[int(revealed)] = direction
        return press_text(goal, button)

    return act


def truth_hint(environment: Environment, task: TaskSpec) -> str:
    """Return the hint of a perfect updater: every fact of the task's world. Resets the environment."""
    assert isinstance(environment, HiddenButtons)  # noqa: S101 - registered for this class only
    environment.reset(task)
    return prompts_for(environment.prompt_style).carried(environment.truth())


SPEC = EnvironmentSpec(
    name="hidden_buttons",
    presets={
        "door": {
            "world": "door",
            "num_buttons": 4,
            "num_tries": 1,
            "retry_reward": 0.5,
            "held_out_frac": 0.0,
        },
        "cross": {
            "world": "permutation",
            "num_buttons": 5,
            "num_tries": 2,
            "retry_reward": 0.5,
            "held_out_frac": 0.2,
        },
    },
    hidden="what each numbered button does",
    default_preset="cross",
    default_pack_size=4,
    make=HiddenButtons,
    records=records,
    pack_seed_for=pack_seed_for,
    policies={"random": random_policy, "oracle": oracle_policy, "forgetful": forgetful_policy},
    truth_hint=truth_hint,
    has_held_out_worlds=lambda options: bool(options["held_out_frac"]),
    bootstrap_module="cod_async.envs.hidden_buttons.documents",
)
