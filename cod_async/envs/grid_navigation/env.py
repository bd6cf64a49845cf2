"""The game: exact-length rook walks over a hidden cost map that is uncovered along the way.

A pack owns one map; every task on it names a start, a goal and a number of rounds. What has been revealed is
drawn in every observation and stays revealed for the rest of the lifecycle, so knowledge is carried by the
environment's own state as well as by the hint. Sums of costs are integers; a reward is one division.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt

from cod_async.envs.base import Environment, StepResult, TaskSpec
from cod_async.envs.checks import is_int
from cod_async.envs.grid_navigation.formats import (
    FAR,
    UNKNOWN,
    decode_state,
    draw_map,
    encode_state,
    parse_move,
)
from cod_async.envs.grid_navigation.options import GridOptions, parse_options
from cod_async.envs.grid_navigation.planner import reward_of
from cod_async.envs.grid_navigation.worlds import (
    Cell,
    Costs,
    GridTask,
    cost_map,
    entered_cells,
    make_task,
)
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.segment import Finish
from cod_async.lifecycle.texts import prompt_messages, prompt_text

_PROMPTS = Path(__file__).parent / "prompts"
_system_template = functools.partial(prompt_text, _PROMPTS, "system.txt")
_messages = functools.partial(prompt_messages, _PROMPTS)


class GridNavigation(Environment):
    """Rook walks over a hidden cost map.

    Args:
        options: a preset merged with overrides, see :class:`~.options.GridOptions`.

    Raises:
        EnvironmentInputError: unknown, mistyped or contradictory options.
    """

    name: ClassVar[str] = "grid_navigation"
    is_step_penalized: ClassVar[bool] = False  # the number of rounds is not the policy's choice

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options: GridOptions = parse_options(options)
        self._pack_seed: int | None = None
        self._revealed: npt.NDArray[np.bool_] = np.zeros((0, 0), dtype=np.bool_)
        self._costs: Costs = np.zeros((0, 0), dtype=np.int64)
        self._task: GridTask | None = None
        self._position: Cell = (0, 0)
        self._num_rounds = 0
        self._cost_sum = 0
        self._num_entered = 0
        self._last_move: tuple[Cell, ...] = ()
        self._finish: Finish | None = None
        self._refusal = ""
        self._is_illegal = False

    @property
    def max_steps(self) -> int:
        """Rounds of the current task, which is also the number of responses of an episode without errors.

        Before the first task it is the most that a task of these options can have.
        """
        return self._options.rounds_max if self._task is None else self._task.num_rounds

    @property
    def position(self) -> Cell:
        """Where the policy stands, as (row, column)."""
        return self._position

    @property
    def goal(self) -> Cell:
        """Where the current task must end."""
        return self._running().goal

    @property
    def rounds_left(self) -> int:
        """Moves that are still to be made."""
        return self.max_steps - self._num_rounds

    @property
    def cost_sum(self) -> int:
        """Sum of the costs of the cells entered in this task, repetitions counted."""
        return self._cost_sum

    @property
    def num_entered(self) -> int:
        """Number of cells entered in this task, repetitions counted."""
        return self._num_entered

    def known_costs(self) -> npt.NDArray[np.int64]:
        """Return the map as the policy sees it, shape [n, n]; unknown cells are -1."""
        return np.where(self._revealed, self._costs, UNKNOWN)

    def reset(self, task: TaskSpec) -> str:
        """Make the pack's map and the task, and return the first observation.

        Raises:
            EnvironmentInputError: the record is wrong, or the restored snapshot is of a map of another size.
        """
        _check_record(task.record)
        self._costs = cost_map(self._options, task.pack_seed)
        if self._pack_seed != task.pack_seed:  # the first task of a lifecycle
            self._pack_seed = task.pack_seed
            self._revealed = np.zeros(self._costs.shape, dtype=np.bool_)
        elif self._revealed.shape != self._costs.shape:
            raise EnvironmentInputError(
                f"environment grid_navigation: snapshot: its map has side {len(self._revealed)}, but with "
                f"these options the pack's map has side {len(self._costs)}; continue with the options that "
                "the lifecycle began with"
            )
        self._task = make_task(
            task.record["seed"], len(self._costs), self._options.rounds_min, self._options.rounds_max
        )
        self._position = self._task.start
        self._num_rounds = self._cost_sum = self._num_entered = 0
        self._last_move = ()
        self._finish = None
        self._refusal = ""
        self._is_illegal = False
        return self._observation()

    def system_prompt(self) -> str:
        """Return the rules; equal for every task of a preset."""
        return _system_template().format(radius=self._options.reveal_radius)

    def _running(self) -> GridTask:
        if self._task is None:
            raise RuntimeError("grid_navigation: no task was started; call reset() first")
        return self._task

    async def step(self, response: str) -> StepResult:
        """Make one move.

        Raises:
            RuntimeError: the task is over or was never started (a caller's mistake).
        """
        task = self._running()
        if self._finish is not None:
            raise RuntimeError("grid_navigation: step() after the end of a task; call reset() first")
        self._num_rounds += 1
        move = parse_move(response)
        if move is None:
            self._refusal = _messages()["unreadable"]
            self._finish = "format_error"
            return self._result()
        self._refusal = self._why_illegal(move)
        self._is_illegal = bool(self._refusal)
        if self._is_illegal:
            self._finish = "format_error" if self._options.parity else "failure"
            return self._result()
        self._enter(entered_cells(self._position, move))
        if self._num_rounds == task.num_rounds:
            self._finish = "success" if move == task.goal else "out_of_steps"
        return self._result()

    def _why_illegal(self, move: Cell) -> str:
        """Return what is wrong with a move, or nothing for a legal one."""
        size = len(self._costs)
        if not all(0 <= place < size for place in move):
            kind = "far_outside" if FAR in map(abs, move) else "outside"
        elif move == self._position:
            kind = "stays"
        elif move[0] != self._position[0] and move[1] != self._position[1]:
            kind = "crooked"
        else:
            return ""
        row, col = self._position
        return _messages()[kind].format(to_row=move[0], to_col=move[1], row=row, col=col, last=size - 1)

    def _enter(self, cells: tuple[Cell, ...]) -> None:
        self._last_move = cells
        self._position = cells[-1]
        self._num_entered += len(cells)
        radius = self._options.reveal_radius
        for row, col in cells:
            self._cost_sum += int(self._costs[row, col])
            self._revealed[
                max(0, row - radius) : row + radius + 1, max(0, col - radius) : col + radius + 1
            ] = True

    def _result(self) -> StepResult:
        if self._finish is None:
            return StepResult(observation=self._observation(), is_done=False)
        is_success = self._finish == "success"
        metrics = {
            "num_entered_cells": float(self._num_entered),
            "is_illegal_move": float(self._is_illegal),
            "revealed_frac": float(self._revealed.mean()),
        }
        if self._num_entered:
            metrics["normalized_loss"] = self._cost_sum / (100 * self._num_entered)
        return StepResult(
            observation=self.feedback(),
            is_done=True,
            raw_reward=reward_of(self._cost_sum, self._num_entered) if is_success else 0.0,
            finish=self._finish,
            metrics=metrics,
        )

    def _loss_text(self) -> str:
        return f"{self._cost_sum / (100 * self._num_entered):.4f}" if self._num_entered else "none yet"

    def _map_text(self) -> str:
        return _messages()["map"].format(map=draw_map(self.known_costs()))

    def _observation(self) -> str:
        """Say the round, what the last move did, position and target, the map, and what is asked."""
        task, text = self._running(), _messages()
        (row, col), (goal_row, goal_col) = self._position, task.goal
        parts = [text["round"].format(round=self._num_rounds + 1, rounds=task.num_rounds)]
        if self._last_move:
            cells = ", ".join(f"({r}, {c})" for r, c in self._last_move)
            parts.append(
                text["moved"].format(
                    row=row, col=col, num_cells=len(self._last_move), cells=cells, loss=self._loss_text()
                )
            )
        parts.append(text["position"].format(row=row, col=col, goal_row=goal_row, goal_col=goal_col))
        parts.append(self._map_text())
        parts.append(text["ask"].format(row=row, col=col, rounds_left=self.rounds_left))
        return "\n".join(parts)

    def feedback(self) -> str:
        """Return how the task ended, what was reached, and the map as far as it is known."""
        task, text = self._running(), _messages()
        (row, col), (goal_row, goal_col) = self._position, task.goal
        if self._finish == "success":
            reward = f"{reward_of(self._cost_sum, self._num_entered):.4f}"
            loss = self._loss_text()
            verdict = text["solved"].format(goal_row=goal_row, goal_col=goal_col, loss=loss, reward=reward)
        elif self._finish == "out_of_steps":
            verdict = text["missed"].format(row=row, col=col, goal_row=goal_row, goal_col=goal_col)
        else:
            verdict = self._refusal or text["cut_off"]
        ending = text["ending"].format(
            num_rounds=self._num_rounds,
            rounds=task.num_rounds,
            row=row,
            col=col,
            goal_row=goal_row,
            goal_col=goal_col,
            num_entered=self._num_entered,
            loss=self._loss_text(),
        )
        return "\n".join([verdict, ending, self._map_text()])

    def snapshot(self) -> bytes:
        """Return the pack seed and the revealed mask, at most 138 bytes (see ``formats``)."""
        return encode_state(self._pack_seed, self._revealed)

    def restore(self, state: bytes) -> None:
        """Take back what :meth:`snapshot` returned.

        Raises:
            EnvironmentInputError: an unknown version, or bytes that no map has.
        """
        self._pack_seed, revealed = decode_state(state)
        if revealed is not None:
            self._revealed = revealed

    def hidden(self) -> dict[str, Any]:
        """Return ``{"size": side in cells, "cost_map": rows of costs}``."""
        return {"size": len(self._costs), "cost_map": self._costs.tolist()}

    def task_view(self) -> dict[str, Any]:
        """Return ``{"start": [row, column], "goal": [row, column], "rounds": moves to make}``."""
        task = self._running()
        return {"start": list(task.start), "goal": list(task.goal), "rounds": task.num_rounds}


def _check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that is not exactly a seed."""
    problems = []
    unknown = sorted(set(record) - {"seed"})
    if unknown:
        problems.append(f"unknown field {', '.join(unknown)}; the only field is seed")
    seed = record.get("seed")
    if not is_int(seed) or not 0 <= seed < 1 << 64:
        problems.append(f"seed is {seed!r}; it must be an integer from 0 to 2^64-1")
    if problems:
        raise EnvironmentInputError(
            [f"environment grid_navigation: record: {problem}" for problem in problems]
        )
