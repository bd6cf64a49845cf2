"""Pictures of the learning grid: training curves by recipe and lag, and a table in color of how runs end."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.lines import Line2D

from bench.staleness.analysis import WINDOW_STEPS, Cell, cell, curve
from bench.staleness.learning import RunResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Grid = Mapping[str, Mapping[int, Sequence[RunResult]]]
"""Recipe -> lag -> runs by seed."""
MAX_COLUMNS = 4
DPI = 130
_MAX_LAG_COLOR = 0.88  # the lightest end of the map is hard to see on white


def draw_curves(grid: Grid, path: Path, title: str) -> None:
    """Draw a panel for each recipe: late reward in training by step, a line per lag, thin ones per seed."""
    lags = sorted({lag for by_lag in grid.values() for lag in by_lag})
    num_columns = min(MAX_COLUMNS, len(grid))
    num_rows = math.ceil(len(grid) / num_columns)
    figure, axes = plt.subplots(
        num_rows, num_columns, figsize=(3.4 * num_columns, 2.3 * num_rows + 0.7),
        sharex=True, sharey=True, squeeze=False, layout="constrained",
    )  # fmt: skip
    flat = list(axes.flat)
    for panel, (recipe, by_lag) in zip(flat, grid.items(), strict=False):
        for lag in sorted(by_lag):
            _draw_lag(panel, by_lag[lag], lag, _color(lag, lags))
        panel.set_title(recipe, fontsize=9)
        panel.grid(alpha=0.25)
        panel.set_ylim(0, 1.02)
    for panel in flat[len(grid) :]:
        panel.set_axis_off()
    for panel in flat[max(len(grid) - num_columns, 0) : len(grid)]:
        panel.tick_params(labelbottom=True)
        panel.set_xlabel("optimizer step", fontsize=9)
    figure.suptitle(title, fontsize=10)
    figure.supylabel(f"late reward in training, mean of {WINDOW_STEPS} steps", fontsize=9)
    handles = [Line2D([], [], color=_color(lag, lags), linewidth=2, label=f"lag {lag}") for lag in lags]
    figure.legend(handles=handles, loc="outside lower center", ncols=len(lags), fontsize=9, frameon=False)
    _save(figure, path)


def _color(lag: int, lags: Sequence[int]) -> tuple[float, float, float, float]:
    """Return a color from dark to light by the rank of a lag."""
    place = lags.index(lag) / max(len(lags) - 1, 1)
    return plt.get_cmap("viridis")(_MAX_LAG_COLOR * place)


def _draw_lag(panel: Axes, results: Sequence[RunResult], lag: int, color: object) -> None:
    """Draw the runs at one lag, and their mean as far as all of them go."""
    curves = [curve(result.steps.rewards) for result in results]
    for values in curves:
        steps = range(WINDOW_STEPS, WINDOW_STEPS + len(values))
        panel.plot(steps, values, color=color, linewidth=0.5, alpha=0.45)
    shortest = min(len(values) for values in curves)
    mean = [statistics.fmean(values[index] for values in curves) for index in range(shortest)]
    panel.plot(range(WINDOW_STEPS, WINDOW_STEPS + shortest), mean, color=color, linewidth=1.8)


def draw_summary(grid: Grid, path: Path, title: str) -> None:
    """Draw recipe by lag three times, as numbers on color: final late reward, steps to the bar, KL drift."""
    lags = sorted({lag for by_lag in grid.values() for lag in by_lag})
    cells = {
        recipe: {lag: cell(results) for lag, results in by_lag.items()} for recipe, by_lag in grid.items()
    }
    figure, panels = plt.subplots(
        1, 3, figsize=(2.2 + 2.9 * 3, 0.3 * len(grid) + 1.5), sharey=True, layout="constrained"
    )
    _table(panels[0], cells, lags, "late reward at the end", _late, (0.2, 1.0), "viridis")
    _table(panels[1], cells, lags, "steps to the bar", _steps, None, "viridis_r")
    _table(panels[2], cells, lags, "KL drift per version, mnats", _drift, None, "viridis_r")
    figure.suptitle(title, fontsize=10)
    _save(figure, path)


def _late(found: Cell) -> tuple[float | None, str]:
    return found.late, f"{found.late:.2f}" + (
        "" if found.num_learned == found.num else f"\n{found.num_learned}/{found.num}"
    )


def _steps(found: Cell) -> tuple[float | None, str]:
    if found.steps is None:
        return None, "never"
    return found.steps, f"{found.steps:.0f}" + (
        "" if found.num_reached == found.num else f"\n{found.num_reached}/{found.num}"
    )


def _drift(found: Cell) -> tuple[float | None, str]:
    if found.drift is None:
        return None, ""
    return math.log10(max(found.drift, 1e-9)), f"{1e3 * found.drift:.2f}"


def _table(
    panel: Axes,
    cells: Mapping[str, Mapping[int, Cell]],
    lags: Sequence[int],
    title: str,
    value_of: object,
    limits: tuple[float, float] | None,
    colors: str,
) -> None:
    """Draw one of the tables; what has no value stays white."""
    assert callable(value_of)
    values = [
        [value_of(by_lag[lag]) if lag in by_lag else (None, "") for lag in lags] for by_lag in cells.values()
    ]
    numbers = [[math.nan if value is None else value for value, _ in row] for row in values]
    low, high = limits or (None, None)
    image = panel.imshow(numbers, cmap=colors, vmin=low, vmax=high, aspect="auto")
    for y, row in enumerate(values):
        for x, (value, text) in enumerate(row):
            color = "black"
            if value is not None:
                red, green, blue, _ = image.cmap(image.norm(value))
                color = "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.5 else "white"
            panel.text(x, y, text, ha="center", va="center", fontsize=7, color=color, linespacing=0.9)
    panel.set_title(title, fontsize=9)
    panel.set_xticks(range(len(lags)), [str(lag) for lag in lags], fontsize=8)
    panel.set_yticks(range(len(cells)), list(cells), fontsize=8)
    panel.set_xlabel("lag, steps", fontsize=8)


def _save(figure: Figure, path: Path) -> None:
    """Write a picture, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part.png")
    figure.savefig(part, dpi=DPI)
    plt.close(figure)
    part.replace(path)
