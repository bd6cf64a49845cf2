"""Batches whose loss or gradient was not finite: kept whole, so that they can be looked at and tried again.

The file is MessagePack: the version and plan, the items as they came over the wire, what was wrong, and the
witness of the conditions. ``cod replay RUN --failed FILE`` computes it again.
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from cod_async.durable import write_atomic
from cod_async.errors import InputError
from cod_async.lifecycle.segment import Version
from cod_async.wire.messages import TrainItem

FAILED_STEPS_FOLDER = "failed_steps"
MAX_FAILED_STEPS = 20
"""Files kept; the oldest go first."""


class FailedStep(msgspec.Struct, frozen=True, kw_only=True):
    """A step that was not applied.

    Attributes:
        version: that it would have started from.
        plan_digest: of its plan.
        items: its batch, sorted by key.
        error: what was not finite.
        witness: conditions and digest of the weights, see :mod:`.witness`.
    """

    version: Version
    plan_digest: str
    items: list[TrainItem]
    error: str
    witness: dict[str, str]


def keep_failed(run_dir: Path, failed: FailedStep) -> Path:
    """Write a failed step into ``failed_steps/`` and return the file."""
    folder = run_dir / FAILED_STEPS_FOLDER
    folder.mkdir(exist_ok=True)
    version = failed.version
    path = folder / f"step_{version.step:08d}-L{version.lineage}-{failed.plan_digest[:8]}.msgpack"
    write_atomic(path, msgspec.msgpack.encode(failed))
    known = sorted(folder.glob("step_*.msgpack"), key=lambda one: one.stat().st_mtime_ns)
    for old in known[:-MAX_FAILED_STEPS]:
        old.unlink(missing_ok=True)
    return path


def read_failed(path: Path) -> FailedStep:
    """Read a file of ``failed_steps/``.

    Raises:
        InputError: it is none.
    """
    try:
        return msgspec.msgpack.decode(path.read_bytes(), type=FailedStep)
    except OSError as error:
        what = f"cannot be read ({error.strerror})"
    except (msgspec.MsgspecError, ValueError) as error:
        what = f"not a failed step ({error})"
    raise InputError(f"--failed {path}: {what}; give a file of RUN/failed_steps")
