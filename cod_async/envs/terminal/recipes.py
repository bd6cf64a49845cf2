"""The seventeen types of tasks: what each draws, what is there at the start, and what is wanted.

Nine are single (one kind of command does it), eight are composite. The order of the draws within a type is
part of the data set.
"""

from __future__ import annotations

from cod_async.envs.terminal.draft import DIRECTORY_NAMES, FILE_NAMES, MODES, Draft, Place, Recipe
from cod_async.envs.terminal.filesystem import Content, Member, Path, archive, gzipped

_UPLOAD_MODES = ("755", "700", "600", "444")


def _upload(draft: Draft) -> None:
    directory, name, there = draft.local_directory(), draft.file_name(), draft.remote_directory()
    content = draft.content(name)
    source = draft.file("local", (*directory, name), content)
    draft.distract("local", directory)
    draft.tell(source=source, destination=draft.make("remote", there))
    draft.want_file("remote", (*there, name), content)


def _download(draft: Draft) -> None:
    here, there, name = draft.local_directory(), draft.remote_directory(), draft.file_name()
    content = draft.content(name)
    source = draft.file("remote", (*there, name), content)
    destination = draft.make("local", here)
    draft.distract("local", here)
    draft.distract("remote", there)
    draft.tell(source=source, destination=destination)
    draft.want_file("local", (*here, name), content)


def _rename(draft: Draft) -> None:
    side = draft.side()
    directory = draft.directory(side)
    old, new = draft.rng.sample(FILE_NAMES, 2)
    content = draft.content(old)
    draft.tell(source=draft.file(side, (*directory, old), content), name=new)
    draft.want_absent(side, (*directory, old))
    draft.want_file(side, (*directory, new), content)


def _move(draft: Draft) -> None:
    side = draft.side()
    here, there = draft.two_directories(side)
    name = draft.file_name()
    content = draft.content(name)
    draft.tell(source=draft.file(side, (*here, name), content), destination=draft.make(side, there))
    draft.want_absent(side, (*here, name))
    draft.want_file(side, (*there, name), content)


def _chmod(draft: Draft) -> None:
    side = draft.side()
    if draft.os == "windows":
        side = "remote"
    directory, name = draft.directory(side), draft.file_name()
    old, new = draft.rng.sample(MODES, 2)
    source = draft.file(side, (*directory, name), draft.content(name), int(old, 8))
    draft.tell(source=source, mode=new)
    draft.want_mode(side, source.path, new)


def _delete(draft: Draft) -> None:
    side = draft.side()
    directory, name = draft.directory(side), draft.file_name()
    source = draft.file(side, (*directory, name), draft.content(name))
    draft.tell(source=source)
    draft.want_absent(side, source.path)


def _copy(draft: Draft) -> None:
    side = draft.side()
    here, there = draft.two_directories(side)
    name = draft.file_name()
    content = draft.content(name)
    draft.tell(source=draft.file(side, (*here, name), content), destination=draft.make(side, there))
    draft.want_file(side, (*here, name), content)
    draft.want_file(side, (*there, name), content)


def _pack(draft: Draft) -> None:
    side = draft.side()
    home = draft.local_home if side == "local" else draft.remote_home
    name = draft.rng.choice(DIRECTORY_NAMES)
    files = draft.packed_files(side, (*home, name))
    target = Place(side, (*home, name + draft.archive_suffix(side)))
    draft.tell(source=draft.make(side, (*home, name)), archive=target)
    draft.want_archive(side, target.path, name, files)


def _mkdir(draft: Draft) -> None:
    side = draft.side()
    home = draft.local_home if side == "local" else draft.remote_home
    names = draft.rng.sample(DIRECTORY_NAMES, draft.rng.randint(2, 4))
    target = Place(side, (*home, *names))
    draft.tell(directory=target)
    draft.want_directory(side, target.path)


def _pack_upload(draft: Draft) -> None:
    source, files = _local_packed(draft)
    suffix, there = draft.archive_suffix("local"), draft.remote_directory()
    name = source.path[-1]
    target = Place("remote", (*there, name + suffix))
    draft.tell(source=source, destination=draft.make("remote", there), archive=target, name=name + suffix)
    draft.want_archive("remote", target.path, name, files)


def _local_packed(draft: Draft) -> tuple[Place, list[tuple[str, Content]]]:
    directory = draft.local_directory()
    files = draft.packed_files("local", directory)
    return draft.make("local", directory), files


def _download_extract(draft: Draft) -> None:
    here, there = draft.local_directory(), draft.remote_directory()
    name = draft.rng.choice(DIRECTORY_NAMES)
    names = draft.rng.sample(FILE_NAMES, draft.rng.randint(2, 4))
    files = [(file, draft.content(file)) for file in names]
    suffix = draft.archive_suffix("remote")
    members = [Member((name,), None, 0o755)]
    members += [Member((name, file), content, 0o644) for file, content in files]
    packed = archive("zip" if suffix == ".zip" else "tar", members)
    if suffix == ".tar.gz":
        packed = gzipped(packed)
    source = draft.file("remote", (*there, name + suffix), packed)
    draft.tell(source=source, destination=draft.make("local", here), name=name)
    for file, content in files:
        draft.want_file("local", (*here, name, file), content)


def _mkdir_upload(draft: Draft) -> None:
    directory, name = draft.local_directory(), draft.file_name()
    names = draft.rng.sample(DIRECTORY_NAMES, draft.rng.randint(2, 3))
    there: Path = (*draft.remote_home, *names)
    content = draft.content(name)
    draft.tell(source=draft.file("local", (*directory, name), content), directory=Place("remote", there))
    draft.want_directory("remote", there)
    draft.want_file("remote", (*there, name), content)


def _upload_chmod(draft: Draft) -> None:
    directory, name, there = draft.local_directory(), draft.file_name(), draft.remote_directory()
    mode = draft.rng.choice(_UPLOAD_MODES)
    content = draft.content(name)
    source = draft.file("local", (*directory, name), content)
    draft.tell(source=source, destination=draft.make("remote", there), mode=mode)
    draft.want_file("remote", (*there, name), content)
    draft.want_mode("remote", (*there, name), mode)


def _upload_delete_source(draft: Draft) -> None:
    _upload(draft)
    source = draft.paths["source"]
    draft.want_absent("local", source.path)


def _pack_upload_extract(draft: Draft) -> None:
    source, files = _local_packed(draft)
    suffix, there = draft.archive_suffix("local"), draft.remote_directory()
    name = source.path[-1]
    draft.tell(source=source, destination=draft.make("remote", there), name=name + suffix)
    for file, content in files:
        draft.want_file("remote", (*there, name, file), content)


def _download_rename(draft: Draft) -> None:
    here, there = draft.local_directory(), draft.remote_directory()
    old, new = draft.rng.sample(FILE_NAMES, 2)
    content = draft.content(old)
    source = draft.file("remote", (*there, old), content)
    draft.tell(source=source, destination=draft.make("local", here), name=new)
    draft.want_file("local", (*here, new), content)
    draft.want_absent("local", (*here, old))


def _backup_replace(draft: Draft) -> None:
    directory, name, there = draft.local_directory(), draft.file_name(), draft.remote_directory()
    new, old = draft.content(name, "new content"), draft.content(name, "old content")
    source = draft.file("local", (*directory, name), new)
    target = draft.file("remote", (*there, name), old)
    draft.tell(source=source, target=target, name=name + ".bak")
    draft.want_file("remote", (*there, name + ".bak"), old)
    draft.want_file("remote", (*there, name), new)


SINGLE: dict[str, Recipe] = {
    "upload": _upload,
    "download": _download,
    "rename": _rename,
    "move": _move,
    "chmod": _chmod,
    "delete": _delete,
    "copy": _copy,
    "pack": _pack,
    "mkdir": _mkdir,
}
"""Types that one kind of command solves; their order is the order of the draw."""

COMPOSITE: dict[str, Recipe] = {
    "pack_upload": _pack_upload,
    "download_extract": _download_extract,
    "mkdir_upload": _mkdir_upload,
    "upload_chmod": _upload_chmod,
    "upload_delete_source": _upload_delete_source,
    "pack_upload_extract": _pack_upload_extract,
    "download_rename": _download_rename,
    "backup_replace": _backup_replace,
}
"""Types of several steps on both machines; their order is the order of the draw."""
