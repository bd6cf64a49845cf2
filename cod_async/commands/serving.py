"""``cod weights``: the weight server of a run, or a relay of one.

The process serves until it gets SIGTERM or SIGINT. Where it listens is in ``weights_server.json``, in the run
folder or in the relay's cache; after a restart it takes the same port if it is still free.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

from cod_async.config.load import load_resolved
from cod_async.errors import InputError

if TYPE_CHECKING:
    from cod_async.weights.pull.server import Source

DEFAULT_BIND = "tcp://127.0.0.1:0"
DEFAULT_KEEP_VERSIONS = 2

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServingRequest:
    """What the command line asks for; paths of keys as in :mod:`cod_async.weights.pull.keys`.

    Attributes:
        run: run folder to serve; None for a relay.
        upstream: with a relay, the address of the server to relay.
        cache: with a relay, the folder of its files.
        bind: address to listen on; None: ``weights.serve`` of the run, or a free port on loopback.
        keep_versions: versions that a relay keeps on disk.
        server_key: secret key file of this server; needed beyond loopback.
        authorized_keys: folder with the public keys of the clients that are let in.
        client_key: with a relay, its own secret key file towards ``upstream``.
        upstream_key: with a relay, the public key file of ``upstream``.
    """

    run: Path | None = None
    upstream: str | None = None
    cache: Path | None = None
    bind: str | None = None
    keep_versions: int = DEFAULT_KEEP_VERSIONS
    server_key: Path | None = None
    authorized_keys: Path | None = None
    client_key: Path | None = None
    upstream_key: Path | None = None


def run_weights(request: ServingRequest) -> int:
    """Serve until told to stop; return the exit code.

    Raises:
        InputError: flags that do not go together, an address that is taken or needs keys, a bad key file, a
            cache that another process uses.
    """
    problems = _problems(request)
    if problems:
        raise InputError(problems)
    from cod_async.weights.pull.keys import ServerKeys
    from cod_async.weights.pull.server import WeightServer, read_server_address, write_server_address

    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    should_stop = _until_signal()
    keys = None
    if request.server_key is not None and request.authorized_keys is not None:
        keys = ServerKeys(request.server_key, request.authorized_keys)
    source: Source
    if request.run is not None:
        home, default_bind = request.run, load_resolved(request.run).weights.serve
        source = _folder_source(request.run)
    elif request.upstream is not None and request.cache is not None:
        home, default_bind = request.cache, DEFAULT_BIND
        source = _relay_source(request, request.upstream, request.cache)
    else:
        raise AssertionError("the problems above cover this")
    bind = request.bind or default_bind
    try:
        server = WeightServer(source, bind, keys=keys, preferred=read_server_address(home))
    except InputError:
        source.close()
        raise
    try:
        # Actors read their run's, and have no keys for a server that asks for them.
        if keys is None or request.run is None:
            write_server_address(home, server.address, os.getpid())
        log.info("weights are served at %s", server.address)
        server.serve(should_stop)
    finally:
        log.info("served %s", dict(server.counters))
        server.close()
    return 0


def _problems(request: ServingRequest) -> list[str]:
    problems = []
    if (request.run is None) == (request.upstream is None):
        problems.append("give either RUN, to serve a run's weights, or --from ADDRESS, to relay a server's")
    if request.upstream is not None and request.cache is None:
        problems.append("--from needs --cache, a folder for the relay's files")
    if request.run is not None and request.cache is not None:
        problems.append("--cache goes with --from; a run is served from its own folder")
    if request.keep_versions < 1:
        problems.append(f"--keep {request.keep_versions}: at least one version must be kept")
    if (request.server_key is None) != (request.authorized_keys is None):
        problems.append("--server-key and --authorized-keys go together")
    if (request.client_key is None) != (request.upstream_key is None):
        problems.append("--client-key and --from-key go together")
    if request.upstream is None and request.client_key is not None:
        problems.append("--client-key goes with --from")
    return problems


def _folder_source(run: Path) -> Source:
    from cod_async.weights.pull.folder_source import FolderSource

    return FolderSource(run, load_resolved(run).run.name)


def _relay_source(request: ServingRequest, upstream: str, cache: Path) -> Source:
    from cod_async.weights.pull.cache import PullCache
    from cod_async.weights.pull.keys import ClientKeys, check_address
    from cod_async.weights.pull.relay import RelaySource

    keys = None
    if request.client_key is not None and request.upstream_key is not None:
        keys = ClientKeys(request.client_key, request.upstream_key)
    check_address(upstream, "--from", has_keys=keys is not None)
    return RelaySource(PullCache(cache, request.keep_versions), lambda: upstream, keys=keys)


def _until_signal() -> Callable[[], bool]:
    """Return a function that says whether SIGTERM or SIGINT has come."""
    is_stopped = False

    def stop(number: int, frame: FrameType | None) -> None:
        nonlocal is_stopped
        is_stopped = True

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    return lambda: is_stopped
