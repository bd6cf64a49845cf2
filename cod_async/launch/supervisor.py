"""Keeping a run's processes alive: start, notice death, restart with growing back-off, stop in order, leave
nobody.

Each child runs in a process group of its own (Ctrl-C in the terminal reaches only the launcher, which then
stops the children in order) and writes to an append-only log file that the supervisor keeps within a size.
The supervisor is a plain object polled by the launcher's loop; its clock and sleeps come from outside, so its
decisions can be tested.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import subprocess
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from cod_async.errors import WorkError
from cod_async.launch.parent import PARENT_VARIABLE

WINDOW_S = 120.0
"""Restarts are counted over this window."""
MAX_RESTARTS = 12
"""More deaths than this within the window mean that restarting does not help."""
MAX_OWN_FAILURES = 4
"""A child that ends by itself with an error (no signal) this often in a row, each time young, has a real
defect.
"""
YOUNG_S = 20.0
"""A child that lived shorter than this has not proved itself."""
BACKOFF_S = (0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
"""Waits before the first, second, … restart within the window."""
MAX_LOG_BYTES = 16 << 20
"""A longer log is moved to ``.1`` (replacing the one before) and started anew."""
ENGINE_WINDOW_S = 1800.0
"""The window of a server's host, whose every start takes minutes on a GPU."""
INPUT_ERROR_CODE = 2
LOST_CODE = 3
"""A child ends with this code when something that had worked was taken from it, and a new start brings it
back: that is no defect of its own."""
ENDED_RUN_CODE = 4
"""A child ends with this code when the run must not go on: a new start would only meet the same again."""
_TAIL_BYTES = 3000


@dataclass
class Child:
    """One supervised process.

    Attributes:
        role: ``coordinator``, ``learner``, ``actor`` or ``engine``.
        name: unique; also the log file's name.
        argv: command line.
        young_s: a child that lived shorter than this has not proved itself.
        window_s: deaths are counted over this time.
        num_restarts: times it was started again.
        is_done: asked when it ended with code 0: whether its work is done. None: it must never end by itself.
        is_wanted: whether its death must lead to a restart.
        is_finished: whether it ended with code 0 and its work is done.
    """

    role: str
    name: str
    argv: Sequence[str]
    is_done: Callable[[], bool] | None = None
    young_s: float = YOUNG_S
    window_s: float = WINDOW_S
    is_finished: bool = False
    num_restarts: int = 0
    is_wanted: bool = True
    process: subprocess.Popen[bytes] | None = None
    pid: int | None = None
    returncode: int | None = None
    started_s: float = 0.0
    restart_at_s: float | None = None
    num_own_failures: int = 0
    deaths_s: deque[float] = field(default_factory=lambda: deque(maxlen=MAX_RESTARTS + 1))

    @property
    def is_running(self) -> bool:
        """Whether the process is alive, as far as known."""
        return self.process is not None and self.returncode is None


class Supervisor:
    """Starts children and keeps them alive until told otherwise.

    Args:
        log_dir: where ``NAME.log`` files go; made if missing.
        environment: environment variables of every child.
        grace_s: what the children are told about their time to end when the launcher dies.
        lock_fd: file descriptor handed to every child, so that a lock on it lasts until the last of them is
            gone.
        clock: monotonic seconds.
        on_event: called with one line of text for each start, death and restart.
    """

    def __init__(
        self,
        log_dir: Path,
        environment: Mapping[str, str],
        *,
        grace_s: float,
        lock_fd: int | None = None,
        clock: Callable[[], float] = time.monotonic,
        on_event: Callable[[str], None] = lambda line: None,
    ) -> None:
        self._log_dir = log_dir
        self._environment = {**environment, PARENT_VARIABLE: f"{os.getpid()}:{grace_s:g}"}
        self._lock_fd = lock_fd
        self._clock = clock
        self._on_event = on_event
        self.children: list[Child] = []
        log_dir.mkdir(parents=True, exist_ok=True)

    def start(
        self,
        role: str,
        name: str,
        argv: Sequence[str],
        *,
        extra: Mapping[str, str] | None = None,
        is_done: Callable[[], bool] | None = None,
    ) -> Child:
        """Start a child with ``extra`` environment variables and supervise it from now on.

        The parent-death signal is tied to the thread that forks, so this must be called from the main thread.
        """
        command = [*argv]
        if extra:
            command = ["env", *(f"{key}={value}" for key, value in extra.items()), *argv]
        child = Child(role=role, name=name, argv=command, is_done=is_done)
        if role == "engine":  # it says by LOST_CODE whether its server had ever worked
            child.young_s, child.window_s = math.inf, ENGINE_WINDOW_S
        self.children.append(child)
        self._spawn(child)
        return child

    def log_path(self, child: Child) -> Path:
        """Return the child's log file."""
        return self._log_dir / f"{child.name}.log"

    def poll(self) -> None:
        """Notice deaths, restart what is due, keep logs within their size.

        Raises:
            WorkError: a child cannot be kept alive, with the tail of its log.
        """
        now = self._clock()
        for child in self.children:
            if child.is_running and child.process is not None:
                code = child.process.poll()
                if code is not None:
                    self._died(child, code, now)
            if child.restart_at_s is not None and now >= child.restart_at_s and child.is_wanted:
                child.restart_at_s = None
                child.num_restarts += 1
                self._spawn(child)
            self._bound_log(child)

    def let_go(self, *roles: str) -> None:
        """From now on the end of these roles is expected and not repaired."""
        for child in self.children:
            if child.role in roles:
                child.is_wanted = False
                child.restart_at_s = None

    def signal(self, signum: int, *roles: str) -> None:
        """Send a signal to the running children of these roles and expect their end."""
        self.let_go(*roles)
        for child in self.children:
            if child.role in roles and child.is_running and child.process is not None:
                with contextlib.suppress(ProcessLookupError):
                    child.process.send_signal(signum)

    def wait(self, timeout_s: float, *roles: str) -> bool:
        """Wait until the children of these roles have ended; return whether they have."""
        deadline = self._clock() + timeout_s
        for child in self.children:
            if child.role not in roles or not child.is_running or child.process is None:
                continue
            try:
                code = child.process.wait(max(0.0, deadline - self._clock()))
            except subprocess.TimeoutExpired:
                return False
            self._ended(child, code)
        return True

    def stop(self, grace_s: float) -> list[str]:
        """Stop everything within ``grace_s``: learner first (it checkpoints), actors, then what serves them.

        The coordinator outlives its clients, so that their last checkpoint and segments are recorded, and
        engines outlive the actors that abort their requests there.

        Returns:
            Names of the children that did not end in time and were killed.
        """
        deadline = self._clock() + grace_s
        reserve = min(5.0, 0.2 * grace_s)
        serving = sorted({child.role for child in self.children} - {"learner", "actor"})
        self.let_go("learner", "actor", *serving)
        self.signal(signal.SIGTERM, "learner")
        self.signal(signal.SIGTERM, "actor")
        self.wait(deadline - reserve - self._clock(), "learner", "actor")
        self.signal(signal.SIGTERM, *serving)
        self.wait(deadline - self._clock(), "learner", "actor", *serving)
        return self.kill()

    def kill(self) -> list[str]:
        """Kill what still runs, with its whole process group; return the names of what had to be killed."""
        killed = []
        for child in self.children:
            child.is_wanted, child.restart_at_s = False, None
            if child.is_running and child.process is not None and child.process.poll() is None:
                killed.append(child.name)
                self._kill_group(child)
                self._ended(child, child.process.wait())
        return killed

    def _spawn(self, child: Child) -> None:
        with self.log_path(child).open("ab") as log:
            child.process = subprocess.Popen(
                child.argv,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=self._environment,
                process_group=0,
                pass_fds=() if self._lock_fd is None else (self._lock_fd,),
            )
        child.pid, child.returncode, child.started_s = child.process.pid, None, self._clock()
        again = f", restart {child.num_restarts}" if child.num_restarts else ""
        self._on_event(f"{child.name} started (pid {child.pid}{again})")

    def _ended(self, child: Child, code: int) -> None:
        child.returncode = code
        self._kill_group(child)

    def _kill_group(self, child: Child) -> None:
        """Kill what a child leaves behind in its group (environment workers)."""
        if child.pid is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)

    def _died(self, child: Child, code: int, now: float) -> None:
        self._ended(child, code)
        if code == 0 and child.is_done is not None and child.is_done():
            child.is_finished, child.is_wanted = True, False
        if not child.is_wanted:
            return
        cause = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        if code == INPUT_ERROR_CODE:
            raise WorkError(f"{child.name} refused its input ({cause}), not restarted; {self.tail(child)}")
        if code == ENDED_RUN_CODE:
            said = self.tail(child).splitlines()  # of several ranks, one may still say that it was left alone
            why = next((line for line in reversed(said) if line.startswith("NumericsError: ")), said[-1])
            raise WorkError(f"{child.name} ended the run: {why}")
        child.deaths_s.append(now)
        is_own = code > 0 and code != LOST_CODE and now - child.started_s < child.young_s
        child.num_own_failures = child.num_own_failures + 1 if is_own else 0
        recent = sum(1 for at in child.deaths_s if now - at <= child.window_s)
        if recent > MAX_RESTARTS or child.num_own_failures >= MAX_OWN_FAILURES:
            raise WorkError(f"{child.name} keeps dying ({cause}, {recent} times of late); {self.tail(child)}")
        wait_s = BACKOFF_S[min(recent, len(BACKOFF_S)) - 1]
        child.restart_at_s = now + wait_s
        self._on_event(f"{child.name} (pid {child.pid}) died with {cause}, restarting in {wait_s:g} s")

    def tail(self, child: Child) -> str:
        """Return the end of a child's log, for an error message."""
        path = self.log_path(child)
        try:
            with path.open("rb") as file:
                file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
                text = file.read().decode(errors="replace").strip()
        except OSError:
            text = ""
        return f"the end of {path}:\n{text}" if text else f"{path} is empty"

    def _bound_log(self, child: Child) -> None:
        """Copy a log that grew too long to ``.1`` and truncate it; the child's append mode goes on at the
        start.
        """
        path = self.log_path(child)
        try:
            if path.stat().st_size <= MAX_LOG_BYTES:
                return
            with path.open("rb") as source, path.with_suffix(".log.1").open("wb") as target:
                source.seek(-MAX_LOG_BYTES, os.SEEK_END)
                target.write(source.read(MAX_LOG_BYTES))
            os.truncate(path, 0)
        except OSError as error:
            self._on_event(f"{path} cannot be rotated: {error}")
