"""zip and unzip, which exist on every machine."""

from __future__ import annotations

from cod_async.envs.terminal.commands.archives import chosen, collect, list_members, unpack
from cod_async.envs.terminal.commands.flags import need_operands, read_options
from cod_async.envs.terminal.filesystem import Directory, File, FileSystemError, Member, Path, archive
from cod_async.envs.terminal.terminal import Call, CommandError

MAX_SAID = 50
"""Most members whose adding is reported."""


def zip_files(call: Call) -> None:
    """Add files to a zip archive, with ``-r`` also what is in directories; ``-j`` drops directory names."""
    options = read_options(call, "rqjvoyX0123456789")
    need_operands(call, options.operands)
    name, sources = options.operands[0], options.operands[1:]
    if "." not in call.machine.last_name(name):
        name += ".zip"
    path = call.resolve(name)
    members = _existing(call, path, name)
    added: dict[Path, Member] = {}
    for word in sources:
        try:
            node = call.machine.files.get(call.resolve(word))
        except FileSystemError:
            call.fail(f"\tzip warning: name not matched: {word}")
            continue
        found = collect(call, node, word)
        if isinstance(node, Directory) and not options.has("r"):
            found = [member for member in found if len(member.path) == 1 and member.content is None]
        for member in found:
            if options.has("j"):
                if member.content is None:
                    continue
                member = Member(member.path[-1:], member.content, member.mode)
            added[member.path] = member
    if not added:
        raise CommandError(f"zip error: Nothing to do! ({name})")
    members.update(added)
    if len(path) > 1:
        call.machine.files.make_directory(path[:-1], has_parents=True)
    call.machine.files.put(path, File("", archive("zip", list(members.values()))))
    if not options.has("q"):
        for member in list(added.values())[:MAX_SAID]:
            slash = "/" if member.content is None else ""
            call.say(f"  adding: {'/'.join(member.path)}{slash} (stored 0%)")


def _existing(call: Call, path: Path, name: str) -> dict[Path, Member]:
    """Return the members of the archive that is already there."""
    node = call.machine.files.find(path)
    if node is None:
        return {}
    if isinstance(node, Directory) or node.content.kind != "zip":
        raise CommandError(f"zip error: Zip file structure invalid ({name})")
    call.charge(len(node.content.members))
    return {member.path: member for member in node.content.members}


def unzip(call: Call) -> None:
    """Unpack a zip archive here or, with ``-d``, into a directory, made if missing; ``-l`` lists."""
    options = read_options(call, "oqlnvj", with_value="d")
    need_operands(call, options.operands)
    name, names = options.operands[0], options.operands[1:]
    files = call.machine.files
    node = files.find(call.resolve(name)) or files.find(call.resolve(name + ".zip"))
    if node is None:
        raise CommandError(f"unzip:  cannot find or open {name}, {name}.zip or {name}.ZIP.")
    if isinstance(node, Directory) or node.content.kind != "zip":
        raise CommandError(
            f"Archive:  {name}\n  End-of-central-directory signature not found: this is not a zip file."
        )
    members = chosen(call, node.content.members, names)
    for wanted in names:
        if not chosen(call, members, [wanted]):
            call.fail(f"caution: filename not matched:  {wanted}")
    if options.has("l"):
        list_members(call, members)
        return
    base = call.machine.cwd
    if "d" in options.values:
        base = call.resolve(options.values["d"])
        if not files.is_directory(base):
            files.make_directory(base)
    if options.has("j"):
        members = [Member(m.path[-1:], m.content, m.mode) for m in members if m.content is not None]
    unpack(call, members, base, is_replacing=False)
    if not options.has("q"):
        call.say(f"Archive:  {name}")
        for member in members[:MAX_SAID]:
            if member.content is not None:
                call.say(f"  inflating: {'/'.join(member.path)}")
