"""Which connection a client has: makes it, notices when it is dead or the coordinator moved, and makes the
next one.

A dead peer is found by silence: the coordinator answers every heartbeat. Short silence only makes the client
look whether the address changed; long silence gives the connection up. Attempts grow rarer and are jittered,
so that a hundred actors do not return in the same instant.
"""

from __future__ import annotations

import logging
import random
import socket
from collections.abc import Callable
from pathlib import Path
from select import select

from cod_async.config.schema import TransportConfig
from cod_async.errors import CodError
from cod_async.transport.file_pipe import FileClientPipe
from cod_async.transport.pipe import ClientPipe
from cod_async.transport.zmq_pipe import ZmqClientPipe
from cod_async.wire.session import ClientSession

log = logging.getLogger(__name__)

AddressSource = Callable[[], str | None]
FIRST_RETRY_S = 0.1
MAX_RETRY_S = 2.0


class Connector:
    """The connection of one client, or none. Used by the I/O thread only.

    Args:
        address_source: returns the coordinator's address, or None while there is none.
        config: limits and intervals.
    """

    def __init__(self, address_source: AddressSource, config: TransportConfig) -> None:
        self.pipe: ClientPipe | None = None
        self.num_connections = 0
        self._address_source = address_source
        self._config = config
        self._address = ""
        self._retry_s = FIRST_RETRY_S
        self._look_at = 0.0
        self._patience = 1.0

    def update(self, session: ClientSession, now: float) -> bool:
        """Make, keep or replace the connection; return True if it is a new one."""
        if session.state == "open":
            self._retry_s, self._patience = FIRST_RETRY_S, 1.0
        if self.pipe is not None:
            silence_s = session.silence_s(now)
            if silence_s <= 2 * session.heartbeat_s or now < self._look_at:
                return False
            self._look_at = now + session.heartbeat_s * random.uniform(0.75, 1.25)
            address = self._read_address()
            is_moved = address is not None and address != self._address
            if not is_moved and silence_s <= self._patience * session.session_timeout_s:
                return False
            log.info("no word from %s for %.1f s; connecting to %s", self._address, silence_s, address)
            self.close(0.0)
            session.disconnected()
            self._patience = min(4.0, self._patience * random.uniform(1.25, 1.75))
            self._look_at = now
        return self._connect(session, now)

    def deadline(self, now: float) -> float:
        """Return when to look again while there is no connection or it is silent."""
        return max(now + 0.01, self._look_at) if self.pipe is None else now + self._config.heartbeat_s

    def wait(self, wake: socket.socket, timeout_s: float) -> None:
        """Wait without a connection."""
        select([wake], [], [], max(0.0, timeout_s))

    def close(self, linger_s: float) -> None:
        """Give the connection up."""
        if self.pipe is not None:
            self.pipe.close(linger_s)
            self.pipe = None

    def _connect(self, session: ClientSession, now: float) -> bool:
        if now < self._look_at:
            return False
        address = self._read_address()
        if address is not None:
            try:
                self.pipe = self._open(address)
            except (CodError, OSError) as error:
                log.warning("cannot connect to the coordinator: %s", error)
        if self.pipe is None or address is None:
            self._look_at = now + self._retry_s * random.uniform(0.5, 1.5)
            self._retry_s = min(MAX_RETRY_S, 2 * self._retry_s)
            return False
        self._address = address
        self.num_connections += 1
        session.connected(now)
        return True

    def _open(self, address: str) -> ClientPipe:
        if address.startswith("file://"):
            return FileClientPipe(Path(address.removeprefix("file://")))
        return ZmqClientPipe(address, self._config.max_message_bytes)

    def _read_address(self) -> str | None:
        try:
            return self._address_source()
        except (OSError, ValueError, CodError):
            return None  # not written yet, or being replaced
