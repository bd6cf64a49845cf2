"""Live progress of a run in the terminal: what is going on, how fast, how stale, and whether it learns.

On a terminal a small table is redrawn in place; elsewhere (CI, a pipe, a log) a plain line is printed every
few seconds. Both show the same numbers, which all come from ``metrics.jsonl``.
"""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from cod_async.config.schema import Config
from cod_async.observe.metrics import History, mean_by_position, position_gap, window_gap

SMOOTH_STEPS = 10
"""Rates and rewards are averaged over this many last steps."""
PLAIN_INTERVAL_S = 5.0
"""Seconds between plain lines where there is no terminal."""


def describe_training(history: History, config: Config) -> dict[str, Any]:
    """Compute what progress shows from the metrics so far.

    Returns:
        step, num_steps, segments_per_s, tokens_per_s (both None until two steps are known), lag_mean,
        lag_max, reward_by_position, gap, early_stop_gap (over its window; None if disabled), left_s (upper
        estimate of the remaining training time, None if unknown), status.
    """
    steps = history.steps
    recent = steps[-SMOOTH_STEPS:]
    done = int(recent[-1]["step"]) + 1 if recent else 0
    span_s = (
        float(recent[-1].get("time_s", 0.0)) - float(recent[0].get("time_s", 0.0)) if len(recent) > 1 else 0.0
    )
    later = recent[1:]
    num_steps = config.run.num_steps
    rewards = mean_by_position(recent)
    stop = config.run.early_stop
    lags = [float(record.get("lag_mean") or 0.0) for record in recent]
    return {
        "step": done,
        "num_steps": num_steps,
        "segments_per_s": sum(r.get("num_segments", 0) for r in later) / span_s if span_s > 0 else None,
        "tokens_per_s": sum(r.get("num_tokens", 0) for r in later) / span_s if span_s > 0 else None,
        "lag_mean": sum(lags) / len(lags) if lags else None,
        "lag_max": max((float(record.get("lag_max") or 0.0) for record in recent), default=None),
        "reward_by_position": rewards,
        "gap": position_gap(rewards),
        "early_stop_gap": window_gap(steps, stop.window_steps) if stop.is_enabled else None,
        "left_s": span_s / len(later) * max(0, num_steps - done) if span_s > 0 else None,
        "status": history.status,
    }


def format_duration(seconds: float | None) -> str:
    """Return ``m:ss`` or ``h:mm:ss``; a dash if unknown."""
    if seconds is None:
        return "-"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


MAX_SHOWN_POSITIONS = 12
"""Longer curves are shortened where a line has to hold them; tables and plots have them whole."""


def format_curve(means: list[float | None]) -> str:
    """Return a curve like ``.27 .48 .61 .63``; of a long one the first three, the middle, the last."""
    words = ["-" if mean is None else f"{mean:.2f}".replace("0.", ".", 1) for mean in means]
    if len(words) > MAX_SHOWN_POSITIONS:
        words = [*words[:3], "…", words[len(words) // 2], "…", words[-1]]
    return " ".join(words) or "-"


def _number(value: float | None, pattern: str) -> str:
    return "-" if value is None else format(value, pattern)


def training_line(values: dict[str, Any], config: Config) -> str:
    """Return the one-line form of :func:`describe_training`."""
    parts = [
        f"step {values['step']}/{values['num_steps']}",
        f"reward by position {format_curve(values['reward_by_position'])}",
        f"gap {_number(values['gap'], '+.2f')}",
        f"lag {_number(values['lag_mean'], '.1f')} (max {_number(values['lag_max'], '.0f')})",
        f"{_number(values['segments_per_s'], ',.0f')} segments/s",
        f"{_number(values['tokens_per_s'], ',.0f')} tokens/s",
        f"at most {format_duration(values['left_s'])} left",
    ]
    stop = config.run.early_stop
    if stop.is_enabled:
        parts.insert(3, f"stops at {_number(values['early_stop_gap'], '+.2f')}/{stop.gap:+.2f}")
    return " · ".join(parts)


class Progress:
    """Shows phases, events and training progress; use as a context manager.

    Args:
        config: the run's configuration.
        console: where to write; a live table only if it is a terminal.
    """

    def __init__(self, config: Config, console: Console) -> None:
        self._config = config
        self._console = console
        self._live: Live | None = None
        self._phase = ""
        self._line = ""
        self._started_s = time.monotonic()
        self._told_s = float("-inf")

    def __enter__(self) -> Progress:
        """Start the live table if there is a terminal."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *exception: object) -> None:
        """Remove the live table."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def phase(self, text: str) -> None:
        """Announce a phase of the run."""
        self._phase, self._line, self._told_s = text, "", float("-inf")
        self._console.print(f"[bold]{self._clock()}[/bold] {text}", highlight=False)
        self._refresh(None)

    def event(self, text: str) -> None:
        """Print one line that stays."""
        self._console.print(f"{self._clock()} {text}", highlight=False, markup=False)

    def detail(self, text: str) -> None:
        """Show how far the current phase is."""
        self._line = text
        self._refresh(Text(text))
        self._plain(text)

    def training(self, history: History) -> None:
        """Show training progress."""
        values = describe_training(history, self._config)
        self._refresh(self._table(values))
        if values["step"]:
            self._plain(training_line(values, self._config))

    def _clock(self) -> str:
        return format_duration(time.monotonic() - self._started_s)

    def _plain(self, text: str) -> None:
        now = time.monotonic()
        if self._live is None and now - self._told_s >= PLAIN_INTERVAL_S:
            self._told_s = now
            self._console.print(f"{self._clock()} {text}", highlight=False, markup=False, soft_wrap=True)

    def _refresh(self, body: RenderableType | None) -> None:
        if self._live is not None:
            head = Text(f"{self._clock()} {self._phase}", style="bold")
            self._live.update(Group(head, body) if body is not None else head)

    def _table(self, values: dict[str, Any]) -> Table:
        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        table.add_row("step", f"{values['step']} of {values['num_steps']}")
        table.add_row("reward by position", format_curve(values["reward_by_position"]))
        stop = self._config.run.early_stop
        reached = _number(values["early_stop_gap"], "+.2f")
        goal = f"  (over {stop.window_steps} steps {reached}, stops at {stop.gap:+.2f})"
        table.add_row("gap", _number(values["gap"], "+.2f") + (goal if stop.is_enabled else ""))
        table.add_row(
            "lag", f"{_number(values['lag_mean'], '.1f')} steps, max {_number(values['lag_max'], '.0f')}"
        )
        rates = f"{_number(values['segments_per_s'], ',.0f')} segments/s, "
        table.add_row("trained", rates + f"{_number(values['tokens_per_s'], ',.0f')} tokens/s")
        table.add_row("time left", f"at most {format_duration(values['left_s'])}")
        return table
