"""``python -m bench.staleness.grid``: learning at forced lag, run by run, into a file that it can go on from.

Every finished run is one JSON line of ``--out``; runs that stand there are skipped. Worker processes take one
run after the other over their standard input and answer over their standard output. A run that collapses or
ends in numbers that are not finite is a result; a worker that dies is not: its run is left out, and the exit
code is 1. ``python -m bench.staleness.report`` makes tables and plots of the file.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import msgspec
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from bench.staleness.learning import RunResult, run
from bench.staleness.worlds import RECIPES, ROOT, WORLDS, RunSpec, config_of, grid_specs
from cod_async.errors import ConfigError

REPORT_EVERY_STEPS = 10
LAGS = (0, 4, 8, 16, 32)


def read_results(path: Path) -> list[RunResult]:
    """Return the finished runs of a file, the last one of each specification; none if there is no file.

    A line that was cut off by a crash is skipped: its run counts as not done.
    """
    if not path.exists():
        return []
    found: dict[str, RunResult] = {}
    for line in path.read_bytes().splitlines():
        try:
            result = msgspec.json.decode(line, type=RunResult)
        except msgspec.DecodeError:
            continue
        found[result.spec.key] = result
    return list(found.values())


def append_result(path: Path, line: bytes) -> None:
    """Append one line durably; a line that a crash has left without an end is ended first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                line = b"\n" + line
        file.write(line + b"\n")
        file.flush()
        os.fsync(file.fileno())


class _Answer(msgspec.Struct, kw_only=True, omit_defaults=True):
    """A line of a worker: how many steps its run has taken, or what came of it."""

    step: int = 0
    result: RunResult | None = None


def work(models: Path, specs: IO[bytes], answers: IO[bytes]) -> None:
    """Run what comes in, line by line: a specification in, a few lines of progress and a result out."""

    def answer(value: _Answer) -> None:
        answers.write(msgspec.json.encode(value) + b"\n")
        answers.flush()

    for line in specs:
        spec = msgspec.json.decode(line, type=RunSpec)

        def on_step(num: int) -> None:
            if num % REPORT_EVERY_STEPS == 0:
                answer(_Answer(step=num))

        answer(_Answer(result=run(spec, models, on_step)))


class _Board:
    """Progress: a bar on a terminal, a line for each finished run elsewhere."""

    def __init__(self, specs: Sequence[RunSpec]) -> None:
        self._console = Console(stderr=True)
        self._total = sum(spec.num_steps for spec in specs)
        self._num_runs = len(specs)
        self._done_steps = self._done_runs = 0
        self._running: dict[int, int] = {}
        self._start_s = time.monotonic()
        self._lock = threading.Lock()
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
        )
        self._task = self._bar.add_task("steps", total=self._total, rate="")

    def __enter__(self) -> _Board:
        self._bar.start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._bar.stop()

    @property
    def _rate(self) -> float:
        done = self._done_steps + sum(self._running.values())
        return done / max(time.monotonic() - self._start_s, 1e-9)

    def stepped(self, worker: int, num: int) -> None:
        """Note how far the run of a worker is."""
        with self._lock:
            self._running[worker] = num
            done = self._done_steps + sum(self._running.values())
            self._bar.update(self._task, completed=done, rate=f"{self._rate:.1f} steps/s")

    def finished(self, worker: int, spec: RunSpec, text: str) -> None:
        """Note the end of a run."""
        with self._lock:
            self._running.pop(worker, None)
            self._done_steps += spec.num_steps
            self._done_runs += 1
            left_s = (self._total - self._done_steps) / max(self._rate, 1e-9)
            name = f"{spec.world} {spec.recipe} lag {spec.lag} seed {spec.seed}"
            self._console.print(
                f"[{self._done_runs}/{self._num_runs}] {name}: {text}; "
                f"{self._rate:.1f} steps/s, {left_s / 60:.0f} min left",
                markup=False,
                highlight=False,
                soft_wrap=True,
            )


class _Workers:
    """Threads with a process each, which share a queue of runs."""

    def __init__(self, specs: Sequence[RunSpec], out: Path, models: Path, board: _Board) -> None:
        self._todo: queue.SimpleQueue[RunSpec] = queue.SimpleQueue()
        for spec in specs:
            self._todo.put(spec)
        self._out, self._models, self._board = out, models, board
        self._writing = threading.Lock()
        self._processes: dict[int, subprocess.Popen[bytes]] = {}
        self._is_over = threading.Event()

    def run(self, num: int) -> None:
        """Run everything on ``num`` processes; returns when all is done, or ends them when interrupted."""
        threads = [threading.Thread(target=self._serve, args=(index,), daemon=True) for index in range(num)]
        for thread in threads:
            thread.start()
        try:
            for thread in threads:
                while thread.is_alive():
                    thread.join(0.5)
        finally:
            self._is_over.set()
            for process in list(self._processes.values()):
                process.kill()  # its thread's read then ends
            for thread in threads:
                thread.join()
            for process in list(self._processes.values()):
                _end(process)

    def _serve(self, index: int) -> None:
        while not self._is_over.is_set():
            try:
                spec = self._todo.get_nowait()
            except queue.Empty:
                return
            result = self._ask(index, spec)
            if self._is_over.is_set():
                return
            if result is None:
                _end(self._processes.pop(index))
                self._board.finished(index, spec, "the worker died; run it again")
                continue
            with self._writing:
                append_result(self._out, msgspec.json.encode(result))
            late = "-" if result.after is None else f"{result.after.late:.3f}"
            ended = f", ended after {len(result.steps.rewards)} steps: {result.error}" if result.error else ""
            self._board.finished(index, spec, f"late reward {result.before.late:.3f} -> {late}{ended}")

    def _ask(self, index: int, spec: RunSpec) -> RunResult | None:
        """Have a run done; None if the process died."""
        process = self._processes.get(index)
        if process is None:
            command = [
                sys.executable,
                "-m",
                "bench.staleness.grid",
                "--worker",
                "--models",
                str(self._models.resolve()),
            ]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, cwd=ROOT
            )
            self._processes[index] = process
            if self._is_over.is_set():  # too late for those that end the others
                process.kill()
        assert process.stdin is not None and process.stdout is not None
        try:
            process.stdin.write(msgspec.json.encode(spec) + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        for line in process.stdout:
            answer = msgspec.json.decode(line, type=_Answer)
            if answer.result is not None:
                return answer.result
            self._board.stepped(index, answer.step)
        return None


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a worker and close its pipes."""
    process.kill()
    for pipe in (process.stdin, process.stdout):
        with contextlib.suppress(OSError):  # what it had not read yet cannot be flushed
            if pipe is not None:
                pipe.close()
    process.wait()


def run_grid(specs: Sequence[RunSpec], out: Path, models: Path, num_jobs: int) -> int:
    """Run what the file does not have yet.

    Args:
        specs: all runs of the grid.
        out: file of the results, appended to.
        models: folder of the starting models.
        num_jobs: worker processes.

    Returns:
        How many runs were lost with their worker.
    """
    done = {result.spec.key for result in read_results(out)}
    todo = [spec for spec in specs if spec.key not in done]
    models.mkdir(parents=True, exist_ok=True)
    with _Board(todo) as board:
        workers = _Workers(todo, out, models, board)
        workers.run(min(num_jobs, max(len(todo), 1)))
    done = {result.spec.key for result in read_results(out)}
    return sum(spec.key not in done for spec in todo)


def _numbers(text: str) -> Iterator[int]:
    """Yield the numbers of ``0-7`` or ``0,4,8``.

    Raises:
        ValueError: it is neither.
    """
    for part in text.split(","):
        first, dash, last = part.partition("-")
        yield from range(int(first), int(last if dash else first) + 1)


def _list(text: str) -> list[int]:
    """Return the numbers of an option."""
    try:
        return list(_numbers(text))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: write numbers as 0-7 or 0,4,8") from None


def main() -> int:
    """Run a grid, or serve as one of its workers."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.staleness.grid",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--world", choices=sorted(WORLDS), default="door")
    parser.add_argument("--presets", nargs="+", choices=sorted(RECIPES), default=list(RECIPES))
    parser.add_argument("--lags", type=_list, default=list(LAGS), help="such as 0,4,8 (default: 0,4,8,16,32)")
    parser.add_argument("--seeds", type=_list, default=[0, 1, 2], help="such as 0-7 (default: 0-2)")
    parser.add_argument("--steps", type=int, help="optimizer steps of every run (default: by world and lag)")
    parser.add_argument("--lr", type=float, help="learning rate (default: of the world)")
    parser.add_argument("--eval-packs", type=int, help="packs of each evaluation (default: of the world)")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="change of all runs")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument("--out", type=Path, default=Path("runs/lag_grid.jsonl"))
    parser.add_argument("--models", type=Path, help="folder of the starting models (default: beside --out)")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    models = arguments.models or arguments.out.parent / "lag_grid_models"
    if arguments.worker:
        work(models, sys.stdin.buffer, sys.stdout.buffer)
        return 0
    for name, least in (("jobs", 1), ("steps", 1), ("eval_packs", 2)):
        value = getattr(arguments, name)
        if value is not None and value < least:
            parser.error(f"--{name.replace('_', '-')} must be at least {least}, is {value}")
    specs = grid_specs(
        arguments.world,
        arguments.presets,
        arguments.lags,
        arguments.seeds,
        lr=arguments.lr,
        num_steps=arguments.steps,
        num_eval_packs=arguments.eval_packs,
        changes=tuple(arguments.set),
    )
    try:
        for spec in specs:
            config_of(spec)
    except ConfigError as error:
        parser.error(str(error))
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # the workers end with this process
    try:
        num_lost = run_grid(specs, arguments.out, models, arguments.jobs)
    except KeyboardInterrupt:
        print(f"interrupted; the same command goes on from {arguments.out}", file=sys.stderr)
        return 130
    return 1 if num_lost else 0


if __name__ == "__main__":
    sys.exit(main())
