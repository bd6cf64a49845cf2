"""``cod eval``: reward by position of any model or run, with the hint as it is, blanked, swapped or true."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

from cod_async.commands.output import console_for_people, print_json
from cod_async.config import load_config, load_resolved
from cod_async.config.check import check
from cod_async.config.load import apply_overrides
from cod_async.config.schema import Config
from cod_async.errors import InputError


def run_eval(
    source: Path,
    *,
    configs: Sequence[Path],
    overrides: Sequence[str],
    environment: str | None,
    preset: str | None,
    splits: Sequence[str],
    controls: Sequence[str],
    num_packs: int | None,
    lifecycles: int | None,
    step: int | None,
    seed: int,
    num_processes: int,
    is_json: bool,
) -> int:
    """Do what ``cod eval`` was asked for and return the exit code."""
    kind, problems = _kind_of(source)
    problems += _flag_problems(splits, controls, num_packs, lifecycles, num_processes)
    if step is not None and kind == "model":
        problems.append(
            f"--step {step}: {source} is a model directory, which has one version only; leave it out"
        )
    config = None
    try:
        config = _configuration(source, kind, configs, overrides, environment, preset)
        problems += check(config, for_train=False) if config is not None else []
    except InputError as error:
        problems += error.problems
    if problems or config is None:
        raise InputError(problems)
    with tempfile.TemporaryDirectory(prefix="cod-eval-") as temporary:
        if kind == "run":
            from cod_async.launch.export import export_model

            model_dir = Path(temporary) / "model"
            label = str(export_model(source, model_dir, step))
        else:
            model_dir, label = source, source.name
        answer = _evaluate(
            model_dir, label, config, splits, controls, num_packs, lifecycles, seed, num_processes
        )
    if is_json:
        print_json(answer)
    else:
        _print(answer)
    return 0


def _kind_of(source: Path) -> tuple[Literal["run", "model"] | None, list[str]]:
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


def _configuration(
    source: Path,
    kind: Literal["run", "model"] | None,
    configs: Sequence[Path],
    overrides: Sequence[str],
    environment: str | None,
    preset: str | None,
) -> Config | None:
    """Take the settings from files, from the run, or (for a bare model) from the environment's defaults.

    Returns:
        The settings, or None when there is no usable source to take them from.
    """
    extra = list(overrides)
    if environment is not None:
        from cod_async.envs import registry

        spec = registry.get(environment)
        chosen = {"name": environment, "preset": preset or spec.default_preset}
        table = ", ".join(f"{key} = {json.dumps(value)}" for key, value in chosen.items())
        extra.append(f"environments=[{{{table}}}]")
        if not configs and kind == "model":
            extra.insert(0, f"lifecycle.pack_size={spec.default_pack_size}")
    elif preset is not None:
        raise InputError(f"--preset {preset}: needs --environment as well")
    if configs:
        return load_config(configs, extra)
    if kind == "run":
        return apply_overrides(load_resolved(source), extra)
    if kind is None:
        return None
    if environment is None:
        raise InputError(
            f"{source} is a model directory; say on what to evaluate it, by --config FILE or --environment "
            "NAME"
        )
    return load_config([], extra)


def _flag_problems(
    splits: Sequence[str],
    controls: Sequence[str],
    num_packs: int | None,
    lifecycles: int | None,
    num_processes: int,
) -> list[str]:
    from cod_async.evaluate.deploy import CONTROLS, SPLITS

    problems = []
    for flag, given, known in (("--split", splits, SPLITS), ("--control", controls, CONTROLS)):
        problems += [
            f"{flag} {value}: unknown; choose from {', '.join(known)}"
            for value in given
            if value not in known
        ]
        problems += [f"{flag} {value}: given twice" for value in known if given.count(value) > 1]
    for name, number in (
        ("--packs", num_packs),
        ("--lifecycles", lifecycles),
        ("--processes", num_processes),
    ):
        if number is not None and number < 1:
            problems.append(f"{name} {number}: must be at least 1")
    return problems


def _evaluate(
    model_dir: Path,
    label: str,
    config: Config,
    splits: Sequence[str],
    controls: Sequence[str],
    num_packs: int | None,
    lifecycles: int | None,
    seed: int,
    num_processes: int,
) -> dict[str, Any]:
    from cod_async.evaluate.deploy import Control, EvaluationRequest, Split
    from cod_async.evaluate.jobs import EvaluationJob, run_jobs
    from cod_async.evaluate.report import report_to_json, suite

    jobs = [
        EvaluationJob(
            model_dir=str(model_dir),
            config=config,
            request=EvaluationRequest(
                environment=entry.name,
                preset=entry.preset,
                options=entry.options,
                split=cast(Split, split),
                controls=cast(tuple[Control, ...], tuple(controls)),
                num_packs=num_packs or config.evaluation.num_packs,
                lifecycles_per_pack=lifecycles or config.evaluation.lifecycles_per_pack,
                seed=seed,
                checkpoint=label,
            ),
        )
        for entry in config.environments
        for split in splits
    ]
    is_terminal = sys.stderr.isatty()

    def on_progress(values: Mapping[str, Any]) -> None:
        if is_terminal:
            sys.stderr.write(f"\r{values['split']} {values['control']} {values['done']}/{values['total']}   ")
            sys.stderr.flush()

    reports = [
        report
        for part in run_jobs(jobs, num_processes=num_processes, on_progress=on_progress)
        for report in part
    ]
    if is_terminal:
        sys.stderr.write("\r" + " " * 60 + "\r")
    answer = suite("deploy", reports)
    answer["reports"] = [report_to_json(report) for report in reports]
    return answer


def _print(answer: Mapping[str, Any]) -> None:
    from rich.table import Table

    names = [_name(report) for report in answer["reports"]]
    is_single = len(set(names)) == 1
    title = f"{names[0]}: " if is_single else ""
    title += "mean reward by position, and its standard error"
    table = Table(title=title, title_justify="left")
    width = max(len(report["reward_by_position"]) for report in answer["reports"])
    for head in ("worlds", "hint") if is_single else ("environment", "worlds", "hint"):
        table.add_column(head)
    for head in (*(f"task {position}" for position in range(width)), "gap"):
        table.add_column(head, justify="right", no_wrap=True)
    for name, report in zip(names, answer["reports"], strict=True):
        cells = [f"{point['mean']:.2f} ±{point['sem']:.2f}" for point in report["reward_by_position"]]
        cells += [""] * (width - len(cells))
        lead = [] if is_single else [name]
        table.add_row(*lead, report["split"], report["control"], *cells, f"{report['gap']:+.2f}")
    console_for_people().print(table)


def _name(report: Mapping[str, Any]) -> str:
    row = report["rows"][0]
    return f"{row['environment']} {row['preset']}, version {row['checkpoint']}"
