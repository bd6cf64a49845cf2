"""Names to specs: built-ins, third parties, and clear words for every way to go wrong."""

from __future__ import annotations

import subprocess
import sys
import types
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from typing import Any

import msgspec
import pytest

from cod_async.envs import registry
from cod_async.envs.frozen_lake_obscure import SPEC
from cod_async.errors import EnvironmentInputError


@pytest.fixture
def plugins(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[EntryPoint]]:
    """Entry points as installed packages would declare them; put into the returned list before asking."""
    found: list[EntryPoint] = []
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: tuple(found))
    registry.forget()
    yield found
    registry.forget()


@pytest.fixture
def module(monkeypatch: pytest.MonkeyPatch) -> types.ModuleType:
    """An importable third-party module with nothing in it."""
    made = types.ModuleType("third_party_lake")
    monkeypatch.setitem(sys.modules, "third_party_lake", made)
    return made


def entry(name: str, target: str) -> EntryPoint:
    return EntryPoint(name=name, value=target, group=registry.GROUP)


def test_built_ins_need_no_installation(plugins: list[EntryPoint]) -> None:
    assert registry.names() == sorted(registry.BUILT_IN)
    assert registry.get("frozen_lake_obscure") is SPEC


def test_installed_copy_of_the_built_ins_is_no_duplicate(plugins: list[EntryPoint]) -> None:
    plugins.extend(entry(name, target) for name, target in registry.BUILT_IN.items())
    assert registry.names() == sorted(registry.BUILT_IN)
    assert registry.get("frozen_lake_obscure") is SPEC


def test_third_party_environment_is_found(plugins: list[EntryPoint], module: Any) -> None:
    module.SPEC = msgspec.structs.replace(SPEC, name="my_lake")
    plugins.append(entry("my_lake", "third_party_lake:SPEC"))
    assert "my_lake" in registry.names()
    assert registry.get("my_lake").name == "my_lake"


def test_unknown_name_lists_what_exists(plugins: list[EntryPoint]) -> None:
    with pytest.raises(
        EnvironmentInputError, match=r"no environment 'frozen_lake'.*frozen_lake_obscure.*hidden_buttons"
    ):
        registry.get("frozen_lake")


@pytest.mark.parametrize(
    ("target", "words"),
    [
        ("no_such_module_at_all:SPEC", "ModuleNotFoundError"),
        ("third_party_lake:MISSING", "AttributeError"),
        ("third_party_lake", "cannot be loaded"),
        ("third_party_lake:__name__", "is a str"),
    ],
)
def test_broken_entry_point_is_named(plugins: list[EntryPoint], module: Any, target: str, words: str) -> None:
    plugins.append(entry("my_lake", target))
    assert "my_lake" in registry.names()  # listing imports nothing
    with pytest.raises(EnvironmentInputError, match=words) as caught:
        registry.get("my_lake")
    assert "my_lake" in str(caught.value) and target in str(caught.value)


def test_all_contradictions_of_a_spec_are_listed(plugins: list[EntryPoint], module: Any) -> None:
    module.SPEC = msgspec.structs.replace(
        SPEC, name="other", default_preset="none", policies={"random": None}
    )
    plugins.append(entry("my_lake", "third_party_lake:SPEC"))
    with pytest.raises(EnvironmentInputError) as caught:
        registry.get("my_lake")
    problems = caught.value.problems
    assert len(problems) == 3
    assert "'other'" in problems[0] and "'none'" in problems[1] and "oracle" in problems[2]


@pytest.mark.parametrize("name", ["my_lake", "hidden_buttons"])
def test_second_claimant_of_a_name_is_refused(plugins: list[EntryPoint], name: str) -> None:
    plugins += [entry(name, "one:SPEC"), entry(name, "two:SPEC")]
    with pytest.raises(EnvironmentInputError, match=r"registered [23] times.*one:SPEC, two:SPEC"):
        registry.get(name)
    assert registry.get("frozen_lake_obscure") is SPEC  # the others go on working


def test_environments_load_neither_torch_nor_zmq() -> None:
    code = (
        "import sys; from cod_async.envs import commands; from cod_async.lifecycle import packs; "
        "commands.play('frozen_lake_obscure', num_packs=1); "
        "print([m for m in ('torch', 'zmq', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
