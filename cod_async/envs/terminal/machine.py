"""A machine: an operating system's way to write paths, to prompt, and to complain, over a file system.

Three kinds are simulated: ``windows`` (drive C, backslashes, cmd's words), ``mac`` (zsh, BSD tools) and
``linux`` (bash, GNU tools). The remote host is always Linux. What a command does lies in :mod:`.commands`;
how its refusal is worded lies here.
"""

from __future__ import annotations

import re
from typing import Literal

from cod_async.envs.terminal.filesystem import (
    MAX_DEPTH,
    MAX_NAME_CHARS,
    MAX_PATH_CHARS,
    Directory,
    File,
    FileSystem,
    FileSystemError,
    Path,
    Reason,
)

Os = Literal["windows", "mac", "linux"]
OS_NAMES: tuple[Os, ...] = ("windows", "mac", "linux")

LOCAL_USER = "user"
"""Login name on the local machine."""

_UNIX_REASONS: dict[Reason, str] = {
    "missing": "No such file or directory",
    "not_directory": "Not a directory",
    "is_directory": "Is a directory",
    "exists": "File exists",
    "not_empty": "Directory not empty",
    "full": "No space left on device",
    "too_long": "File name too long",
    "bad_name": "Invalid argument",
    "no_drive": "No such file or directory",
    "into_itself": "cannot copy or move a directory into itself",
    "same_file": "source and destination are the same file",
}
_WINDOWS_REASONS: dict[Reason, str] = {
    "missing": "The system cannot find the file specified.",
    "not_directory": "The directory name is invalid.",
    "is_directory": "Access is denied.",
    "exists": "A subdirectory or file {path} already exists.",
    "not_empty": "The directory is not empty.",
    "full": "There is not enough space on the disk.",
    "too_long": "The filename or extension is too long.",
    "bad_name": "The filename, directory name, or volume label syntax is incorrect.",
    "no_drive": "The system cannot find the drive specified.",
    "into_itself": "Cannot perform a cyclic copy.",
    "same_file": "The file cannot be copied onto itself.",
}
_GNU_PHRASES = {
    "ls": "cannot access ",
    "cp": "cannot stat ",
    "mv": "cannot stat ",
    "rm": "cannot remove ",
    "mkdir": "cannot create directory ",
    "chmod": "cannot access ",
    "touch": "cannot touch ",
}
"""What GNU tools say between their name and the path."""

_DRIVE = re.compile(r"([A-Za-z]):")


class Machine:
    """One computer.

    Args:
        os: its operating system.
        user: who works on it.
        host: its name or address.
        is_parity: whether the reference's quirks are kept.
    """

    def __init__(self, os: Os, user: str, host: str, is_parity: bool = False) -> None:
        self.os: Os = os
        self.user = user
        self.host = host
        is_windows = os == "windows"
        illegal = '<>:"|?*' if is_windows and not is_parity else ""
        self.files = FileSystem(is_case_sensitive=os == "linux", illegal_chars=illegal)
        self.home: Path = ("home" if os == "linux" else "Users", user)
        self.cwd: Path = self.home
        self.files.make_directory(self.home, has_parents=True)

    @property
    def is_windows(self) -> bool:
        """Whether paths, words and prompts are those of Windows."""
        return self.os == "windows"

    def resolve(self, text: str, start: Path | None = None) -> Path:
        """Return the path that a text means, taken from ``start`` (default: the current directory).

        On Unix the names before ``..`` must be directories, and so must a file that a slash follows.

        Raises:
            FileSystemError: an empty text or a name before ``..`` that is not there (``missing``), a file
                where a directory must be (``not_directory``), another drive than C (``no_drive``), or
                ``too_long``.
        """
        typed = text
        if not text:
            raise FileSystemError("missing", text)
        names = list(self.cwd if start is None else start)
        if self.is_windows:
            drive = _DRIVE.match(text)
            if drive:
                if drive.group(1).upper() != "C":
                    raise FileSystemError("no_drive", typed)
                text = text[2:]
            text = text.replace("\\", "/")
        if text.startswith("/"):
            names = []
        nodes = self.files.trail(names)  # what lies at every step of the way, so that ".." needs no search
        for name in text.split("/"):
            if name == "..":
                if not self.is_windows and not isinstance(nodes[-1], Directory):
                    raise FileSystemError("missing" if nodes[-1] is None else "not_directory", typed)
                if names:
                    del names[-1], nodes[-1]
            elif name not in ("", "."):
                names.append(name)
                nodes.append(self.files.child(nodes[-1], name))
        is_long = len(names) > MAX_DEPTH or any(len(name) > MAX_NAME_CHARS for name in names)
        if is_long or sum(len(name) + 1 for name in names) > MAX_PATH_CHARS:
            raise FileSystemError("too_long", typed)
        path = tuple(names)
        if not self.is_windows and typed.endswith("/") and isinstance(nodes[-1], File):
            raise FileSystemError("not_directory", typed)
        return path

    def has_trailing_separator(self, text: str) -> bool:
        """Return whether a path as typed ends like a directory's."""
        return text.endswith(("/", "\\") if self.is_windows else "/")

    def last_name(self, text: str) -> str:
        """Return the last name of a path as typed; empty for ``.``, ``..`` and the root."""
        flat = text.replace("\\", "/") if self.is_windows else text
        name = flat.rstrip("/").rpartition("/")[2]
        return "" if name in (".", "..") or _DRIVE.fullmatch(name) else name

    def show(self, path: Path) -> str:
        """Write a path in full, the way this operating system does."""
        return "C:\\" + "\\".join(path) if self.is_windows else "/" + "/".join(path)

    def prompt(self) -> str:
        """Return the prompt, without a blank behind it."""
        if self.is_windows:
            return self.show(self.cwd) + ">"
        at_home = self.cwd[: len(self.home)] == self.home
        where = "/".join(("~", *self.cwd[len(self.home) :])) if at_home else self.show(self.cwd)
        if self.os == "mac":
            return f"{self.user}@MacBook {where} %"
        return f"{self.user}@{self.host}:{where}$"

    def variables(self) -> dict[str, str]:
        """Return the environment variables; names are upper-case on Windows, where case does not matter."""
        home, cwd = self.show(self.home), self.show(self.cwd)
        if self.is_windows:
            return {
                "USERPROFILE": home,
                "HOMEDRIVE": "C:",
                "HOMEPATH": home[2:],
                "USERNAME": self.user,
                "COMPUTERNAME": self.host,
                "CD": cwd,
                "OS": "Windows_NT",
            }
        shell = "/bin/zsh" if self.os == "mac" else "/bin/bash"
        return {
            "HOME": home,
            "PWD": cwd,
            "USER": self.user,
            "LOGNAME": self.user,
            "SHELL": shell,
            "HOSTNAME": self.host,
        }

    def not_found(self, name: str) -> str:
        """Return what the shell says about a command that it does not know."""
        if self.is_windows:
            return (
                f"'{name}' is not recognized as an internal or external command,\n"
                "operable program or batch file."
            )
        if self.os == "mac":
            return f"zsh: command not found: {name}"
        return f"bash: {name}: command not found"

    def shell_error(self, text: str) -> str:
        """Return a complaint of the shell itself about a command line."""
        if self.is_windows:
            return text[:1].upper() + text[1:] + "."
        return f"{'zsh' if self.os == 'mac' else 'bash'}: {text}"

    def reason_words(self, reason: Reason, path: str = "") -> str:
        """Return the operating system's words for a reason alone."""
        if self.is_windows:
            return _WINDOWS_REASONS[reason].replace("{path}", path)
        return _UNIX_REASONS[reason]

    def complain(self, command: str, path: str, reason: Reason) -> str:
        """Return what ``command`` says when ``reason`` stops it at ``path`` (as typed)."""
        words = self.reason_words(reason, path)
        if self.is_windows:
            is_path = reason == "missing" and command in ("cd", "mkdir")
            return "The system cannot find the path specified." if is_path else words
        if self.os == "linux" and command in _GNU_PHRASES:
            return f"{command}: {_GNU_PHRASES[command]}'{path}': {words}"
        return f"{command}: {path}: {words}"


def local_machine(os: Os, is_parity: bool = False) -> Machine:
    """Return the machine that the policy sits at."""
    host = {"windows": "DESKTOP", "mac": "MacBook", "linux": "laptop"}[os]
    return Machine(os, LOCAL_USER, host, is_parity)


def remote_machine(user: str, host: str, is_parity: bool = False) -> Machine:
    """Return the Linux host that is reached by ssh and scp; a web root and /opt exist on it."""
    machine = Machine("linux", user, host, is_parity)
    machine.files.make_directory(("var", "www", "html"), has_parents=True)
    machine.files.make_directory(("opt",))
    return machine
