"""Computing a recorded step again, to the bit.

The batch comes from the run database, the weights from disk or from replaying the steps that lead to them,
and both go through the very functions of the loop. What is found is compared with what was recorded: loss,
gradient norm and every other metric as float64 bits, weights and gradients by their SHA-256. On one process
of the same machine and torch all of it is equal. Sums of a step that was computed on several ranks have
another order on one, so there only loss and gradient norm are compared, within 1e-6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec

from cod_async.config.load import load_resolved
from cod_async.config.schema import Config
from cod_async.errors import CheckpointError, InputError, NumericsError, WeightsError, WorkError
from cod_async.learner.checkpoints.record import read_record
from cod_async.learner.failing import read_failed
from cod_async.learner.opening import configure_torch, open_trainer, rows_of, use_settings
from cod_async.learner.starts import Start, find_starts
from cod_async.learner.step import Trainer
from cod_async.learner.token_records import TokenRecorder, Tokens, save_records
from cod_async.learner.witness import Witness, num_ranks_of, settings_of, weights_digest
from cod_async.lifecycle.segment import Version
from cod_async.store.recorded import RecordedRun
from cod_async.store.token_records import STATES
from cod_async.weights.publish import version_folder
from cod_async.wire.messages import TrainItem

RANKS_TOLERANCE = 1e-6
"""Relative difference of loss and gradient norm between one process and several ranks."""

_DIGESTS = ("weights", "gradients")
_FIXED = ("recompute", "optimizer", "has_optimizer_offload")
"""Settings that a trainer is made with."""
_CONDITIONS = ("device", "machine", "torch", "num_threads")


@dataclass(frozen=True)
class Compared:
    """One number or digest, recorded and found."""

    name: str
    recorded: float | str
    replayed: float | str
    is_equal: bool


@dataclass
class Replay:
    """What a replay did and found.

    Attributes:
        version: that the step starts from.
        start: kind and version of the weights on disk, and how many steps led from there.
        compared: everything that was compared.
        notes: what else there is to know, a sentence each.
        nonfinite_segments: of a failed step, action tokens that are not finite by segment.
        is_exact: numbers were compared to the bit; False of a step that was computed on several ranks.
    """

    version: Version
    start: Start
    compared: list[Compared]
    notes: list[str] = field(default_factory=list)
    nonfinite_segments: dict[str, int] = field(default_factory=dict)
    is_exact: bool = True

    @property
    def is_equal(self) -> bool:
        """Whether everything that was compared is equal."""
        return all(one.is_equal for one in self.compared)

    def answer(self) -> dict[str, Any]:
        """Return the JSON-able form."""
        return {
            "version": {"lineage": self.version.lineage, "step": self.version.step},
            "is_equal": self.is_equal,
            "is_exact": self.is_exact,
            "start": {
                "kind": self.start.kind,
                "version": {"lineage": self.start.version.lineage, "step": self.start.version.step},
                "num_steps": len(self.start.steps),
            },
            "compared": [vars(one) for one in self.compared],
            "notes": self.notes,
            **({"nonfinite_segments": self.nonfinite_segments} if self.nonfinite_segments else {}),
        }


def replay_step(
    run_dir: Path,
    step: int,
    *,
    lineage: int | None = None,
    device: str | None = None,
    out: Path | None = None,
) -> Replay:
    """Compute a recorded step again and compare.

    Args:
        run_dir: a run folder.
        step: number of the step.
        lineage: that it was taken on; None: the surviving history's.
        device: ``cpu`` or ``cuda``; None: as the run's configuration says.
        out: file for the step's per-token records.

    Raises:
        InputError: the step cannot be replayed; says why.
        StoreError: there is no run database.
    """
    config = load_resolved(run_dir)
    if device is not None:
        config = _with_learner(config, device=device)
    run = RecordedRun(run_dir, is_transcript=config.lifecycle.carry == "transcript")
    version = run.version(step, lineage)
    row = run.step(version)
    recorded: Mapping[str, float] = row.report.get("learner", {})
    witness: Mapping[str, str] = row.report.get("witness", {})
    if not recorded:
        raise InputError(
            f"step {version}: the learner died before it could report its numbers, so there is nothing to "
            "compare with; replay another step"
        )
    items = run.items(version)
    scene = _Scene(run_dir, run, config)
    trainer, start, notes = scene.at(version, witness)
    taken = _take(scene.config_of(witness), trainer, version, items, TokenRecorder(trainer))
    if out is not None:
        save_records(out, version, items, taken.tokens)
    compared = _compare(recorded, witness, taken)
    notes += _differing(witness, taken.witness, compared)
    return Replay(version, start, compared, notes, is_exact=num_ranks_of(witness) == 1)


def replay_failed(run_dir: Path, file: Path, *, device: str | None = None, out: Path | None = None) -> Replay:
    """Compute a batch that was kept in ``failed_steps/`` again, and compare what is wrong with it.

    Args:
        run_dir: the run folder.
        file: the kept batch.
        device: as of :func:`replay_step`.
        out: file for per-token records.

    Raises:
        InputError: the file is none, or its weights cannot be had.
    """
    failed = read_failed(file)
    config = load_resolved(run_dir)
    if device is not None:
        config = _with_learner(config, device=device)
    scene = _Scene(
        run_dir, RecordedRun(run_dir, is_transcript=config.lifecycle.carry == "transcript"), config
    )
    trainer, start, notes = scene.at(failed.version, failed.witness)
    error, recorder = "", TokenRecorder(trainer)
    try:
        _take(scene.config_of(failed.witness), trainer, failed.version, failed.items, recorder)
    except NumericsError as found:
        error = str(found)
        if recorder.has_begun:
            recorder.take()
    same = Compared("error", failed.error, error or "none", failed.error == error)
    replay = Replay(failed.version, start, [same], notes)
    if recorder.has_begun:
        if out is not None:
            save_records(out, failed.version, failed.items, recorder.found())
        replay.nonfinite_segments = _nonfinite(failed.items, recorder.found())
    elif out is not None:
        replay.notes.append(f"{out} was not written: the batch is refused before anything is computed")
    return replay


def _with_learner(config: Config, **changes: Any) -> Config:
    learner = msgspec.structs.replace(config.learner, **changes)
    return msgspec.structs.replace(config, learner=learner)


class _Taken:
    """A step that was computed here: its metrics, witness and per-token records."""

    def __init__(self, metrics: dict[str, float], witness: dict[str, str], tokens: Tokens) -> None:
        self.metrics, self.witness, self.tokens = metrics, witness, tokens


class _Scene:
    """A run, and how trainers of it are made."""

    def __init__(self, run_dir: Path, run: RecordedRun, config: Config) -> None:
        self._run_dir, self._run, self._config = run_dir, run, config

    def config_of(self, witness: Mapping[str, str]) -> Config:
        """Return the configuration under which a step was computed, but on one process."""
        settings = settings_of(witness)
        return _with_learner(self._config, **{**settings, "data_parallel": 1, "sequence_parallel": 1})

    def at(self, version: Version, witness: Mapping[str, str]) -> tuple[Trainer, Start, list[str]]:
        """Return a trainer with the weights of ``version``, how it was made, and what to say about it.

        Raises:
            InputError: there is no way to these weights.
        """
        configure_torch(self.config_of(witness))
        learner = self._config.learner
        # published weights have the adapters added in, so no adapters can start from them
        needs_optimizer = learner.minibatches_per_step > 1 or learner.lora.rank > 0
        starts = find_starts(self._run_dir, self._run, version, needs_optimizer=needs_optimizer)
        wanted = witness.get("weights", "")
        notes = [] if wanted else ["the weights of this step were not digested, so they are not compared"]
        for start in starts:
            self._refuse_way(version, start)
            try:
                trainer = self._open(start, witness)
            except (CheckpointError, WeightsError) as error:
                notes.append(f"passed over {start.kind} {start.version}: {error}")
                continue
            if start.kind == "published" and wanted and weights_digest(trainer.model) != wanted:
                continue  # published in another type than it is trained in
            self._walk(trainer, start)
            return trainer, start, notes
        raise InputError([f"step {version}: none of the weights on disk that lead to it can be used", *notes])

    def _refuse_way(self, version: Version, start: Start) -> None:
        """Refuse a way that one process cannot go to the bit.

        Raises:
            InputError: names the step on it.
        """
        fixed: dict[str, Any] = {}
        for step in start.steps:
            witness = self._run.step(step).report.get("witness", {})
            what = ""
            if num_ranks_of(witness) > 1:
                what = "was computed on several ranks, which one process does not repeat to the bit"
            here = {name: value for name, value in settings_of(witness).items() if name in _FIXED}
            fixed = fixed or here
            if here and here != fixed:
                what = f"was computed with other settings than the one before it ({here})"
            if what:
                raise InputError(
                    f"step {version}: its weights are not on disk, and step {step} on the way {what}; replay "
                    "a step that starts from a checkpoint"
                )

    def _open(self, start: Start, witness: Mapping[str, str]) -> Trainer:
        first = self._run.step(start.steps[0]).report.get("witness", {}) if start.steps else witness
        config = self.config_of(first)
        if start.kind == "checkpoint":
            return open_trainer(self._run_dir, config, read_record(self._run_dir, start.version))
        folder = self._run_dir / version_folder(start.version) if start.kind == "published" else None
        return open_trainer(self._run_dir, config, weights=folder)

    def _walk(self, trainer: Trainer, start: Start) -> None:
        """Take the steps from a start to the wanted one.

        Raises:
            WorkError: the weights on the way are not the recorded ones.
        """
        for version in start.steps:
            witness = self._run.step(version).report.get("witness", {})
            found = weights_digest(trainer.model)
            if witness.get("weights", found) != found:
                raise WorkError(
                    f"step {version}, on the way from {start.kind} {start.version}: the weights are not the "
                    f"recorded ones; {_conditions_text(witness)}"
                )
            config = self.config_of(witness)
            use_settings(trainer, config)
            flat = rows_of(self._run.items(version), config, trainer, version)
            trainer.take_step(flat, version.step)


def _take(
    config: Config, trainer: Trainer, version: Version, items: Sequence[TrainItem], recorder: TokenRecorder
) -> _Taken:
    """Take a step and collect everything that it can be compared by.

    Raises:
        NumericsError: something is not finite; the recorder can still look at it, if it has begun.
    """
    use_settings(trainer, config)
    witness = Witness(trainer, config.learner, is_always=True)
    flat = rows_of(items, config, trainer, version)
    witness.begin(version.step)
    recorder.begin(flat)
    metrics = trainer.take_step(flat, version.step)
    return _Taken(metrics, witness.of_step(), recorder.found())


def _nonfinite(items: Sequence[TrainItem], tokens: Tokens) -> dict[str, int]:
    """Return the number of tokens that are not finite, of the segments that have any."""
    is_bad = tokens["state"] == STATES.index("nonfinite")
    found: dict[str, int] = {}
    start = 0
    for item in items:
        count = 0 if item.is_context else sum(row.num_action_tokens for row in item.rows)
        bad = int(is_bad[start : start + count].sum())
        start += count
        if bad:
            found[str(item.key)] = bad
    return found


def _compare(recorded: Mapping[str, float], witness: Mapping[str, str], taken: _Taken) -> list[Compared]:
    is_whole = num_ranks_of(witness) == 1
    compared = [
        Compared(name, witness[name], taken.witness[name], witness[name] == taken.witness[name])
        for name in (_DIGESTS if is_whole else _DIGESTS[:1])
        if name in witness
    ]
    if not is_whole:
        return compared + [
            Compared(name, old, new, math.isclose(old, new, rel_tol=RANKS_TOLERANCE))
            for name in ("loss", "grad_norm")
            for old, new in [(recorded[name], taken.metrics[name])]
        ]
    first = ("loss", "grad_norm")
    names = [*first, *sorted(name for name in recorded if name in taken.metrics and name not in first)]
    for name in names:
        if name in recorded and not _is_time(name):
            old, new = float(recorded[name]), float(taken.metrics[name])
            compared.append(Compared(name, old, new, old.hex() == new.hex()))
    return compared


def _is_time(name: str) -> bool:
    """Whether a metric is a time or a rate, which no replay repeats."""
    return name.endswith("_s")


def _differing(
    witness: Mapping[str, str], found: Mapping[str, str], compared: Sequence[Compared]
) -> list[str]:
    """Return what to say when something differs, or was not recorded."""
    notes = []
    num_ranks = num_ranks_of(witness)
    if num_ranks > 1:
        notes.append(
            f"computed on {num_ranks} ranks, replayed on one process: loss and gradient norm are compared "
            f"within {RANKS_TOLERANCE:g}, gradients and other metrics are not"
        )
    elif "gradients" not in witness:
        notes.append("the gradients of this step were not digested; their norm is compared")
    changed = [name for name in _CONDITIONS if name in witness and witness[name] != found.get(name)]
    if changed and not all(one.is_equal for one in compared):
        was = ", ".join(f"{name} {witness[name]}" for name in changed)
        now = ", ".join(f"{name} {found.get(name)}" for name in changed)
        notes.append(f"recorded with {was}, replayed with {now}: other bits are to be expected")
    return notes


def _conditions_text(witness: Mapping[str, str]) -> str:
    known = ", ".join(f"{name} {witness[name]}" for name in _CONDITIONS if name in witness)
    return f"they were computed with {known or 'unknown settings'}; replay there"
