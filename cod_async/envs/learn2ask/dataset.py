"""The data set of Learn2Ask: a JSONL file of the user, or the generated sample that is shipped.

A file is read once per process and kept as raw lines (a record is parsed when it is asked for); a changed
file is read again. Everything wrong in it is reported together, each line by file and number. Rows come in
file order. The held-out split is a second file, or whole diagnoses (or sessions) of the first one.
"""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

import msgspec

from cod_async.envs.learn2ask.options import HeldOutBy, Learn2AskOptions, parse_options
from cod_async.envs.learn2ask.records import record_problems, session_of
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.seeds import hash64

SAMPLE = Path(__file__).parent / "sample.jsonl"
"""The generated sample, see ``generate.py``."""
SPLITS = ("train", "held_out")
MAX_FILE_BYTES = 1 << 30
MAX_LINE_BYTES = 1 << 20
MAX_SHOWN_PROBLEMS = 20
"""Broken lines that are named one by one; the others are counted."""
SPLIT_SEED = 42
"""Seed of the shuffle that decides which diagnoses are held out (the reference's)."""


class Line(msgspec.Struct, frozen=True):
    """One checked record as it stands in the file, with what the splits need to know of it."""

    raw: bytes
    number: int
    record_id: str
    diagnosis: str


class Table(msgspec.Struct, frozen=True, eq=False):
    """The checked records of one file, in file order; equal only to itself, so caches find it at once."""

    path: Path
    lines: tuple[Line, ...]


def _refuse(problems: Iterable[str]) -> NoReturn:
    raise EnvironmentInputError([f"environment learn2ask: {problem}" for problem in problems])


def _no_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is no JSON")


def parse_line(raw: bytes) -> tuple[dict[str, Any], list[str]]:
    """Parse one line; return the record and what is wrong with it (one of the two is empty)."""
    if len(raw) > MAX_LINE_BYTES:
        return {}, [f"has {len(raw)} bytes; at most {MAX_LINE_BYTES} are allowed"]
    try:
        record = json.loads(raw.decode("utf-8"), parse_constant=_no_constant)
    except UnicodeDecodeError:
        return {}, ["is not UTF-8"]
    except RecursionError:
        return {}, ["is nested too deeply"]
    except ValueError as error:
        return {}, [f"is not JSON: {error}"]
    problems = record_problems(record, has_id=True)
    return ({}, problems) if problems else (record, [])


def _file_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            raw = raw.removeprefix(b"\xef\xbb\xbf") if number == 1 else raw
            raw = raw.strip(b" \t\r\n")
            if raw:
                yield number, raw


@functools.lru_cache(maxsize=8)
def _load(path: Path, signature: tuple[int, int, int]) -> Table:
    """Read and check a file; ``signature`` (inode, size, time of change) makes a changed one another."""
    lines: list[Line] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    num_broken = 0
    for number, raw in _file_lines(path):
        record, found = parse_line(raw)
        if not found and record["id"] in first_line:
            found = [f"id {record['id']!r} was used in line {first_line[record['id']]} already"]
        if found:
            num_broken += 1
            if num_broken <= MAX_SHOWN_PROBLEMS:
                problems.append(f"{path}:{number}: {'; '.join(found)}")
            continue
        first_line[record["id"]] = number
        lines.append(Line(raw, number, record["id"], record.get("diagnosis", "")))
    if num_broken > MAX_SHOWN_PROBLEMS:
        problems.append(f"{path}: {num_broken - MAX_SHOWN_PROBLEMS} more lines are broken")
    if problems:
        _refuse(problems)
    if not lines:
        _refuse([f"{path}: holds no record"])
    return Table(path, tuple(lines))


def load(path: Path) -> Table:
    """Return the checked records of a file, in file order.

    Raises:
        EnvironmentInputError: the file cannot be read, is too large or empty, or lines are broken or
            duplicates (all of them are listed, up to 20 one by one).
    """
    try:
        status = path.stat()
        if not path.is_file():
            _refuse([f"{path}: is no regular file; give a JSONL file of dialogues"])
        if status.st_size > MAX_FILE_BYTES:
            _refuse([f"{path}: has {status.st_size} bytes; at most {MAX_FILE_BYTES} are allowed"])
        return _load(path, (status.st_ino, status.st_size, status.st_mtime_ns))
    except (OSError, ValueError) as error:  # ValueError: a name that the file system cannot express
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        _refuse([f"{str(path)!r} cannot be read, {reason}; give a JSONL file of dialogues"])


def held_out_diagnoses(diagnoses: Iterable[str], frac: float, seed: int = SPLIT_SEED) -> frozenset[str]:
    """Choose whole diagnoses until they hold at least a share of the records.

    The diagnoses are sorted, shuffled by ``seed``, and moved one after the other; so the choice depends on
    how many records each has and not on their order.

    Args:
        diagnoses: the diagnosis of every record.
        frac: least share of records to be moved, (0, 1).
        seed: of the shuffle.
    """
    counts: dict[str, int] = {}
    for diagnosis in diagnoses:
        counts[diagnosis] = counts.get(diagnosis, 0) + 1
    order = sorted(counts)
    random.Random(seed).shuffle(order)
    chosen: set[str] = set()
    num_moved = 0
    for diagnosis in order:
        if num_moved >= frac * sum(counts.values()):
            break
        chosen.add(diagnosis)
        num_moved += counts[diagnosis]
    return frozenset(chosen)


def _is_session_held_out(record_id: str, frac: float) -> bool:
    return hash64(f"learn2ask/held_out/{session_of(record_id)}") < frac * 2.0**64


@functools.lru_cache(maxsize=16)
def _split(table: Table, held_out_by: HeldOutBy, frac: float) -> dict[str, tuple[Line, ...]]:
    """Split one file; both parts are in file order and hold at least one record.

    Raises:
        EnvironmentInputError: a part would be empty, or diagnoses are missing.
    """
    if held_out_by == "diagnosis":
        without = [line.number for line in table.lines if not line.diagnosis]
        if without:
            _refuse(
                [
                    f"{table.path}: {len(without)} records have no diagnosis (line {without[0]} is the "
                    'first), so none can be held out; set held_out_by = "session", or give held_out_path'
                ]
            )
    chosen = held_out_diagnoses((line.diagnosis for line in table.lines), frac)
    parts: dict[str, list[Line]] = {split: [] for split in SPLITS}
    for line in table.lines:
        if held_out_by == "diagnosis":
            is_held_out = line.diagnosis in chosen
        else:
            is_held_out = _is_session_held_out(line.record_id, frac)
        parts["held_out" if is_held_out else "train"].append(line)
    empty = [split for split, part in parts.items() if not part]
    if empty:
        _refuse(
            [
                f"{table.path}: held_out_by = {held_out_by} with held_out_frac = {frac} leaves no record for "
                f"{empty[0]}; change them, or give held_out_path"
            ]
        )
    return {split: tuple(part) for split, part in parts.items()}


@functools.lru_cache(maxsize=8)
def _shared_sessions(train: Table, held_out: Table) -> tuple[str, ...]:
    known = {session_of(line.record_id) for line in train.lines}
    return tuple(sorted({session_of(line.record_id) for line in held_out.lines} & known))


def rows(options: Learn2AskOptions, split: str) -> tuple[Line, ...]:
    """Return the records of a split in file order; at least one.

    Raises:
        EnvironmentInputError: unknown split, a file is wrong (see :func:`load`), a split is empty, or two
            files share sessions.
    """
    if split not in SPLITS:
        raise EnvironmentInputError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    train = load(Path(options.path) if options.path else SAMPLE)
    if not options.held_out_path:
        return _split(train, options.held_out_by, options.held_out_frac)[split]
    held_out = load(Path(options.held_out_path))
    shared = _shared_sessions(train, held_out)
    if shared:
        _refuse(
            [
                f"{train.path} and {held_out.path} share {len(shared)} sessions, the first is {shared[0]!r}; "
                "the held-out file must hold others (the session is the id up to its last slash)"
            ]
        )
    return (train if split == "train" else held_out).lines


def num_records(options: Mapping[str, Any], split: str) -> int:
    """Return the number of records of a split; errors as for :func:`rows`."""
    return len(rows(parse_options(options), split))


def record_at(options: Mapping[str, Any], split: str, seed: int, row: int) -> dict[str, Any]:
    """Return one record by its row number, modulo their number; the data seed has no effect."""
    lines = rows(parse_options(options), split)
    record: dict[str, Any] = json.loads(lines[row % len(lines)].raw)
    return record


def records(options: Mapping[str, Any], split: str, seed: int) -> Iterator[dict[str, Any]]:
    """Return an endless iterator over a split in file order; the data seed has no effect.

    Raises:
        EnvironmentInputError: as for :func:`rows`, at once and not at the first record.
    """
    lines = rows(parse_options(options), split)

    def walk() -> Iterator[dict[str, Any]]:
        while True:
            for line in lines:
                yield json.loads(line.raw)

    return walk()


def pack_seed_for(options: Mapping[str, Any], split: str, seed: int) -> int:
    """Return a pack seed (0 .. 2^64-1) for a split: a hash of both. Nothing is hidden, so it decides nothing.

    Raises:
        EnvironmentInputError: unknown split.
    """
    if split not in SPLITS:
        raise EnvironmentInputError(f"no split {split!r}; splits are {', '.join(SPLITS)}")
    return hash64(f"learn2ask/{split}/{seed}")
