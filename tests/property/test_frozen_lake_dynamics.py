"""FrozenLake-Obscure against a second, independent simulator that shares no code with it.

The simulator below is written from the rules alone, on a flat list of cells with a border, and also replays
the reference's map drawing and depth-first test with its own recursion. Random maps, mappings and action
strings must give equal positions, endings and rewards.
"""

from __future__ import annotations

import asyncio
import itertools
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.base import TaskSpec
from cod_async.envs.frozen_lake_obscure import SPEC
from cod_async.envs.frozen_lake_obscure.env import FrozenLakeObscure
from cod_async.envs.frozen_lake_obscure.mapgen import LakeMap, is_accepted, make_map
from cod_async.envs.frozen_lake_obscure.oracle import ALL_MAPPINGS, Planner, canonical

RECORDS = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 100_000),
        "size": st.integers(2, 7),
        "p": st.floats(0.3, 1.0, allow_nan=False),
    }
)


def task(record: dict[str, Any], pack_seed: int) -> TaskSpec:
    return TaskSpec(
        environment="frozen_lake_obscure",
        preset="easy",
        options={},
        record=record,
        pack_seed=pack_seed,
        position=0,
        pack_size=1,
    )


def simulate(
    rows: list[str], mapping: list[str], codes: list[int], budget: int
) -> list[tuple[int, str | None]]:
    """Play on a flat board with a border; return (flat position, ending or None) after each action."""
    width = len(rows) + 2
    board = ["#"] * width + [c for row in rows for c in f"#{row}#"] + ["#"] * width
    offset = {"Up": -width, "Down": width, "Left": -1, "Right": 1}
    here = board.index("S")
    history: list[tuple[int, str | None]] = []
    for count, code in enumerate(codes, start=1):
        there = here + offset[mapping[code - 1]]
        here = here if board[there] == "#" else there
        ending = {"G": "success", "H": "failure"}.get(board[here])
        if ending is None and count == budget:
            ending = "out_of_steps"
        history.append((here, ending))
        if ending:
            break
    return history


@settings(max_examples=150, deadline=None)
@given(
    record=RECORDS,
    pack_seed=st.integers(0, (1 << 64) - 1),
    codes=st.lists(st.integers(1, 4), min_size=10, max_size=10),
    preset=st.sampled_from(["easy", "hard"]),
)
def test_dynamics(record: dict[str, Any], pack_seed: int, codes: list[int], preset: str) -> None:
    environment = FrozenLakeObscure(SPEC.options(preset))
    environment.reset(task(record, pack_seed))
    rows, mapping = environment.task_view()["map"], environment.hidden()["mapping"]
    assert sorted(mapping) == ["Down", "Left", "Right", "Up"]
    width = len(rows) + 2
    expected = simulate(rows, mapping, codes, {"easy": 8, "hard": 10}[preset])

    async def play() -> None:
        for code, (flat, ending) in zip(codes, expected, strict=False):
            result = await environment.step(f"<answer>Direction {code}</answer>")
            assert (environment.player[0] + 1) * width + environment.player[1] + 1 == flat
            assert result.is_done == (ending is not None)
            if ending:
                assert result.finish == ending and result.raw_reward == (ending == "success")
            row, col = environment.player
            cells = result.observation.split("The lake now:\n")[1].splitlines()[row].split("\t")
            assert cells[col] == " P "

    asyncio.run(play())


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), wrap=st.booleans())
def test_no_text_raises(text: str, wrap: bool) -> None:
    environment = FrozenLakeObscure(SPEC.options("easy"))
    environment.reset(task({"seed": 0, "size": 4, "p": 0.65}, 0))
    result = asyncio.run(environment.step(f"<answer>{text}</answer>" if wrap else text))
    assert result.finish in ("failure", "success", "format_error") or not result.is_done
    assert environment.feedback()


def accepted_by_recursion(rows: list[str], cap: int) -> bool:
    """The depth-first test again: recursion in pop order instead of a stack (the reverse of the push order).

    A stack pops the last pushed neighbour first and only then the older ones, which is what a recursion over
    left, up, right, down does; the goal test comes first, for all four neighbours of a cell, as in the
    reference.
    """
    size = len(rows)
    cells = {(r, c): rows[r][c] for r in range(size) for c in range(size)}
    visited: set[tuple[int, int]] = set()

    def visit(r: int, c: int, length: int) -> bool:
        if length > cap or (r, c) in visited:
            return False
        visited.add((r, c))
        ways = [(r, c - 1), (r - 1, c), (r, c + 1), (r + 1, c)]
        if any(cells.get(way) == "G" for way in ways):
            return True
        return any(cells.get(way, "H") != "H" and visit(*way, length + 1) for way in ways)

    start = next(cell for cell, letter in cells.items() if letter == "S")
    return visit(*start, 0)


@settings(max_examples=400, deadline=None)
@given(
    size=st.integers(2, 6),
    cap=st.integers(1, 12),
    draws=st.lists(st.booleans(), min_size=36, max_size=36),
    ends=st.tuples(st.integers(0, 35), st.integers(0, 35)),
)
def test_reachability(size: int, cap: int, draws: list[bool], ends: tuple[int, int]) -> None:
    cells = ["F" if draw else "H" for draw in draws[: size * size]]
    start, goal = (end % (size * size) for end in ends)
    if start == goal:
        goal = (goal + 1) % (size * size)
    cells[start], cells[goal] = "S", "G"
    rows = ["".join(cells[row * size : (row + 1) * size]) for row in range(size)]
    lake = LakeMap(rows=tuple(rows), start=divmod(start, size), goal=divmod(goal, size))
    assert is_accepted(lake, cap) == accepted_by_recursion(rows, cap)


@settings(max_examples=60, deadline=None)
@given(record=RECORDS, cap=st.integers(1, 10))
def test_map_drawing(record: dict[str, Any], cap: int) -> None:
    """Replay the draws with plain uniforms: a cell is F where u < p; then four integers for the ends."""
    size = record["size"]
    generator = np.random.default_rng(record["seed"])
    while True:
        uniforms = generator.random((size, size))
        grid = [["F" if u < record["p"] else "H" for u in line] for line in uniforms]
        while True:
            a, b, c, d = (int(generator.integers(size)) for _ in range(4))
            if (a, b) != (c, d):
                break
        grid[a][b], grid[c][d] = "S", "G"
        rows = ["".join(line) for line in grid]
        if accepted_by_recursion(rows, cap):
            break
    made = make_map(record["seed"], size, record["p"], cap)
    assert list(made.rows) == rows and made.start == (a, b) and made.goal == (c, d)


def brute_force_value(
    rows: list[str], here: int, worlds: list[tuple[int, ...]], steps: int, budget: int
) -> float:
    """Best expected penalised reward by plain recursion over sets of mappings, without memory or symmetry.

    ``rows`` is a flat board with a border; a world maps each code to a flat offset.
    """
    best = 0.0
    for code in range(4):
        total = 0.0
        outcomes: dict[int, list[tuple[int, ...]]] = {}
        for world in worlds:
            there = here + world[code]
            outcomes.setdefault(here if rows[there] == "#" else there, []).append(world)
        for there, possible in outcomes.items():
            if rows[there] == "G":
                total += len(possible) * (1 - 0.1 * (steps + 1) / budget)
            elif rows[there] != "H" and steps + 1 < budget:
                total += len(possible) * brute_force_value(rows, there, possible, steps + 1, budget)
        best = max(best, total / len(worlds))
    return best


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), size=st.integers(2, 3), budget=st.integers(1, 4))
def test_planner_is_exact(seed: int, size: int, budget: int) -> None:
    lake = make_map(seed, size, 0.7, 6)
    width = size + 2
    board = ["#"] * width + [c for row in lake.rows for c in f"#{row}#"] + ["#"] * width
    worlds = list(itertools.permutations((width, 1, -width, -1)))
    expected = brute_force_value(board, board.index("S"), worlds, 0, budget)
    planner = Planner(lake, budget)
    assert abs(planner.value(lake.start, ALL_MAPPINGS, 0) - expected) < 1e-12
    code = planner.best_code(lake.start, ALL_MAPPINGS, 0)
    assert abs(planner.action_value(lake.start, ALL_MAPPINGS, 0, code) - expected) < 1e-12


@given(mask=st.integers(1, ALL_MAPPINGS))
def test_canonical_masks(mask: int) -> None:
    smallest = canonical(mask)
    assert smallest <= mask and canonical(smallest) == smallest
    assert smallest.bit_count() == mask.bit_count()
