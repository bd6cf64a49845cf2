"""Feed a million hostile responses to every environment and parser, and report what they cost and broke.

    python -m tests.fuzz.responses --count 1000000 --json docs/reports/response_fuzz.json

Every registered environment with each of its presets, and every parser by itself, is a target and gets its
share of the count, in a process of its own (``--processes`` at once), so that memory can be told apart. Only
mutated and hostile responses count; the valid ones between them, which take an environment deeper, come on
top. The same seed gives the same responses. What breaks is made smaller, written to ``--failures`` as a file
that ``--replay FILE`` plays again, and makes the exit status 1. Beside the JSON lies a table in Markdown.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import os
import platform
import re
import resource
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cod_async.envs import registry

from .parsing import PARSERS, ParserTarget
from .playing import CLEAN_EVERY, EnvironmentTarget, Failure, Tally, raise_runaway, replay

SLOW_S = 2.0
"""CPU seconds of one call that are a finding."""
MAX_GROWTH_BYTES = 64 << 20
"""Most by which the memory of a target's process may grow after the first tenth of its responses."""
MAX_MEMORY_BYTES = 4 << 30
"""Address space of a target's process: what expands beyond it raises MemoryError, which is a finding."""
FAILURES = Path("runs/fuzz")
NUM_SHRINK_TRIES = 200
SHARES = {"pde_discovery": 0.5}
"""Share of an environment's presets in the count relative to other targets."""


def targets() -> dict[str, float]:
    """Return all targets with their share of the count; the shares add up to 1."""
    weights = {f"parser/{name}": 1.0 for name in PARSERS}
    for name in registry.names():
        weights |= {f"{name}/{preset}": SHARES.get(name, 1.0) for preset in registry.get(name).presets}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def make_target(name: str, seed: int, slow_s: float | None) -> ParserTarget | EnvironmentTarget:
    """Return a target by name.

    Args:
        name: one of :func:`targets`.
        seed: of everything.
        slow_s: CPU seconds beyond which a call is a finding; None: times are only recorded.
    """
    kind, _, rest = name.partition("/")
    if kind == "parser":
        return ParserTarget(rest, seed, slow_s)
    return EnvironmentTarget(kind, rest, seed, slow_s)


def _rss_bytes() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def _quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0


def row_of(name: str, tally: Tally) -> dict[str, Any]:
    """Return what the report says of a target; times are CPU milliseconds of one call."""
    return {
        "target": name,
        "num_mutated": tally.num_mutated,
        "num_hostile": tally.num_hostile,
        "num_valid": tally.num_valid,
        "num_lifecycles": tally.num_lifecycles,
        "num_tasks": tally.num_tasks,
        "num_policy_errors": tally.num_policy_errors,
        "finishes": dict(sorted(tally.finishes.items())),
        "step_ms": {
            "median": round(_quantile(tally.step_ms, 0.5), 4),
            "p99": round(_quantile(tally.step_ms, 0.99), 3),
            "max": round(tally.slowest[0], 2),
        },
        "slowest_begins": tally.slowest[1],
        "max_observation_chars": tally.longest["observation"],
        "max_feedback_chars": tally.longest["feedback"],
        "max_snapshot_bytes": tally.longest["snapshot"],
        "digest": tally.digest.hexdigest()[:16],
    }


def run_target(name: str, count: int, seed: int) -> tuple[dict[str, Any], Failure | None]:
    """Run one target in this process and return its row and what broke."""
    signal.signal(signal.SIGPROF, raise_runaway)
    resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_AS)[1]))
    target = make_target(name, seed, SLOW_S)
    failure = target.run(max(count // 10, 1))
    before_bytes = _rss_bytes()
    if failure is None:
        failure = target.run(count)
    growth_bytes = _rss_bytes() - before_bytes
    if failure is None and growth_bytes > MAX_GROWTH_BYTES:
        problem = f"the memory of the process grew by {growth_bytes >> 20} MiB"
        failure = Failure(problem, name, {}, (), str(seed))
    row = row_of(name, target.tally) | {
        "rss_mib": round((before_bytes + growth_bytes) / (1 << 20), 1),
        "rss_growth_mib": round(growth_bytes / (1 << 20), 1),
        "problems": [] if failure is None else [failure.problem],
    }
    return row, failure


def broken_by(target: str, plan: dict[str, Any], responses: tuple[tuple[str, ...], ...]) -> str:
    """Play recorded responses again; return what breaks, or nothing."""
    if plan:
        return replay(plan, responses, SLOW_S)
    found = make_target(target, 0, SLOW_S)
    assert isinstance(found, ParserTarget)
    return next((problem for said in responses for text in said if (problem := found.feed(text))), "")


def shrink(text: str, is_broken: Callable[[str], bool], num_tries: int = NUM_SHRINK_TRIES) -> str:
    """Leave out parts of a text, large ones first, while it stays broken; at most ``num_tries`` checks."""
    size = len(text) // 2
    while size and num_tries > 0:
        place = 0
        while place < len(text) and num_tries > 0:
            shorter = text[:place] + text[place + size :]
            num_tries -= 1
            if is_broken(shorter):
                text = shorter
            else:
                place += size
        size //= 2
    return text


def minimised(failure: Failure) -> Failure:
    """Return a failure with fewer responses and a shorter last one, if it can be played again at all."""

    def is_broken(responses: tuple[tuple[str, ...], ...]) -> bool:
        return bool(broken_by(failure.target, failure.plan, responses))

    responses = failure.responses
    if not responses or not responses[-1] or not is_broken(responses):
        return failure
    alone = (*((() for _ in responses[:-1]) if failure.plan else ()), (responses[-1][-1],))
    responses = alone if is_broken(alone) else responses
    *before, last = responses
    *earlier, text = last

    def with_text(shorter: str) -> tuple[tuple[str, ...], ...]:
        return (*before, (*earlier, shorter))

    text = shrink(text, lambda shorter: is_broken(with_text(shorter)))
    return Failure(failure.problem, failure.target, failure.plan, with_text(text), failure.seed)


def write_failure(folder: Path, failure: Failure) -> Path:
    """Write what broke as JSON and return the file; lone surrogates stay escaped."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^a-z0-9_]+", "-", f"{failure.target}-{failure.seed}".lower())
    path = folder / f"{name}.json"
    path.write_text(json.dumps(asdict(failure), indent=1) + "\n")
    return path


_INTRODUCTION = """# Hostile responses

Written by (Python {python}, seed {seed}):

    {command}

{num_bad:,} responses that no policy means, and {num_valid:,} valid ones between them, to every
environment and preset and to the parsers alone. Checked after each: no exception, a finite reward within
the documented range, valid and bounded texts; after each task also feedback, an unchanged hidden world,
and a snapshot that restores to itself (the lifecycle goes on with the restored copy); every {clean}
lifecycles an undisturbed one of the oracle must earn what it earned at first. A call of more than
{slow_s:g} s of CPU time is a problem as well, and so is a process that grows by more than {growth_mib}
MiB after its first tenth.

Mutated: an answer of a scripted policy, changed one to three times (`tests/fuzz/mutations.py`). Hostile:
well formed and meant for what lies behind the parser (`tests/fuzz/answers.py`). CPU milliseconds per
call; the largest one has page faults, cold caches and the noise of a busy machine in it, and in
`pde_discovery` the solution of a trajectory when it is sampled first. A parser's call is several calls of
it, with checks. Observation: characters of the longest one. Snapshot: bytes of the largest one. Problems:
**{num_problems}**.

| target | mutated | hostile | valid | median ms | p99 ms | max ms | observation | snapshot | grew MiB |
|---|---|---|---|---|---|---|---|---|---|
"""


def markdown(report: dict[str, Any]) -> str:
    """Return the report as a page."""
    page = _INTRODUCTION.format(
        num_bad=report["num_mutated"] + report["num_hostile"],
        clean=CLEAN_EVERY,
        slow_s=SLOW_S,
        growth_mib=MAX_GROWTH_BYTES >> 20,
        num_problems=len(report["problems"]),
        **{name: report[name] for name in ("command", "python", "seed", "num_valid")},
    )
    for row in report["targets"]:
        ms = row["step_ms"]
        cells = [
            row["target"],
            *(f"{row[f'num_{kind}']:,}" for kind in ("mutated", "hostile", "valid")),
            f"{ms['median']:.3f}",
            f"{ms['p99']:.2f}",
            f"{ms['max']:.1f}",
            f"{row['max_observation_chars']:,}",
            f"{row['max_snapshot_bytes']:,}",
            f"{row['rss_growth_mib']:.1f}",
        ]
        page += f"| {' | '.join(cells)} |\n"
    return page


def _in_process(name: str, count: int, arguments: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Run a target in a process of its own."""
    part = folder / f"{name.replace('/', '-')}.json"
    command = [sys.executable, "-m", "tests.fuzz.responses", "--target", name, "--count", str(count)]
    command += ["--seed", str(arguments.seed), "--part", str(part), "--failures", str(arguments.failures)]
    done = subprocess.run(command, check=False)
    if done.returncode != 0 or not part.exists():
        return {"target": name, "problems": [f"the process ended with status {done.returncode}"]}
    row: dict[str, Any] = json.loads(part.read_text())
    say = f"{name}: {row['num_mutated'] + row['num_hostile']:,} responses, p99 {row['step_ms']['p99']} ms"
    print("; ".join([say, *row["problems"]]), flush=True)
    return row


def run_all(arguments: argparse.Namespace, command: str) -> int:
    """Run all targets, each in its process, and write the report; return the exit status."""
    shares = targets()
    counts = {name: max(1, round(arguments.count * share)) for name, share in shares.items()}
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(arguments.processes) as pool:
        rows = list(
            pool.map(lambda item: _in_process(item[0], item[1], arguments, Path(folder)), counts.items())
        )
    problems = [f"{row['target']}: {problem}" for row in rows for problem in row["problems"]]
    origins = ("mutated", "hostile", "valid")
    report = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 1),
        "seed": arguments.seed,
        **{f"num_{kind}": sum(row.get(f"num_{kind}", 0) for row in rows) for kind in origins},
        "problems": problems,
        "targets": rows,
    }
    if arguments.json is not None:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")
        if not problems:
            arguments.json.with_suffix(".md").write_text(markdown(report))
    print("\n".join(problems) or "nothing broke")
    return 1 if problems else 0


def _replay_file(path: Path) -> int:
    failure = json.loads(path.read_text())
    responses = tuple(map(tuple, failure["responses"]))
    signal.signal(signal.SIGPROF, raise_runaway)
    problem = broken_by(failure["target"], failure["plan"], responses)
    print(problem or "it does not break any more")
    return 1 if problem else 0


def main() -> int:
    """Run; return 1 if something broke, 2 for an unknown target."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzz.responses",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--count", type=int, default=100_000, help="mutated and hostile responses in all")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--json", type=Path, help="write the report, and a table beside it")
    parser.add_argument("--failures", type=Path, default=FAILURES, help="folder for what breaks")
    parser.add_argument("--target", help="only this one, in this process")
    parser.add_argument("--part", type=Path, help="with --target: where its row goes")
    parser.add_argument("--replay", type=Path, help="play a file of --failures again")
    arguments = parser.parse_args()
    if arguments.replay is not None:
        return _replay_file(arguments.replay)
    if arguments.count < 1 or arguments.processes < 1:
        parser.error("--count and --processes must be at least 1")
    if arguments.target is None:
        return run_all(arguments, f"python -m tests.fuzz.responses {' '.join(sys.argv[1:])}")
    if arguments.target not in targets():
        parser.error(f"no target {arguments.target!r}; targets are {', '.join(targets())}")
    row, failure = run_target(arguments.target, arguments.count, arguments.seed)
    if failure is not None:
        path = write_failure(arguments.failures, minimised(failure))
        print(f"{failure.target}: {failure.problem}\nwritten to {path}")
    if arguments.part is not None:
        arguments.part.write_text(json.dumps(row))
        return 0
    print(json.dumps(row, indent=1))
    return 1 if failure is not None else 0


if __name__ == "__main__":
    sys.exit(main())
