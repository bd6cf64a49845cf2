"""Where the servers of a run are found: one owner-only JSON file per started server in ``RUN/engines``.

The process that hosts a server writes its file (see :mod:`cod_async.launch.engine_host`); actors read all of
them. A restarted server has a new port and new keys, so whoever lost a server reads its file again.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import msgspec

from cod_async.durable import write_atomic
from cod_async.errors import EngineError

ENGINES_FOLDER = "engines"

ServerState = Literal["starting", "ready", "down"]


class ServerRecord(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A server and how to reach it.

    Attributes:
        name: ``engine-0``, …; the file is ``engines/NAME.json``.
        url: ``http://HOST:PORT``.
        api_key, admin_key: bearer keys; empty: none.
        state: ``ready`` once it has answered.
        instance: drawn at random for every start of the server.
        pid: of the hosting process; 0 for attached servers.
    """

    name: str
    url: str
    api_key: str = ""
    admin_key: str = ""
    state: ServerState = "ready"
    instance: str = ""
    pid: int = 0


def write_record(run_dir: Path, record: ServerRecord) -> None:
    """Write a server's file atomically, readable by its owner only."""
    folder = run_dir / ENGINES_FOLDER
    folder.mkdir(mode=0o700, exist_ok=True)
    write_atomic(folder / f"{record.name}.json", msgspec.json.encode(record), mode=0o600)


def read_records(run_dir: Path) -> list[ServerRecord]:
    """Return all servers of a run, by name.

    Raises:
        EngineError: a file is damaged.
    """
    records = []
    for path in (run_dir / ENGINES_FOLDER).glob("*.json"):
        try:
            records.append(msgspec.json.decode(path.read_bytes(), type=ServerRecord))
        except FileNotFoundError:
            continue
        except (OSError, msgspec.MsgspecError) as error:
            raise EngineError(f"{path} is damaged ({error}); stop the run and remove it") from None
    return sorted(records, key=lambda record: (len(record.name), record.name))
