"""The terminal: which machine is current, and what a command line prints there.

A line is cut into commands; each is read with the variables of the machine it runs on, looked up in a table,
and leaves text and an exit status. ``;`` goes on after an error, ``&&`` ends the whole line. Everything a
line may cost is limited: its length, its commands and words, the nodes it may visit, and the text it may
print.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from cod_async.envs.terminal.filesystem import FileSystemError, Path, Reason
from cod_async.envs.terminal.machine import Machine, Os, local_machine, remote_machine
from cod_async.envs.terminal.shell import (
    MAX_LINE_CHARS,
    Dialect,
    ShellError,
    clean,
    expand_text,
    split_line,
    words_of,
)

MAX_OUTPUT_CHARS = 4_000
"""Longest text that one line prints; the rest is cut."""
MAX_WORK = 1_000
"""Work that one line may do, in visits of nodes; the command that goes beyond is killed. A task has some 20
nodes; the worst lines take some 4 ms."""
LOOKUP_WORK = 4
"""Work of looking up one argument; a fourth of its depth is added."""

ALIASES = {
    "dir": "ls",
    "type": "cat",
    "copy": "cp",
    "move": "mv",
    "ren": "mv",
    "rename": "mv",
    "del": "rm",
}
"""Names that are understood everywhere, and the command they mean."""
NOT_ON_WINDOWS = frozenset({"chmod", "touch", "rsync", "tar", "gzip", "gunzip"})
"""Commands that a local Windows machine lacks."""


class CommandError(Exception):
    """A command stops with this text and a non-zero exit status."""


@dataclass
class Call:
    """One command being run: what it was given, where, and what it has printed so far.

    Attributes:
        name: the command, aliases resolved; ``typed`` is its name as written.
        words: its arguments.
        machine: where it runs.
        terminal: the terminal it was typed into.
        lines: its output.
        has_failed: whether its exit status is an error.
    """

    name: str
    typed: str
    words: list[str]
    machine: Machine
    terminal: Terminal
    lines: list[str] = field(default_factory=list)
    has_failed: bool = False

    @property
    def is_parity(self) -> bool:
        """Whether the reference's quirks are kept."""
        return self.terminal.is_parity

    def say(self, text: str) -> None:
        """Print a text."""
        self.lines.append(text)

    def fail(self, text: str) -> None:
        """Print a complaint and go on; the exit status will be an error."""
        self.lines.append(text)
        self.has_failed = True

    def complain(self, path: str, reason: Reason) -> None:
        """Print the operating system's complaint about a path as typed, and go on."""
        self.fail(self.machine.complain(self.name, path, reason))

    def resolve(self, text: str) -> Path:
        """Return the path that an argument means on this machine, and charge for looking it up.

        See :meth:`Machine.resolve`.
        """
        path = self.machine.resolve(text)
        self.charge(LOOKUP_WORK + len(path) // 4)
        return path

    def charge(self, num_nodes: int = 1) -> None:
        """Count visited nodes against the line's limit.

        Raises:
            CommandError: the limit is reached.
        """
        self.terminal.charge(num_nodes)


Command = Callable[[Call], None]


@dataclass(frozen=True)
class LineResult:
    """What a line printed, and whether its last command failed."""

    output: str
    is_error: bool


class Terminal:
    """A local machine, a remote host, and a session that is on one of them.

    Args:
        os: operating system of the local machine.
        remote_user: login name on the remote host.
        remote_host: its address.
        commands: the command table, name -> function.
        is_parity: whether the reference's quirks are kept.
    """

    def __init__(
        self,
        os: Os,
        remote_user: str,
        remote_host: str,
        commands: Mapping[str, Command],
        is_parity: bool = False,
    ) -> None:
        self.local = local_machine(os, is_parity)
        self.remote = remote_machine(remote_user, remote_host, is_parity)
        self.current = self.local
        self.is_parity = is_parity
        self._commands = commands
        self._work = 0

    @property
    def is_remote(self) -> bool:
        """Whether the session is on the remote host."""
        return self.current is self.remote

    def connect(self) -> None:
        """Log in to the remote host; a session starts in its home."""
        self.current = self.remote
        self.remote.cwd = self.remote.home

    def disconnect(self) -> None:
        """Go back to the local machine, where its session was left."""
        self.current = self.local

    def charge(self, num_nodes: int) -> None:
        """Count visited nodes; see :meth:`Call.charge`."""
        self._work += num_nodes
        if self._work > MAX_WORK:
            raise CommandError("Killed: this command line does too much")

    def run(self, line: str) -> LineResult:
        """Run a command line and return its output, cut to :data:`MAX_OUTPUT_CHARS`; never raises."""
        self._work = 0
        if len(line) > MAX_LINE_CHARS:
            text = self.current.shell_error(f"the line is longer than {MAX_LINE_CHARS} characters")
            return LineResult(text, True)
        result = self.run_nested(clean(line))
        output = result.output
        if len(output) > MAX_OUTPUT_CHARS:
            output = output[:MAX_OUTPUT_CHARS] + "\n... (output cut)"
        return LineResult(output, result.is_error)

    def run_nested(self, line: str) -> LineResult:
        """Run a clean line on the current machine within the limits of the line that it is part of."""
        dialect = self._dialect()
        try:
            if self.is_parity:
                line = expand_text(line, dialect, self.current.variables())
            pieces = split_line(line, dialect, self.is_parity)
        except ShellError as error:
            return LineResult(self.current.shell_error(str(error)), True)
        outputs: list[str] = []
        num_chars, is_error = 0, False
        for operator, text in pieces:
            if operator == "&&" and is_error:
                break
            result = self._run_one(text)
            is_error = result.is_error
            if result.output and num_chars <= MAX_OUTPUT_CHARS:
                outputs.append(result.output)
                num_chars += len(result.output)
        return LineResult("\n".join(outputs), is_error)

    def _dialect(self) -> Dialect:
        if not self.current.is_windows:
            return "unix"
        return "cmd_parity" if self.is_parity else "cmd"

    def _run_one(self, text: str) -> LineResult:
        machine = self.current
        try:
            words = words_of(text, self._dialect(), None if self.is_parity else machine.variables())
        except ShellError as error:
            return LineResult(machine.shell_error(str(error)), True)
        if not words:
            return LineResult("", False)
        typed = words[0].lower() if machine.is_windows else words[0]
        name = ALIASES.get(typed, typed)
        command = self._commands.get(name)
        if command is None or (machine.is_windows and name in NOT_ON_WINDOWS):
            return LineResult(machine.not_found(words[0]), True)
        call = Call(name, typed, words[1:], machine, self)
        try:
            self.charge(1)
            command(call)
        except CommandError as error:
            call.fail(str(error))
        except FileSystemError as error:
            path = error.path if isinstance(error.path, str) else machine.show(error.path)
            call.complain(path, error.reason)
        output = "\n".join(call.lines)
        return LineResult(output, call.has_failed or (self.is_parity and self._looks_like_error(output)))

    def _looks_like_error(self, output: str) -> bool:
        """Return whether the reference would take a text for an error: a command's name before a colon."""
        return output.partition(":")[0] in self._commands and ":" in output
