"""``python -m bench.staleness.report GRID.jsonl``: tables, pictures and a baseline of the learning grid.

Prints every table as markdown. ``--page`` puts each between its markers in a page (``<!-- LATE_DOOR -->`` to
``<!-- /LATE_DOOR -->``), ``--images`` draws the pictures, ``--json`` writes what later results are compared
with: every run in a line, with its training curve at every tenth step. All of it can be made again at any
time, also while the grid is still running.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from bench.kernels.measure import header, write
from bench.staleness.analysis import (
    MAX_LOSS,
    PAIRED_PACKS,
    WINDOW_STEPS,
    Cell,
    Paired,
    cell,
    curve,
    deepest_fall,
    final_late,
    grids,
    metric_lowest,
    metric_median,
    outcome,
    pair,
    steps_to_bar,
)
from bench.staleness.grid import read_results
from bench.staleness.learning import RunResult
from bench.staleness.worlds import WORLDS

BASELINE = Path("bench/baselines/amd-epyc/lag.json")
PLANNED_SEEDS = 8
"""Seeds of the paired comparison as it was planned; what was run beyond them is shown beside it."""
NOTABLE_FALL = 0.15
"""A training curve that fell by more than this is listed, even if it recovered."""
_CURVE_EVERY = 10
_KEPT_METRICS = ("kl_drift_per_version_nats", "staleness_k3_nats", "ess_frac", "masked_frac", "entropy")


def table(titles: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a markdown table."""
    lines = [titles, ["---"] * len(titles), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def paired_table(results: Sequence[RunResult]) -> str:
    """Return lag beside lag 0 over the planned seeds, and over all of them where there are more."""
    rows = []
    for found in _paired_by_seeds(results):
        steps = ["-"] * 3
        if found.more_steps is not None:
            fresh = sum(n for n in found.steps_0 if n is not None) / len(found.seeds)
            steps = [f"{fresh:.1f}", f"{found.more_steps[0]:.1f}", f"{found.more_steps[1]:.1f}"]
        rows.append(
            [
                f"{found.world}, `{found.recipe}`",
                str(found.lag),
                str(len(found.seeds)),
                _share(sum(found.late_0) / len(found.seeds)),
                _share(sum(found.late) / len(found.seeds)),
                _points(found.loss),
                _points(found.bound),
                _points(found.interval_end),
                *steps,
                "yes" if found.is_met else "no",
            ]
        )
    titles = ["world, recipe", "lag", "seeds", "late, lag 0", "late", "loss, points", "95 % bound"]
    return table([*titles, "two-sided", "steps, lag 0", "steps", "allowed", "met"], rows)


def _paired_by_seeds(results: Sequence[RunResult]) -> list[Paired]:
    """Return the comparisons over the planned seeds, each followed by that over all, if there are more."""
    chosen = [result for result in results if result.spec.num_eval_packs >= PAIRED_PACKS]
    planned = pair(result for result in chosen if result.spec.seed < PLANNED_SEEDS)
    by_name = {(found.world, found.recipe, found.lag, found.lr): found for found in planned}
    found: list[Paired] = []
    for one in pair(chosen):
        first = by_name.get((one.world, one.recipe, one.lag, one.lr))
        if first is not None and first.seeds != one.seeds:
            found.append(first)
        found.append(one)
    return found


def seeds_table(results: Sequence[RunResult]) -> str:
    """Return the paired comparison seed by seed."""
    chosen = pair(result for result in results if result.spec.num_eval_packs >= PAIRED_PACKS)
    rows = []
    for found in chosen:
        values = zip(found.seeds, found.late_0, found.late, found.steps_0, found.steps, strict=True)
        for seed, late_0, late, steps_0, steps in values:
            rows.append(
                [
                    f"{found.world}, `{found.recipe}`, lag {found.lag}",
                    str(seed),
                    _share(late_0),
                    _share(late),
                    _points(late_0 - late),
                    _count(steps_0),
                    _count(steps),
                ]
            )
    return table(["run", "seed", "late, lag 0", "late", "loss, points", "steps, lag 0", "steps"], rows)


def cells_table(
    by_recipe: Mapping[str, Mapping[int, Sequence[RunResult]]], text_of: Callable[[Cell], str]
) -> str:
    """Return recipe by lag, with what ``text_of`` says of each cell."""
    lags = sorted({lag for by_lag in by_recipe.values() for lag in by_lag})
    rows = [
        [
            f"`{recipe}`",
            "-".join(str(num) for num in sorted({len(runs) for runs in by_lag.values()})),
            *(text_of(cell(by_lag[lag])) if lag in by_lag else "" for lag in lags),
        ]
        for recipe, by_lag in by_recipe.items()
    ]
    return table(["recipe", "seeds", *(f"lag {lag}" for lag in lags)], rows)


def late_text(found: Cell) -> str:
    """Return the late reward at the end, with the worst seed and how many learned where not all did."""
    if found.num_learned == found.num:
        return _share(found.late)
    return f"**{_share(found.late)}** (worst {_share(found.late_worst)}, {found.num_learned} of {found.num})"


def steps_text(found: Cell) -> str:
    """Return the steps to the bar, with how many seeds reached it where not all did."""
    if found.steps is None:
        return "never"
    return f"{found.steps:.0f}" + (
        "" if found.num_reached == found.num else f" ({found.num_reached} of {found.num})"
    )


def drift_text(found: Cell) -> str:
    """Return KL drift per version and KL of the trained data, in thousandths of a nat."""
    if found.drift is None or found.staleness is None:
        return "-"
    return f"{1e3 * found.drift:.2f}, {1e3 * found.staleness:.1f}"


def sample_text(found: Cell) -> str:
    """Return effective sample fraction, its lowest step, and the fraction of tokens without pull."""
    values = (found.ess, found.ess_lowest, found.masked)
    return ", ".join("-" if value is None else f"{value:.2f}" for value in values)


CELL_TEXTS: dict[str, Callable[[Cell], str]] = {
    "LATE": late_text,
    "STEPS": steps_text,
    "DRIFT": drift_text,
    "SAMPLES": sample_text,
}
"""Kind of block -> what it says about a cell."""


def failures_table(results: Sequence[RunResult]) -> str:
    """Return the runs that did not end at the bar or ended well below lag 0, and curves that fell far."""
    fresh = {_name_of(result): final_late(result) for result in results if result.spec.lag == 0}
    rows = []
    for result in sorted(results, key=lambda r: (r.spec.world, r.spec.recipe, r.spec.lag, r.spec.seed)):
        ended, fall, spec = str(outcome(result)), deepest_fall(result), result.spec
        if ended == "learned":
            is_below = fresh.get(_name_of(result), 0.0) - final_late(result) > MAX_LOSS
            if not is_below and fall <= NOTABLE_FALL:
                continue
            ended = "below lag 0" if is_below else "at the bar"
        hints = "-" if result.after is None else _share(result.after.update_reward)
        rows.append(
            [
                f"{spec.world}, `{spec.recipe}`, lag {spec.lag}",
                str(spec.seed),
                f"{len(result.steps.rewards)} of {spec.num_steps}",
                {"unlearned": "collapsed", "slow": "too slow"}.get(ended, ended),
                "-" if result.after is None else _share(result.after.late),
                _points(fall),
                hints,
                result.error,
            ]
        )
    titles = ["run", "seed", "steps", "how it ended", "late", "deepest fall, points", "hint reward", "error"]
    return table(titles, rows)


def _name_of(result: RunResult) -> tuple[str, str, float, int, int]:
    """Return what a run shares with those that differ from it in lag and length alone."""
    spec = result.spec
    return spec.world, spec.recipe, spec.lr, spec.seed, spec.num_eval_packs


def cost_table(results: Sequence[RunResult]) -> str:
    """Return runs, steps and time by world."""
    rows = []
    for world in sorted({result.spec.world for result in results}):
        own = [result for result in results if result.spec.world == world]
        steps, cpu_s = sum(len(r.steps.rewards) for r in own), sum(r.cpu_s for r in own)
        rows.append([world, str(len(own)), f"{steps:,}", f"{cpu_s / 60:.0f}", f"{cpu_s / max(steps, 1):.3f}"])
    return table(["world", "runs", "steps", "CPU minutes", "CPU seconds per step"], rows)


def blocks(results: Sequence[RunResult]) -> dict[str, str]:
    """Return every table by the name of its markers.

    Tables of a rate that is not the world's own have it in their name (``LATE_DOOR_0.001``).
    """
    found = {
        "PAIRED": paired_table(results),
        "SEEDS": seeds_table(results),
        "FAILURES": failures_table(results),
        "COST": cost_table(results),
    }
    for (world, lr), by_recipe in grids(results).items():
        for kind, text_of in CELL_TEXTS.items():
            found[f"{kind}_{_name(world, lr).upper()}"] = cells_table(by_recipe, text_of)
    return found


def _name(world: str, lr: float) -> str:
    """Return the world, and the rate if it is not its own."""
    return world if lr == WORLDS[world].lr else f"{world}_{lr:g}"


def fill(page: str, found: Mapping[str, str]) -> tuple[str, list[str]]:
    """Put tables between their markers.

    Returns:
        The page, and the names of the tables that it has no markers for.
    """
    missing = []
    for name, text in found.items():
        start, end = f"<!-- {name} -->\n", f"<!-- /{name} -->"
        before, is_there, rest = page.partition(start)
        _, has_end, after = rest.partition(end)
        if is_there and has_end:
            page = f"{before}{start}{text}\n{end}{after}"
        else:
            missing.append(name)
    return page, missing


def baseline(results: Sequence[RunResult]) -> dict[str, Any]:
    """Return what is kept of a grid: settings, comparisons, and a line for each run."""
    return {
        **header(torch.device("cpu")),
        "settings": {
            name: {"config": world.config, "overrides": list(world.overrides), "bar": world.bar}
            for name, world in WORLDS.items()
        },
        "window_steps": WINDOW_STEPS,
        "curve_every_steps": _CURVE_EVERY,
        "paired": [_finite(found._asdict()) for found in _paired_by_seeds(results)],
        "runs": [_run_row(result) for result in results],
    }


def _run_row(result: RunResult) -> dict[str, Any]:
    spec, after = result.spec, result.after
    names = ("world", "recipe", "lag", "seed", "lr", "num_steps", "num_eval_packs")
    return {
        **{name: getattr(spec, name) for name in names},
        "outcome": outcome(result),
        "before": result.before.rewards,
        "after": None if after is None else after.rewards,
        "late_before": result.before.late,
        "late": None if after is None else after.late,
        "late_sem": None if after is None else after.late_sem,
        "update_reward": None if after is None else after.update_reward,
        "steps_to_bar": steps_to_bar(result),
        "deepest_fall": round(deepest_fall(result), 4),
        "medians": {name: metric_median(result, name) for name in _KEPT_METRICS},
        "ess_frac_lowest": metric_lowest(result, "ess_frac"),
        "curve": [round(value, 3) for value in curve(result.steps.rewards)[::_CURVE_EVERY]],
        "error": result.error,
        "cpu_s": result.cpu_s,
    }


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values with None for infinity, which JSON does not have."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def _share(value: float) -> str:
    """Format a reward as the docs do: .98, -.02, 1.00."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


def _points(value: float) -> str:
    """Format a difference of rewards in points."""
    return f"{100 * value:+.1f}" if math.isfinite(value) else "-"


def _count(value: int | None) -> str:
    return "never" if value is None else str(value)


def _seeds_text(num: int) -> str:
    """Return the number of seeds for a title; not every cell of a grid that still runs has all of them."""
    return "1 seed" if num == 1 else f"up to {num} seeds"


def draw(results: Sequence[RunResult], folder: Path) -> list[Path]:
    """Draw the pictures of every grid and return their paths."""
    from bench.staleness.plots import draw_curves, draw_summary

    paths = []
    for (world, lr), by_recipe in grids(results).items():
        seeds = {
            result.spec.seed for by_lag in by_recipe.values() for runs in by_lag.values() for result in runs
        }
        title = f"{world}, forced lag, learning rate {lr:g}, {_seeds_text(len(seeds))}"
        for name, make in (("curves", draw_curves), ("summary", draw_summary)):
            path = folder / f"lag_{_name(world, lr)}_{name}.png"
            make(by_recipe, path, title)
            paths.append(path)
    return paths


def main() -> int:
    """Make the report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.staleness.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("results", type=Path, help="file of bench.staleness.grid")
    parser.add_argument("--page", type=Path, help="page whose tables are replaced")
    parser.add_argument("--images", type=Path, help="folder of the pictures")
    parser.add_argument("--json", type=Path, nargs="?", const=BASELINE, help=f"write the runs ({BASELINE})")
    arguments = parser.parse_args()
    results = read_results(arguments.results)
    if not results:
        parser.error(
            f"{arguments.results} has no finished run; make some with python -m bench.staleness.grid"
        )
    found = blocks(results)
    if arguments.page is None:
        print("\n\n".join(f"{name}\n\n{text}" for name, text in found.items()))
    else:
        try:
            page = arguments.page.read_text()
        except OSError as error:
            parser.error(f"--page {arguments.page}: {error.strerror}")
        page, missing = fill(page, found)
        arguments.page.write_text(page)
        for name in missing:
            print(f"{arguments.page} has no markers for {name}", file=sys.stderr)
    for path in [] if arguments.images is None else draw(results, arguments.images):
        print(path, file=sys.stderr)
    if arguments.json is not None:
        write(arguments.json, baseline(results))
    return 0


if __name__ == "__main__":
    sys.exit(main())
