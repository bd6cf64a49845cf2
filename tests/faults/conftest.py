"""A finished run that was hit by one fault of each kind, shared by the tests of this folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .drill import TOUR_STEPS, Drill


@pytest.fixture(scope="session")
def drill_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that holds the starting model, made once, and all drilled runs."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def hit(drill_folder: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a role's faults on a fresh run and returns the report."""

    def run(role: str, num_faults: int, num_steps: int, seed: int = 7) -> dict[str, Any]:
        drill = Drill(drill_folder, role, random.Random(f"{seed}-{role}"), print, num_steps)
        return drill.one_run(0, num_faults)

    return run


@pytest.fixture(scope="session")
def toured(hit: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Return the report of one run that lost an actor, the coordinator, the learner, and everything."""
    return hit("tour", 4, TOUR_STEPS)
