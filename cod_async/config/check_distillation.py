"""What a configuration says about teachers: one for every environment, of the student's vocabulary, and
nothing beside them that distillation does not read.

A part of :mod:`cod_async.config.check`, with the same kind of sentences. Whether a server at ``url`` fits is
asked when actors start. Loads no torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from cod_async.config.check_engine import server_host
from cod_async.config.check_model import MODEL_FILES, WEIGHT_FILES
from cod_async.config.distillation import DistillationConfig, TeacherConfig, is_teacher_of
from cod_async.config.presets import preset_values
from cod_async.config.schema import Config
from cod_async.errors import InputError
from cod_async.loopback import is_loopback
from cod_async.models.supported import text_values, unsupported

Problems = Iterator[str]

CONFIG_FILE = "config.json"

_FIXED = (
    ("kl_coef", "the correction for stale data is exact for 1 alone; another pace is learner.lr"),
    ("kl", "only k2 has the gradient of the distillation loss"),
    ("clip", "there is no advantage that a clip could hold back"),
    ("ratio", "there is no advantage that a ratio could weigh"),
    ("proximal", "there is no advantage that a ratio could weigh"),
    ("behavior_weight", "there is no advantage to weigh; stale data is corrected for already"),
    ("segment_mask", "there is no advantage to mask; stale data is corrected for already"),
)
"""Fields of ``[loss]`` that stay as the preset has them, and why."""


def distillation_problems(config: Config, *, for_train: bool, needs_weights: bool) -> Problems:
    """List what is wrong with ``[distillation]`` and with what contradicts it.

    Args:
        config: a configuration of valid values.
        for_train: keys of servers must be there.
        needs_weights: models in ``path`` must be there; otherwise they are looked at if they are.
    """
    distillation = config.distillation
    if not config.loss.is_distilled:
        yield from _unused(distillation, config.loss.preset)
        return
    yield from _beside(config)
    if not distillation.teachers:
        yield (
            'distillation.teachers: empty, but loss.preset = "opd" learns from nothing else; add one '
            "[[distillation.teachers]] table for every environment, or take another preset"
        )
        return
    yield from _coverage(config)
    for index, teacher in enumerate(distillation.teachers):
        path = f"distillation.teachers.{index}"
        if bool(teacher.path) == bool(teacher.url):
            found = "both path and url" if teacher.path else "neither path nor url"
            yield f"{path}: has {found}; give one of them"
        elif teacher.url:
            yield from _server(path, teacher, config, for_train=for_train)
        elif needs_weights or Path(teacher.path).exists():
            yield from _folder(path, teacher, config)
        if teacher.api_key_env and not teacher.url:
            yield f"{path}.api_key_env: has no effect without url; remove it"


def _unused(distillation: DistillationConfig, preset: str) -> Problems:
    if distillation.teachers:
        yield (
            f'distillation.teachers: {len(distillation.teachers)} given, but loss.preset = "{preset}" reads '
            'none; set it to "opd", or remove them'
        )
    default = DistillationConfig()
    for name in ("tokens_per_batch", "max_requests", "request_timeout_s", "max_retries"):
        if getattr(distillation, name) != getattr(default, name):
            yield f'distillation.{name}: has no effect with loss.preset = "{preset}"; remove it'


def _beside(config: Config) -> Problems:
    """Settings beside the teachers that change a loss of advantages, which is not computed."""
    own = preset_values("opd")
    for name, reason in _FIXED:
        value = getattr(config.loss, name)
        if value != own[name]:
            shown = f'"{value}"' if isinstance(value, str) else f"{value:g}"
            yield f'loss.{name}: {shown} contradicts loss.preset = "opd": {reason}; remove it'
    credit = config.credit_assignment
    for name, neutral in (("red", "off"), ("std", "none")):
        if getattr(credit, name) != neutral:
            yield (
                f'credit_assignment.{name}: "{getattr(credit, name)}" re-weights advantages, which '
                f'loss.preset = "opd" only logs; set it to "{neutral}"'
            )


def _coverage(config: Config) -> Problems:
    teachers = config.distillation.teachers
    for index, environment in enumerate(config.environments):
        own = [
            number
            for number, teacher in enumerate(teachers)
            if is_teacher_of(teacher, environment.name, environment.preset)
        ]
        what = f"environments.{index}: {environment.name} {environment.preset}"
        if not own:
            yield (
                f"{what} has no teacher; add a [[distillation.teachers]] table with environment = "
                f'"{environment.name}"'
            )
        elif len(own) > 1:
            yield f"{what} has several teachers, distillation.teachers {own}; leave one of them"
    for number, teacher in enumerate(teachers):
        if not any(is_teacher_of(teacher, e.name, e.preset) for e in config.environments):
            name = f"{teacher.environment} {teacher.preset}".strip()
            yield (
                f'distillation.teachers.{number}: "{name}" is none of the environments that are played; '
                "correct environment and preset, or remove it"
            )


def _server(path: str, teacher: TeacherConfig, config: Config, *, for_train: bool) -> Problems:
    host = server_host(teacher.url)
    if host is None:
        yield f"{path}.url: not a server; write http://HOST:PORT"
    elif not is_loopback(host) and not teacher.api_key_env:
        yield (
            f"{path}.api_key_env: empty, but {host} is another machine, where anybody may change the weights "
            "of a server without a key; start it with --api-key and name the variable that holds it"
        )
    if config.engine.temperature != 1:
        yield (
            f"{path}.url: an SGLang server gives log-probs of a prompt at temperature 1 only, and "
            f"engine.temperature is {config.engine.temperature:g}; set that to 1, or give the model as path"
        )
    if for_train and teacher.api_key_env and not os.environ.get(teacher.api_key_env):
        yield f'{path}.api_key_env: the environment variable "{teacher.api_key_env}" is not set; set it'


def _folder(path: str, teacher: TeacherConfig, config: Config) -> Problems:
    folder = Path(teacher.path)
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        missing.append(WEIGHT_FILES[0])
    if missing:
        names = ", ".join(missing)
        yield f'{path}.path: "{folder}" lacks {names}; give a complete Hugging Face model directory'
        return
    student = Path(config.model.path) if config.model.path else None
    if student is not None and not all((student / name).is_file() for name in MODEL_FILES):
        student = None  # reported by the rules on models, or planned without
    for problem in teacher_problems(folder, student, config.model.max_context_tokens):
        yield f"{path}.path: {problem}"


def vocab_size_of(folder: Path) -> int:
    """Return the number of token ids of a model directory.

    Raises:
        InputError: its ``config.json`` cannot be read or names none.
    """
    return _facts(folder)[0]


def teacher_problems(teacher: Path, student: Path | None, max_context_tokens: int) -> list[str]:
    """List why a model cannot be the teacher of another; reads both directories.

    Args:
        teacher: its model directory.
        student: that of the model to be trained; None if it is not known yet.
        max_context_tokens: longest row of the run.
    """
    from cod_async.lifecycle.rendering import TextTokenizer

    try:
        size, longest, obstacles = _facts(teacher)
        found = [
            f'"{teacher}": {obstacle}; give a model that this version computes' for obstacle in obstacles
        ]
        if longest is not None and longest < max_context_tokens:
            found.append(
                f'"{teacher}" takes rows of {longest} tokens, model.max_context_tokens is '
                f"{max_context_tokens}; lower that"
            )
        tokens = TextTokenizer(teacher).tokens
        if student is None:
            return found
        theirs, their_size = TextTokenizer(student).tokens, _facts(student)[0]
    except InputError as error:
        return list(error.problems)
    if tokens != theirs:
        odd = sorted(set(tokens.items()) ^ set(theirs.items()))[0]
        found.append(
            f'"{teacher}" has another tokenizer than the student in "{student}" (token {odd[1]!r}, '
            f"id {odd[0]}, is in one of them only); a teacher scores the student's ids, give one with the "
            "same tokenizer"
        )
    if size != their_size:
        found.append(
            f'"{teacher}" has a vocabulary of {size} ids, the student in "{student}" {their_size}; a '
            "teacher scores the student's ids, give one of the same family"
        )
    return found


def _facts(folder: Path) -> tuple[int, int | None, list[str]]:
    """Return vocabulary, longest row if it is said, and what keeps this version from computing a model.

    Raises:
        InputError: its ``config.json`` cannot be read or names no vocabulary.
    """
    path = folder / CONFIG_FILE
    try:
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read, {error}; give a complete model directory") from None
    values = text_values(raw) if isinstance(raw, dict) else {}
    size, longest = values.get("vocab_size"), values.get("max_position_embeddings")
    if not isinstance(size, int) or size < 1:
        raise InputError(f"{path}: vocab_size is {size!r}; give a complete model directory")
    return size, longest if isinstance(longest, int) else None, unsupported(raw)
