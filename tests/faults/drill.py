"""Kill processes of real runs at random moments, and let an independent checker judge what is left.

    python -m tests.faults.drill --role all --kills 20 --seed 1 --report faults.json

Moments are drawn from the seed: exponential gaps after the last victim works again; every fourth time no
waiting at all, so that recovery is hit as well; every second time it aims (a commit, a half-written
checkpoint, a half-written publication). One run takes several faults; every run is checked when it is over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .checker import check_run
from .faults import FAULTS, Fault, Over
from .runner import DrilledRun, DrillError

MAIN = ("actor", "coordinator", "learner", "everything")
ADDED_FRACTION = 4
"""The roles that ``all`` adds to the main ones get a fourth of the faults, and at least two."""
END_S = 240.0
ORPHAN_S = 10.0


TOUR_STEPS = 60
"""Steps of the run that the tests hit once in every way; enough for four faults also on a busy machine."""


class Drill:
    """Faults of one role.

    Args:
        folder: for runs, model and journals.
        role: a name in ``FAULTS``.
        rng: draws the moments and the victims.
        tell: called with progress lines.
        num_steps: steps of a run; None takes the role's.
    """

    def __init__(
        self,
        folder: Path,
        role: str,
        rng: random.Random,
        tell: Callable[[str], None],
        num_steps: int | None = None,
    ) -> None:
        self._folder = folder
        self._role = role
        self._rng = rng
        self._tell = tell
        self._num_steps = num_steps
        self.runs: list[dict[str, Any]] = []

    def go(self, num_faults: int) -> dict[str, Any]:
        """Do ``num_faults`` faults over as many runs as it takes; return the role's part of the report."""
        started, done = time.monotonic(), 0
        while done < num_faults:
            report = self.one_run(len(self.runs), num_faults - done)
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
        """Start a run, hit it, wait for its end, check it."""
        name = f"{self._role}-{index}"
        kind = FAULTS[self._role]
        overrides = {"run.num_steps": self._num_steps or kind.num_steps, **kind.overrides}
        run = DrilledRun(self._folder, name, overrides)
        started = time.monotonic()
        faults: list[dict[str, Any]] = []
        problems: list[str] = []
        report: dict[str, Any] = {"run": name, "num_faults": 0, "faults": faults, "problems": problems}
        try:
            run.launch()
            self._hit(kind(run, self._role, self._rng), min(num_faults, kind.max_faults), faults)
            code = run.wait_end(END_S)
            if code != 0:
                problems.append(f"the launcher ended with code {code}; {run.tail()}")
            problems += [f"orphan: {line}" for line in run.wait_gone(ORPHAN_S)]
            self._judge(run, report)
        except DrillError as error:
            problems.append(str(error))
        finally:
            run.destroy()
        report |= {"num_faults": len(faults), "wall_s": round(time.monotonic() - started, 1)}
        counts = ", ".join(f"{count:,} {what}" for what, count in report.get("counts", {}).items())
        self._tell(
            f"{name}: {len(faults)} faults, {report['wall_s']:.0f} s, {len(problems)} problems; {counts}"
        )
        for problem in problems[:5]:
            self._tell(f"  {problem}")
        return report

    def _hit(self, fault: Fault, num_faults: int, faults: list[dict[str, Any]]) -> None:
        try:
            fault.prepare()
            while len(faults) < num_faults:
                gap_s = fault.gap_s()
                time.sleep(gap_s)
                step = fault.run.step()
                faults.append({"step": step, "gap_s": round(gap_s, 3), **fault.strike()})
        except Over:
            pass

    def _judge(self, run: DrilledRun, report: dict[str, Any]) -> None:
        verdict = check_run(run.run_dir, run.acks)
        report["problems"] += verdict.problems
        report["counts"] = verdict.counts
        report["ledger"] = ledger = run.ledger()
        if not ledger["balanced"]:
            report["problems"].append(f"the ledger is not balanced: {ledger}")
        if ledger["segments"]["in_flight"] or ledger["tokens"]["in_flight"]:
            report["problems"].append(f"something is in flight after the end: {ledger}")


def table(roles: list[dict[str, Any]], seed: int) -> str:
    """Return the report as Markdown."""
    columns = (
        "role", "faults", "in recovery", "aimed", "runs", "acknowledged", "trained", "steps rolled back",
        "takeovers", "refused", "broken promises", "seconds",
    )  # fmt: skip
    lines = [
        "# Fault drill",
        "",
        f"Written by `make faults` (seed {seed}): real runs, hit at random moments and judged when over by",
        "`tests/faults/checker.py`, which reads the run database and the checkpoints by itself and takes the",
        "actors' own journals as witness for what was acknowledged.",
        "",
        f"| {' | '.join(columns)} |",
        "|" + "---|" * len(columns),
    ]
    for part in roles:
        sums: dict[str, int] = {}
        for run in part["runs"]:
            for name, count in run.get("counts", {}).items():
                sums[name] = sums.get(name, 0) + count
        faults = [fault for run in part["runs"] for fault in run["faults"]]
        cells = [
            part["num_faults"],
            sum(bool(fault.get("is_in_recovery")) for fault in faults),
            sum(bool(fault.get("aim")) for fault in faults),
            part["num_runs"],
            *(
                sums.get(name, 0)
                for name in ("acked", "trained", "rolled_back_steps", "takeovers", "refused")
            ),
            part["num_problems"],
            round(part["wall_s"]),
        ]
        lines.append(f"| {part['role']} | {' | '.join(f'{cell:,}' for cell in cells)} |")
    lines += ["", "What the roles mean:", ""]
    lines += [f"- `{part['role']}`: {FAULTS[part['role']].meaning}" for part in roles]
    return "\n".join(lines) + "\n"


def parse(arguments: list[str]) -> argparse.Namespace:
    """Parse the command line."""
    roles = "; ".join(f"{name}: {kind.meaning}" for name, kind in FAULTS.items())
    parser = argparse.ArgumentParser(
        prog="python -m tests.faults.drill", description=f"Fault drill. {roles}."
    )
    parser.add_argument("--role", choices=[*FAULTS, "all"], default="all")
    parser.add_argument("--kills", type=int, default=20, help="faults per role")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--report", type=Path, help="JSON report; a Markdown table is written beside it")
    parser.add_argument("--keep", type=Path, help="keep the runs in this folder")
    parser.add_argument(
        "--soak", type=float, default=0.0, help="go on with ever new seeds for so many seconds"
    )
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run the drill; return 0 when no promise was broken and every fault was done."""
    options = parse(sys.argv[1:] if arguments is None else arguments)
    # So that nothing outlives a drill that is stopped: the runs' processes die in a ``finally``.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    deadline, is_good = time.monotonic() + options.soak, True
    with tempfile.TemporaryDirectory(prefix="cod-faults-") as scratch:
        for seed in itertools.count(options.seed):
            folder = (options.keep or Path(scratch)) / f"seed-{seed}"
            parts, is_round_good = one_round(options, seed, folder)
            is_good = is_good and is_round_good
            print(table(parts, seed), flush=True)
            if time.monotonic() >= deadline or not is_good:
                break
            shutil.rmtree(folder, ignore_errors=True)
    return 0 if is_good else 1


def one_round(options: argparse.Namespace, seed: int, folder: Path) -> tuple[list[dict[str, Any]], bool]:
    """Go through the roles once and write the report; return its parts and whether all was well."""
    parts: list[dict[str, Any]] = []
    is_good = True
    folder.mkdir(parents=True, exist_ok=True)
    for role in FAULTS if options.role == "all" else (options.role,):
        is_added = options.role == "all" and role not in MAIN
        wanted = max(2, options.kills // ADDED_FRACTION) if is_added else options.kills
        # Seeded by role, so that one role alone does what it does among all.
        drill = Drill(folder, role, random.Random(f"{seed}-{role}"), lambda line: print(line, flush=True))
        part = drill.go(wanted)
        parts.append(part)
        is_good = is_good and part["num_faults"] >= wanted and part["num_problems"] == 0
        if options.report:  # after every role: an interrupted drill leaves what it found
            options.report.parent.mkdir(parents=True, exist_ok=True)
            report = {"seed": seed, "kills": options.kills, "roles": parts}
            options.report.write_text(json.dumps(report, indent=1) + "\n")
            options.report.with_suffix(".md").write_text(table(parts, seed))
    return parts, is_good


if __name__ == "__main__":
    sys.exit(main())
