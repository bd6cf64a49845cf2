"""What environment authors return, checked where it enters: a wrong type is the environment's failure.

Without this a ``None`` for an observation, or a numpy scalar for a reward, would surface far away as an error
of the actor.
"""

from __future__ import annotations

from typing import get_args

from cod_async.envs.base import Closing, Opening, StepResult
from cod_async.lifecycle.segment import Finish

_FINISHES = frozenset(get_args(Finish))


def checked_opening(opening: Opening) -> Opening:
    """Return an opening as it must be.

    Raises:
        TypeError: a field is of a wrong type.
        ValueError: there are no steps to take.
    """
    max_steps = int(opening.max_steps)
    if max_steps < 1:
        raise ValueError(f"max_steps is {max_steps}; an episode has at least one step")
    return Opening(
        _text("the first observation", opening.observation),
        _text("system_prompt", opening.system_prompt),
        max_steps,
    )


def checked_result(result: StepResult) -> StepResult:
    """Return a step's result as it must be; numpy scalars become Python numbers.

    Raises:
        TypeError: it is no StepResult, or a field is of a wrong type.
        ValueError: its finish is not one that segments know.
    """
    if not isinstance(result, StepResult):
        raise TypeError(f"step returned a {type(result).__name__}; it must return a StepResult")
    if result.finish not in _FINISHES:
        raise ValueError(f"finish is {result.finish!r}; it must be one of {', '.join(sorted(_FINISHES))}")
    return StepResult(
        observation=_text("observation", result.observation),
        is_done=bool(result.is_done),
        raw_reward=float(result.raw_reward),
        finish=result.finish,
        metrics={_text("a metric's name", name): float(value) for name, value in result.metrics.items()},
    )


def checked_closing(closing: Closing) -> Closing:
    """Return a closing as it must be.

    Raises:
        TypeError: a field is of a wrong type.
    """
    trajectory = None if closing.trajectory is None else _text("trajectory", closing.trajectory)
    return Closing(trajectory, _text("feedback", closing.feedback), checked_snapshot(closing.snapshot))


def checked_snapshot(snapshot: bytes) -> bytes:
    """Return a snapshot.

    Raises:
        TypeError: it is not made of bytes.
    """
    if not isinstance(snapshot, bytes | bytearray):
        raise TypeError(f"snapshot returned a {type(snapshot).__name__}; it must return bytes")
    return bytes(snapshot)


def _text(what: str, value: object) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{what} is a {type(value).__name__}; it must be a str")
    return str(value)
