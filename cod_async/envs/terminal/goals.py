"""What a task wants to be true in the end, and the check of it on the two machines."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cod_async.envs.terminal.filesystem import Content, File, Path, members_of
from cod_async.envs.terminal.terminal import Terminal

Side = Literal["local", "remote"]
"""The local machine or the remote host."""
GoalKind = Literal["file", "absent", "directory", "mode", "archive"]


@dataclass(frozen=True)
class Goal:
    """One condition.

    Attributes:
        kind: ``file``: a file with ``content`` lies at the path; ``absent``: nothing does; ``directory``: a
            directory does; ``mode``: what lies there has permission bits ``mode``; ``archive``: an archive
            does, of whatever format, that holds ``entries``.
        side: the machine.
        path: where.
        content: of a ``file``.
        mode: 0 .. 0o777.
        entries: (path in the archive, content) of an ``archive``; it may hold more.
    """

    kind: GoalKind
    side: Side
    path: Path
    content: Content | None = None
    mode: int = 0
    entries: tuple[tuple[Path, Content], ...] = ()

    def is_met(self, terminal: Terminal) -> bool:
        """Return whether the condition holds."""
        machine = terminal.local if self.side == "local" else terminal.remote
        node = machine.files.find(self.path)
        if self.kind == "absent":
            return node is None
        if node is None:
            return False
        if self.kind == "mode":
            return node.mode == self.mode
        if not isinstance(node, File):
            return self.kind == "directory"
        if self.kind == "file":
            return node.content is self.content
        if self.kind == "archive":
            packed = {member.path: member.content for member in members_of(node.content)}
            return all(packed.get(path) is content for path, content in self.entries)
        return False


def are_met(goals: Sequence[Goal], terminal: Terminal) -> bool:
    """Return whether all conditions hold."""
    return all(goal.is_met(terminal) for goal in goals)
