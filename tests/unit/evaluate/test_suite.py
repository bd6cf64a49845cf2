"""Suite files: what they mean, and every problem of one at once."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from evaluation_world import config_for, entry

from cod_async.config import load_config
from cod_async.config.check import check
from cod_async.config.schema import EnvironmentConfig
from cod_async.errors import InputError
from cod_async.evaluate.suite import EntryDefaults, Suite, ad_hoc_suite, load_suite, resolve

ROOT = Path(__file__).resolve().parents[3]
SUITES = sorted((ROOT / "configs" / "suites").glob("*.toml"))


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    return path


def problems_of(tmp_path: Path, text: str) -> list[str]:
    path = write(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load_suite(path, config_for())
    assert all(problem.startswith(f"{path}: ") for problem in caught.value.problems)
    return [problem.removeprefix(f"{path}: ") for problem in caught.value.problems]


@pytest.mark.parametrize("path", SUITES, ids=lambda path: path.name)
def test_shipped_suites_are_valid(path: Path) -> None:
    suite, settings = load_suite(path, config_for())
    assert suite.name == path.stem and settings


def test_the_papers_protocol() -> None:
    _, settings = load_suite(ROOT / "configs/suites/paper_8b_a.toml", config_for())
    assert [(s.label, s.mode) for s in settings] == [
        ("frozen_lake_obscure hard", "cod"), ("alchemy_random easy", "cod"),
        ("alchemy_random easy", "ralph_sample"), ("terminal default", "cod"),
        ("terminal default", "ralph_sample"),
    ]  # fmt: skip
    for setting in settings:
        lifecycle = setting.config.lifecycle
        assert (lifecycle.pack_size, setting.num_packs, setting.lifecycles_per_pack) == (8, 0, 1)
        assert (lifecycle.max_response_tokens, lifecycle.length_notice_tokens) == (2000, 1500)
        assert (setting.config.model.max_context_tokens, setting.split) == (32000, "held_out")
        assert setting.is_shuffled and setting.config.engine.temperature == 1.0
    suite, settings = load_suite(ROOT / "configs/suites/paper_27b.toml", config_for())
    assert [s.label for s in settings] == [
        "pde_discovery eval", "optimal_control hard", "grid_navigation eval"
    ]  # fmt: skip
    assert (suite.seeds, suite.data_seed) == ((1, 2, 3), 42)
    assert [s.data_seed for s in settings] == [20260902, None, None]
    assert {(s.num_packs, s.is_shuffled, s.config.lifecycle.max_hint_tokens) for s in settings} == {
        (500, False, 4000)
    }


def test_entries_take_from_themselves_then_defaults_then_the_configuration(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "[defaults]\npack_size = 3\nnum_packs = 5\n"
        '[[entries]]\nenvironment = "hidden_buttons"\npreset = "door"\nnum_packs = 7\n'
        '[[entries]]\nname = "b"\nenvironment = "hidden_buttons"\npreset = "door"\n'
        'strategies = ["cod", "ralph_full"]\nsplits = ["train", "held_out"]\n',
    )
    suite, settings = load_suite(path, config_for(max_hint_tokens=9))
    assert suite.name == "mine" and suite.seeds == (0,)
    assert [(s.label, s.mode, s.split, s.num_packs) for s in settings] == [
        ("hidden_buttons door", "cod", "held_out", 7), ("b", "cod", "train", 5), ("b", "cod", "held_out", 5),
        ("b", "ralph_full", "train", 5), ("b", "ralph_full", "held_out", 5),
    ]  # fmt: skip
    for setting in settings:
        assert (setting.config.lifecycle.pack_size, setting.config.lifecycle.max_hint_tokens) == (3, 9)
        assert setting.lifecycles_per_pack == config_for().evaluation.lifecycles_per_pack


def test_every_problem_of_a_file_is_named(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path,
        'name = "a/b"\nseeds = [1, 1]\nsede = 3\n[defaults]\npack_sise = 4\n'
        '[[entries]]\nenvironment = "hidden_button"\npreset = "door"\n'
        '[[entries]]\nenvironment = "hidden_buttons"\npreset = "gate"\ncarry = "none"\ncontrols = ["truth"]\n'
        '[[entries]]\nenvironment = "hidden_buttons"\npreset = "door"\nnum_packs = 0\nis_shuffled = true\n'
        'strategies = ["kod"]\n'
        '[[entries]]\nenvironment = "hidden_buttons"\npreset = "door"\nnum_packs = 0\nis_shuffled = true\n'
        "max_response_tokens = 96\nsplits = ['train', 'train']\n"
        '[[entries]]\nenvironment = "learn2ask"\npreset = "default"\npack_size = 100\n'
        '[[entries]]\nname = "x"\nenvironment = "hidden_buttons"\npreset = "door"\nnum_packs = 1\n'
        'controls = ["swapped", "swapped"]\n'
        '[[entries]]\nname = "x"\nenvironment = "hidden_buttons"\npreset = "door"\noptions = { doors = 3 }\n',
    )
    starts = [problem.split(";")[0].split(",")[0][:42] for problem in found]
    expected = [
        "sede: unknown key", "defaults.pack_sise: unknown key", "entries.2.strategies.0: unknown choice",
        'name: "a/b" cannot name a folder', "seeds: [1", 'entries: 2 are called "x"',
        "entries.0: no environment", "entries.1: controls: truth needs a hint",
        "entries.1: environment hidden",
        "entries.3: splits: [", "entries.3: num_packs: 0 means the whole",
        "entries.3: is_shuffled: the data of",
        "entries.3: max_response_tokens: 96 leaves", "entries.4: pack_size: 100",
        "entries.5: controls: [", "entries.5: num_packs: 1 leaves no other",
        "entries.6: environment hidden_buttons: unkn",
    ]  # fmt: skip
    missing = [want for want in expected if not any(start.startswith(want[:42]) for start in starts)]
    assert missing == [], found
    # With a section refused, entries are only resolved as far as they can be.
    assert len(found) >= len(expected)


def test_a_key_of_the_configuration_is_not_suggested_in_a_suite(tmp_path: Path) -> None:
    found = problems_of(
        tmp_path, 'group_size = 3\n[[entries]]\nenvironment = "hidden_buttons"\npreset = "door"\n'
    )
    assert len(found) == 1 and "lifecycle.group_size" not in found[0]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "entries"),
        ("entries = []", "entries: none"),
        ("[[entries]", "not valid TOML"),
        ("entries = 3", "expected a list"),
        ("[[entries]]\npreset = 'door'", "entries.0.environment: missing"),
        ("name = 'x' * 3", "not valid TOML"),
    ],
)
def test_broken_files(tmp_path: Path, text: str, words: str) -> None:
    assert any(words in problem for problem in problems_of(tmp_path, text))


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        load_suite(tmp_path / "none.toml", config_for())
    path = tmp_path / "big.toml"
    path.write_bytes(b"#" * (2 << 20))
    with pytest.raises(InputError, match="larger than"):
        load_suite(path, config_for())
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="not valid TOML"):
        load_suite(path, config_for())


def test_what_a_result_depends_on() -> None:
    def identity(**changes: object) -> str:
        (setting,), problems = resolve(Suite(name="t", entries=(entry(**changes),)), config_for())
        assert problems == []
        return str(setting.identity())

    same = [{"num_packs": 9}, {"lifecycles_per_pack": 5}, {"controls": ("blanked",)}, {"name": "else"}]
    other = [
        {"pack_size": 3}, {"carry": "none"}, {"max_response_tokens": 5}, {"max_hint_tokens": 5},
        {"length_notice_tokens": 3}, {"max_context_tokens": 90}, {"solve_penalty": 0.5},
        {"strategies": ("ralph_full",)}, {"splits": ("held_out",)}, {"preset": "cross"},
    ]  # fmt: skip
    assert {identity(**change) for change in same} == {identity()}
    found = {identity(**change) for change in other}
    assert len(found) == len(other) and identity() not in found


def test_the_environments_of_a_run_as_a_suite() -> None:
    config = msgspec.structs.replace(
        config_for(),
        environments=(
            EnvironmentConfig(name="hidden_buttons", preset="door"),
            EnvironmentConfig(name="hidden_buttons", preset="door", weight=2.0),
        ),
    )
    suite = ad_hoc_suite(config, ("cod",), ("train",))
    assert [known.label for known in suite.entries] == ["hidden_buttons door", "hidden_buttons door 2"]
    settings, problems = resolve(suite, config)
    assert problems == [] and len(settings) == 2
    assert settings[0].num_packs == config.evaluation.num_packs


def test_the_guide_names_every_field() -> None:
    guide = (ROOT / "docs" / "evaluation.md").read_text()
    fields = {
        *EntryDefaults.__struct_fields__,
        "name",
        "seeds",
        "data_seed",
        "environment",
        "preset",
        "options",
    }
    assert {field for field in fields if f"`{field}`" not in guide} == set()


def test_the_configuration_of_evaluation_beside_training(tmp_path: Path) -> None:
    def problems(**changes: object) -> list[str]:
        evaluation = msgspec.structs.replace(config_for().evaluation, **changes)
        config = msgspec.structs.replace(config_for(), evaluation=evaluation)
        return [problem for problem in check(config) if problem.startswith("evaluation.")]

    path = write(tmp_path, '[[entries]]\nenvironment = "hidden_buttons"\npreset = "gate"\n')
    assert problems() == problems(every_steps=10) == []
    (found,) = problems(suite="x.toml")
    assert "evaluation.every_steps, found 0" in found
    (found,) = problems(every_steps=1000)
    assert found.startswith("evaluation.every_steps: 1000 is more than")
    (found,) = problems(every_steps=10, suite=str(path))
    assert found.startswith(f"evaluation.suite: {path}: entries.0: environment hidden_buttons: no preset")
    (found,) = problems(every_steps=10, suite="/nowhere.toml")
    assert "cannot be read" in found


def test_a_relative_suite_counts_from_the_file_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    path = tmp_path / "configs" / "run.toml"
    path.write_text(
        '[[environments]]\nname = "hidden_buttons"\npreset = "door"\n[evaluation]\nsuite = "../s.toml"\n'
    )
    assert load_config([path]).evaluation.suite == str(tmp_path / "s.toml")
