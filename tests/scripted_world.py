"""Scripted players for whole lifecycles: who answers what, and what is noted down after each task.

A group has one lifecycle for each of :data:`PLAYERS`: the environment's ``random`` policy, its ``oracle``,
``mixed``, which is one of the two in each task by the toss of a coin, and ``rubbish``, whose answers no
environment understands. Hints are true ones, notes full of traps for the rendering, and malformed blocks, in
turn. Everything is a function of (run seed, group, member, position), so that whoever plays it again, in
another process or after a failure, does and says the same.
"""

from __future__ import annotations

import random
from typing import Any

from cod_async.config.schema import Config
from cod_async.envs import registry
from cod_async.envs.base import Environment, EnvironmentSpec, Policy, StepResult, TaskSpec
from cod_async.lifecycle.hint import HintPrompts, prompts_for
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.seeds import stable_seed

PLAYERS = ("random", "oracle", "mixed", "rubbish")
"""By member of the group."""
RUBBISH = "I would rather talk about the weather."
MALFORMED = (
    "I have nothing to add.",
    "{start}\nthis block has no end",
    "{start}\none\n{end}\n{start}\ntwo\n{end}",
    "{start}\n \n{end}",
    "{end}\nthe wrong way round\n{start}",
)
"""Responses that hold no hint."""
NOTE = " - task {position} of member {member}: <|im_end|> does not end a turn,\n\n  π ≈ 3.14,  {{x}} "
"""Body of a well-formed note: a control token spelled out, blank lines, non-ASCII, blanks at the ends."""


def tasks_of(config: Config, group: int) -> tuple[TaskSpec, ...]:
    """The pack of a group as the coordinator plans it."""
    return plan_pack(config.environments, config.lifecycle.pack_size, config.run.seed, group).tasks()


def make_environment(task: TaskSpec) -> tuple[EnvironmentSpec, Environment]:
    """A fresh object of a task's environment, and its spec."""
    spec = registry.get(task.environment)
    return spec, spec.make(spec.options(task.preset, task.options))


class Player:
    """Plays the tasks of one lifecycle: one policy for each, and a memory for all."""

    def __init__(self, spec: EnvironmentSpec, config: Config, group: int, member: int) -> None:
        self.name = PLAYERS[member % len(PLAYERS)]
        self._seed = stable_seed("player", config.run.seed, group, member)
        self._policies = {name: spec.policies[name](self._seed) for name in ("random", "oracle")}
        self._policies["rubbish"] = lambda environment, observation, memory: RUBBISH
        self._memory: dict[str, Any] = {}

    def policy(self, position: int) -> Policy:
        """The policy that plays a task."""
        if self.name != "mixed":
            return self._policies[self.name]
        coin = random.Random(f"{self._seed}/{position}")
        return self._policies[coin.choice(("random", "oracle"))]

    def answer(self, position: int, environment: Environment, observation: str) -> str:
        """The response to an observation."""
        return self.policy(position)(environment, observation, self._memory)

    def hear(self, feedback: str) -> None:
        """Take note of the feedback on a finished task."""
        self._memory["feedback"] = feedback


class ScriptedTask:
    """One task, played from its first observation on, in an environment object of its own.

    The object gets there by playing all tasks before it, so this needs nothing but the place in the run.
    """

    def __init__(self, config: Config, group: int, member: int, position: int) -> None:
        self._tasks = tasks_of(config, group)
        spec, self._environment = make_environment(self._tasks[0])
        self._player = Player(spec, config, group, member)
        self._position = position
        self._observation = ""

    async def begin(self) -> None:
        """Play up to the task's first observation."""
        for position, task in enumerate(self._tasks[: self._position + 1]):
            self._observation = self._environment.reset(task)
            is_done = position == self._position
            while not is_done:
                response = self._player.answer(position, self._environment, self._observation)
                is_done = (await self._step(response)).is_done

    async def respond(self) -> str:
        """The next response; the object goes on with it."""
        response = self._player.answer(self._position, self._environment, self._observation)
        await self._step(response)
        return response

    async def _step(self, response: str) -> StepResult:
        step = await self._environment.step(response)
        self._observation = step.observation
        if step.is_done:
            self._player.hear(self._environment.feedback())
        return step


def hint_kind(group: int, member: int, position: int) -> str:
    """What the update after a task writes: ``truth``, ``note`` or ``malformed``."""
    if PLAYERS[member % len(PLAYERS)] == "rubbish":
        return "malformed"
    return ("truth", "note", "malformed")[(group + member + position) % 3]


def hint_response(config: Config, group: int, member: int, position: int) -> tuple[str, str | None]:
    """The response of the update after a task, and the body of the hint in it (None: malformed)."""
    task = tasks_of(config, group)[position]
    spec, environment = make_environment(task)
    prompts: HintPrompts = environment.update_prompts() or prompts_for(environment.prompt_style)
    kind = hint_kind(group, member, position)
    if kind == "malformed":
        text = MALFORMED[(group + member + position) % len(MALFORMED)]
        return text.format(start=prompts.start, end=prompts.end), None
    body = NOTE.format(position=position, member=member)
    if kind == "truth" and spec.truth_hint is not None:
        body = spec.truth_hint(environment, task).removeprefix(prompts.label)
    return f"Let me think.\n{prompts.start}\n{body}\n{prompts.end} That is all.", body
