"""Terminal: the episode as a policy meets it: parsing, endings, observations, metrics, prompts, views."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest

from cod_async.envs import commands
from cod_async.envs.base import StepResult, TaskSpec
from cod_async.envs.terminal import SPEC
from cod_async.envs.terminal.commands import COMMANDS
from cod_async.envs.terminal.env import TerminalSimulator, parse_line
from cod_async.envs.terminal.tasks import make_task

# A chmod task on a local Linux machine: /home/user/workspace/photo.jpg to 600.
CHMOD = 5107385
# A move task on the remote host, local machine Windows.
MOVE = 8126198


def started(seed: int = CHMOD, **options: Any) -> TerminalSimulator:
    environment = TerminalSimulator(SPEC.options("default", options))
    environment.reset(TaskSpec("terminal", "default", options, {"seed": seed}, 0, 0, 8))
    return environment


def step(environment: TerminalSimulator, response: str) -> StepResult:
    return asyncio.run(environment.step(response))


def go(line: str) -> str:
    return f"Let me see. <answer>{line}</answer>"


@pytest.mark.parametrize(
    ("response", "line"),
    [
        ("<answer>ls</answer>", "ls"),
        ("so\n<answer>\n cd docs && ls \n</answer> done", "cd docs && ls"),
        ("<answer></answer>", None),
        ("<answer> \n\t</answer>", None),
        ("ls", None),
        ("</answer>ls<answer>", None),
        ("<answer>ls", None),
        ("<answer>ls</answer><answer>pwd</answer>", None),
        ("", None),
        ("\x00\ud800", None),
        ("<answer>" * 100_000, None),
    ],
)
def test_parse_line(response: str, line: str | None) -> None:
    assert parse_line(response) == line
    result = step(started(), response)
    assert (result.finish == "format_error" and result.is_done) == (line is None)
    assert result.raw_reward == 0.0


def test_first_observation_and_a_turn() -> None:
    environment = TerminalSimulator(SPEC.options("default"))
    first = environment.reset(TaskSpec("terminal", "default", {}, {"seed": CHMOD}, 7, 0, 8))
    assert first == "Step 1/12\nuser@laptop:~$"
    assert step(environment, go("ls")).observation == "Step 2/12\nworkspace/\nuser@laptop:~$"
    assert step(environment, go("cd workspace")).observation == "Step 3/12\nuser@laptop:~/workspace$"


def test_success_ends_at_once() -> None:
    environment = started()
    result = step(environment, go("cd workspace; chmod 600 photo.jpg; cat nope"))
    assert result.is_done and result.finish == "success" and result.raw_reward == 1.0
    assert result.observation == "The task is complete."
    assert result.metrics == {"early_completion": 1.0, "num_error_lines": 1.0, "is_composite": 0.0}
    assert "completed" in environment.feedback()


def test_success_on_the_last_step_is_not_early() -> None:
    environment = started()
    for _ in range(11):
        assert not step(environment, go("pwd")).is_done
    result = step(environment, go("chmod 600 workspace/photo.jpg"))
    assert result.finish == "success" and result.metrics["early_completion"] == 0.0


def test_out_of_steps() -> None:
    environment = started(max_steps=2)
    assert environment.max_steps == 2
    assert not step(environment, go("nonsense")).is_done
    result = step(environment, go("ls"))
    assert result.is_done and result.finish == "out_of_steps" and result.raw_reward == 0.0
    assert result.metrics["num_error_lines"] == 1.0 and result.metrics["early_completion"] == 0.0
    assert "2 command lines" in environment.feedback()


def test_format_error_says_what_was_expected() -> None:
    environment = started()
    result = step(environment, "chmod 600 workspace/photo.jpg")
    assert result.finish == "format_error" and result.metrics["early_completion"] == 0.0
    for text in (result.observation, environment.feedback()):
        assert "<answer>COMMAND LINE</answer>" in text


def test_feedback_of_an_episode_that_was_cut_off() -> None:
    environment = started()
    step(environment, go("ls"))
    assert "cut off" in environment.feedback()


def test_no_step_penalty() -> None:
    assert TerminalSimulator.is_step_penalized is False


def test_step_outside_a_task_is_the_callers_mistake() -> None:
    environment = TerminalSimulator(SPEC.options("default"))
    with pytest.raises(RuntimeError, match="reset"):
        step(environment, go("ls"))
    environment = started()
    step(environment, "?")
    with pytest.raises(RuntimeError, match="reset"):
        step(environment, go("ls"))


def test_system_prompt_names_machines_commands_task_and_rules() -> None:
    environment = started(MOVE)
    prompt = environment.system_prompt()
    for phrase in ("Windows", "192.168.1.38", "Linux server", '"user"', "at most 12", "<answer>", "password"):
        assert phrase in prompt
    assert environment.sentence() in prompt and all(name in prompt for name in COMMANDS)
    assert "{" not in prompt and "## " not in prompt  # hint and length sections are added behind it
    assert (
        "macOS" in started(next(s for s in range(99) if make_task(s, 0.5).local_os == "mac")).system_prompt()
    )


def test_sentences_are_complete_for_every_type() -> None:
    seen = set()
    for seed in range(400):
        environment = started(seed)
        view = environment.task_view()
        seen.add(view["type"])
        assert "{" not in view["sentence"]
        for fact in (*view["paths"].values(), *view["words"].values()):
            assert (
                fact in view["sentence"] or view["type"] == "pack_upload" or fact == view["words"].get("name")
            )
    assert len(seen) == 17


def test_views() -> None:
    environment = started(MOVE)
    assert environment.hidden() == {} and environment.snapshot() == b""
    assert environment.task_view() == {
        "type": "move",
        "sentence": environment.sentence(),
        "local_os": "windows",
        "remote_host": "192.168.1.38",
        "remote_user": "user",
        "is_composite": False,
        "paths": {
            "source": "user@192.168.1.38:/opt/uploads/index.html",
            "destination": "user@192.168.1.38:/home/user",
        },
        "words": {},
    }
    shown = commands.show("terminal", record={"seed": MOVE})
    assert shown == {"environment": "terminal", "hidden": {}, "task": environment.task_view()}
    json.dumps(shown, allow_nan=False)


def test_pack_seed_and_position_have_no_effect() -> None:
    views = []
    for pack_seed, position in ((0, 0), ((1 << 64) - 1, 5)):
        environment = TerminalSimulator(SPEC.options("default"))
        environment.reset(TaskSpec("terminal", "default", {}, {"seed": MOVE}, pack_seed, position, 8))
        views.append((environment.task_view(), environment.system_prompt()))
    assert views[0] == views[1]


def test_goals_are_about_content_not_names() -> None:
    """A file of the right name with other content is not the file."""
    environment = started(MOVE)
    login = "ssh user@192.168.1.38"
    assert not step(environment, go(f"{login} touch /home/user/index.html")).is_done
    assert not step(environment, go(f"{login} rm /opt/uploads/index.html")).is_done
    environment = started(MOVE)
    assert step(environment, go(f"{login} mv /opt/uploads/index.html /home/user")).finish == "success"
