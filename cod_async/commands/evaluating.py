"""``cod eval``: reward by position of any model, run or sweep of checkpoints, with controls.

Flags become a suite (or a suite file is read), everything is checked at once, versions of a run are pinned,
and the work is done by :mod:`cod_async.evaluate`. What was finished is kept in the output folder, so the same
command goes on where it was stopped.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec

from cod_async.commands.output import console_for_people, print_json
from cod_async.config import load_config, load_resolved
from cod_async.config.check import check, why_not_writable
from cod_async.config.load import apply_overrides
from cod_async.config.schema import Config
from cod_async.errors import InputError

if TYPE_CHECKING:
    from cod_async.evaluate.suite import Setting, Suite
    from cod_async.evaluate.targets import Checkpoint
    from cod_async.lifecycle.segment import Version

DEFAULT_OUT = Path("runs") / "evaluation"
"""Where results of bare models go, relative to the current folder."""
MAX_DEFAULT_PROCESSES = 2
PLAIN_INTERVAL_S = 10.0
"""Seconds between lines of progress where there is no terminal."""
MAX_CURVE_POSITIONS = 10
"""Longer curves are shortened in the table; JSON and plots have them whole."""

Kind = Literal["run", "model"]


class Request(msgspec.Struct, frozen=True, kw_only=True):
    """What the flags of ``cod eval`` ask for; empty or None where a flag was not given."""

    source: Path
    configs: tuple[Path, ...] = ()
    overrides: tuple[str, ...] = ()
    suite: Path | None = None
    environment: str | None = None
    preset: str | None = None
    pack_size: int | None = None
    strategies: tuple[str, ...] = ()
    carry: str | None = None
    splits: tuple[str, ...] = ()
    controls: tuple[str, ...] = ()
    num_packs: int | None = None
    lifecycles: int | None = None
    seeds: tuple[int, ...] = ()
    step: int | None = None
    checkpoints: str | None = None
    label: str | None = None
    num_processes: int | None = None
    out: Path | None = None
    has_plots: bool = True
    is_json: bool = False


def run_eval(request: Request) -> int:
    """Do what ``cod eval`` was asked for and return the exit code: 1 if lifecycles could not be played."""
    from cod_async.evaluate.targets import choose_versions

    kind, problems = _kind_of(request.source)
    problems += _flag_problems(request, kind)
    config = suite = None
    settings: list[Setting] = []
    has_bad_flags = bool(problems)
    versions: list[Version | None] = []
    if kind == "run" and not has_bad_flags:
        try:
            versions = choose_versions(request.source, request.checkpoints, request.step)
        except InputError as error:
            problems += error.problems
    try:
        config = _configuration(request, kind)
        problems += check(config, for_train=False) if config is not None else []
        if config is not None and not has_bad_flags:
            suite, settings = _suite_of(request, config)
    except InputError as error:
        problems += error.problems
    if problems or config is None or suite is None or kind is None:
        raise InputError(list(dict.fromkeys(problems)))
    folder = request.out or _default_out(request.source, kind) / suite.name
    reason = why_not_writable(folder)
    if reason is not None:
        raise InputError(f"--out {folder}: {reason}")
    answer = _play(request, versions, suite, settings, folder)
    if request.has_plots:
        answer["plots"] = _plots(answer, folder)
    if request.is_json:
        print_json(answer)
    else:
        _print(answer)
    return 1 if answer["failures"] else 0


def _play(
    request: Request,
    versions: Sequence[Version | None],
    suite: Suite,
    settings: Sequence[Setting],
    folder: Path,
) -> dict[str, Any]:
    from cod_async.evaluate.results import FolderLock
    from cod_async.evaluate.run import evaluate

    printer = _Printer()
    num_processes = request.num_processes or min(MAX_DEFAULT_PROCESSES, len(os.sched_getaffinity(0)))
    with FolderLock(folder), _weights(request, versions, folder) as weights:
        answer = evaluate(
            suite,
            settings,
            weights,
            folder,
            num_processes=num_processes,
            on_progress=printer,
            is_locked=True,
        )
    printer.end()
    return answer


class _Printer:
    """Shows progress on standard error: one line redrawn in place, or a plain line now and then."""

    def __init__(self) -> None:
        self._is_terminal = sys.stderr.isatty()
        self._told_s = time.monotonic()

    def __call__(self, values: Mapping[str, Any]) -> None:
        """Show what an evaluation tells."""
        now = time.monotonic()
        if self._is_terminal:
            sys.stderr.write(f"\r{progress_text(values)}\x1b[K")
        elif now - self._told_s >= PLAIN_INTERVAL_S:
            self._told_s = now
            sys.stderr.write(progress_text(values) + "\n")
        sys.stderr.flush()

    def end(self) -> None:
        """Take the line away."""
        if self._is_terminal:
            sys.stderr.write("\r\x1b[K")
            sys.stderr.flush()


def progress_text(values: Mapping[str, Any]) -> str:
    """Return one line on how far an evaluation is, from what it tells."""
    from cod_async.observe.progress import format_duration

    text = f"{values['checkpoint']} · {values['done']}/{values['total']} lifecycles"
    if values["num_kept"]:
        text += f" ({values['num_kept']} from before)"
    if values["num_failed"]:
        text += f" · {values['num_failed']} failed"
    if values["per_s"] is not None:
        text += f" · {values['per_s']:.1f}/s · {format_duration(values['left_s'])} left"
    return text


def _kind_of(source: Path) -> tuple[Kind | None, list[str]]:
    """Tell a run folder from a model directory; None, and why, for everything else."""
    wanted = "give a run folder or a model directory"
    if not source.is_dir():
        return None, [f"{source}: no such folder; {wanted}"]
    if (source / "tokenizer.json").is_file() and (source / "config.json").is_file():
        return "model", []
    try:
        values = json.loads((source / "config.json").read_bytes())
    except FileNotFoundError:
        return None, [f"{source}: neither a run folder nor a Hugging Face model directory; {wanted}"]
    except (OSError, ValueError, RecursionError) as error:
        return None, [f"{source / 'config.json'}: cannot be read as JSON, {error}; {wanted}"]
    if isinstance(values, dict) and "model_type" in values:
        return None, [f"{source}: a model directory without tokenizer.json; add the model's tokenizer"]
    return "run", []


def _default_out(source: Path, kind: Kind) -> Path:
    return source / "evaluation" if kind == "run" else DEFAULT_OUT / source.resolve().name


def _flag_problems(request: Request, kind: Kind | None) -> list[str]:
    from cod_async.evaluate.suite import CARRIES, CONTROLS, SPLITS
    from cod_async.lifecycle.packs import STRATEGIES

    problems = []
    choices: tuple[tuple[str, tuple[str, ...], tuple[str, ...]], ...] = (
        ("--split", request.splits, SPLITS),
        ("--control", request.controls, CONTROLS),
        ("--strategy", request.strategies, STRATEGIES),
        ("--carry", () if request.carry is None else (request.carry,), CARRIES),
    )
    for flag, given, known in choices:
        problems += [
            f"{flag} {value}: unknown; choose from {', '.join(known)}"
            for value in given
            if value not in known
        ]
        problems += [f"{flag} {value}: given twice" for value in known if given.count(value) > 1]
    problems += [
        f"--seed {seed}: given twice" for seed in set(request.seeds) if request.seeds.count(seed) > 1
    ]
    problems += [f"--seed {seed}: must be at least 0" for seed in request.seeds if seed < 0]
    for name, number, least in (
        ("--packs", request.num_packs, 0),
        ("--lifecycles", request.lifecycles, 1),
        ("--pack-size", request.pack_size, 1),
        ("--processes", request.num_processes, 1),
        ("--step", request.step, 0),
    ):
        if number is not None and number < least:
            problems.append(f"{name} {number}: must be at least {least}")
    for name, given_value in (("--step", request.step), ("--checkpoints", request.checkpoints)):
        if given_value is not None and kind == "model":
            problems.append(
                f"{name} {given_value}: {request.source} is a model directory, which has one version only; "
                "leave it out"
            )
    if request.step is not None and request.checkpoints is not None:
        problems.append(f"--step {request.step}: contradicts --checkpoints; give one of them")
    if request.suite is not None:
        in_suite = ("environment", "preset", "pack_size", "strategies", "carry")
        problems += [
            f"--{name.replace('_', '-').replace('strategies', 'strategy')}: is said by the entries of "
            "--suite; leave one of them out"
            for name in in_suite
            if getattr(request, name)
        ]
    return problems


def _configuration(request: Request, kind: Kind | None) -> Config | None:
    """Take the settings from files, from the run, or (for a bare model) from the environment's defaults.

    Returns:
        The settings, or None when there is no usable source to take them from.
    """
    extra = list(request.overrides)
    if request.environment is not None:
        from cod_async.envs import registry

        spec = registry.get(request.environment)
        chosen = {"name": request.environment, "preset": request.preset or spec.default_preset}
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in chosen.items())
        extra.append(f"environments=[{{{table}}}]")
        if not request.configs and kind == "model":
            extra.insert(0, f"lifecycle.pack_size={spec.default_pack_size}")
    elif request.preset is not None:
        raise InputError(f"--preset {request.preset}: needs --environment as well")
    if request.configs:
        return load_config(request.configs, extra)
    if kind == "run":
        return apply_overrides(load_resolved(request.source), extra)
    if kind is None:
        return None
    if request.suite is not None:
        return load_config([], [*_any_environment(), *extra])
    if request.environment is None:
        raise InputError(
            f"{request.source} is a model directory; say on what to evaluate it, by --suite FILE, --config "
            "FILE or --environment NAME"
        )
    return load_config([], extra)


def _any_environment() -> list[str]:
    """Return what makes a configuration complete where only a suite says what is played."""
    from cod_async.envs import registry

    spec = registry.get(next(iter(registry.BUILT_IN)))
    return [f'environments=[{{name="{spec.name}", preset="{spec.default_preset}"}}]']


def _suite_of(request: Request, config: Config) -> tuple[Suite, list[Setting]]:
    """Return what to play: the suite file with what flags change in it, or the suite that flags make.

    Raises:
        InputError: every problem of the suite.
    """
    from cod_async.evaluate.suite import ad_hoc_suite, load_suite, resolve

    changes: dict[str, Any] = {
        "num_packs": request.num_packs,
        "lifecycles_per_pack": request.lifecycles,
        "controls": request.controls or None,
        "splits": request.splits or None,
    }
    changes = {name: value for name, value in changes.items() if value is not None}

    def adapt(suite: Suite) -> Suite:
        entries = tuple(msgspec.structs.replace(entry, **changes) for entry in suite.entries)
        return msgspec.structs.replace(suite, entries=entries, seeds=request.seeds or suite.seeds)

    if request.suite is not None:
        return load_suite(request.suite, config, adapt)
    suite = adapt(
        ad_hoc_suite(config, request.strategies or (config.lifecycle.packs,), ("train", "held_out"))
    )
    entries = tuple(
        msgspec.structs.replace(entry, pack_size=request.pack_size, carry=request.carry)
        for entry in suite.entries
    )
    suite = msgspec.structs.replace(suite, entries=entries)
    settings, problems = resolve(suite, config)
    if problems:
        raise InputError([problem.replace("entries.", "environments.", 1) for problem in problems])
    return suite, settings


@contextlib.contextmanager
def _weights(
    request: Request, versions: Sequence[Version | None], folder: Path
) -> Iterator[list[Checkpoint]]:
    """Yield the weights to evaluate; versions of a run stay on disk meanwhile."""
    from cod_async.evaluate.targets import Checkpoint, pinned

    if not versions:
        yield [Checkpoint(label=request.label or request.source.name, model_dir=str(request.source))]
        return
    with pinned(request.source, versions, folder / "pinned") as checkpoints:
        if request.label is not None and len(checkpoints) == 1:
            checkpoints = [msgspec.structs.replace(checkpoints[0], label=request.label)]
        yield checkpoints


def _plots(answer: Mapping[str, Any], folder: Path) -> list[str]:
    from cod_async.observe.sweeps import draw_answer

    return [str(path) for path in draw_answer(answer, folder / "plots")]


def _print(answer: Mapping[str, Any]) -> None:
    from rich.table import Table

    reports = answer["reports"]
    table = Table(
        title=f"{answer['suite']}: mean reward by position, and its standard error", title_justify="left"
    )
    heads: dict[str, Callable[[Mapping[str, Any]], str]] = {
        "checkpoint": lambda report: str(report["checkpoint"]),
        "environment": lambda report: str(report["entry"]),
        "mode": lambda report: str(report["mode"]),
        "carry": lambda report: str(report["carry"]),
        "worlds": lambda report: str(report["split"]),
        "shown": lambda report: str(report["control"]),
    }
    always = ("checkpoint", "environment", "worlds", "shown")
    shown = {
        head: get
        for head, get in heads.items()
        if head in always or any(get(report) != get(reports[0]) for report in reports)
    }
    for head in shown:
        table.add_column(head)
    width = max(len(report["reward_by_position"]) for report in reports)
    positions = _shown_positions(width)
    for head in (*("…" if p is None else f"task {p}" for p in positions), "gap", "packs"):
        table.add_column(head, justify="right", no_wrap=True)
    for report in reports:
        points = report["reward_by_position"]
        cells = [
            "" if p is None or p >= len(points) else f"{points[p]['mean']:.2f} ±{points[p]['sem']:.2f}"
            for p in positions
        ]
        lead = [get(report) for get in shown.values()]
        table.add_row(*lead, *cells, f"{report['gap']:+.2f}", str(report["num_packs"]))
    console = console_for_people()
    console.print(table)
    for entry in answer["not_available"]:
        console.print(
            f"{entry['entry']} {entry['mode']} {entry['split']}, control {entry['control']}: not available, "
            f"{entry['reason']}",
            highlight=False,
        )
    for failure in answer["failures"]:
        console.print(f"not played: {failure}", highlight=False)
    console.print(f"everything is in {answer['out']}", highlight=False, soft_wrap=True)


def _shown_positions(width: int) -> list[int | None]:
    """Return the positions that a table shows; None stands for those left out."""
    if width <= MAX_CURVE_POSITIONS:
        return list(range(width))
    half = MAX_CURVE_POSITIONS // 2
    return [*range(half), None, *range(width - half, width)]
