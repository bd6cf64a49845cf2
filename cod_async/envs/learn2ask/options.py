"""Options of Learn2Ask: the data file, the reward and the judge, checked all at once."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from typing import Any, Literal, TypeGuard
from urllib.parse import urlsplit

import msgspec

from cod_async.envs.checks import OptionCheck, is_int, is_number

MAX_TRIES = 20
"""Most tries per judgement that are accepted."""
MAX_TIMEOUT_S = 3_600.0
"""Longest time limit of one try."""
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "::1")
"""Hosts that may be spoken to over plain http."""

TrainMode = Literal["Ra+Rs", "Ra", "Rs"]
Fusion = Literal["multiply", "sum"]
HeldOutBy = Literal["diagnosis", "session"]
JudgeKind = Literal["rules", "endpoint"]

_CHOICES = {
    "train_mode": ("Ra+Rs", "Ra", "Rs"),
    "fusion": ("multiply", "sum"),
    "held_out_by": ("diagnosis", "session"),
    "judge": ("rules", "endpoint"),
}
_TEXTS = ("path", "held_out_path", "judge_url", "judge_model", "judge_key_env")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}", re.ASCII)
_OWN_FIELDS = ("messages", "model", "n", "stream", "temperature", "top_p")


class Learn2AskOptions(msgspec.Struct, frozen=True):
    """Checked options.

    Attributes:
        path: file of dialogues, one JSON record per line (see ``records.py``); empty: the generated sample.
        held_out_path: a second such file for the held-out split; empty: ``path`` is split.
        held_out_by: what is kept apart when ``path`` is split: whole diagnoses or whole sessions.
        held_out_frac: least share of the records that is held out, (0, 1).
        train_mode: which rewards are trained on: asking (Ra), stopping (Rs) or both.
        fusion: how ``Ra+Rs`` joins them; without effect in the other modes.
        is_reward_normalized: divide the reward by its maximum (3 or 4), so that it lies in [0, 1] like that
            of the other environments.
        judge: ``rules`` (deterministic, no network) or ``endpoint`` (a model behind ``judge_url``).
        judge_url: base address of an OpenAI-compatible endpoint, for example ``http://127.0.0.1:8000/v1``.
        judge_model: model name to ask for.
        judge_key_env: NAME of the environment variable that holds the key; empty: no key is sent.
        judge_temperature, judge_top_p: sampling of the judge.
        judge_extra_body: further fields of the request, as JSON-able values (thinking, top_k, ...).
        judge_tries: most tries per judgement.
        judge_timeout_s: time limit of one try.
        judge_backoff_s: sleep after the first failed try; doubles from try to try up to 30 s.
        allow_plain_http: whether plain http to another machine is allowed.
    """

    path: str
    held_out_path: str
    held_out_by: HeldOutBy
    held_out_frac: float
    train_mode: TrainMode
    fusion: Fusion
    is_reward_normalized: bool
    judge: JudgeKind
    judge_url: str
    judge_model: str
    judge_key_env: str
    judge_temperature: float
    judge_top_p: float
    judge_extra_body: dict[str, Any]
    judge_tries: int
    judge_timeout_s: float
    judge_backoff_s: float
    allow_plain_http: bool


PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "path": "",
        "held_out_path": "",
        "held_out_by": "diagnosis",
        "held_out_frac": 0.2,
        "train_mode": "Ra+Rs",
        "fusion": "multiply",
        "is_reward_normalized": False,
        "judge": "rules",
        "judge_url": "",
        "judge_model": "",
        "judge_key_env": "",
        "judge_temperature": 1.0,
        "judge_top_p": 0.95,
        "judge_extra_body": {},
        "judge_tries": 6,
        "judge_timeout_s": 120.0,
        "judge_backoff_s": 1.0,
        "allow_plain_http": False,
    }
}
"""The paper's reward; the judge that needs no network."""


def url_problem(url: str, allow_plain_http: bool) -> str:
    """Return what is wrong with a judge address, or an empty string.

    The address is not repeated in the answer, because a wrong one may hold a password.
    """
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port
    except ValueError:
        return "is not an address; give for example http://127.0.0.1:8000/v1"
    if parts.scheme not in ("http", "https") or not host:
        return "must begin with http:// or https:// and name a host"
    if not url.isascii() or any(ord(letter) <= 32 or ord(letter) == 127 for letter in url):
        return "has a space, a control character or a letter beyond ASCII in it"
    if parts.username is not None or parts.password is not None:
        return "holds a user name or password; put the key into the variable that judge_key_env names"
    if parts.query or parts.fragment:
        return "has a query or a fragment; give the base address only"
    if parts.scheme == "http" and host not in LOOPBACK_HOSTS and not allow_plain_http:
        return (
            "is plain http to another machine, so dialogues and key would travel readable; use https, or set "
            "allow_plain_http = true on a private network"
        )
    return ""


def _judge_problems(values: Mapping[str, Any]) -> list[str]:
    """List what contradicts itself among the judge's options, whose types are right."""
    problems = []
    if values["judge"] == "rules":
        named = [key for key in ("judge_url", "judge_model", "judge_key_env") if values[key]]
        if named:
            problems.append(f'{", ".join(named)} would be ignored: judge is rules; set judge = "endpoint"')
        return problems
    problem = url_problem(values["judge_url"], values["allow_plain_http"])
    if problem:
        problems.append(f"judge_url {problem}")
    if not values["judge_model"]:
        problems.append("judge_model is empty; name the model that the endpoint serves")
    # The value is never repeated: a user may have put the key itself here.
    name = values["judge_key_env"]
    if name and not _VARIABLE.fullmatch(name):
        problems.append(
            "judge_key_env is no NAME of an environment variable (letters, digits, underscores); never put "
            "the key itself into a config"
        )
    elif name and not os.environ.get(name):
        problems.append(
            "judge_key_env names an environment variable that is not set here (its name is not repeated, in "
            "case it is the key); export it"
        )
    return problems


def _extra_body_problem(value: Any) -> str:
    if not isinstance(value, dict):
        return f"judge_extra_body is {value!r}; it must be a table"
    taken = [key for key in _OWN_FIELDS if key in value]
    if taken:
        return f"judge_extra_body must not hold {', '.join(taken)}; the environment sets these itself"
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError, RecursionError):
        return "judge_extra_body holds something that JSON cannot express (a date, NaN, ...)"
    return ""


def _number_problems(values: Mapping[str, Any]) -> list[str]:
    problems = []
    if not is_int(values["judge_tries"]) or not 1 <= values["judge_tries"] <= MAX_TRIES:
        problems.append(
            f"judge_tries is {values['judge_tries']!r}; it must be an integer from 1 to {MAX_TRIES}"
        )
    ranges = {
        "judge_temperature": (0.0, 2.0, True),
        "judge_top_p": (0.0, 1.0, False),
        "judge_timeout_s": (0.0, MAX_TIMEOUT_S, False),
        "judge_backoff_s": (0.0, 30.0, True),
    }
    for key, (low, high, has_low) in ranges.items():
        value = values[key]
        if not is_number(value, low, high) or (value == low and not has_low):
            above = "from" if has_low else "above"
            problems.append(f"{key} is {value!r}; it must be a number {above} {low:g} to {high:g}")
    frac = values["held_out_frac"]
    if not is_number(frac, 0, 1) or frac in (0, 1):
        problems.append(f"held_out_frac is {frac!r}; it must be a number above 0 and below 1")
    return problems


def parse_options(options: Mapping[str, Any]) -> Learn2AskOptions:
    """Check a preset merged with overrides; missing options are those of ``default``.

    Whether the files can be read is checked by ``dataset.py``, where they are needed: an actor has none.

    Raises:
        EnvironmentInputError: every problem at once: unknown names, wrong types, values out of range,
            contradictions.
    """
    check = OptionCheck("learn2ask", PRESETS["default"], options)
    values, problems = check.values, check.problems
    # judge_key_env may be the key itself by mistake, judge_url may hold a password: values are not repeated.
    problems += [f"{key} is no text; it must be a string" for key in _TEXTS if not _is_text(values[key])]
    check.choices(_CHOICES)
    check.switches(("is_reward_normalized", "allow_plain_http"))
    problems += _number_problems(values)
    extra = _extra_body_problem(values["judge_extra_body"])
    if extra:
        problems.append(extra)
    if not problems:
        problems += _judge_problems(values)
        if values["held_out_path"] and not values["path"]:
            problems.append("held_out_path is set but path is not; give the training file too")
    return Learn2AskOptions(**check.finish())


def _is_text(value: Any) -> TypeGuard[str]:
    return isinstance(value, str) and "\x00" not in value
