"""What a link needs of a transport: move two frames to a peer, soon or not at all, and say which.

The links know the protocol and nothing of sockets; a pipe knows its medium and nothing of the protocol. There
are two media: ZMQ (``tcp://``, ``ipc://``) and a folder of files (``file://``) that can be read and replayed
by hand.
"""

from __future__ import annotations

import re
import socket
from collections.abc import Sequence
from typing import Literal, Protocol

from cod_async.errors import InputError
from cod_async.loopback import is_loopback

Delivery = Literal["sent", "full", "gone"]


class ClientPipe(Protocol):
    """A client's connection to one address; used by one thread."""

    def send(self, parts: Sequence[bytes]) -> bool:
        """Send one message; False if it cannot be taken now."""

    def recv(self) -> list[bytes] | None:
        """Return the next message's frames, or None."""

    def wait(self, wake: socket.socket, timeout_s: float, *, wants_to_send: bool) -> None:
        """Return when a message came, ``wake`` is readable, sending is possible (if wanted), or time's up."""

    def close(self, linger_s: float) -> None:
        """Give the connection up; what was sent may still leave for ``linger_s``."""


class ServerPipe(Protocol):
    """The coordinator's end; used by one thread."""

    address: str

    def send(self, client_id: bytes, parts: Sequence[bytes]) -> Delivery:
        """Send to one connection: ``sent``, ``full`` (its queue is) or ``gone`` (the connection is)."""

    def recv(self) -> tuple[bytes, list[bytes]] | None:
        """Return (routing id, frames) of the next message, or None."""

    def wait(self, timeout_s: float) -> None:
        """Return when a message came or time is up."""

    def close(self, linger_s: float) -> None:
        """Stop listening."""


def check_bind_address(bind: str) -> None:
    """Refuse addresses that this version must not or cannot listen on.

    Raises:
        InputError: not ``tcp://host:port``, ``ipc://path`` or ``file:///folder``; or a host other than
            loopback, which needs keys that this version does not have.
    """
    if bind.startswith(("ipc://", "file:///")):
        return
    match = re.fullmatch(r"tcp://(\[[0-9a-fA-F:.]+\]|[^:\[\]/]+):([0-9]{1,5}|\*)", bind)
    if match is None or (match[2] != "*" and int(match[2]) > 65535):
        raise InputError(
            f"transport.bind {bind!r} is not an address; write tcp://127.0.0.1:0 for a free port"
        )
    if not is_loopback(match[1].strip("[]")):
        raise InputError(
            f"transport.bind {bind!r} is reachable from other machines, which needs keys; "
            "bind to tcp://127.0.0.1:0"
        )


def is_port_free_choice(bind: str) -> bool:
    """Whether the address leaves the choice of the port to the system."""
    return bind.endswith((":0", ":*"))
