"""What ``cod`` answers, in which form, with which exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cod_async.cli import main

ROOT = Path(__file__).resolve().parents[3]
DOOR = str(ROOT / "configs" / "ci" / "door.toml")


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = main(arguments)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def answer(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    code, out, err = run(capsys, *arguments, "--json")
    assert code == 0, err
    return json.loads(out)


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["env", "--help"], *([name, "--help"] for name in ("train", "bootstrap", "eval", "credit",
      "ledger", "inspect", "plot", "replay", "export", "doctor", "coordinator", "actor", "learner", "engine",
      "weights"))],
    ids=" ".join,
)  # fmt: skip
def test_every_command_explains_itself(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    code, out, _ = run(capsys, *arguments)
    assert code == 0 and "Usage: cod" in out


@pytest.mark.parametrize(
    "arguments", [["trian"], ["train", "--nonsense"], ["actor", "somewhere"], ["env", "show"], []]
)
def test_wrong_usage_is_exit_code_2(capsys: pytest.CaptureFixture[str], arguments: list[str]) -> None:
    assert run(capsys, *arguments)[0] == 2


def test_wrong_input_lists_everything_without_a_traceback(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        "lr = 3\n[learner]\nbetas = [0.9, 3.0]\n[engine]\ntop_p = 0.5\n[lifecycle]\ngroup_size = 1\n"
        '[model]\npath = "/nowhere"\n[[environments]]\nname = "hidden_button"\npreset = "door"\n'
    )
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    code, out, err = run(
        capsys, "train", str(path), "--set", f'run.output_dir="{tmp_path}"', "--name", "taken"
    )
    assert code == 2 and out == ""
    starts = [line.partition(":")[0] for line in err.splitlines()]
    assert starts == [
        "lr", "learner.betas.1", "environments.0.name", "lifecycle.group_size", "model.path", "engine.top_p",
        str(tmp_path / "taken"),
    ]  # fmt: skip
    assert "Traceback" not in err
    assert [entry.name for entry in (tmp_path / "taken").iterdir()] == ["file"]  # nothing was started


def test_dry_run_shows_configuration_and_plan_and_makes_nothing(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    sets = ["--set", f'run.output_dir="{tmp_path}"', "--set", "learner.lr=2e-6", "--name", "trial"]
    found = answer(capsys, "train", DOOR, *sets, "--dry-run")
    assert found["run_dir"] == str(tmp_path / "trial")
    assert found["config"]["learner"]["lr"] == 2e-6
    assert found["config"]["run"]["name"] == "trial"
    # 8 groups of 8 lifecycles of 4 solves and 3 updates
    # every task is a single press
    per_step = found["plan"]["per_step"]
    assert 448 * 10 < per_step.pop("tokens") < 448 * 96
    assert per_step == {
        "packs": 8, "groups": 8, "lifecycles": 64, "segments": 448, "responses": 448,
        "tokens_at_most": 448 * 96, "micro_batches_at_most": 3,
    }  # fmt: skip
    assert found["plan"]["staleness"]["plan_ahead_steps"] == 1
    assert list(tmp_path.iterdir()) == []
    code, out, _ = run(capsys, "train", DOOR, *sets, "--dry-run")
    assert code == 0 and "learner.lr" in out


def test_resume_guards_what_is_being_learned(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(
        capsys, "train", DOOR, "--resume", str(tmp_path), "--name", "x", "--set", "learner.lr=1.0"
    )
    assert code == 2
    assert [line.split(":")[0] for line in err.splitlines()] == [
        f"--resume {tmp_path}",
        DOOR,
        "--name x",
        "--set learner.lr=1.0",
    ]


def test_resume_may_change_how_long(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    resolved = answer(capsys, "train", DOOR, "--set", f'run.output_dir="{tmp_path}"', "--dry-run")["config"]
    (tmp_path / "config.json").write_text(json.dumps(resolved))
    found = answer(capsys, "train", "--resume", str(tmp_path), "--set", "run.num_steps=77", "--dry-run")
    assert found["config"]["run"]["num_steps"] == 77
    assert found["run_dir"] == str(tmp_path)


def test_environments(capsys: pytest.CaptureFixture[str]) -> None:
    listed = answer(capsys, "env", "list")
    assert {entry["name"] for entry in listed} >= {"hidden_buttons", "frozen_lake_obscure"}
    assert set(listed[0]) == {"name", "presets", "positions", "hidden"}
    shown = answer(
        capsys, "env", "show", "frozen_lake_obscure", "--pack-seed", "3", "--record",
        '{"seed": 5, "size": 4, "p": 0.8}',
        "--position", "1", "--pack-size", "4",
    )  # fmt: skip
    assert set(shown) == {"environment", "hidden", "task"}
    assert (
        sorted(shown["hidden"]["mapping"]) == sorted(["Up", "Down", "Left", "Right"])
        or len(shown["hidden"]["mapping"]) == 4
    )
    played = answer(
        capsys,
        "env",
        "play",
        "hidden_buttons",
        "--preset",
        "door",
        "--policy",
        "oracle",
        "--packs",
        "5",
        "--seed",
        "1",
    )
    assert len(played["reward_by_position"]) == 4
    assert set(played["reward_by_position"][0]) == {"mean", "sem"}
    assert played["episodes_per_s"] > 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["env", "show", "nowhere"], "no environment 'nowhere'"),
        (["env", "show", "hidden_buttons", "--record", "{"], "not valid JSON"),
        (["env", "show", "hidden_buttons", "--record", "3"], "expected a JSON object"),
        (["env", "play", "hidden_buttons", "--policy", "clever"], "random"),
        (["env", "play", "hidden_buttons", "--packs", "0"], "at least 1"),
        (["credit", "/nowhere.json"], "cannot be read"),
        (["ledger", "/nowhere"], "no config.json"),
        (["inspect", "/nowhere"], "no config.json"),
        (["plot", "/nowhere"], "no config.json"),
        (["export", "/nowhere", "/out"], "no config.json"),
        (["coordinator", "/nowhere"], "no config.json"),
        (["actor", "/nowhere", "--name", "a"], "no config.json"),
        (["learner", "/nowhere"], "no config.json"),
        (["engine", "/nowhere", "--name", "engine-0"], "no config.json"),
        (["weights", "/nowhere"], "no config.json"),
        (["weights"], "give either RUN"),
        (["weights", "--from", "tcp://127.0.0.1:1"], "--from needs --cache"),
        (["doctor", "/nowhere.toml"], "cannot be read"),
        (["train", "/nowhere.toml"], "cannot be read"),
        (["train"], "no configuration"),
        (["bootstrap", DOOR, "--out", str(ROOT)], "exists already"),
        (["eval", "/nowhere"], "no such folder"),
        (["eval", "/nowhere", "--preset", "door"], "needs --environment"),
    ],
)
def test_wrong_input_is_named(capsys: pytest.CaptureFixture[str], arguments: list[str], message: str) -> None:
    code, _, err = run(capsys, *arguments)
    assert code == 2
    assert message in err and "Traceback" not in err


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (
            ["env", "show", "frozen_lake_obscure", "--pack-seed", "-1", "--position", "9", "--record", "{}"],
            ["pack seed is -1", "position is 9", "record: seed", "record: size", "record: p"],
        ),
        (
            ["env", "show", "hidden_buttons", "--preset", "gate", "--pack-size", "0", "--position", "-1"],
            ["pack size is 0", "position is -1", "no preset 'gate'"],
        ),
        (
            ["env", "play", "hidden_buttons", "--policy", "x", "--packs", "0", "--seed", "-1"],
            ["no policy 'x'", "number of packs is 0", "seed is -1"],
        ),
        (
            ["eval", "/nowhere", "--split", "x", "--packs", "-1", "--environment", "y"],
            ["/nowhere: no such folder", "--split x", "--packs -1", "no environment 'y'"],
        ),
        (
            ["eval", "/nowhere", "--environment", "hidden_buttons", "--config", "/no.toml"],
            ["/nowhere: no such folder", "/no.toml: cannot be read"],
        ),
        (
            ["bootstrap", DOOR, "--out", str(ROOT), "--set", "lerner.lr=1", "--set", "engine.urls=['x']"],
            ["lerner: unknown key", "engine.urls", "--out"],
        ),
        (["bootstrap", DOOR, "--out", "/proc/no/model", "--progress", "/no/file"], ["--out", "--progress"]),
        (["export", "/nowhere", str(ROOT)], ["/nowhere: no config.json", "exists already"]),
        (["export", "/nowhere", "/proc/no/model"], ["/nowhere: no config.json", "not writable"]),
    ],
    ids=lambda value: " ".join(value)[:40],
)
def test_every_problem_of_the_flags_is_listed(
    capsys: pytest.CaptureFixture[str], arguments: list[str], wanted: list[str]
) -> None:
    code, out, err = run(capsys, *arguments)
    lines = err.splitlines()
    assert code == 2 and out == "" and len(lines) == len(wanted), err
    assert all(words in line for words, line in zip(wanted, lines, strict=True)), err


def test_export_never_replaces_a_folder_with_something_in_it(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    code, _, err = run(capsys, "export", str(tmp_path), str(tmp_path))
    assert code == 2 and "exists already" in err
    assert (tmp_path / "config.json").read_text() == "{}"


def test_a_folder_without_a_readable_database_is_wrong_input(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text("{}")
    for words in ("no run database", "cannot be read as a run database"):
        for command in ("ledger", "inspect"):
            code, _, err = run(capsys, command, str(tmp_path))
            assert code == 2 and words in err
        (tmp_path / "run.sqlite").write_text("no database at all")


def test_a_model_without_a_tokenizer_is_not_taken_for_a_run(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "qwen3"}')
    code, _, err = run(capsys, "eval", str(tmp_path), "--environment", "hidden_buttons")
    assert code == 2 and err.splitlines() == [
        f"{tmp_path}: a model directory without tokenizer.json; add the model's tokenizer"
    ]


def test_credit(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    lifecycle = {
        "pack": "p",
        "taskset": "t",
        "update_rewards": [0.0],
        "solve_tokens": [3, 3],
        "update_tokens": [2],
    }
    request = {
        "style": "mean", "window": None, "gamma": None, "baseline": "group_mean", "std": "none", "red": "off",
        "red_level": "batch", "parity": False,
        "lifecycles": [
            {**lifecycle, "lifecycle": 0, "task_rewards": [0.0, 1.0]},
            {**lifecycle, "lifecycle": 1, "task_rewards": [0.0, 0.0]},
        ],
    }  # fmt: skip
    path = tmp_path / "rewards.json"
    path.write_text(json.dumps(request))
    found = answer(capsys, "credit", str(path))
    episodes = {(e["lifecycle"], e["kind"], e["position"]): e for e in found["episodes"]}
    # Mean of the rewards from position 0 on: (0 + 1) / 2 against (0 + 0) / 2, baseline their mean.
    first = episodes[(0, "solve", 0)]
    assert first["return"] == pytest.approx(0.5)
    assert first["baseline"] == pytest.approx(0.25)
    assert first["advantage"] == pytest.approx(0.25)
    assert episodes[(1, "solve", 1)]["advantage"] == pytest.approx(-0.5)
    assert run(capsys, "credit", str(path))[0] == 0


def test_bootstrap_and_eval_of_a_model_directory(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    out = tmp_path / "model"
    small = [
        "--set",
        "bootstrap.num_steps=3",
        "--set",
        "bootstrap.warmup_steps=1",
        "--set",
        "bootstrap.documents_per_step=4",
    ]
    report = answer(
        capsys, "bootstrap", DOOR, "--out", str(out), "--progress", str(tmp_path / "progress.json"), *small
    )
    assert report["kind"] == "documents" and report["taught"]
    found = answer(
        capsys, "eval", str(out), "--config", DOOR, "--packs", "3", "--lifecycles", "1", "--split", "train",
        "--control", "normal", "--control", "blanked", "--processes", "1", "--out", str(tmp_path / "results"),
    )  # fmt: skip
    assert found["suite"] and found["num_played"] == 6
    assert all(Path(name).is_file() for name in found["plots"])
    assert [(row["control"], row["position"]) for row in found["rows"]] == [
        (control, position) for control in ("normal", "blanked") for position in range(4)
    ]
    assert {"environment", "preset", "mode", "control", "checkpoint", "position", "mean", "sem", "n"} <= set(
        found["rows"][0]
    )
    code, _, err = run(
        capsys,
        "eval",
        str(out),
        "--config",
        DOOR,
        "--split",
        "tain",
        "--control",
        "blank",
        "--packs",
        "-1",
        "--step",
        "3",
        "--suite",
        "some.toml",
        "--carry",
        "nothing",
        "--seed",
        "1",
        "--seed",
        "1",
    )
    assert code == 2 and len(err.splitlines()) == 7
    code, _, err = run(capsys, "eval", str(out))
    assert code == 2 and "--environment" in err
