"""Terminal under any command line: nothing is raised, nothing grows, the books agree.

Lines are made of the words that matter here (commands, paths that exist, operators, quotes, variables) and of
any text at all.
"""

from __future__ import annotations

import asyncio

from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.base import TaskSpec
from cod_async.envs.terminal import SPEC
from cod_async.envs.terminal.commands import COMMANDS
from cod_async.envs.terminal.env import TerminalSimulator
from cod_async.envs.terminal.filesystem import MAX_DEPTH, MAX_NAME_CHARS, MAX_NODES, Directory, walk, weight
from cod_async.envs.terminal.machine import OS_NAMES, Machine
from cod_async.envs.terminal.oracle import random_policy
from cod_async.envs.terminal.terminal import ALIASES, MAX_OUTPUT_CHARS, Terminal

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
