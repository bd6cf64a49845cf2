"""Every shipped configuration loads and passes its checks, and every setting is read by somebody."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from msgspec import inspect

from cod_async.config import load_config
from cod_async.config.check import check
from cod_async.config.validate import config_type

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.toml") if path.parent.name != "suites")
"""Suites are no runs: they say what is evaluated, and have a schema of their own."""


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configuration_is_valid(path: Path, tmp_path: Path) -> None:
    config = load_config([path], [f'run.output_dir="{tmp_path}"'])
    assert check(config, needs_weights=False) == []  # weights are not shipped


def settings(struct: inspect.StructType, prefix: str = "") -> Iterator[tuple[str, str]]:
    for field in struct.fields:
        inner: inspect.Type = field.type
        if isinstance(inner, inspect.VarTupleType):
            inner = inner.item_type
        if isinstance(inner, inspect.StructType):
            yield from settings(inner, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field.name


def test_every_setting_is_read_somewhere() -> None:
    rooms = [path for path in (ROOT / "cod_async").rglob("*.py") if path.parent.name != "config"]
    text = "\n".join(path.read_text() for path in rooms)
    unread = [path for path, name in settings(config_type()) if not re.search(rf"\.{name}\b", text)]
    assert unread == []
