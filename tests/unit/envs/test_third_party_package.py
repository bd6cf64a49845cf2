"""An installed package's environment is found by its entry point, shown, played, checked and planned."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from third_party import MODULE, NAME, install

from cod_async.config.check import check
from cod_async.config.schema import Config, EnvironmentConfig
from cod_async.envs import commands as cod_env
from cod_async.envs import registry
from cod_async.lifecycle.packs import plan_pack


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    yield install(tmp_path / "site", monkeypatch).parent
    registry.forget()


def test_it_is_found_and_isolated_unless_told_otherwise(site: Path) -> None:
    assert importlib.metadata.version(MODULE) == "1.0"
    assert NAME in registry.names()
    spec = registry.get(NAME)
    assert spec.needs_limits is True
    assert registry.get("hidden_buttons").needs_limits is None


def test_it_is_shown_played_and_planned_like_the_built_ins(site: Path) -> None:
    shown = cod_env.show(NAME, "door", 7, {"seed": 1})
    assert shown["hidden"] == cod_env.show("hidden_buttons", "door", 7, {"seed": 1})["hidden"]
    oracle = cod_env.play(NAME, "door", 3, "oracle", 20)["reward_by_position"]
    assert oracle == cod_env.play("hidden_buttons", "door", 3, "oracle", 20)["reward_by_position"]
    environment = EnvironmentConfig(name=NAME, preset="door", memory_bytes=1 << 20)
    assert plan_pack([environment], 3, 0, 0).environment == NAME
    problems = check(Config(environments=(environment,)), for_train=False)
    (problem,) = (problem for problem in problems if "environments.0" in problem)
    assert problem.startswith("environments.0.memory_bytes: 1048576 is too little")


def test_the_command_line_lists_it(site: Path) -> None:
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "cod_async", "env", "list", "--json"],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        check=True,
    )
    assert NAME in [entry["name"] for entry in json.loads(done.stdout)]
