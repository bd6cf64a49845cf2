"""The hint block: what the solver is shown, what the updater is asked, and what counts as well formed.

The hint is the only thing that goes from task to task. It always begins with a short label, which is part of
what is injected into the next prompt and of what the updater is shown. Position 0 sees a placeholder that
means "nothing yet"; a response that does not parse *replaces* the hint by another placeholder, so knowledge
can be lost and keeping the format is worth something. Two styles exist: ``full``, English prose for
instruction-tuned models (the texts lie in ``prompts/``), and ``terse``, a dozen words for the tiny quickstart
model, where every token costs training time.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import ClassVar

from cod_async.envs.base import PromptStyle
from cod_async.lifecycle.parsing import extract_between
from cod_async.lifecycle.texts import fill, prompt_text

_PROMPTS = Path(__file__).parent / "prompts"


def _text(name: str) -> str:
    return prompt_text(_PROMPTS, f"{name}.md")


class HintPrompts(ABC):
    """One style of prompts.

    Attributes:
        style: its name.
        start, end: the delimiters of the block that the updater writes.
        label: every carried hint begins with it.
        initial: the carried hint before anything is known (seen by position 0).
        failed: the carried hint after a response that did not parse.
        cut_marker: stands where a trajectory was shortened to fit the context.
        overflow_feedback: feedback on an episode that the context length ended.
    """

    style: ClassVar[PromptStyle]
    start: ClassVar[str]
    end: ClassVar[str]
    label: ClassVar[str]
    initial: ClassVar[str]
    failed: ClassVar[str]
    cut_marker: ClassVar[str]
    overflow_feedback: ClassVar[str]

    @abstractmethod
    def solve_system(self, env_system: str, hint: str, notice_tokens: int = 0) -> str:
        """Return the solver's system prompt: the environment's rules, then the hint, then the length request.

        Args:
            env_system: the environment's rules for this task.
            hint: the carried hint, label included; empty shows no hint section at all.
            notice_tokens: ask to stay within this many tokens; 0 asks nothing.
        """

    @abstractmethod
    def update_messages(
        self, previous_hint: str, trajectory: str, reward: float, feedback: str, notice_tokens: int = 0
    ) -> tuple[str, str]:
        """Return the updater's system and user message.

        Args:
            previous_hint: the carried hint, label included.
            trajectory: text of the finished solve episode.
            reward: its final reward, penalties included.
            feedback: the environment's sentence on it; blank uses a sentence made from the reward.
            notice_tokens: ask to stay within this many tokens; 0 asks nothing.
        """

    @abstractmethod
    def outcome(self, reward: float, feedback: str) -> str:
        """Return how a transcript tells the outcome of a task: at the start of the next user message."""

    @abstractmethod
    def next_task(self, outcome: str, new_rules: str, user: str) -> str:
        """Return the user message that opens the next task of a transcript.

        Args:
            outcome: of the last task, from :meth:`outcome`; empty if an update has told it already.
            new_rules: the environment's rules if they differ from those that opened the conversation.
            user: the task's first observation.
        """

    @abstractmethod
    def transcript_update(self, outcome: str, notice_tokens: int = 0) -> str:
        """Return the user message that asks for a hint block inside a transcript."""

    @abstractmethod
    def trajectory(self, env_system: str, messages: Sequence[tuple[str, str]]) -> str:
        """Return the generic trajectory text of an episode, for environments without one of their own.

        The last response's outcome is not in it, because that would have been the next user message: the
        updater learns it through the feedback.

        Args:
            env_system: the environment's rules, without hint and length request.
            messages: ``("user", text)`` and ``("assistant", text)`` in order.
        """

    @abstractmethod
    def num_facts(self, hint: str) -> int:
        """Count the separate items of a carried hint; placeholders have none."""

    def carried(self, body: str) -> str:
        """Return the carried hint with this body."""
        return f"{self.label} {body}"

    def parse(self, text: str) -> str | None:
        """Return the carried hint (label included) that an updater's response holds, or None.

        Well formed: both delimiters exactly once, in order, and something other than white space between
        them.
        """
        body = extract_between(text, self.start, self.end)
        return None if body is None or not body.strip() else self.carried(body.strip())


class FullPrompts(HintPrompts):
    """English prose for instruction-tuned models."""

    style = "full"
    start = "=== HINTS BEGIN ==="
    end = "=== HINTS END ==="
    label = "Hints:"
    initial = "Hints: (nothing has been noted so far)"
    failed = "Hints: (no hints are available)"
    cut_marker = "\n[... part of the record was left out here because of its length ...]\n"
    overflow_feedback = (
        "The conversation grew longer than the context allows, so the task ended without success."
    )

    def solve_system(self, env_system: str, hint: str, notice_tokens: int = 0) -> str:
        """Return the rules, the hint section with its disclaimer, and the length section."""
        sections = [env_system.strip()]
        if hint:
            sections += [_text("solve_hints"), hint]
        if notice_tokens:
            sections.append(fill(_text("solve_length"), num_tokens=str(notice_tokens)))
        return "\n\n".join(sections)

    def update_messages(
        self, previous_hint: str, trajectory: str, reward: float, feedback: str, notice_tokens: int = 0
    ) -> tuple[str, str]:
        """Return the updater's instructions, and the hint, record, reward (three decimals) and feedback."""
        system = fill(_text("update_system"), start=self.start, end=self.end)
        if notice_tokens:
            system += "\n\n" + fill(_text("update_length"), num_tokens=str(notice_tokens))
        if not feedback.strip():
            feedback = f"The task ended with a reward of {reward:.3f}; the most that can be reached is 1.0."
        user = fill(
            _text("update_user"),
            previous_hint=previous_hint,
            trajectory=trajectory,
            reward=f"{reward:.3f}",
            feedback=feedback.strip(),
        )
        return system, user

    def outcome(self, reward: float, feedback: str) -> str:
        """Return one line with the reward (three decimals) and the feedback."""
        return f"The task is over. Reward: {reward:.3f}. {feedback.strip()}".strip()

    def next_task(self, outcome: str, new_rules: str, user: str) -> str:
        """Return the outcome, new rules and the observation as paragraphs."""
        parts = [outcome, "Next task.", new_rules.strip(), user]
        return "\n\n".join(part for part in parts if part)

    def transcript_update(self, outcome: str, notice_tokens: int = 0) -> str:
        """Return the outcome, the updater's instructions and the length request as paragraphs."""
        parts = [outcome, fill(_text("update_system"), start=self.start, end=self.end)]
        if notice_tokens:
            parts.append(fill(_text("update_length"), num_tokens=str(notice_tokens)))
        return "\n\n".join(parts)

    def trajectory(self, env_system: str, messages: Sequence[tuple[str, str]]) -> str:
        """Return one block with the rules and one block per step, separated by blank lines."""
        blocks = [f"Rules given to the solver:\n{env_system.strip()}"] if env_system.strip() else []
        observation, action, num_steps = "", "", 0

        def close() -> None:
            if num_steps:
                did = action or "(none was taken)"
                blocks.append(f"Step {num_steps}\nObservation: {observation}\nAction: {did}")

        for role, text in messages:
            if role == "user":
                close()
                observation, action, num_steps = text.strip(), "", num_steps + 1
            else:
                action = text.strip()
        close()
        return "\n\n".join(blocks)

    def num_facts(self, hint: str) -> int:
        """Count the Markdown bullets, or 1 for a hint without any."""
        if hint in (self.initial, self.failed) or not hint.strip():
            return 0
        lines = hint.removeprefix(self.label).splitlines()
        return sum(line.lstrip().startswith(("-", "*", "+")) for line in lines) or 1


def terse_number(value: float) -> str:
    """Write a reward as one word with at most one decimal: ``0``, ``.5``, ``1``, ``-.1``."""
    tenths = math.floor(abs(value) * 10 + 0.5)
    if tenths == 0:
        return "0"
    whole, part = divmod(tenths, 10)
    return ("-" if value < 0 else "") + (str(whole) if whole else "") + (f".{part}" if part else "")


class TersePrompts(HintPrompts):
    """A few whitespace-separated words; a hint is a list of one-word facts."""

    style = "terse"
    start = "["
    end = "]"
    label = "Hints :"
    initial = "Hints : null"
    failed = "Hints : none"
    cut_marker = " cut "
    overflow_feedback = "cut"

    def solve_system(self, env_system: str, hint: str, notice_tokens: int = 0) -> str:
        """Return the rules, the hint and a full stop; length requests are beyond a tiny model."""
        return " ".join(part for part in (env_system.strip(), f"{hint} ." if hint else "") if part)

    def update_messages(
        self, previous_hint: str, trajectory: str, reward: float, feedback: str, notice_tokens: int = 0
    ) -> tuple[str, str]:
        """Return ``Write <hint> .`` and ``<trajectory> ; <feedback> reward <r> .``."""
        record = " ; ".join(part for part in (trajectory.strip(), feedback.strip()) if part)
        return f"Write {previous_hint} .", f"{record} reward {terse_number(reward)} ."

    def outcome(self, reward: float, feedback: str) -> str:
        """Return ``<feedback> reward <r>``."""
        return f"{feedback.strip()} reward {terse_number(reward)}".strip()

    def next_task(self, outcome: str, new_rules: str, user: str) -> str:
        """Return outcome, new rules and observation, separated by semicolons."""
        return " ; ".join(part for part in (outcome, new_rules.strip(), user) if part)

    def transcript_update(self, outcome: str, notice_tokens: int = 0) -> str:
        """Return ``<outcome> ; Write .``."""
        return f"{outcome} ; Write ."

    def trajectory(self, env_system: str, messages: Sequence[tuple[str, str]]) -> str:
        """Return the messages in order, separated by semicolons."""
        return "Log " + " ; ".join(text.strip() for _, text in messages)

    def parse(self, text: str) -> str | None:
        """Return the carried hint that a response holds, its words separated by single spaces, or None."""
        body = extract_between(text, self.start, self.end)
        return None if body is None or not body.strip() else self.carried(" ".join(body.split()))

    def num_facts(self, hint: str) -> int:
        """Count the words after the label."""
        return 0 if hint in (self.initial, self.failed) else len(hint.removeprefix(self.label).split())


_STYLES: dict[str, HintPrompts] = {"full": FullPrompts(), "terse": TersePrompts()}


def prompts_for(style: PromptStyle) -> HintPrompts:
    """Return the prompts of a style (an environment's ``prompt_style``)."""
    return _STYLES[style]
