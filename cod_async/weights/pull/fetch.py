"""The asking side, without files: which chunks to ask for when, and the connection that is asked over.

:class:`Fetcher` knows neither sockets nor clocks. It keeps a window of requests open, so that the link is
busy while the server's memory is bounded by what was asked for; whatever is lost, repeated or out of order
costs a repetition and nothing else. :class:`Upstream` is one connection at a time to wherever the server is
said to be, made anew when nothing has been heard for long.
"""

from __future__ import annotations

import logging
import random
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import zmq

from cod_async.errors import InputError, WireError
from cod_async.weights.pull.keys import ClientKeys, check_address, use_client_keys
from cod_async.weights.pull.protocol import (
    MAX_CHUNK_BYTES,
    MAX_REPLY_BYTES,
    ChunkKey,
    Reply,
    Request,
    decode_reply,
    encode,
)

log = logging.getLogger(__name__)

AddressSource = Callable[[], str | None]
DEFAULT_WINDOW = 8


@dataclass(frozen=True)
class Patience:
    """How long to wait for what, in seconds.

    Attributes:
        retry_s: silence after which open requests are sent again.
        reconnect_s: silence after which the address is looked up again and the connection made anew.
        max_reconnect_s: the latter at its longest; it doubles with every attempt.
        deadline_s: a pull without a single new chunk for so long fails.
    """

    retry_s: float = 2.0
    reconnect_s: float = 5.0
    max_reconnect_s: float = 20.0
    deadline_s: float = 60.0


class Fetcher:
    """Which chunks are wanted, which are asked for, and when to ask again.

    Args:
        window: most requests open at once.
        retry_s: see :class:`Patience`.
    """

    def __init__(self, window: int, retry_s: float) -> None:
        self._window = window
        self._retry_s = retry_s
        self._waiting: deque[ChunkKey] = deque()
        self._asked: dict[ChunkKey, float] = {}
        self._wanted: set[ChunkKey] = set()
        self._heard_s = 0.0

    @property
    def is_idle(self) -> bool:
        """Whether nothing is wanted."""
        return not self._wanted

    def want(self, key: ChunkKey, *, is_first: bool = False) -> None:
        """Ask for a chunk, once however often it is wanted."""
        if key in self._wanted:
            return
        self._wanted.add(key)
        if is_first:
            self._waiting.appendleft(key)
        else:
            self._waiting.append(key)

    def due(self, now: float) -> list[ChunkKey]:
        """Return what must be asked for now; the caller sends it or calls :meth:`unsent`."""
        overdue = [
            key
            for key, at in self._asked.items()
            if now - max(at, self._heard_s) >= self._retry_s or now - at >= 10 * self._retry_s
        ]
        keys = list(overdue)
        while self._waiting and len(self._asked) + len(keys) - len(overdue) < self._window:
            key = self._waiting.popleft()
            if key in self._wanted and key not in self._asked:
                keys.append(key)
        self._asked |= dict.fromkeys(keys, now)
        return keys

    def unsent(self, key: ChunkKey) -> None:
        """A request could not be sent; it stays wanted."""
        if self._asked.pop(key, None) is not None:
            self._waiting.appendleft(key)

    def arrived(self, key: ChunkKey, now: float) -> bool:
        """A good chunk came; return whether it was wanted (False: a repetition)."""
        self._heard_s = now
        self._asked.pop(key, None)
        if key not in self._wanted:
            return False
        self._wanted.discard(key)
        return True

    def failed(self, key: ChunkKey, now: float) -> None:
        """A damaged chunk came: ask again."""
        self._heard_s = now
        if key in self._wanted and self._asked.pop(key, None) is not None:
            self._waiting.appendleft(key)

    def put_off(self, key: ChunkKey, now: float) -> None:
        """The server asked for patience: ask again after ``retry_s``."""
        if key in self._asked:
            self._asked[key] = now
        self._heard_s = now

    def drop(self, key: ChunkKey) -> None:
        """A chunk is no longer wanted."""
        self._wanted.discard(key)
        self._asked.pop(key, None)

    def disconnected(self) -> None:
        """Open requests are lost with their connection; they are wanted first on the next."""
        self._waiting.extendleft(reversed(self._asked))
        self._asked.clear()


class Upstream:
    """The connection to a server, or none.

    Args:
        addresses: where the server is, None while it is nowhere; asked before every connection.
        keys: see :mod:`.keys`; needed for every address beyond loopback.
        patience: see there.

    Attributes:
        cause: why there is no answer, for error messages.
        num_connections: made so far.
    """

    def __init__(self, addresses: AddressSource, keys: ClientKeys | None, patience: Patience) -> None:
        self._addresses, self._keys, self._patience = addresses, keys, patience
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] | None = None
        self._address = ""
        self._heard_s: float | None = None
        self._look_s = 0.0
        self._wait_s = patience.reconnect_s
        self.cause = "the server has no address yet"
        self.num_connections = 0
        self.num_bad_replies = 0

    @property
    def socket(self) -> zmq.Socket[bytes] | None:
        """What to poll for answers."""
        return self._socket

    def turn(self, now: float, *, is_waiting: bool) -> bool:
        """Make or replace the connection if need be.

        Args:
            now: monotonic seconds.
            is_waiting: whether an answer is owed; a silent connection is fine otherwise.

        Returns:
            Whether the connection is another one: whatever was asked over the old one is lost.

        Raises:
            InputError: the address needs keys, or is none.
        """
        if self._socket is not None:
            if not is_waiting:
                self._heard_s = None
                return False
            if self._heard_s is None:
                self._heard_s = now
            if now - self._heard_s < self._wait_s:
                return False
            self.cause = f"no answer from {self._address} for {self._wait_s:.1f} s"
            self._wait_s = min(self._patience.max_reconnect_s, 2 * self._wait_s)
            self._disconnect()
        elif now < self._look_s:
            return False
        address = self._read_address()
        if address is None:
            self._look_s = now + random.uniform(0.1, 0.3)
            return False
        self._connect(address)
        self._heard_s = now
        return True

    def send(self, request: Request) -> bool:
        """Send a request; False if no connection stands or its queue is full."""
        if self._socket is None:
            return False
        try:
            self._socket.send(encode(request), zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def receive(self, now: float) -> tuple[Reply, bytes] | None:
        """Return the next answer that has come and its payload, None if there is none."""
        while self._socket is not None:
            try:
                parts = [self._socket.recv(zmq.NOBLOCK)]
            except zmq.Again:
                return None
            while self._socket.getsockopt(zmq.RCVMORE):
                part = self._socket.recv(zmq.NOBLOCK)
                if len(parts) <= 2:  # a message may not have more than two; the rest is thrown away
                    parts.append(part)
            try:
                reply = decode_reply(parts)
            except WireError as error:
                self.num_bad_replies += 1
                self.cause = f"{self._address} answers what this client does not understand: {error}"
                if self.num_bad_replies == 1:
                    log.warning("%s", self.cause)
                continue
            self._heard_s, self._wait_s = now, self._patience.reconnect_s
            return reply
        return None

    def poll(self, timeout_s: float) -> None:
        """Wait for an answer."""
        if self._socket is None:
            zmq.select([], [], [], timeout_s)
        else:
            self._socket.poll(max(0, round(1000 * timeout_s)))

    def close(self) -> None:
        """Give the connection up for good."""
        self._disconnect()
        self._context.term()

    def _read_address(self) -> str | None:
        try:
            address = self._addresses()
        except OSError:
            address = None
        if address is None:
            self.cause = "the server has no address; is `cod weights` running?"
        return address

    def _connect(self, address: str) -> None:
        check_address(address, "weights.pull_from", has_keys=self._keys is not None)
        zmq_socket = self._context.socket(zmq.DEALER)
        zmq_socket.setsockopt(zmq.LINGER, 0)
        zmq_socket.setsockopt(zmq.IMMEDIATE, 1)
        zmq_socket.setsockopt(zmq.RECONNECT_IVL, 100)
        zmq_socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        zmq_socket.setsockopt(zmq.MAXMSGSIZE, 2 * max(MAX_CHUNK_BYTES, MAX_REPLY_BYTES))
        zmq_socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        try:
            if self._keys is not None:
                use_client_keys(zmq_socket, self._keys)
            zmq_socket.connect(address)
        except zmq.ZMQError as error:
            zmq_socket.close()
            raise InputError(f"weights.pull_from: cannot connect to {address!r}: {error}") from None
        except InputError:
            zmq_socket.close()
            raise
        self._socket, self._address = zmq_socket, address
        self.num_connections += 1

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
