"""Everything the policy reads about its data: observations and results of actions, as text.

The wording lies in ``prompts/messages.json``; here numbers become text, with four significant digits.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cod_async.envs.pde_discovery.basis import Array, evaluate
from cod_async.envs.pde_discovery.equation import render
from cod_async.envs.pde_discovery.regression import Candidate, Regression, margin
from cod_async.envs.pde_discovery.state import Commit, DataSet, measured
from cod_async.lifecycle.texts import prompt_messages, prompt_text

_PROMPTS = Path(__file__).parent / "prompts"
MAX_TABLE_ROWS = 120
"""Points that a regression lists at most, the newest ones; the paper's packs have 24 and 48."""


messages = functools.partial(prompt_messages, _PROMPTS)
"""Return the message templates by name."""


def prompt(name: str) -> str:
    """Return a prompt template."""
    return prompt_text(_PROMPTS, f"{name}.txt")


def digits(value: float | None) -> str:
    """Write a number with four significant digits, None as ``none``."""
    if value is None:
        return messages()["nothing"]
    return "infinite" if math.isinf(value) else f"{value:.4g}"


def _range(name: str, values: Array) -> dict[str, str]:
    low, high = float(np.min(values)), float(np.max(values))
    return {f"{name}_low": digits(low), f"{name}_high": digits(high), f"{name}_span": digits(high - low)}


def data_sets_line(data_sets: Sequence[DataSet]) -> str:
    """List data sets with their sizes."""
    text = messages()
    parts = [text["data_set"].format(name=one.name, num_points=len(one.u)) for one in data_sets]
    return ", ".join(parts) or text["nothing"]


def evidence_line(commits: Sequence[Commit]) -> str:
    """Say how many commits there were and how good the evidence for the last one was, not what it was."""
    if not commits:
        return messages()["nothing"]
    last = commits[-1]
    return messages()["evidence"].format(
        num_commits=len(commits),
        task=last.task,
        num_points=last.num_points,
        u_low=digits(last.u_low),
        u_high=digits(last.u_high),
        u_span=digits(last.u_high - last.u_low),
        max_error=digits(last.max_error),
        margin=digits(last.margin),
    )


def sampled(data_set: DataSet, num_left: int) -> str:
    """Tell what was measured, without the values."""
    ranges: dict[str, str] = {}
    for name, values in (("x", data_set.x), ("t", data_set.t), ("u", data_set.u)):
        ranges |= _range(name, np.array(values))
    return messages()["sampled"].format(
        num_points=len(data_set.u),
        name=data_set.name,
        points_left=num_left,
        t_mean=digits(float(np.mean(data_set.t))),
        **ranges,
    )


def regression(
    result: Regression, data_id: str, data_sets: Sequence[DataSet], num_supports: int, threshold: float
) -> str:
    """Tell the outcome of a regression, with every data point (the newest 120).

    Args:
        result: the outcome.
        data_id: what the data were called.
        data_sets: the data.
        num_supports: sets of terms that were fitted.
        threshold: condition number above which there is a penalty, log10 of the ratio.
    """
    text, best, second = messages(), result.best, result.second()
    u, y = measured(data_sets)
    lines = [
        text["regression"].format(
            num_supports=num_supports,
            num_points=len(u),
            data=data_id,
            num_candidates=len(result.candidates),
            best=render(best.equation),
            max_error=digits(best.max_error),
            second=candidate_text(second),
            margin=digits(margin(best.max_error, second)),
            condition=digits(result.condition),
            penalty=digits(max(0.0, math.log10(result.condition / threshold))),
        ),
        text["table"],
    ]
    # The printed equation and no other: even an empty one predicts 0, never the hidden f.
    predicted = evaluate(best.equation, u)
    rows = [(one.name, x, t) for one in data_sets for x, t in zip(one.x, one.t, strict=True)]
    if len(rows) > MAX_TABLE_ROWS:
        lines.append(text["table_rest"].format(num_rows=len(rows) - MAX_TABLE_ROWS))
    for i in range(max(0, len(rows) - MAX_TABLE_ROWS), len(rows)):
        name, x, t = rows[i]
        values = (x, t, float(u[i]), float(y[i]), float(predicted[i]), float(y[i] - predicted[i]))
        lines.append(" | ".join([name, *map(digits, values)]))
    return "\n".join(lines)


def candidate_text(candidate: Candidate | None) -> str:
    """Write an equation with its error."""
    if candidate is None:
        return messages()["second_none"]
    return messages()["second"].format(
        equation=render(candidate.equation), max_error=digits(candidate.max_error)
    )


def summary(commits: Sequence[Commit], is_revealed: bool) -> str:
    """Group earlier commits by their equation; name the equations only if they are to be revealed."""
    text = messages()
    if not commits:
        return text["summary_none"]
    slots: dict[str, list[str]] = {}
    for commit in commits:
        slots.setdefault(commit.equation, []).append(str(commit.task))
    template = text["slot_revealed" if is_revealed else "slot"]
    lines = [text["summary"].format(num_commits=len(commits), num_slots=len(slots))]
    for number, (equation, tasks) in enumerate(slots.items(), start=1):
        lines.append(template.format(slot=number, equation=equation, tasks=", ".join(tasks)))
    return "\n".join(lines)
