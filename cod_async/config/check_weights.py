"""Rules on how published weights get to actors.

A part of :mod:`cod_async.config.check`, with the same kind of sentences. A run has no keys of its own, so its
weight server and its actors stay on loopback. Other machines are reached by relays (``cod weights --from``),
which are started by hand and given keys there.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from cod_async.config.schema import Config, WeightsConfig
from cod_async.loopback import is_loopback

_ADDRESS = re.compile(r"tcp://(?P<host>\[[0-9a-fA-F:.]+\]|[^:\[\]/\s]+):(?P<port>[0-9]{1,5})")
_NO_KEYS = "leaves this machine, which needs keys, and a run has none yet: only `cod weights` is given any"


def weights_problems(config: Config) -> Iterator[str]:
    """List what is wrong with ``weights.source`` and what goes with it."""
    weights = config.weights
    if weights.source == "pull":
        yield from _address(
            "weights.serve",
            weights.serve,
            "use tcp://127.0.0.1:0, and relay it to other machines by `cod weights --from … --server-key …`",
        )
        if weights.pull_from:
            yield from _address(
                "weights.pull_from",
                weights.pull_from,
                "start `cod weights --from … --client-key …` on the actor's host and give its own address",
                is_target=True,
            )
        return
    default = WeightsConfig()
    for name in ("serve", "pull_from", "cache_dir", "has_deltas"):
        if getattr(weights, name) != getattr(default, name):
            yield f'weights.{name}: has no effect with weights.source = "folder"; remove it, or use "pull"'


def _address(path: str, address: str, advice: str, *, is_target: bool = False) -> Iterator[str]:
    """Say what is wrong with an address to listen on or, as a target, to connect to."""
    match = _ADDRESS.fullmatch(address)
    if match is None or int(match["port"]) > 65535:
        yield f'{path}: not an address, found "{address}"; write tcp://HOST:PORT'
    elif not is_loopback(match["host"].strip("[]")):
        yield f'{path}: "{address}" {_NO_KEYS}; {advice}'
    elif is_target and int(match["port"]) == 0:
        yield f'{path}: "{address}" names no port; give the one that the relay says it listens on'
