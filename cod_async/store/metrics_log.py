"""``metrics.jsonl``: one JSON object per line, appended by the coordinator, read by everything that shows the
run.

A line is appended with one write, so readers see whole lines; a tail that a crash tore off is cut when the
file is opened again. Records have a ``kind``: ``step`` (one per recorded step), ``event`` (what a step made
news of, such as ``mix_parted``), ``status`` (about one per second), ``lineage`` (one per start of the
learner). ``time_s`` counts seconds since the run was first started.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import msgspec

METRICS_NAME = "metrics.jsonl"
_TAIL_BYTES = 1 << 20


class MetricsLog:
    """The metrics file of a run, opened for appending by its one writer.

    Args:
        run_dir: run folder.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / METRICS_NAME
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)
        self._cut_torn_tail()

    def append(self, kind: str, **fields: Any) -> None:
        """Append one record; numbers that are not finite become null."""
        line = msgspec.json.encode({"kind": kind, **fields}) + b"\n"
        while line:
            line = line[os.write(self._file, line) :]

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._file)
        os.close(self._file)

    def _cut_torn_tail(self) -> None:
        size = os.fstat(self._file).st_size
        tail = os.pread(self._file, _TAIL_BYTES, max(0, size - _TAIL_BYTES))
        torn = len(tail) - (tail.rfind(b"\n") + 1)
        if torn:
            os.ftruncate(self._file, size - torn)
