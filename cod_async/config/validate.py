"""Finding every problem of a configuration tree at once, by walking the schema's type information.

msgspec stops at the first problem, which makes a user run the command once per typing mistake.
:func:`find_problems` walks plain data (from TOML or JSON) beside ``msgspec.inspect`` type information and
reports each unknown key, missing
key, wrong type and value out of range in one list of sentences ``path: problem, value; what to do``.
"""

from __future__ import annotations

import difflib
import math
import re
import sys
from functools import cache
from typing import Any, cast

import msgspec
from msgspec import inspect

from cod_async.config.schema import Config

INT_LIMIT = 1 << 63
"""Integers beyond signed 64 bit fit neither the run database nor the wire."""
MAX_DEPTH = 16
"""Nesting of free-form values (environment options)."""


@cache
def _struct_type(kind: type[msgspec.Struct]) -> inspect.StructType:
    return cast(inspect.StructType, inspect.type_info(kind))


_MAX_LISTED_KEYS = 12
"""A message that lists more helps nobody."""


def config_type() -> inspect.StructType:
    """Return the type information of :class:`Config`."""
    return _struct_type(Config)


@cache
def _all_paths() -> tuple[dict[str, list[str]], frozenset[type]]:
    """Map each field name of :class:`Config` to the dotted paths where it exists, for hints like "it lives in
    learner.lr"; and collect the sections, the only ones to give such hints in.
    """
    paths: dict[str, list[str]] = {}
    sections: set[type] = set()

    def visit(struct: inspect.StructType, prefix: str) -> None:
        sections.add(struct.cls)
        for field in struct.fields:
            path = f"{prefix}{field.name}"
            paths.setdefault(field.name, []).append(path)
            inner: inspect.Type = field.type
            if isinstance(inner, inspect.VarTupleType):
                inner, path = inner.item_type, f"{path}.0"
            if isinstance(inner, inspect.StructType):
                visit(inner, f"{path}.")

    visit(config_type(), "")
    return paths, frozenset(sections)


def find_problems(data: Any, kind: type[msgspec.Struct] = Config) -> list[str]:
    """List everything that is wrong with a configuration tree, in schema order.

    Args:
        data: plain values (dict, list, str, int, float, bool, None) as TOML or JSON readers return them.
        kind: the struct that the tree is meant to be.

    Returns:
        One sentence per problem, empty if ``msgspec.convert(data, kind)`` will succeed.
    """
    problems: list[str] = []
    _walk(data, _struct_type(kind), "", problems)
    return problems


def _walk(value: Any, expected: inspect.Type, path: str, problems: list[str]) -> None:
    if isinstance(expected, inspect.StructType):
        _walk_struct(value, expected, path, problems)
    elif isinstance(expected, inspect.VarTupleType | inspect.ListType):
        if not isinstance(value, list | tuple):
            problems.append(f"{path}: expected a list{_found(value)}{_list_advice(expected, path)}")
            return
        for index, item in enumerate(value):
            _walk(item, expected.item_type, f"{path}.{index}", problems)
    elif isinstance(expected, inspect.TupleType):
        if not isinstance(value, list | tuple) or len(value) != len(expected.item_types):
            wanted = len(expected.item_types)
            problems.append(
                f"{path}: expected a list of {wanted} values{_found(value)}; write {wanted} of them"
            )
            return
        for index, (item, item_type) in enumerate(zip(value, expected.item_types, strict=True)):
            _walk(item, item_type, f"{path}.{index}", problems)
    elif isinstance(expected, inspect.UnionType):
        _walk_union(value, expected, path, problems)
    elif isinstance(expected, inspect.DictType):
        if not isinstance(value, dict):
            problems.append(
                f"{path}: expected a table{_found(value)}; write it as [{path}] with keys under it"
            )
            return
        for key, item in value.items():
            _walk_free(item, f"{path}.{key}", problems)
    else:
        problem = _scalar_problem(value, expected)
        if problem:
            problems.append(f"{path}: {problem}")


def _walk_struct(value: Any, expected: inspect.StructType, path: str, problems: list[str]) -> None:
    where = path or "the configuration"
    if not isinstance(value, dict):
        problems.append(f"{where}: expected a table{_found(value)}; write it as [{path}] with keys under it")
        return
    fields = {field.name: field for field in expected.fields}
    for key, item in value.items():
        full = f"{path}.{key}" if path else str(key)
        if key in fields:
            _walk(item, fields[key].type, full, problems)
        else:
            problems.append(f"{full}: unknown key{_found(item)}; {_suggestion(str(key), expected, path)}")
    for field in expected.fields:
        if field.required and field.encode_name not in value:
            full = f"{path}.{field.name}" if path else field.name
            advice = _missing_advice(field.name, path)
            problems.append(f"{full}: missing; {advice}")


def _missing_advice(name: str, path: str) -> str:
    if name == "environments" and not path:
        return "add at least one [[environments]] table with a name and a preset (see cod env list)"
    table, _, index = path.rpartition(".")
    if index.isdecimal():
        return f"give {name} a value in every [[{table}]] table"
    return f"give {name} a value under [{path}]" if path else f"give {name} a value"


def _suggestion(key: str, struct: inspect.StructType, path: str) -> str:
    prefix = f"{path}." if path else ""
    known = [field.name for field in struct.fields]
    close = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if close:
        return f"did you mean {prefix}{close[0]}?"
    paths, sections = _all_paths()
    elsewhere = paths.get(key) if struct.cls in sections else None
    if elsewhere:
        return f"did you mean {' or '.join(elsewhere[:3])}?"
    if len(known) > _MAX_LISTED_KEYS:
        return f"docs/configuration.md lists the {len(known)} keys that are known here"
    return f"known keys here are {', '.join(known)}"


def _list_advice(expected: inspect.Type, path: str) -> str:
    item = getattr(expected, "item_type", None)
    return f"; write it as [[{path}]]" if isinstance(item, inspect.StructType) else "; write it in [ ]"


def _walk_union(value: Any, expected: inspect.UnionType, path: str, problems: list[str]) -> None:
    options = [option for option in expected.types if not isinstance(option, inspect.NoneType)]
    if value is None and len(options) < len(expected.types):
        return
    if len(options) == 1:
        _walk(value, options[0], path, problems)
        return
    attempts: list[list[str]] = []
    for option in options:
        found: list[str] = []
        _walk(value, option, path, found)
        if not found:
            return
        attempts.append(found)
    problems.extend(sorted(attempts, key=lambda found: len(found))[0])


def _walk_free(value: Any, path: str, problems: list[str], depth: int = 0) -> None:
    """Check a free-form value (an environment option): it must survive the trip through JSON unchanged."""
    if depth > MAX_DEPTH:
        problems.append(f"{path}: nested deeper than {MAX_DEPTH} levels; flatten it")
    elif isinstance(value, dict):
        for key, item in value.items():
            _walk_free(item, f"{path}.{key}", problems, depth + 1)
    elif isinstance(value, list | tuple):
        for index, item in enumerate(value):
            _walk_free(item, f"{path}.{index}", problems, depth + 1)
    elif isinstance(value, float) and not math.isfinite(value):
        problems.append(f"{path}: must be finite{_found(value)}; write a number")
    elif isinstance(value, int) and not isinstance(value, bool) and not -INT_LIMIT <= value < INT_LIMIT:
        problems.append(f"{path}: does not fit 64 bits{_found(value)}; write a smaller number")
    elif value is not None and not isinstance(value, str | int | float | bool):
        problems.append(
            f"{path}: values of type {type(value).__name__} are not supported{_found(value)}; quote it"
        )


def _scalar_problem(value: Any, expected: inspect.Type) -> str | None:
    if isinstance(expected, inspect.LiteralType):
        if value in expected.values and isinstance(value, str):
            return None
        choices = [str(choice) for choice in expected.values]
        close = difflib.get_close_matches(str(value), choices, n=1, cutoff=0.6)
        advice = (
            f'did you mean "{close[0]}"?'
            if close
            else "choose one of " + ", ".join(f'"{c}"' for c in choices)
        )
        return f"unknown choice{_found(value)}; {advice}"
    if isinstance(expected, inspect.BoolType):
        return (
            None
            if isinstance(value, bool)
            else f"expected true or false{_found(value)}; write it without quotes"
        )
    if isinstance(expected, inspect.IntType):
        if not isinstance(value, int) or isinstance(value, bool):
            return f"expected a whole number{_found(value)}; {_number_advice(value)}"
        if not -INT_LIMIT <= value < INT_LIMIT:
            return f"does not fit 64 bits{_found(value)}; write a smaller number"
        return _range_problem(value, expected)
    if isinstance(expected, inspect.FloatType):
        if not isinstance(value, int | float) or isinstance(value, bool):
            return f"expected a number{_found(value)}; {_number_advice(value)}"
        if not abs(value) <= sys.float_info.max:  # infinite, NaN, or an integer beyond every float
            return f"must be finite{_found(value)}; write a number"
        return _range_problem(value, expected)
    if isinstance(expected, inspect.StrType):
        if not isinstance(value, str):
            return f"expected text{_found(value)}; put it in quotes"
        if expected.pattern and not re.search(expected.pattern, value):
            advice = "use letters, digits, dot, dash, underscore"
            return f"does not match {expected.pattern}{_found(value)}; {advice}"
    return None


def _number_advice(value: Any) -> str:
    if isinstance(value, str):
        return "write it without quotes"
    return "write a number" if isinstance(value, bool) else "write it without a fraction"


def _range_problem(value: float, expected: inspect.IntType | inspect.FloatType) -> str | None:
    bounds = ((">=", expected.ge), (">", expected.gt), ("<=", expected.le), ("<", expected.lt))
    given = [(sign, bound) for sign, bound in bounds if bound is not None]
    is_ok = all(
        {">=": value >= bound, ">": value > bound, "<=": value <= bound, "<": value < bound}[sign]
        for sign, bound in given
    )
    if is_ok:
        return None
    wanted = " and ".join(
        f"{sign} {bound:g}" if abs(bound) < 1e15 else f"{sign} {bound}" for sign, bound in given
    )
    return f"out of range{_found(value)}; must be {wanted}"


def _found(value: Any) -> str:
    """Render the offending value for a message, shortened."""
    if isinstance(value, str):
        text = msgspec.json.encode(value).decode()
    elif isinstance(value, bool):
        text = "true" if value else "false"
    else:
        try:
            text = str(value)
        except ValueError:  # Python refuses to write integers of thousands of digits
            text = "a number of thousands of digits"
    return f", found {text if len(text) <= 60 else text[:57] + '...'}"
