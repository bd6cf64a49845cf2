"""``cod replay``: a recorded step computed again, and what of it is the same."""

from __future__ import annotations

import re
from pathlib import Path

import typer

from cod_async.commands.output import print_json, print_table
from cod_async.errors import InputError

_DIGEST = re.compile(r"[0-9a-f]{64}")
MAX_SHOWN = 6
"""Rows of the table that are shown when everything is equal; those that differ always are."""


def run_replay(
    run_dir: Path,
    *,
    step: int | None,
    lineage: int | None,
    failed: Path | None,
    device: str | None,
    out: Path | None,
    is_json: bool,
) -> int:
    """Do what ``cod replay`` was asked for and return the exit code: 1 if anything differs."""
    problems = []
    if (step is None) == (failed is None):
        problems.append("cod replay: give either --step N or --failed FILE")
    if failed is not None and lineage is not None:
        problems.append(f"--lineage {lineage}: a failed step knows its lineage; leave it out")
    if step is not None and step < 0:
        problems.append(f"--step {step}: steps count from 0")
    if device not in (None, "auto", "cpu", "cuda"):
        problems.append(f"--device {device}: unknown; use auto, cpu or cuda")
    if out is not None and not out.parent.is_dir():
        problems.append(f"--out {out}: its folder does not exist; choose another file")
    if out is not None and out.is_dir():
        problems.append(f"--out {out}: is a folder; choose a file")
    if problems:
        raise InputError(problems)
    from cod_async.learner.replaying import replay_failed, replay_step

    if failed is not None:
        replay = replay_failed(run_dir, failed, device=device, out=out)
    else:
        assert step is not None  # noqa: S101  (checked above)
        replay = replay_step(run_dir, step, lineage=lineage, device=device, out=out)
    if is_json:
        print_json(replay.answer())
        return 0 if replay.is_equal else 1
    differing = [one for one in replay.compared if not one.is_equal]
    rows = [
        {"name": one.name, "recorded": _shown(one.recorded), "replayed": _shown(one.replayed),
         "is_equal": one.is_equal}
        for one in (differing or replay.compared[:MAX_SHOWN])
    ]  # fmt: skip
    start, way = replay.start, len(replay.start.steps)
    print_table(rows, f"step {replay.version}, from {start.kind} {start.version} over {way} steps")
    for note in replay.notes:
        typer.echo(note)
    for segment, count in replay.nonfinite_segments.items():
        typer.echo(f"{segment}: {count} tokens are not finite")
    count = len(replay.compared)
    exactly = " to the bit" if replay.is_exact else ""
    typer.echo(f"{len(differing)} of {count} differ" if differing else f"all {count} are equal{exactly}")
    return 1 if differing else 0


def _shown(value: float | str) -> str:
    """Return a number with every digit that tells it from its neighbors, and the beginning of a digest."""
    return repr(value) if isinstance(value, float) else value[:12] if _DIGEST.fullmatch(value) else value
