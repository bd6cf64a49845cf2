"""Pictures of an evaluation: reward against position with one line per checkpoint, and reward against steps.

A panel is one environment in one mode on one split. Lines of different checkpoints go from light to dark;
controls are dashed. Everything is drawn from what ``cod eval`` answers, so pictures can be made again from
``answer.json``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CONTROL_STYLE: dict[str, tuple[str, str, str]] = {
    "normal": ("#0072B2", "o", "-"),
    "blanked": ("#E69F00", "v", "--"),
    "swapped": ("#D55E00", "X", "--"),
    "truth": ("#009E73", "^", "--"),
}
"""Control -> colour of Okabe and Ito, marker, line style."""
MAX_COLUMNS = 3
MAX_PANELS = 24
MAX_LABELLED = 8
"""More checkpoints than this get a colour bar's worth of lines, but labels for the first and last only."""
DPI = 140

Report = Mapping[str, Any]


def panels(reports: Sequence[Report]) -> dict[str, list[Report]]:
    """Return panel title -> its reports, in the order of the reports."""
    found: dict[str, list[Report]] = {}
    for report in reports:
        carry = "" if report["carry"] in ("hint", report["mode"]) else f", carry {report['carry']}"
        title = f"{report['entry']}, {report['mode']}{carry}, {report['split']}"
        found.setdefault(title, []).append(report)
    return found


def draw_answer(answer: Mapping[str, Any], folder: Path) -> list[Path]:
    """Draw the pictures of one evaluation into ``folder`` and return their paths.

    Args:
        answer: what ``cod eval --json`` prints.
        folder: made if missing.
    """
    by_panel = panels(answer["reports"])
    folder.mkdir(parents=True, exist_ok=True)
    paths = [_save(by_panel, draw_positions, folder / "reward_by_position.png")]
    if len({report["checkpoint"] for report in answer["reports"]}) > 1:
        paths.append(_save(by_panel, draw_checkpoints, folder / "reward_by_checkpoint.png"))
    return paths


def draw_positions(axes: Axes, reports: Sequence[Report]) -> None:
    """Draw reward over position: the normal curves of all checkpoints, the controls of the last one."""
    names = list(dict.fromkeys(str(report["checkpoint"]) for report in reports))
    for report in reports:
        control, number = report["control"], names.index(str(report["checkpoint"]))
        is_last = number == len(names) - 1
        if control != "normal" and not is_last:
            continue
        color, marker, dash = CONTROL_STYLE[control]
        if control == "normal":
            color = _shade(number, len(names))
            label = str(report["checkpoint"])
            has_label = len(names) <= MAX_LABELLED or number in (0, len(names) - 1)
        else:
            label, has_label = f"{report['checkpoint']}, {control}", True
        points = report["reward_by_position"]
        axes.errorbar(
            range(len(points)), [point["mean"] for point in points], yerr=[point["sem"] for point in points],
            color=color, marker=marker, linestyle=dash, linewidth=1.8, markersize=4, capsize=2,
            label=label if has_label else "_nolegend_",
        )  # fmt: skip
    longest = max(len(report["reward_by_position"]) for report in reports)
    axes.set_xticks(range(0, longest, max(1, longest // 8)))
    axes.set_xlabel("position in the lifecycle")
    axes.set_ylabel("mean reward ± standard error")


def draw_checkpoints(axes: Axes, reports: Sequence[Report]) -> None:
    """Draw position-averaged reward over the checkpoints, one line per control."""
    names = list(dict.fromkeys(str(report["checkpoint"]) for report in reports))
    steps = {str(report["checkpoint"]): report["step"] for report in reports}
    has_steps = all(step is not None for step in steps.values())
    where = {name: steps[name] if has_steps else index for index, name in enumerate(names)}
    for control, (color, marker, dash) in CONTROL_STYLE.items():
        own = [report for report in reports if report["control"] == control]
        if not own:
            continue
        axes.errorbar(
            [where[str(report["checkpoint"])] for report in own], [report["mean"] for report in own],
            yerr=[report["mean_sem"] for report in own], color=color, marker=marker, linestyle=dash,
            linewidth=1.8, markersize=4, capsize=2, label=control,
        )  # fmt: skip
    if not has_steps:
        axes.set_xticks(range(len(names)), names)
    axes.set_xlabel("optimiser step" if has_steps else "checkpoint")
    axes.set_ylabel("mean reward over positions")


def draw_over_training(points: Sequence[Mapping[str, Any]], path: Path) -> Path:
    """Draw reward over training steps, one line per position, a panel per environment, mode and split.

    Args:
        points: ``[{step, reports}]`` by step, as :func:`cod_async.observe.summary.read_in_training` has them.
        path: the picture.
    """
    reports = [report for point in points for report in point["reports"] if report["control"] == "normal"]
    return _save(panels(reports), draw_steps, path)


def draw_steps(axes: Axes, reports: Sequence[Report]) -> None:
    """Draw reward over steps, one line per position, from light to dark."""
    width = max(len(report["reward_by_position"]) for report in reports)
    for position in range(width):
        own = [report for report in reports if position < len(report["reward_by_position"])]
        points = [report["reward_by_position"][position] for report in own]
        has_label = width <= MAX_LABELLED or position in (0, width - 1)
        axes.errorbar(
            [report["step"] for report in own], [point["mean"] for point in points],
            yerr=[point["sem"] for point in points], color=_shade(position, width), marker="o", markersize=3,
            linewidth=1.6, capsize=2, label=f"task {position}" if has_label else "_nolegend_",
        )  # fmt: skip
    axes.set_xlabel("optimiser step")
    axes.set_ylabel("mean reward ± standard error")


def _shade(number: int, count: int) -> Any:
    """Return a colour that goes from light to dark with the number of the checkpoint."""
    if count == 1:
        return CONTROL_STYLE["normal"][0]
    return plt.get_cmap("viridis_r")(0.15 + 0.85 * number / (count - 1))


def _save(
    by_panel: Mapping[str, Sequence[Report]], draw: Callable[[Axes, Sequence[Report]], None], path: Path
) -> Path:
    shown = list(by_panel.items())[:MAX_PANELS]
    num_columns = min(MAX_COLUMNS, len(shown))
    num_rows = math.ceil(len(shown) / num_columns)
    figure, grid = plt.subplots(
        num_rows,
        num_columns,
        figsize=(5.4 * num_columns, 3.9 * num_rows),
        layout="constrained",
        squeeze=False,
    )
    for axes, (title, reports) in zip(grid.flat, shown, strict=False):
        draw(axes, reports)
        axes.set_title(title, fontsize="medium")
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.25)
        axes.legend(frameon=False, fontsize="small")
    for axes in list(grid.flat)[len(shown) :]:
        axes.set_visible(False)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
    return path
