"""FrozenLake-Obscure: the game as a policy meets it, word by word where the wording carries rules."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from cod_async.envs.base import StepResult, TaskSpec
from cod_async.envs.frozen_lake_obscure import SPEC
from cod_async.envs.frozen_lake_obscure.env import FrozenLakeObscure, draw_map, parse_action
from cod_async.envs.frozen_lake_obscure.mapgen import MAPPINGS, mapping_for_seed
from cod_async.errors import EnvironmentInputError

# FFGS / HHFH / FHHF / HFHF with start (0,3), goal (0,2); seed 0 of the mapping: 1=Up, 2=Down, 3=Right,
# 4=Left.
RECORD = {"seed": 0, "size": 4, "p": 0.65}


def task(record: dict[str, Any] | None = None, pack_seed: int = 0, position: int = 0) -> TaskSpec:
    return TaskSpec(
        environment="frozen_lake_obscure",
        preset="easy",
        options={},
        record=RECORD if record is None else record,
        pack_seed=pack_seed,
        position=position,
        pack_size=4,
    )


def started(preset: str = "easy", **options: Any) -> FrozenLakeObscure:
    environment = FrozenLakeObscure(SPEC.options(preset, options))
    environment.reset(task())
    return environment


def step(environment: FrozenLakeObscure, response: str) -> StepResult:
    return asyncio.run(environment.step(response))


def go(code: int) -> str:
    return f"I try it. <answer>Direction {code}</answer>"


@pytest.mark.parametrize(
    ("response", "code"),
    [
        ("<answer>Direction 1</answer>", 1),
        ("thinking …\n<answer>\n direction\t4 because </answer> and more", 4),
        ("<answer>Direction 2</answer> is what I take", 2),
        ("<answer>Direction 03</answer>", 3),
        ("<answer>Direction 3.7</answer>", 3),
        ("<answer>Direction 0</answer>", None),
        ("<answer>Direction 5</answer>", None),
        ("<answer>Direction 12</answer>", None),
        ("<answer>Direction -1</answer>", None),
        ("<answer>Direction " + "9" * 5000 + "</answer>", None),
        ("<answer>DIRECTION 1</answer>", None),
        ("<answer>Direction1</answer>", None),
        ("<answer>Direction: 1</answer>", None),
        ("<answer>go Direction 1</answer>", None),
        ("<answer>1</answer>", None),
        ("<answer></answer>", None),
        ("Direction 1", None),
        ("</answer>Direction 1<answer>", None),
        ("<answer>Direction 1", None),
        ("<answer>Direction 1</answer> or <answer>Direction 2</answer>", None),
        ("I must write <answer> tags: <answer>Direction 1</answer>", None),
        ("<answer>Direction ²</answer>", None),
        ("\x00\ud800", None),
        ("", None),
    ],
)
def test_parse_action(response: str, code: int | None) -> None:
    assert parse_action(response) == code
    result = step(started(), response)
    assert (result.is_done and result.finish == "format_error") == (code is None)


def test_huge_answers_are_read_in_no_time() -> None:
    """A pattern that tries again and again would need hours for these."""
    million = 1_000_000
    for content in ("Direction" + " " * million + "x", "Direction " + "0" * million + "x", "<" * million):
        assert parse_action(f"<answer>{content}</answer>") is None
    assert parse_action("<answer>Direction " + "0" * million + "3</answer>") == 3


def test_first_observation() -> None:
    environment = FrozenLakeObscure(SPEC.options("easy"))
    observation = environment.reset(task())
    assert observation == (
        "Step 1/8\n"
        "The lake now:\n"
        " _ \t _ \t G \t P \t\n"
        " O \t O \t _ \t O \t\n"
        " _ \t O \t O \t _ \t\n"
        " O \t _ \t O \t _ \t\n"
        "The goal at (0, 2) is not reached yet. Which action do you take next?"
    )


def test_start_is_drawn_as_frozen_once_left() -> None:
    environment = started()
    assert draw_map(environment.lake, (1, 2)).splitlines()[0] == " _ \t _ \t G \t _ \t"


def test_edge_is_reported_and_stays() -> None:
    environment = started()
    result = step(environment, go(1))  # up, over the edge
    assert not result.is_done and environment.player == (0, 3)
    assert result.observation.startswith(
        "Step 2/8\nYour last action was Direction 1. You are still at (0, 3)"
    )
    assert "edge" in result.observation


def test_move_is_reported_with_both_positions() -> None:
    environment = FrozenLakeObscure(SPEC.options("easy"))
    # FHFSF/FHGFF/HFFHF/FFFFF/HFFHH, start (0,3); mapping of seed 1: Left, Down, Up, Right.
    environment.reset(task({"seed": 1, "size": 5, "p": 0.65}, pack_seed=1))
    result = step(environment, go(4))
    assert "Direction 4. It moved you from (0, 3) to (0, 4)." in result.observation
    result = step(environment, go(2))
    assert "Direction 2. It moved you from (0, 4) to (1, 4)." in result.observation
    step(environment, go(1))
    result = step(environment, go(1))
    assert result.is_done and result.finish == "success" and result.raw_reward == 1.0
    assert "not reached" not in result.observation
    assert environment.feedback() == "The player reached the goal."
    assert result.metrics == {"shortest_path_steps": 2.0, "num_stays": 0.0}


def test_hole_ends_with_nothing() -> None:
    environment = started()
    result = step(environment, go(2))  # down, into the hole at (1, 3)
    assert result.is_done and result.finish == "failure" and result.raw_reward == 0.0
    assert "hole" in environment.feedback() and "Direction" not in environment.feedback()


def test_format_error_ends_the_game_and_says_what_was_expected() -> None:
    environment = started()
    result = step(environment, "up, please")
    assert result.is_done and result.finish == "format_error" and result.raw_reward == 0.0
    for text in (result.observation, environment.feedback()):
        assert "<answer>Direction N</answer>" in text


@pytest.mark.parametrize(("preset", "max_steps"), [("easy", 8), ("hard", 10)])
def test_out_of_steps(preset: str, max_steps: int) -> None:
    environment = started(preset)
    assert environment.max_steps == max_steps
    for _ in range(max_steps - 1):
        assert not step(environment, go(1)).is_done
    result = step(environment, go(1))
    assert result.is_done and result.finish == "out_of_steps" and result.raw_reward == 0.0
    assert f"{max_steps}/{max_steps}" in environment.feedback()


def test_success_on_the_last_step_counts() -> None:
    environment = started()
    for _ in range(7):
        step(environment, go(1))
    assert step(environment, go(4)).finish == "success"


def test_hole_and_format_on_the_last_step_keep_their_names() -> None:
    for response, finish in ((go(2), "failure"), ("?", "format_error")):
        environment = started(agent_max_steps=1)
        assert step(environment, response).finish == finish


def test_feedback_of_an_episode_that_was_cut_off() -> None:
    environment = started()
    step(environment, go(1))
    assert "cut off" in environment.feedback()


def test_last_move_is_told_only_on_request() -> None:
    environment = started(is_last_move_told=True)
    step(environment, go(2))
    assert environment.feedback().endswith("The last action, Direction 2, led from (0, 3) to (1, 3).")
    environment.reset(task())
    step(environment, "?")
    assert "last action" not in environment.feedback()


def test_step_outside_a_task_is_the_callers_mistake() -> None:
    environment = FrozenLakeObscure(SPEC.options("easy"))
    with pytest.raises(RuntimeError, match="reset"):
        step(environment, go(1))
    environment.reset(task())
    step(environment, go(4))
    with pytest.raises(RuntimeError, match="reset"):
        step(environment, go(4))


def test_system_prompt_states_the_rules_and_hides_the_mapping() -> None:
    prompt = started().system_prompt()
    assert "at most 8 actions" in prompt and "at most 10 actions" in started("hard").system_prompt()
    for phrase in ("<answer>Direction N</answer>", "hidden", "hole", "goal", "hints", "Direction 4"):
        assert phrase in prompt
    assert "(row, column), both counted from 0 at the top left" in prompt  # as positions are reported
    assert prompt == FrozenLakeObscure(SPEC.options("easy")).system_prompt()
    assert "{" not in prompt and "## " not in prompt  # hint and length sections are added behind it


def test_views() -> None:
    environment = started()
    assert environment.hidden() == {"mapping": ["Up", "Down", "Right", "Left"]}
    assert environment.task_view() == {
        "map": ["FFGS", "HHFH", "FHHF", "HFHF"],
        "start": [0, 3],
        "goal": [0, 2],
    }


def test_mapping_modes() -> None:
    def mapping(mode: str, record: dict[str, Any], pack_seed: int, **options: Any) -> tuple[str, ...]:
        environment = FrozenLakeObscure(SPEC.options("easy", {"mapping_mode": mode, **options}))
        environment.reset(task(record, pack_seed))
        return tuple(environment.hidden()["mapping"])

    for seed in (0, 1, 2, (1 << 64) - 1):
        assert mapping("per_pack", RECORD, seed) == mapping_for_seed(seed)
    assert mapping("global", RECORD, 1) == ("Down", "Right", "Up", "Left")
    assert mapping("global", RECORD, 1, mapping_index=23) == ("Left", "Up", "Right", "Down") == MAPPINGS[23]
    assert mapping("per_task", RECORD, 1) == mapping_for_seed(RECORD["seed"])
    assert mapping("per_task", {**RECORD, "mapping_index": 7}, 1) == MAPPINGS[7]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, ["seed is None", "size is None", "p is None"]),
        ({"seed": -1, "size": 1, "p": 1.5}, ["seed is -1", "size is 1", "p is 1.5"]),
        ({"seed": "0", "size": 4.0, "p": True}, ["seed is '0'", "size is 4.0", "p is True"]),
        ({**RECORD, "size": 33}, ["size is 33"]),
        ({**RECORD, "mapping_index": 24}, ["mapping_index is 24"]),
        ({**RECORD, "map": []}, ["unknown field map"]),
    ],
)
def test_bad_records_are_refused_with_every_field(record: dict[str, Any], words: list[str]) -> None:
    environment = FrozenLakeObscure(SPEC.options("easy"))
    with pytest.raises(EnvironmentInputError) as caught:
        environment.reset(task(record))
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem


def test_extreme_records_still_give_a_map() -> None:
    environment = FrozenLakeObscure(SPEC.options("easy", {"env_max_steps": 1}))
    for record in ({"seed": (1 << 64) - 1, "size": 2, "p": 0}, {"seed": 3, "size": 32, "p": 1}):
        environment.reset(task(record))
        assert len(environment.task_view()["map"]) == record["size"]


def test_truth_hint_tells_each_action() -> None:
    assert SPEC.truth_hint is not None
    hint = SPEC.truth_hint(FrozenLakeObscure(SPEC.options("easy")), task())
    assert hint.startswith("Hints: ")
    for code, move in enumerate(("up", "down", "right", "left"), start=1):
        assert f"Direction {code} moves P {move}." in hint
