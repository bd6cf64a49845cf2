"""Prompts of update episodes: the record without its oldest results, and no reward.

The updater is not told the reward, because it measures the distance to the hidden equation. It is reminded of
the delimiters at the end, because the record of a task is long and full of tags. Results of actions are left
out of all but the last two observations of the record, so that it stays short; the solve episode itself is
never rewritten.
"""

from __future__ import annotations

from cod_async.envs.pde_discovery.report import messages as texts
from cod_async.envs.pde_discovery.report import prompt
from cod_async.lifecycle.hint import FullPrompts

NUM_FULL_OBSERVATIONS = 2
"""Observations at the end of a record that keep their results."""


class PdePrompts(FullPrompts):
    """The standard prompts, without the reward and with a reminder of the delimiters."""

    def update_messages(
        self, previous_hint: str, trajectory: str, reward: float, feedback: str, notice_tokens: int = 0
    ) -> tuple[str, str]:
        """Return the updater's system and user message; arguments as for the standard prompts.

        Raises:
            RuntimeError: the standard prompt no longer has a line with the reward before the feedback.
        """
        feedback = feedback.strip() or texts()["nothing"]  # blank would be filled with the reward
        system, user = super().update_messages(previous_hint, trajectory, reward, feedback, notice_tokens)
        line = f"Reward: {reward:.3f}\n"
        # From the right: the record before it holds the policy's text, the feedback behind it is ours.
        before, found, after = user.rpartition(f"\n{line}Feedback: ")
        if not found:
            raise RuntimeError("pde_discovery: the standard update prompt has no line 'Reward: ...' any more")
        reminder = prompt("update_reminder").format(start=self.start, end=self.end)
        return system, f"{before}\nFeedback: {after.rstrip()}\n\n{reminder}"


def compressed(messages: list[tuple[str, str]]) -> list[tuple[str, str]]:
    """Leave the results of actions, and what follows them, out of all but the last two observations.

    Args:
        messages: alternating ``("user", text)`` and ``("assistant", text)`` of a finished episode.
    """
    heading, left_out = texts()["result"], texts()["result_left_out"]
    users = [place for place, (role, _) in enumerate(messages) if role == "user"]
    shortened = list(messages)
    for place in users[:-NUM_FULL_OBSERVATIONS]:
        before, found, _ = messages[place][1].partition(heading)
        if found:
            shortened[place] = ("user", before + left_out)
    return shortened
