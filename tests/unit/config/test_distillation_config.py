"""What a configuration says about teachers: contradictions are refused, all of them, before any start."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from cod_async.bootstrap.run import run_bootstrap
from cod_async.config import load_config
from cod_async.config.check import check
from cod_async.config.load import apply_overrides, save_resolved
from cod_async.config.schema import Config
from cod_async.errors import InputError
from cod_async.launch.phases import check_teachers
from cod_async.models.tokenizers import write_word_tokenizer

ROOT = Path(__file__).resolve().parents[3]
CI = ROOT / "configs" / "ci" / "opd_door.toml"
DOOR = {"environment": "hidden_buttons", "preset": "door"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with two models of one vocabulary, ``a`` and ``b``."""
    folder = tmp_path_factory.mktemp("models")
    for name in ("a", "b"):
        quick = ["bootstrap.num_steps=1", "bootstrap.warmup_steps=0", "bootstrap.documents_per_step=2"]
        run_bootstrap(load_config([CI], quick), folder / name, lambda values: None)
    return folder


def toml(table: dict[str, str]) -> str:
    return "{" + ", ".join(f'{key} = "{value}"' for key, value in table.items()) + "}"


def made(models: Path, *overrides: str) -> Config:
    paths = [f'distillation.teachers.{i}.path="{models / name}"' for i, name in enumerate("ab")]
    config: Config = load_config([CI], [*paths, f'run.output_dir="{models}"', *overrides])
    return config


def teachers(*tables: dict[str, str]) -> str:
    return f"distillation.teachers=[{', '.join(map(toml, tables))}]"


def test_the_shipped_configuration_is_whole(models: Path) -> None:
    assert check(made(models)) == []
    assert check(made(models, f'model.path="{models / "b"}"')) == []


def test_one_teacher_for_all_presets_and_relative_paths(
    models: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(models)
    config = made(models, teachers({"environment": "hidden_buttons", "path": "a"}))
    assert check(config) == []
    monkeypatch.chdir(tmp_path)  # as a resume from elsewhere would
    again = load_config([save_resolved(config, tmp_path)])
    assert again == config and again.distillation.teachers[0].path == str(models / "a")
    for preset in ("door", "cross"):
        assert config.distillation.teacher_of("hidden_buttons", preset) is config.distillation.teachers[0]
    assert config.distillation.teacher_of("hidden_matches", "rooms") is None


@pytest.mark.parametrize(
    ("override", "path", "part"),
    [
        ("distillation.teachers=[]", "distillation.teachers", "learns from nothing else"),
        ("loss.preset=paper", "distillation.teachers", '2 given, but loss.preset = "paper" reads none'),
        ("loss.kl_coef=0.5", "loss.kl_coef", "exact for 1 alone"),
        ("loss.kl=k3", "loss.kl", "only k2 has the gradient"),
        ("loss.clip=ppo", "loss.clip", "no advantage"),
        ("loss.ratio=segment", "loss.ratio", "no advantage"),
        ("loss.proximal=interpolated", "loss.proximal", "no advantage"),
        ("loss.behavior_weight=truncated", "loss.behavior_weight", "corrected for already"),
        ("loss.segment_mask=geometric_mean", "loss.segment_mask", "corrected for already"),
        ("credit_assignment.red=bisection", "credit_assignment.red", "only logs"),
        ("credit_assignment.std=group", "credit_assignment.std", "only logs"),
        (teachers(DOOR | {"path": "{a}"}), "environments.1", "cross has no teacher"),
        (teachers({"environment": "hidden_buttons", "path": "{a}"}, DOOR | {"path": "{b}"}),
         "environments.0", "has several teachers, distillation.teachers [0, 1]"),
        (teachers({"environment": "hidden_buttons", "path": "{a}"},
                  {"environment": "hidden_matches", "path": "{b}"}),
         "distillation.teachers.1", "none of the environments"),
        ('distillation.teachers.0.path=""', "distillation.teachers.0", "neither path nor url"),
        ("distillation.teachers.0.url=http://127.0.0.1:1", "distillation.teachers.0", "both path and url"),
        ("distillation.teachers.0.api_key_env=KEY", "distillation.teachers.0.api_key_env", "without url"),
        ('distillation.teachers.0.path="/nowhere"', "distillation.teachers.0.path", "lacks config.json"),
        ("model.max_context_tokens=5000", "distillation.teachers.0.path", "takes rows of"),
    ],
)  # fmt: skip
def test_contradictions_are_refused(models: Path, override: str, path: str, part: str) -> None:
    override = override.replace("{a}", str(models / "a")).replace("{b}", str(models / "b"))
    found = check(made(models, override))
    hits = [problem for problem in found if problem.startswith((f"{path}: ", f"{path} "))]
    assert any(part in problem for problem in hits), found


def test_all_problems_come_at_once(models: Path) -> None:
    found = check(made(models, "loss.kl=k1", "credit_assignment.red=bisection", "distillation.teachers=[]"))
    assert len(found) == 3


def test_settings_that_nothing_reads(models: Path) -> None:
    found = check(made(models, "loss.preset=paper", "distillation.max_retries=1", "lifecycle.group_size=2"))
    assert [problem.split(":")[0] for problem in found] == [
        "distillation.teachers",
        "distillation.max_retries",
    ]


def test_groups_of_one_are_for_teachers_only(models: Path) -> None:
    assert check(made(models, "lifecycle.group_size=1")) == []
    bare = apply_overrides(made(models), ["loss.preset=paper", "distillation.teachers=[]"])
    assert any("makes every group a singleton" in problem for problem in check(bare))


def test_a_teacher_needs_the_students_vocabulary(models: Path, tmp_path: Path) -> None:
    for path in (models / "a").iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    write_word_tokenizer(tmp_path, ["another", "language"], 96)
    student = f'model.path="{models / "b"}"'
    (problem,) = check(made(models, student, f'distillation.teachers.0.path="{tmp_path}"'))
    assert problem.startswith("distillation.teachers.0.path: ") and "another tokenizer" in problem
    # Without a student to look at (the bootstrap will make it) it is found out when that is there.
    config = made(models, f'distillation.teachers.0.path="{tmp_path}"')
    assert check(config) == []
    run_dir = tmp_path / "run"
    shutil.copytree(models / "b", run_dir / "model")
    with pytest.raises(InputError, match=r"distillation\.teachers\.0\.path: .*another tokenizer"):
        check_teachers(run_dir, config)
    check_teachers(run_dir, made(models))


@pytest.mark.parametrize(
    ("settings", "part"),
    [
        (["engine.temperature=0.8"], "at temperature 1 only"),
        (['distillation.teachers.0.url="http://10.1.2.3:30000"'], "is another machine"),
        (['distillation.teachers.0.url="nonsense"'], "not a server"),
        (['distillation.teachers.0.api_key_env="COD_NO_SUCH_KEY"'], 'variable "COD_NO_SUCH_KEY" is not set'),
    ],
)
def test_servers_as_teachers(models: Path, settings: list[str], part: str) -> None:
    assert "COD_NO_SUCH_KEY" not in os.environ
    table = {"environment": "hidden_buttons", "url": "http://127.0.0.1:30000"}
    whole = made(models, teachers(table))
    assert check(whole) == []
    (problem,) = check(apply_overrides(whole, settings))
    assert part in problem


def test_a_plan_needs_no_teachers(models: Path) -> None:
    missing = made(models, 'distillation.teachers.0.path="/nowhere"')
    assert len(check(missing)) == 1
    assert check(missing, needs_weights=False) == []
