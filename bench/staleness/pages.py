"""``python -m bench.staleness.pages [--results FILE]``: what is measured or computed in docs/losses/.

Draws the picture of every preset from the learner's own code (:mod:`.pulls`), and rewrites what stands
between the markers of its page: ``fields``, every value that the preset sets, and ``measured``, how its runs
of the learning grid ended. The runs are those of the committed baseline, or of a file of
``bench.staleness.grid`` that is still being filled.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import msgspec

from bench.staleness.analysis import MAX_LOSS, PAIRED_PACKS
from bench.staleness.grid import LAGS, read_results
from bench.staleness.report import BASELINE, NOTABLE_FALL, baseline, table
from bench.staleness.worlds import ROOT, WORLDS
from cod_async.config.presets import NEUTRAL, PRESETS, preset_values

PAGES = Path("docs/losses")
PICTURES = Path("docs/images/losses")
_FIELDS_PER_ROW = 3
_SHOWN_LAGS = LAGS
REFERENCE = "paper"
"""The recipe that every other one is shown beside."""


class Run(msgspec.Struct, frozen=True, kw_only=True):
    """A row of the baseline, as far as the pages read it.

    Attributes:
        world, recipe, lag, seed, lr, num_eval_packs: of the run's specification; lag in steps.
        outcome: see :func:`bench.staleness.analysis.outcome`.
        late: late reward of the last weights, None if they cannot be played.
        steps_to_bar: None if never.
        deepest_fall: of the training curve, from 0 to 1.
        medians: of metrics, over the steps.
        ess_frac_lowest: of any step.
    """

    world: str
    recipe: str
    lag: int
    seed: int
    lr: float
    num_eval_packs: int
    outcome: Literal["learned", "unlearned", "slow", "stopped"]
    late: float | None
    steps_to_bar: int | None
    deepest_fall: float
    medians: dict[str, float | None]
    ess_frac_lowest: float | None


def read_runs(path: Path) -> list[Run]:
    """Return the runs of a baseline (``.json``) or of a grid's file (``.jsonl``).

    Raises:
        OSError: the baseline cannot be read.
        msgspec.ValidationError: it is another file.
    """
    if path.suffix == ".jsonl":
        rows = baseline(read_results(path))["runs"]
    else:
        rows = json.loads(path.read_text()).get("runs", [])
    return [msgspec.convert(row, Run) for row in rows]


def fields_block(preset: str) -> str:
    """Return every field that a preset sets, those that it changes in bold and first."""
    values, own = preset_values(preset), PRESETS[preset]
    names = [*(name for name in NEUTRAL if name in own), *(name for name in NEUTRAL if name not in own)]
    cells = []
    for name in names:
        mark = "**" if name in own else ""
        cells.append((f"{mark}`{name}`{mark}", f"{mark}`{toml(values[name])}`{mark}"))
    cells += [("", "")] * (-len(cells) % _FIELDS_PER_ROW)
    rows = [
        [text for pair in cells[start : start + _FIELDS_PER_ROW] for text in pair]
        for start in range(0, len(cells), _FIELDS_PER_ROW)
    ]
    return table(["field", "value"] * _FIELDS_PER_ROW, rows)


def toml(value: Any) -> str:
    """Return a value of a preset as a configuration writes it."""
    return json.dumps(value) if isinstance(value, str) else f"{value:g}"


def measured_block(preset: str, runs: Sequence[Run]) -> str:
    """Return how the runs of a preset ended: a table by lag and every run that did not end well.

    Args:
        preset: of the page.
        runs: of the whole grid.
    """
    grid = [run for run in runs if run.lr == WORLDS[run.world].lr and run.num_eval_packs < PAIRED_PACKS]
    own = [run for run in grid if run.recipe.split()[0] == preset]
    if not own:
        return "No runs of it on the grid."
    parts = []
    for world in sorted({run.world for run in own}, key=list(WORLDS).index):
        here = [run for run in own if run.world == world]
        parts.append(_table(preset, world, here, [run for run in grid if run.world == world]))
    parts.append(_endings(own, grid))
    parts += _pairs(preset, runs)
    return "\n\n".join(part for part in parts if part)


def _table(preset: str, world: str, own: Sequence[Run], grid: Sequence[Run]) -> str:
    recipes = list(dict.fromkeys(run.recipe for run in own))
    lags = sorted({run.lag for run in own} | set(_SHOWN_LAGS if world == "door" else ()))
    rows = []
    for recipe in recipes:
        cells = {lag: [run for run in own if run.recipe == recipe and run.lag == lag] for lag in lags}
        name = "" if recipe == preset else f"`{recipe.removeprefix(preset).strip()}`: "
        rows += [
            [f"{name}late reward at the end", *(_late(cells[lag]) for lag in lags)],
            ["runs, of them at the bar", *(_at_bar(cells[lag]) for lag in lags)],
            ["steps to the bar", *(_steps(cells[lag]) for lag in lags)],
            ["KL drift per version, mnats", *(_drift(cells[lag]) for lag in lags)],
            ["`masked_frac`, %", *(_masked(cells[lag]) for lag in lags)],
            ["lowest `ess_frac` of a step", *(_lowest(cells[lag]) for lag in lags)],
        ]
    if preset != REFERENCE:
        beside = {lag: [run for run in grid if run.recipe == REFERENCE and run.lag == lag] for lag in lags}
        if any(beside.values()):
            rows.append([f"`{REFERENCE}`, late reward (runs)", *(_late_of(beside[lag]) for lag in lags)])
    title = f"*{world.capitalize()}*, bar {_share(WORLDS[world].bar)}"
    return table([title, *(f"lag {lag}" for lag in lags)], rows)


def _late(runs: Sequence[Run]) -> str:
    if not runs:
        return "-"
    text = _share(_mean_late(runs))
    return text if all(run.outcome == "learned" for run in runs) else f"**{text}**"


def _late_of(runs: Sequence[Run]) -> str:
    return f"{_late(runs)} ({len(runs)})" if runs else "-"


def _mean_late(runs: Sequence[Run]) -> float:
    return statistics.fmean(run.late or 0.0 for run in runs)


def _at_bar(runs: Sequence[Run]) -> str:
    return f"{len(runs)}, {sum(run.outcome == 'learned' for run in runs)}" if runs else "-"


def _steps(runs: Sequence[Run]) -> str:
    reached = [run.steps_to_bar for run in runs if run.steps_to_bar is not None]
    if not reached:
        return "never" if runs else "-"
    few = "" if len(reached) == len(runs) else f" ({len(reached)} of {len(runs)})"
    return f"{statistics.fmean(reached):.0f}{few}"


def _drift(runs: Sequence[Run]) -> str:
    found = [value for run in runs if (value := run.medians.get("kl_drift_per_version_nats")) is not None]
    return f"{1e3 * statistics.fmean(found):.2f}" if found else "-"


def _masked(runs: Sequence[Run]) -> str:
    found = [value for run in runs if (value := run.medians.get("masked_frac")) is not None]
    return f"{100 * statistics.fmean(found):.1f}" if found else "-"


def _lowest(runs: Sequence[Run]) -> str:
    found = [run.ess_frac_lowest for run in runs if run.ess_frac_lowest is not None]
    return f"{min(found):.3f}" if found else "-"


def _endings(own: Sequence[Run], grid: Iterable[Run]) -> str:
    """Say plainly which runs did not end at the bar, ended below lag 0, or fell on their way."""
    fresh = {(run.world, run.recipe, run.seed): run.late or 0.0 for run in grid if run.lag == 0}
    told: dict[str, list[str]] = {}
    for run in sorted(own, key=lambda run: (run.world, run.recipe, run.lag, run.seed)):
        late, kind = run.late or 0.0, ""
        if run.outcome != "learned":
            kind = _KINDS[run.outcome]
        elif fresh.get((run.world, run.recipe, run.seed), 0.0) - late > MAX_LOSS:
            kind = "Ended at the bar, but more than 5 points below the same seed at lag 0"
        elif run.deepest_fall > NOTABLE_FALL:
            kind = f"Fell by more than {100 * NOTABLE_FALL:.0f} points on the way and came back"
        if kind:
            told.setdefault(kind, []).append(f"{_name(run)} ({_share(late)})")
    num_learned = sum(run.outcome == "learned" for run in own)
    lines = [f"{num_learned} of {len(own)} runs ended at the bar or above; means are over seeds."]
    if max(sum(_is_alike(run, other) for other in own) for run in own) == 1:
        lines.append("With one run for each lag, a difference between two lags may be one seed's luck.")
    listed = "\n".join(f"- {kind}: {', '.join(names)}." for kind, names in told.items())
    return "\n\n".join(part for part in ("\n".join(lines), listed) if part)


_KINDS: Mapping[str, str] = {
    "unlearned": "Collapsed after having reached the bar",
    "slow": "Never reached the bar",
    "stopped": "Stopped by numbers that are not finite",
}


def _is_alike(run: Run, other: Run) -> bool:
    return (run.world, run.recipe, run.lag) == (other.world, other.recipe, other.lag)


def _name(run: Run) -> str:
    world = "" if run.world == "door" else f"*{run.world.capitalize()}* "
    changes = " ".join(f"`{change}`" for change in run.recipe.split()[1:])
    return f"{world}{changes}{' ' * bool(changes)}lag {run.lag} seed {run.seed}"


def _pairs(preset: str, runs: Sequence[Run]) -> list[str]:
    """Say what the longer comparison in pairs found, lag by lag."""
    found = []
    chosen = [
        run
        for run in runs
        if run.recipe == preset and run.num_eval_packs >= PAIRED_PACKS and run.lr == WORLDS[run.world].lr
    ]
    for world in sorted({run.world for run in chosen}):
        by_lag: dict[int, dict[int, Run]] = {}
        for run in chosen:
            if run.world == world:
                by_lag.setdefault(run.lag, {})[run.seed] = run
        fresh = by_lag.pop(0, {})
        for lag, stale in sorted(by_lag.items()):
            seeds = sorted(stale.keys() & fresh.keys())
            if not seeds:
                continue
            late_0, late = ([of[seed] for seed in seeds] for of in (fresh, stale))
            num_bad = sum(run.outcome != "learned" for run in late)
            ended = f"{num_bad} of the stale runs did not end" if num_bad else "every stale run ended"
            found.append(
                f"In pairs, longer ({PAIRED_PACKS} evaluation packs, *{world.capitalize()}*): {len(seeds)} "
                f"seed{'s' * (len(seeds) > 1)}, late reward {_mean_and_worst(late_0)} at lag 0 and "
                f"{_mean_and_worst(late)} at lag {lag}; {ended} at the bar."
            )
    return found


def _mean_and_worst(runs: Sequence[Run]) -> str:
    return f"{_share(_mean_late(runs))} (worst {_share(min(run.late or 0.0 for run in runs))})"


def _share(value: float) -> str:
    """Format a reward as the docs do, to two digits: .98, -.02, 1.00."""
    text = f"{value:.2f}"
    return text.replace("0.", ".", 1) if abs(float(text)) < 1 else text


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Put each block between its markers, which stand alone on their lines.

    Raises:
        ValueError: the page lacks them.
    """
    for name, text in blocks.items():
        begin, end = f"<!-- {name}: begin -->\n", f"<!-- {name}: end -->"
        before, has_begin, rest = page.partition(begin)
        _, has_end, after = rest.partition(end)
        if not (has_begin and has_end):
            raise ValueError(f"no markers {begin.strip()} and {end}")
        page = f"{before}{begin}\n{text}\n\n{end}{after}"
    return page


def main() -> int:
    """Draw the pictures and fill the pages."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.staleness.pages",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / BASELINE, help=f"baseline or file of the grid ({BASELINE})"
    )
    parser.add_argument("--presets", nargs="+", choices=list(PRESETS), default=list(PRESETS))
    parser.add_argument("--no-pictures", action="store_true", help="only the pages")
    arguments = parser.parse_args()
    try:
        runs = read_runs(arguments.results)
    except (OSError, ValueError, AttributeError) as error:  # msgspec's and json's are ValueErrors
        parser.error(
            f"--results {arguments.results}: {error}; give a file of bench.staleness.grid or .report"
        )
    if not runs:
        parser.error(f"--results {arguments.results}: no finished run; make some with bench.staleness.grid")
    for preset in arguments.presets:
        path = ROOT / PAGES / f"{preset}.md"
        blocks = {"fields": fields_block(preset), "measured": measured_block(preset, runs)}
        try:
            path.write_text(fill(path.read_text(), blocks))
        except (OSError, ValueError) as error:
            parser.error(f"{path}: {error}")
    if not arguments.no_pictures:
        from bench.staleness.pulls import draw

        for preset in arguments.presets:
            draw(preset, ROOT / PICTURES / f"{preset}.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
