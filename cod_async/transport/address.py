"""Where the coordinator of a run listens: ``coordinator.json`` in the run folder.

The coordinator writes it after it has bound; clients read it before every new connection, because a restarted
coordinator may have had to take another port.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import msgspec

from cod_async.durable import write_atomic

ADDRESS_NAME = "coordinator.json"


class CoordinatorAddress(msgspec.Struct, frozen=True):
    """What ``coordinator.json`` says: the ZMQ address, and the process that wrote it."""

    address: str
    pid: int


def write_address(run_dir: Path, address: str) -> None:
    """Say durably where this process, the coordinator of the run, listens."""
    said = msgspec.json.encode(CoordinatorAddress(address=address, pid=os.getpid()))
    write_atomic(run_dir / ADDRESS_NAME, said + b"\n")


def read_address(run_dir: Path) -> str | None:
    """Return the coordinator's address, or None while there is none (missing or torn file)."""
    try:
        return msgspec.json.decode((run_dir / ADDRESS_NAME).read_bytes(), type=CoordinatorAddress).address
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


def address_source(run_dir: Path) -> Callable[[], str | None]:
    """Return a function that reads the address anew each time, as links want it."""
    return lambda: read_address(run_dir)
