"""Returns: what the rewards from an episode on are worth to it.

An episode is credited with its own reward and with those of all later solve episodes of its lifecycle. Solve
j has the rewards-to-go ``r_task[j], …, r_task[S-1]``; update j, which writes the hint that task j+1 is solved
with, has ``r_update[j], r_task[j+1], …, r_task[S-1]``. Both lists have S − j entries. A return is *closed*
when no later reward can change it: with a finite window after W − 1 more task rewards, otherwise when the
lifecycle has ended.

Source: arXiv 2606.20002, causal reward-to-go; the styles are ``mean``, ``sliding_window_mean`` and
``discounted``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cod_async.config.schema import CreditAssignmentConfig


def settings_problems(settings: CreditAssignmentConfig) -> list[str]:
    """Return what contradicts in the settings of returns (empty when nothing does), one sentence each."""
    problems = []
    if settings.style == "sliding_window_mean" and settings.window is None:
        problems.append("style sliding_window_mean needs a window; set window to an integer of at least 1")
    if settings.style == "discounted" and settings.gamma is None:
        problems.append("style discounted needs a factor; set gamma to a number from 0 to 1")
    return problems


def rewards_to_go(
    task_rewards: Sequence[float], update_rewards: Sequence[float], kind: str, position: int
) -> list[float]:
    """Return the reward list of one episode.

    Args:
        task_rewards: rewards of solve 0 …, as far as known.
        update_rewards: rewards of update 0 …, as far as known.
        kind: ``solve`` or ``update``.
        position: task index j, 0-based, of a finished episode.
    """
    if kind == "solve":
        return list(task_rewards[position:])
    return [update_rewards[position], *task_rewards[position + 1 :]]


def combine(rewards: Sequence[float], settings: CreditAssignmentConfig) -> float:
    """Turn a rewards-to-go list into a return.

    ``mean``: the average. ``sliding_window_mean``: the average of the first min(W, length) entries.
    ``discounted``: ``sum_i gamma^i r_i``, not normalised.
    """
    if settings.style == "discounted":
        gamma = 1.0 if settings.gamma is None else settings.gamma
        return math.fsum(reward * gamma**index for index, reward in enumerate(rewards))
    if settings.style == "sliding_window_mean" and settings.window is not None:
        rewards = rewards[: settings.window]
    return math.fsum(rewards) / len(rewards)


def is_closed(position: int, num_tasks_done: int, pack_size: int, settings: CreditAssignmentConfig) -> bool:
    """Say whether the return of an episode at ``position`` can no longer change.

    Args:
        position: task index of the (finished) episode.
        num_tasks_done: solve episodes finished so far in its lifecycle.
        pack_size: tasks in the lifecycle.
        settings: style and window; ``non_causal`` closes with the lifecycle.
    """
    if num_tasks_done >= pack_size:
        return True
    is_windowed = settings.style == "sliding_window_mean" and settings.baseline != "non_causal"
    return is_windowed and settings.window is not None and position + settings.window <= num_tasks_done


def lifecycle_returns(
    task_rewards: Sequence[float],
    update_rewards: Sequence[float],
    pack_size: int,
    settings: CreditAssignmentConfig,
) -> dict[tuple[str, int], float]:
    """Return every closed return of one lifecycle, keyed by (kind, position).

    A lifecycle that was given up half-way has only the episodes whose window closed before; the others are
    missing from the result because their return will never be known. With the ``non_causal`` baseline every
    episode has the lifecycle's last task reward as its return.

    Args:
        task_rewards: rewards of the finished solve episodes, at most ``pack_size``.
        update_rewards: rewards of the finished update episodes, at most ``pack_size - 1``.
        pack_size: tasks in a whole lifecycle.
        settings: how rewards become returns.
    """
    episodes = [("solve", j) for j in range(len(task_rewards))]
    episodes += [("update", j) for j in range(len(update_rewards))]
    returns: dict[tuple[str, int], float] = {}
    for kind, position in episodes:
        if not is_closed(position, len(task_rewards), pack_size, settings):
            continue
        if settings.baseline == "non_causal":
            returns[kind, position] = task_rewards[-1]
        else:
            returns[kind, position] = combine(
                rewards_to_go(task_rewards, update_rewards, kind, position), settings
            )
    return returns
