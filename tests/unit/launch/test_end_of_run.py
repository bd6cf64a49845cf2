"""How a launcher knows that a run is over: by the coordinator's end, and by closed books in the database."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from cod_async.config.schema import Config, EnvironmentConfig, ObserveConfig, RunSection
from cod_async.launch import local
from cod_async.launch.interrupts import Interrupts
from cod_async.launch.supervisor import Supervisor
from cod_async.observe.progress import Progress
from cod_async.store.schema import DATABASE_NAME, connect_writer

SLEEP = "import time; time.sleep(60)"
GROUP = (
    "INSERT INTO groups (grp, environment, preset, options_json, records_json, pack_seed, pack_size, "
    "planned_lineage, planned_step, state) VALUES (0, 'e', 'p', '{}', '[]', '1', 1, 0, 0, ?)"
)


@pytest.fixture
def launch(tmp_path: Path) -> Any:
    config = Config(
        environments=(EnvironmentConfig(name="hidden_buttons", preset="door"),),
        run=RunSection(grace_s=4.0),
        observe=ObserveConfig(has_tensorboard=False, has_plots=False),
    )
    progress = Progress(config, Console(file=io.StringIO()))
    return local._Launch(config, tmp_path, (), 0, Interrupts(), progress)


def children(tmp_path: Path, **code: str) -> Supervisor:
    supervisor = Supervisor(tmp_path / "logs", {}, grace_s=4.0)
    for role, text in code.items():
        supervisor.start(role, role, [sys.executable, "-c", text], is_done=lambda: True)
    return supervisor


def test_a_learner_killed_after_its_last_word_is_not_waited_for(
    launch: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Started again, it looks for a coordinator that has ended, for ever.
    monkeypatch.setattr(local, "_LEAVE_S", 0.2)
    supervisor = children(tmp_path, coordinator="", learner=SLEEP, actor=SLEEP)
    launch._supervise(supervisor)
    assert not any(child.is_running for child in supervisor.children)


def test_a_coordinator_that_dies_before_it_closed_the_books_is_started_again(
    launch: Any, tmp_path: Path
) -> None:
    code = (
        "import os, pathlib, signal; path = pathlib.Path('once'); again = path.exists(); path.touch(); "
        "again or os.kill(os.getpid(), signal.SIGKILL)"
    ).replace("'once'", repr(str(tmp_path / "once")))
    supervisor = children(tmp_path, coordinator=code, learner="", actor="")
    launch._supervise(supervisor)
    coordinator = supervisor.children[0]
    assert (coordinator.num_restarts, coordinator.is_finished) == (1, True)


@pytest.mark.parametrize(
    ("finished", "state", "is_closed"),
    [("done", "trained", True), ("done", "closed", False), ("done", "open", False), ("", "trained", False)],
)
def test_closed_books(tmp_path: Path, finished: str, state: str, is_closed: bool) -> None:
    assert not local._is_closed(tmp_path)
    database = connect_writer(tmp_path / DATABASE_NAME)
    database.execute("INSERT INTO meta VALUES ('finished', ?)", (finished,))
    database.execute(GROUP, (state,))
    database.close()
    assert local._is_closed(tmp_path) == is_closed
