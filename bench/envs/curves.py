"""``python -m bench.envs.curves``: floors and ceilings of all environments, beside another calibration.

Every scripted policy plays every preset, one lifecycle for each of many packs, with rewards as a run's curves
have them. How many packs: a pilot of 100 tells the spread, and then as many as a standard error of .01 at the
worst position takes, between 200 and 2,500 (fewer where a pack takes seconds). The data seed is that of the
paper's reference, so its records are met first.

Where numbers are known from a re-implementation that shares no code with this one, they stand beside ours. A
number agrees if it differs by no more than two standard errors of the difference and the rounding of the
reference. The errors of the reference are estimated from our spread and its number of tasks.
"""

from __future__ import annotations

import argparse
import datetime
import math
import platform
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.kernels.measure import write
from cod_async.envs import registry
from cod_async.envs.commands import play
from cod_async.lifecycle.packs import Split

REPORT = Path("docs/reports/floors_and_ceilings.json")
PAGE = Path("docs/floors_and_ceilings.md")
GOAL_SEM = 0.01
PILOT_PACKS, MIN_PACKS, MAX_PACKS = 100, 200, 2_500
SLOW_PACKS = {("pde_discovery", "train"): 400, ("pde_discovery", "eval"): 250}
"""Packs where one takes a good part of a second; 250 are ten for each template of the evaluation."""
SEED = 42
SEEDS = {("pde_discovery", "eval"): 20260902}
HELD_OUT = {("pde_discovery", "eval"), ("grid_navigation", "eval"), ("alchemy_random", "hard")}
LONG = HELD_OUT | {("frozen_lake_obscure", "hard"), ("terminal", "default")}
"""Presets that the paper plays in packs of 8; the others in packs of 4."""


@dataclass(frozen=True)
class Reference:
    """Numbers from the calibration of an independent re-implementation.

    Attributes:
        environment, preset, policy: of ours; ``theirs`` says what the calibration played.
        theirs: in words.
        values: by position from ``first``, separated by spaces, or one number for the mean from ``first``.
        num_tasks: tasks behind each value.
        first: first position that they are about.
        last: last position for a single number; None: the end.
        is_success: share of successes instead of rewards.
        is_same: whether policy and worlds are the same by definition; others are neighbors, and not judged.
    """

    environment: str
    preset: str
    policy: str
    theirs: str
    values: str
    num_tasks: int
    first: int = 0
    last: int | None = None
    is_success: bool = False
    is_same: bool = True


_LAKE, _GRID, _CONTROL, _PDE = "frozen_lake_obscure", "grid_navigation", "optimal_control", "pde_discovery"
_WALK = "random walk that ends in an L"
_PLAN = "exact planning over 24 mappings"
_REFERENCES = (
    Reference(_LAKE, "easy", "random", "uniform random codes", ".16", 2_000, is_success=True),
    Reference(_LAKE, "hard", "random", "uniform random codes", ".10", 2_000, is_success=True),
    Reference(_LAKE, "easy", "explorer", _PLAN, ".615", 1_000, 0, 0, is_success=True),
    Reference(_LAKE, "hard", "explorer", _PLAN, ".595", 1_000, 0, 0, is_success=True),
    Reference(_LAKE, "easy", "explorer", _PLAN, ".567", 1_900, 0, 0),
    Reference(_LAKE, "hard", "explorer", _PLAN, ".574", 450, 0, 0),
    Reference(_LAKE, "easy", "oracle", "mapping known", ".964", 1_000),
    Reference(_LAKE, "hard", "oracle", "mapping known", ".960", 1_000),
    Reference(_GRID, "train_8b", "oracle", "optimum", ".969", 400),
    Reference(_GRID, "train_27b", "oracle", "optimum", ".925", 400),
    Reference(_GRID, "eval", "oracle", "optimum", ".920", 400),
    Reference(_GRID, "train_8b", "random", _WALK, ".80", 400, is_same=False),
    Reference(_GRID, "train_27b", "random", _WALK, ".71", 400, is_same=False),
    Reference(_GRID, "eval", "random", _WALK, ".69", 400, is_same=False),
    Reference(_GRID, "train_8b", "uniform", "uniform random walk", ".006", 400),
    Reference(_GRID, "train_27b", "uniform", "uniform random walk", ".004", 400),
    Reference(_GRID, "eval", "uniform", "uniform random walk", ".000", 400),
    Reference(_GRID, "train_27b", "planner", "another planner", ".837 .891 .905 .918", 150, is_same=False),
    Reference(
        *(_GRID, "eval", "planner", "another planner"),
        *(".816 .889 .906 .903 .901 .916 .905 .916", 150),
        is_same=False,
    ),
    Reference(_CONTROL, "hard", "oracle", "exact optimum in the box", ".976", 500),
    Reference(_CONTROL, "hard", "lqr", "finite-horizon gains, clipped", ".976", 500),
    Reference(_CONTROL, "hard", "explorer", "gains of fitted a, b", ".975", 500, 1),
    Reference(_CONTROL, "hard", "explorer", "fixed law, sign of b guessed", ".38", 500, 0, 0),
    Reference(_CONTROL, "hard", "zero", "zero control", ".114", 500),
    Reference(_PDE, "train", "tool_top", "other equations", ".72 .94 .91 .95", 30, is_same=False),
    Reference(_PDE, "train", "explorer", "other equations", ".82 .96 .985 .995", 30, is_same=False),
    Reference(
        *(_PDE, "eval", "tool_top", "top of the full regression, t = 0"),
        *(".33 .43 .38 .38 .39 .40 .37 .39", 25),
        is_same=False,
    ),
    Reference(
        *(_PDE, "eval", "explorer", "another noise-aware selection"),
        *(".66 .80 .93 .97 .96 .97 .93 .94", 25),
        is_same=False,
    ),
)


@dataclass(frozen=True)
class Curve:
    """What one policy earned by position.

    Attributes:
        environment, preset, policy: what was played.
        is_success: raw successes instead of penalized rewards.
        num_packs: tasks behind each mean.
        means, standard_errors: by position.
    """

    environment: str
    preset: str
    policy: str
    is_success: bool
    num_packs: int
    means: tuple[float, ...]
    standard_errors: tuple[float, ...]

    def between(self, first: int, last: int | None) -> tuple[float, float]:
        """Return the mean over some positions and its standard error.

        Positions of a pack share a world, so their errors are not independent: the largest one is taken.
        """
        chosen = slice(first, None if last is None else last + 1)
        means = self.means[chosen]
        return sum(means) / len(means), max(self.standard_errors[chosen])


def packs_needed(pilot_sem: float, num_pilot: int, goal: float = GOAL_SEM) -> int:
    """Return how many packs a standard error of ``goal`` takes, given that of a pilot."""
    if pilot_sem <= 0.0:
        return MIN_PACKS
    return min(max(math.ceil(num_pilot * (pilot_sem / goal) ** 2), MIN_PACKS), MAX_PACKS)


def curve(environment: str, preset: str, policy: str, is_success: bool = False) -> Curve:
    """Play a policy; see the module text for how long."""
    key = (environment, preset)
    split: Split = "held_out" if key in HELD_OUT else "train"

    def played(num_packs: int) -> list[dict[str, float]]:
        result = play(
            environment,
            preset,
            8 if key in LONG else 4,
            policy,
            num_packs,
            SEEDS.get(key, SEED),
            split=split,
            solve_penalty=0.0 if is_success else None,
        )
        positions: list[dict[str, float]] = result["reward_by_position"]
        return positions

    num_packs = SLOW_PACKS.get(key, PILOT_PACKS)
    positions = played(num_packs)
    if key not in SLOW_PACKS:
        num_packs = packs_needed(max(position["sem"] for position in positions), num_packs)
        positions = played(num_packs)
    means, standard_errors = (
        tuple(round(position[name], 5) for position in positions) for name in ("mean", "sem")
    )
    return Curve(environment, preset, policy, is_success, num_packs, means, standard_errors)


@dataclass(frozen=True)
class Comparison:
    """One number of the calibration beside ours; ``agrees`` is None if it is not judged."""

    environment: str
    preset: str
    policy: str
    theirs: str
    positions: str
    reference: float
    mean: float
    sem: float
    agrees: bool | None


def compare(reference: Reference, ours: Curve) -> list[Comparison]:
    """Compare all numbers of a reference; see the module text for when they agree."""
    found = []
    texts = reference.values.split()
    for offset, text in enumerate(texts):
        position, value = reference.first + offset, float(text)
        last = reference.last if len(texts) == 1 else position
        mean, sem = ours.between(position, last)
        spread = sem * math.sqrt(ours.num_packs)
        error = 2 * math.hypot(sem, spread / math.sqrt(reference.num_tasks)) + half_unit(text)
        name = f"{position}" if last == position else "all" if position == 0 else f"from {position}"
        found.append(
            Comparison(
                *(ours.environment, ours.preset, ours.policy, reference.theirs),
                positions=name + (", successes" if reference.is_success else ""),
                reference=value,
                mean=round(mean, 4),
                sem=round(sem, 4),
                agrees=abs(mean - value) <= error if reference.is_same else None,
            )
        )
    return found


def half_unit(text: str) -> float:
    """Return half a unit of the last decimal of a number as written, such as ``.964``."""
    return 0.5 * 10.0 ** -len(text.partition(".")[2])


def _number(value: float) -> str:
    text = f"{value:.3f}"
    return text[1:] if text.startswith("0.") else text


_PAGE = """# Floors and ceilings

Written by `{command}`; all digits in `docs/reports/floors_and_ceilings.json`. Mean reward by position of
every scripted policy, in packs of 4, or of 8 for the presets that the paper evaluates; after the default
penalty on steps where an environment has one. `sem` is the largest standard error of a position, `n` the
number of packs. `random` is the floor. `oracle` is told what is hidden or, in `hidden_buttons` and
`hidden_matches`, remembers all that it sees. The others are told nothing; what each policy does is said
in the README of its environment.

| environment | preset | policy | reward at positions 0, 1, ... | sem | n |
|---|---|---|---|---|---|
{curves}

## Beside the calibration of an independent re-implementation

Measured with programs written from a description of the environments, without a line of this code. Numbers
agree if they differ by at most two standard errors of the difference and half a unit of the calibration's
last decimal. The calibration's own errors are estimated from our spread and its number of tasks (where it
names none, 1,000 to 2,000). **{num_agreeing} of {num_judged} agree.** Not judged (-): policies and
equations that are merely alike, a random walk with other moves, another planner, another selection of
terms; the equations of `pde_discovery` follow the same rules of composition without being the same.

| environment | preset | policy | calibration of | position | calibration | ours | agree |
|---|---|---|---|---|---|---|---|
{comparisons}
"""


def markdown(curves: Sequence[Curve], comparisons: Sequence[Comparison], command: str) -> str:
    """Return the page."""
    curve_rows = [
        f"| {one.environment} | {one.preset} | `{one.policy}` | {' '.join(map(_number, one.means))} | "
        f"{_number(max(one.standard_errors))} | {one.num_packs:,} |"
        for one in curves
        if not one.is_success
    ]
    words = {True: "yes", False: "**no**", None: "-"}
    rows = [
        f"| {one.environment} | {one.preset} | `{one.policy}` | {one.theirs} | {one.positions} | "
        f"{_number(one.reference)} | {_number(one.mean)} ± {_number(one.sem)} | {words[one.agrees]} |"
        for one in comparisons
    ]
    judged = [one for one in comparisons if one.agrees is not None]
    return _PAGE.format(
        command=command,
        curves="\n".join(curve_rows),
        comparisons="\n".join(rows),
        num_agreeing=sum(one.agrees is True for one in judged),
        num_judged=len(judged),
    )


def main() -> int:
    """Play, compare, and write the page and the report."""
    parser = argparse.ArgumentParser(
        prog="python -m bench.envs.curves",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", type=Path, default=REPORT)
    parser.add_argument("--page", type=Path, default=PAGE)
    parser.add_argument("names", nargs="*", help="environments; all registered ones by default")
    arguments = parser.parse_args()
    curves: list[Curve] = []
    comparisons: list[Comparison] = []
    for name in arguments.names or registry.names():
        spec = registry.get(name)
        for preset in spec.presets:
            for policy in spec.policies:
                references = [
                    r for r in _REFERENCES if (r.environment, r.preset, r.policy) == (name, preset, policy)
                ]
                for is_success in sorted({False} | {r.is_success for r in references}):
                    found = curve(name, preset, policy, is_success)
                    curves.append(found)
                    for reference in references:
                        if reference.is_success == is_success:
                            comparisons += compare(reference, found)
                    print(f"{name} {preset} {policy}: {' '.join(map(_number, found.means))}", flush=True)
    command = " ".join(["python -m bench.envs.curves", *arguments.names])
    report = {
        "command": command,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "python": platform.python_version(),
        "curves": [asdict(one) for one in curves],
        "comparisons": [asdict(each) for each in comparisons],
    }
    write(arguments.json, report)
    arguments.page.write_text(markdown(curves, comparisons, command))
    return 0


if __name__ == "__main__":
    sys.exit(main())
