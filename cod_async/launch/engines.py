"""What the launcher looks at before a run that generates on SGLang servers: the interpreter that is to start
them, or the servers to attach to. Loads no torch.
"""

from __future__ import annotations

import asyncio
from pathlib import Path

from cod_async.config.schema import Config
from cod_async.engines.sglang.command import Interpreter, inspect_interpreter, server_environment
from cod_async.engines.sglang.dealing import attached_records
from cod_async.engines.sglang.opening import Needs, look_at_servers
from cod_async.launch.run_folder import child_environment, own_roots


def engine_environment(config: Config) -> dict[str, str]:
    """Return the environment variables of the run's servers, but for those of their device."""
    return server_environment(child_environment(config.engine.num_threads), own_roots())


def inspect_engine(config: Config) -> Interpreter:
    """Ask the interpreter that the run's servers will be started with.

    Raises:
        InputError: it cannot start a server.
    """
    return inspect_interpreter(config.engine.python, engine_environment(config))


def check_engines(config: Config, model_dir: Path | None) -> Interpreter | None:
    """See before anything is started that the run's servers can be used.

    Args:
        config: the run's configuration.
        model_dir: what attached servers must serve; None while there is no model yet.

    Returns:
        What servers will be started with; None if none will be.

    Raises:
        InputError: the interpreter cannot start a server, or attached servers do not answer, refuse the key,
            or serve something else; all problems are listed.
    """
    if config.engine.kind != "sglang":
        return None
    if not config.engine.urls:
        return inspect_engine(config)
    records = attached_records(config)
    if model_dir is not None:
        asyncio.run(look_at_servers(lambda: records, Needs.of(model_dir, config)))
    return None
