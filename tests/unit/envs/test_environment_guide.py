"""The environment in docs/environments.md is complete: it registers, shows and plays as the page says."""

from __future__ import annotations

import importlib
import re
from collections.abc import Iterator
from importlib.metadata import EntryPoint
from pathlib import Path

import pytest

from cod_async.envs import commands, registry
from cod_async.errors import EnvironmentInputError

GUIDE = Path(__file__).parents[3] / "docs" / "environments.md"


@pytest.fixture(autouse=True)
def doors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    source = re.search(r"```python\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.DOTALL)
    assert source is not None
    (tmp_path / "doors_of_the_guide.py").write_text(source.group(1), encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    importlib.invalidate_caches()
    entry = EntryPoint(name="doors", value="doors_of_the_guide:SPEC", group=registry.GROUP)
    monkeypatch.setattr(registry.importlib.metadata, "entry_points", lambda group: (entry,))
    registry.forget()
    yield
    registry.forget()


def test_guide_environment_works() -> None:
    assert "doors" in registry.names()
    assert commands.show("doors", "hard", 3, {"color": "red"})["task"] == {"color": "red"}
    oracle = commands.play("doors", "easy", 2, "oracle", 5, 0)
    assert [entry["mean"] for entry in oracle["reward_by_position"]] == pytest.approx([1 - 0.1 / 3] * 2)
    floor = commands.play("doors", "hard", 2, "random", 500, 0, solve_penalty=0.0)["reward_by_position"]
    assert all(abs(entry["mean"] - 0.1) < 0.05 for entry in floor)  # one try in ten, 3.7 standard errors
    with pytest.raises(EnvironmentInputError, match="max_tries is 0"):
        commands.play("doors", options={"max_tries": 0})
