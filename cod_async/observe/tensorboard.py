"""``metrics.jsonl`` as TensorBoard event files, incrementally and outside of the training processes.

The launcher calls :meth:`EventWriter.write` with the step records it has just read anyway. A rolled-back step
appears again under its later lineage; TensorBoard shows the later points.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from cod_async.observe.metrics import Record, position_gap

_SKIPPED = frozenset({"kind", "time_s", "step", "lag_histogram", "mix"})


def scalars(record: Record) -> dict[str, float]:
    """Flatten the numbers of a step record into TensorBoard tags, ``reward_by_position/0`` and
    ``learner/loss``.
    """
    found: dict[str, float] = {}

    def visit(prefix: str, value: Any) -> None:
        if isinstance(value, bool) or value is None:
            return
        if isinstance(value, int | float):
            found[prefix] = float(value)
        elif isinstance(value, dict):
            for key, item in value.items():
                visit(f"{prefix}/{key}", item)
        elif isinstance(value, list):
            for index, item in enumerate(value):
                visit(f"{prefix}/{index}", item)

    for key, value in record.items():
        if key not in _SKIPPED:
            visit(key, value)
    gap = position_gap(record.get("reward_by_position") or [])
    if gap is not None:
        found["reward_gap"] = gap
    return found


class EventWriter:
    """Writes step records as event files under ``log_dir``.

    Args:
        log_dir: folder of the event files; made if missing.
    """

    def __init__(self, log_dir: Path) -> None:
        from tensorboardX import SummaryWriter  # slow to import, and not everybody wants the files

        self._writer = SummaryWriter(logdir=str(log_dir), flush_secs=10)

    def write(self, steps: Iterable[Record]) -> None:
        """Add step records."""
        for record in steps:
            for tag, value in scalars(record).items():
                self._writer.add_scalar(tag, value, global_step=int(record["step"]))

    def close(self) -> None:
        """Flush and close."""
        self._writer.close()
