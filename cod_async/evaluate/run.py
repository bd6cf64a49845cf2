"""One evaluation from end to end: settings and weights in, curves out, everything in between on disk.

Under the output folder lie ``results/DIGEST.jsonl`` (finished lifecycles, one file per set of weights),
``answer.json`` (what the last complete evaluation answered) and ``plots``. Running the same command again
after an interrupt, a kill or a change plays only what is missing.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cod_async.durable import write_atomic
from cod_async.errors import InputError, WorkError
from cod_async.evaluate.agenda import Agenda, Cell
from cod_async.evaluate.report import Report, answer_of, build_reports
from cod_async.evaluate.results import FolderLock, ResultFile
from cod_async.evaluate.suite import Setting, Suite
from cod_async.evaluate.targets import Checkpoint, model_digest
from cod_async.evaluate.workers import Model, Stage, play_here, play_in_processes

ANSWER_NAME = "answer.json"
_TELL_S = 0.5

Progress = Callable[[dict[str, Any]], None]
"""Called about twice a second with ``{checkpoint, done, total, num_kept, num_failed, per_s, left_s}``:
lifecycles over all weights; ``per_s`` and ``left_s`` are None until something was played."""


class _Files:
    """The open files of results; weights that occur twice share one, which must have one writer only."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: dict[str, tuple[ResultFile, int]] = {}

    def open(self, digest: str) -> ResultFile:
        """Return the file of these weights."""
        file, num_users = self._open.get(digest, (None, 0))
        file = file or ResultFile(self._folder / "results" / f"{digest}.jsonl")
        self._open[digest] = (file, num_users + 1)
        return file

    def close(self, digest: str) -> None:
        """Let a file go that :meth:`open` returned."""
        file, num_users = self._open.pop(digest)
        if num_users > 1:
            self._open[digest] = (file, num_users - 1)
        else:
            file.close()


class _Stage:
    """One set of weights, opened when its turn comes."""

    def __init__(
        self, checkpoint: Checkpoint, suite: Suite, settings: Sequence[Setting], files: _Files
    ) -> None:
        self.checkpoint = checkpoint
        self.reports: list[Report] = []
        self.unavailable: list[dict[str, str]] = []
        self.digest = ""
        self._suite = suite
        self._settings = settings
        self._files = files
        self._results: ResultFile | None = None
        self._agenda: Agenda | None = None

    @property
    def agenda(self) -> Agenda:
        """What is left to play; the first call reads the weights and the results."""
        if self._agenda is None:
            self.digest = model_digest(Path(self.checkpoint.model_dir))
            self._results = self._files.open(self.digest)
            cells = [
                Cell(setting, index, seed, self._data_seed(setting, seed))
                for index, setting in enumerate(self._settings)
                for seed in self._suite.seeds
            ]
            self._agenda = Agenda(cells, self._results)
        return self._agenda

    def _data_seed(self, setting: Setting, seed: int) -> int:
        """Return the seed of data and worlds: the entry's, the suite's, or that of the sampling."""
        chosen = self._suite.data_seed if setting.data_seed is None else setting.data_seed
        return seed if chosen is None else chosen

    @property
    def is_open(self) -> bool:
        """Whether its turn has come."""
        return self._agenda is not None

    @property
    def model(self) -> Model:
        """How to open the weights."""
        config = self._settings[0].config
        return Model(
            model_dir=self.checkpoint.model_dir,
            engine=config.engine,
            max_context_tokens=max(s.config.model.max_context_tokens for s in self._settings),
            renderer=config.model.renderer,
            configs=tuple(setting.config for setting in self._settings),
        )

    def close(self) -> None:
        """Make the reports and let the results go."""
        if self._results is None or self._agenda is None:
            return
        label, step = self.checkpoint.label, self.checkpoint.step
        self.reports, self.unavailable = build_reports(label, step, self._agenda.cells, self._results)
        self.abandon()

    def abandon(self) -> None:
        """Close the file of results, if it is open."""
        if self._results is not None:
            self._files.close(self.digest)
            self._results = None


class _Teller:
    """Turns what stages know into progress."""

    def __init__(self, stages: Sequence[_Stage], on_progress: Progress | None) -> None:
        self._stages = stages
        self._on_progress = on_progress
        self._started_s = time.monotonic()
        self._told_s = 0.0

    def __call__(self, stage: Stage) -> None:
        """Tell, unless it was told just now."""
        now = time.monotonic()
        if self._on_progress is None or now - self._told_s < _TELL_S:
            return
        self._told_s = now
        self._tell(stage)

    def last(self) -> None:
        """Tell the end."""
        if self._on_progress is not None:
            self._tell(self._stages[-1])

    def _tell(self, stage: Stage) -> None:
        assert self._on_progress is not None  # noqa: S101
        opened = [known.agenda for known in self._stages if known.is_open]
        total = sum(agenda.total for agenda in opened)
        total += sum(opened[-1].total for known in self._stages if not known.is_open)
        num_played = sum(agenda.num_played for agenda in opened)
        done = sum(agenda.num_done for agenda in opened)
        spent_s = time.monotonic() - self._started_s
        per_s = num_played / spent_s if num_played and spent_s > 0 else None
        self._on_progress(
            {
                "checkpoint": stage.checkpoint.label if isinstance(stage, _Stage) else "",
                "done": done,
                "total": total,
                "num_kept": sum(agenda.num_kept for agenda in opened),
                "num_failed": sum(len(agenda.failures) for agenda in opened),
                "per_s": per_s,
                "left_s": None if per_s is None else max(0, total - done) / per_s,
            }
        )


def evaluate(
    suite: Suite,
    settings: Sequence[Setting],
    checkpoints: Sequence[Checkpoint],
    folder: Path,
    *,
    num_processes: int = 1,
    on_progress: Progress | None = None,
    is_locked: bool = False,
) -> dict[str, Any]:
    """Play what is missing of an evaluation and return all of it.

    Args:
        suite: seeds and name.
        settings: from :func:`cod_async.evaluate.suite.resolve`.
        checkpoints: whose weights, in the order of the answer.
        folder: where results are kept; made if missing.
        num_processes: worker processes; 1 plays in this one.
        on_progress: see :data:`Progress`.
        is_locked: the caller holds the folder's :class:`~cod_async.evaluate.results.FolderLock`.

    Returns:
        ``{suite, rows, reports, not_available, failures, checkpoints, seeds, num_played, num_kept, wall_s,
        out}``, also kept as ``answer.json``; see ``docs/evaluation.md``.

    Raises:
        InputError: a model, the data or the folder cannot be used, or the folder is in use.
        WorkError: a worker ended, or too many lifecycles failed; what is finished is kept.
    """
    if not settings or not checkpoints:
        raise InputError("nothing to evaluate: no entry, or no weights")
    lock = None if is_locked else FolderLock(folder)
    files = _Files(folder)
    stages = [_Stage(checkpoint, suite, settings, files) for checkpoint in checkpoints]
    teller, started_s = _Teller(stages, on_progress), time.monotonic()
    try:
        if num_processes > 1:
            play_in_processes(stages, num_processes, teller)
        else:
            for stage in stages:
                play_here(stage, teller)
                stage.close()
        teller.last()
    finally:
        for stage in stages:
            stage.abandon()
        if lock is not None:
            lock.release()
    answer = answer_of(suite.name, [report for stage in stages for report in stage.reports])
    if not answer["rows"]:
        raise WorkError(f"no lifecycle could be played: {stages[0].agenda.failures[:1]}")
    unavailable = {json.dumps(entry, sort_keys=True): entry for s in stages for entry in s.unavailable}
    answer |= {
        "not_available": list(unavailable.values()),
        "failures": [failure for stage in stages for failure in stage.agenda.failures],
        "checkpoints": [
            {
                "label": stage.checkpoint.label,
                "step": stage.checkpoint.step,
                "lineage": stage.checkpoint.lineage,
                "digest": stage.digest,
            }
            for stage in stages
        ],
        "seeds": list(suite.seeds),
        "num_played": sum(stage.agenda.num_played for stage in stages),
        "num_kept": sum(stage.agenda.num_kept for stage in stages),
        "wall_s": time.monotonic() - started_s,
        "out": str(folder),
    }
    write_atomic(folder / ANSWER_NAME, json.dumps(answer, indent=1, allow_nan=False).encode() + b"\n")
    return answer
