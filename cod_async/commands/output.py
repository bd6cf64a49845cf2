"""Printing a command's answer: one JSON value for scripts, or readable tables for people. Both go to
stdout.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

PIPE_WIDTH = 200
MAX_ROWS = 40
"""Longer tables are cut for people."""


def console_for_people() -> Console:
    """Return a console on stdout; where there is no terminal (a pipe, a log) tables may be wider than 80
    columns.
    """
    return Console() if sys.stdout.isatty() or "COLUMNS" in os.environ else Console(width=PIPE_WIDTH)


def _is_rows(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and isinstance(value[0], Mapping)


def print_json(value: Any) -> None:
    """Print a value as JSON (NaN and infinity are refused, because JSON has none)."""
    sys.stdout.write(json.dumps(value, indent=2, allow_nan=False, default=str) + "\n")
    sys.stdout.flush()


def cell(value: Any) -> str:
    """Format one table cell."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list | tuple):
        if value and isinstance(value[0], Mapping):
            return f"{len(value)} of them"
        return ", ".join(cell(item) for item in value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {cell(item)}" for key, item in value.items()) or "none"
    return str(value)


def print_table(rows: Sequence[Mapping[str, Any]], title: str = "") -> None:
    """Print rows as a table; the columns are the keys of the first row."""
    console = console_for_people()
    if not rows:
        console.print(f"{title}: none" if title else "none")
        return
    table = Table(title=title or None, title_justify="left")
    columns = [name for name in rows[0] if any(row.get(name) not in (None, "") for row in rows)]
    for column in columns:
        is_number = isinstance(rows[0][column], int | float) and not isinstance(rows[0][column], bool)
        table.add_column(column, justify="right" if is_number else "left")
    # People want the newest; scripts take --json and get everything.
    for row in rows[-MAX_ROWS:]:
        table.add_row(*(cell(row.get(column)) for column in columns))
    console.print(table)
    if len(rows) > MAX_ROWS:
        console.print(f"the last {MAX_ROWS} of {len(rows)}; --json has all")


def print_mapping(values: Mapping[str, Any], title: str = "") -> None:
    """Print a mapping as key and value, nested mappings by dotted keys, lists of mappings as tables of their
    own.
    """
    tables = {key: value for key, value in values.items() if _is_rows(value)}
    for key, value in tables.items():
        print_table(value, key)
    values = {key: value for key, value in values.items() if key not in tables}
    console = console_for_people()
    table = Table(title=title or None, title_justify="left", show_header=False)
    table.add_column(style="bold", overflow="fold")
    table.add_column(overflow="fold")

    def add(prefix: str, value: Mapping[str, Any]) -> None:
        for key, item in value.items():
            name = f"{prefix}{key}"
            if isinstance(item, Mapping) and item:
                add(f"{name}.", item)
            else:
                table.add_row(name, cell(item))

    add("", values)
    console.print(table)


def print_answer(value: Any, is_json: bool, title: str = "") -> None:
    """Print an answer in the form that the user asked for."""
    if is_json:
        print_json(value)
    elif isinstance(value, list):
        print_table(value, title)
    else:
        print_mapping(value, title)
