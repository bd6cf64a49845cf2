"""A real ``cod train`` under the drill's thumb: start it, look at it from outside, hit it, see it end.

Looks only at what any user can see: processes, the run folder, the run database opened read-only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[2]
CONFIG = Path(__file__).with_name("drill.toml")
POLL_S = 0.1
START_S = 90.0
"""A process is up again and has made progress within this time, on a busy machine too."""


class DrillError(Exception):
    """The run did not do in time what it must do."""


def cod(*arguments: str) -> list[str]:
    """Return the command line of ``cod`` under this interpreter."""
    return [sys.executable, "-m", "cod_async", *arguments]


def environment() -> dict[str, str]:
    """Return the environment of a drilled run."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def bootstrap_model(folder: Path) -> Path:
    """Make the starting model of all drilled runs, once per folder."""
    model = folder / "model"
    if not (model / "config.json").is_file():
        subprocess.run(
            cod("bootstrap", str(CONFIG), "--out", str(model), "--json"),
            env=environment(),
            check=True,
            capture_output=True,
            timeout=300,
        )
    return model


class DrilledRun:
    """One run, from its first launch to its end, over any number of launches.

    Args:
        folder: where the run folder, the journals and the launcher's output go.
        name: of the run.
        overrides: ``--set`` values, over those of ``drill.toml``.
    """

    def __init__(self, folder: Path, name: str, overrides: dict[str, Any]) -> None:
        self.run_dir = folder / "runs" / name
        self.acks = folder / "acks" / name
        self.output = folder / f"{name}.out"
        values = {
            "run.output_dir": str(folder / "runs"),
            "model.path": str(bootstrap_model(folder)),
            "transport.ack_journal_dir": str(self.acks),
            **overrides,
        }
        self._first = ["train", str(CONFIG), "--name", name]
        for path, value in values.items():
            self._first += ["--set", f"{path}={json.dumps(value)}"]
        self.launcher: subprocess.Popen[bytes] | None = None

    # --------------------------------------------------------------------------------------------- launching

    def launch(self) -> None:
        """Start the run, or resume it if its folder is there."""
        is_first = not (self.run_dir / "config.json").is_file()
        arguments = self._first if is_first else ["train", "--resume", str(self.run_dir)]
        with self.output.open("ab") as output:
            self.launcher = subprocess.Popen(
                cod(*arguments),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env=environment(),
                cwd=ROOT,
                process_group=0,
            )

    @property
    def is_over(self) -> bool:
        """Whether the launcher has ended."""
        return self.launcher is None or self.launcher.poll() is not None

    def wait_end(self, timeout_s: float) -> int:
        """Wait for the launcher and return its exit code.

        Raises:
            DrillError: it did not end in time.
        """
        assert self.launcher is not None
        try:
            return self.launcher.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise DrillError(f"{self.run_dir.name}: not over after {timeout_s:g} s; {self.tail()}") from None

    def destroy(self) -> None:
        """Kill whatever is left; for the end of a drill that failed."""
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        if self.launcher is not None:
            with contextlib.suppress(ProcessLookupError):
                self.launcher.kill()
            self.launcher.wait()

    # ----------------------------------------------------------------------------------------------- looking

    def processes(self) -> list[psutil.Process]:
        """Return every living process that names this run folder, other than the launcher."""
        found = []
        launcher = self.launcher.pid if self.launcher is not None else None
        for process in psutil.process_iter(["pid", "cmdline", "status"]):
            words = process.info["cmdline"] or ()
            is_ours = str(self.run_dir) in words and "cod_async" in words
            if is_ours and process.info["pid"] != launcher and process.info["status"] != "zombie":
                found.append(process)
        return found

    def pids(self, role: str) -> dict[str, int]:
        """Return the pids of a role's processes by name."""
        pids = {}
        for process in self.processes():
            with contextlib.suppress(psutil.Error, ValueError, IndexError):
                words = process.cmdline()
                at = words.index("cod_async") + 1
                if words[at] == role:
                    pids[words[-1] if role == "actor" else role] = process.pid
        return pids

    def tail(self) -> str:
        """Return the end of the launcher's output."""
        text = self.output.read_text(errors="replace") if self.output.is_file() else ""
        return f"the end of {self.output}:\n{text[-1500:]}"

    @contextlib.contextmanager
    def _database(self) -> Iterator[sqlite3.Connection]:
        with contextlib.closing(
            sqlite3.connect(f"file:{self.run_dir / 'run.sqlite'}?mode=ro", uri=True, timeout=5.0)
        ) as connection:
            yield connection

    def ask(self, query: str, *values: object) -> Any:
        """Return the first column of the first row that a query finds, or None; None too while there is no
        database.
        """
        try:
            with self._database() as database:
                row = database.execute(query, values).fetchone()
        except sqlite3.OperationalError:
            return None
        return None if row is None else row[0]

    def step(self) -> int:
        """Return the number of steps in the present history."""
        return int(self.ask("SELECT coalesce(max(step), -1) + 1 FROM steps WHERE state = 'done'") or 0)

    def has_progressed(self, role: str, name: str, pid: int, since: Mark) -> bool:
        """Whether the process that replaced a killed one works: it did something only it can have done."""
        if role == "learner":
            lineage = self.ask("SELECT max(lineage) FROM lineages")
            is_new = lineage is not None and lineage > since.lineage
            return is_new and bool(
                self.ask("SELECT 1 FROM steps WHERE lineage = ? AND state = 'done'", lineage)
            )
        if role == "actor":
            return bool(
                self.ask(
                    "SELECT 1 FROM segments JOIN sessions USING (session) WHERE name = ? AND pid = ?",
                    name,
                    pid,
                )
            )
        return self.num_segments() > since.num_segments and self.step() > since.step

    def num_segments(self) -> int:
        """Return the number of committed segments."""
        return int(self.ask("SELECT count(*) FROM segments") or 0)

    def mark(self) -> Mark:
        """Return how far the run is."""
        lineage = self.ask("SELECT max(lineage) FROM lineages")
        return Mark(self.num_segments(), self.step(), int(lineage or 0))

    # ----------------------------------------------------------------------------------------------- hitting

    def kill(self, pid: int, signum: int = signal.SIGKILL) -> None:
        """Send a signal to one process."""
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signum)

    def kill_everything(self) -> None:
        """Kill the launcher and all that it started, without giving any of them time to notice."""
        assert self.launcher is not None
        pids = [self.launcher.pid, *(process.pid for process in self.processes())]
        for pid in pids:
            self.kill(pid)
        self.launcher.wait()

    def wait_gone(self, timeout_s: float) -> list[str]:
        """Wait until no process of the run is left; return the command lines of those that stay."""
        left: list[psutil.Process] = []

        def is_empty() -> bool:
            left[:] = self.processes()
            return not left

        with contextlib.suppress(DrillError):
            wait_for(is_empty, timeout_s, "orphans")
        lines = []
        for process in left:
            with contextlib.suppress(psutil.Error):
                lines.append(" ".join(process.cmdline()[-4:]))
        return lines

    def ledger(self) -> dict[str, Any]:
        """Return what ``cod ledger RUN --json`` answers."""
        answer = subprocess.run(
            cod("ledger", str(self.run_dir), "--json"),
            env=environment(),
            check=True,
            capture_output=True,
            timeout=60,
        )
        found: dict[str, Any] = json.loads(answer.stdout)
        return found


class Mark:
    """How far a run was at a moment."""

    def __init__(self, num_segments: int, step: int, lineage: int) -> None:
        self.num_segments = num_segments
        self.step = step
        self.lineage = lineage


def wait_for(is_true: Callable[[], bool], timeout_s: float, what: str, more: Callable[[], str] = str) -> None:
    """Poll until ``is_true``; ``more`` adds to what the error says.

    Raises:
        DrillError: it did not become true in time.
    """
    deadline = time.monotonic() + timeout_s
    while not is_true():
        if time.monotonic() > deadline:
            raise DrillError(f"after {timeout_s:g} s still not: {what}; {more()}")
        time.sleep(POLL_S)
