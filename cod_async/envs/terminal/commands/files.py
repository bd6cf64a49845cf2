"""Commands that change files and directories of one machine: mkdir, cp, mv, rm, touch, chmod."""

from __future__ import annotations

import re

from cod_async.envs.terminal.commands.flags import need_operands, read_options, without_switches
from cod_async.envs.terminal.filesystem import (
    EMPTY,
    Directory,
    File,
    FileSystemError,
    Node,
    Path,
    walk,
    weight,
)
from cod_async.envs.terminal.machine import Machine
from cod_async.envs.terminal.terminal import Call, CommandError

_OCTAL = re.compile(r"[0-7]{3}", re.ASCII)


def mkdir(call: Call) -> None:
    """Make directories; the parent must exist unless ``-p``."""
    options = read_options(call, "pv")
    need_operands(call, options.operands)
    for word in options.operands:
        try:
            path = call.resolve(word)
            call.charge(1 + len(path))
            call.machine.files.make_directory(path, has_parents=options.has("p"))
        except FileSystemError as error:
            call.complain(word, error.reason)


def target_of(machine: Machine, path: Path, typed: str, source: Node) -> Path:
    """Return where a copy goes: into the destination if it is a directory, else to its path.

    Args:
        machine: where the destination lies.
        path: of the destination.
        typed: the destination as typed.
        source: what will be copied.

    Raises:
        FileSystemError: the parent is missing or no directory, or a file is to go to a path that ends like a
            directory's and does not exist.
    """
    if machine.files.is_directory(path):
        return (*path, source.name)
    if machine.has_trailing_separator(typed) and isinstance(source, File):
        raise FileSystemError("not_directory" if machine.files.find(path) is not None else "missing", typed)
    machine.files.directory(path[:-1])
    return path


def _check_operands(call: Call, operands: list[str]) -> tuple[list[str], str]:
    """Part operands into sources and destination; more than one source needs a directory."""
    need_operands(call, operands, 2)
    if len(operands) > 2:
        if call.is_parity:
            raise CommandError(f"{call.typed}: expected a source and a destination")
        if not call.machine.files.is_directory(call.resolve(operands[-1])):
            call.complain(operands[-1], "not_directory")
            return [], operands[-1]
    return operands[:-1], operands[-1]


def cp(call: Call) -> None:
    """Copy files, with ``-r`` also directories."""
    options = read_options(call, "rRafpvn")
    sources, destination = _check_operands(call, options.operands)
    files = call.machine.files
    for word in sources:
        culprit: str | None = None
        try:
            path = call.resolve(word)
            node = files.get(path)
            call.charge(weight(node))
            if isinstance(node, Directory) and not options.has("rRa"):
                call.fail(_omitting(call, word))
                continue
            culprit = destination
            target = target_of(call.machine, call.resolve(destination), destination, node)
            _check_not_inside(path, node, target, files.find(target))
            files.merge(target, files.copy_of(node), is_mode_kept=not options.has("pa"))
        except FileSystemError as error:
            _complain_about(call, word, culprit, error)


def _omitting(call: Call, word: str) -> str:
    if call.machine.is_windows:
        return call.machine.complain("cp", word, "is_directory")
    if call.machine.os == "mac":
        return f"cp: {word} is a directory (not copied)."
    return f"cp: -r not specified; omitting directory '{word}'"


def _check_not_inside(path: Path, node: Node, target: Path, there: Node | None) -> None:
    if there is node:
        raise FileSystemError("same_file", path)
    if isinstance(node, Directory) and target[: len(path)] == path:
        raise FileSystemError("into_itself", path)


def _complain_about(call: Call, source: str, destination: str | None, error: FileSystemError) -> None:
    """Complain about a source or, if given, about the destination, for which GNU tools have other phrases."""
    if destination is None or call.machine.os != "linux":
        call.complain(source if destination is None else destination, error.reason)
        return
    words = call.machine.reason_words(error.reason)
    if error.reason == "same_file":
        call.fail(f"{call.name}: '{source}' and '{destination}' are the same file")
    elif call.name == "mv":
        call.fail(f"mv: cannot move '{source}' to '{destination}': {words}")
    else:
        call.fail(f"cp: cannot create '{destination}': {words}")


def mv(call: Call) -> None:
    """Move or rename files and directories; flags have no meaning."""
    if call.is_parity:
        operands = [word for word in call.words if not word.startswith("-")]
    else:
        operands = read_options(call, "", is_strict=False).operands
    sources, destination = _check_operands(call, operands)
    files = call.machine.files
    for word in sources:
        culprit = None
        try:
            path = call.resolve(word)
            node = files.get(path)
            call.charge(weight(node))
            culprit = destination
            target = _renamed(call, path, destination) or target_of(
                call.machine, call.resolve(destination), destination, node
            )
            there = files.find(target)
            if there is node and target[-1] != node.name and target[:-1] == path[:-1]:
                there = None  # only the case of the letters changes
            _check_not_inside(path, node, target, there)
            if isinstance(there, Directory) and (isinstance(node, File) or there.children):
                raise FileSystemError("not_empty" if isinstance(node, Directory) else "is_directory", target)
            _move(call, path, target, is_over_directory=isinstance(there, Directory))
        except FileSystemError as error:
            _complain_about(call, word, culprit, error)


def _renamed(call: Call, path: Path, destination: str) -> Path | None:
    """Return the target of ``ren``, whose bare new name lies beside the old one; None for other moves."""
    is_rename = call.typed in ("ren", "rename") and not call.is_parity
    if not is_rename or not path or call.machine.last_name(destination) != destination:
        return None
    return (*path[:-1], destination)


def _move(call: Call, path: Path, target: Path, is_over_directory: bool) -> None:
    """Move a tree; if the target refuses it, everything is as it was."""
    files = call.machine.files
    replaced = files.remove(target) if is_over_directory else None
    node = files.remove(path)
    name = node.name
    try:
        files.put(target, node)
    except FileSystemError:
        node.name = name
        files.put(path, node)
        if replaced is not None:
            files.put(target, replaced)
        raise


def rm(call: Call) -> None:
    """Remove files, with ``-r`` also directories; ``-f`` is silent about what is missing."""
    options = read_options(call, "rRfvid")
    if not options.has("f"):
        need_operands(call, options.operands)
    files = call.machine.files
    for word in options.operands:
        try:
            path = call.resolve(word)
            node = files.get(path)
            call.charge(weight(node))
            if isinstance(node, Directory):
                if not options.has("rR"):
                    raise FileSystemError("is_directory", word)
                if call.machine.cwd[: len(path)] == path:
                    call.fail(
                        f"{call.typed}: refusing to remove the current directory or one above it: '{word}'"
                    )
                    continue
            files.remove(path)
        except FileSystemError as error:
            if not options.has("f") or error.reason not in ("missing", "not_directory"):
                call.complain(word, error.reason)


def touch(call: Call) -> None:
    """Make empty files where there are none."""
    operands = read_options(call, "acm").operands
    need_operands(call, operands)
    for word in operands:
        try:
            path = call.resolve(word)
            if call.machine.files.find(path) is None:
                if call.machine.has_trailing_separator(word):
                    raise FileSystemError("missing", word)
                call.machine.files.put(path, File("", EMPTY))
        except FileSystemError as error:
            call.complain(word, error.reason)


def chmod(call: Call) -> None:
    """Set permission bits: three octal digits; with ``-R`` of everything below as well."""
    words = without_switches(call, set())
    is_recursive = "-R" in words or "--recursive" in words
    operands = [word for word in words if word not in ("-R", "--recursive", "-v", "--")]
    need_operands(call, operands, 2)
    digits, paths = operands[0], operands[1:]
    is_octal = _OCTAL.fullmatch(digits) or (
        not call.is_parity and re.fullmatch("0[0-7]{3}", digits, re.ASCII)
    )
    if not is_octal:
        raise CommandError(f"chmod: invalid mode: '{digits}'")
    for word in paths:
        try:
            node = call.machine.files.get(call.resolve(word))
            call.charge(weight(node))
            for _, below in walk(node) if is_recursive else [((), node)]:
                below.mode = int(digits, 8)
        except FileSystemError as error:
            call.complain(word, error.reason)
