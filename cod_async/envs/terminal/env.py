"""The task as a policy meets it: command lines in, output and prompt out, until the goal state is reached.

The terminal is simulated in memory; no command of the policy ever runs on a real machine. Nothing is shared
by the tasks of a pack: machines, users, files and goals differ. What carries over from task to task is
knowledge of how these terminals behave.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cod_async.envs.base import Environment, StepResult, TaskSpec
from cod_async.envs.terminal.commands import COMMANDS
from cod_async.envs.terminal.draft import Place
from cod_async.envs.terminal.goals import are_met
from cod_async.envs.terminal.machine import LOCAL_USER
from cod_async.envs.terminal.options import TerminalOptions, parse_options
from cod_async.envs.terminal.tasks import Task, make_task
from cod_async.envs.terminal.terminal import Terminal
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.parsing import extract_between
from cod_async.lifecycle.segment import Finish
from cod_async.lifecycle.texts import prompt_messages, prompt_text

_PROMPTS = Path(__file__).parent / "prompts"
_system_template = functools.partial(prompt_text, _PROMPTS, "system.txt")
_texts = functools.partial(prompt_messages, _PROMPTS)


def parse_line(response: str) -> str | None:
    """Return the command line of a response, stripped; None if there is none or it is blank."""
    content = extract_between(response, "<answer>", "</answer>")
    return (content.strip() or None) if content is not None else None


class TerminalSimulator(Environment):
    """File tasks on a local Windows, macOS or Linux machine and a remote Linux host.

    Args:
        options: a preset merged with overrides, see :class:`~.options.TerminalOptions`.

    Raises:
        EnvironmentInputError: unknown, mistyped or contradictory options.
    """

    name: ClassVar[str] = "terminal"
    is_step_penalized: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options: TerminalOptions = parse_options(options)
        self._task: Task | None = None
        self._terminal: Terminal | None = None
        self._num_steps = 0
        self._num_error_lines = 0
        self._finish: Finish | None = None

    @property
    def max_steps(self) -> int:
        """Most policy responses in one task (``max_steps``)."""
        return self._options.max_steps

    @property
    def num_steps(self) -> int:
        """Responses taken in the current task."""
        return self._num_steps

    @property
    def task(self) -> Task:
        """The current task.

        Raises:
            RuntimeError: there is none (a caller's mistake).
        """
        if self._task is None:
            raise RuntimeError("terminal: no task; call reset() first")
        return self._task

    @property
    def terminal(self) -> Terminal:
        """The machines of the current task, as they are now.

        Raises:
            RuntimeError: there is no task (a caller's mistake).
        """
        if self._terminal is None:
            raise RuntimeError("terminal: no task; call reset() first")
        return self._terminal

    def reset(self, task: TaskSpec) -> str:
        """Build the machines of the task and return the first prompt; the pack seed has no effect.

        Raises:
            EnvironmentInputError: the record is not exactly ``{"seed": integer}``.
        """
        _check_record(task.record)
        self._task = make_task(task.record["seed"], self._options.composite_frac)
        self._terminal = self._task.world(self._options.parity)
        self._num_steps = 0
        self._num_error_lines = 0
        self._finish = None
        return self._observation("")

    def system_prompt(self) -> str:
        """Return the machines, the commands, the task and the rules."""
        task = self.task
        return _system_template().format(
            os_name=_texts("messages")[f"os_{task.local_os}"],
            local_user=LOCAL_USER,
            remote_host=task.remote_host,
            remote_user=task.remote_user,
            commands=", ".join(COMMANDS),
            sentence=self.sentence(),
            max_steps=self.max_steps,
        )

    def sentence(self) -> str:
        """Return the task in one sentence, paths in the style of their machine."""
        task = self.task
        paths = {role: self.written(place) for role, place in task.paths.items()}
        return _texts("tasks")[task.type].format(**paths, **task.words)

    def written(self, place: Place) -> str:
        """Return a place's path as the sentence writes it: natively, or as ``user@host:path``."""
        if place.side == "local":
            return self.terminal.local.show(place.path)
        remote = self.terminal.remote
        return f"{remote.user}@{remote.host}:{remote.show(place.path)}"

    async def step(self, response: str) -> StepResult:
        """Run one command line.

        Raises:
            RuntimeError: the task is over or was never started (a caller's mistake).
        """
        if self._finish is not None:
            raise RuntimeError("terminal: step() without a running task; call reset() first")
        terminal, goals = self.terminal, self.task.goals
        self._num_steps += 1
        line = parse_line(response)
        if line is None:
            self._finish = "format_error"
            return self._result(_texts("messages")["invalid"])
        result = terminal.run(line)
        self._num_error_lines += result.is_error
        if are_met(goals, terminal):
            self._finish = "success"
            return self._result(_texts("messages")["done"])
        if self._num_steps >= self.max_steps:
            self._finish = "out_of_steps"
        return self._result(self._observation(result.output))

    def _observation(self, output: str) -> str:
        return _texts("messages")["turn"].format(
            step=min(self._num_steps + 1, self.max_steps),
            max_steps=self.max_steps,
            output=output + "\n" if output else "",
            prompt=self.terminal.current.prompt(),
        )

    def _result(self, observation: str) -> StepResult:
        if self._finish is None:
            return StepResult(observation=observation, is_done=False)
        is_success = self._finish == "success"
        return StepResult(
            observation=observation,
            is_done=True,
            raw_reward=1.0 if is_success else 0.0,
            finish=self._finish,
            metrics={
                "early_completion": float(is_success and self._num_steps < self.max_steps),
                "num_error_lines": float(self._num_error_lines),
                "is_composite": float(self.task.is_composite),
            },
        )

    def feedback(self) -> str:
        """Return what the updater is told: success, no command line, goal state not reached, or cut off."""
        text = _texts("messages")
        if self._finish == "success":
            return text["feedback_success"]
        if self._finish == "format_error":
            return text["invalid"]
        if self._finish == "out_of_steps":
            return text["feedback_out_of_steps"].format(max_steps=self.max_steps)
        return text["feedback_cut_off"]

    def hidden(self) -> dict[str, Any]:
        """Return ``{}``: nothing is hidden in a pack."""
        return {}

    def task_view(self) -> dict[str, Any]:
        """Return type, sentence, machines, and the places and words that the sentence names."""
        task = self.task
        return {
            "type": task.type,
            "sentence": self.sentence(),
            "local_os": task.local_os,
            "remote_host": task.remote_host,
            "remote_user": task.remote_user,
            "is_composite": task.is_composite,
            "paths": {role: self.written(place) for role, place in task.paths.items()},
            "words": dict(task.words),
        }


def _check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that is not exactly (seed)."""
    problems = []
    unknown = sorted(set(record) - {"seed"})
    if unknown:
        problems.append(f"unknown field {', '.join(unknown)}; the only field is seed")
    seed = record.get("seed")
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        problems.append(f"seed is {seed!r}; it must be an integer from 0 to 2^64-1")
    if problems:
        raise EnvironmentInputError([f"environment terminal: record: {problem}" for problem in problems])
