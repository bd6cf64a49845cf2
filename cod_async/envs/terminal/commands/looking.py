"""Commands that only look: ls, cd, pwd, cat, echo, whoami."""

from __future__ import annotations

from cod_async.envs.terminal.commands.flags import Options, need_operands, read_options, without_switches
from cod_async.envs.terminal.filesystem import (
    Content,
    Directory,
    File,
    FileSystemError,
    Node,
    Path,
    walk,
    weight,
)
from cod_async.envs.terminal.terminal import Call

MAX_ENTRIES = 50
"""Most entries that a listing shows."""
DIRECTORY_SIZE_BYTES = 4_096
_DATE, _WINDOWS_DATE = "Jan 15 10:00", "01/15/2026  10:00 AM"
"""Every file is as old as every other: tasks have no clock."""


def ls(call: Call) -> None:
    """List files and directories (``-l`` long, ``-a`` hidden too, ``-d`` themselves, ``-R`` below too)."""
    options = read_options(call, "laAhtrSFdGR1i")
    machine = call.machine
    files: list[tuple[str, Node]] = []
    directories: list[tuple[str, Path, Directory]] = []
    for word in options.operands or ["."]:
        try:
            path = call.resolve(word)
            node = machine.files.get(path)
        except FileSystemError as error:
            call.complain(word, error.reason)
            continue
        if isinstance(node, File) or options.has("d"):
            files.append((word, node))
        elif options.has("R"):
            call.charge(weight(node))
            directories += [
                ("/".join((word.rstrip("/"), *below)), (*path, *below), found)
                for below, found in walk(node)
                if isinstance(found, Directory)
            ]
        else:
            call.charge(len(node.children))
            directories.append((word, path, node))
    _list(call, files[:MAX_ENTRIES], options)
    budget = MAX_ENTRIES - len(files[:MAX_ENTRIES])
    is_headed = len(options.operands) > 1 or options.has("R")
    for index, (word, path, directory) in enumerate(directories):
        if budget <= 0:
            call.say(f"... ({len(directories) - index} more directories)")
            return
        entries = _entries(call, options, path, directory)
        if (files or index) and (is_headed or machine.is_windows):
            call.say("")
        if machine.is_windows:
            call.say(f" Directory of {machine.show(path)}\n")
        elif is_headed:
            call.say(f"{word}:")
        if options.has("l") and not machine.is_windows:
            call.say(f"total {len(entries)}")
        _list(call, entries[:budget], options)
        if machine.is_windows:
            _say_totals(call, entries)
        if len(entries) > budget:
            call.say(f"... ({len(entries) - budget} more)")
        budget -= len(entries)


def _entries(call: Call, options: Options, path: Path, directory: Directory) -> list[tuple[str, Node]]:
    """Return a directory's entries as listed: by name; on Unix hidden ones only if asked for."""
    entries: list[tuple[str, Node]] = sorted(
        ((child.name, child) for child in directory.children.values()), key=lambda entry: entry[0]
    )
    if call.machine.is_windows:
        return entries
    if not options.has("aA"):
        return [entry for entry in entries if not entry[0].startswith(".")]
    if options.has("a"):
        parent = call.machine.files.directory(path[:-1])
        return [(".", directory), ("..", parent), *entries]
    return entries


def _list(call: Call, entries: list[tuple[str, Node]], options: Options) -> None:
    for name, node in entries:
        if call.machine.is_windows:
            size = f"{'<DIR>':<14}" if isinstance(node, Directory) else f"{node.content.size_bytes:>14,}"
            call.say(f"{_WINDOWS_DATE}    {size} {name}")
        elif options.has("l"):
            call.say(_long_line(call, name, node))
        else:
            is_directory = isinstance(node, Directory) and name not in (".", "..")
            call.say(name + "/" if is_directory and not name.endswith("/") else name)


def _say_totals(call: Call, entries: list[tuple[str, Node]]) -> None:
    sizes = [node.content.size_bytes for _, node in entries if isinstance(node, File)]
    call.say(f"{len(sizes):>16} File(s) {sum(sizes):>14,} bytes")
    call.say(f"{len(entries) - len(sizes):>16} Dir(s)")


def _long_line(call: Call, name: str, node: Node) -> str:
    bits = "".join(
        letter if node.mode >> (8 - place) & 1 else "-" for place, letter in enumerate("rwxrwxrwx")
    )
    user = call.machine.user
    is_directory = isinstance(node, Directory)
    size = DIRECTORY_SIZE_BYTES if isinstance(node, Directory) else node.content.size_bytes
    slash = "/" if is_directory and name not in (".", "..") else ""
    return f"{'d' if is_directory else '-'}{bits} 1 {user} {user} {size:>7} {_DATE} {name}{slash}"


def cd(call: Call) -> None:
    """Change the current directory; without an argument go home (on Windows: print where one is)."""
    machine = call.machine
    operands = [word for word in without_switches(call, set()) if word != "--"]
    if not operands:
        if machine.is_windows:
            call.say(machine.show(machine.cwd))
        else:
            machine.cwd = machine.home
        return
    if len(operands) > 1 and not machine.is_windows:
        call.fail(machine.shell_error("cd: too many arguments"))
        return
    target = operands[0]
    try:
        path = call.resolve(target)
        machine.files.directory(path)
    except FileSystemError as error:
        words = machine.complain("cd", target, error.reason)
        call.fail(words if machine.is_windows else machine.shell_error(words))
        return
    machine.cwd = path


def pwd(call: Call) -> None:
    """Print the current directory."""
    call.say(call.machine.show(call.machine.cwd))


def cat(call: Call) -> None:
    """Print files."""
    operands = read_options(call, "nbAvestE").operands
    need_operands(call, operands)
    for word in operands:
        try:
            node = call.machine.files.get(call.resolve(word))
            if isinstance(node, Directory):
                raise FileSystemError("is_directory", word)
            text = _readable(node.content)
            if text:
                call.say(text)
        except FileSystemError as error:
            call.complain(word, error.reason)


def _readable(content: Content) -> str:
    return content.text if content.kind == "data" else f"(binary data: {content.kind})"


def echo(call: Call) -> None:
    """Print the arguments."""
    words = call.words[1:] if call.words[:1] == ["-n"] else call.words
    call.say(" ".join(words))


def whoami(call: Call) -> None:
    """Print the login name."""
    machine = call.machine
    call.say(f"{machine.host.lower()}\\{machine.user}" if machine.is_windows else machine.user)
