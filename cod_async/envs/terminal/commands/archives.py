"""tar, gzip and gunzip, and what all archivers share: collecting members and unpacking them.

Members are named from the base name of what was packed (``docs`` packed from anywhere gives ``docs/a.txt``),
as in the paper's reference, so an absolute operand does not bring its whole path into the archive.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from cod_async.envs.terminal.commands.flags import need_operands, read_options
from cod_async.envs.terminal.filesystem import (
    EMPTY,
    Content,
    Directory,
    File,
    FileSystemError,
    Member,
    Node,
    Path,
    archive,
    gzipped,
    walk,
    weight,
)
from cod_async.envs.terminal.terminal import Call, CommandError

MAX_LISTED = 50
"""Most members that a listing shows."""

_TAR_LONG = {
    "--create": "c",
    "--extract": "x",
    "--get": "x",
    "--list": "t",
    "--gzip": "z",
    "--gunzip": "z",
    "--verbose": "v",
    "--file": "f",
    "--directory": "C",
    "--auto-compress": "a",
}


def collect(call: Call, node: Node, typed: str) -> list[Member]:
    """Return the members that a file or tree becomes; a tree typed as ``.`` leaves out its own name."""
    call.charge(weight(node))
    prefix: Path = () if call.machine.last_name(typed) == "" else (node.name,)
    members = []
    for below, entry in walk(node):
        path = (*prefix, *below)
        if path:
            members.append(Member(path, entry.content if isinstance(entry, File) else None, entry.mode))
    return members


def unpack(call: Call, members: Sequence[Member], base: Path, is_replacing: bool) -> None:
    """Write members below a directory, over files that are there.

    Args:
        call: the command.
        members: what to write.
        base: the directory.
        is_replacing: whether a file gives way to a directory, and an empty directory to a file, as tar does.
    """
    files = call.machine.files
    for member in members:
        path = (*base, *member.path)
        call.charge(1 + len(path) // 4)
        try:
            there = files.find(path)
            is_other_kind = isinstance(there, Directory) == (member.content is not None)
            is_in_the_way = isinstance(there, File) or (there is not None and not there.children)
            if is_replacing and is_other_kind and is_in_the_way:
                files.remove(path)
            if member.content is None:
                files.make_directory(path, has_parents=True)
                files.directory(path).mode = member.mode
                continue
            if len(path) > 1 and not files.is_directory(path[:-1]):
                files.make_directory(path[:-1], has_parents=True)
            files.put(path, File("", member.content, member.mode))
        except FileSystemError as error:
            call.complain("/".join(member.path), error.reason)


def list_members(call: Call, members: Sequence[Member]) -> None:
    """Print the names of members, directories with a slash."""
    for member in members[:MAX_LISTED]:
        call.say("/".join(member.path) + ("/" if member.content is None else ""))
    if len(members) > MAX_LISTED:
        call.say(f"... ({len(members) - MAX_LISTED} more)")


def chosen(call: Call, members: Sequence[Member], names: Sequence[str]) -> list[Member]:
    """Return the members that are one of these names or lie below one; all if there are no names."""
    call.charge(len(members) * max(1, len(names)))
    paths = [tuple(part for part in name.split("/") if part not in ("", ".")) for name in names]
    return [m for m in members if not paths or any(m.path[: len(path)] == path for path in paths)]


@dataclass
class _TarRequest:
    action: str = ""
    archive: str = ""
    directory: str = ""
    is_gzip: bool = False
    is_auto: bool = False
    is_verbose: bool = False
    operands: list[tuple[str, str]] = field(default_factory=list)  # (directory it is relative to, operand)


def _tar_bundle(word: str, is_first: bool) -> tuple[str, str | None]:
    """Return a word's option letters and the value that stands in it; no letters for an operand."""
    if word.startswith("--"):
        name, equals, value = word.partition("=")
        if name not in _TAR_LONG:
            raise CommandError(f"tar: unrecognized option '{word}'")
        return _TAR_LONG[name], value if equals else None
    if word.startswith("-") and len(word) > 1:
        return word[1:], None
    return (word, None) if is_first else ("", None)


def _read_tar(call: Call) -> _TarRequest:
    """Read tar's words: options with or without a dash, in any order; f and C take the words that follow."""
    request = _TarRequest()
    words, place = call.words, 0
    while place < len(words):
        letters, value = _tar_bundle(words[place], place == 0)
        place += 1
        if not letters:
            request.operands.append((request.directory, words[place - 1]))
        for letter in letters:
            if letter == "f" or (letter == "C" and not call.is_parity):
                if value is None:
                    if place >= len(words):
                        raise CommandError(f"tar: option requires an argument -- '{letter}'")
                    value = words[place]
                    place += 1
                if letter == "f":
                    request.archive = value
                else:
                    request.directory = value
                value = None
            else:
                _set_tar_letter(request, letter)
    if not request.action:
        raise CommandError("tar: You must specify one of the '-ctx' options")
    if not request.archive:
        raise CommandError("tar: Refusing to use a terminal for archive contents (missing -f option?)")
    return request


def _set_tar_letter(request: _TarRequest, letter: str) -> None:
    if letter in "cxt":
        if request.action not in ("", letter):
            raise CommandError("tar: You may not specify more than one '-ctx' option")
        request.action = letter
    elif letter == "z":
        request.is_gzip = True
    elif letter == "a":
        request.is_auto = True
    elif letter == "v":
        request.is_verbose = True
    elif letter in "jJ":
        raise CommandError("tar: only gzip compression (-z) is installed")
    elif letter not in "pkmoC":
        raise CommandError(f"tar: invalid option -- '{letter}'")


def tar(call: Call) -> None:
    """Create (c), extract (x) or list (t) a tar archive, gzipped with z."""
    request = _read_tar(call)
    if request.action == "c":
        _tar_create(call, request)
        return
    path = call.resolve(request.archive)
    try:
        node = call.machine.files.get(path)
    except FileSystemError as error:
        raise CommandError(_tar_words(call, request.archive, error)) from error
    content = _tar_content(call, request, node)
    names = [] if call.is_parity else [operand for _, operand in request.operands]
    members = chosen(call, content.members, names)
    for name in names:
        if not chosen(call, members, [name]):
            call.fail(f"tar: {name}: Not found in archive")
    if request.action == "t":
        list_members(call, members)
        return
    if not members:
        return
    base = call.resolve(request.directory) if request.directory else call.machine.cwd
    try:
        call.machine.files.directory(base)
    except FileSystemError as error:
        raise CommandError(_tar_words(call, request.directory, error)) from error
    unpack(call, members, base, is_replacing=True)
    if request.is_verbose:
        list_members(call, members)


def _tar_words(call: Call, path: str, error: FileSystemError) -> str:
    words = call.machine.reason_words(error.reason)
    if call.machine.os == "mac":
        return f"tar: Error opening archive: Failed to open '{path}': {words}"
    return f"tar: {path}: Cannot open: {words}\ntar: Error is not recoverable: exiting now"


def _tar_content(call: Call, request: _TarRequest, node: Node) -> Content:
    """Return the tar archive in a file, gzipped or not.

    Raises:
        CommandError: a directory, not an archive, or ``z`` for one that is not gzipped.
    """
    if isinstance(node, Directory):
        raise CommandError(f"tar: {request.archive}: Cannot read: Is a directory")
    content = node.content
    is_bsd = call.machine.os == "mac"
    if content.kind == "gzip" and content.inner is not None:
        content = content.inner
    elif request.is_gzip and not is_bsd and not call.is_parity:
        raise CommandError("gzip: stdin: not in gzip format\ntar: Error is not recoverable: exiting now")
    if content.kind != "tar" and not (content.kind == "zip" and is_bsd):  # BSD tar reads zip as well
        words = "Unrecognized archive format" if is_bsd else "This does not look like a tar archive"
        raise CommandError(f"tar: {words}")
    return content


def _tar_create(call: Call, request: _TarRequest) -> None:
    """Write what is there into the archive; what is missing is told and left out."""
    if not request.operands:
        raise CommandError("tar: Cowardly refusing to create an empty archive")
    files = call.machine.files
    members: dict[Path, Member] = {}
    is_aborted = False
    for directory, word in request.operands:
        start = call.resolve(directory) if directory else call.machine.cwd
        if not files.is_directory(start):
            call.fail(f"tar: {directory}: Cannot open: No such file or directory")
            is_aborted = True
            break
        try:
            node = files.get(call.machine.resolve(word, start=start))
            members.update((member.path, member) for member in collect(call, node, word))
        except FileSystemError as error:
            call.fail(f"tar: {word}: Cannot stat: {call.machine.reason_words(error.reason)}")
    content = archive("tar", list(members.values()))
    if request.is_gzip or (request.is_auto and request.archive.endswith((".gz", ".tgz"))):
        content = gzipped(content)
    try:
        files.put(call.resolve(request.archive), File("", EMPTY if is_aborted else content))
    except FileSystemError as error:
        raise CommandError(_tar_words(call, request.archive, error)) from error
    if request.is_verbose:
        list_members(call, list(members.values()))
    if call.has_failed:
        call.say("tar: Exiting with failure status due to previous errors")


def gzip(call: Call) -> None:
    """Replace files by compressed ones with ``.gz`` behind their names (``-d`` back, ``-k`` keep)."""
    options = read_options(call, "dkfvqrn123456789")
    _gzip_all(call, options.operands, options.has("d"), options.has("k"), options.has("f"))


def gunzip(call: Call) -> None:
    """Replace ``.gz`` files by what is in them (``-k`` keep)."""
    options = read_options(call, "kfvqrn")
    _gzip_all(call, options.operands, True, options.has("k"), options.has("f"))


def _gzip_all(call: Call, operands: list[str], is_back: bool, is_kept: bool, is_forced: bool) -> None:
    need_operands(call, operands)
    files = call.machine.files
    for word in operands:
        try:
            path = call.resolve(word)
            node = files.get(path)
            call.charge()
            if isinstance(node, Directory):
                call.fail(f"{call.name}: {word} is a directory -- ignored")
                continue
            result = _gunzipped(call, node, word) if is_back else _gzipped(call, node, word)
            if result is None:
                continue
            target = (*path[:-1], result.name)
            if files.find(target) is not None and not is_forced:
                call.fail(f"{call.name}: {result.name} already exists; not overwritten")
                continue
            files.put(target, result)
            if not is_kept:
                files.remove(path)
        except FileSystemError as error:
            call.complain(word, error.reason)


def _gzipped(call: Call, node: File, word: str) -> File | None:
    if node.name.endswith((".gz", ".tgz")):
        suffix = node.name[node.name.rindex(".") :]
        call.fail(f"{call.name}: {word} already has {suffix} suffix -- unchanged")
        return None
    return File(node.name + ".gz", gzipped(node.content), node.mode)


def _gunzipped(call: Call, node: File, word: str) -> File | None:
    if node.name.endswith(".tgz"):
        name = node.name.removesuffix(".tgz") + ".tar"
    elif node.name.endswith(".gz") and len(node.name) > 3:
        name = node.name.removesuffix(".gz")
    else:
        call.fail(f"{call.name}: {word}: unknown suffix -- ignored")
        return None
    if node.content.inner is None:
        call.fail(f"{call.name}: {word}: not in gzip format")
        return None
    return File(name, node.content.inner, node.mode)
