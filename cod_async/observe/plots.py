"""Plots of a run as PNG: does it learn, does it learn because of the hint, and how stale was the data.

Colours are those of Okabe and Ito, which people with colour-blindness can tell apart; lines also differ in
markers. Drawing uses the Agg backend, so it works without a display. Called at the end of a run, and by ``cod
plot``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

from cod_async.config import load_resolved
from cod_async.config.schema import Config
from cod_async.observe.metrics import Record, lag_histogram, position_gap, read_history
from cod_async.observe.summary import LABELS, curves, labels_for, read_evaluation, read_in_training
from cod_async.observe.sweeps import draw_over_training

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = ("#999999", "#56B4E9", "#0072B2", "#009E73", "#E69F00", "#D55E00", "#CC79A7", "#000000")
"""Okabe and Ito; the first is grey, for position 0 and for "before"."""
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
CURVE_STYLE: dict[str, tuple[str, str, str]] = {
    "before": ("#999999", "o", "--"),
    "after": ("#0072B2", "s", "-"),
    "held_out": ("#009E73", "^", "-"),
    "hint_blanked": ("#E69F00", "v", ":"),
    "hint_swapped": ("#D55E00", "X", ":"),
}
SMOOTH_STEPS = 10
DPI = 140


def _smooth(values: Sequence[float | None], width: int) -> list[float | None]:
    """Trailing mean over ``width`` values that ignores gaps."""
    out: list[float | None] = []
    for end in range(1, len(values) + 1):
        window = [value for value in values[max(0, end - width) : end] if value is not None]
        out.append(sum(window) / len(window) if window else None)
    return out


def draw_rewards(axes: Axes, steps: Sequence[Record]) -> None:
    """Draw training reward over steps, one line per position."""
    width = max((len(record.get("reward_by_position") or []) for record in steps), default=0)
    numbers = [record["step"] for record in steps]
    for position in range(width):
        values = [
            record["reward_by_position"][position]
            if position < len(record.get("reward_by_position") or [])
            else None
            for record in steps
        ]
        color = COLORS[position % len(COLORS)]
        smooth = _smooth(values, SMOOTH_STEPS)
        if len(values) >= 2 * SMOOTH_STEPS:
            axes.plot(numbers, _nan(values), color=color, alpha=0.25, linewidth=0.8)
        else:
            smooth = list(values)
        axes.plot(
            numbers, _nan(smooth), color=color, linewidth=2, label=f"task {position}",
            marker=MARKERS[position % len(MARKERS)], markevery=max(1, len(numbers) // 8), markersize=5,
        )  # fmt: skip
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean reward")
    axes.set_title("Reward while training, by position in the lifecycle")
    if width:
        axes.legend(frameon=False, ncols=2)


def _nan(values: Sequence[float | None]) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def draw_evaluation(
    axes: Axes,
    by_curve: Mapping[str, Sequence[Mapping[str, float]]],
    labels: Mapping[str, str] = LABELS,
) -> None:
    """Draw reward over position before, after, on held-out worlds, and with the hint blanked or swapped."""
    for name, (color, marker, dash) in CURVE_STYLE.items():
        points = by_curve.get(name)
        if not points:
            continue
        gap = position_gap([point["mean"] for point in points])
        label = labels[name] + ("" if gap is None else f" (gap {gap:+.2f})")
        axes.errorbar(
            range(len(points)), [point["mean"] for point in points], yerr=[point["sem"] for point in points],
            color=color, marker=marker, linestyle=dash, linewidth=2, capsize=3, label=label,
        )  # fmt: skip
    longest = max((len(points) for points in by_curve.values()), default=1)
    axes.set_xticks(range(longest))
    axes.set_xlabel("position in the lifecycle")
    axes.set_ylabel("mean reward ± standard error")
    axes.set_title("What was learned, and what the hint has to do with it")
    axes.set_ylim(bottom=0)
    if axes.get_legend_handles_labels()[1]:
        axes.legend(frameon=False, fontsize="small")


def draw_lag(axes: Axes, steps: Sequence[Record]) -> None:
    """Draw the share of trained action tokens by lag."""
    histogram = lag_histogram(steps)
    total = sum(histogram.values()) or 1
    mean = sum(lag * count for lag, count in histogram.items()) / total
    axes.bar(list(histogram), [count / total for count in histogram.values()], color="#56B4E9", width=0.8)
    if histogram:
        axes.axvline(mean, color="#D55E00", linestyle="--", label=f"mean {mean:.1f}")
        axes.set_xticks(range(max(histogram) + 1))
        axes.legend(frameon=False)
    axes.set_xlabel("lag of a trained token, in policy versions")
    axes.set_ylabel("share of action tokens")
    axes.set_title("Staleness of what was trained")


def _save(figure: Figure, path: Path) -> Path:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path


def draw_all(run_dir: Path) -> list[Path]:
    """Draw every plot of a run into ``run_dir/plots`` and return the paths.

    Raises:
        ConfigError: ``run_dir`` is not a run folder.
    """
    config: Config = load_resolved(run_dir)
    steps = read_history(run_dir).steps
    evaluations: dict[str, Any] = {name: read_evaluation(run_dir, name) for name in ("before", "after")}
    by_curve, labels = curves(evaluations, config), labels_for(config)
    folder = run_dir / "plots"
    folder.mkdir(exist_ok=True)
    paths = []
    single: dict[str, Callable[[Axes], None]] = {
        "reward_by_position": lambda axes: draw_rewards(axes, steps),
        "evaluation": lambda axes: draw_evaluation(axes, by_curve, labels),
        "lag": lambda axes: draw_lag(axes, steps),
    }
    for name, draw in single.items():
        figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
        draw(axes)
        paths.append(_save(figure, folder / f"{name}.png"))
    points = read_in_training(run_dir)["points"]
    if points:
        paths.append(draw_over_training(points, folder / "evaluation_in_training.png"))
    figure, (left, middle, right) = plt.subplots(
        1, 3, figsize=(16, 4.6), layout="constrained", width_ratios=(5, 5, 3)
    )
    draw_rewards(left, steps)
    draw_evaluation(middle, by_curve, labels)
    draw_lag(right, steps)
    paths.append(_save(figure, folder / "quickstart.png"))
    return paths
