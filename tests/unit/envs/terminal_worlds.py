"""Small machines for the tests of Terminal, and a look at them as plain dictionaries."""

from __future__ import annotations

from cod_async.envs.terminal.commands import COMMANDS
from cod_async.envs.terminal.filesystem import Content, File, walk, weight
from cod_async.envs.terminal.machine import Machine, Os
from cod_async.envs.terminal.terminal import Terminal

HOST = "192.168.1.20"
LOGIN = f"ops@{HOST}"


def world(os: Os = "linux", is_parity: bool = False) -> Terminal:
    """Both machines with ``docs/a.txt``, ``docs/b.txt`` and ``src/main.py`` at home."""
    terminal = Terminal(os, "ops", HOST, COMMANDS, is_parity)
    for machine in (terminal.local, terminal.remote):
        for path in (("docs", "a.txt"), ("docs", "b.txt"), ("src", "main.py")):
            parent = (*machine.home, path[0])
            machine.files.make_directory(parent, has_parents=True)
            machine.files.put((*parent, path[1]), File("", Content(f"text of {path[1]}", 1_024)))
    return terminal


def tree(machine: Machine) -> dict[str, str]:
    """Everything below home: path -> ``/`` for a directory, else its text; checks the count."""
    home = machine.files.directory(machine.home)
    assert machine.files.num_nodes == weight(machine.files.root)
    return {
        "/".join(path): (node.content.text or node.content.kind) if isinstance(node, File) else "/"
        for path, node in walk(home)
        if path
    }


def run(terminal: Terminal, *lines: str) -> str:
    """Run lines that must all succeed; return the last one's output."""
    output = ""
    for line in lines:
        result = terminal.run(line)
        assert not result.is_error, (line, result.output)
        output = result.output
    return output


def error(terminal: Terminal, line: str) -> str:
    """Run a line that must fail; return its output."""
    result = terminal.run(line)
    assert result.is_error, (line, result.output)
    return result.output
