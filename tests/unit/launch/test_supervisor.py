"""Supervision of real child processes: restarts, back-off, giving up, stopping in order, leaving nobody
behind.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cod_async.errors import WorkError
from cod_async.launch import supervisor as module
from cod_async.launch.run_folder import _is_alive
from cod_async.launch.supervisor import (
    BACKOFF_S,
    ENDED_RUN_CODE,
    MAX_OWN_FAILURES,
    MAX_RESTARTS,
    Child,
    Supervisor,
)

SLEEP = [sys.executable, "-c", "import time; time.sleep(600)"]
TIMEOUT_S = 30.0


class Clock:
    """A clock that the test moves; real time only passes in the children."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def events() -> list[str]:
    return []


@pytest.fixture
def supervisor(tmp_path: Path, clock: Clock, events: list[str]) -> Iterator[Supervisor]:
    made = Supervisor(tmp_path / "logs", dict(os.environ), grace_s=5, clock=clock, on_event=events.append)
    yield made
    made.kill()


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def end_of(child: Child) -> int:
    assert child.process is not None
    return child.process.wait(TIMEOUT_S)


def test_a_killed_child_is_restarted_after_its_backoff(
    supervisor: Supervisor, clock: Clock, events: list[str]
) -> None:
    child = supervisor.start("actor", "actor-0", SLEEP)
    first = child.pid
    assert first is not None
    os.kill(first, signal.SIGKILL)
    end_of(child)
    supervisor.poll()
    assert not child.is_running and child.num_restarts == 0
    clock.now_s += BACKOFF_S[0] / 2
    supervisor.poll()
    assert not child.is_running  # not yet
    clock.now_s += BACKOFF_S[0]
    supervisor.poll()
    assert child.is_running and child.num_restarts == 1 and child.pid != first
    assert any("SIGKILL" in event for event in events)


def test_backoff_grows_and_a_child_that_keeps_dying_is_given_up(supervisor: Supervisor, clock: Clock) -> None:
    child = supervisor.start("coordinator", "coordinator", SLEEP)
    waits = []
    for _ in range(MAX_RESTARTS):
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        end_of(child)
        supervisor.poll()
        assert child.restart_at_s is not None
        waits.append(child.restart_at_s - clock.now_s)
        clock.now_s = child.restart_at_s
        supervisor.poll()
        assert child.is_running
    assert waits[: len(BACKOFF_S)] == pytest.approx(BACKOFF_S)
    assert child.pid is not None
    os.kill(child.pid, signal.SIGKILL)
    end_of(child)
    with pytest.raises(WorkError, match="keeps dying"):
        supervisor.poll()


def test_old_deaths_are_forgotten(supervisor: Supervisor, clock: Clock) -> None:
    child = supervisor.start("actor", "actor-0", SLEEP)
    for _ in range(MAX_RESTARTS + 3):
        clock.now_s += module.WINDOW_S + 1
        assert child.pid is not None
        os.kill(child.pid, signal.SIGKILL)
        end_of(child)
        supervisor.poll()
        assert child.restart_at_s == pytest.approx(clock.now_s + BACKOFF_S[0])
        clock.now_s += 1
        supervisor.poll()
    assert child.num_restarts == MAX_RESTARTS + 3


def test_a_child_that_fails_by_itself_is_given_up_soon_with_its_log(
    supervisor: Supervisor, clock: Clock
) -> None:
    child = supervisor.start(
        "learner", "learner", [sys.executable, "-c", "raise SystemExit('the disk is gone')"]
    )
    with pytest.raises(WorkError, match="the disk is gone"):
        for _ in range(MAX_OWN_FAILURES):
            end_of(child)
            supervisor.poll()
            clock.now_s += 10
            supervisor.poll()
    assert child.num_restarts == MAX_OWN_FAILURES - 1


@pytest.mark.parametrize("after", ["", "; print('WorkError: another rank of the learner is gone')"])
def test_a_child_that_ends_the_run_is_never_retried(supervisor: Supervisor, after: str) -> None:
    said = "print('long story'); print('NumericsError: the loss is nan')" + after
    program = f"{said}; raise SystemExit({ENDED_RUN_CODE})"
    child = supervisor.start("learner", "learner", [sys.executable, "-c", program])
    end_of(child)
    with pytest.raises(WorkError, match=r"^learner ended the run: NumericsError: the loss is nan$"):
        supervisor.poll()
    assert child.num_restarts == 0


def test_wrong_input_is_never_retried(supervisor: Supervisor) -> None:
    child = supervisor.start("actor", "actor-0", [sys.executable, "-c", "import sys; sys.exit(2)"])
    end_of(child)
    with pytest.raises(WorkError, match="refused its input"):
        supervisor.poll()


@pytest.mark.parametrize("is_done", [True, False])
def test_ending_with_code_0_is_the_end_only_if_the_work_is_done(
    supervisor: Supervisor, is_done: bool
) -> None:
    child = supervisor.start("learner", "learner", [sys.executable, "-c", ""], is_done=lambda: is_done)
    end_of(child)
    supervisor.poll()
    assert child.is_finished == is_done
    assert (child.restart_at_s is None) == is_done


def test_environment_and_log(supervisor: Supervisor) -> None:
    code = "import os; print('threads', os.environ['THREADS'], os.environ['COD_PARENT'])"
    child = supervisor.start("actor", "actor-0", [sys.executable, "-c", code], extra={"THREADS": "3"})
    assert end_of(child) == 0
    assert supervisor.log_path(child).read_text() == f"threads 3 {os.getpid()}:5\n"


def test_a_long_log_is_rotated_and_the_child_writes_on(
    supervisor: Supervisor, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "MAX_LOG_BYTES", 1000)
    child = supervisor.start(
        "actor",
        "actor-0",
        [sys.executable, "-c", "import time\nprint('x' * 5000, flush=True)\ntime.sleep(600)"],
    )
    path = supervisor.log_path(child)
    wait_until(lambda: path.stat().st_size > 5000)
    supervisor.poll()
    assert path.stat().st_size == 0
    assert path.with_suffix(".log.1").stat().st_size == 1000
    with path.open("ab") as log:  # append mode goes on at the new end
        log.write(b"after")
    assert path.read_bytes() == b"after"


def test_stop_ends_learner_and_actors_before_what_serves_them(tmp_path: Path) -> None:
    stamp = (
        "import pathlib, signal, sys, time\n"
        "def bye(*_):\n"
        "    time.sleep({delay}); pathlib.Path({file!r}).write_text(str(time.monotonic())); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, bye)\n"
        "print('ready', flush=True)\n"
        "while True: time.sleep(0.05)\n"
    )
    made = Supervisor(tmp_path / "logs", dict(os.environ), grace_s=20)
    files = {}
    for role, delay in (("engine", 0.0), ("coordinator", 0.0), ("learner", 0.3), ("actor", 0.1)):
        files[role] = tmp_path / role
        made.start(role, role, [sys.executable, "-c", stamp.format(delay=delay, file=str(files[role]))])
    wait_until(lambda: all("ready" in made.log_path(child).read_text() for child in made.children))
    assert made.stop(20.0) == []
    at = {role: float(path.read_text()) for role, path in files.items()}
    assert min(at["coordinator"], at["engine"]) > max(at["learner"], at["actor"])
    assert [child.returncode for child in made.children] == [0, 0, 0, 0]


def test_stop_kills_what_ignores_it_and_its_whole_group(tmp_path: Path) -> None:
    code = (
        "import signal, subprocess, sys, time\n"
        "signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "print(child.pid, flush=True)\n"
        "time.sleep(600)\n"
    )
    made = Supervisor(tmp_path / "logs", dict(os.environ), grace_s=1)
    child = made.start("learner", "learner", [sys.executable, "-c", code])
    wait_until(lambda: made.log_path(child).read_text().strip().isdigit())
    grandchild = int(made.log_path(child).read_text())
    assert made.stop(0.5) == ["learner"]
    wait_until(lambda: not _is_alive(grandchild))


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux only")
def test_children_end_when_the_launcher_is_killed(tmp_path: Path) -> None:
    child = (
        "from cod_async.launch.parent import follow_parent\n"
        "import os, time\n"
        "follow_parent()\n"
        "print(os.getpid(), flush=True)\n"
        "time.sleep(600)\n"
    )
    launcher = (
        "import os, sys, time, pathlib\n"
        "from cod_async.launch.supervisor import Supervisor\n"
        f"made = Supervisor(pathlib.Path({str(tmp_path)!r}), dict(os.environ), grace_s=5)\n"
        f"made.start('actor', 'actor-0', [sys.executable, '-c', {child!r}])\n"
        "time.sleep(600)\n"
    )
    paths = os.pathsep.join(path for path in sys.path if path)
    process = subprocess.Popen([sys.executable, "-c", launcher], env={**os.environ, "PYTHONPATH": paths})
    log = tmp_path / "actor-0.log"
    wait_until(lambda: log.exists() and log.read_text().strip().isdigit())
    pid = int(log.read_text())
    assert _is_alive(pid)
    process.kill()
    process.wait()
    wait_until(lambda: not _is_alive(pid))
