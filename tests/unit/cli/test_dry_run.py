"""``cod train --dry-run``: what it counts, and every kind of wrong input at once, before anything starts."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from cod_async.cli import main
from cod_async.commands import turns
from cod_async.commands.turns import count_tokens
from cod_async.envs import registry
from cod_async.envs.base import EnvironmentSpec
from cod_async.lifecycle.packs import plan_pack

ROOT = Path(__file__).resolve().parents[3]


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(["train", *arguments, "--dry-run"])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def planned(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = dry_run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)["plan"]


def config_file(tmp_path: Path, text: str) -> str:
    path = tmp_path / "run.toml"
    path.write_text(f'run.output_dir = "{tmp_path}"\n{text}')
    return str(path)


def test_the_step_is_divided_over_the_mixture(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "200")  # a narrow table breaks its headings
    path = config_file(
        tmp_path,
        '[[environments]]\nname = "optimal_control"\npreset = "hard"\nweight = 3.0\n'
        '[[environments]]\nname = "grid_navigation"\npreset = "train_27b"\n'
        "[lifecycle]\nmax_response_tokens = 300\nmax_hint_tokens = 200\n"
        "[learner]\ngroups_per_step = 6\ntokens_per_micro_batch = 8192\n[model]\nmax_context_tokens = 8192\n",
    )
    plan = planned(capsys, path)
    control, grid = plan["environments"]
    assert [row["packs"] for row in (control, grid)] == [4.5, 1.5]
    assert [row["lifecycles"] for row in (control, grid)] == [36, 12]
    assert [(row["solves"], row["updates"]) for row in (control, grid)] == [(144, 108), (48, 36)]
    assert control["turns_per_solve"] == {"random": 1, "oracle": 1, "at_most": 1}
    assert control["responses"] == 144 + 108
    assert 3 <= grid["turns_per_solve"]["oracle"] <= 5 == grid["turns_per_solve"]["at_most"]
    for row in (control, grid):
        assert 0 < row["tokens"] < row["tokens_at_most"]
    per_step = plan["per_step"]
    assert (per_step["packs"], per_step["lifecycles"], per_step["segments"]) == (6, 48, 336)
    for name in ("responses", "tokens", "tokens_at_most"):
        assert per_step[name] == control[name] + grid[name]
    assert per_step["tokens_at_most"] == 336 * 8192
    code, out, _ = dry_run(capsys, path)
    assert code == 0 and "turns_per_solve" in out and "per_step.tokens" in out


def test_turns_are_those_of_the_policies(capsys: pytest.CaptureFixture[str]) -> None:
    """The oracle of Grid Navigation plays every round, so its turns are the rounds of the tasks."""
    plan = planned(capsys, str(ROOT / "configs" / "paper" / "grid_navigation.toml"))
    config = msgspec.convert(
        [{"name": "grid_navigation", "preset": "train_8b"}], list[turns.EnvironmentConfig]
    )
    spec = registry.get("grid_navigation")
    rounds = []
    for group in range(turns.NUM_TASKS // 4):
        environment = spec.make(spec.options("train_8b"))
        for task in plan_pack(config, 4, 42, group).tasks():
            environment.reset(task)
            rounds.append(environment.task_view()["rounds"])
    assert plan["environments"][0]["turns_per_solve"]["oracle"] == pytest.approx(
        sum(rounds) / len(rounds), abs=1e-3
    )


@pytest.mark.parametrize(
    ("environment", "sets", "saved"),
    [
        # solves: responses, hints; updates: responses in the record, hints before, hints written
        ("learn2ask", [], 4 * 500 + 3 * 500 + 3 * 500 + 2 * 500 + 3 * 500),
        ("optimal_control", [], 4 * 500 + 3 * 500 + 2 * 500 + 3 * 500),  # its record has the bare controller
        ("learn2ask", ['lifecycle.carry="none"'], 4 * 500),
        ("learn2ask", ['lifecycle.carry="transcript"'], 4 * 500),
        (
            "learn2ask",
            ['lifecycle.carry="transcript"', "lifecycle.has_transcript_updates=true"],
            4 * 500 + 3 * 500,
        ),
    ],
    ids=["hint", "own record", "none", "transcript", "transcript with updates"],
)
def test_shorter_responses_save_what_they_are_part_of(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, environment: str, sets: list[str], saved: int
) -> None:
    spec = registry.get(environment)
    path = config_file(
        tmp_path,
        f'[[environments]]\nname = "{environment}"\npreset = "{spec.default_preset}"\n'
        "[lifecycle]\nmax_response_tokens = 2000\nmax_hint_tokens = 2000\n"
        "[model]\nmax_context_tokens = 30000\n"
        "[learner]\ngroups_per_step = 1\ntokens_per_micro_batch = 30000\n",
    )
    overrides = [argument for value in sets for argument in ("--set", value)]
    tokens = [
        planned(capsys, path, *overrides, "--set", f"lifecycle.length_notice_tokens={notice}")["per_step"]
        for notice in (999, 499)  # as many digits, so that the prompts are equally long
    ]
    assert tokens[0]["tokens"] - tokens[1]["tokens"] == 8 * saved


def test_a_transcript_is_one_row(capsys: pytest.CaptureFixture[str]) -> None:
    plan = planned(capsys, str(ROOT / "configs" / "ci" / "transcript_cpu.toml"))
    assert plan["per_step"]["tokens_at_most"] == 2 * 65536
    assert 32_000 < plan["per_step"]["tokens"] / 2 <= 65536


def test_prompts_are_cut_as_a_large_vocabulary_cuts_them() -> None:
    cut = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    for name, preset in (
        ("frozen_lake_obscure", "hard"),
        ("grid_navigation", "eval"),
        ("terminal", "default"),
    ):
        spec = registry.get(name)
        environment = spec.make(spec.options(preset))
        mixture = msgspec.convert([{"name": name, "preset": preset}], list[turns.EnvironmentConfig])
        observation = environment.reset(plan_pack(mixture, 4, 0, 0).tasks()[0])
        for text in (environment.system_prompt(), observation):
            assert count_tokens(text) == pytest.approx(len(cut.pre_tokenize_str(text)), rel=0.15)
    assert count_tokens("Move 12 steps.\n") == len(["Move", " ", "1", "2", " steps", ".\n"])


def test_an_environment_with_a_judge_is_not_played(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a plan opened a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    judge = 'judge = "endpoint", judge_url = "http://127.0.0.1:9/v1", judge_model = "judge"'
    path = config_file(
        tmp_path, f'[[environments]]\nname = "learn2ask"\npreset = "default"\noptions = {{ {judge} }}\n'
    )
    [row] = planned(capsys, path)["environments"]
    assert row["turns_per_solve"] == {"at_most": 1}
    assert row["responses"] == 128 * 7 and row["tokens"] > 0


def test_an_environment_that_breaks_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def act(*_: object) -> str:
        raise ZeroDivisionError("out of luck")

    def get(name: str, get: Any = registry.get) -> EnvironmentSpec:
        return msgspec.structs.replace(get(name), policies={"random": lambda seed: act, "oracle": None})

    monkeypatch.setattr(turns.registry, "get", get)
    code, out, err = dry_run(capsys, str(ROOT / "configs" / "ci" / "door.toml"))
    assert code == 1 and out == ""
    assert "environments.0: hidden_buttons failed" in err and "ZeroDivisionError: out of luck" in err


WRONG = """
[[environments]]
name = "frozen_lake"
preset = "easy"
[[environments]]
name = "frozen_lake_obscure"
preset = "medium"
[[environments]]
name = "alchemy_random"
preset = "easy"
options = {{ max_round = 3 }}
[[environments]]
name = "grid_navigation"
preset = "eval"
options = {{ size_min = 9, size_max = 8, rounds_min = 5, rounds_max = 2 }}
[[environments]]
name = "learn2ask"
preset = "default"
options = {{ path = "{dialogues}" }}
[[environments]]
name = "learn2ask"
preset = "default"
[lifecycle]
pack_size = 100
solve_length_free_tokens = 9
solve_length_full_tokens = 4
"""
EXPECTED = [
    ("environments.0.name: ", "no environment 'frozen_lake'"),
    ("environments.1: ", "no preset 'medium'; presets are easy, hard"),
    ("environments.2: ", "unknown option max_round"),
    ("environments.3: ", "size_min is 9 but size_max is 8"),
    ("environments.3: ", "rounds_min is 5 but rounds_max is 2"),
    ("environments.4: ", "dialogues.jsonl:2: is not JSON"),
    ("environments.4: ", "dialogues.jsonl:4: "),
    ("environments.5: ", "83 records, a pack needs 100"),
    ("lifecycle.solve_length_full_tokens: ", "4 is not above"),
]


@pytest.mark.parametrize("is_dry_run", [True, False])
def test_everything_wrong_is_listed_at_once(tmp_path: Path, is_dry_run: bool) -> None:
    sample = (ROOT / "cod_async" / "envs" / "learn2ask" / "sample.jsonl").read_text().splitlines()
    dialogues = tmp_path / "dialogues.jsonl"
    dialogues.write_text("\n".join([sample[0], '{"broken', sample[1], '{"id": "x"}', sample[2]]) + "\n")
    path = config_file(tmp_path, WRONG.format(dialogues=dialogues))
    before = sorted(tmp_path.iterdir())
    command = [sys.executable, "-m", "cod_async", "train", path, *(["--dry-run"] if is_dry_run else [])]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=60)
    assert done.returncode == 2 and done.stdout == ""
    lines = done.stderr.splitlines()
    for line, (start, text) in zip(lines, EXPECTED, strict=True):
        assert line.startswith(start) and text in line
    assert sorted(tmp_path.iterdir()) == before
