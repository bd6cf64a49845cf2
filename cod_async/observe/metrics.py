"""Reading ``metrics.jsonl`` while it is being written, and the surviving history inside it.

The coordinator appends one JSON object per line. A reader may see a torn last line (it waits for the rest),
and after a rollback it sees steps again under a higher lineage: then the later lineage is what happened, and
the abandoned steps are history that did not happen.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

METRICS_NAME = "metrics.jsonl"
"""File name inside a run folder."""
_CHUNK_BYTES = 1 << 20
_MAX_LINE_BYTES = 8 << 20

Record = dict[str, Any]


class MetricsReader:
    """Follows a metrics file; each :meth:`poll` returns the complete records that were added since the last
    one.

    Args:
        path: the file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._rest = b""
        self.num_bad_lines = 0
        """Complete lines that were not JSON objects (a torn write that a crash left behind)."""

    def poll(self) -> list[Record]:
        """Return new records, oldest first; an incomplete last line is kept for the next call."""
        records: list[Record] = []
        try:
            with self._path.open("rb") as file:
                if self._path.stat().st_size < self._offset:  # replaced by a shorter file: start over
                    self._offset, self._rest = 0, b""
                file.seek(self._offset)
                while chunk := file.read(_CHUNK_BYTES):
                    self._offset += len(chunk)
                    *lines, self._rest = (self._rest + chunk).split(b"\n")
                    records.extend(record for line in lines if (record := self._parse(line)) is not None)
                    if len(self._rest) > _MAX_LINE_BYTES:
                        self._rest = b""
                        self.num_bad_lines += 1
        except FileNotFoundError:
            return []
        return records

    def _parse(self, line: bytes) -> Record | None:
        if not line.strip():
            return None
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if not isinstance(record, dict):
            self.num_bad_lines += 1
            return None
        return record


class History:
    """The surviving training steps of a run, and its newest status record."""

    def __init__(self) -> None:
        self._steps: dict[int, Record] = {}
        self._newest_lineage = 0
        self.status: Record = {}
        """Newest record of kind ``status``; empty before the first."""

    def add(self, records: Iterable[Record]) -> list[Record]:
        """Take in records in file order and return the step records among them."""
        added = []
        for record in records:
            if record.get("kind") == "status":
                self.status = record
            elif record.get("kind") == "step" and isinstance(record.get("step"), int):
                self._add_step(record)
                added.append(record)
        return added

    def _add_step(self, record: Record) -> None:
        step, lineage = record["step"], record.get("lineage", 0)
        if lineage < self._newest_lineage:
            return  # a late line of an abandoned lineage
        if lineage > self._newest_lineage:
            # It branched off at or before this step: what older ones did from here on did not happen. Looked
            # for once per lineage, because runs have many steps and few lineages.
            self._newest_lineage = lineage
            for other in [number for number in self._steps if number >= step]:
                del self._steps[other]
        self._steps[step] = record

    @property
    def steps(self) -> list[Record]:
        """Surviving step records by step."""
        return [self._steps[step] for step in sorted(self._steps)]

    @property
    def last_step(self) -> Record | None:
        """The newest surviving step record."""
        return self._steps[max(self._steps)] if self._steps else None


def read_history(run_dir: Path) -> History:
    """Read a run's whole metrics file."""
    history = History()
    history.add(MetricsReader(run_dir / METRICS_NAME).poll())
    return history


def position_gap(means: Sequence[float | None]) -> float | None:
    """Return mean reward of positions 1.. minus position 0, or None if position 0 or all later ones are
    unknown.
    """
    later = [mean for mean in means[1:] if mean is not None]
    if not means or means[0] is None or not later:
        return None
    return math.fsum(later) / len(later) - means[0]


def mean_by_position(steps: Sequence[Record], key: str = "reward_by_position") -> list[float | None]:
    """Average a per-position metric over step records; positions without data are None."""
    width = max((len(record.get(key) or []) for record in steps), default=0)
    out: list[float | None] = []
    for position in range(width):
        values = [
            value
            for record in steps
            if position < len(record.get(key) or []) and (value := record[key][position]) is not None
        ]
        out.append(math.fsum(values) / len(values) if values else None)
    return out


def window_gap(steps: Sequence[Record], window_steps: int) -> float | None:
    """Return the gap of the mean curve over the last ``window_steps`` steps, as early stopping sees it."""
    return position_gap(mean_by_position(steps[-window_steps:]))


def lag_histogram(steps: Iterable[Record]) -> dict[int, int]:
    """Add up ``lag_histogram`` (lag in steps -> action tokens) over step records."""
    total: Counter[int] = Counter()
    for record in steps:
        for lag, num_tokens in (record.get("lag_histogram") or {}).items():
            total[round(float(lag))] += int(num_tokens)
    return dict(sorted(total.items()))


def lag_statistics(steps: Sequence[Record]) -> dict[str, float]:
    """Return ``{mean, max}`` lag over all trained action tokens, in steps; zeros if nothing was trained."""
    histogram = lag_histogram(steps)
    num_tokens = sum(histogram.values())
    if num_tokens:
        return {
            "mean": sum(lag * count for lag, count in histogram.items()) / num_tokens,
            "max": float(max(histogram)),
        }
    means = [float(record["lag_mean"]) for record in steps if record.get("lag_mean") is not None]
    highest = [float(record["lag_max"]) for record in steps if record.get("lag_max") is not None]
    return {"mean": math.fsum(means) / len(means) if means else 0.0, "max": max(highest, default=0.0)}
