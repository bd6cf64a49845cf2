"""What ``cod train --resume RUN`` finds, said before anything starts.

A lost run database is put back first.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from pathlib import Path

from cod_async.config.schema import Config
from cod_async.errors import CheckpointError, StoreError
from cod_async.learner.checkpoints.record import TrainerRecord, all_checkpoints, describe, read_record
from cod_async.store.history import HistoryTable
from cod_async.store.restoring import Restored, restore_database, why_lost
from cod_async.store.schema import DATABASE_NAME, connect_reader

Tell = Callable[[str], None]


def look_before_resume(run_dir: Path, config: Config, tell: Tell) -> None:
    """Say what a run goes on from, and put its database back if it is lost.

    Args:
        run_dir: the run folder, locked by this launcher.
        config: what the run goes on with.
        tell: called with one line after the other.

    Raises:
        InputError: the database is lost, and there is no copy of it.
    """
    reason = why_lost(run_dir)
    if reason:
        for line in describe_restored(restore_database(run_dir, config.run.name, reason)):
            tell(line)
    record = _newest_record(run_dir, config.run.name, tell)
    if record is None:
        tell("no checkpoint yet: training begins from the starting model")
        return
    learner = config.learner
    tell(f"going on from {describe(record, learner.data_parallel, learner.sequence_parallel)}")
    step = _current_step(run_dir)
    if step is not None:
        num = max(0, step - record.version.step)
        used = "restored from its copy" if reason else "as it was left"
        tell(f"{num} steps after it are rolled back and their segments trained again; run database: {used}")


def describe_restored(restored: Restored) -> list[str]:
    """Return what a restored database means, line by line: what was lost, and where leavings are."""
    record, frontier = restored.record, restored.record.frontier
    age_s = max(0.0, time.time() - record.taken_at)
    lines = [
        f"{DATABASE_NAME} {restored.reason}: restored from the copy beside checkpoint {record.checkpoint}, "
        f"taken {age_s / 60:.0f} minutes ago ({frontier.num_segments} segments, next group "
        f"{frontier.next_group})",
        "LOST is everything that was delivered or trained after that copy: it appears in no ledger",
    ]
    if frontier.version is not None and restored.last_step >= frontier.version.step:
        lines.append(
            f"metrics.jsonl tells of steps up to {restored.last_step}; the copy ends before step "
            f"{frontier.version.step}"
        )
    if restored.kept is not None:
        lines.append(f"what was left of the old database is {restored.kept.name}")
    lines += [
        f"checkpoint {path.name.removeprefix('unknown-')} is newer than the copy and cannot be gone on from: "
        f"it is {path.name} now"
        for path in restored.set_aside
    ]
    return lines


def _newest_record(run_dir: Path, run: str, tell: Tell) -> TrainerRecord | None:
    """Return the newest checkpoint that looks whole; the learner verifies every byte before it loads it."""
    for version in reversed(all_checkpoints(run_dir)):
        try:
            record = read_record(run_dir, version, kinds=())
        except CheckpointError as error:
            tell(f"passing over checkpoint {version}: {error}")
            continue
        if record.run == run:
            return record
        tell(f"passing over checkpoint {version}: it is of run {record.run!r}")
    return None


def _current_step(run_dir: Path) -> int | None:
    try:
        with contextlib.closing(connect_reader(run_dir)) as connection:
            history = HistoryTable(connection)
            lineage = history.current_lineage()
            return None if lineage is None else history.current_step(lineage)
    except StoreError:
        return None
