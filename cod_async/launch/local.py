"""``cod train`` on one machine: prepare the folder, make the model, evaluate, supervise training, evaluate,
report.

The launcher itself computes nothing. It starts the coordinator, the learner and the actors as child
processes, keeps them alive, shows what they report in ``metrics.jsonl``, and ends when the learner has taken
its last step. Every phase leaves its result in the run folder, so ``--resume`` goes on with the first
unfinished one.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cod_async.config.load import write_atomic
from cod_async.config.schema import Config
from cod_async.engines.sglang.records import ENGINES_FOLDER
from cod_async.errors import CodError, InputError, StoreError, WorkError
from cod_async.launch import phases
from cod_async.launch.export import newest_version
from cod_async.launch.in_training import InTraining
from cod_async.launch.interrupts import InterruptedRunError, Interrupts
from cod_async.launch.resuming import look_before_resume
from cod_async.launch.run_folder import RunLock, child_environment, cod_command, prepare, read_versions
from cod_async.launch.supervisor import Child, Supervisor
from cod_async.observe.metrics import METRICS_NAME, History, MetricsReader, Record
from cod_async.observe.progress import Progress
from cod_async.observe.summary import (
    bar_table,
    build_summary,
    curve_table,
    headline,
    read_evaluation,
    read_in_training,
    read_summary,
    taught_table,
    write_summary,
)  # fmt: skip

STATE_NAME = "launch.json"
"""What this launcher must remember from one launch to the next."""
FINAL_NAME = "final"
"""Folder of the trained model, a Hugging Face directory."""
_LOOP_S = 0.2
_FINISH_TIMEOUT_S = 10.0
"""The learner's last word reaches the database within this time of its end."""
_LEAVE_S = 2.0
"""Actors that said goodbye end within this time after the coordinator; others are told to."""
_START_TIMEOUT_S = 60.0
"""The coordinator must have an address within this time."""


def train(
    config: Config,
    run_dir: Path,
    resume: bool = False,
    *,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> int:
    """Run a training to its end on this machine.

    Args:
        config: a configuration that passed every check.
        run_dir: the run folder; made if ``resume`` is false.
        resume: go on with an earlier run in this folder.
        overrides: ``a.b=value`` strings that the user gave, recorded with the launch.
        console: where progress goes; standard error by default.

    Returns:
        Exit code: 0 finished, 130 or 143 when interrupted by SIGINT or SIGTERM.

    Raises:
        InputError: the folder is in use, or a child refused its input.
        WorkError: a phase failed, or a process cannot be kept alive; ``summary.json`` says ``failed``.

    Guarantees: when it returns or raises, no process that it started is running.
    """
    run_dir.mkdir(parents=True, exist_ok=True)
    lock = RunLock(run_dir)
    console = console or Console(stderr=True)
    try:
        lock.acquire(config.run.grace_s, lambda text: console.print(text, highlight=False))
        if resume:
            look_before_resume(
                run_dir, config, lambda text: console.print(text, highlight=False, soft_wrap=True)
            )
        prepare(run_dir, config, overrides, is_resume=resume)
        with Interrupts() as interrupts, Progress(config, console) as progress:
            launch = _Launch(config, run_dir, overrides, lock.fd, interrupts, progress)
            return launch.run(console)
    finally:
        lock.release()


class _Launch:
    """One launch of a run: its phases in order, and what they share."""

    def __init__(
        self,
        config: Config,
        run_dir: Path,
        overrides: Sequence[str],
        lock_fd: int,
        interrupts: Interrupts,
        progress: Progress,
    ) -> None:
        self._config = config
        self._overrides = overrides
        self._run_dir = run_dir
        self._lock_fd = lock_fd
        self._interrupts = interrupts
        self._progress = progress
        self._history = History()
        self._reader = MetricsReader(run_dir / METRICS_NAME)
        self._children: list[Child] = []
        self._state: dict[str, Any] = {"seconds": {}, "finished": None, **_read_state(run_dir)}

    def run(self, console: Console) -> int:
        """Run all phases; write the summary whatever happens."""
        status = "failed"
        try:
            self._run_phases()
            status = "finished"
        except InterruptedRunError:
            status = "interrupted"
        finally:
            self._write_summary(status, console)
        return 128 + (self._interrupts.signum or signal.SIGINT) if status == "interrupted" else 0

    def _run_phases(self) -> None:
        config, run_dir = self._config, self._run_dir
        if not phases.has_model(run_dir):
            with self._timed("bootstrap", "making the starting model"), self._interrupts.raising():
                phases.make_model(run_dir, config, self._progress.detail)
        phases.check_teachers(run_dir, config)
        if config.evaluation.is_enabled and read_evaluation(run_dir, "before") is None:
            with (
                self._timed("evaluation_before", "evaluating the starting model"),
                self._interrupts.raising(),
            ):
                phases.evaluate(
                    run_dir, config, "before", run_dir / phases.MODEL_NAME, "start", self._progress.detail
                )
        if not self._is_finished():
            with self._timed("training", f"training for at most {config.run.num_steps} steps"):
                self._train()
        else:
            self._history.add(self._reader.poll())
        self._finish_in_training()
        self._after()

    def _in_training(self) -> InTraining | None:
        """Return what evaluates beside training, None if nothing does."""
        if not self._config.evaluation.every_steps:
            return None
        return InTraining(
            self._run_dir,
            self._config,
            self._progress.event,
            lambda: float(self._history.status.get("time_s") or 0.0),
        )

    def _finish_in_training(self) -> None:
        """Let the last evaluations beside training end, the newest version's among them."""
        beside = self._in_training()
        if beside is None:
            return
        try:
            with (
                self._timed("evaluation_in_training", "finishing the evaluations beside training"),
                self._interrupts.raising(),
            ):
                beside.poll()
                while not beside.is_idle:
                    time.sleep(_LOOP_S)
                    beside.poll()
        finally:
            beside.close()

    def _after(self) -> None:
        config, run_dir = self._config, self._run_dir
        with self._interrupts.raising():
            version = newest_version(run_dir)
            phases.export_final(run_dir, config, FINAL_NAME)
            if config.evaluation.is_enabled:
                with self._timed("evaluation_after", "evaluating the trained model"):
                    label = str(version)
                    phases.evaluate(
                        run_dir, config, "after", run_dir / FINAL_NAME, label, self._progress.detail
                    )
            self._progress.phase("drawing plots and writing transcripts")
            if config.observe.has_plots:
                self._helper("plot")
            if config.observe.num_transcripts:
                from cod_async.observe.transcripts import write_transcripts

                try:
                    write_transcripts(run_dir, config.observe.num_transcripts)
                except (
                    CodError
                ) as error:  # what people look at must not turn a finished run into a failed one
                    self._progress.event(f"no transcripts: {error}")

    def _helper(self, command: str) -> None:
        arguments = (command, str(self._run_dir))
        try:
            phases.run_child(self._run_dir, command, arguments, self._config, lambda: None)
        except (InputError, WorkError) as error:
            self._progress.event(f"cod {command} failed: {error}")

    def _timed(self, name: str, text: str) -> _Timed:
        self._progress.phase(text)
        return _Timed(self, name)

    def add_seconds(self, name: str, seconds: float) -> None:
        """Remember the wall time of a phase, over all launches."""
        known = self._state["seconds"]
        known[name] = known.get(name, 0.0) + seconds
        self._save_state()

    def _save_state(self) -> None:
        write_atomic(self._run_dir / STATE_NAME, json.dumps(self._state, indent=1).encode() + b"\n")

    def _is_finished(self) -> bool:
        """Whether training ended earlier and the configuration asks for no more than it did then."""
        finished = self._state["finished"]
        if finished is None and not self._overrides and _is_closed(self._run_dir):
            finished = _end_of(self._config)  # the launcher died before it could make its own note
        return finished is not None and finished == _end_of(self._config)

    def _is_over(self) -> bool:
        """Whether the run database says that training is over."""
        return bool(_finish_reason(self._run_dir))

    def _has_learner_finished(self) -> bool:
        """Whether the run database says that the learner has taken its last step, and was not merely told to
        stop.
        """
        deadline = time.monotonic() + _FINISH_TIMEOUT_S
        while not self._is_over():
            if time.monotonic() > deadline:
                return False
            time.sleep(0.05)
        return True

    def _train(self) -> None:
        config = self._config
        if config.engine.urls:  # the model is there now, and servers may have ended meanwhile
            from cod_async.launch.engines import check_engines

            with self._interrupts.raising():
                check_engines(config, self._run_dir / phases.MODEL_NAME)
        supervisor = Supervisor(
            self._run_dir / "logs",
            child_environment(config.engine.num_threads),
            grace_s=config.run.grace_s,
            lock_fd=self._lock_fd,
            on_event=self._progress.event,
        )
        self._children = supervisor.children
        try:
            self._start(supervisor)
            self._supervise(supervisor)
        except BaseException:
            self._progress.event(f"stopping all processes, within {config.run.grace_s:g} s")
            self._stop(supervisor, config.run.grace_s)
            raise
        self._state["finished"] = _end_of(config)
        self._save_state()

    def _start(self, supervisor: Supervisor) -> None:
        run, config = str(self._run_dir), self._config
        self._start_engines(supervisor)
        # What an earlier launch left there is the address of a dead coordinator; clients would try it first.
        address = self._run_dir / "coordinator.json"
        before = address.read_bytes() if address.is_file() else None
        # The coordinator and the actors end by themselves only when the run is over.
        supervisor.start("coordinator", "coordinator", cod_command("coordinator", run), is_done=self._is_over)
        deadline = time.monotonic() + _START_TIMEOUT_S
        while not address.is_file() or address.read_bytes() == before:
            supervisor.poll()
            self._raise_if_interrupted()
            if time.monotonic() > deadline:
                raise WorkError(
                    f"the coordinator has no address after {_START_TIMEOUT_S:g} s; see logs/coordinator.log"
                )
            time.sleep(0.05)
        threads = {"OMP_NUM_THREADS": str(config.learner.num_threads)}
        supervisor.start(
            "learner",
            "learner",
            cod_command("learner", run),
            extra=threads,
            is_done=self._has_learner_finished,
        )
        for index in range(config.actors.num_processes):
            name = f"actor-{index}"
            supervisor.start("actor", name, cod_command("actor", run, "--name", name), is_done=self._is_over)
        if config.weights.source == "pull":
            supervisor.start("weights", "weights", cod_command("weights", run))

    def _start_engines(self, supervisor: Supervisor) -> None:
        """Start the hosts of the run's servers, without waiting: actors do, for what they need of them."""
        engine = self._config.engine
        if engine.kind != "sglang":
            return
        shutil.rmtree(self._run_dir / ENGINES_FOLDER, ignore_errors=True)  # an earlier launch's servers
        for index in range(0 if engine.urls else engine.server.num_servers):
            name = f"engine-{index}"
            supervisor.start("engine", name, cod_command("engine", str(self._run_dir), "--name", name))

    def _raise_if_interrupted(self) -> None:
        if self._interrupts.signum is not None:
            raise InterruptedRunError

    def _supervise(self, supervisor: Supervisor) -> None:
        """Poll until the coordinator ends because the run is over, then see the others off.

        The coordinator tells the actors to stop, waits for their last words, closes the books and ends; only
        then nobody is needed any more, so until then whoever dies is started again, the coordinator too.
        """
        events = _Events(self._run_dir, self._config)
        coordinator, learner = (
            next(child for child in supervisor.children if child.role == role)
            for role in ("coordinator", "learner")
        )
        over_s: float | None = None
        beside = self._in_training()
        try:
            while not coordinator.is_finished:
                self._raise_if_interrupted()
                events.write(self._history.add(self._reader.poll()))
                supervisor.poll()
                if learner.is_finished:
                    over_s = over_s or time.monotonic()
                    if time.monotonic() - over_s > 2 * self._config.run.grace_s:
                        break
                self._progress.training(self._history)
                events.plot_if_due()
                if beside is not None:
                    beside.poll()
                time.sleep(_LOOP_S)
            # Who is only just starting again never spoke to the coordinator, and would look for it for ever.
            supervisor.let_go("learner", "actor", "coordinator")
            supervisor.wait(_LEAVE_S, "learner", "actor")
            events.write(self._history.add(self._reader.poll()))
        finally:
            events.close()
            if beside is not None:
                beside.close()
        self._stop(supervisor, min(10.0, self._config.run.grace_s))

    def _stop(self, supervisor: Supervisor, grace_s: float) -> None:
        killed = supervisor.stop(grace_s)
        if killed:
            self._progress.event(f"killed after {grace_s:g} s: {', '.join(killed)}")

    def _write_summary(self, status: str, console: Console) -> None:
        config, run_dir = self._config, self._run_dir
        self._history.add(self._reader.poll())
        processes = [
            {"role": child.role, "name": child.name, "pid": child.pid, "restarts": child.num_restarts}
            for child in self._children
        ]
        if not processes:
            processes = (read_summary(run_dir) or {}).get("processes", [])
        summary = build_summary(
            status=status,
            config=config,
            history=self._history,
            evaluations={name: read_evaluation(run_dir, name) for name in ("before", "after")},
            ledger=_ledger(run_dir),
            processes=processes,
            seconds=self._state["seconds"],
            versions=read_versions(run_dir),
            num_policy_versions=(_ask_store(run_dir, "SELECT COUNT(*) FROM versions") or (0,))[0],
            in_training=read_in_training(run_dir),
        )
        path = write_summary(run_dir, summary)
        self._progress.__exit__(None, None, None)
        for table in (taught_table(run_dir), curve_table(summary), bar_table(summary)):
            if table is not None and table.row_count:
                console.print(table)
        console.print(headline(summary), highlight=False)
        console.print(f"everything is in {path.parent}", highlight=False, soft_wrap=True)
        if status == "interrupted":
            console.print(f"go on with: cod train --resume {run_dir}", highlight=False, soft_wrap=True)


class _Timed:
    """Adds the wall time of a block to a phase, also when the block raises."""

    def __init__(self, launch: _Launch, name: str) -> None:
        self._launch = launch
        self._name = name
        self._started_s = 0.0

    def __enter__(self) -> None:
        self._started_s = time.monotonic()

    def __exit__(self, *exception: object) -> None:
        self._launch.add_seconds(self._name, time.monotonic() - self._started_s)


class _Events:
    """TensorBoard files and redrawn plots while training goes on; both are optional and neither may stop a
    run.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._run_dir = run_dir
        self._config = config
        self._writer: Any = None
        self._plot: subprocess.Popen[bytes] | None = None
        self._plotted_s = time.monotonic()
        if config.observe.has_tensorboard:
            from cod_async.observe.tensorboard import EventWriter

            self._writer = EventWriter(run_dir / "tensorboard")

    def write(self, steps: list[Record]) -> None:
        """Hand step records to TensorBoard."""
        if self._writer is not None:
            self._writer.write(steps)

    def plot_if_due(self) -> None:
        """Redraw the plots in a child of low priority, one at a time."""
        if self._plot is not None and self._plot.poll() is not None:
            self._plot = None
        observe = self._config.observe
        if (
            self._plot is None
            and observe.has_plots
            and time.monotonic() - self._plotted_s >= observe.plot_every_s
        ):
            self._plotted_s = time.monotonic()
            self._plot = subprocess.Popen(
                ["nice", "-n", "19", *cod_command("plot", str(self._run_dir))],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=child_environment(1),
            )

    def close(self) -> None:
        """Flush the event files and end a running plot."""
        if self._plot is not None:
            self._plot.kill()
            self._plot.wait()
        if self._writer is not None:
            self._writer.close()


def _end_of(config: Config) -> dict[str, Any]:
    """Return what decides how long a run goes on; a resume that asks for the same has nothing left to
    train.
    """
    stop = config.run.early_stop
    return {"num_steps": config.run.num_steps, "early_stop_gap": stop.gap if stop.is_enabled else None}


def _read_state(run_dir: Path) -> dict[str, Any]:
    try:
        values = json.loads((run_dir / STATE_NAME).read_text())
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _finish_reason(run_dir: Path) -> str:
    """Return why training is over according to the run database; empty while it is not."""
    found = _ask_store(run_dir, "SELECT value FROM meta WHERE name = 'finished'")
    return str(found[0]) if found else ""


def _is_closed(run_dir: Path) -> bool:
    """Whether training is over and the coordinator has closed the books: no group is left to its fate."""
    left = "SELECT 1 FROM groups WHERE state IN ('open', 'closed', 'planned')"
    return bool(_finish_reason(run_dir)) and _ask_store(run_dir, left) is None


def _ask_store(run_dir: Path, query: str) -> Any:
    """Return the first row that a query finds in the run database; None without a row or a database."""
    from cod_async.store.schema import connect_reader

    try:
        with contextlib.closing(connect_reader(run_dir)) as connection:
            return connection.execute(query).fetchone()
    except StoreError:
        return None


def _ledger(run_dir: Path) -> dict[str, Any] | None:
    from cod_async.store.ledger import ledger
    from cod_async.store.schema import DATABASE_NAME

    return ledger(run_dir) if (run_dir / DATABASE_NAME).is_file() else None
