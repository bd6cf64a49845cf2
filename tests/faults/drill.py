"""Kill processes of real runs at random moments, and let an independent checker judge what is left.

    python -m tests.faults.drill --role all --kills 20 --seed 1 --report docs/reports/faults.json

Roles: ``actor``, ``coordinator``, ``learner`` (kill -9 of one process, which the launcher restarts),
``everything`` (kill -9 of the launcher and all its processes at once, then ``--resume``), ``launcher`` (kill -9 of the
launcher alone, whose processes must end by themselves, then ``--resume``), ``interrupt`` (SIGTERM or SIGINT to the
launcher, then ``--resume``), ``pause`` (SIGSTOP of an actor beyond its lease, then SIGCONT), ``all``. One run takes
several faults; every run is checked when it is over. Moments are drawn from the seed: exponential gaps after the
last victim works again, and every fourth time no waiting at all, so that recovery is hit as well.
"""

from __future__ import annotations

import argparse
import json
import random
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checker import check_run
from .runner import START_S, DrilledRun, DrillError, wait_for

KILLED = ("actor", "coordinator", "learner", "everything")
ROLES = (*KILLED, "launcher", "interrupt", "pause")
KILLS_PER_RUN = 7
"""A child may be restarted twelve times in two minutes before the launcher gives up, so no run takes more."""
SHORT_FRACTION = 4
"""The roles that ``all`` adds to the four main ones get a fourth of the faults, and at least one."""
MEAN_GAP_S = 0.8
END_S = 240.0
ORPHAN_S = 10.0
STEPS = {"pause": 60}
"""Steps of a run by role, so long that its faults find it at work; 120 where nothing is said."""


class Drill:
    """Faults of one role.

    Args:
        folder: for runs, model and journals.
        role: see the module.
        rng: draws the moments and the victims.
        tell: called with progress lines.
    """

    def __init__(self, folder: Path, role: str, rng: random.Random, tell: Callable[[str], None]) -> None:
        self._folder = folder
        self._role = role
        self._rng = rng
        self._tell = tell
        self.runs: list[dict[str, Any]] = []

    def go(self, num_faults: int) -> dict[str, Any]:
        """Do ``num_faults`` faults over as many runs as it takes; return the role's part of the report."""
        started, done = time.monotonic(), 0
        while done < num_faults:
            report = self.one_run(len(self.runs), min(KILLS_PER_RUN, num_faults - done))
            self.runs.append(report)
            done += report["num_faults"]
            if report["problems"] or report["num_faults"] == 0:
                break
        return {
            "role": self._role,
            "num_faults": done,
            "num_runs": len(self.runs),
            "num_problems": sum(len(run["problems"]) for run in self.runs),
            "wall_s": round(time.monotonic() - started, 1),
            "runs": self.runs,
        }

    def one_run(self, index: int, num_faults: int) -> dict[str, Any]:
        """Start a run, hit it up to ``num_faults`` times, wait for its end, check it."""
        name = f"{self._role}-{index}"
        overrides: dict[str, Any] = {"run.num_steps": STEPS.get(self._role, 120)}
        run = DrilledRun(self._folder, name, overrides)
        started = time.monotonic()
        report: dict[str, Any] = {"run": name, "num_faults": 0, "faults": [], "problems": []}
        try:
            run.launch()
            self._hit(run, num_faults, report)
            code = run.wait_end(END_S)
            if code != 0:
                report["problems"].append(f"the launcher ended with code {code}; {run.tail()}")
            left = run.wait_gone(ORPHAN_S)
            report["problems"] += [f"orphan: {line}" for line in left]
            self._judge(run, report)
        except DrillError as error:
            report["problems"].append(str(error))
        finally:
            run.destroy()
        report["wall_s"] = round(time.monotonic() - started, 1)
        self._tell(
            f"{name}: {report['num_faults']} faults, {report['wall_s']:.0f} s, "
            f"{report.get('counts', {})}, {len(report['problems'])} problems"
        )
        for problem in report["problems"][:5]:
            self._tell(f"  {problem}")
        return report

    def _judge(self, run: DrilledRun, report: dict[str, Any]) -> None:
        verdict = check_run(run.run_dir, run.acks)
        report["problems"] += verdict.problems
        report["counts"] = verdict.counts
        ledger = run.ledger()
        report["ledger"] = ledger
        if not ledger["balanced"]:
            report["problems"].append(f"the ledger is not balanced: {ledger}")
        if ledger["segments"]["in_flight"] or ledger["tokens"]["in_flight"]:
            report["problems"].append(f"something is in flight after the end: {ledger}")

    # -------------------------------------------------------------------------------------------------- faults

    def _hit(self, run: DrilledRun, num_faults: int, report: dict[str, Any]) -> None:
        fault = {
            "everything": self._kill_everything,
            "launcher": self._kill_launcher,
            "interrupt": self._interrupt,
            "pause": self._pause,
        }.get(self._role, self._kill_one)
        if not self._wait_or_over(run, lambda: run.step() > 0, "the first step"):
            return
        while report["num_faults"] < num_faults:
            is_in_recovery = report["num_faults"] > 0 and self._rng.random() < 0.25
            gap_s = min(self._rng.expovariate(1 / MEAN_GAP_S), 5.0)
            time.sleep(gap_s)
            if run.is_over:
                return
            step = run.step()
            detail = fault(run, is_in_recovery)
            if detail is None:
                return
            report["num_faults"] += 1
            report["faults"].append({"step": step, "gap_s": round(gap_s, 3), **detail})

    def _kill_one(self, run: DrilledRun, is_in_recovery: bool) -> dict[str, Any] | None:
        """Kill one process of the role; wait until its successor works, or only until it exists."""
        pids = run.pids(self._role)
        if not pids:
            if not self._wait_or_over(run, lambda: bool(run.pids(self._role)), f"a {self._role}"):
                return None
            pids = run.pids(self._role)
        name = self._rng.choice(sorted(pids))
        before = run.mark()
        started = time.monotonic()
        run.kill(pids[name])

        def is_back() -> bool:
            pid = run.pids(self._role).get(name)
            if pid is None or pid == pids[name]:
                return False
            return is_in_recovery or run.has_progressed(self._role, name, pid, before)

        self._wait_or_over(run, is_back, f"{name} works again")
        return {
            "victim": name,
            "is_in_recovery": is_in_recovery,
            "recovered_s": round(time.monotonic() - started, 2),
        }

    def _kill_everything(self, run: DrilledRun, is_in_recovery: bool) -> dict[str, Any] | None:
        """Kill the launcher and all its processes at once, then resume."""
        run.kill_everything()
        left = run.wait_gone(2.0)
        if left:
            raise DrillError(f"processes survived kill -9: {left}")
        return self._resume(run, is_in_recovery)

    def _kill_launcher(self, run: DrilledRun, is_in_recovery: bool) -> dict[str, Any] | None:
        """Kill only the launcher; its processes must end by themselves; then resume."""
        assert run.launcher is not None
        run.kill(run.launcher.pid)
        run.launcher.wait()
        left = run.wait_gone(ORPHAN_S + 10.0)
        if left:
            raise DrillError(f"orphans of a killed launcher: {left}")
        return self._resume(run, is_in_recovery)

    def _interrupt(self, run: DrilledRun, is_in_recovery: bool) -> dict[str, Any] | None:
        """Ask the launcher to stop; everything is sealed, checkpointed and gone within the grace; then resume."""
        assert run.launcher is not None
        signum = self._rng.choice((signal.SIGTERM, signal.SIGINT))
        config = json.loads((run.run_dir / "config.json").read_text())
        started = time.monotonic()
        run.kill(run.launcher.pid, signum)
        grace_s = float(config["run"]["grace_s"])
        code = run.wait_end(grace_s + 5.0)
        stopped_s = time.monotonic() - started
        left = run.wait_gone(1.0)
        if left:
            raise DrillError(f"orphans of an interrupted launcher: {left}")
        if code == 0:
            return None  # it had finished before the signal came
        if code != 128 + signum:
            raise DrillError(f"interrupted with {signum.name}, ended with code {code}; {run.tail()}")
        if "killed after" in run.output.read_text(errors="replace"):
            raise DrillError(f"processes did not stop within {grace_s:g} s; {run.tail()}")
        step, saved = run.step(), run.ask("SELECT max(step) FROM checkpoints")
        if saved != step:
            raise DrillError(f"interrupted at step {step}, but the newest checkpoint is of step {saved}")
        detail = self._resume(run, is_in_recovery)
        return {"signal": signum.name, "stopped_s": round(stopped_s, 2), **detail}

    def _resume(self, run: DrilledRun, is_in_recovery: bool) -> dict[str, Any]:
        before = run.mark()
        started = time.monotonic()
        run.launch()
        if is_in_recovery:
            time.sleep(self._rng.uniform(0.0, 4.0))
        else:
            self._wait_or_over(
                run, lambda: run.has_progressed("learner", "learner", 0, before), "a step after the resume"
            )
        return {"is_in_recovery": is_in_recovery, "recovered_s": round(time.monotonic() - started, 2)}

    def _pause(self, run: DrilledRun, is_in_recovery: bool) -> dict[str, Any] | None:
        """Stop an actor until its lifecycles are played elsewhere, let it go on: it must change nothing."""
        pids = run.pids("actor")
        name = self._rng.choice(sorted(pids))
        run.kill(pids[name], signal.SIGSTOP)
        try:
            session = run.ask("SELECT max(session) FROM sessions WHERE name = ?", name)
            taken = (
                "SELECT 1 FROM lease_epochs AS old JOIN lease_epochs AS new USING (grp, member) "
                "JOIN segments USING (grp, member) WHERE old.session = ? AND new.session <> ? "
                "AND new.lease_epoch > old.lease_epoch AND segments.lease_epoch = new.lease_epoch"
            )
            state = "SELECT state FROM sessions WHERE session = ?"
            if not self._wait_or_over(run, lambda: run.ask(state, session) == "lost", f"{name} expires"):
                return None
            if not self._wait_or_over(
                run, lambda: bool(run.ask(taken, session, session)), "another actor takes over"
            ):
                return None
        finally:
            run.kill(pids[name], signal.SIGCONT)
        back = (
            "SELECT 1 FROM segments JOIN sessions USING (session) WHERE name = ? AND pid = ? AND session > ?"
        )
        self._wait_or_over(
            run,
            lambda: bool(run.ask(back, name, pids[name], session)),
            f"{name} is leased new lifecycles",
        )
        fenced = run.ask("SELECT count(*) FROM refused_segments WHERE reason = 'fenced'")
        return {"victim": name, "num_fenced": fenced}

    def _wait_or_over(self, run: DrilledRun, is_true: Callable[[], bool], what: str) -> bool:
        """Wait until something is true; return False when the run ended first."""
        wait_for(lambda: run.is_over or is_true(), START_S, f"{run.run_dir.name}: {what}; {run.tail()}")
        return not run.is_over or is_true()


def table(roles: list[dict[str, Any]], kills: int, seed: int) -> str:
    """Return the report as Markdown."""
    lines = [
        "# Fault drill",
        "",
        f"`python -m tests.faults.drill --role all --kills {kills} --seed {seed}`: real runs, hit at random moments and",
        "judged afterwards by `tests/faults/checker.py`, which reads the database and the checkpoints by itself.",
        "",
        "| role | faults | during recovery | runs | segments acknowledged | trained | steps rolled back | takeovers | "
        "fenced | problems | seconds |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for part in roles:

        def total(name: str, part: dict[str, Any] = part) -> int:
            return sum(run.get("counts", {}).get(name, 0) for run in part["runs"])

        recovering = sum(bool(f.get("is_in_recovery")) for run in part["runs"] for f in run["faults"])
        cells = [
            part["role"],
            part["num_faults"],
            recovering,
            part["num_runs"],
            total("acked"),
            total("trained"),
        ]
        cells += [total("rolled_back_steps"), total("takeovers"), total("refused"), part["num_problems"]]
        lines.append(
            "| "
            + " | ".join(f"{c:,}" if isinstance(c, int) else c for c in [*cells])
            + f" | {part['wall_s']:.0f} |"
        )
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults.drill", description=__doc__.split("\n")[0])
    parser.add_argument("--role", choices=[*ROLES, "all"], default="all")
    parser.add_argument("--kills", type=int, default=20, help="faults per role")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="JSON report; a Markdown table is written beside it")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the drill; return 0 when no promise was broken and every fault was done."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    parts: list[dict[str, Any]] = []
    is_good = True
    with tempfile.TemporaryDirectory(prefix="cod-faults-") as scratch:
        folder = options.keep or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for role in ROLES if options.role == "all" else (options.role,):
            is_added = options.role == "all" and role not in KILLED
            wanted = max(1, options.kills // SHORT_FRACTION) if is_added else options.kills
            # Seeded by role, so that one role alone does what it does among all.
            drill = Drill(
                folder, role, random.Random(f"{options.seed}-{role}"), lambda line: print(line, flush=True)
            )
            part = drill.go(wanted)
            parts.append(part)
            is_good = is_good and part["num_faults"] >= wanted and part["num_problems"] == 0
    text = table(parts, options.kills, options.seed)
    print(text)
    if options.report:
        options.report.parent.mkdir(parents=True, exist_ok=True)
        report = {"seed": options.seed, "kills": options.kills, "roles": parts}
        options.report.write_text(json.dumps(report, indent=1) + "\n")
        options.report.with_suffix(".md").write_text(text)
    return 0 if is_good else 1


if __name__ == "__main__":
    sys.exit(main())
