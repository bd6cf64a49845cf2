"""An in-memory file system with ceilings: nodes, depth, name and path lengths.

Nothing here touches a disk. Files share their immutable contents, so that a copy costs one node; the number
of nodes (archive members count as well) is limited like the space of a disk, so that no sequence of commands
can make a tree, or the time to walk it, grow without bound. Paths are tuples of names from the root; how they
are written is the business of :mod:`.machine`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Literal

Path = tuple[str, ...]
"""Names from the root; the root itself is ``()``."""

MAX_NODES = 500
"""Files, directories and archive members on one machine."""
MAX_DEPTH = 40
"""Deepest path, in names."""
MAX_NAME_CHARS = 255
"""Longest name; the limit of the common file systems."""
MAX_PATH_CHARS = 1_024
"""Longest path; macOS's PATH_MAX."""

Reason = Literal[
    "missing",
    "not_directory",
    "is_directory",
    "exists",
    "not_empty",
    "full",
    "too_long",
    "bad_name",
    "no_drive",
    "into_itself",
    "same_file",
]
"""Why an operation was refused; each operating system has its own words for it."""

Kind = Literal["data", "tar", "zip", "gzip"]


class FileSystemError(Exception):
    """An operation was refused; nothing was changed.

    Args:
        reason: why.
        path: what the operation was refused for, as the names from the root, or as typed.
    """

    def __init__(self, reason: Reason, path: Path | str = ()) -> None:
        self.reason: Reason = reason
        self.path = path
        super().__init__(reason)


@dataclass(frozen=True, slots=True, eq=False)
class Content:
    """What a file holds. Contents are immutable and compared by identity: a copy is the same object.

    Attributes:
        text: what ``cat`` prints for plain data.
        size_bytes: the size that listings show.
        kind: plain data, an archive, or a gzip file around another content.
        members: of an archive, in order.
        inner: of a gzip file.
        num_members: members of the archive and of the archives in it.
    """

    text: str = ""
    size_bytes: int = 0
    kind: Kind = "data"
    members: tuple[Member, ...] = ()
    inner: Content | None = None
    num_members: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Member:
    """One entry of an archive: its path in it, its content (None: a directory) and its mode."""

    path: Path
    content: Content | None
    mode: int


def archive(kind: Kind, members: list[Member]) -> Content:
    """Return a tar or zip archive of these members."""
    contents = [member.content for member in members if member.content is not None]
    return Content(
        size_bytes=512 + sum(content.size_bytes for content in contents),
        kind=kind,
        members=tuple(members),
        num_members=len(members) + sum(content.num_members for content in contents),
    )


def gzipped(inner: Content) -> Content:
    """Return a gzip file around another content."""
    return Content(
        size_bytes=20 + inner.size_bytes // 2, kind="gzip", inner=inner, num_members=inner.num_members
    )


def members_of(content: Content) -> tuple[Member, ...]:
    """Return what an archive holds, gzipped or not; nothing for other contents."""
    if content.kind == "gzip" and content.inner is not None:
        content = content.inner
    return content.members


EMPTY = Content()
"""Content of a file that ``touch`` made."""


@dataclass(slots=True, eq=False)
class File:
    """A file: its name as written, what it holds, its permission bits (0 .. 0o777)."""

    name: str
    content: Content
    mode: int = 0o644


@dataclass(slots=True, eq=False)
class Directory:
    """A directory: its name as written, its entries by folded name, its permission bits (0 .. 0o777)."""

    name: str
    children: dict[str, Node] = field(default_factory=dict)
    mode: int = 0o755


Node = File | Directory


def weight(node: Node) -> int:
    """Return how many nodes a tree takes of the limit: one each, and one for every archive member."""
    total, stack = 0, [node]
    while stack:
        current = stack.pop()
        total += 1
        if isinstance(current, Directory):
            stack.extend(current.children.values())
        else:
            total += current.content.num_members
    return total


def walk(node: Node) -> Iterator[tuple[Path, Node]]:
    """Yield (path below ``node``, node) of a tree: the node itself first, then its entries by name."""
    stack: list[tuple[Path, Node]] = [((), node)]
    while stack:
        path, current = stack.pop()
        yield path, current
        if isinstance(current, Directory):
            for key in sorted(current.children, reverse=True):
                child = current.children[key]
                stack.append(((*path, child.name), child))


def _check_lengths(path: Path, num_chars: int, node: Node) -> None:
    """Refuse a tree whose paths would be too long at ``path`` (``num_chars`` with its separators)."""
    stack = [(node, path[-1], len(path), num_chars)]
    while stack:
        current, name, depth, length = stack.pop()
        if depth > MAX_DEPTH or len(name) > MAX_NAME_CHARS or length > MAX_PATH_CHARS:
            raise FileSystemError("too_long", path)
        if isinstance(current, Directory):
            for child in current.children.values():
                stack.append((child, child.name, depth + 1, length + len(child.name) + 1))


class FileSystem:
    """A tree of directories and files.

    Args:
        is_case_sensitive: whether ``A`` and ``a`` are two names (Linux) or one (Windows, macOS).
        illegal_chars: characters that no name may have, beside the separators.
    """

    def __init__(self, is_case_sensitive: bool = True, illegal_chars: str = "") -> None:
        self._is_case_sensitive = is_case_sensitive
        self._illegal_chars = frozenset(illegal_chars)
        self.root = Directory("")
        self.num_nodes = 1

    def _key(self, name: str) -> str:
        return name if self._is_case_sensitive else name.casefold()

    def copy_of(self, node: Node) -> Node:
        """Return a copy of a tree, from this or another file system, that shares its contents.

        Names that differ elsewhere and are one name here become one entry, the last by name.
        """
        if isinstance(node, File):
            return File(node.name, node.content, node.mode)
        ordered = [node.children[key] for key in sorted(node.children)]
        children = {self._key(child.name): self.copy_of(child) for child in ordered}
        return Directory(node.name, children, node.mode)  # recursion: at most MAX_DEPTH

    def find(self, path: Path) -> Node | None:
        """Return what lies at a path, or None."""
        node: Node | None = self.root
        for name in path:
            node = self.child(node, name)
            if node is None:
                return None
        return node

    def child(self, node: Node | None, name: str) -> Node | None:
        """Return the entry of a directory; None if there is none, or if ``node`` is no directory."""
        return node.children.get(self._key(name)) if isinstance(node, Directory) else None

    def trail(self, path: Sequence[str]) -> list[Node | None]:
        """Return the root and what lies at every name of a path, None from where nothing does."""
        nodes: list[Node | None] = [self.root]
        for name in path:
            nodes.append(self.child(nodes[-1], name))
        return nodes

    def get(self, path: Path) -> Node:
        """Return what lies at a path.

        Raises:
            FileSystemError: ``missing``.
        """
        node = self.find(path)
        if node is None:
            raise FileSystemError("missing", path)
        return node

    def directory(self, path: Path) -> Directory:
        """Return the directory at a path.

        Raises:
            FileSystemError: ``missing`` or ``not_directory``.
        """
        node = self.get(path)
        if not isinstance(node, Directory):
            raise FileSystemError("not_directory", path)
        return node

    def is_directory(self, path: Path) -> bool:
        """Return whether a directory lies at a path."""
        return isinstance(self.find(path), Directory)

    def put(self, path: Path, node: Node) -> None:
        """Put a tree at a path under the path's last name, over a file that may be there.

        Raises:
            FileSystemError: the parent is ``missing`` or ``not_directory``, a directory ``exists`` there, the
                name is a ``bad_name``, the path would be ``too_long``, or the disk is ``full``.
        """
        if not path:
            raise FileSystemError("exists", path)
        self._put_into(self.directory(path[:-1]), path, sum(map(len, path)) + len(path), node)

    def _put_into(self, parent: Directory, path: Path, num_chars: int, node: Node) -> None:
        """Put a tree into a directory; ``num_chars`` is the length of ``path`` with its separators."""
        name = path[-1]
        if not name or name in (".", "..") or self._illegal_chars & set(name):
            raise FileSystemError("bad_name", path)
        old = parent.children.get(self._key(name))
        if isinstance(old, Directory) or (old is not None and isinstance(node, Directory)):
            raise FileSystemError("exists", path)
        _check_lengths(path, num_chars, node)
        added = weight(node) - (0 if old is None else weight(old))
        if self.num_nodes + added > MAX_NODES:
            raise FileSystemError("full", path)
        node.name = name
        parent.children[self._key(name)] = node
        self.num_nodes += added

    def merge(self, path: Path, node: Node, is_mode_kept: bool = False) -> None:
        """Put a tree at a path; where directories meet directories, their entries are merged.

        Args:
            path: where.
            node: the tree; it belongs to the file system from now on.
            is_mode_kept: whether a file that is replaced hands down its permission bits.

        Raises:
            FileSystemError: as :meth:`put`; ``exists`` when a file meets a directory. What was merged before
                stays, as with real commands.
        """
        here = self.find(path)
        if isinstance(here, Directory) and isinstance(node, Directory):
            self._merge_into(here, path, sum(map(len, path)) + len(path), node, is_mode_kept)
            return
        if is_mode_kept and isinstance(here, File) and isinstance(node, File):
            node.mode = here.mode
        self.put(path, node)

    def _merge_into(
        self, here: Directory, path: Path, num_chars: int, node: Directory, is_mode_kept: bool
    ) -> None:
        """Merge the entries of a directory into ``here``, which lies at ``path``."""
        for child in node.children.values():  # recursion: at most MAX_DEPTH
            there = here.children.get(self._key(child.name))
            below, num_below = (*path, child.name), num_chars + len(child.name) + 1
            if isinstance(there, Directory) and isinstance(child, Directory):
                self._merge_into(there, below, num_below, child, is_mode_kept)
                continue
            if is_mode_kept and isinstance(there, File) and isinstance(child, File):
                child.mode = there.mode
            self._put_into(here, below, num_below, child)

    def remove(self, path: Path) -> Node:
        """Take away and return what lies at a path.

        Raises:
            FileSystemError: ``missing``, or ``bad_name`` for the root.
        """
        if not path:
            raise FileSystemError("bad_name", path)
        node = self.get(path)
        parent = self.directory(path[:-1])
        del parent.children[self._key(path[-1])]
        self.num_nodes -= weight(node)
        return node

    def make_directory(self, path: Path, has_parents: bool = False) -> None:
        """Make a directory, with ``has_parents`` also those above it that are missing (then it may exist).

        Raises:
            FileSystemError: as :meth:`put`; ``exists``; ``not_directory`` when a file is in the way.
        """
        if has_parents:
            there = self.trail(path)
            for length in range(1, len(path)):
                if there[length] is None:
                    self.put(path[:length], Directory(""))
            if isinstance(there[-1], Directory):
                return
        if self.find(path) is not None:
            raise FileSystemError("exists", path)
        self.put(path, Directory(""))
