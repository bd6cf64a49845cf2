"""The section ``[distillation]``: teachers that the student's own episodes are scored by."""

from __future__ import annotations

import os

import msgspec

from cod_async.config.fields import Count, Positive, Seconds


class TeacherConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A frozen model that scores what is played in one environment; read with ``loss.preset = "opd"``."""

    environment: str
    """Name of the environment, one of ``environments``."""
    preset: str = ""
    """Preset of the environment; empty: all of its presets."""
    path: str = ""
    """Hugging Face model directory, loaded by every actor and computed on its CPU; teachers with one path
    share it. A relative one counts from the working folder. This or ``url``."""
    url: str = ""
    """SGLang server that runs already and whose weights stay as they are. This or ``path``."""
    api_key_env: str = ""
    """Environment variable with the api key of the server at ``url``."""

    def __post_init__(self) -> None:
        if self.path and not os.path.isabs(self.path):  # other processes, and a resume, may run elsewhere
            msgspec.structs.force_setattr(self, "path", os.path.abspath(self.path))


class DistillationConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """On-policy distillation with one teacher per environment; ``loss.preset = "opd"`` turns it on."""

    teachers: tuple[TeacherConfig, ...] = ()
    """One for every environment that is played, with the student's tokenizer."""
    tokens_per_batch: Positive = 8192
    """With ``path``: tokens of one forward pass, padding included; a longer row has one to itself. With
    ``engine.is_batch_invariant`` every row has."""
    max_requests: Positive = 32
    """With ``url``: rows that an actor has at a server at once."""
    request_timeout_s: Seconds = 600.0
    """With ``url``: longest scoring of a row."""
    max_retries: Count = 3
    """A row that a teacher could not score is asked for so often again; then its episode has failed as
    infrastructure, and is played again."""

    def teacher_of(self, environment: str, preset: str) -> TeacherConfig | None:
        """Return the teacher of an environment, None if it has none."""
        return next(
            (teacher for teacher in self.teachers if is_teacher_of(teacher, environment, preset)), None
        )


def is_teacher_of(teacher: TeacherConfig, environment: str, preset: str) -> bool:
    """Return whether a teacher scores what is played in an environment."""
    return teacher.environment == environment and teacher.preset in ("", preset)
