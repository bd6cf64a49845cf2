"""Scripted policies: the floor and the ceilings of a learning curve.

``random`` answers uniformly. ``oracle`` is told the hidden mapping and walks a shortest path: what a policy
with a perfect hint reaches. ``explorer`` is told nothing: it plans exactly over the 24 mappings (a
Bayes-optimal policy within each task) and carries what it has learned, so its curve is what a perfect learner
reaches at each position: the planning value without a hint at position 0, close to the oracle once the
mapping is known.

The planner maximises the expected penalised reward. Its state is (cell, mappings still possible, steps
taken); the mappings are a 24-bit mask with a uniform posterior, because every observation either excludes a
mapping or does not. Values depend on the mask only up to a renaming of the codes, which shrinks the state
space by up to 24.
"""

from __future__ import annotations

import functools
import itertools
import random
from typing import Any

from cod_async.envs.base import Environment, Policy, TaskSpec
from cod_async.envs.frozen_lake_obscure.env import FrozenLakeObscure
from cod_async.envs.frozen_lake_obscure.mapgen import MAPPINGS, MOVES, Cell, LakeMap, distances_to_goal
from cod_async.lifecycle.hint import prompts_for

SOLVE_PENALTY = 0.1
"""Share of the reward that a success loses when it takes all steps (the paper's value)."""

ALL_MAPPINGS = (1 << len(MAPPINGS)) - 1
"""Mask of all 24 mappings; bit k is ``MAPPINGS[k]``."""

_CODES = range(4)
_MASK_OF = {
    (code, move): sum(1 << k for k, mapping in enumerate(MAPPINGS) if mapping[code] == move)
    for code in _CODES
    for move in MOVES
}
_BIT_OF = {mapping: k for k, mapping in enumerate(MAPPINGS)}
_RENAMINGS = tuple(
    tuple(_BIT_OF[tuple(mapping[code] for code in order)] for mapping in MAPPINGS)
    for order in itertools.permutations(_CODES)
)


def answer(code: int) -> str:
    """Return the response that takes action ``code`` (1..4)."""
    return f"<answer>Direction {code}</answer>"


def random_policy(seed: int) -> Policy:
    """Return the policy that picks one of the four codes uniformly."""
    generator = random.Random(seed)

    def act(environment: Environment, observation: str, memory: Any) -> str:
        return answer(generator.randint(1, 4))

    return act


def oracle_policy(seed: int) -> Policy:
    """Return the policy that knows the mapping and walks a shortest path; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: Any) -> str:
        lake, player = _view(environment)
        mapping = environment.hidden()["mapping"]
        distances = distances_to_goal(lake)
        far = len(distances) + 1
        code = min(_CODES, key=lambda c: distances.get(lake.destination(player, mapping[c]), far))
        return answer(code + 1)

    return act


def truth_hint(environment: Environment, task: TaskSpec) -> str:
    """Return the hint of a perfect updater: what each action does. Resets the environment."""
    environment.reset(task)
    lines = [
        f"- Direction {i + 1} moves P {move.lower()}."
        for i, move in enumerate(environment.hidden()["mapping"])
    ]
    return prompts_for(environment.prompt_style).carried("\n".join(lines))


def _view(environment: Environment) -> tuple[LakeMap, Cell]:
    if not isinstance(environment, FrozenLakeObscure):
        raise TypeError(f"this policy plays frozen_lake_obscure, not {type(environment).__name__}")
    return environment.lake, environment.player


@functools.lru_cache(maxsize=1 << 16)
def canonical(mask: int) -> int:
    """Return the smallest mask that a renaming of the codes can turn ``mask`` into."""
    bits = [k for k in range(len(MAPPINGS)) if mask >> k & 1]
    return min(sum(1 << renaming[k] for k in bits) for renaming in _RENAMINGS)


def consistent(lake: LakeMap, mask: int, cell: Cell, code: int, after: Cell) -> int:
    """Return the mappings of ``mask`` under which ``code`` (0..3) leads from ``cell`` to ``after``."""
    moves = (move for move in MOVES if lake.destination(cell, move) == after)
    return mask & functools.reduce(int.__or__, (_MASK_OF[code, move] for move in moves), 0)


class Planner:
    """Exact planning on one map (finite horizon, uniform prior over a mask of mappings).

    Args:
        lake: the map.
        max_steps: step budget of the task.
        solve_penalty: a success after t of T steps is worth 1 - solve_penalty * t / T.
    """

    def __init__(self, lake: LakeMap, max_steps: int, solve_penalty: float = SOLVE_PENALTY) -> None:
        self._lake = lake
        self._max_steps = max_steps
        self._solve_penalty = solve_penalty
        self._distances = distances_to_goal(lake)
        self._values: dict[tuple[Cell, int, int], float] = {}

    def _reward(self, num_steps: int) -> float:
        return 1.0 - self._solve_penalty * num_steps / self._max_steps

    def value(self, cell: Cell, mask: int, num_steps: int) -> float:
        """Return the best expected penalised reward from here, 0..1."""
        distance = self._distances.get(cell)
        if distance is None or num_steps + distance > self._max_steps:
            return 0.0
        bound = self._reward(num_steps + distance)
        if mask & (mask - 1) == 0:  # one mapping left: walk the shortest path
            return bound
        mask = canonical(mask)
        key = (cell, mask, num_steps)
        known = self._values.get(key)
        if known is None:
            known = 0.0
            for code in _CODES:
                known = max(known, self.action_value(cell, mask, num_steps, code))
                if known >= bound:
                    break
            self._values[key] = known
        return known

    def action_value(self, cell: Cell, mask: int, num_steps: int, code: int) -> float:
        """Return the expected penalised reward of ``code`` (0..3) now and planning on."""
        total = 0.0
        destinations = {self._lake.destination(cell, move) for move in MOVES}
        for after in sorted(destinations):
            possible = consistent(self._lake, mask, cell, code, after)
            if not possible or self._lake.at(after) == "H":
                continue
            if after == self._lake.goal:
                value = self._reward(num_steps + 1)
            else:
                value = self.value(after, possible, num_steps + 1)
            total += possible.bit_count() * value
        return total / mask.bit_count()

    def best_code(self, cell: Cell, mask: int, num_steps: int) -> int:
        """Return the best code (0..3); the lowest of equals."""
        return max(_CODES, key=lambda code: self.action_value(cell, mask, num_steps, code))


def explorer_policy(seed: int) -> Policy:
    """Return the policy that learns the mapping as it goes and carries it; the seed has no effect.

    Its memory holds ``mask``. The caller may add ``feedback`` after an episode (the updater's sentence); it
    tells a hole from the goal, which the last observation before the end does not.
    """

    def act(environment: Environment, observation: str, memory: dict[str, Any]) -> str:
        lake, player = _view(environment)
        assert isinstance(environment, FrozenLakeObscure)  # noqa: S101 - checked by _view
        if environment.num_steps == 0:
            _learn_from_end(memory)
            memory["planner"] = Planner(lake, environment.max_steps)
        elif "last" in memory:
            old_lake, cell, code = memory["last"]
            _learn(memory, consistent(old_lake, ALL_MAPPINGS, cell, code, player))
        mask = memory.setdefault("mask", ALL_MAPPINGS)
        code = memory["planner"].best_code(player, mask, environment.num_steps)
        memory["last"] = (lake, player, code)
        return answer(code + 1)

    return act


def _learn_from_end(memory: dict[str, Any]) -> None:
    """Use what the previous task's end says about its last action: it led to a hole, the goal, or neither."""
    if "last" not in memory:
        return
    lake, cell, code = memory.pop("last")
    feedback = str(memory.pop("feedback", ""))
    endings = {"reached the goal": "G", "fell into a hole": "H", "within the limit": "FS"}
    letters = next((letters for phrase, letters in endings.items() if phrase in feedback), "FGHS")
    possible = 0
    for move in MOVES:
        after = lake.destination(cell, move)
        if lake.at(after) in letters:
            possible |= _MASK_OF[code, move]
    _learn(memory, possible)


def _learn(memory: dict[str, Any], possible: int) -> None:
    """Keep the possible mappings; if none is left the mapping has changed: start from the newest fact."""
    memory["mask"] = (memory["mask"] & possible) or possible
