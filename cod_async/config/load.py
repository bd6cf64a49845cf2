"""From TOML files and dotted overrides to one frozen Config, and back and forth between Config and the run
folder.

Precedence: defaults of the schema, then files left to right, then ``--set`` overrides left to right. Tables
merge, lists replace. Files ending in ``.json`` are read as JSON, so a run folder's resolved ``config.json``
is itself a valid input. Every problem of every file and override is reported in one :class:`ConfigError`.
"""

from __future__ import annotations

import copy
import json
import os
import re
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import msgspec

from cod_async.config.presets import own_values
from cod_async.config.schema import Config
from cod_async.config.validate import find_problems
from cod_async.durable import write_atomic as write_atomic
from cod_async.errors import ConfigError

RESOLVED_NAME = "config.json"
"""Name of the resolved configuration inside a run folder."""
PRESET_PATH = "loss.preset"
"""The one setting that stands for others."""
_BARE_WORD = re.compile(r"^[A-Za-z0-9_./~:+-]+$")
_INDEX = re.compile(r"^[0-9]{1,9}$")
_MAX_FILE_BYTES = 16 << 20


def load_config(paths: Sequence[str | Path], overrides: Sequence[str] = ()) -> Config:
    """Load a configuration from files, left to right, then overrides.

    Args:
        paths: TOML files (or ``.json`` files with the same structure).
        overrides: ``a.b=value`` with a TOML value; list items by index (``environments.0.preset="door"``).
            Bare words that are not TOML values are taken as text, so ``run.name=trial`` works.

    Returns:
        The validated configuration; cross-field rules are checked apart, by
        :func:`cod_async.config.check.check`.

    Raises:
        ConfigError: with every problem of files, overrides and values.
    """
    config, problems = read_config(paths, overrides)
    if problems or config is None:
        raise ConfigError(problems)
    return config


def read_config(
    paths: Sequence[str | Path], overrides: Sequence[str] = ()
) -> tuple[Config | None, list[str]]:
    """Load like :func:`load_config`, but return the problems beside what could be read.

    Returns:
        The configuration with every refused entry left out (so that cross-field rules can look at the rest),
        or None if too little is left, and the problems; no problems mean that the configuration is whole.
    """
    problems: list[str] = []
    tree: dict[str, Any] = {}
    for path in paths:
        data = _read_file(Path(path), problems)
        if data is not None:
            _anchor_paths(data, Path(path).parent)
            _drop_old_recipe(tree, data.get("loss"))
            tree = _merge(tree, data)
    _apply_overrides(tree, overrides, problems)
    if problems and not tree:
        return None, problems
    found = find_problems(tree)
    for problem in found:
        _leave_out(tree, problem.partition(": ")[0].split("."))
    try:
        return msgspec.convert(tree, Config, strict=True), [*problems, *found]
    except msgspec.ValidationError as error:
        # Without other problems this is a rule that the walk does not know: still exit 2 and no traceback.
        return None, [*problems, *found] or [f"the configuration is not valid: {error}"]


def apply_overrides(config: Config, overrides: Sequence[str]) -> Config:
    """Return ``config`` with dotted overrides applied.

    Raises:
        ConfigError: with every problem of the overrides and of the resulting values.
    """
    problems: list[str] = []
    tree = to_tree(config)
    _apply_overrides(tree, overrides, problems)
    return _to_config(tree, problems)


def override_path(override: str) -> str:
    """Return the dotted path of an ``a.b=value`` override."""
    return override.partition("=")[0].strip()


def to_tree(config: Config) -> dict[str, Any]:
    """Return the configuration as plain JSON-able values."""
    return cast(dict[str, Any], msgspec.json.decode(msgspec.json.encode(config)))


def config_digest(config: Config) -> str:
    """Return the SHA-256 (hex) of the resolved configuration in canonical JSON; equal digests mean equal
    settings.
    """
    import hashlib  # a tenth of this module's import time, and most callers never need it

    return hashlib.sha256(msgspec.json.encode(config, order="deterministic")).hexdigest()


def save_resolved(config: Config, run_dir: Path) -> Path:
    """Write the resolved configuration to ``run_dir/config.json``, atomically and durably.

    Returns:
        The path written. After it returns, the file holds this configuration also after a power loss.
    """
    target = run_dir / RESOLVED_NAME
    write_atomic(target, msgspec.json.format(msgspec.json.encode(config), indent=2) + b"\n")
    return target


def load_resolved(run_dir: Path) -> Config:
    """Read the resolved configuration of a run folder.

    Raises:
        ConfigError: the folder has no ``config.json`` or it does not hold a valid configuration.
    """
    path = run_dir / RESOLVED_NAME
    if not path.is_file():
        raise ConfigError(f"{path}: not found; {run_dir} is not a run folder (start a run with cod train)")
    problems: list[str] = []
    data = _read_file(path, problems)
    if data is None:
        raise ConfigError(problems)
    return _to_config(data, problems)


def _leave_out(tree: dict[str, Any], keys: Sequence[str]) -> None:
    """Remove a refused entry: the key, the whole list that holds it, or the environments, if one lacks it.

    What an earlier problem removed already is left alone.
    """
    node: Any = tree
    for depth, key in enumerate(keys):
        rest = keys[depth + 1 :]
        if isinstance(node, list):
            if int(key) >= len(node):
                return
            item = node[int(key)]
            if isinstance(item, dict) and rest and rest[0] in item:
                node = item
                continue
            node.clear()
            return
        if key not in node:
            return
        child = node[key]
        is_walkable = isinstance(child, dict) or (
            isinstance(child, list) and all(isinstance(item, dict) for item in child)
        )
        if not rest or not is_walkable:
            del node[key]
            return
        node = child


def _to_config(tree: dict[str, Any], problems: list[str]) -> Config:
    problems = [*problems, *find_problems(tree)]
    if problems:
        raise ConfigError(problems)
    try:
        return msgspec.convert(tree, Config, strict=True)
    except (
        msgspec.ValidationError
    ) as error:  # a rule that the walk does not know; still exit 2 and no traceback
        raise ConfigError(f"the configuration is not valid: {error}") from error


def _read_file(path: Path, problems: list[str]) -> dict[str, Any] | None:
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            problems.append(f"{path}: larger than {_MAX_FILE_BYTES} bytes; this is not a configuration file")
            return None
        raw = path.read_bytes()
    except OSError as error:
        problems.append(
            f"{path}: cannot be read, {error.strerror or error}; give an existing configuration file"
        )
        return None
    try:
        text = raw.decode()
        data = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except UnicodeDecodeError as error:
        problems.append(f"{path}: not UTF-8 text at byte {error.start}; save it as UTF-8")
        return None
    except (ValueError, RecursionError) as error:  # ValueError itself: an integer of thousands of digits
        kind = "JSON" if path.suffix == ".json" else "TOML"
        problems.append(f"{path}: not valid {kind}, {error}; correct the file")
        return None
    if not isinstance(data, dict):
        problems.append(f"{path}: expected a table at the top; this is not a configuration file")
        return None
    return data


def _anchor_paths(data: dict[str, Any], folder: Path) -> None:
    """Make relative paths of shipped files absolute, so that they work from any working directory."""
    for section, name in (("model", "shape"), ("evaluation", "suite")):
        values = data.get(section)
        value = values.get(name) if isinstance(values, dict) else None
        if isinstance(values, dict) and isinstance(value, str) and value:
            values[name] = os.path.abspath(folder / value)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` overlaid by ``top``: tables merge key by key, everything else is replaced."""
    merged = dict(base)
    for key, value in top.items():
        old = merged.get(key)
        merged[key] = (
            _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else copy.deepcopy(value)
        )
    return merged


def _drop_old_recipe(tree: dict[str, Any], new: Any) -> None:
    """Where ``new`` names a loss preset, take from the tree what only an earlier preset said.

    A resolved configuration writes every number down. Those that are the old preset's own are no overrides.
    """
    old = tree.get("loss")
    if not (isinstance(old, dict) and isinstance(new, dict)):
        return
    if "preset" in new and new["preset"] != old.get("preset", "paper"):
        tree["loss"] = own_values(old)


def _parse_value(text: str) -> Any:
    """Parse a TOML value; a bare word is text.

    Raises:
        ValueError: neither a TOML value nor a bare word.
    """
    if "\n" in text or "\r" in text:
        raise ValueError("line breaks are not allowed")
    try:
        parsed = tomllib.loads(f"value = {text}")
    except (tomllib.TOMLDecodeError, RecursionError):
        parsed = {}
    if set(parsed) == {"value"}:
        return parsed["value"]
    if _BARE_WORD.match(text):
        return text
    raise ValueError("not a TOML value")


def _apply_overrides(tree: dict[str, Any], overrides: Sequence[str], problems: list[str]) -> None:
    """Apply overrides left to right, those of ``loss.preset`` first: the others say what differs from it."""
    for override in sorted(overrides, key=lambda text: override_path(text) != PRESET_PATH):
        _apply_override(tree, override, problems)


def _apply_override(tree: dict[str, Any], override: str, problems: list[str]) -> None:
    path, sign, text = override.partition("=")
    keys = path.strip().split(".")
    if not sign or not all(keys):
        problems.append(
            f"--set {override}: not of the form a.b=value; write for example --set learner.lr=2e-6"
        )
        return
    try:
        value = _parse_value(text.strip())
    except ValueError as error:
        problems.append(
            f'--set {override}: {error}; write for example run.name="trial" or learner.betas=[0.9, 0.95]'
        )
        return
    if ".".join(keys) == PRESET_PATH:
        _drop_old_recipe(tree, {"preset": value})
    node: Any = tree
    for depth, key in enumerate(keys):
        is_leaf = depth == len(keys) - 1
        if isinstance(node, list):
            if not _INDEX.match(key) or int(key) >= len(node):
                at = ".".join(keys[:depth])
                problems.append(
                    f"--set {override}: {at} has items 0 to {len(node) - 1}, no item {key}; use one of them"
                )
                return
            index = int(key)
            if is_leaf:
                node[index] = value
            node = node[index]
        elif isinstance(node, dict):
            if is_leaf:
                node[key] = value
            node = node.setdefault(key, {})
        else:
            at = ".".join(keys[:depth])
            problems.append(f"--set {override}: {at} is a value, not a table; nothing can be set inside it")
            return
