"""What episodes are rewarded with: the environment's outcome less the price of steps and length.

Successes pay for the responses they took and for long ones; failures pay nothing, so that trying is never
worse than giving up. Update episodes are only ever punished: for a hint that does not parse, and, if wanted,
for its length. What a hint is worth shows in the rewards of the tasks after it.
"""

from __future__ import annotations

from collections.abc import Sequence

from cod_async.config.schema import LifecycleConfig


def _ramp(length: int, free: int, full: int) -> float:
    """Return how far a length lies on the way from ``free`` to ``full``, in [0, 1]; 0 without a ramp."""
    return min(1.0, max(0.0, (length - free) / (full - free))) if full > free else 0.0


def penalized_reward(
    raw_reward: float,
    response_tokens: Sequence[int],
    max_steps: int,
    config: LifecycleConfig,
) -> float:
    """Return the reward that is trained on: ``max(0, r0 - c (p + T / T_max))`` for r0 > 0, else r0.

    p is the mean over responses of ``clip((n_t - L0) / (L1 - L0), 0, 1)``.

    Args:
        raw_reward: r0, the environment's outcome.
        response_tokens: n_t, generated tokens of each of the episode's T responses.
        max_steps: T_max, most responses the task allows.
        config: c = ``solve_penalty``, L0 = ``solve_length_free_tokens``, L1 = ``solve_length_full_tokens``.

    Source: the paper's penalties on successes (arXiv 2606.20002); failures are never penalised.
    """
    if raw_reward <= 0:
        return raw_reward
    free, full = config.solve_length_free_tokens, config.solve_length_full_tokens
    num_responses = len(response_tokens)
    length = sum(_ramp(length, free, full) for length in response_tokens) / max(1, num_responses)
    steps = num_responses / max(1, max_steps)
    return max(0.0, raw_reward - config.solve_penalty * (length + steps))


def update_reward(is_well_formed: bool, num_tokens: int, config: LifecycleConfig) -> float:
    """Return the reward of an update episode, in [-``hint_penalty``, 0].

    Args:
        is_well_formed: whether a hint was parsed; without one the reward is -c.
        num_tokens: n, generated tokens.
        config: c = ``hint_penalty``; M0, M1 = ``hint_length_free_tokens``, ``hint_length_full_tokens``:
            between them the reward falls from 0 to -c; n < ``hint_min_tokens`` gives -c.

    Source: the paper's format and length reward (arXiv 2606.20002).
    """
    full = config.hint_length_full_tokens
    if not is_well_formed:
        return -config.hint_penalty
    if not full:
        return 0.0
    if num_tokens < config.hint_min_tokens:
        return -config.hint_penalty
    return 0.0 - config.hint_penalty * _ramp(num_tokens, config.hint_length_free_tokens, full)
