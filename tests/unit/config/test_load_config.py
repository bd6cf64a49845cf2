"""Files and overrides become a configuration, or one error with every problem."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_async.config import Config, config_digest, load_config, load_resolved, save_resolved
from cod_async.config.load import apply_overrides, read_config, to_tree
from cod_async.config.validate import find_problems
from cod_async.durable import write_atomic
from cod_async.errors import ConfigError

MINIMAL = '[[environments]]\nname = "hidden_buttons"\npreset = "door"\n'


@pytest.fixture
def minimal(tmp_path: Path) -> Path:
    path = tmp_path / "minimal.toml"
    path.write_text(MINIMAL)
    return path


def problems_of(*arguments: Any) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        load_config(*arguments)
    return list(caught.value.problems)


def test_defaults_files_and_overrides_in_that_order(minimal: Path, tmp_path: Path) -> None:
    top = tmp_path / "top.toml"
    top.write_text("[learner]\nlr = 3e-4\nbetas = [0.8, 0.9]\n[run]\nnum_steps = 7\n")
    config = load_config([minimal, top], ["learner.lr=2e-6", "run.name=trial", "learner.lr=1e-6"])
    assert config.learner.lr == 1e-6  # the last override wins over earlier ones and over files
    assert config.learner.betas == (0.8, 0.9)  # files over defaults
    assert config.run.num_steps == 7
    assert config.run.name == "trial"
    assert config.learner.grad_clip == 1.0  # default
    assert config.environments[0].preset == "door"  # tables of the first file survive the second


def test_overrides_have_toml_types_and_reach_list_items(minimal: Path) -> None:
    config = load_config(
        [minimal],
        [
            'environments.0.preset="cross"', "environments.0.options.num_buttons=4",
            "run.early_stop.is_enabled=true", "learner.betas=[0.5, 0.6]",
            "bootstrap.lr=1e-2", "credit_assignment.window=3", "loss.kl_coef=1",
        ],
    )  # fmt: skip
    assert config.environments[0].preset == "cross"
    assert config.environments[0].options == {"num_buttons": 4}
    assert config.run.early_stop.is_enabled is True
    assert config.learner.betas == (0.5, 0.6)
    assert config.credit_assignment.window == 3
    assert config.loss.kl_coef == 1.0 and isinstance(config.loss.kl_coef, float)


def test_every_problem_is_reported_at_once(tmp_path: Path) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        'lr = 3\n[run]\nname = "a b"\nseed = -1\nnum_step = 4\n[run.early_stop]\ngap = '
        'inf\n[lifecycle]\ncarry = "hints"\n'
        '[learner]\nlr = "1e-4"\nbetas = [0.9]\nnum_threads = 1.5\n[store]\nretention = 3\n[engine]\nurls = '
        '"x"\n'
        '[[environments]]\npreset = "door"\nweight = true\n[environments.options]\nday = 1979-05-27\n'
    )
    found = problems_of(
        [path, tmp_path / "missing.toml"], ["a", "environments.3.name=x", "learner.warmup_steps=["]
    )
    expected = {
        "lr: unknown key": "bootstrap.lr or learner.lr",
        "run.name: does not match": "letters, digits",
        "run.seed: out of range, found -1": ">= 0",
        "run.num_step: unknown key": "did you mean run.num_steps?",
        "run.early_stop.gap: must be finite": "write a number",
        "lifecycle.carry: unknown choice": 'did you mean "hint"?',
        'learner.lr: expected a number, found "1e-4"': "without quotes",
        "learner.betas: expected a list of 2 values": "write 2",
        "learner.num_threads: expected a whole number, found 1.5": "without a fraction",
        "store.retention: unknown choice, found 3": '"until_checkpoint"',
        "engine.urls: expected a list": "[ ]",
        "environments.0.name: missing": "[[environments]]",
        "environments.0.weight: expected a number, found true": "write a number",
        "environments.0.options.day: values of type date": "quote it",
        f"{tmp_path / 'missing.toml'}: cannot be read": "existing configuration file",
        "--set a: not of the form": "learner.lr=2e-6",
        "--set environments.3.name=x": "items 0 to 0",
        "--set learner.warmup_steps=[": "not a TOML value",
    }
    for start, advice in expected.items():
        matching = [problem for problem in found if problem.startswith(start)]
        assert len(matching) == 1, (start, found)
        assert advice in matching[0]
    assert len(found) == len(expected)


def test_no_environment_is_missing_not_a_crash() -> None:
    assert problems_of([], ["run.name=x"])[0].startswith(
        "environments: missing; add at least one [[environments]]"
    )


def test_what_could_be_read_is_returned_beside_the_problems(minimal: Path) -> None:
    config, problems = read_config([minimal], ["learner.betas=[0.9, 3.0]", "run.nme=x", "run.num_steps=9"])
    assert [problem.partition(":")[0] for problem in problems] == ["learner.betas.1", "run.nme"] or len(
        problems
    ) == 2
    assert config is not None
    assert config.learner.betas == (0.9, 0.999)
    assert config.run.num_steps == 9


@pytest.mark.parametrize("text", ["a = [", "\x00", "a = 1\na = 2", "[" * 3000])
def test_broken_toml_is_one_problem_with_the_file(tmp_path: Path, text: str) -> None:
    path = tmp_path / "broken.toml"
    path.write_text(text)
    assert problems_of([path])[0].startswith(f"{path}: not valid TOML")


def test_bytes_that_are_no_text_are_one_problem(tmp_path: Path) -> None:
    path = tmp_path / "binary.toml"
    path.write_bytes(b"\xff\xfe\x00")
    assert "not UTF-8" in problems_of([path])[0]


@pytest.mark.parametrize(
    "override", ["run.seed=99999999999999999999", "run.seed=1\nrun.name='x'", "=3", "run..seed=1"]
)
def test_strange_overrides_are_refused(minimal: Path, override: str) -> None:
    assert len(problems_of([minimal], [override])) == 1


def test_resolved_configuration_survives_the_folder(minimal: Path, tmp_path: Path) -> None:
    config = load_config(
        [minimal], ["environments.0.options.depth=[1, {a = 2.5}]", "credit_assignment.gamma=0.5"]
    )
    save_resolved(config, tmp_path)
    again = load_resolved(tmp_path)
    assert again == config
    assert config_digest(again) == config_digest(config)
    assert load_config([tmp_path / "config.json"]) == config  # machine-written JSON is a valid input
    assert to_tree(config) == json.loads((tmp_path / "config.json").read_text())


def test_digest_tells_settings_apart(minimal: Path) -> None:
    one, two = load_config([minimal]), load_config([minimal], ["learner.lr=1e-5"])
    assert config_digest(one) == config_digest(load_config([minimal]))
    assert config_digest(one) != config_digest(two)
    assert len(config_digest(one)) == 64


def test_resume_overrides_apply_to_a_resolved_configuration(minimal: Path) -> None:
    config = apply_overrides(load_config([minimal]), ["run.num_steps=3", "environments.0.weight=2.0"])
    assert config.run.num_steps == 3
    assert config.environments[0].weight == 2.0
    with pytest.raises(ConfigError, match=r"run\.num_step: unknown key"):
        apply_overrides(config, ["run.num_step=3"])


def test_a_folder_without_configuration_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is not a run folder"):
        load_resolved(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_resolved(tmp_path)


def test_atomic_write_leaves_no_temporary_files(tmp_path: Path) -> None:
    target = tmp_path / "value.json"
    for text in (b"one", b"two"):
        write_atomic(target, text)
    assert target.read_bytes() == b"two"
    assert [path.name for path in tmp_path.iterdir()] == ["value.json"]


plain = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=8,
)
known_names = st.sampled_from([*Config.__struct_fields__, "lr", "seed", "name", "preset", "weight"])
trees = st.dictionaries(
    known_names | st.text(max_size=6), plain | st.dictionaries(known_names, plain, max_size=3), max_size=4
)


@given(trees)
def test_the_walk_agrees_with_the_decoder(tree: dict[str, Any]) -> None:
    """No problems found means that conversion succeeds; problems found are always sentences with a path."""
    problems = find_problems(tree)
    if problems:
        assert all(": " in problem for problem in problems)
        return
    msgspec.convert(tree, Config, strict=True)


@given(
    st.dictionaries(
        st.sampled_from(["lr", "betas", "warmup_steps", "num_threads", "grad_clip"]), plain, min_size=1
    )
)
def test_what_the_decoder_refuses_the_walk_refuses(section: dict[str, Any]) -> None:
    tree = {"environments": [{"name": "hidden_buttons", "preset": "door"}], "learner": section}
    try:
        msgspec.convert(tree, Config, strict=True)
    except msgspec.ValidationError:
        assert find_problems(tree)


def test_problems_in_several_environments_are_all_listed(tmp_path: Path) -> None:
    path = tmp_path / "two.toml"
    path.write_text(
        '[[environments]]\nname = "hidden_buttons"\n[[environments]]\nname = "hidden_buttons"\n'
        '[[environments]]\nname = "hidden_buttons"\npreset = "door"\nwait = 3\n[run]\nnum_steps = 9\n'
    )
    config, problems = read_config([path])
    assert [problem.partition(":")[0] for problem in problems] == [
        "environments.0.preset", "environments.1.preset", "environments.2.wait",
    ]  # fmt: skip
    assert config is not None and config.environments == () and config.run.num_steps == 9


def test_digits_of_other_scripts_are_no_index(minimal: Path) -> None:
    (problem,) = problems_of([minimal], ["environments.².preset=door"])
    assert "no item ²" in problem


@pytest.mark.parametrize("number", ["1" + "0" * 400, "0x" + "f" * 4000])
@pytest.mark.parametrize("name", ["lr", "warmup_steps", "nonsense"])
def test_numbers_beyond_every_type_are_a_problem_not_a_crash(minimal: Path, name: str, number: str) -> None:
    (problem,) = problems_of([minimal], [f"learner.{name}={number}"])
    assert problem.startswith(f"learner.{name}: ") and len(problem) < 300


def test_an_integer_of_thousands_of_digits_is_no_valid_file(tmp_path: Path) -> None:
    path = tmp_path / "long.toml"
    path.write_text(f"[learner]\nlr = {'1' * 5000}\n")
    assert problems_of([path])[0].startswith(f"{path}: not valid TOML")
