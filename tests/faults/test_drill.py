"""A small part of the fault drill, for every day; `make faults` does it at length."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from .conftest import MAX_ATTEMPTS
from .drill import TOUR_STEPS

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(400)]


def test_one_kill_of_each_role_and_of_everything(toured: dict[str, Any]) -> None:
    assert toured["problems"] == []
    victims = [fault["victim"].partition("-")[0] for fault in toured["faults"]]
    assert victims == ["actor", "coordinator", "learner", "everything"]
    assert toured["counts"]["takeovers"] > 0
    # One more after the learner's death, and one after the resume, unless all steps were done by then.
    is_unfinished = toured["faults"][-1]["step"] < TOUR_STEPS
    assert toured["counts"]["lineages"] >= 2 + is_unfinished
    assert toured["counts"]["acked"] > 0


def test_a_paused_actor_changes_nothing_when_it_wakes(hit: Callable[..., dict[str, Any]]) -> None:
    for index in range(MAX_ATTEMPTS):
        report = hit("pause", 2, 60, index=index)
        assert report["problems"] == []
        assert report["num_faults"] == 2
        if sum(fault["num_fenced"] for fault in report["faults"]):
            break  # else it had nothing under way when it was paused
    assert sum(fault["num_fenced"] for fault in report["faults"]) > 0
    assert report["counts"]["refused"] > 0  # the actor heard of it, segment by segment


def test_an_interrupted_run_is_sealed_saved_and_finished_later(hit: Callable[..., dict[str, Any]]) -> None:
    report = hit("interrupt", 1, 30)
    assert report["problems"] == []
    assert report["counts"]["rolled_back_steps"] == 0  # what was trained was in the checkpoint


def test_processes_of_a_killed_launcher_end_by_themselves(hit: Callable[..., dict[str, Any]]) -> None:
    report = hit("launcher", 1, 30)
    assert report["problems"] == []
    assert report["num_faults"] == 1
