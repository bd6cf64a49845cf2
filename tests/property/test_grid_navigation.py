"""Grid Navigation against second, independent programs that share no code with it.

The simulator below walks cell by cell on dictionaries and exact fractions; the optimum comes from trying all
walks. Random maps, tasks and moves must give equal positions, masks, endings and rewards.
"""

from __future__ import annotations

import asyncio
from fractions import Fraction
from typing import Any

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.base import TaskSpec
from cod_async.envs.grid_navigation import SPEC
from cod_async.envs.grid_navigation.env import GridNavigation
from cod_async.envs.grid_navigation.planner import RookPlanner

Cell = tuple[int, int]


def task(seed: int, pack_seed: int) -> TaskSpec:
    return TaskSpec("grid_navigation", "eval", {}, {"seed": seed}, pack_seed, 0, 4)


def simulate(
    costs: dict[Cell, int], start: Cell, goal: Cell, rounds: int, moves: list[Cell], radius: int
) -> tuple[list[Cell], set[Cell], str | None, Fraction]:
    """Play; return the positions after each move, what is revealed, the ending and the exact reward."""
    here, positions, entered = start, [], []
    ending = None
    for count, (row, col) in enumerate(moves, start=1):
        is_line = (row == here[0]) != (col == here[1])
        if (row, col) not in costs or not is_line:
            ending = "failure"
            break
        while here != (row, col):
            here = (
                here[0] + (row > here[0]) - (row < here[0]),
                here[1] + (col > here[1]) - (col < here[1]),
            )
            entered.append(here)
        positions.append(here)
        if count == rounds:
            ending = "success" if here == goal else "out_of_steps"
            break
    revealed = {
        cell for cell in costs if any(max(abs(cell[0] - r), abs(cell[1] - c)) <= radius for r, c in entered)
    }
    reward = Fraction(0)
    if ending == "success":
        reward = 1 - Fraction(sum(costs[cell] for cell in entered), 100 * len(entered))
    return positions, revealed, ending, reward


@settings(max_examples=120, deadline=None)
@given(
    pack_seed=st.integers(0, (1 << 64) - 1),
    seed=st.integers(0, 10_000_000),
    size=st.integers(2, 6),
    radius=st.integers(0, 3),
    data=st.data(),
)
def test_dynamics(pack_seed: int, seed: int, size: int, radius: int, data: Any) -> None:
    options = {"size_min": size, "size_max": size, "rounds_min": 1, "reveal_radius": radius}
    environment = GridNavigation(SPEC.options("eval", options))
    environment.reset(task(seed, pack_seed))
    view, rows = environment.task_view(), environment.hidden()["cost_map"]
    costs = {(r, c): rows[r][c] for r in range(size) for c in range(size)}
    rounds = view["rounds"]
    place = st.integers(-1, size)
    moves: list[Cell] = []
    here = tuple(view["start"])
    for left in range(rounds, 0, -1):
        legal = [(here[0], c) for c in range(size) if c != here[1]]
        legal += [(r, here[1]) for r in range(size) if r != here[0]]
        homing = [m for m in legal if left > 1 or m == tuple(view["goal"])]
        move = data.draw(st.sampled_from(homing or legal) | st.tuples(place, place))
        moves.append(move)
        here = move
    expected = simulate(costs, tuple(view["start"]), tuple(view["goal"]), rounds, moves, radius)
    positions, revealed, ending, reward = expected

    async def play() -> None:
        masks = [environment.known_costs() >= 0]
        for number, (row, col) in enumerate(moves):
            result = await environment.step(f"<answer>{row},{col}</answer>")
            masks.append(environment.known_costs() >= 0)
            assert (masks[-1] >= masks[-2]).all()  # monotone
            if number < len(positions):
                assert environment.position == positions[number]
            if result.is_done:
                break
        assert result.is_done and result.finish == ending
        assert result.raw_reward == float(reward) and (ending != "success" or result.raw_reward >= 0.01)
        assert {(int(r), int(c)) for r, c in np.argwhere(masks[-1])} == revealed
        state = environment.snapshot()
        other = GridNavigation(SPEC.options("eval", options))
        other.restore(state)
        other.reset(task(seed, pack_seed))
        assert (other.known_costs() == environment.known_costs()).all() and other.snapshot() == state

    asyncio.run(play())


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=60), wrap=st.booleans())
def test_no_text_raises(text: str, wrap: bool) -> None:
    environment = GridNavigation(SPEC.options("eval"))
    environment.reset(task(0, 0))
    result = asyncio.run(environment.step(f"<answer>{text}</answer>" if wrap else text))
    assert result.finish in ("failure", "format_error") or not result.is_done
    assert environment.feedback()


def best_by_trying(
    costs: list[list[int]], here: Cell, goal: Cell, rounds: int, total: int, count: int
) -> Fraction | None:
    """Return the least mean cost over all walks, by plain recursion; None if there is no walk."""
    if rounds == 0:
        return Fraction(total, count) if here == goal else None
    best = None
    for row_step, col_step in ((0, 1), (0, -1), (1, 0), (-1, 0)):
        row, col = here[0] + row_step, here[1] + col_step
        more, cells = total, count
        while 0 <= row < len(costs) and 0 <= col < len(costs):
            more, cells = more + costs[row][col], cells + 1
            found = best_by_trying(costs, (row, col), goal, rounds - 1, more, cells)
            if found is not None and (best is None or found < best):
                best = found
            row, col = row + row_step, col + col_step
    return best


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(2, 5),
    rounds=st.integers(1, 4),
    seed=st.integers(0, 1 << 32),
    ends=st.tuples(*[st.integers(0, 24)] * 2),
    entered=st.tuples(st.integers(0, 300), st.integers(0, 12)),
    kind=st.sampled_from(["any", "few values"]),
)
def test_planner_is_exact(
    size: int, rounds: int, seed: int, ends: Cell, entered: tuple[int, int], kind: str
) -> None:
    """Also from the middle of an episode; maps with few values have many ties."""
    rounds = min(rounds, 3) if size == 5 else rounds
    generator = np.random.default_rng(seed)
    values = np.array([0, 1, 99]) if kind == "few values" else np.arange(100)
    costs = generator.choice(values, size=(size, size))
    start, goal = (divmod(end % size**2, size) for end in ends)
    cost_sum, num_entered = min(entered[0], 99 * entered[1]), entered[1]
    plan = RookPlanner(costs).plan(start, goal, rounds, cost_sum, num_entered)
    best = best_by_trying(costs.tolist(), start, goal, rounds, cost_sum, num_entered)
    if best is None:
        assert plan is None
        return
    assert plan is not None and Fraction(plan.cost_sum, plan.num_entered) == best
    assert len(plan.moves) == rounds and plan.moves[-1] == goal
    # Its own walk has the sum and the count that it claims.
    known = {(r, c): int(costs[r, c]) for r in range(size) for c in range(size)}
    positions, _, ending, reward = simulate(known, start, goal, rounds, list(plan.moves), 0)
    assert ending == "success" and positions == list(plan.moves)
    if not num_entered:
        assert reward == 1 - best / 100


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 1 << 32), rounds=st.integers(2, 6), size=st.integers(6, 14))
def test_no_walk_beats_the_plan(seed: int, rounds: int, size: int) -> None:
    """On full-sized maps, where trying all is too much: against 200 random feasible walks."""
    generator = np.random.default_rng(seed)
    costs = generator.integers(0, 100, (size, size))
    known = {(r, c): int(costs[r, c]) for r in range(size) for c in range(size)}
    start, goal = ((int(r), int(c)) for r, c in generator.integers(0, size, (2, 2)))
    plan = RookPlanner(costs).plan(start, goal, rounds)
    assert plan is not None
    for _ in range(200):
        here, moves = start, []
        for left in range(rounds, 0, -1):
            if left > 2:
                line = [(here[0], int(generator.integers(size))), (int(generator.integers(size)), here[1])]
                here = line[int(generator.integers(2))]
            elif left == 2:
                here = (here[0], goal[1])
            else:
                here = goal
            moves.append(here)
        _, _, ending, reward = simulate(known, start, goal, rounds, moves, 0)
        if ending == "success":
            assert float(reward) <= plan.reward
