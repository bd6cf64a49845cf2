"""Evaluation beside training: every N steps a version is evaluated by a child process of low priority.

The launcher looks for new versions on disk, pins those that are due (hard links, so the learner may prune),
and evaluates one at a time. Training never waits: if a version becomes due while another is being evaluated,
it replaces the one that was waiting, which is counted as skipped. What is finished and what is waiting is
kept in ``evaluation/in_training.json``, and lifecycles in ``evaluation/in_training``, so a launcher that is
killed and resumed goes on where it was. When a learner goes back to a checkpoint, evaluations of the history
that did not happen are dropped.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from cod_async.config.schema import Config
from cod_async.durable import remove_folder, write_atomic
from cod_async.errors import InputError, StoreError
from cod_async.evaluate.targets import pin
from cod_async.launch.export import trained_versions
from cod_async.launch.parent import PARENT_VARIABLE
from cod_async.launch.run_folder import child_environment, cod_command
from cod_async.lifecycle.segment import Version
from cod_async.observe.metrics import METRICS_NAME, MetricsReader
from cod_async.observe.summary import EVALUATION_DIR, IN_TRAINING_NAME
from cod_async.weights.folders import WEIGHTS_FOLDER

FOLDER = "in_training"
"""Folder of results inside :data:`EVALUATION_DIR`."""
LOG_NAME = "evaluation.log"
_LOOK_S = 0.5
_MAX_ATTEMPTS = 2
_END_S = 5.0
_MAX_LOG_BYTES = 4 << 20
_ROW_FIELDS = (
    "entry", "environment", "preset", "split", "mode", "carry", "control", "position", "mean", "sem", "n",
)  # fmt: skip


class Waiting(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A version that is pinned and waits, or is being evaluated.

    Attributes:
        version: which one.
        attempts: how often its evaluation was started.
        is_abandoned: whether the learner went back to a version before it, so that it does not count.
    """

    version: Version
    attempts: int = 0
    is_abandoned: bool = False


class Journal(msgspec.Struct, kw_only=True, forbid_unknown_fields=True):
    """What ``in_training.json`` holds.

    Attributes:
        suite: what is played; empty for the run's own environments.
        every_steps: how often.
        points: ``{version, lineage, step, wall_s, rows, reports}`` of every finished evaluation that still
            counts.
        num_skipped: due versions that were never evaluated because training was faster.
        num_failed: versions whose evaluation failed.
        newest: the newest version that was due.
        running, pending: what is being evaluated, and what comes next.
    """

    suite: str = ""
    every_steps: int = 0
    points: list[dict[str, Any]] = []
    num_skipped: int = 0
    num_failed: int = 0
    newest: Version | None = None
    running: Waiting | None = None
    pending: Waiting | None = None


def notice(
    journal: Journal, version: Version, every_steps: int, branch_steps: Mapping[int, int]
) -> list[Version]:
    """Note the newest version on disk.

    Args:
        journal: changed: what an abandoned history evaluated is dropped, skipped versions are counted, and
            the version becomes the newest and the pending one if it is due.
        version: the newest version on disk.
        every_steps: N; a version is due when it is the first to reach a multiple of N.
        branch_steps: lineage -> last step that it shares with the lineage it left.

    Returns:
        Versions that waited and no longer do.
    """
    no_longer = []
    newest = journal.newest
    if newest is not None and version.lineage > newest.lineage:
        opened = range(newest.lineage + 1, version.lineage + 1)
        shared = min(branch_steps.get(number, version.step) for number in opened)
        journal.points = [point for point in journal.points if point["step"] <= shared]
        if journal.pending is not None and journal.pending.version.step > shared:
            no_longer.append(journal.pending.version)
            journal.pending = None
        if journal.running is not None and journal.running.version.step > shared:
            journal.running = msgspec.structs.replace(journal.running, is_abandoned=True)
        journal.newest = newest = Version(lineage=version.lineage, step=min(newest.step, shared))
    last = -1 if newest is None else newest.step // every_steps
    number = version.step // every_steps
    if number <= last:
        return no_longer
    journal.num_skipped += number - last - 1
    if journal.pending is not None:
        no_longer.append(journal.pending.version)
        journal.num_skipped += 1
    journal.newest, journal.pending = version, Waiting(version=version)
    return no_longer


class InTraining:
    """Evaluates versions of a run while it is being trained.

    Args:
        run_dir: the run folder.
        config: the run's configuration, with ``evaluation.every_steps`` above 0.
        on_event: called with one line of text per finished or failed evaluation.
        time_s: seconds since the run was started, for the metrics.
    """

    def __init__(
        self, run_dir: Path, config: Config, on_event: Callable[[str], None], time_s: Callable[[], float]
    ) -> None:
        self._run_dir = run_dir
        self._config = config
        self._on_event = on_event
        self._time_s = time_s
        self._folder = run_dir / EVALUATION_DIR / FOLDER
        self._child: subprocess.Popen[bytes] | None = None
        self._started_s = 0.0
        self._looked_s = -_LOOK_S
        self._journal = self._read()
        self._repair()

    @property
    def is_idle(self) -> bool:
        """Whether nothing is being evaluated or waits for it."""
        return self._child is None and self._journal.pending is None and self._journal.running is None

    def poll(self) -> None:
        """Take in what finished, look for what is due, and start what waits; returns at once."""
        self._take_in()
        now = time.monotonic()
        if now - self._looked_s >= _LOOK_S:
            self._looked_s = now
            self._look()
        if self._child is None:
            self._start()

    def close(self) -> None:
        """End a running evaluation; its finished lifecycles stay, and the next launch goes on with it."""
        child, self._child = self._child, None
        if child is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(child.pid, signal.SIGTERM)
        try:
            child.wait(_END_S)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def _look(self) -> None:
        """Pin the newest version if it is due."""
        # only what was published can be linked; a checkpoint would have to be put together first
        versions = trained_versions(self._run_dir, (WEIGHTS_FOLDER,))
        if not versions:
            return
        version, before = max(versions), self._journal.newest
        if before is None and min(versions).step == 0:
            version = min(versions)  # the starting weights, however fast training was since
        no_longer = notice(
            self._journal, version, self._config.evaluation.every_steps, self._branch_steps(version)
        )
        if self._journal.newest == before:
            return
        if self._journal.pending is not None and self._journal.pending.version == version:
            try:
                pin(self._run_dir, version, self._folder / "models")
            except InputError:  # pruned between two looks: a newer one is there already
                self._journal.pending = None
                self._journal.num_skipped += 1
        for old in no_longer:
            remove_folder(self._folder / "models" / str(old))
        self._save()

    def _branch_steps(self, version: Version) -> dict[int, int]:
        newest = self._journal.newest
        if newest is None or version.lineage <= newest.lineage:
            return {}
        from cod_async.store.schema import connect_reader

        try:
            with contextlib.closing(connect_reader(self._run_dir)) as connection:
                rows = connection.execute("SELECT lineage, branch_step FROM lineages").fetchall()
        except StoreError:
            return {}
        return {int(lineage): int(step) for lineage, step in rows}

    def _start(self) -> None:
        """Start what waits."""
        journal = self._journal
        waiting = journal.running or journal.pending
        if waiting is None:
            return
        if journal.running is None:
            journal.pending = None
        journal.running = msgspec.structs.replace(waiting, attempts=waiting.attempts + 1)
        self._save()
        log = self._run_dir / "logs" / LOG_NAME
        log.parent.mkdir(exist_ok=True)
        is_long = log.is_file() and log.stat().st_size > _MAX_LOG_BYTES
        environment = child_environment(1)
        environment[PARENT_VARIABLE] = f"{os.getpid()}:{_END_S:g}"
        with log.open("wb" if is_long else "ab") as out:
            self._child = subprocess.Popen(
                ["nice", "-n", "19", *cod_command(*self._arguments(waiting.version))],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=out,
                env=environment,
                process_group=0,
            )
        self._started_s = time.monotonic()

    def _arguments(self, version: Version) -> Sequence[str]:
        config = self._config
        arguments = ["eval", str(self._folder / "models" / str(version)), "--label", str(version)]
        arguments += ["--config", str(self._run_dir / "config.json"), "--out", str(self._folder)]
        arguments += ["--processes", "1", "--no-plots"]
        if config.evaluation.suite:
            return [*arguments, "--suite", config.evaluation.suite]
        return [*arguments, "--split", "held_out", "--seed", str(config.run.seed)]

    def _take_in(self) -> None:
        """Take in an evaluation that has ended."""
        code = None if self._child is None else self._child.poll()
        running = self._journal.running
        if code is None or running is None:
            return
        self._child = None
        wall_s = time.monotonic() - self._started_s
        answer = self._answer(running.version) if code == 0 else None
        if answer is None and running.attempts < _MAX_ATTEMPTS:
            return  # it is started again
        self._journal.running = None
        remove_folder(self._folder / "models" / str(running.version))
        if answer is None:
            self._journal.num_failed += 1
            self._on_event(
                f"the evaluation of version {running.version} failed with code {code}, see logs/{LOG_NAME}"
            )
            self._save()
            return
        version = running.version
        point: dict[str, Any] = {
            "version": str(version),
            "lineage": version.lineage,
            "step": version.step,
            "wall_s": wall_s,
            "rows": [{name: row[name] for name in _ROW_FIELDS} for row in answer["rows"]],
            "reports": [
                {name: value for name, value in report.items() if name != "rows"} | {"step": version.step}
                for report in answer["reports"]
            ],
        }
        if running.is_abandoned:
            self._save()
            return
        self._journal.points.append(point)
        self._save()
        self._write_metrics(point)
        skipped = f", {self._journal.num_skipped} skipped so far" if self._journal.num_skipped else ""
        gaps = " ".join(f"{report['gap']:+.2f}" for report in answer["reports"][:4])
        self._on_event(f"evaluated version {version} in {wall_s:.0f} s: gap {gaps}{skipped}")

    def _answer(self, version: Version) -> dict[str, Any] | None:
        from cod_async.evaluate.run import ANSWER_NAME

        try:
            answer = json.loads((self._folder / ANSWER_NAME).read_text())
        except (OSError, ValueError):
            return None
        is_ours = [known["label"] for known in answer["checkpoints"]] == [str(version)]
        return answer if is_ours else None

    def _read(self) -> Journal:
        evaluation = self._config.evaluation
        try:
            raw = (self._run_dir / EVALUATION_DIR / IN_TRAINING_NAME).read_bytes()
            journal = msgspec.json.decode(raw, type=Journal)
        except (OSError, msgspec.MsgspecError):
            journal = Journal()
        if (journal.suite, journal.every_steps) != (evaluation.suite, evaluation.every_steps):
            if journal.suite != evaluation.suite:  # other curves; they cannot share a picture
                journal.points = []
            journal.suite, journal.every_steps = evaluation.suite, evaluation.every_steps
        return journal

    def _repair(self) -> None:
        """Go on where a killed launcher was: what it was evaluating goes on after its last lifecycle."""
        journal = self._journal
        for name in ("running", "pending"):
            waiting: Waiting | None = getattr(journal, name)
            if waiting is not None and not (self._folder / "models" / str(waiting.version)).is_dir():
                setattr(journal, name, None)
                journal.num_skipped += 1
            elif waiting is not None:
                setattr(journal, name, msgspec.structs.replace(waiting, attempts=0))
        if not journal.points:
            return
        records = MetricsReader(self._run_dir / METRICS_NAME).poll()
        told = {record.get("version") for record in records if record.get("kind") == "evaluation"}
        for point in journal.points:
            if point["version"] not in told:
                self._write_metrics(point)

    def _save(self) -> None:
        path = self._run_dir / EVALUATION_DIR / IN_TRAINING_NAME
        path.parent.mkdir(exist_ok=True)
        write_atomic(path, msgspec.json.format(msgspec.json.encode(self._journal), indent=1) + b"\n")

    def _write_metrics(self, point: Mapping[str, Any]) -> None:
        """Append one line to the metrics beside the coordinator, which owns the file."""
        record = {
            "kind": "evaluation",
            "time_s": self._time_s(),
            **{name: point[name] for name in ("version", "lineage", "step", "wall_s", "rows")},
            "suite": self._journal.suite,
            "num_skipped": self._journal.num_skipped,
        }
        line = msgspec.json.encode(record) + b"\n"
        handle = os.open(
            self._run_dir / METRICS_NAME, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644
        )
        try:
            size = os.fstat(handle).st_size
            is_torn = size > 0 and os.pread(handle, 1, size - 1) != b"\n"
            os.write(handle, b"\n" + line if is_torn else line)  # one write, so that no other comes between
        finally:
            os.close(handle)
