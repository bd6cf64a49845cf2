"""The plant: a point with position and velocity, two hidden constants, and a loss at the end.

The rollout applies a controller in closed loop with the symplectic order of the paper's reference (the
position moves by the *new* velocity). Everything is plain float arithmetic in a fixed order, so a task has
the same outcome, bit for bit, wherever it is played.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import msgspec

from cod_async.envs.optimal_control.evaluation import EvaluationError, Scope
from cod_async.errors import EnvironmentInputError

VELOCITY_WEIGHT = 2.0
"""Weight of the terminal velocity error in the loss."""
MAX_CONTROL = 1.0
"""Controls are clipped to [-1, 1]."""
_NOISE_KEY = 0x5DEECE66D

Controller = Callable[[Scope], float]
"""Variables at one step -> the unclipped control."""


class World(msgspec.Struct, frozen=True):
    """The hidden constants: ``a`` multiplies the velocity, ``b`` the control (no unit)."""

    a: float
    b: float


class ControlTask(msgspec.Struct, frozen=True):
    """One task, all of it visible to the policy except the noise.

    Attributes:
        x0, v0: state at step 0.
        x_target, v_target: wanted state at step ``horizon``.
        horizon: number of steps.
        effort_weight: weight of the sum of squared controls in the loss.
        process_noise_std: standard deviation of the velocity noise of a step.
        seed: seed of the noise.
    """

    x0: float
    v0: float
    x_target: float
    v_target: float
    horizon: int
    effort_weight: float
    process_noise_std: float = 0.0
    seed: int = 0


class Rollout(msgspec.Struct, frozen=True):
    """What a controller led to.

    Attributes:
        xs, vs: states at steps 0 .. horizon.
        us: clipped controls of steps 0 .. horizon-1.
        noise: velocity noise of the steps.
        loss: see :func:`loss_of`.
    """

    xs: tuple[float, ...]
    vs: tuple[float, ...]
    us: tuple[float, ...]
    noise: tuple[float, ...]
    loss: float

    @property
    def reward(self) -> float:
        """1 / (1 + loss), in (0, 1]."""
        return 1.0 / (1.0 + self.loss)


class RolloutError(EvaluationError):
    """A controller had no usable value at step ``step``.

    Args:
        step: the step, 0-based.
        reason: what went wrong, without numbers of the rollout.
    """

    def __init__(self, step: int, reason: str) -> None:
        self.step = step
        super().__init__(f"at t = {step}: {reason}")


def draw_world(
    pack_seed: int, a_range: tuple[float, float], b_range: tuple[float, float], b_margin: float
) -> World:
    """Draw the hidden constants of a pack, in the draw order of the paper's reference.

    Args:
        pack_seed: seed of a Mersenne generator; a is drawn first, then b.
        a_range: a is uniform in it.
        b_range: b is uniform in it without (-``b_margin``, ``b_margin``).
        b_margin: smallest magnitude of b, >= 0.

    Returns:
        For example pack seed 0, a in [0.55, 1.2], b in [-1.5, 1.5], margin 0.35: a = 1.0988742034912813,
        b = 0.9432951267626954.

    Raises:
        EnvironmentInputError: no b is possible.
    """
    generator = random.Random(pack_seed)
    a = generator.uniform(*a_range)
    return World(a=a, b=_place_b(generator.random(), b_range, b_margin))


def b_lengths(b_range: tuple[float, float], b_margin: float) -> tuple[float, float]:
    """Return the lengths of the intervals from which a negative and a positive b are drawn."""
    low, high = b_range
    return max(0.0, min(high, -b_margin) - low), max(0.0, high - max(low, b_margin))


def b_candidates(b_range: tuple[float, float], b_margin: float) -> list[float]:
    """Return the values that b can take when both intervals have length 0."""
    low, high = b_range
    return sorted(b for b in {-b_margin, b_margin, low, high} if low <= b <= high and abs(b) >= b_margin)


def _place_b(point: float, b_range: tuple[float, float], b_margin: float) -> float:
    """Map a uniform point of [0, 1) to b."""
    low, high = b_range
    if b_margin == 0.0:
        return low + (high - low) * point
    left, right = b_lengths(b_range, b_margin)
    offset = point * (left + right)
    if offset < left:
        return low + offset
    if right > 0.0:
        return max(low, b_margin) + offset - left
    if left > 0.0:  # rounding at the far end
        return min(high, -b_margin)
    candidates = b_candidates(b_range, b_margin)
    if not candidates:
        raise EnvironmentInputError(
            f"environment optimal_control: no b from {low} to {high} has a magnitude of at least {b_margin}"
        )
    return candidates[int(point * len(candidates))]


def process_noise(task: ControlTask) -> tuple[float, ...]:
    """Return the velocity noise of the steps; it depends on the task alone, not on the controls."""
    if task.process_noise_std == 0.0:
        return (0.0,) * task.horizon
    generator = random.Random(task.seed ^ _NOISE_KEY)
    return tuple(generator.gauss(0.0, task.process_noise_std) for _ in range(task.horizon))


def scope_at(task: ControlTask, step: int, x: float, v: float) -> dict[str, float]:
    """Return the variables that a controller reads at a step, all of them floats."""
    return {
        "x": x,
        "v": v,
        "t": float(step),
        "x_target": task.x_target,
        "v_target": task.v_target,
        "horizon": float(task.horizon),
        "remaining_steps": float(max(1, task.horizon - step)),
    }


def simulate(task: ControlTask, world: World, controller: Controller) -> Rollout:
    """Roll a controller out.

    Raises:
        RolloutError: the controller has no usable value at some step.
    """
    x, v = task.x0, task.v0
    xs, vs, us = [x], [v], []
    noise = process_noise(task)
    for step in range(task.horizon):
        try:
            control = controller(scope_at(task, step, x, v))
        except EvaluationError as error:
            raise RolloutError(step, str(error)) from None
        u = max(-MAX_CONTROL, min(MAX_CONTROL, control))
        v = world.a * v + world.b * u + noise[step]
        x = x + v
        us.append(u)
        vs.append(v)
        xs.append(x)
    loss = loss_of(task, x, v, us)
    return Rollout(xs=tuple(xs), vs=tuple(vs), us=tuple(us), noise=noise, loss=loss)


def loss_of(task: ControlTask, x: float, v: float, us: list[float]) -> float:
    """Return (x - x_target)^2 + 2 (v - v_target)^2 + effort_weight * sum of u^2, for the terminal x and v."""
    x_error, v_error = x - task.x_target, v - task.v_target
    effort = math.fsum(u * u for u in us)
    return x_error * x_error + VELOCITY_WEIGHT * v_error * v_error + task.effort_weight * effort
