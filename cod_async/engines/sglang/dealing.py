"""Which servers are whose: every server of a run is driven by exactly one actor.

Weights, pauses and health of a server are one actor's business, so servers are dealt out by index: server i
belongs to actor i modulo ``actors.num_processes``. Attached servers are numbered as ``engine.urls`` lists
them; started ones are in the records of the run folder, which are read again whenever they are asked for.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from cod_async.config.schema import Config
from cod_async.engines.sglang.records import ServerRecord, read_records
from cod_async.errors import InputError


def index_in_name(name: str) -> int:
    """Return the 3 of ``engine-3`` or ``actor-3``.

    Raises:
        InputError: the name does not end in an index.
    """
    stem, _, digits = name.rpartition("-")
    if not (stem and digits.isascii() and digits.isdigit()):
        raise InputError(f'--name {name}: has no index; name it like "engine-0" or "actor-0"')
    return int(digits)


def deal_servers(config: Config, run_dir: Path, actor: str) -> Callable[[], list[ServerRecord]]:
    """Return what tells the servers of one actor, as they are when it is asked.

    Args:
        config: the run's configuration.
        run_dir: the run folder.
        actor: name of the actor.

    Raises:
        InputError: an actor of this name has no servers, or a key's variable is not set.
    """
    index, num_actors = index_in_name(actor), config.actors.num_processes
    if index >= num_actors:
        raise InputError(
            f"--name {actor}: actors.num_processes is {num_actors}, so this actor has no servers; use "
            f'"actor-0" to "actor-{num_actors - 1}"'
        )
    if not config.engine.urls:
        return lambda: [
            record for record in read_records(run_dir) if index_in_name(record.name) % num_actors == index
        ]
    mine = attached_records(config)[index::num_actors]
    return lambda: mine


def attached_records(config: Config) -> list[ServerRecord]:
    """Return the servers of ``engine.urls`` with their keys from the environment.

    Raises:
        InputError: a key's variable is not set.
    """
    server = config.engine.server
    api_key = _key("api_key_env", server.api_key_env)
    admin_key = _key("admin_key_env", server.admin_key_env) or api_key
    return [
        ServerRecord(name=f"url-{index}", url=url, api_key=api_key, admin_key=admin_key)
        for index, url in enumerate(config.engine.urls)
    ]


def _key(setting: str, variable: str) -> str:
    if variable and not os.environ.get(variable):
        raise InputError(f'engine.server.{setting}: the environment variable "{variable}" is not set; set it')
    return os.environ[variable] if variable else ""
