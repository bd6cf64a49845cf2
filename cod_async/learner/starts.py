"""From which weights on disk a recorded step can be reached, and over which other steps.

Three things hold weights: published versions (weights alone, enough for a step with one optimizer step),
checkpoints (with the optimizer's state), and the run's starting model. The nearest that leads to the step
over steps whose payloads are all kept is taken.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from cod_async.errors import InputError
from cod_async.learner.checkpoints.record import all_checkpoints
from cod_async.lifecycle.segment import Version
from cod_async.store.recorded import RecordedRun
from cod_async.weights.publish import published_versions

StartKind = Literal["published", "checkpoint", "model"]


@dataclass(frozen=True)
class Start:
    """Weights on disk and the way to a step.

    Attributes:
        kind: what holds the weights.
        version: of these weights.
        steps: recorded steps that lead from there to the wanted one, in order.
    """

    kind: StartKind
    version: Version
    steps: tuple[Version, ...] = ()


def find_starts(run_dir: Path, run: RecordedRun, version: Version, *, needs_optimizer: bool) -> list[Start]:
    """Return every start that leads to a step, the nearest first.

    Args:
        run_dir: the run folder.
        run: its recorded steps.
        version: that the wanted step starts from.
        needs_optimizer: weights alone are not enough: the step takes several optimizer steps.

    Raises:
        InputError: there is none; says what is missing.
    """
    published, saved = set(published_versions(run_dir)), set(all_checkpoints(run_dir))
    starts: list[Start] = []
    blocked: Version | None = None
    steps: list[Version] = []  # from the version looked at to the wanted one
    for stretch in run.history(version):
        for step in range(stretch.end, stretch.start - 1, -1):
            at = Version(stretch.lineage, step)
            if step < stretch.end:
                if run.num_missing(at):
                    blocked = at
                    break
                steps.insert(0, at)
            starts += _starts_at(at, tuple(steps), at in saved, at in published and not needs_optimizer)
        if blocked is not None:
            break
    if blocked is None and (run_dir / "model").is_dir():
        starts.append(Start("model", Version(version.lineage, 0), tuple(steps)))
    if not starts:
        raise InputError(_why_none(version, blocked, saved))
    return starts


def _starts_at(at: Version, steps: tuple[Version, ...], is_saved: bool, is_published: bool) -> list[Start]:
    found = [Start("checkpoint", at, steps)] if is_saved else []
    if is_published and not steps:  # a published version has no optimizer state to go on with
        found.insert(0, Start("published", at))
    return found


def _why_none(version: Version, blocked: Version | None, saved: set[Version]) -> str:
    known = ", ".join(str(found) for found in sorted(saved)) or "none"
    gone = f"step {version}: its starting weights are gone"
    if blocked is None:
        return f"{gone}, and so is the run's starting model; checkpoints: {known}"
    return (
        f"{gone}, and they cannot be computed again: step {blocked} on the way has lost its payloads "
        f"(store.retention); checkpoints: {known}"
    )
