"""The environment: one task, one expression, one closed-loop rollout, scored by how well it ends.

The constants of the dynamics are hidden and shared by the tasks of a pack. Nothing in a task reveals them
before the controller is run; the trajectory afterwards does, but only the updater sees it. So a solver
knows them exactly as far as the hint carries them. The one other thing that travels is the last working
controller with its outcome (an option), which shows that something worked without saying why.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar
from xml.sax.saxutils import escape

import msgspec

from cod_async.envs.base import Environment, StepResult, TaskSpec
from cod_async.envs.checks import is_int, is_number
from cod_async.envs.optimal_control.dynamics import (
    ControlTask,
    Rollout,
    RolloutError,
    World,
    draw_world,
    simulate,
)
from cod_async.envs.optimal_control.options import ControlOptions, parse_options
from cod_async.envs.optimal_control.syntax import (
    MAX_CHARS,
    Expression,
    ExpressionSyntaxError,
    parse_expression,
)
from cod_async.envs.xml_action import ANSWER_END, ActionParseError, parse_action
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.hint import prompts_for
from cod_async.lifecycle.texts import prompt_messages, prompt_text

_PROMPTS = Path(__file__).parent / "prompts"
_SNAPSHOT_VERSION = 1
_MAX_ABS = 1e6
"""Largest magnitude of a record's numbers."""
_system_template = functools.partial(prompt_text, _PROMPTS, "system.txt")
_messages = functools.partial(prompt_messages, _PROMPTS)


def read_controller(response: str, is_parity: bool = False) -> Expression:
    """Read the controller of a response.

    Args:
        response: any text.
        is_parity: see :func:`~.syntax.parse_expression`.

    Raises:
        ActionParseError, ExpressionSyntaxError: there is none, or more than one, or text follows it; the
            message says what is wrong.
    """
    text = _messages()
    if "```" in response:
        raise ActionParseError(text["reason_fence"])
    tag, value = parse_action(response, frozenset())
    if response.rpartition(ANSWER_END)[2].strip():
        raise ActionParseError(text["reason_after"])
    if tag != "controller":
        raise ActionParseError(text["reason_tag"])
    if not isinstance(value, str):
        raise ActionParseError(text["reason_text"])
    return parse_expression(value, is_parity)


def controller_xml(expression: str) -> str:
    """Write an expression as the element that a response would hold."""
    return f"<controller>{escape(expression)}</controller>"


def feedback_table(rollout: Rollout) -> str:
    """Write a rollout as a table of t, x_t, v_t and u_t with three decimals; the last row has no control."""
    lines = [f"{'t':>3}  {'x_t':>10}  {'v_t':>10}  {'u_t':>10}"]
    controls = [f"{u:.3f}" for u in rollout.us] + ["-"]
    for t, (x, v, u) in enumerate(zip(rollout.xs, rollout.vs, controls, strict=True)):
        lines.append(f"{t:>3}  {x:>10.3f}  {v:>10.3f}  {u:>10}")
    return "\n".join(lines)


def shown_reward(reward: float) -> str:
    """Write a reward with three decimals; a positive one that would read 0.000 in scientific form."""
    if 0.0 < reward < 0.0005:
        return _messages()["reward_tiny"].format(reward=reward)
    return f"{reward:.3f}"


class PreviousController(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The last controller of the lifecycle that ran to the end, and what came of it.

    Attributes:
        expression: its text, at most 2,000 characters.
        x0, v0, x_target, v_target, horizon: its task.
        reward: what it earned, 0 .. 1.
        x_error, v_error: terminal position and velocity minus the target's.
    """

    expression: str
    x0: float
    v0: float
    x_target: float
    v_target: float
    horizon: int
    reward: float
    x_error: float
    v_error: float


class OptimalControl(Environment):
    """A point on a line with hidden dynamics, steered by one expression.

    Args:
        options: a preset merged with overrides, see :class:`~.options.ControlOptions`.

    Raises:
        EnvironmentInputError: unknown, mistyped or contradictory options.
    """

    name: ClassVar[str] = "optimal_control"
    is_step_penalized: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options: ControlOptions = parse_options(options)
        self._previous: PreviousController | None = None
        self._task: ControlTask | None = None
        self._world = World(a=0.0, b=0.0)
        self._is_over = False
        self._expression: Expression | None = None
        self._feedback = ""

    @property
    def max_steps(self) -> int:
        """A task takes one response."""
        return 1

    @property
    def options(self) -> ControlOptions:
        """The checked options, which the prompts tell the policy (the hidden ranges apart)."""
        return self._options

    @property
    def task(self) -> ControlTask:
        """The current task.

        Raises:
            RuntimeError: none was started (a caller's mistake).
        """
        if self._task is None:
            raise RuntimeError("optimal_control: no task was started; call reset() first")
        return self._task

    def reset(self, task: TaskSpec) -> str:
        """Build the task and its hidden world and return the task message.

        Raises:
            EnvironmentInputError: the record lacks a field, has one too many, or a value is out of range.
        """
        record, options = task.record, self._options
        _check_record(record)
        self._task = ControlTask(
            x0=float(record["x0"]),
            v0=float(record["v0"]),
            x_target=float(record["x_target"]),
            v_target=0.0,
            horizon=options.horizon,
            effort_weight=options.effort_weight,
            process_noise_std=options.process_noise_std,
            seed=record["seed"],
        )
        self._world = draw_world(task.pack_seed, options.a_range, options.b_range, options.b_margin)
        self._is_over = False
        self._expression = None
        self._feedback = _messages()["cut_off"]
        message = _messages()["task"].format(**msgspec.structs.asdict(self._task))
        if self._is_previous_shown:
            message += "\n\n" + self._previous_text()
        return message

    @property
    def _is_previous_shown(self) -> bool:
        return self._previous is not None and self._options.is_previous_controller_shown

    def _previous_text(self) -> str:
        """Describe the earlier controller and its outcome."""
        assert self._previous is not None  # noqa: S101 - the caller checks; narrows the type
        fields: dict[str, Any] = msgspec.structs.asdict(self._previous)
        for name in ("x0", "v0", "x_target", "v_target"):
            fields[name] = repr(fields[name]) if self._options.parity else f"{fields[name]:.3f}"
        fields["reward"] = shown_reward(self._previous.reward)
        return _messages()["previous"].format(controller=controller_xml(fields.pop("expression")), **fields)

    def system_prompt(self) -> str:
        """Return dynamics, aim, language and form of the answer; equal for every task of a preset."""
        options, text = self._options, _messages()
        can_be_negative, can_be_positive = options.b_signs
        sign = "any" if can_be_negative == can_be_positive else "negative" if can_be_negative else "positive"
        std = options.process_noise_std
        return _system_template().format(
            noise_term=text["noise_term"] if std else "",
            noise_note=text["noise_note"].format(std=f"{std:g}") if std else "",
            sign_note=text[f"sign_{sign}"],
            effort_weight=f"{options.effort_weight:g}",
            max_chars=MAX_CHARS,
            format_error_reward=f"{options.format_error_reward:g}",
            action_error_reward=f"{options.action_error_reward:g}",
        )

    async def step(self, response: str) -> StepResult:
        """Read the controller and run it; the task is over in any case.

        Raises:
            RuntimeError: the task is over or was never started (a caller's mistake).
        """
        task = self.task
        if self._is_over:
            raise RuntimeError("optimal_control: step() without a running task; call reset() first")
        self._is_over = True
        metrics = {"is_previous_controller_shown": float(self._is_previous_shown), "is_action_error": 0.0}
        try:
            self._expression = read_controller(response, self._options.parity)
        except (ActionParseError, ExpressionSyntaxError) as error:
            return self._format_error(str(error), metrics)
        try:
            rollout = simulate(task, self._world, self._expression.control)
        except RolloutError as error:
            return self._action_error(error, metrics)
        return self._ran(self._expression, rollout, metrics)

    def _format_error(self, reason: str, metrics: dict[str, float]) -> StepResult:
        key = "format_error_cut" if self.is_response_cut else "format_error"
        reward = self._options.format_error_reward
        self._feedback = _messages()[key].format(reason=reason, reward=f"{reward:g}")
        return StepResult(
            observation=self._feedback,
            is_done=True,
            raw_reward=reward,
            finish="format_error",
            metrics=metrics,
        )

    def _action_error(self, error: RolloutError, metrics: dict[str, float]) -> StepResult:
        reward = self._options.action_error_reward
        self._feedback = _messages()["action_error"].format(reason=str(error), reward=f"{reward:g}")
        return StepResult(
            observation=self._feedback,
            is_done=True,
            raw_reward=reward,
            finish="failure",
            metrics=metrics | {"is_action_error": 1.0},
        )

    def _ran(self, expression: Expression, rollout: Rollout, metrics: dict[str, float]) -> StepResult:
        """Score a rollout that reached the end and remember its controller."""
        task, x, v = self.task, rollout.xs[-1], rollout.vs[-1]
        self._previous = PreviousController(
            expression=expression.text,
            x0=task.x0,
            v0=task.v0,
            x_target=task.x_target,
            v_target=task.v_target,
            horizon=task.horizon,
            reward=rollout.reward,
            x_error=x - task.x_target,
            v_error=v - task.v_target,
        )
        self._feedback = _messages()["ran"].format(
            table=feedback_table(rollout),
            x=x,
            v=v,
            x_target=task.x_target,
            v_target=task.v_target,
            loss=rollout.loss,
            reward=shown_reward(rollout.reward),
        )
        noise_power = sum(noise * noise for noise in rollout.noise) / task.horizon
        return StepResult(
            observation=self._feedback,
            is_done=True,
            raw_reward=rollout.reward,
            finish="success",
            metrics=metrics
            | {
                "loss": rollout.loss,
                "x_final": x,
                "v_final": v,
                "effort": sum(u * u for u in rollout.us),
                "process_noise_rms": noise_power**0.5,
            },
        )

    def feedback(self) -> str:
        """Return the rollout and its score, or why there is none; nothing of a failed rollout is told."""
        return self._feedback

    def trajectory(self, messages: list[tuple[str, str]]) -> str | None:
        """Return the generic text, with the bare controller in place of the response if it could be read."""
        if self._expression is not None:
            controller = controller_xml(self._expression.text)
            messages = [(role, controller if role == "assistant" else text) for role, text in messages]
        return prompts_for(self.prompt_style).trajectory(self.system_prompt(), messages)

    def snapshot(self) -> bytes:
        """Return the format version and the last working controller as JSON (under 20 kB)."""
        state = b"" if self._previous is None else msgspec.json.encode(self._previous)
        return bytes([_SNAPSHOT_VERSION]) + state

    def restore(self, state: bytes) -> None:
        """Take the last working controller back; no bytes at all mean none.

        Raises:
            EnvironmentInputError: another format version, or not what :meth:`snapshot` returns.
        """
        if not state or state == bytes([_SNAPSHOT_VERSION]):
            self._previous = None
            return
        if state[0] != _SNAPSHOT_VERSION:
            raise EnvironmentInputError(
                f"environment optimal_control: the state has format version {state[0]}; "
                f"this program reads version {_SNAPSHOT_VERSION}"
            )
        try:
            previous = msgspec.json.decode(state[1:], type=PreviousController)
            parse_expression(previous.expression)
        except (msgspec.DecodeError, UnicodeError, ExpressionSyntaxError) as error:
            raise EnvironmentInputError(
                f"environment optimal_control: the state cannot be read: {error}"
            ) from None
        self._previous = previous

    def hidden(self) -> dict[str, Any]:
        """Return ``{"a": float, "b": float}``."""
        return {"a": self._world.a, "b": self._world.b}

    def task_view(self) -> dict[str, Any]:
        """Return ``{"x0", "v0", "x_target", "horizon"}``."""
        task = self.task
        return {"x0": task.x0, "v0": task.v0, "x_target": task.x_target, "horizon": task.horizon}


def _check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that is not exactly (seed, x0, v0, x_target)."""
    problems = []
    unknown = sorted(set(record) - {"seed", "x0", "v0", "x_target"})
    if unknown:
        problems.append(f"unknown field {', '.join(unknown)}; fields are seed, x0, v0, x_target")
    seed = record.get("seed")
    if not is_int(seed) or not 0 <= seed < 1 << 64:
        problems.append(f"seed is {seed!r}; it must be an integer from 0 to 2^64-1")
    for key in ("x0", "v0", "x_target"):
        if not is_number(record.get(key), -_MAX_ABS, _MAX_ABS):
            allowed = f"a number from {-_MAX_ABS:g} to {_MAX_ABS:g}"
            problems.append(f"{key} is {record.get(key)!r}; it must be {allowed}")
    if problems:
        raise EnvironmentInputError(
            [f"environment optimal_control: record: {problem}" for problem in problems]
        )
