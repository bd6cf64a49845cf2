"""What an actor says to the host of a started server that it gave up: a note beside the server's record.

The host sees the server's processes and whether they answer; only the actor sees that requests break off or
never end. So the actor leaves a note and the host decides: a server that does not answer the host either, or
that is complained about again, is taken down and started anew. A note names the instance it is about, so one
that comes too late is about nobody.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cod_async.durable import write_atomic
from cod_async.engines.sglang.records import ENGINES_FOLDER, ServerRecord

_MAX_REASON_CHARS = 500


class Complaint(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One note.

    Attributes:
        instance: of the server it is about.
        reason: why it was given up.
    """

    instance: str
    reason: str


def _path(run_dir: Path, name: str) -> Path:
    return run_dir / ENGINES_FOLDER / f"{name}.complaint"


def complain(run_dir: Path, record: ServerRecord, reason: str) -> None:
    """Leave a note about a started server; attached ones have no host, and nothing happens."""
    if not record.pid:
        return
    note = Complaint(instance=record.instance, reason=reason[:_MAX_REASON_CHARS])
    try:
        write_atomic(_path(run_dir, record.name), msgspec.json.encode(note))
    except OSError:  # the folder is gone with the run; a full disk has louder victims
        return


def take_complaint(run_dir: Path, name: str, instance: str) -> str | None:
    """Remove the note about a server and return its reason; None without one, or if it is not about
    ``instance``.
    """
    path = _path(run_dir, name)
    try:
        note = msgspec.json.decode(path.read_bytes(), type=Complaint)
        path.unlink()
    except (OSError, msgspec.MsgspecError):
        return None
    return note.reason if note.instance == instance else None
