"""Optimal Control as a policy meets it: texts, every ending, feedback, and what travels between tasks."""

from __future__ import annotations

import asyncio
import re
from typing import Any

import pytest

from cod_async.envs.base import StepResult, TaskSpec
from cod_async.envs.optimal_control import SPEC
from cod_async.envs.optimal_control.dynamics import World
from cod_async.envs.optimal_control.env import OptimalControl, shown_reward
from cod_async.envs.optimal_control.oracle import answer, observed_steps, open_loop_expression
from cod_async.errors import EnvironmentInputError

RECORD = {"seed": 3, "x0": 1.0 / 3.0, "v0": -0.25, "x_target": 4.0}
WORLD = World(a=1.0988742034912813, b=0.9432951267626954)  # of pack seed 0


def task(record: dict[str, Any] | None = None, pack_seed: int = 0, position: int = 0) -> TaskSpec:
    return TaskSpec(
        environment="optimal_control",
        preset="hard",
        options={},
        record=RECORD if record is None else record,
        pack_seed=pack_seed,
        position=position,
        pack_size=4,
    )


def made(**options: Any) -> OptimalControl:
    return OptimalControl(SPEC.options("hard", options))


def started(**options: Any) -> OptimalControl:
    environment = made(**options)
    environment.reset(task())
    return environment


def step(environment: OptimalControl, response: str) -> StepResult:
    return asyncio.run(environment.step(response))


def play(environment: OptimalControl, expression: str, position: int = 0) -> StepResult:
    environment.reset(task(position=position))
    return step(environment, answer(expression))


def test_first_message_has_three_decimals_and_nothing_else() -> None:
    assert made().reset(task()) == (
        "Task:\n"
        "  initial position x_0 = 0.333\n"
        "  initial velocity v_0 = -0.250\n"
        "  target position x_target = 4.000\n"
        "  target velocity v_target = 0.000\n"
        "  horizon = 12 steps"
    )


def test_rules_tell_all_but_the_constants() -> None:
    text = started().system_prompt()
    for words in (
        "0.03",
        "reward -0.1",
        "has reward 0.",
        "positive or negative",
        "2000 characters",
        "<controller>",
    ):
        assert words in text, words
    for name in ("x_target", "v_target", "horizon", "remaining_steps", "ifelse(", "clip(", "ne(", "**"):
        assert name in text, name
    assert "noise" not in text and "{" not in text
    assert str(WORLD.a)[:5] not in text and str(WORLD.b)[:5] not in text
    noisy = started(process_noise_std=0.05).system_prompt()
    assert "noise_t" in noisy and "standard deviation 0.05" in noisy


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "b may be positive or negative."),
        ({"b_min": 0.5}, "b is positive."),
        ({"b_max": -0.5}, "b is negative."),
        ({"b_min": -0.2}, "b is positive."),  # the margin leaves no negative b
        ({"b_min": 0.0, "b_max": 0.35}, "b is positive."),
        ({"b_margin": 1.5}, "b may be positive or negative."),
    ],
)
def test_the_sign_is_told_only_if_it_is_certain(options: dict[str, Any], sentence: str) -> None:
    assert sentence in made(**options).system_prompt()


def test_a_controller_that_runs() -> None:
    environment = started()
    result = step(environment, "Let me think.\n" + answer("0.25*(x_target-x)-0.32*v") + "\n ")
    x, v, effort = RECORD["x0"], RECORD["v0"], 0.0
    for _ in range(12):
        u = max(-1.0, min(1.0, 0.25 * (4.0 - x) - 0.32 * v))
        v = WORLD.a * v + WORLD.b * u
        x = x + v
        effort += u * u
    loss = (x - 4.0) ** 2 + 2 * v**2 + 0.03 * effort
    assert result.is_done and result.finish == "success"
    assert result.raw_reward == pytest.approx(1 / (1 + loss), rel=1e-12)
    assert result.metrics == pytest.approx(
        {
            "loss": loss,
            "x_final": x,
            "v_final": v,
            "effort": effort,
            "process_noise_rms": 0.0,
            "is_action_error": 0.0,
            "is_previous_controller_shown": 0.0,
        }
    )


def test_feedback_of_a_run() -> None:
    environment = started()
    result = step(environment, answer("ifelse(t < 1, 2, 0)"))
    v1 = WORLD.a * -0.25 + WORLD.b
    lines = environment.feedback().split("\n")
    assert result.observation == environment.feedback()
    assert lines[1:4] == [
        "  t         x_t         v_t         u_t",
        "  0       0.333      -0.250       1.000",
        f"  1  {RECORD['x0'] + v1:10.3f}  {v1:10.3f}       0.000",
    ]
    assert re.fullmatch(r" 12 +\S+ +\S+ +-", lines[14])
    x, v = result.metrics["x_final"], result.metrics["v_final"]
    assert lines[15] == (
        f"Final state: x_T = {x:.3f}, v_T = {v:.3f}. Target: x_target = 4.000, v_target = 0.000."
    )
    assert lines[16].startswith(f"Loss {result.metrics['loss']:.3f}, reward {result.raw_reward:.3f}")
    steps = observed_steps(environment.feedback())
    assert len(steps) == 12 and steps[0] == (-0.25, 1.0, round(v1, 3))
    assert len(lines) == 17


@pytest.mark.parametrize(
    ("reward", "shown"),
    [
        (1.0, "1.000"),
        (0.0005, "0.001"),
        (0.0, "0.000"),
        (0.00049, "4.900e-04 (positive, though it rounds to 0.000)"),
        (1e-30, "1.000e-30 (positive, though it rounds to 0.000)"),
    ],
)
def test_shown_reward(reward: float, shown: str) -> None:
    assert shown_reward(reward) == shown


GOOD = "<answer><controller>0.1</controller></answer>"


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("", "exactly one"),
        ("0.1", "exactly one"),
        ("<controller>0.1</controller>", "exactly one"),
        (GOOD + GOOD, "exactly one"),
        ("I put it in <answer> tags: " + GOOD, "exactly one"),
        ("```xml\n" + GOOD + "\n```", "code fences"),
        ("```\n" + GOOD, "code fences"),
        (GOOD + " That is all.", "nothing may follow"),
        (GOOD + "\n.", "nothing may follow"),
        ("<answer>0.1</answer>", "invalid XML"),
        ("<answer></answer>", "invalid XML"),
        ("<answer><controller>x < 1</controller></answer>", "invalid XML"),
        ("<answer><control>0.1</control></answer>", "one <controller> element"),
        ("<answer><a><controller>0.1</controller></a></answer>", "one <controller> element"),
        ("<answer><controller/></answer>", "plain text"),
        ("<answer><controller> </controller></answer>", "plain text"),
        ('<answer><controller k="1">0.1</controller></answer>', "plain text"),
        ("<answer><controller><u>0.1</u></controller></answer>", "plain text"),
        ("<answer><controller># nothing</controller></answer>", "unexpected end"),
        ("<answer><controller>a*v</controller></answer>", "no variable 'a'"),
        ("<answer><controller>True</controller></answer>", "no variable 'True'"),
        ("<answer><controller>" + "9" * 5000 + "</controller></answer>", "longer"),
        ("<answer><controller>" + "-" * 1500 + "x</controller></answer>", "deep"),
        ("<answer>" + "<a>" * 300_000 + "</answer>", "longer"),
        ("<answer><controller>&#50;&#x2F;&#47;3</controller></answer>", "'//'"),
        ("\x00\ud800" * 500_000, "exactly one"),
        ("<answer><controller>\ud800</controller></answer>", "invalid XML"),
        ('<answer><!DOCTYPE a [<!ENTITY b "1">]><controller>&b;</controller></answer>', "<!"),
    ],
)
def test_format_errors(response: str, reason: str) -> None:
    environment = started()
    result = step(environment, response)
    assert result.is_done and result.finish == "format_error" and result.raw_reward == -0.1
    assert reason in environment.feedback() and "-0.1" in environment.feedback()
    assert "loss" not in result.metrics and result.metrics["is_action_error"] == 0.0


def test_what_stands_before_the_answer_does_not_matter() -> None:
    for before in (
        '<!DOCTYPE a [<!ENTITY b "1">]>',
        "<controller>1</controller> & < \x00\ud800",
        "x" * 1_000_000,
    ):
        assert step(started(), before + GOOD).finish == "success"


def test_a_response_cut_by_the_token_limit_is_told_so() -> None:
    environment = started()
    environment.is_response_cut = True
    result = step(environment, "Thinking about <answer><contr")
    assert result.finish == "format_error" and result.raw_reward == -0.1
    assert "cut off at the token limit" in environment.feedback() and "-0.1" in environment.feedback()
    environment.reset(task())
    assert step(environment, GOOD).finish == "success"  # cut, but complete


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1/(t-t)", "at t = 0: division by zero"),
        ("1/(t-5)", "at t = 5: division by zero"),
        ("9**9**9**9", "too large"),
        ("(-1)**0.5", "fractional power"),
        ("x<1", "truth value"),
        ("ifelse(t<11,0.1,1e308*10)", "at t = 11: the result is not a finite number"),
    ],
)
def test_action_errors_tell_no_trajectory(expression: str, reason: str) -> None:
    environment = started()
    result = step(environment, answer(expression))
    assert result.is_done and result.finish == "failure" and result.raw_reward == 0.0
    assert reason in environment.feedback() and "x_t" not in environment.feedback()
    assert result.metrics == {"is_action_error": 1.0, "is_previous_controller_shown": 0.0}


def test_error_rewards_are_options() -> None:
    environment = started(format_error_reward=-0.5, action_error_reward=-0.25)
    assert step(environment, "").raw_reward == -0.5
    assert play(environment, "1/0").raw_reward == -0.25
    assert "reward -0.5" in environment.system_prompt() and "reward -0.25" in environment.system_prompt()


def test_a_task_takes_one_response() -> None:
    environment = started()
    assert environment.max_steps == 1 and environment.is_step_penalized is False
    step(environment, GOOD)
    with pytest.raises(RuntimeError, match="call reset"):
        step(environment, GOOD)
    with pytest.raises(RuntimeError, match="no task"):
        step(made(), GOOD)
    assert "cut off" in started().feedback()


def test_trajectory_shows_the_bare_controller() -> None:
    environment = made()
    user = environment.reset(task())
    response = "long thoughts " * 50 + answer("ifelse(t<3,  0.1, 0) # a note")
    step(environment, response)
    text = environment.trajectory([("user", user), ("assistant", response)])
    assert text is not None
    assert text.endswith("Action: <controller>ifelse(t&lt;3, 0.1, 0)</controller>")
    assert "long thoughts" not in text and "a note" not in text
    assert user in text and environment.system_prompt() in text
    environment.reset(task())
    step(environment, "long thoughts, no answer")
    text = environment.trajectory([("user", user), ("assistant", "long thoughts, no answer")])
    assert text is not None and text.endswith("Action: long thoughts, no answer")
    environment.reset(task())
    step(environment, answer("1/0"))  # readable, though it failed
    text = environment.trajectory([("user", user), ("assistant", answer("1/0"))])
    assert text is not None and text.endswith("Action: <controller>1/0</controller>")


def previous_block(message: str) -> str:
    return message.partition("\n\n")[2]


def test_previous_controller_is_shown_with_task_and_outcome() -> None:
    environment = made()
    result = play(environment, "ifelse(t < 2, 0.5, -0.1*v)")
    message = environment.reset(task({"seed": 4, "x0": 0.0, "v0": 0.0, "x_target": 1.0}, position=1))
    x_error, v_error = result.metrics["x_final"] - 4.0, result.metrics["v_final"]
    assert previous_block(message) == (
        "An earlier controller of this series, with the same a and b:\n"
        "  its task: x_0 = 0.333, v_0 = -0.250, x_target = 4.000, v_target = 0.000, horizon = 12\n"
        f"  it ran to the end; reward {shown_reward(result.raw_reward)}\n"
        f"  remaining errors: x_T - x_target = {x_error:.3f}, v_T - v_target = {v_error:.3f}\n"
        "  <controller>ifelse(t &lt; 2, 0.5, -0.1*v)</controller>"
    )
    assert step(environment, GOOD).metrics["is_previous_controller_shown"] == 1.0


def test_parity_shows_the_earlier_task_in_full_precision() -> None:
    environment = made(parity=True)
    play(environment, "0.1")
    assert f"x_0 = {RECORD['x0']!r}, v_0 = -0.25," in environment.reset(task(position=1))


def test_only_a_completed_controller_replaces_the_previous_one() -> None:
    environment = made()
    play(environment, "0.1")
    kept = environment.reset(task(position=1))
    for response in ("rubbish", answer("1/0"), answer("foo")):
        environment.reset(task(position=1))
        step(environment, response)
        assert environment.reset(task(position=1)) == kept
    play(environment, "0.2")
    assert "<controller>0.2</controller>" in environment.reset(task(position=2))


def test_previous_controller_can_be_hidden() -> None:
    environment = made(is_previous_controller_shown=False)
    play(environment, "0.1")
    assert previous_block(environment.reset(task(position=1))) == ""
    assert step(environment, GOOD).metrics["is_previous_controller_shown"] == 0.0


def test_position_zero_is_not_the_start_of_a_lifecycle() -> None:
    environment = made()
    play(environment, "0.1")
    assert "0.1" in previous_block(environment.reset(task(position=0)))  # every task of a Ralph pack is at 0


def test_parity_reaches_the_controller() -> None:
    trap = "min(0.5, x < -100)"
    assert play(made(), trap).finish == "success"
    assert play(made(parity=True), trap).finish == "failure"


def test_snapshot_and_restore() -> None:
    environment = made()
    assert environment.snapshot() == b"\x01"
    play(environment, "0.1 # comment")
    state = environment.snapshot()
    assert state[0] == 1 and b"comment" not in state
    fresh = made()
    fresh.restore(state)
    assert fresh.snapshot() == state
    assert fresh.reset(task(position=1)) == environment.reset(task(position=1))
    fresh.restore(b"\x01")
    assert fresh.snapshot() == b"\x01"
    fresh.restore(state)
    fresh.restore(b"")
    assert previous_block(fresh.reset(task(position=1))) == ""


def test_snapshots_are_bounded() -> None:
    environment = made()
    play(environment, "x" + "\t" * 900 + "+0" * 240 + " or " + "1" * 600)
    environment.restore(environment.snapshot())
    assert len(environment.snapshot()) < 20_000


@pytest.mark.parametrize(
    ("state", "words"),
    [
        (b"\x02", "format version 2"),
        (b"\x00{}", "format version 0"),
        (b"{}", "format version 123"),
        (b"\x01{}", "cannot be read"),
        (b"\x01null", "cannot be read"),
        (b"\x01\xff", "cannot be read"),
        (b"\x01[" + b"[" * 100_000, "cannot be read"),
    ],
)
def test_wrong_states_are_refused(state: bytes, words: str) -> None:
    with pytest.raises(EnvironmentInputError, match=words):
        made().restore(state)


def test_tampered_states_are_refused() -> None:
    environment = made()
    play(environment, "0.1")
    state = environment.snapshot()
    for old, new in [(b'"0.1"', b'"__import__"'), (b'"horizon":12', b'"horizon":"12"'), (b'"x0"', b'"y0"')]:
        assert old in state
        with pytest.raises(EnvironmentInputError, match="cannot be read"):
            made().restore(state.replace(old, new))


def test_views() -> None:
    environment = started()
    assert environment.hidden() == {"a": WORLD.a, "b": WORLD.b}
    assert environment.task_view() == {"x0": RECORD["x0"], "v0": -0.25, "x_target": 4.0, "horizon": 12}


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({}, ["seed is None", "x0 is None", "v0 is None", "x_target is None"]),
        (RECORD | {"horizon": 5}, ["unknown field horizon"]),
        (RECORD | {"seed": -1, "x0": float("nan")}, ["seed is -1", "x0 is nan"]),
        (RECORD | {"seed": True, "v0": "1"}, ["seed is True", "v0 is '1'"]),
        (RECORD | {"x_target": float("inf")}, ["x_target is inf"]),
        (RECORD | {"x_target": 10**400}, ["x_target is"]),
        (RECORD | {"seed": 1 << 64}, ["seed is 18446744073709551616"]),
    ],
)
def test_wrong_records_list_every_problem(record: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(EnvironmentInputError) as caught:
        made().reset(task(record))
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem and "optimal_control" in problem


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"horizons": 3}, ["unknown option horizons; options are"]),
        ({"horizon": 0, "x0_max": -1}, ["horizon is 0", "x0_max is -1"]),
        ({"horizon": 65, "a_min": 3, "parity": 1}, ["horizon is 65", "a_min is 3", "parity is 1"]),
        ({"horizon": 12.0}, ["horizon is 12.0"]),
        ({"effort_weight": 0, "process_noise_std": float("nan")}, ["effort_weight", "process_noise_std"]),
        ({"b_margin": -0.1, "v0_max": True}, ["v0_max is True", "b_margin is -0.1"]),
        ({"a_min": 1.3, "b_min": 2.0}, ["a_min is 1.3 but a_max is 1.2", "b_min is 2.0 but b_max is 1.5"]),
        ({"b_margin": 2.0}, ["b_margin is 2.0, but no b"]),
        ({"is_previous_controller_shown": "yes"}, ["is_previous_controller_shown is 'yes'"]),
        ({"format_error_reward": 0.1}, ["format_error_reward is 0.1"]),
    ],
)
def test_wrong_options_list_every_problem(options: dict[str, Any], words: list[str]) -> None:
    with pytest.raises(EnvironmentInputError) as caught:
        OptimalControl(options)
    assert len(caught.value.problems) == len(words)
    for problem, word in zip(caught.value.problems, words, strict=True):
        assert word in problem and "optimal_control" in problem


def test_the_largest_allowed_numbers_stay_finite() -> None:
    """Corners of the options: rewards and metrics have to be finite whatever the controller does."""
    environment = made(horizon=64, a_min=2.0, a_max=2.0, b_min=10.0, b_max=10.0, process_noise_std=10.0)
    environment.reset(task({"seed": 1, "x0": 1e6, "v0": 1e6, "x_target": -1e6}))
    result = step(environment, answer("1"))
    assert result.finish == "success" and 0.0 < result.raw_reward < 1e-30
    assert all(abs(value) < 1e308 for value in result.metrics.values())


def test_the_longest_horizon_fits_an_open_loop_table() -> None:
    environment = made(horizon=64)
    environment.reset(task())
    expression = open_loop_expression(environment, WORLD)
    assert step(environment, answer(expression)).raw_reward > 0.99
