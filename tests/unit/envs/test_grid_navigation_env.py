"""Grid Navigation: the game as a policy meets it, word by word where the wording carries rules."""

from __future__ import annotations

import asyncio
import json
import re
from typing import Any

import numpy as np
import pytest

from cod_async.envs.base import StepResult, TaskSpec
from cod_async.envs.grid_navigation import SPEC
from cod_async.envs.grid_navigation.env import GridNavigation
from cod_async.envs.grid_navigation.formats import draw_map, parse_move
from cod_async.errors import EnvironmentInputError

# Pack seed 0 of `eval`: side 14; its first row is 0 0 0 0 1 2 7 16 29 39 42 36 26 16, its second
# 5 6 5 4 3 6 12 24 40 52 56 49 37 24. Record seed 0 on it: from (8, 7) to (6, 3) in 5 rounds.
PACK_SEED = 0


def task(record: dict[str, Any] | None = None, pack_seed: int = PACK_SEED, position: int = 0) -> TaskSpec:
    return TaskSpec(
        environment="grid_navigation",
        preset="eval",
        options={},
        record={"seed": 0} if record is None else record,
        pack_seed=pack_seed,
        position=position,
        pack_size=8,
    )


def started(**options: Any) -> GridNavigation:
    environment = GridNavigation(SPEC.options("eval", options))
    environment.reset(task())
    return environment


def step(environment: GridNavigation, response: str) -> StepResult:
    return asyncio.run(environment.step(response))


def walk(environment: GridNavigation, *cells: tuple[int, int]) -> StepResult:
    results = [step(environment, f"I go. <answer>{row},{col}</answer>") for row, col in cells]
    return results[-1]


@pytest.mark.parametrize(
    ("response", "move"),
    [
        ("<answer>8,3</answer>", (8, 3)),
        ("thinking …\n<answer>\n 08 ,\t+3\n</answer> and more", (8, 3)),
        ("<answer>-1,-0</answer>", (-1, 0)),
        ("<answer>" + "0" * 999 + "8,3</answer>", (8, 3)),
        ("<answer>(8,3)</answer>", None),
        ("<answer>[8,3]</answer>", None),
        ("<answer>8, 3.</answer>", None),
        ("<answer>8.0,3</answer>", None),
        ("<answer>1 0,3</answer>", None),
        ("<answer>+ 8,3</answer>", None),
        ("<answer>+-8,3</answer>", None),
        ("<answer>8 3</answer>", None),
        ("<answer>8,3,1</answer>", None),
        ("<answer>8,</answer>", None),
        ("<answer>1e1,3</answer>", None),
        ("<answer>1_0,3</answer>", None),
        ("<answer>0x8,3</answer>", None),
        ("<answer>go 8,3</answer>", None),
        ("<answer></answer>", None),
        ("8,3", None),
        ("</answer>8,3<answer>", None),
        ("<answer>8,3", None),
        ("<answer>8,3</answer> or <answer>8,4</answer>", None),
        ("I must write <answer> tags: <answer>8,3</answer>", None),
        ("<answer>٨,٣</answer>", None),  # digits of another script
        ("<answer>²,3</answer>", None),
        ("<answer>\uff18,3</answer>", None),  # full-width
        ("<answer>8\x00,3</answer>", None),
        ("\x00\ud800", None),
        ("", None),
    ],
)
def test_parse_move(response: str, move: tuple[int, int] | None) -> None:
    assert parse_move(response) == move
    result = step(started(), response)
    assert (result.is_done and result.finish == "format_error") == (move is None)


def test_huge_answers_are_read_in_no_time() -> None:
    """A pattern that tries again and again would need hours for these."""
    far = "<answer>" + "9" * 1_000_000 + ",-" + "9" * 5000 + "</answer>"
    assert parse_move(far) == (10**9, -(10**9))
    for content in (" " * 500_000 + "8" * 500_000 + "x", "0" * 1_000_000 + "x", "8," + " " * 1_000_000 + "x"):
        assert parse_move(f"<answer>{content}</answer>") is None
    assert parse_move("<answer>" + "[" * 1_000_000 + "</answer>") is None


def test_first_observation() -> None:
    environment = GridNavigation(SPEC.options("eval", {"size_min": 3, "size_max": 3}))
    assert environment.max_steps == 5  # before a task: the most of any
    observation = environment.reset(task({"seed": 4}))
    start, goal, rounds = (environment.task_view()[key] for key in ("start", "goal", "rounds"))
    assert observation == (
        f"Round 1 of {rounds}.\n"
        f"You are at ({start[0]}, {start[1]}). The target is ({goal[0]}, {goal[1]}).\n"
        "Costs known so far (? is unknown; column numbers above, row numbers on the left):\n"
        "       0  1  2\n"
        "  0    ?  ?  ?\n"
        "  1    ?  ?  ?\n"
        "  2    ?  ?  ?\n"
        f"Choose one cell to move to, other than your own, in row {start[0]} or column {start[1]}. "
        f"Rounds left, this one included: {rounds}."
    )
    assert environment.max_steps == rounds


def test_draw_map() -> None:
    assert draw_map(np.array([[0, 99], [-1, 7]])) == "       0  1\n  0    0 99\n  1    ?  7"
    lines = draw_map(np.full((12, 12), 5)).splitlines()
    assert lines[0].endswith("  9 10 11") and lines[11] == " 10  " + "  5" * 12
    assert len({len(line) for line in lines}) == 1


def test_a_move_is_reported_and_reveals_its_neighborhood() -> None:
    environment = started()
    result = walk(environment, (0, 7))
    assert result.observation.startswith(
        "Round 2 of 5.\nYour last move ended at (0, 7). Cells entered by it (8), in order: (7, 7), (6, 7), "
        "(5, 7), (4, 7), (3, 7), (2, 7), (1, 7), (0, 7). Normalized loss so far: 0.3375.\n"
        "You are at (0, 7). The target is (6, 3).\n"
    )
    costs = np.array(environment.hidden()["cost_map"])
    assert costs[:8, 7].sum() == 47 + 44 + 40 + 36 + 33 + 30 + 24 + 16
    expected = np.full_like(costs, -1)
    expected[:9, 6:9] = costs[:9, 6:9]
    assert (environment.known_costs() == expected).all()
    assert "  0    ?  ?  ?  ?  ?  ?  7 16 29  ?  ?  ?  ?  ?\n" in result.observation


def test_the_start_is_not_revealed() -> None:
    environment = started(reveal_radius=0)
    walk(environment, (8, 9))
    known = environment.known_costs() >= 0
    assert np.argwhere(known).tolist() == [[8, 8], [8, 9]]


def test_success_pays_one_minus_the_mean_cost() -> None:
    environment = started()
    cells = [(8, 3), (8, 4), (8, 3), (7, 3), (6, 3)]
    entered = [(8, 6), (8, 5), (8, 4), (8, 3), (8, 4), (8, 3), (7, 3), (6, 3)]
    costs = environment.hidden()["cost_map"]
    total = sum(costs[row][col] for row, col in entered)
    assert total == 40 + 33 + 28 + 26 + 28 + 26 + 36 + 47
    result = walk(environment, *cells)
    assert result.is_done and result.finish == "success"
    assert result.raw_reward == (800 - total) / 800
    assert result.metrics == {
        "num_entered_cells": 8.0,
        "is_illegal_move": 0.0,
        "revealed_frac": 24 / 196,
        "normalized_loss": total / 800,
    }
    feedback = environment.feedback()
    assert feedback == result.observation
    assert feedback.startswith(
        "You stand on the target (6, 3) after the last round. Normalized loss: 0.3300. Reward: 0.6700.\n"
        "Rounds played: 5 of 5. Final position: (6, 3). Target: (6, 3). Entered cells: 8. "
        "Normalized loss: 0.3300.\nCosts known so far"
    )
    assert draw_map(environment.known_costs()) in feedback


def test_being_on_the_goal_early_does_nothing() -> None:
    environment = started()
    result = walk(environment, (6, 7), (6, 3))
    assert not result.is_done and environment.rounds_left == 3
    result = walk(environment, (6, 4), (6, 5), (6, 6))
    assert result.is_done and result.finish == "out_of_steps" and result.raw_reward == 0.0
    assert environment.feedback().startswith(
        "After the last round you stand at (6, 6), not on the target (6, 3). Reward: 0.\n"
    )
    assert result.metrics["normalized_loss"] > 0 and result.metrics["is_illegal_move"] == 0.0


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        ("8,7", "that is where you already stood"),
        ("9,8", "neither along a row nor along a column"),
        ("8,14", "to (8, 14) is illegal: rows and columns run from 0 to 13"),
        ("-1,7", "to (-1, 7) is illegal: rows and columns run from 0 to 13"),
        ("99,99", "to (99, 99) is illegal: rows"),
        ("8," + "9" * 100_000, "The move is illegal: rows and columns run from 0 to 13"),
    ],
)
@pytest.mark.parametrize("parity", [False, True])
def test_illegal_moves_end_the_task(answer: str, words: str, parity: bool) -> None:
    environment = started(parity=parity)
    result = step(environment, f"<answer>{answer}</answer>")
    assert result.is_done and result.raw_reward == 0.0
    assert result.finish == ("format_error" if parity else "failure")
    assert result.metrics == {"num_entered_cells": 0.0, "is_illegal_move": 1.0, "revealed_frac": 0.0}
    assert words in environment.feedback() and len(environment.feedback()) < 2000
    ending = "Rounds played: 1 of 5. Final position: (8, 7). Target: (6, 3). Entered cells: 0."
    assert f"{ending} Normalized loss: none" in environment.feedback()


def test_unreadable_answers_end_the_task_and_say_what_was_expected() -> None:
    environment = started()
    walk(environment, (8, 3))
    result = step(environment, "left, please")
    assert result.is_done and result.finish == "format_error" and result.raw_reward == 0.0
    assert result.metrics["is_illegal_move"] == 0.0 and result.metrics["num_entered_cells"] == 4.0
    for text in (result.observation, environment.feedback()):
        assert "<answer>row,column</answer>" in text and draw_map(environment.known_costs()) in text


def test_feedback_of_an_episode_that_was_cut_off() -> None:
    environment = started()
    walk(environment, (8, 3))
    assert environment.feedback().startswith("The task was cut off before its last round.\nRounds played: 1")


def test_the_map_stays_revealed_in_the_next_task_and_only_in_this_pack() -> None:
    environment = started()
    walk(environment, (0, 7))
    known = environment.known_costs()
    observation = environment.reset(task({"seed": 7}, position=1))
    assert (environment.known_costs() == known).all() and draw_map(known) in observation
    assert environment.num_entered == environment.cost_sum == 0 and "last move" not in observation
    environment.reset(task(position=0))  # every task of a Ralph pack is at one position
    assert (environment.known_costs() == known).all()
    environment.reset(task(pack_seed=1))
    assert (environment.known_costs() == -1).all()


def test_step_outside_a_task_is_the_callers_mistake() -> None:
    environment = GridNavigation(SPEC.options("eval"))
    with pytest.raises(RuntimeError, match="reset"):
        step(environment, "<answer>0,0</answer>")
    environment.reset(task())
    step(environment, "?")
    with pytest.raises(RuntimeError, match="reset"):
        step(environment, "<answer>8,3</answer>")


def test_system_prompt_states_the_rules_and_hides_the_map() -> None:
    prompt = started().system_prompt()
    assert "within distance 1 of" in prompt
    assert "within distance 2 of" in GridNavigation(SPEC.options("train_8b")).system_prompt()
    for phrase in (
        "<answer>row,column</answer>",
        "0 to 99",
        "counted from 0",
        "stays revealed",
        "(100 * number of entered cells)",
        "1 - normalized loss",
        "average",
        "More tasks",
    ):
        assert phrase in prompt
    assert prompt == GridNavigation(SPEC.options("eval")).system_prompt()
    assert "{" not in prompt and "## " not in prompt  # hint and length sections are added behind it


def test_views_are_json() -> None:
    environment = started()
    assert environment.task_view() == {"start": [8, 7], "goal": [6, 3], "rounds": 5}
    hidden = json.loads(json.dumps(environment.hidden()))
    assert set(hidden) == {"size", "cost_map"} and hidden["size"] == 14
    assert [len(row) for row in hidden["cost_map"]] == [14] * 14
    assert hidden["cost_map"][1] == [5, 6, 5, 4, 3, 6, 12, 24, 40, 52, 56, 49, 37, 24]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, ["seed is None"]),
        ({"seed": -1}, ["seed is -1"]),
        ({"seed": "0", "size": 4}, ["unknown field size", "seed is '0'"]),
        ({"seed": True}, ["seed is True"]),
        ({"seed": 1 << 64}, ["seed is 18446744073709551616"]),
    ],
)
def test_bad_records_are_refused_with_every_field(record: dict[str, Any], words: list[str]) -> None:
    environment = GridNavigation(SPEC.options("eval"))
    with pytest.raises(EnvironmentInputError) as caught:
        environment.reset(task(record))
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem


def test_snapshots_are_small_versioned_and_exact() -> None:
    fresh = GridNavigation(SPEC.options("eval"))
    assert fresh.snapshot() == b"\x01"
    environment = GridNavigation(SPEC.options("eval", {"size_min": 3, "size_max": 3, "reveal_radius": 0}))
    environment.reset(task({"seed": 4}, pack_seed=258))
    environment._enter(((0, 1), (2, 2)))
    # bits row by row: 010 000 001, then padding
    assert environment.snapshot() == b"\x01" + (258).to_bytes(8, "big") + b"\x03" + bytes(
        [0b01000000, 0b10000000]
    )
    fresh.restore(environment.snapshot())
    assert fresh.snapshot() == environment.snapshot()
    fresh.restore(b"\x01")
    assert fresh.snapshot() == b"\x01"
    largest = GridNavigation(SPEC.options("eval", {"size_min": 32, "size_max": 32}))
    largest.reset(task())
    assert len(largest.snapshot()) == 138


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (b"", "version none"),
        (b"\x00", "version 0"),
        (b"\x02" + bytes(12), "version 2"),
        (b"\x01\x00", "not a revealed mask"),
        (b"\x01" + bytes(8) + b"\x00", "side 0"),
        (b"\x01" + bytes(8) + b"\x21" + bytes(137), "side 33"),
        (b"\x01" + bytes(8) + b"\x03" + bytes(1), "11 bytes for a map of side 3"),
        (b"\x01" + bytes(8) + b"\x03" + bytes(3), "13 bytes"),
        (b"\x01" + bytes(8) + b"\x03" + b"\x00\x01", "not a revealed mask"),  # a bit in the padding
    ],
)
def test_damaged_snapshots_are_refused(state: bytes, words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=re.escape(words)):
        GridNavigation(SPEC.options("eval")).restore(state)


def test_a_snapshot_of_other_options_is_refused() -> None:
    environment = started(size_min=10, size_max=10)
    other = GridNavigation(SPEC.options("eval", {"size_min": 11, "size_max": 11}))
    other.restore(environment.snapshot())
    with pytest.raises(EnvironmentInputError, match=r"side 10, but with these options .* side 11"):
        other.reset(task())


def test_truth_hint_shows_the_whole_map() -> None:
    assert SPEC.truth_hint is not None
    hint = SPEC.truth_hint(GridNavigation(SPEC.options("eval")), task())
    assert hint.startswith("Hints: ") and "?" not in hint
    assert "  0    0  0  0  0  1  2  7 16 29 39 42 36 26 16\n" in hint
