"""The configuration reference, written from the schema itself.

The prose under each field of :mod:`cod_async.config.schema` is the only description of that field; this
module collects it with types and defaults into ``docs/configuration.md``. A test compares the file with what
this module prints.
"""

from __future__ import annotations

import ast
import inspect
import sys
from typing import Any

import msgspec

from cod_async.config import schema
from cod_async.config.loss import BY_PRESET, LossConfig

_HEAD = """# Configuration

Written by `python -m cod_async.config.describe > docs/configuration.md` from `cod_async/config/schema.py`;
don't edit.

A run is described by one or more TOML files, merged left to right, then by `--set section.field=value`. An
unknown key is an error; all problems are listed at once, with exit code 2, before any process starts. `cod
train CONFIG --dry-run` prints the resolved tree and what it implies.
"""


def _prose(section: type[msgspec.Struct]) -> dict[str, str]:
    """Return the text under each field of a section."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)  # noqa: S101
    found: dict[str, str] = {}
    name = ""
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).split())
            name = ""
    return found


def _type_text(section: type[msgspec.Struct], name: str) -> str:
    """Return the annotation of a field as it stands in the source."""
    body = ast.parse(inspect.getsource(section)).body[0]
    assert isinstance(body, ast.ClassDef)  # noqa: S101
    for node in body.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and node.target.id == name:
            return ast.unparse(node.annotation).replace("|", "\\|")
    raise KeyError(name)


def _default_text(section: type[msgspec.Struct], field: msgspec.structs.FieldInfo) -> str:
    default: Any = field.default
    if field.default_factory is not msgspec.NODEFAULT:
        default = field.default_factory()
    if default is msgspec.NODEFAULT:
        return "required"
    if section is LossConfig and default is BY_PRESET:
        return "by preset"
    return f"`{msgspec.json.encode(default).decode()}`"


def _is_section(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, msgspec.Struct)


def _rows(section: type[msgspec.Struct], path: str) -> list[str]:
    """Return the table of a section, and the tables of the sections inside it."""
    lines = [f"\n## `{path}`\n", inspect.getdoc(section) or "", "", "| field | type | default | meaning |"]
    lines.append("|---|---|---|---|")
    prose, inner = _prose(section), []
    for field in msgspec.structs.fields(section):
        if _is_section(field.type):
            inner += _rows(field.type, f"{path}.{field.name}")
        else:
            kind, meaning = _type_text(section, field.name), prose[field.name].replace("|", "\\|")
            lines.append(f"| `{field.name}` | {kind} | {_default_text(section, field)} | {meaning} |")
    return [*lines, *inner]


def reference() -> str:
    """Return the whole reference as Markdown."""
    lines = [_HEAD.rstrip()]
    lines += _rows(schema.EnvironmentConfig, "[environments]")
    for field in msgspec.structs.fields(schema.Config):
        if _is_section(field.type):
            lines += _rows(field.type, field.name)
        if field.type is schema.DistillationConfig:
            lines += _rows(schema.TeacherConfig, "[distillation.teachers]")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
