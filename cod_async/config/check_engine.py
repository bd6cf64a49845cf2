"""Rules on generation: what goes with which engine, servers that are attached or started, their time limits.

A part of :mod:`cod_async.config.check`, with the same kind of sentences. Asks no server; that is done when a
run starts, and by ``cod doctor``.
"""

from __future__ import annotations

import ipaddress
import os
import re
import shutil
import sys
from collections.abc import Iterator
from urllib.parse import urlsplit

import msgspec

from cod_async.config.schema import Config, EngineConfig, ServerConfig
from cod_async.loopback import is_loopback

Problems = Iterator[str]

OWN_ARGUMENTS = {
    "--model-path": "model.path",
    "--model": "model.path",
    "--tokenizer-path": "model.path",
    "--weight-version": "the run's policy versions",
    "--host": "engine.server.host",
    "--port": "the launcher, which takes a free one",
    "--api-key": "the launcher, which draws one (and a command line is no place for it)",
    "--admin-api-key": "the launcher, which draws one (and a command line is no place for it)",
    "--config": "the launcher, whose file holds the keys",
}
"""Arguments of a started server that this project sets itself, and what decides them."""
_HOST = re.compile(r"^[A-Za-z0-9]([A-Za-z0-9.-]{0,251}[A-Za-z0-9])?$")
_ATTACHED_ONLY = ("api_key_env", "admin_key_env")
_STARTED_ONLY = ("num_servers", "host", "args", "start_timeout_s")


def engine_problems(config: Config, *, for_train: bool) -> Problems:
    """List what is wrong with ``engine`` and with how weights get into it.

    Args:
        config: the configuration.
        for_train: servers will be used, so interpreter and keys must be there.
    """
    if config.engine.kind == "embedded":
        yield from _embedded(config)
        return
    yield from _sglang(config)
    if config.engine.urls:
        yield from _attached(config, for_train=for_train)
    else:
        yield from _started(config, for_train=for_train)


def find_python(python: str) -> str | None:
    """Return the absolute path of ``engine.python`` (empty: this interpreter), None if it cannot be executed.

    Links are kept as they are: the name of the link is what makes an environment.
    """
    if not python:
        return sys.executable
    found = shutil.which(os.path.expanduser(python))
    return None if found is None else os.path.abspath(found)


def _changed(section: msgspec.Struct, names: tuple[str, ...]) -> list[str]:
    """Return those of the fields that do not have their default value."""
    default = type(section)()
    return [name for name in names if getattr(section, name) != getattr(default, name)]


def _embedded(config: Config) -> Problems:
    engine, weights = config.engine, config.weights
    why = 'has no effect with engine.kind = "embedded"; remove it, or use "sglang"'
    if engine.urls:
        yield f'engine.urls: {len(engine.urls)} given, but engine.kind = "embedded" uses none; remove them'
    for name in _changed(engine, ("python", "max_reprefill_frac")):
        yield f"engine.{name}: {why}"
    for name in _changed(engine.server, ServerConfig.__struct_fields__):
        yield f"engine.server.{name}: {why}"
    if weights.into_engine != "disk":
        yield f'weights.into_engine: "{weights.into_engine}" {why}'


def _sglang(config: Config) -> Problems:
    engine, num_actors = config.engine, config.actors.num_processes
    if engine.is_batch_invariant:
        yield (
            "engine.is_batch_invariant: SGLang's batches change results in the last digits; remove it, or "
            'use engine.kind = "embedded"'
        )
    num_servers = len(engine.urls) or engine.server.num_servers
    if num_servers < num_actors:
        path = "engine.urls" if engine.urls else "engine.server.num_servers"
        yield (
            f"{path}: {num_servers} servers for actors.num_processes = {num_actors}, each of which drives "
            "its own; use as many at least, or fewer actors"
        )
    yield from _times(engine)


def _times(engine: EngineConfig) -> Problems:
    server = engine.server
    limits = [
        ("stall_timeout_s", "request_timeout_s", "so a stalled completion would never be noticed"),
        ("probe_timeout_s", "stall_timeout_s", "so completions would be given up before a probe fails"),
        ("connect_timeout_s", "down_timeout_s", "so a request would fail before it has tried to connect"),
    ]
    if not engine.urls:
        reason = "so requests would fail while a dead server is being started again"
        limits.append(("start_timeout_s", "down_timeout_s", reason))
    for shorter, longer, reason in limits:
        low, high = getattr(server, shorter), getattr(server, longer)
        if low > high:
            yield (
                f"engine.server.{shorter}: {low:g} is longer than engine.server.{longer} = {high:g}, "
                f"{reason}; lower the first or raise the second"
            )


def _started(config: Config, *, for_train: bool) -> Problems:
    engine, server = config.engine, config.engine.server
    for name in _changed(server, _ATTACHED_ONLY):
        yield (
            f"engine.server.{name}: has no effect without engine.urls, started servers get keys of their "
            "own; remove it"
        )
    host = server.host.removeprefix("[").removesuffix("]")
    if not (_is_address(host) or _HOST.match(host)):
        yield f'engine.server.host: not an address, found "{server.host}"; write 127.0.0.1'
    for argument in server.args:
        name = argument.split("=", 1)[0].strip()
        if name in OWN_ARGUMENTS:
            yield f'engine.server.args: "{name}" is set by {OWN_ARGUMENTS[name]}; remove it'
    if for_train and find_python(engine.python) is None:
        yield (
            f'engine.python: "{engine.python}" cannot be executed; give the interpreter of an environment '
            "with sglang (`make sglang-env` makes one for a CPU)"
        )


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def _attached(config: Config, *, for_train: bool) -> Problems:
    engine, server = config.engine, config.engine.server
    for name in _changed(engine, ("python",)):
        yield f"engine.{name}: has no effect with engine.urls, nothing is started; remove one of them"
    for name in _changed(server, _STARTED_ONLY):
        yield f"engine.server.{name}: has no effect with engine.urls, nothing is started; remove one of them"
    hosts: list[str] = []
    seen: set[str] = set()
    for index, url in enumerate(engine.urls):
        host = server_host(url)
        if host is None:
            yield f'engine.urls.{index}: not a server, found "{_shown(url)}"; write http://HOST:PORT'
            continue
        if url.lower() in seen:
            yield f"engine.urls.{index}: {url} is given twice; remove one"
        seen.add(url.lower())
        hosts.append(host)
    far = [host for host in hosts if not is_loopback(host)]
    if far and not server.api_key_env:
        yield (
            f"engine.server.api_key_env: empty, but {far[0]} is another machine, where anybody may send "
            "requests and weights to a server without a key; start it with --api-key and name the variable "
            "that holds it"
        )
    if far and config.weights.into_engine == "ipc":
        yield f'weights.into_engine: "ipc" works on one host only, and {far[0]} is another; use "group"'
    if server.admin_key_env and not server.api_key_env:
        yield "engine.server.admin_key_env: given without engine.server.api_key_env; give both"
    for name in _ATTACHED_ONLY if for_train else ():
        variable = getattr(server, name)
        if variable and not os.environ.get(variable):
            yield f'engine.server.{name}: the environment variable "{variable}" is not set; set it'


def server_host(url: str) -> str | None:
    """Return the host of ``http(s)://HOST:PORT``, None for anything else."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        return None
    host = parts.hostname
    is_plain = not (parts.path or parts.query or parts.fragment or "@" in parts.netloc)
    if parts.scheme not in ("http", "https") or not is_plain or not host or not port or url != url.strip():
        return None
    return host if _is_address(host) or _HOST.match(host) else None


def _shown(url: str) -> str:
    """Return a URL as it may be shown: without a password somebody put into it."""
    return re.sub(r"//[^/@]*@", "//***@", url)
