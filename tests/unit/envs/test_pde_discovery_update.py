"""PDE Discovery: what the updater is told, and what a lifecycle carries from task to task."""

from __future__ import annotations

import asyncio
from typing import Any

import msgspec
import pytest

from cod_async.envs.base import StepResult, TaskSpec
from cod_async.envs.pde_discovery import SPEC
from cod_async.envs.pde_discovery.env import PdeDiscovery
from cod_async.envs.pde_discovery.equation import render
from cod_async.envs.pde_discovery.oracle import commit, run_regression, sample, truth_hint
from cod_async.envs.pde_discovery.state import DataSet, PackState, encode
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.hint import FullPrompts

POINTS = [(x, 0.0) for x in (0.1, 0.2, 0.3, 0.45, 0.6, 0.8)]


def task(position: int = 0, seed: int = 11, pack_seed: int = 1234, pack_size: int = 4) -> TaskSpec:
    return TaskSpec("pde_discovery", "train", {}, {"seed": seed}, pack_seed, position, pack_size)


def started(**options: Any) -> PdeDiscovery:
    environment = PdeDiscovery(SPEC.options("train", options))
    environment.reset(task())
    return environment


def step(environment: PdeDiscovery, response: str) -> StepResult:
    return asyncio.run(environment.step(response))


def do(environment: PdeDiscovery, action: str, inside: str = "") -> StepResult:
    return step(environment, f"I think. <answer><{action}>{inside}</{action}></answer> Done.")


def first_task(environment: PdeDiscovery) -> StepResult:
    step(environment, sample(POINTS))
    step(environment, run_regression(["u**5 + u**2/(1+u**2)"]))
    return step(environment, commit(render(environment.fitted_equations[0])))


def test_feedback() -> None:
    environment = started()
    first_task(environment)
    equation = render(environment.fitted_equations[0])
    lines = environment.feedback().split("\n")
    assert len(lines) == 3 and lines[0].startswith(
        "Max error of the latest regression on the sampled data: 0."
    )
    assert lines[1] == f"Equation committed in this task: {equation}"
    assert lines[2] == f"Best equation of the latest regression: {equation}"
    environment.reset(task(1))
    for _ in range(6):
        do(environment, "summarize_pack_evidence")
    assert environment.feedback().split("\n") == [
        "Max error of the latest regression on the sampled data: none",
        "This task ended without a committed equation.",
        f"Last equation committed in this pack (task 1): {equation}",
        "Best equation of the latest regression: none",
    ]


def test_feedback_in_parity_mode_does_not_tell_that_nothing_was_committed() -> None:
    environment = started(parity=True)
    first_task(environment)
    environment.reset(task(1))
    for _ in range(6):
        result = do(environment, "summarize_pack_evidence")
    assert result.metrics["loss"] == 100.0 and "without" not in environment.feedback()
    assert "Last equation committed in this pack (task 1): " in environment.feedback()


def test_record_for_the_updater_keeps_the_last_two_results() -> None:
    environment = started()
    messages = [("user", environment.reset(task()))]
    for response in (sample(POINTS[:3]), run_regression(["u"]), sample(POINTS[:1]), run_regression(["u"])):
        messages += [("assistant", response), ("user", step(environment, response).observation)]
    record = environment.trajectory([*messages, ("assistant", commit("1*u"))])
    assert record is not None and environment.system_prompt() in record
    steps = record.split("\n\nStep ")[1:]
    assert len(steps) == 5
    assert "Nothing has been measured" in steps[0] and "## Result" not in steps[0]
    for text in steps[1:3]:
        assert "## Result of the last action\n(left out here)\nAction:" in text and "## State" in text
    for text, (_, whole) in zip(steps[3:], messages[6::2], strict=True):
        assert whole in text and "## Next" in text
    assert "<preferred_equation>1*u" in steps[4]


def test_update_prompts_leave_the_reward_out() -> None:
    prompts = started().update_prompts()
    assert isinstance(prompts, FullPrompts)
    record = "Action: my guess\nReward: 0.625\nFeedback: I made this up"
    system, user = prompts.update_messages("Hints: none", record, 0.625, "Max error: 0.1", 500)
    expected_system, expected = FullPrompts().update_messages(
        "Hints: none", record, 0.625, "Max error: 0.1", 500
    )
    assert (
        system == expected_system and record in user and user.count("Reward:") == 1
    )  # the policy's own text
    assert user.startswith(
        expected.replace("Reward: 0.625\nFeedback: Max error", "Feedback: Max error").rstrip()
    )
    assert user.rstrip().endswith("in your whole answer.") and prompts.start in user.splitlines()[-1]
    assert prompts.parse(f"x {prompts.start}\n- a\n{prompts.end}") == "Hints: - a"
    _, blank = prompts.update_messages("Hints: none", "r", 0.75, "  ")
    assert "0.75" not in blank and "Feedback: none" in blank


def test_a_changed_standard_prompt_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    prompts = started().update_prompts()
    assert prompts is not None
    monkeypatch.setattr(FullPrompts, "update_messages", lambda self, *args: ("system", "Score: 1.000"))
    with pytest.raises(RuntimeError, match="no line 'Reward"):
        prompts.update_messages("h", "t", 1.0, "f")


def test_snapshots_are_small_versioned_and_checked() -> None:
    environment = PdeDiscovery(SPEC.options("train"))
    assert environment.snapshot() == PdeDiscovery(SPEC.options("train")).snapshot()
    fresh = environment.snapshot()
    for position in range(4):
        environment.reset(task(position))
        first_task(environment)
    state = environment.snapshot()
    assert state[0] == 1 and state == environment.snapshot() and 500 < len(state) < 2500
    other = PdeDiscovery(SPEC.options("train"))
    other.restore(state)
    assert other.snapshot() == state
    other.restore(fresh)
    assert other.snapshot() == fresh
    no_text = state.replace(b"ds_t1_1", b"ds_t1_\xff")
    cut = (state[:-1], state + b"\x00", b"\x01\xff", b"\x01" + b"\x93" * 400)
    for bad in (b"", b"\x02" + state[1:], no_text, *cut):
        with pytest.raises(EnvironmentInputError, match="snapshot"):
            other.restore(bad)
    good = DataSet("ds_t1_1", 1, (0.5,), (0.0,), (1.0,), (2.0,))
    for change in ({"x": (0.5, 0.6)}, {"x": (), "t": (), "u": (), "y": ()}, {"u": (float("nan"),)}):
        broken = PackState(1, 4, 1, None, 1, [msgspec.structs.replace(good, **change)])
        with pytest.raises(EnvironmentInputError, match="data set 'ds_t1_1' of a snapshot"):
            other.restore(encode(broken))
    other.restore(encode(PackState(1, 4, 1, None, 1, [good])))


def test_another_pack_starts_afresh() -> None:
    environment = started()
    first_task(environment)
    assert "Data sets of the pack: none" in environment.reset(task(1, pack_seed=5))


def test_truth_hint_tells_the_equation() -> None:
    hint = truth_hint(PdeDiscovery(SPEC.options("train")), task())
    assert hint.startswith("Hints: ") and "f(u) = -1.07*u**5 + 1.88*u**2/(1+u**2)" in hint
