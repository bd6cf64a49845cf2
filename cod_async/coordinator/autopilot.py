"""Steering the lag by what the learner reports: a pure function from one step's numbers to the next state.

Data that is too old shows in two numbers of the loss: the effective sample size of the ratios current /
behaviour, ESS = (sum r)^2 / (n sum r^2), falls, and the share of masked tokens grows. When either is bad
for a whole window of steps the lag is halved; when both are good for a whole window it grows by one. A lag
that had to be braked is a ceiling until ``retry_steps`` have passed, so that the search settles under it
instead of running into it again and again. After a change, as many steps as the lag may still train on data
from before it: they are not judged. Between two changes there is at least one window, and the lag never
leaves [``min_lag``, ``staleness.max_lag``]. A step without the numbers says nothing and interrupts nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import msgspec

from cod_async.config.schema import AutopilotConfig

Verdict = Literal["bad", "good", "between"]


class PilotState(msgspec.Struct, frozen=True):
    """Where the autopilot stands; kept in every step's report, so that a resume goes on from it.

    Attributes:
        lag: the lag that work is started for now, in steps.
        ceiling: lag that is not tried again before ``ceiling_steps`` more steps; None: there is none.
        ceiling_steps: steps until the ceiling is forgotten.
        settle_steps: steps that are not judged yet, because their data is from before the last change.
        num_bad, num_good: steps in a row with that verdict since the last change.
    """

    lag: int
    ceiling: int | None = None
    ceiling_steps: int = 0
    settle_steps: int = 0
    num_bad: int = 0
    num_good: int = 0


class Decision(msgspec.Struct, frozen=True):
    """A change of the lag: what it was, what it is, and the numbers that made it."""

    action: Literal["brake", "release"]
    lag_before: int
    lag: int
    ess_frac: float
    masked_frac: float


def start(max_lag: int) -> PilotState:
    """Return the state of a new run: all the lag that is allowed."""
    return PilotState(lag=max_lag)


def restore(text: object, config: AutopilotConfig, max_lag: int) -> PilotState:
    """Return the state that a step's report kept, within the present bounds; a new one if there is none."""
    try:
        state = msgspec.convert(text, PilotState)
    except msgspec.ValidationError:
        return start(max_lag)
    lag = min(max(state.lag, min(config.min_lag, max_lag)), max_lag)
    return msgspec.structs.replace(state, lag=lag)


def verdict(metrics: Mapping[str, Any], config: AutopilotConfig) -> tuple[Verdict, float, float] | None:
    """Judge one step: (verdict, ESS share, largest masked share); None when it does not report the numbers.

    Masked by the clip or by segment, or zeroed by a weight outside its bounds: a token may be both, so the
    larger of the two shares counts, which is never too many.
    """
    found = [metrics.get(name) for name in ("ess_frac", "masked_positive_frac", "masked_negative_frac")]
    found += [metrics.get(f"weight_zeroed_{sign}_frac", 0.0) for sign in ("positive", "negative")]
    if not all(isinstance(value, int | float) and math.isfinite(value) for value in found):
        return None
    ess, *masked = (float(value) for value in found if value is not None)
    worst = max(masked)
    if ess < config.min_ess_frac or worst > config.max_masked_frac:
        return "bad", ess, worst
    has_margin = ess >= min(1.0, config.min_ess_frac + config.ess_margin_frac)
    return ("good" if has_margin and worst <= config.max_masked_frac / 2 else "between"), ess, worst


def steer(
    state: PilotState, metrics: Mapping[str, Any], config: AutopilotConfig, max_lag: int
) -> tuple[PilotState, Decision | None]:
    """Return the state after one more step, and the change that it led to, if any.

    Args:
        state: after the step before.
        metrics: the learner's numbers of this step.
        config: the section ``[autopilot]``.
        max_lag: ``staleness.max_lag``, the upper end.
    """
    ceiling_steps = max(0, state.ceiling_steps - 1)
    state = msgspec.structs.replace(
        state, ceiling_steps=ceiling_steps, ceiling=state.ceiling if ceiling_steps else None
    )
    judged = verdict(metrics, config)
    if judged is None:
        return state, None
    if state.settle_steps > 0:
        return msgspec.structs.replace(state, settle_steps=state.settle_steps - 1), None
    what, ess, masked = judged
    num_bad = state.num_bad + 1 if what == "bad" else 0
    num_good = state.num_good + 1 if what == "good" else 0
    state = msgspec.structs.replace(state, num_bad=num_bad, num_good=num_good)
    low = min(config.min_lag, max_lag)
    if num_bad >= config.window_steps and state.lag > low:
        lag = max(low, state.lag // 2)
        after = PilotState(lag, state.lag, config.retry_steps, settle_steps=state.lag)
        return after, Decision("brake", state.lag, lag, ess, masked)
    top = max_lag if state.ceiling is None else min(max_lag, max(low, state.ceiling - 1))
    if num_good >= config.window_steps and state.lag < top:
        after = PilotState(state.lag + 1, state.ceiling, state.ceiling_steps, settle_steps=state.lag + 1)
        return after, Decision("release", state.lag, state.lag + 1, ess, masked)
    return state, None
