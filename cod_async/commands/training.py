"""``cod train`` and ``cod bootstrap``: from flags to a checked configuration, and on to the launcher."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from cod_async.commands.output import print_json, print_mapping, print_table
from cod_async.config import load_resolved
from cod_async.config.check import NO_ENVIRONMENTS, check, check_new_folder, check_run_dir, run_dir_of
from cod_async.config.load import apply_overrides, override_path, read_config, to_tree
from cod_async.config.schema import Config
from cod_async.durable import write_atomic
from cod_async.errors import ConfigError, InputError
from cod_async.observe.summary import TAUGHT_TITLE

RESUME_MAY_SET = (
    "run.num_steps", "run.early_stop", "run.grace_s", "actors", "observe", "evaluation", "store", "transport",
    "engine.max_running", "engine.num_threads", "engine.urls", "engine.python", "engine.server",
    "engine.hold_timeout_s",
    "learner.num_threads", "learner.checkpoint_every_steps",
    "learner.keep_checkpoints", "learner.keep_checkpoint_every_steps", "learner.has_async_checkpoints",
    "learner.tokens_per_micro_batch", "learner.data_parallel", "learner.sequence_parallel",
    "learner.sequence_mode", "learner.recompute", "learner.optimizer", "learner.has_optimizer_offload",
    "learner.trace_every_steps", "learner.has_token_records", "learner.on_nonfinite",
    "learner.max_skipped_steps", "learner.device_memory_bytes", "weights.keep_versions",
)  # fmt: skip
"""What ``--set`` may change on ``--resume``: how long and how much at once, never what is being learned."""


def _read_and_check(
    paths: Sequence[Path], overrides: Sequence[str], *, for_train: bool, needs_weights: bool | None = None
) -> tuple[Config | None, list[str]]:
    """Read a configuration and return it with all problems, those of cross-field rules included."""
    config, problems = read_config(paths, overrides)
    if config is not None:
        crossed = check(config, for_train=for_train, needs_weights=needs_weights)
        if problems:  # a refused environment was left out, which is not the same as none being given
            crossed = [problem for problem in crossed if not problem.startswith(NO_ENVIRONMENTS)]
        problems += crossed
    return config, problems


def load_checked(
    paths: Sequence[Path], overrides: Sequence[str], name: str | None, *, needs_weights: bool = True
) -> tuple[Config, Path]:
    """Load and check the configuration of a new run.

    Args:
        paths: TOML files, left to right.
        overrides: ``--set`` values, left to right.
        name: ``--name``, which goes before ``run.name``.
        needs_weights: the model must be there; False: ``model.shape`` is enough.

    Returns:
        The configuration and its run folder, which does not exist yet.

    Raises:
        InputError: with all problems of files, values, cross-field rules and the folder.
    """
    if name is not None:
        overrides = [*overrides, f"run.name={json.dumps(name)}"]
    config, problems = _read_and_check(paths, overrides, for_train=True, needs_weights=needs_weights)
    if config is not None:
        problems += check_run_dir(run_dir_of(config), is_resume=False)
    if problems or config is None:
        raise ConfigError(problems)
    return config, run_dir_of(config)


def load_resumed(run_dir: Path, paths: Sequence[Path], overrides: Sequence[str], name: str | None) -> Config:
    """Load and check the configuration of a run to go on with.

    Raises:
        InputError: with all problems, among them overrides that would change what is being learned.
    """
    problems = check_run_dir(run_dir, is_resume=True)
    if paths:
        problems.append(f"{paths[0]}: --resume takes the configuration from {run_dir}; leave the files out")
    if name is not None:
        problems.append(f"--name {name}: a resumed run keeps its name; leave it out")
    for override in overrides:
        path = override_path(override)
        if not any(path == known or path.startswith(f"{known}.") for known in RESUME_MAY_SET):
            problems.append(
                f"--set {override}: cannot change on --resume; start a new run, or set one of "
                f"{', '.join(RESUME_MAY_SET)}"
            )
    if problems:
        raise InputError(problems)
    config = apply_overrides(load_resolved(run_dir), overrides)
    problems = check(config)
    if problems:
        raise InputError(problems)
    return config


def run_train(
    paths: Sequence[Path],
    overrides: Sequence[str],
    *,
    name: str | None,
    resume: Path | None,
    is_dry_run: bool,
    is_json: bool,
) -> int:
    """Do what ``cod train`` was asked for and return the exit code."""
    if resume is None and not paths:
        raise InputError("cod train: no configuration; give one or more TOML files, or --resume RUN")
    if resume is None:
        config, run_dir = load_checked(paths, overrides, name, needs_weights=not is_dry_run)
    else:
        config, run_dir = load_resumed(resume, paths, overrides, name), resume
    if is_dry_run:
        from cod_async.commands.planning import plan

        tree, steps = to_tree(config), plan(config)
        if is_json:
            print_json({"run_dir": str(run_dir), "config": tree, "plan": steps})
        else:
            print_mapping(tree, "resolved configuration")
            print_mapping(steps, f"plan of {run_dir}")
        return 0
    if config.learner.device == "cuda":  # else torch need not be loaded here
        from cod_async.learner.parallel.world import check_devices

        check_devices(config.learner)
    if config.engine.kind == "sglang":
        from cod_async.launch.engines import check_engines

        known = [run_dir / "model", *([Path(config.model.path)] if config.model.path else [])]
        check_engines(config, next((folder for folder in known if folder.is_dir()), None))
    from cod_async.launch.local import train
    from cod_async.observe.summary import read_summary

    console = Console(stderr=True) if is_json else Console()
    try:
        return train(config, run_dir, resume is not None, overrides=overrides, console=console)
    finally:
        if is_json:
            print_json(read_summary(run_dir))


def run_bootstrap_command(
    paths: Sequence[Path], overrides: Sequence[str], *, out: Path, progress: Path | None, is_json: bool
) -> int:
    """Do what ``cod bootstrap`` was asked for and return the exit code."""
    config, problems = _read_and_check(paths, overrides, for_train=False)
    if config is not None and config.model.path:
        problems.append(
            f'model.path: found "{config.model.path}", so there is nothing to bootstrap; set it to ""'
        )
    problems += check_new_folder("--out", out)
    if progress is not None and not progress.parent.is_dir():
        problems.append(f"--progress {progress}: its folder does not exist; choose another file")
    if problems or config is None:
        raise InputError(problems)
    from cod_async.bootstrap.run import run_bootstrap

    def on_progress(values: dict[str, Any]) -> None:
        if progress is not None:
            write_atomic(progress, json.dumps(values).encode())
        else:
            text = " ".join(
                f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
                for key, value in values.items()
            )
            sys.stderr.write(text + "\n")

    report = run_bootstrap(config, out, on_progress)
    if is_json:
        print_json(report)
        return 0
    hidden = ("history", "taught")
    print_mapping(
        {key: value for key, value in report.items() if key not in hidden}, f"starting model in {out}"
    )
    print_table(report.get("taught", []), TAUGHT_TITLE)
    return 0
