"""The pipes over ZMQ: a DEALER for each client, one ROUTER for the coordinator.

Queues inside ZMQ are only a means of transport: nothing in them counts as delivered. The DEALER queues only
onto finished connections, the ROUTER reports unknown peers instead of dropping silently, and both refuse
frames far beyond the limit before they are assembled; frames a little beyond it are let through, so that the
codec can refuse them by name.
"""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Sequence

import zmq

from cod_async.errors import InputError
from cod_async.transport.pipe import Delivery, check_bind_address, is_port_free_choice

log = logging.getLogger(__name__)

NUM_PARTS = 2


class ZmqClientPipe:
    """A DEALER connected to ``address``.

    Args:
        address: ``tcp://host:port`` or ``ipc://path``.
        max_message_bytes: limit of a body; ZMQ itself cuts the connection at twice as much.

    Raises:
        InputError: not an address.
    """

    def __init__(self, address: str, max_message_bytes: int) -> None:
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 100)
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 2000)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 2 * max_message_bytes)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        try:
            self._socket.connect(address)
        except zmq.ZMQError as error:
            self.close(0.0)
            raise InputError(f"cannot connect to {address!r}: {error}") from None

    def send(self, parts: Sequence[bytes]) -> bool:
        """Send one message; False if no connection stands or its queue is full."""
        try:
            self._socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.Again:
            return False
        return True

    def recv(self) -> list[bytes] | None:
        """Return the next message's frames, or None."""
        try:
            return _receive_bounded(self._socket)
        except zmq.Again:
            return None

    def wait(self, wake: socket.socket, timeout_s: float, *, wants_to_send: bool) -> None:
        """Return when a message came, ``wake`` is readable, sending is possible (if wanted), or time's up."""
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN | (zmq.POLLOUT if wants_to_send else 0))
        poller.register(wake.fileno(), zmq.POLLIN)
        poller.poll(max(0, round(timeout_s * 1000)))

    def close(self, linger_s: float) -> None:
        """Close; what was sent may still leave for ``linger_s``."""
        self._socket.close(round(linger_s * 1000))
        self._context.term()


class ZmqServerPipe:
    """A ROUTER bound to ``bind``.

    Args:
        bind: address to listen on; port 0 takes a free one.
        max_message_bytes: limit of a body.
        queue_messages: most messages waiting per client in either direction.
        preferred: address of an earlier process of this run, tried first when the port is free to choose.
        bind_wait_s: how long to try when the address is busy (the earlier process may still be dying).

    Raises:
        InputError: the address is busy, malformed, or not loopback.
    """

    def __init__(
        self,
        bind: str,
        *,
        max_message_bytes: int,
        queue_messages: int,
        preferred: str | None,
        bind_wait_s: float,
    ) -> None:
        check_bind_address(bind)
        if preferred is not None:
            check_bind_address(preferred)
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 2 * max_message_bytes)
        self._socket.setsockopt(zmq.RCVHWM, queue_messages)
        self._socket.setsockopt(zmq.SNDHWM, queue_messages)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        try:
            self._bind(bind, preferred, bind_wait_s)
        except InputError:
            self.close(0.0)
            raise
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def _bind(self, bind: str, preferred: str | None, bind_wait_s: float) -> None:
        address = preferred if preferred is not None and is_port_free_choice(bind) else bind
        give_up_at = time.monotonic() + bind_wait_s
        while True:
            try:
                self._socket.bind(address.replace(":0", ":*") if address.endswith(":0") else address)
                return
            except zmq.ZMQError as error:
                if error.errno == zmq.EADDRINUSE and time.monotonic() < give_up_at:
                    time.sleep(0.05)
                elif address != bind:
                    log.warning(
                        "address %s of the earlier process is taken (%s); taking a new port", address, error
                    )
                    address = bind
                else:
                    raise InputError(
                        f"cannot listen on {bind!r}: {error}; free it or set transport.bind"
                    ) from None

    def send(self, client_id: bytes, parts: Sequence[bytes]) -> Delivery:
        """Send to one connection: ``sent``, ``full`` (its queue is) or ``gone`` (the connection is)."""
        try:
            self._socket.send_multipart([client_id, *parts], zmq.NOBLOCK)
        except zmq.Again:
            return "full"
        except zmq.ZMQError as error:
            if error.errno == zmq.EHOSTUNREACH:
                return "gone"
            raise
        return "sent"

    def recv(self) -> tuple[bytes, list[bytes]] | None:
        """Return (routing id, frames) of the next message, or None."""
        try:
            client_id = self._socket.recv(zmq.NOBLOCK)
        except zmq.Again:
            return None
        return client_id, _receive_bounded(self._socket) if self._socket.getsockopt(zmq.RCVMORE) else []

    def wait(self, timeout_s: float) -> None:
        """Return when a message came or time is up."""
        self._socket.poll(max(0, round(timeout_s * 1000)))

    def close(self, linger_s: float) -> None:
        """Stop listening; replies that were sent may still leave for ``linger_s``."""
        self._socket.close(round(linger_s * 1000))
        self._context.term()


def _receive_bounded(zmq_socket: zmq.Socket[bytes]) -> list[bytes]:
    """Return a message's frames, keeping at most one more than a message has: the rest is read and thrown
    away.

    ZMQ's own size limit is per frame, so a message of ten thousand frames passes it.
    """
    parts: list[bytes] = [zmq_socket.recv(zmq.NOBLOCK)]
    while zmq_socket.getsockopt(zmq.RCVMORE):
        part = zmq_socket.recv(zmq.NOBLOCK)
        if len(parts) <= NUM_PARTS:
            parts.append(part)
    return parts
