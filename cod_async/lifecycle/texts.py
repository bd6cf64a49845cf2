"""Texts that a model reads: from files beside the code, each read once a process; and how they are filled."""

from __future__ import annotations

import functools
import json
from pathlib import Path


@functools.cache
def prompt_text(folder: Path, name: str) -> str:
    """Return a text file of a folder, stripped."""
    return (folder / name).read_text(encoding="utf-8").strip()


@functools.cache
def prompt_messages(folder: Path, name: str = "messages") -> dict[str, str]:
    """Return the sentences of the JSON file ``<name>.json`` of a folder, by their names."""
    messages: dict[str, str] = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
    return messages


def fill(template: str, **values: str) -> str:
    """Replace ``{name}`` once each, left to right; inserted values are never searched themselves."""
    parts: list[str] = []
    rest = template
    for name, value in values.items():
        before, _, rest = rest.partition("{" + name + "}")
        parts += [before, value]
    return "".join([*parts, rest])
