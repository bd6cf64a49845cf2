"""Tiny models, and the engine of ``evaluation_world`` in the place of the real one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from evaluation_world import ScriptedEngine, config_for

from cod_async.bootstrap.run import run_bootstrap


@pytest.fixture(scope="session")
def model_dirs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Untrained models: the tokenizer is what matters where a scripted engine answers."""
    root = tmp_path_factory.mktemp("models")
    for preset in ("door", "cross"):
        run_bootstrap(config_for(preset), root / preset)
    return {preset: root / preset for preset in ("door", "cross")}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[ScriptedEngine]:
    made: list[ScriptedEngine] = []

    def make(*args: Any, **kwargs: Any) -> ScriptedEngine:
        made.append(ScriptedEngine(*args, **kwargs))
        return made[-1]

    monkeypatch.setattr("cod_async.engines.embedded.EmbeddedEngine", make, raising=False)
    return made
