"""What a launch does before and after training: make the starting model, evaluate, assemble the trained
model.

Each part leaves a file or folder that appears atomically when the part is done, so a resumed run skips it.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cod_async.config.schema import Config
from cod_async.durable import commit_folder, remove_folder
from cod_async.errors import InputError, WorkError
from cod_async.launch.parent import PARENT_VARIABLE
from cod_async.launch.run_folder import child_environment, cod_command
from cod_async.observe.summary import EVALUATION_DIR, read_evaluation, write_evaluation

MODEL_NAME = "model"
"""Folder of the starting model inside a run folder."""
_POLL_S = 0.2
_TAIL_CHARS = 3000
LAUNCH_NAME = "launch"
"""Folder of the lifecycles that a launch evaluates before and after training."""
NUM_EVALUATION_PROCESSES = 2

Tell = Callable[[str], None]


def has_model(run_dir: Path) -> bool:
    """Whether the run already has its starting model."""
    return (run_dir / MODEL_NAME / "config.json").is_file()


def make_model(run_dir: Path, config: Config, tell: Tell) -> None:
    """Put the starting model into the run folder: a copy of ``model.path``, or a bootstrapped one.

    Args:
        run_dir: a prepared run folder.
        config: the run's configuration.
        tell: called with progress text.

    Raises:
        InputError: the bootstrap refused its input.
        WorkError: the bootstrap failed, with the end of its log.
    """
    if not config.model.path:
        progress, out = run_dir / "logs" / "bootstrap.progress.json", str(run_dir / MODEL_NAME)
        arguments = ("bootstrap", str(run_dir / "config.json"), "--out", out, "--progress", str(progress))
        run_child(run_dir, "bootstrap", arguments, config, lambda: tell(_bootstrap_text(progress)))
        return
    tell(f"copying {config.model.path}")
    temporary = run_dir / f".{MODEL_NAME}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(config.model.path, temporary, ignore=shutil.ignore_patterns("*.bin", "*.pt", "*.pth"))
    commit_folder(temporary, run_dir / MODEL_NAME)


def check_teachers(run_dir: Path, config: Config) -> None:
    """See that teachers whose models are on this machine fit the student, which may be only just made.

    Raises:
        InputError: they do not; all problems are listed.
    """
    from cod_async.config.check_distillation import teacher_problems

    student, longest = run_dir / MODEL_NAME, config.model.max_context_tokens
    problems = [
        f"distillation.teachers.{index}.path: {problem}"
        for index, teacher in enumerate(config.distillation.teachers)
        if teacher.path
        for problem in teacher_problems(Path(teacher.path), student, longest)
    ]
    if problems:
        raise InputError(problems)


def _bootstrap_text(progress: Path) -> str:
    try:
        values = json.loads(progress.read_text())
    except (OSError, ValueError):
        return "starting"
    losses = " ".join(f"{name} {loss:.3g}" for name, loss in (values.get("losses") or {}).items())
    text = f"step {values.get('step')}/{values.get('num_steps')}"
    return f"{text} · loss {losses}" if losses else text


def run_child(
    run_dir: Path, name: str, arguments: tuple[str, ...], config: Config, on_poll: Callable[[], None]
) -> None:
    """Run one ``cod`` sub-command to its end, in its own process group, with its output in ``logs/NAME.log``.

    An interrupt of the caller ends the child.

    Raises:
        InputError: the child refused its input.
        WorkError: the child failed, with the end of its log.
    """
    log_path = run_dir / "logs" / f"{name}.log"
    log_path.parent.mkdir(exist_ok=True)
    environment = child_environment(config.learner.num_threads)
    environment[PARENT_VARIABLE] = f"{os.getpid()}:{config.run.grace_s:g}"
    with log_path.open("wb") as log:
        child = subprocess.Popen(
            cod_command(*arguments),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env=environment,
            process_group=0,
        )
    try:
        while True:
            try:
                code = child.wait(_POLL_S)
                break
            except subprocess.TimeoutExpired:
                on_poll()
    except BaseException:
        _end(child)
        raise
    if code == 0:
        return
    tail = log_path.read_text(errors="replace")[-_TAIL_CHARS:].strip()
    if code == 2:
        raise InputError(tail.splitlines() or [f"{name} refused its input"])
    raise WorkError(f"{name} failed with code {code}; the end of {log_path}:\n{tail}")


def export_final(run_dir: Path, config: Config, name: str) -> None:
    """Write the newest version as a model directory inside the run folder, in the place of an earlier one.

    A process of its own does it, because putting a checkpoint together takes torch and the model's memory.

    Raises:
        InputError: the checkpoint is damaged.
        WorkError: the child failed, with the end of its log.
    """
    temporary = run_dir / f".{name}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    run_child(run_dir, "export", ("export", str(run_dir), str(temporary)), config, lambda: None)
    remove_folder(run_dir / name)
    os.replace(temporary, run_dir / name)


def _end(child: subprocess.Popen[bytes]) -> None:
    child.terminate()
    try:
        child.wait(5.0)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()


def evaluate(
    run_dir: Path, config: Config, name: str, model_dir: Path, checkpoint: str, tell: Tell
) -> dict[str, Any]:
    """Evaluate one model on trained and held-out worlds, in parallel processes, and keep the reports.

    ``before`` plays normally only; ``after`` also with the hint blanked and with the hint of another world.
    Both use the same packs and sampling seeds.

    Args:
        run_dir: the run folder.
        config: the run's configuration.
        name: ``before`` or ``after``.
        model_dir: Hugging Face model directory.
        checkpoint: label of the weights.
        tell: called with progress text.

    Returns:
        ``{checkpoint, wall_s, reports}``, as kept in ``evaluation/NAME.json``; an earlier result for the same
        weights is returned as it is.
    """
    earlier = read_evaluation(run_dir, name)
    if earlier is not None and earlier.get("checkpoint") == checkpoint:
        return earlier
    from cod_async.commands.evaluating import progress_text
    from cod_async.evaluate.run import evaluate as run_evaluation
    from cod_async.evaluate.suite import ad_hoc_suite, resolve
    from cod_async.evaluate.targets import Checkpoint

    can_control = (
        config.lifecycle.carry == "hint"
        and config.lifecycle.pack_size > 1
        and config.evaluation.num_packs > 1
    )
    controls = ("normal", "blanked", "swapped") if name == "after" and can_control else ("normal",)
    suite = ad_hoc_suite(
        config, (config.lifecycle.packs,), ("train", "held_out"), controls, (config.run.seed,)
    )
    settings, problems = resolve(suite, config)
    if problems:
        raise InputError(problems)
    started_s = time.monotonic()
    answer = run_evaluation(
        suite,
        settings,
        [Checkpoint(label=checkpoint, model_dir=str(model_dir))],
        run_dir / EVALUATION_DIR / LAUNCH_NAME,
        num_processes=NUM_EVALUATION_PROCESSES,
        on_progress=lambda values: tell(progress_text(values)),
    )
    if answer["failures"]:
        raise WorkError(
            f"{len(answer['failures'])} lifecycles could not be played (resume to try again): "
            f"{answer['failures'][0]}"
        )
    result = {
        "checkpoint": checkpoint,
        "wall_s": time.monotonic() - started_s,
        "reports": answer["reports"],
    }
    write_evaluation(run_dir, name, result)
    return result
