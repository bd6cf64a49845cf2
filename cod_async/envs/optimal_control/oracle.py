"""Scripted policies: the floor and the ceilings of a learning curve.

``zero`` does nothing, ``random`` draws a linear law. ``oracle`` is told the hidden constants and submits
the best controls there are, as a table over t (under process noise: the best feedback law). ``lqr`` is told
them too and submits clipped linear-quadratic gains. ``explorer`` is told nothing: at position 0 it guesses
the sign of b for a fixed proportional-derivative law, then it fits both constants to the feedback tables it
has seen and submits the gains for its estimate, so its curve is what a learner reaches that needs one task
to identify the world.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable, Sequence
from typing import Any

from cod_async.envs.base import Environment, Policy, TaskSpec
from cod_async.envs.optimal_control.dynamics import World
from cod_async.envs.optimal_control.env import OptimalControl, controller_xml
from cod_async.envs.optimal_control.optimum import best_controls, feedback_gains, fit_world
from cod_async.envs.optimal_control.syntax import MAX_CHARS
from cod_async.lifecycle.hint import prompts_for

PD_GAINS = (0.25, 0.32)
"""Position and velocity gain of the fixed law for position 0."""

_TABLE_ROW = re.compile(r"^ *(\d+) +(-?[\d.]+) +(-?[\d.]+) +(-?[\d.]+|-)$", re.MULTILINE)
_DECIMALS = (8, 6, 5, 4, 3, 2)


def answer(expression: str) -> str:
    """Return the response that submits an expression."""
    return f"<answer>{controller_xml(expression)}</answer>"


def lookup(values: Sequence[float], decimals: int) -> str:
    """Write values at t = 0, 1, ... as an expression in t: a balanced tree of ``ifelse``.

    Args:
        values: at least one.
        decimals: digits after the point; neighbors that then are equal share a branch.
    """
    runs: list[tuple[int, str]] = []
    for t, value in enumerate(values):
        text = f"{value:.{decimals}f}".rstrip("0").rstrip(".")
        if not runs or runs[-1][1] != text:
            runs.append((t, text))

    def write(low: int, high: int) -> str:
        if high - low == 1:
            return runs[low][1]
        middle = (low + high) // 2
        return f"ifelse(t<{runs[middle][0]},{write(low, middle)},{write(middle, high)})"

    return write(0, len(runs))


def _fitting(write: Callable[[int], str]) -> str:
    """Return an expression with as many decimals as fit its length limit."""
    for decimals in _DECIMALS:
        text = write(decimals)
        if len(text) <= MAX_CHARS:
            return text
    raise AssertionError("an expression with two decimals fits for every horizon that options allow")


def open_loop_expression(environment: OptimalControl, world: World) -> str:
    """Return the best controls of the current task for known constants, as an expression in t."""
    controls = best_controls(environment.task, world)
    return _fitting(lambda decimals: lookup(controls.tolist(), decimals))


def feedback_expression(environment: OptimalControl, world: World) -> str:
    """Return the linear-quadratic feedback law for known constants, as an expression in t, x and v."""
    task = environment.task
    gains = feedback_gains(world, task.horizon, task.effort_weight)

    def write(decimals: int) -> str:
        x_gain, v_gain = (lookup(gains[:, column].tolist(), decimals) for column in (0, 1))
        return f"{x_gain}*(x_target-x)-{v_gain}*v"

    return _fitting(write)


def pd_expression(sign: int) -> str:
    """Return the fixed proportional-derivative law for a positive (1) or negative (-1) b."""
    law = f"{PD_GAINS[0]}*(x_target-x)-{PD_GAINS[1]}*v"
    return law if sign > 0 else f"-({law})"


def _control(environment: Environment) -> OptimalControl:
    if not isinstance(environment, OptimalControl):
        raise TypeError(f"this policy plays optimal_control, not {type(environment).__name__}")
    return environment


def _world(environment: Environment) -> World:
    hidden = environment.hidden()
    return World(a=hidden["a"], b=hidden["b"])


def random_policy(seed: int) -> Policy:
    """Return the policy that submits a linear law with gains uniform in [-0.6, 0.6]."""
    generator = random.Random(seed)

    def act(environment: Environment, observation: str, memory: Any) -> str:
        x_gain, v_gain = (round(generator.uniform(-0.6, 0.6), 3) for _ in range(2))
        return answer(f"{x_gain}*(x_target-x)+{v_gain}*v")

    return act


def zero_policy(seed: int) -> Policy:
    """Return the policy that never pushes; the seed has no effect."""
    return lambda environment, observation, memory: answer("0")


def oracle_policy(seed: int) -> Policy:
    """Return the policy that knows a and b and submits the optimum; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: Any) -> str:
        control = _control(environment)
        has_noise = control.options.process_noise_std > 0.0
        write = feedback_expression if has_noise else open_loop_expression
        return answer(write(control, _world(control)))

    return act


def lqr_policy(seed: int) -> Policy:
    """Return the policy that knows a and b and submits feedback gains; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: Any) -> str:
        control = _control(environment)
        return answer(feedback_expression(control, _world(control)))

    return act


def observed_steps(feedback: str) -> list[tuple[float, float, float]]:
    """Return (v_t, u_t, v_{t+1}) of the steps of a feedback table; none if there is no table."""
    rows = [match.groups() for match in _TABLE_ROW.finditer(feedback)]
    steps = []
    for (_, _, v, u), (_, _, v_next, _) in itertools.pairwise(rows):
        steps.append((float(v), float(u), float(v_next)))
    return steps


def explorer_policy(seed: int) -> Policy:
    """Return the policy that identifies the world from feedback and carries its estimate.

    Its memory holds ``steps``, all observed steps. The caller adds ``feedback`` after each task (the
    updater's text).
    """
    sign = random.Random(seed).choice((-1, 1))

    def act(environment: Environment, observation: str, memory: dict[str, Any]) -> str:
        control = _control(environment)
        steps = memory.setdefault("steps", [])
        steps += observed_steps(str(memory.pop("feedback", "")))
        world = fit_world(steps)
        return answer(pd_expression(sign) if world is None else feedback_expression(control, world))

    return act


def truth_hint(environment: Environment, task: TaskSpec) -> str:
    """Return the hint of a perfect updater: both constants. Resets the environment."""
    environment.reset(task)
    world = _world(environment)
    return prompts_for(environment.prompt_style).carried(
        f"- The hidden constants are a = {world.a:.4f} and b = {world.b:.4f}, so in every task "
        f"v_(t+1) = {world.a:.4f} * v_t + ({world.b:.4f}) * u_t."
    )
