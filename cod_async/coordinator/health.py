"""What the coordinator watches from step to step: the two mixes, and the lag that the autopilot asks for.

Its state is in the reports of the recorded steps, so a restart or a rollback finds it where history left it.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from cod_async.config.schema import Config
from cod_async.coordinator import autopilot
from cod_async.coordinator.mix import MixCounts, MixWindow, gap_event
from cod_async.coordinator.planner import Limits

log = logging.getLogger(__name__)


class Health:
    """The mixes and the autopilot of one run.

    Args:
        config: the resolved configuration.
    """

    def __init__(self, config: Config) -> None:
        self._config = config
        self._window = MixWindow(config.staleness.mix_window_steps)
        self._has_parted = False
        self._num_failed_checkpoints = 0
        self._base = Limits.of(config)
        self._pilot = autopilot.start(config.staleness.max_lag)
        self.limits = self._base

    def restore(self, reports: Sequence[Mapping[str, Any]]) -> None:
        """Go on from the reports of the last recorded steps, oldest first."""
        # a step that only a checkpoint proves was taken was never judged: the one before it knows
        judged = (report for report in reversed(reports) if "is_mix_parted" in report)
        last: Mapping[str, Any] = next(judged, {})
        self._window.restore(reports)
        self._has_parted = bool(last.get("is_mix_parted", False))
        staleness = self._config.staleness
        self._pilot = autopilot.restore(last.get("autopilot"), self._config.autopilot, staleness.max_lag)
        self._set_limits()

    def judge(self, report: dict[str, Any], metrics: Mapping[str, float]) -> dict[str, Any]:
        """Return a taken step's report with the gaps of the mixes, the lag asked for, and what is new.

        Args:
            report: of the plan.
            metrics: the learner's numbers of the step.
        """
        events: list[dict[str, Any]] = []
        more = self._judge_mix(report, events)
        self._judge_checkpoints(metrics, events)
        if self._config.autopilot.is_enabled:
            more["autopilot"] = self._steer(metrics, events)
        for event in events:
            log.warning("run %s: step %s: %s", self._config.run.name, report.get("step"), event)
        return {**report, **more, "events": events}

    def _judge_mix(self, report: Mapping[str, Any], events: list[dict[str, Any]]) -> dict[str, Any]:
        gap = self._window.add(msgspec.convert(report.get("mix", {}), MixCounts))
        threshold = self._config.staleness.mix_warning_frac
        name = gap_event(gap, threshold, has_parted=self._has_parted) if self._window.has_enough else ""
        numbers = {"position_mix_gap_frac": gap.positions, "length_mix_gap_frac": gap.lengths}
        if name:
            self._has_parted = name == "mix_parted"
            events.append({"name": name, "threshold_frac": threshold, **numbers})
        return {**numbers, "is_mix_parted": self._has_parted}

    def _judge_checkpoints(self, metrics: Mapping[str, float], events: list[dict[str, Any]]) -> None:
        """Note that the learner could not write a checkpoint; it counts anew when it is started anew."""
        num_failed = int(metrics.get("num_failed_checkpoints", 0))
        if num_failed > self._num_failed_checkpoints:
            events.append({"name": "checkpoint_failed", "num_failed": num_failed})
        self._num_failed_checkpoints = num_failed

    def _steer(self, metrics: Mapping[str, float], events: list[dict[str, Any]]) -> dict[str, Any]:
        config = self._config
        self._pilot, decision = autopilot.steer(
            self._pilot, metrics, config.autopilot, config.staleness.max_lag
        )
        if decision is not None:
            self._set_limits()
            events.append({"name": f"autopilot_{decision.action}", **msgspec.to_builtins(decision)})
        state: dict[str, Any] = msgspec.to_builtins(self._pilot)
        return state

    def _set_limits(self) -> None:
        if self._config.autopilot.is_enabled:
            self.limits = self._base.steered(self._pilot.lag, self._config.staleness.plan_ahead_steps)
