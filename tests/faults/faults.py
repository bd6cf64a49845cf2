"""What the drill does to a run: each kind of fault, when it strikes, and when it counts as survived."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

from .runner import START_S, DrilledRun, DrillError, Mark, wait_for

MEAN_GAP_S = 0.8
MAX_GAP_S = 5.0
RECOVERY_SHARE = 0.25
AIM_SHARE = 0.5
AIM_S = 3.0
AIM_POLL_S = 0.001
ORPHAN_S = 30.0
"""Processes of a killed launcher end within the run's grace of twenty seconds, and this is longer."""
AIMS = {
    "actor": ("commit",),
    "coordinator": ("commit",),
    "learner": ("checkpoint", "publication"),
    "everything": ("commit", "checkpoint", "publication"),
    "mixed": ("commit", "checkpoint", "publication"),
}


class Over(Exception):
    """The run ended before the fault could be done or survived; it counts if it was done."""


class Fault:
    """Base: kill -9 one process of the role that the drill is named after.

    Args:
        run: the run, launched.
        role: name of the drill.
        rng: draws moments and victims.
    """

    meaning: ClassVar[str] = "kill -9 of one such process, which the launcher restarts"
    num_steps: ClassVar[int] = 120
    max_faults: ClassVar[int] = 7
    """Per run; a child may be restarted twelve times in two minutes before the launcher gives up."""
    overrides: ClassVar[dict[str, Any]] = {}

    def __init__(self, run: DrilledRun, role: str, rng: random.Random) -> None:
        self.run = run
        self.role = role
        self.rng = rng
        self._num_struck = 0

    def prepare(self) -> None:
        """Wait until the run is at work."""
        self.wait(lambda: self.run.step() > 0, "the first step")

    def gap_s(self) -> float:
        """Draw the time to let pass before the next strike."""
        return min(self.rng.expovariate(1 / MEAN_GAP_S), MAX_GAP_S)

    def strike(self) -> dict[str, Any]:
        """Do it once and see the run survive; return what the report says about it.

        Raises:
            Over: the run had ended before.
            DrillError: the run did not survive.
        """
        is_in_recovery = self._num_struck > 0 and self.rng.random() < RECOVERY_SHARE
        self._num_struck += 1
        detail = self.hit(is_in_recovery)
        return {"is_in_recovery": is_in_recovery, **detail}

    def hit(self, is_in_recovery: bool) -> dict[str, Any]:
        """Kill one process of the role; wait until its successor works, or only until it exists."""
        pids: dict[str, int] = {}

        def is_there() -> bool:
            pids.update(self.run.pids(self.role))
            return bool(pids)

        self.wait(is_there, f"a {self.role} to kill")
        name = self.rng.choice(sorted(pids))
        aim = self.aim()
        before, started = self.run.mark(), time.monotonic()
        self.run.kill(pids[name])
        self.wait_back({name: pids[name]}, before, is_in_recovery)
        return {"victim": name, "aim": aim, "recovered_s": round(time.monotonic() - started, 2)}

    # ------------------------------------------------------------------------------------------------ helpers

    def wait(self, is_true: Callable[[], bool], what: str) -> None:
        """Wait until something is true.

        Raises:
            Over: the run ended first.
            DrillError: not in time.
        """
        run = self.run
        wait_for(lambda: run.is_over or is_true(), START_S, f"{run.run_dir.name}: {what}", run.tail)
        if run.is_over and not is_true():
            raise Over

    def wait_back(self, pids: dict[str, int], before: Mark, is_in_recovery: bool) -> None:
        """Wait until killed processes are replaced by working ones, or only by running ones."""

        def is_back(name: str, old: int) -> bool:
            role = name.partition("-")[0]
            pid = self.run.pids(role).get(name)
            if pid is None or pid == old:
                return False
            return is_in_recovery or self.run.has_progressed(role, name, pid, before)

        for name, old in pids.items():
            try:
                self.wait(lambda name=name, old=old: is_back(name, old), f"{name} works again")  # type: ignore[misc]
            except Over:
                return  # the others brought the run to its end without it

    def grace_s(self) -> float:
        """Return the run's grace; that of the drill's configuration while there is no run folder yet."""
        path = self.run.run_dir / "config.json"
        return float(json.loads(path.read_text())["run"]["grace_s"]) if path.is_file() else 20.0

    def aim(self) -> str:
        """Now and then hold the blow until a certain moment comes; return its name, or nothing."""
        if self.rng.random() > AIM_SHARE:
            return ""
        aim = self.rng.choice(AIMS.get(self.role, ("commit",)))
        run_dir, deadline = self.run.run_dir, time.monotonic() + AIM_S
        log = run_dir / "run.sqlite-wal"
        before = _changed_at(log)
        while time.monotonic() < deadline:
            if aim == "commit" and _changed_at(log) != before:
                return aim
            folder = {"checkpoint": "checkpoints", "publication": "weights"}.get(aim)
            if folder and _has_temporary(run_dir / folder):
                return aim
            time.sleep(AIM_POLL_S)
        return ""


def _changed_at(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except FileNotFoundError:
        return 0


def _has_temporary(folder: Path) -> bool:
    try:
        return any(name.endswith(".tmp") for name in os.listdir(folder))
    except FileNotFoundError:
        return False


class Everything(Fault):
    """All at once, then a resume."""

    meaning = "kill -9 of the launcher and all its processes at once, then `cod train --resume`"

    def hit(self, is_in_recovery: bool) -> dict[str, Any]:
        """Kill the launcher and all its processes at once, then resume."""
        if self.run.is_over:
            raise Over
        aim = self.aim()
        self.run.kill_everything()
        left = self.run.wait_gone(2.0)
        if left:
            raise DrillError(f"processes survived kill -9: {left}")
        return {"aim": aim, **self.resume(is_in_recovery)}

    def resume(self, is_in_recovery: bool) -> dict[str, Any]:
        """Launch again and wait for a new step, or for a random moment before it."""
        before, started = self.run.mark(), time.monotonic()
        self.run.launch()
        if is_in_recovery:
            time.sleep(self.rng.uniform(0.0, 5.0))
        else:
            with contextlib.suppress(Over):  # there was nothing left to do
                self.wait(
                    lambda: self.run.has_progressed("learner", "learner", 0, before),
                    "a step after the resume",
                )
        return {"recovered_s": round(time.monotonic() - started, 2)}


class Launcher(Everything):
    """The launcher alone."""

    meaning = "kill -9 of the launcher alone; its processes must end by themselves; then `--resume`"

    def hit(self, is_in_recovery: bool) -> dict[str, Any]:
        """Kill only the launcher; its processes must end by themselves; then resume."""
        if self.run.is_over:
            raise Over
        assert self.run.launcher is not None
        started = time.monotonic()
        self.run.kill(self.run.launcher.pid)
        self.run.launcher.wait()
        left = self.run.wait_gone(ORPHAN_S)
        if left:
            raise DrillError(f"orphans of a killed launcher: {left}")
        return {"gone_s": round(time.monotonic() - started, 2), **self.resume(is_in_recovery)}


class Interrupt(Everything):
    """Ctrl-C and SIGTERM."""

    meaning = (
        "SIGTERM or SIGINT to the launcher: all is sealed, checkpointed and gone in time; then `--resume`"
    )

    def hit(self, is_in_recovery: bool) -> dict[str, Any]:
        """Ask the launcher to stop; look whether it left everything in order; resume."""
        run = self.run
        assert run.launcher is not None
        signum = self.rng.choice((signal.SIGTERM, signal.SIGINT))
        grace_s = self.grace_s()
        started = time.monotonic()
        run.kill(run.launcher.pid, signum)
        code = run.wait_end(grace_s + 5.0)
        stopped_s = time.monotonic() - started
        left = run.wait_gone(1.0)
        if left:
            raise DrillError(f"orphans of an interrupted launcher: {left}")
        if code == 0:
            raise Over  # it had finished before the signal came
        if code != 128 + signum:
            raise DrillError(f"interrupted with {signum.name}, ended with code {code}; {run.tail()}")
        if "killed after" in run.output.read_text(errors="replace"):
            raise DrillError(f"processes did not stop within {grace_s:g} s; {run.tail()}")
        step, saved = run.step(), run.ask("SELECT max(step) FROM checkpoints")
        if saved != step:
            raise DrillError(f"interrupted at step {step}, but the newest checkpoint is of step {saved}")
        live = run.ask("SELECT count(*) FROM sessions WHERE state = 'live'")
        if live:
            raise DrillError(f"{live} sessions did not say goodbye")
        return {"signal": signum.name, "stopped_s": round(stopped_s, 2), **self.resume(is_in_recovery)}

    def strike(self) -> dict[str, Any]:
        """Never during recovery: a learner that has not begun has nothing to checkpoint."""
        return self.hit(False)


class Pause(Fault):
    """A zombie."""

    meaning = (
        "SIGSTOP of an actor with undelivered segments until another one has taken over, then SIGCONT: what "
        "it sends is refused"
    )
    overrides: ClassVar[dict[str, Any]] = {"transport.credit_segments": 2}

    def hit(self, is_in_recovery: bool) -> dict[str, Any]:
        """Stop an actor until its lifecycles are played elsewhere; awake again it must change nothing."""
        run = self.run
        pids, coordinator = run.pids("actor"), run.pids("coordinator")
        if len(pids) < 2 or not coordinator:
            raise Over
        name = self.rng.choice(sorted(pids))
        # While the coordinator is still, the actor plays on and its outbox fills beyond the credit it has.
        run.kill(coordinator["coordinator"], signal.SIGSTOP)
        time.sleep(0.5)
        run.kill(pids[name], signal.SIGSTOP)
        run.kill(coordinator["coordinator"], signal.SIGCONT)
        fenced = "SELECT count(*) FROM refused_segments WHERE reason = 'fenced'"
        try:
            session = run.ask("SELECT max(session) FROM sessions WHERE name = ?", name)
            state = "SELECT state = 'lost' FROM sessions WHERE session = ?"
            self.wait(lambda: bool(run.ask(state, session)), f"{name} expires")
            taken = (
                "SELECT 1 FROM lease_epochs AS old JOIN lease_epochs AS new USING (grp, member) "
                "JOIN segments USING (grp, member) WHERE old.session = ?1 AND new.session <> ?1 "
                "AND new.lease_epoch > old.lease_epoch AND segments.lease_epoch = new.lease_epoch"
            )
            self.wait(lambda: bool(run.ask(taken, session)), f"another actor takes over from {name}")
        finally:
            before = run.ask(fenced)
            run.kill(pids[name], signal.SIGCONT)
        back = (
            "SELECT 1 FROM segments JOIN sessions USING (session) WHERE name = ? AND pid = ? AND session > ?"
        )
        self.wait(lambda: bool(run.ask(back, name, pids[name], session)), f"{name} is given new lifecycles")
        return {"victim": name, "num_fenced": run.ask(fenced) - before}


class Mixed(Fault):
    """Several at once."""

    meaning = "kill -9 of a random handful of the processes at once, which the launcher restarts"

    def hit(self, is_in_recovery: bool) -> dict[str, Any]:
        """Kill one to three processes of any role in the same instant."""
        if self.run.is_over:
            raise Over
        pids = {
            name: pid
            for role in ("coordinator", "learner", "actor")
            for name, pid in self.run.pids(role).items()
        }
        victims = self.rng.sample(sorted(pids), min(len(pids), self.rng.randint(1, 3)))
        aim = self.aim()
        before, started = self.run.mark(), time.monotonic()
        for name in victims:
            self.run.kill(pids[name])
        self.wait_back({name: pids[name] for name in victims}, before, is_in_recovery)
        return {"victim": "+".join(victims), "aim": aim, "recovered_s": round(time.monotonic() - started, 2)}


class Tour(Everything):
    """One of each."""

    meaning = "kill -9 of an actor, the coordinator, the learner, and of everything, in turn in one run"
    num_steps: ClassVar[int] = 60
    max_faults: ClassVar[int] = 4
    order: ClassVar[tuple[str, ...]] = ("actor", "coordinator", "learner", "everything")

    def strike(self) -> dict[str, Any]:
        """Kill the next one, and wait until it works again."""
        victim = self.order[self._num_struck % len(self.order)]
        self._num_struck += 1
        kind = Everything if victim == "everything" else Fault
        return {"victim": victim, **kind(self.run, victim, self.rng).hit(is_in_recovery=False)}


class Edges(Everything):
    """Before there is anything, and when all is done."""

    meaning = "kill -9 of one process or of all, or SIGTERM, while the run starts, and again while it ends"
    num_steps: ClassVar[int] = 12
    max_faults: ClassVar[int] = 2

    def prepare(self) -> None:
        """Strike while it starts."""

    def gap_s(self) -> float:
        """Draw a moment between the launch and the first steps; the second blow waits for the end instead."""
        return self.rng.uniform(0.5, 8.0) if self._num_struck == 0 else 0.0

    def hit(self, is_in_recovery: bool) -> dict[str, Any]:
        """Kill one process or all of them."""
        run = self.run
        if self._num_struck > 1:
            last = self.num_steps - self.rng.randint(0, 2)
            self.wait(lambda: run.step() >= last, "the end")
            time.sleep(self.rng.uniform(0.0, 1.0))
        if run.is_over:
            raise Over
        pids = {
            name: pid for role in ("coordinator", "learner", "actor") for name, pid in run.pids(role).items()
        }
        victim = self.rng.choice([*sorted(pids), "everything", "SIGTERM"])
        if victim == "SIGTERM":
            self.ask_to_stop()
        elif victim == "everything":
            run.kill_everything()
            run.launch()
        else:
            run.kill(pids[victim])
        return {"victim": victim}

    def ask_to_stop(self) -> None:
        """SIGTERM at any moment: the launcher ends in time and leaves nobody; then go on."""
        run = self.run
        assert run.launcher is not None
        run.kill(run.launcher.pid, signal.SIGTERM)
        code = run.wait_end(self.grace_s() + 5.0)
        left = run.wait_gone(1.0)
        if left:
            raise DrillError(f"orphans of an interrupted launcher: {left}")
        if code not in (0, 128 + signal.SIGTERM, -signal.SIGTERM):
            raise DrillError(f"interrupted with SIGTERM, ended with code {code}; {run.tail()}")
        if code != 0:
            run.launch()


FAULTS: dict[str, type[Fault]] = {
    "actor": Fault,
    "coordinator": Fault,
    "learner": Fault,
    "everything": Everything,
    "tour": Tour,
    "mixed": Mixed,
    "edges": Edges,
    "launcher": Launcher,
    "interrupt": Interrupt,
    "pause": Pause,
}
"""The drill's roles."""
