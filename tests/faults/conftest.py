"""A finished run that was hit by one fault of each kind, shared by the tests of this folder."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from .drill import TOUR_STEPS, Drill

MAX_ATTEMPTS = 3
"""Runs that a test may take until its faults meet actors at work."""


@pytest.fixture(scope="session")
def drill_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder that holds the starting model, made once, and all drilled runs."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def hit(drill_folder: Path) -> Callable[..., dict[str, Any]]:
    """Return a function that runs a role's faults on a fresh run and returns the report."""

    def run(role: str, num_faults: int, num_steps: int, index: int = 0) -> dict[str, Any]:
        drill = Drill(drill_folder, role, random.Random(f"{7 + index}-{role}"), print, num_steps)
        return drill.one_run(index, num_faults)

    return run


@pytest.fixture(scope="session")
def toured(hit: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """Return the report of one run that lost an actor, the coordinator, the learner, and everything.

    On a busy machine the learner can be so slow that the actors have nothing to do when one is killed; such
    a run must be without problems too, and another one is made.
    """
    for index in range(MAX_ATTEMPTS):
        report = hit("tour", 4, TOUR_STEPS, index=index)
        if report["problems"] or report["counts"]["takeovers"]:
            break
    return report
