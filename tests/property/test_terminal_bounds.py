"""Terminal under any command line: nothing is raised, nothing grows, the books agree.

Lines are made of the words that matter here (commands, paths that exist, operators, quotes, variables) and of
any text at all.
"""

from __future__ import annotations

import asyncio
import copy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.base import TaskSpec
from cod_async.envs.terminal import SPEC
from cod_async.envs.terminal.commands import COMMANDS
from cod_async.envs.terminal.env import TerminalSimulator
from cod_async.envs.terminal.filesystem import (
    MAX_DEPTH,
    MAX_NAME_CHARS,
    MAX_NODES,
    Content,
    Directory,
    File,
    FileSystem,
    FileSystemError,
    Node,
    Path,
    walk,
    weight,
)
from cod_async.envs.terminal.machine import OS_NAMES, Machine
from cod_async.envs.terminal.oracle import random_policy
from cod_async.envs.terminal.shell import MAX_LINE_CHARS
from cod_async.envs.terminal.terminal import ALIASES, MAX_OUTPUT_CHARS, MAX_WORK, Terminal

HOST = "192.168.1.20"
NAMES = [*COMMANDS, *ALIASES]
PATHS = [
    "d",
    "e",
    "d/a",
    "d/e",
    ".",
    "..",
    "/",
    "~",
    "~/d",
    "C:\\",
    "C:\\Users\\user\\d",
    "d\\a",
    "a.tar.gz",
    "a.zip",
]
PATHS += [
    f"ops@{HOST}:d",
    f"ops@{HOST}:~/d",
    f"{HOST}:",
    "ops@h:x",
    f"ops@{HOST}",
    "''",
    '"d/a"',
    "a.tar.gz.gz",
    "%CD%",
]
FLAGS = [
    "-r",
    "-p",
    "-rf",
    "-R",
    "-la",
    "-xzf",
    "czf",
    "-cf",
    "-tf",
    "-C",
    "-d",
    "-k",
    "--",
    "-",
    "-l",
    "/q",
    "--file=a.tar",
]
WORDS = [*NAMES, *PATHS, *FLAGS, "755", "$HOME", "${PWD}", "$", "{", "*", "\\", "'", '"', "\u0660", "x" * 300]
WORD = st.one_of(st.sampled_from(WORDS), st.text(max_size=6))
COMMAND = st.tuples(st.sampled_from([*NAMES, "frob"]), st.lists(WORD, max_size=5)).map(
    lambda parts: " ".join([parts[0], *parts[1]])
)
LINE = st.one_of(
    st.lists(COMMAND, min_size=1, max_size=4).map(" && ".join),
    st.lists(COMMAND, min_size=1, max_size=4).map(" ; ".join),
    st.text(max_size=40),
)


def fresh(os: str, is_parity: bool) -> Terminal:
    terminal = Terminal(os, "ops", HOST, COMMANDS, is_parity)  # type: ignore[arg-type]
    for line in (
        "mkdir d d/e e",
        f'ssh ops@{HOST} "mkdir d e; touch d/a"',
        f"scp ops@{HOST}:d/a d",
        "zip -r a.zip d",
        f"scp a.zip ops@{HOST}:",
        f"ssh ops@{HOST} tar czf a.tar.gz d",
    ):
        assert not terminal.run(line).is_error or is_parity
    return terminal


def check(machine: Machine) -> None:
    root = machine.files.root
    assert machine.files.num_nodes == weight(root) <= MAX_NODES
    for path, node in walk(root):
        assert len(path) <= MAX_DEPTH and all(0 < len(name) <= MAX_NAME_CHARS for name in path)
        assert not path or (node.name == path[-1] and "/" not in node.name and node.name.isprintable())
        assert 0 <= node.mode <= 0o777
        if isinstance(node, Directory):
            assert len({child.name for child in node.children.values()}) == len(node.children)


@given(st.sampled_from(OS_NAMES), st.booleans(), st.lists(LINE, min_size=1, max_size=8))
@settings(max_examples=250, deadline=None)
def test_any_lines_leave_a_bounded_consistent_world(os: str, is_parity: bool, lines: list[str]) -> None:
    terminal = fresh(os, is_parity)
    for line in lines:
        result = terminal.run(line)
        assert len(result.output) <= MAX_OUTPUT_CHARS + 30
        result.output.encode()  # no surrogates come back
        assert len(terminal.current.prompt()) < 1_200
        check(terminal.local)
        check(terminal.remote)


GROWING = [
    "cp -r d e",
    "cp -r e d",
    "cp -r d x",
    "cp -r x d/y",
    "cp -r /home d",
    "mv x e",
    "mv e d",
    "cd d",
    "cd ~",
    "zip -r a d e",
    "zip -r b a.zip d",
    "unzip -d d a",
    "unzip -o b",
    "tar czf c.tgz .",
    "tar xf c.tgz",
    "gzip c.tgz a.zip",
    "gunzip a.zip.gz",
    "mkdir -p d/1/2/3/4",
    "touch d/1 d/2 e/3 4",
    f"scp -r d ops@{HOST}:e",
    f"scp -r ops@{HOST}:d .",
    f"scp -r ops@{HOST}:e d",
]


@given(st.sampled_from(OS_NAMES), st.lists(st.sampled_from(GROWING), min_size=10, max_size=40))
@settings(max_examples=80, deadline=None)
def test_growing_commands_meet_the_ceiling(os: str, grown: list[str]) -> None:
    """Twelve lines of copies of copies: the tree, the work and the output stay bounded."""
    terminal = fresh(os, False)
    for start in range(0, len(grown), 4):
        for _ in range(3):
            terminal.run(" ; ".join(grown[start : start + 4]))
    check(terminal.local)
    check(terminal.remote)


def plainly_resolved(machine: Machine, text: str) -> Path | str:
    """What a path means, by a search from the root at every step; or the reason for a refusal."""
    names = [] if text.startswith("/") else list(machine.cwd)
    for name in text.split("/"):
        if name == "..":
            if not machine.files.is_directory(tuple(names)):
                return "missing" if machine.files.find(tuple(names)) is None else "not_directory"
            names = names[:-1]
        elif name not in ("", "."):
            names.append(name)
    is_file = isinstance(machine.files.find(tuple(names)), File)
    return "not_directory" if text.endswith("/") and is_file else tuple(names)


STEPS = ["..", "..", ".", "", "d", "e", "a", "a.zip", "home", "user", "Users", "none"]


@given(
    st.sampled_from(("mac", "linux")), st.lists(st.sampled_from(STEPS), min_size=1, max_size=9).map("/".join)
)
@settings(max_examples=200, deadline=None)
def test_paths_mean_what_a_search_at_every_step_says(os: str, text: str) -> None:
    machine = fresh(os, False).local
    expected = plainly_resolved(machine, text) if text else "missing"
    try:
        found: Path | str = machine.resolve(text)
    except FileSystemError as error:
        found = error.reason
    assert found == expected


def plainly_merged(files: FileSystem, path: Path, node: Node, is_mode_kept: bool) -> None:
    """Merging by whole paths, one search for every entry."""
    here = files.find(path)
    if isinstance(here, Directory) and isinstance(node, Directory):
        for child in node.children.values():
            plainly_merged(files, (*path, child.name), child, is_mode_kept)
        return
    if is_mode_kept and isinstance(here, File) and isinstance(node, File):
        node.mode = here.mode
    files.put(path, node)


def told(machine: Machine) -> list[tuple[Path, int, Content | None]]:
    return [
        (path, node.mode, node.content if isinstance(node, File) else None)
        for path, node in walk(machine.files.root)
    ]


@given(
    st.sampled_from(OS_NAMES),
    st.lists(st.sampled_from(GROWING), max_size=8),
    st.sampled_from(
        [("d",), ("e",), ("d", "e"), ("d", "a"), ("x",), ("x" * 300,), ("none", "x"), ("a.zip",)]
    ),
    st.booleans(),
)
@settings(max_examples=150, deadline=None)
def test_trees_merge_as_entry_by_entry(os: str, lines: list[str], below: Path, is_mode_kept: bool) -> None:
    outcomes = []
    terminal = fresh(os, False)
    for line in lines:
        terminal.run(line)
    for merge in (FileSystem.merge, plainly_merged):
        machine = copy.deepcopy(terminal.local, _shared(terminal.local))
        source = machine.files.copy_of(machine.files.find((*machine.home, "e")) or machine.files.root)
        refused = ""
        try:
            merge(machine.files, (*machine.home, *below), source, is_mode_kept)
        except FileSystemError as error:
            refused = error.reason
        outcomes.append((refused, told(machine), machine.files.num_nodes))
        check(machine)
    assert outcomes[0] == outcomes[1]


def _shared(machine: Machine) -> dict[int, Content]:
    """Contents by identity, so that copies of a machine share them."""
    contents = [node.content for _, node in walk(machine.files.root) if isinstance(node, File)]
    return {id(content): content for content in contents}


DEEP = "/".join(f"d{i}" for i in range(33))
EXPENSIVE = [
    f"cd ~ ; scp -r d0 ops@{HOST}: ; " * 8,
    f"scp -r ops@{HOST}:d0 . ; " * 16,
    "unzip -o z.zip ; " * 16,
    "unzip -o z.zip -d d0/d1 ; " * 16,
    "tar xf z.tar ; " * 16,
    "cp -r d0/. e ; " * 16,
    f"mkdir -p {DEEP} {DEEP} ; " * 16,
    f"cd {DEEP} ; " + f"touch {' '.join(f'f{i}' for i in range(44))} ; " * 15,
    "ls -laR " + ". " * 40,
    f"cat {DEEP}/{'../d32/' * 500}",
]


@pytest.mark.parametrize("line", EXPENSIVE, ids=lambda line: line[:20])
def test_expensive_lines_are_stopped_early(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A deep and full tree, and lines that go over it again and again: the number of look-ups is bounded."""
    terminal = Terminal("linux", "ops", HOST, COMMANDS)
    terminal.run(f"mkdir -p {DEEP} e")
    for start in range(0, 120, 40):
        terminal.run(f"cd {DEEP} ; touch {' '.join(f'f{i}' for i in range(start, start + 40))} ; cd ~")
    terminal.run("zip -r z.zip d0" if "zip" in line else "tar cf z.tar d0")
    terminal.run(f"scp -r d0 ops@{HOST}:")
    key = FileSystem._key
    num_lookups = 0

    def counted(self: FileSystem, name: str) -> str:
        nonlocal num_lookups
        num_lookups += 1
        return key(self, name)

    monkeypatch.setattr(FileSystem, "_key", counted)
    terminal.run(line[: MAX_LINE_CHARS - 1].rstrip(" ;"))
    assert num_lookups < 20 * MAX_WORK
    check(terminal.local)


@given(st.integers(0, 10**7), st.lists(st.text(max_size=60), max_size=4), st.booleans())
@settings(max_examples=60, deadline=None)
def test_any_response_is_answered(seed: int, texts: list[str], is_tagged: bool) -> None:
    environment = TerminalSimulator(SPEC.options("default"))
    environment.reset(TaskSpec("terminal", "default", {}, {"seed": seed}, 0, 0, 8))
    act = random_policy(seed)
    for text in texts:
        response = f"<answer>{text}</answer>" if is_tagged else text
        if asyncio.run(environment.step(response)).is_done:
            return
        if asyncio.run(environment.step(act(environment, "", {}))).is_done:
            return
    assert environment.snapshot() == b""


def test_huge_responses_are_cheap() -> None:
    environment = TerminalSimulator(SPEC.options("default"))
    environment.reset(TaskSpec("terminal", "default", {}, {"seed": 1}, 0, 0, 8))
    for text in (
        "x" * 10**6,
        "ls;" * 300_000,
        "$HOME" * 200_000,
        "'" * 10**6,
        "\ud800" * 10**6,
        "a/" * 2_000,
    ):
        result = asyncio.run(environment.step(f"<answer>{text}</answer>"))
        assert not result.is_done and len(result.observation) < MAX_OUTPUT_CHARS + 200
