"""The game: a frozen lake whose four action codes move in directions that nobody tells the policy.

The grid is drawn and fully visible, the rules are deterministic, and the only hidden thing is which move each
code makes. The mapping is shared by all tasks of a pack, so what is learned about it in one task is worth
carrying to the next one, while the maps change and are worth nothing.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from cod_async.envs.base import Environment, StepResult, TaskSpec
from cod_async.envs.checks import is_int, is_number
from cod_async.envs.frozen_lake_obscure.mapgen import (
    MAPPINGS,
    Cell,
    LakeMap,
    distances_to_goal,
    make_map,
    mapping_for_seed,
)
from cod_async.envs.frozen_lake_obscure.options import (
    MAX_SIZE,
    NUM_MAPPINGS,
    FrozenLakeOptions,
    parse_options,
)
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.parsing import extract_between
from cod_async.lifecycle.segment import Finish
from cod_async.lifecycle.texts import prompt_messages, prompt_text

_PROMPTS = Path(__file__).parent / "prompts"
_ACTION = re.compile(r"[Dd]irection\s+0*([1-4])(?![0-9])", re.ASCII)
_system_template = functools.partial(prompt_text, _PROMPTS, "system.txt")
_messages = functools.partial(prompt_messages, _PROMPTS)


def parse_action(response: str) -> int | None:
    """Read the action code (1..4) of a response, or None if it has no valid one.

    The content of the only answer-tag pair must start with ``Direction`` or ``direction``, white space and a
    number from 1 to 4; what follows the number is ignored.
    """
    content = extract_between(response, "<answer>", "</answer>")
    match = None if content is None else _ACTION.match(content.strip())
    return int(match.group(1)) if match else None


def draw_map(lake: LakeMap, player: Cell) -> str:
    """Draw a map as the policy sees it: one line per row; a cell is a space, its symbol, a space, a tab."""
    symbols = {"S": "_", "F": "_", "H": "O", "G": "G"}
    lines = []
    for row, letters in enumerate(lake.rows):
        cells = ["P" if (row, col) == player else symbols[letter] for col, letter in enumerate(letters)]
        lines.append("".join(f" {cell} \t" for cell in cells))
    return "\n".join(lines)


class FrozenLakeObscure(Environment):
    """FrozenLake with hidden action codes.

    Args:
        options: a preset merged with overrides, see :class:`~.options.FrozenLakeOptions`.

    Raises:
        EnvironmentInputError: unknown, mistyped or contradictory options.
    """

    name: ClassVar[str] = "frozen_lake_obscure"

    def __init__(self, options: Mapping[str, Any]) -> None:
        self._options: FrozenLakeOptions = parse_options(options)
        self._lake = LakeMap(rows=(), start=(0, 0), goal=(0, 0))
        self._mapping: tuple[str, ...] = ()
        self._player: Cell = (0, 0)
        self._num_steps = 0
        self._num_stays = 0
        self._shortest_path_steps = 0
        self._last_move: tuple[int, Cell, Cell] | None = None
        self._finish: Finish | None = None

    @property
    def max_steps(self) -> int:
        """Most policy responses in one task (``agent_max_steps``)."""
        return self._options.agent_max_steps

    @property
    def lake(self) -> LakeMap:
        """The map of the current task, which the policy sees in full."""
        return self._lake

    @property
    def player(self) -> Cell:
        """Where the player is, as (row, column)."""
        return self._player

    @property
    def num_steps(self) -> int:
        """Responses taken in the current task."""
        return self._num_steps

    def reset(self, task: TaskSpec) -> str:
        """Build the task's map and mapping and return the first observation.

        Raises:
            EnvironmentInputError: the record lacks a field, has one too many, or a value is out of range.
        """
        record = task.record
        _check_record(record)
        self._lake = make_map(record["seed"], record["size"], float(record["p"]), self._options.env_max_steps)
        self._mapping = self._mapping_of(task)
        self._player = self._lake.start
        self._num_steps = 0
        self._num_stays = 0
        self._shortest_path_steps = distances_to_goal(self._lake)[self._lake.start]
        self._last_move = None
        self._finish = None
        return self._observation()

    def _mapping_of(self, task: TaskSpec) -> tuple[str, ...]:
        if self._options.mapping_mode == "global":
            return MAPPINGS[self._options.mapping_index]
        if self._options.mapping_mode == "per_task":
            index = task.record.get("mapping_index")
            return mapping_for_seed(task.record["seed"]) if index is None else MAPPINGS[index]
        return mapping_for_seed(task.pack_seed)

    def system_prompt(self) -> str:
        """Return the rules; equal for every task of a preset."""
        return _system_template().format(max_steps=self.max_steps)

    async def step(self, response: str) -> StepResult:
        """Move the player by one response.

        Raises:
            RuntimeError: the task is over or was never started (a caller's mistake).
        """
        if not self._mapping or self._finish is not None:
            raise RuntimeError("frozen_lake_obscure: step() without a running task; call reset() first")
        self._num_steps += 1
        code = parse_action(response)
        if code is None:
            self._finish = "format_error"
            return self._result(_messages()["invalid"])
        before = self._player
        self._player = self._lake.destination(before, self._mapping[code - 1])
        self._last_move = (code, before, self._player)
        self._num_stays += self._player == before
        letter = self._lake.at(self._player)
        if letter == "G":
            self._finish = "success"
        elif letter == "H":
            self._finish = "failure"
        elif self._num_steps >= self.max_steps:
            self._finish = "out_of_steps"
        return self._result(self._observation())

    def _result(self, observation: str) -> StepResult:
        if self._finish is None:
            return StepResult(observation=observation, is_done=False)
        return StepResult(
            observation=observation,
            is_done=True,
            raw_reward=1.0 if self._finish == "success" else 0.0,
            finish=self._finish,
            metrics={
                "shortest_path_steps": float(self._shortest_path_steps),
                "num_stays": float(self._num_stays),
            },
        )

    def _last_move_fields(self) -> dict[str, int]:
        assert self._last_move is not None  # noqa: S101 - callers check; narrows the type
        code, before, after = self._last_move
        return {
            "code": code,
            "from_row": before[0],
            "from_col": before[1],
            "to_row": after[0],
            "to_col": after[1],
        }

    def _observation(self) -> str:
        """Say the step counter, what the last action did, the map, and what is asked for."""
        text = _messages()
        parts = []
        if self._finish is None:
            parts.append(text["counter"].format(step=self._num_steps + 1, max_steps=self.max_steps))
        if self._last_move is not None:
            has_moved = self._last_move[1] != self._last_move[2]
            parts.append(text["moved" if has_moved else "stayed"].format(**self._last_move_fields()))
        parts.append(text["map"].format(map=draw_map(self._lake, self._player)))
        if self._finish == "success":
            parts.append(text["solved"])
        elif self._finish == "failure":
            parts.append(text["fell"])
        elif self._finish is None:
            parts.append(text["ask"].format(goal_row=self._lake.goal[0], goal_col=self._lake.goal[1]))
        return "\n".join(parts)

    def feedback(self) -> str:
        """Return what the updater is told: success, hole, invalid answer, out of steps, or cut off."""
        text = _messages()
        if self._finish == "success":
            sentence = text["feedback_success"]
        elif self._finish == "failure":
            sentence = text["feedback_hole"]
        elif self._finish == "format_error":
            sentence = text["invalid"]
        elif self._finish == "out_of_steps":
            sentence = text["feedback_out_of_steps"].format(step=self._num_steps, max_steps=self.max_steps)
        else:
            sentence = text["feedback_cut_off"]
        if self._options.is_last_move_told and self._last_move is not None:
            sentence += " " + text["feedback_last_move"].format(**self._last_move_fields())
        return sentence

    def hidden(self) -> dict[str, Any]:
        """Return ``{"mapping": [move of code 1 .. 4]}``."""
        return {"mapping": list(self._mapping)}

    def task_view(self) -> dict[str, Any]:
        """Return ``{"map": rows of S, F, H, G, "start": [row, column], "goal": [row, column]}``."""
        return {
            "map": list(self._lake.rows),
            "start": list(self._lake.start),
            "goal": list(self._lake.goal),
        }


def _check_record(record: Mapping[str, Any]) -> None:
    """Refuse a record that is not exactly (seed, size, p) and, optionally, mapping_index."""
    problems = []
    unknown = sorted(set(record) - {"seed", "size", "p", "mapping_index"})
    if unknown:
        problems.append(
            f"unknown field {', '.join(unknown)}; fields are seed, size, p and, optionally, mapping_index"
        )
    seed, size, p, index = (record.get(key) for key in ("seed", "size", "p", "mapping_index"))
    if not is_int(seed) or not 0 <= seed < 1 << 64:
        problems.append(f"seed is {seed!r}; it must be an integer from 0 to 2^64-1")
    if not is_int(size) or not 2 <= size <= MAX_SIZE:
        problems.append(f"size is {size!r}; it must be an integer from 2 to {MAX_SIZE}")
    if not is_number(p, 0, 1):
        problems.append(f"p is {p!r}; it must be a number from 0 to 1")
    if index is not None and (not is_int(index) or not 0 <= index < NUM_MAPPINGS):
        problems.append(f"mapping_index is {index!r}; it must be an integer from 0 to {NUM_MAPPINGS - 1}")
    if problems:
        raise EnvironmentInputError(
            [f"environment frozen_lake_obscure: record: {problem}" for problem in problems]
        )
