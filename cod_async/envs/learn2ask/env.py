"""The environment: read a consultation, ask one good question or stop, in a single turn.

Every task is another dialogue, and nothing is hidden: what a hint can carry from task to task is when to stop
and how to ask. A task is one response, so there is no step penalty, and no state outlives a task.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cod_async.envs.base import Environment, StepResult, TaskSpec
from cod_async.envs.learn2ask.judging import STOP_TAG, Verdict, judge, max_reward, reward_of
from cod_async.envs.learn2ask.options import Learn2AskOptions, parse_options
from cod_async.envs.learn2ask.records import record_problems, speaker
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.texts import prompt_messages, prompt_text

_PROMPTS = Path(__file__).parent / "prompts"


@functools.cache
def _system() -> str:
    return prompt_text(_PROMPTS, "system.txt").replace("{stop_tag}", STOP_TAG)


_messages = functools.partial(prompt_messages, _PROMPTS)


class Learn2Ask(Environment):
    """Single-turn medical inquiry.

    Args:
        options: a preset merged with overrides, see :class:`~.options.Learn2AskOptions`.

    Raises:
        EnvironmentInputError: unknown, mistyped or contradictory options.
    """

    name: ClassVar[str] = "learn2ask"
    is_step_penalized: ClassVar[bool] = False

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options: Learn2AskOptions = parse_options(options)
        self._record: dict[str, Any] = {}
        self._verdict: Verdict | None = None

    @property
    def max_steps(self) -> int:
        """One response per task."""
        return 1

    @property
    def max_reward(self) -> float:
        """Reward of a perfect turn: 3 or 4 by the train mode, or 1 if normalized."""
        if self._options.is_reward_normalized:
            return 1.0
        return max_reward(self._options.train_mode, self._options.fusion)

    def reset(self, task: TaskSpec) -> str:
        """Start with one dialogue and return it as text.

        Raises:
            EnvironmentInputError: the record is wrong; every field with a problem is named.
        """
        problems = record_problems(task.record)
        if problems:
            raise EnvironmentInputError([f"environment learn2ask: record: {problem}" for problem in problems])
        self._record = dict(task.record)
        self._verdict = None
        text = _messages()
        # Replaced, not formatted: dialogues may hold braces.
        turns = [
            f"{text[speaker(message)]}: {message['content'].strip()}" for message in self._record["messages"]
        ]
        return text["dialogue"].replace("{dialogue}", "\n".join(turns))

    def system_prompt(self) -> str:
        """Return the rules; equal for every task."""
        return _system()

    async def step(self, response: str) -> StepResult:
        """Score the turn; the task is over.

        A turn that does not hold the stop tag counts as a question, so there is no format error: what is
        no question at all scores 0 for content and format.

        Raises:
            InfrastructureError: the judge gave no usable answer; nothing was scored.
            RuntimeError: the task is over or was never started (a caller's mistake).
        """
        if not self._record or self._verdict is not None:
            raise RuntimeError("learn2ask: step() without a running task; call reset() first")
        verdict = await judge(response, self._record, self._options)
        self._verdict = verdict
        is_success = verdict.action == 1.0 and verdict.content == 1.0
        return StepResult(
            observation=_messages()["over"],
            is_done=True,
            raw_reward=self._reward(verdict),
            finish="success" if is_success else "failure",
            metrics={
                "action": verdict.action,
                "content": verdict.content,
                "format": verdict.format,
                "is_stop_right": float(self._record["decision"] == "stop"),
                "num_judge_tries": float(verdict.num_tries),
            },
        )

    def _reward(self, verdict: Verdict) -> float:
        options = self._options
        reward = reward_of(verdict, options.train_mode, options.fusion)
        return reward / max_reward(options.train_mode, options.fusion) * self.max_reward

    def feedback(self) -> str:
        """Return total and sub-scores, what the decision should have been, the rubric, the judge's note."""
        text, verdict = _messages(), self._verdict
        if verdict is None:
            return text["cut_off"]
        decision: str = self._record["decision"]
        sentences = [
            text["total"].format(
                reward=f"{self._reward(verdict):.3g}",
                maximum=f"{self.max_reward:g}",
                action=f"{verdict.action:g}",
                content=f"{verdict.content:g}",
                format=f"{verdict.format:g}",
            )
        ]
        if verdict.action:
            sentences.append(text[f"right_{decision}"])
        else:
            sentences.append(text["wrong_continue" if decision == "stop" else "wrong_stop"])
        sentences.append(text[f"rubric_{decision}"])
        if verdict.note:
            sentences.append(text["note"].replace("{note}", verdict.note))
        return " ".join(sentences)

    def hidden(self) -> dict[str, Any]:
        """Return ``{}``: no world is shared by the tasks of a pack."""
        return {}

    def task_view(self) -> dict[str, Any]:
        """Return ``{"messages": [{role, content}], "decision": continue or stop, "facts": [text]}``."""
        return {key: self._record[key] for key in ("messages", "decision", "facts")}
