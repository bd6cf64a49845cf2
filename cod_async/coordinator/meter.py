"""What the coordinator writes for people: a line per step, per event, per start of the learner, and about one
per second.
"""

from __future__ import annotations

import time

from cod_async.coordinator.brain import Brain
from cod_async.store.database import RunStore
from cod_async.store.metrics_log import MetricsLog

_RATES = {
    "segments_per_s": "num_segments",
    "tokens_per_s": "num_tokens",
    "action_tokens_per_s": "num_action_tokens",
}


class StatusMeter:
    """Writes ``metrics.jsonl`` from the brain's numbers and the recorded steps.

    Args:
        brain: asked for its status and its unreported steps.
        metrics: the file.
        store: keeps the time of the run's first start.
    """

    def __init__(self, brain: Brain, metrics: MetricsLog, store: RunStore) -> None:
        self._brain = brain
        self._metrics = metrics
        started = store.get_meta("started_at")
        if started is None:
            started = repr(time.time())
            with store.transaction():
                store.set_meta("started_at", started)
        self._started_at = float(started)
        self._before = brain.status()
        self._before_at = time.monotonic()
        self._lineage = int(self._before["lineage"])

    def write_news(self) -> None:
        """Write a line for each step that has none, and one when the learner opened a lineage."""
        lineage = self._brain.lineage
        if lineage != self._lineage:
            self._lineage = lineage
            self._metrics.append("lineage", time_s=self._time_s(), lineage=lineage, step=self._brain.step)
        rows = self._brain.unreported_steps()
        for row in rows:
            time_s = self._time_s(row.done_at)
            events = row.report.get("events", [])
            numbers = {name: value for name, value in row.report.items() if name != "events"}
            self._metrics.append("step", time_s=time_s, **numbers)
            for event in events:
                at = {"lineage": row.version.lineage, "step": row.version.step}
                self._metrics.append("event", time_s=time_s, **at, **event)
        if rows:
            self._brain.mark_reported(rows)

    def write_event(self, **event: object) -> None:
        """Write one line about something that happened just now; ``event`` has a ``name``."""
        self._metrics.append("event", time_s=self._time_s(), **event)

    def write_status(self, **more: object) -> None:
        """Write one line about the present moment; rates are since the last one."""
        status, now = self._brain.status(), time.monotonic()
        elapsed_s = max(now - self._before_at, 1e-9)
        rates = {rate: (status[name] - self._before[name]) / elapsed_s for rate, name in _RATES.items()}
        self._metrics.append("status", time_s=self._time_s(), **rates, **status, **more)
        self._before, self._before_at = status, now

    def _time_s(self, at: float | None = None) -> float:
        """Seconds since the run was first started (wall clock, for people)."""
        return round((time.time() if at is None else at) - self._started_at, 3)
