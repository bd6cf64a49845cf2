"""The weight server: one thread, one ROUTER, and a source that it gets the files from.

Clients are served in turn, one chunk each, so that nobody waits for another's whole file. A client may have
``MAX_OPEN`` requests open; more are refused as ``busy``. What ZMQ holds for clients that do not read is
bounded: each may have its share of ``budget_bytes`` under way, and at least one chunk; further chunks are not
even read from disk. Chunks read lately are kept, so that clients that pull the same version one behind the
other cost one read and one hash.

A source may answer later (a relay has to ask first): such requests are set aside under what they wait for,
and forgotten after a while, because clients ask again.
"""

from __future__ import annotations

import logging
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import msgspec
import zmq

from cod_async.durable import write_atomic
from cod_async.errors import InputError, WireError
from cod_async.weights.pull.keys import Doorkeeper, ServerKeys, check_address
from cod_async.weights.pull.protocol import (
    MAX_REQUEST_BYTES,
    AskChunk,
    AskDigests,
    AskFiles,
    Chunk,
    Digests,
    Files,
    Refusal,
    Request,
    decode_request,
    encode,
)

log = logging.getLogger(__name__)

ADDRESS_NAME = "weights_server.json"
MAX_OPEN = 64
MAX_CLIENTS = 1024
MAX_UNDER_WAY = 8
"""Most chunks that ZMQ holds for one client."""
DEFAULT_BUDGET_BYTES = 256 << 20
DEFAULT_KEPT_BYTES = 64 << 20
SET_ASIDE_S = 30.0
_MAX_RECEIVED_PER_TURN = 512
_REFUSAL_LOG_S = 10.0
_FULL_POLL_S = 0.005
_BIND_WAIT_S = 5.0


class Later(NamedTuple):
    """A source's answer: not yet; ask again when ``key`` has been told by :meth:`Source.turn`."""

    key: Hashable


class Source(Protocol):
    """Where a server's files come from. Its methods never block for long and raise WireError to refuse."""

    @property
    def cause(self) -> str:
        """Why an answer may be late, for the clients that wait for it."""
        ...

    def files(self, ask: AskFiles) -> Files | Later:
        """Return the files of a version."""
        ...

    def chunk(self, ask: AskChunk) -> tuple[bytes, bytes] | Later:
        """Return (bytes, SHA-256) of a chunk."""
        ...

    def digests(self, ask: AskDigests) -> bytes | Later:
        """Return the SHA-256 of chunks as they are now, one after the other."""
        ...

    def turn(self, now: float) -> list[Hashable]:
        """Do what is due; return the keys of which an answer has come."""
        ...

    @property
    def socket(self) -> zmq.Socket[bytes] | None:
        """What to poll besides the clients, None for nothing."""
        ...

    def close(self) -> None:
        """Let go of everything."""
        ...


class ServerAddress(msgspec.Struct, frozen=True):
    """What ``weights_server.json`` says: where the weight server of the run listens."""

    address: str
    pid: int


def write_server_address(folder: Path, address: str, pid: int) -> None:
    """Say durably where the server of this run (or relay) listens."""
    write_atomic(folder / ADDRESS_NAME, msgspec.json.encode(ServerAddress(address, pid)) + b"\n")


def read_server_address(folder: Path) -> str | None:
    """Return where the server listens, or None while it has not said so."""
    try:
        return msgspec.json.decode((folder / ADDRESS_NAME).read_bytes(), type=ServerAddress).address
    except (OSError, msgspec.MsgspecError, UnicodeDecodeError):
        return None


class _Client:
    """One connection: requests that wait, requests set aside, and chunks that ZMQ still holds."""

    def __init__(self) -> None:
        self.ready: OrderedDict[Request, None] = OrderedDict()
        self.aside: dict[Request, float] = {}
        self.under_way: deque[zmq.MessageTracker] = deque()

    @property
    def is_idle(self) -> bool:
        return not self.ready and not self.aside and not self.num_under_way()

    def num_under_way(self) -> int:
        while self.under_way and self.under_way[0].done:
            self.under_way.popleft()
        return len(self.under_way)


class WeightServer:
    """Serves the files of a source.

    Args:
        source: the files; closed with the server.
        bind: ``tcp://host:port`` (port 0: a free one) or ``ipc://path``.
        keys: needed for every address beyond loopback.
        preferred: address of an earlier process, tried first when the port is free to choose.
        budget_bytes: most bytes that ZMQ may hold for all clients together; one chunk per client is always
            allowed.
        kept_bytes: most bytes of chunks kept for clients that ask for the same ones.
        clock: monotonic seconds.

    Attributes:
        address: where it listens.
        counters: ``requests``, ``chunks``, ``bytes`` sent, ``reads`` from the source, and refusals by code.

    Raises:
        InputError: the address is busy, malformed, or beyond loopback without keys; or a key file is bad.
    """

    def __init__(
        self,
        source: Source,
        bind: str,
        *,
        keys: ServerKeys | None = None,
        preferred: str | None = None,
        budget_bytes: int = DEFAULT_BUDGET_BYTES,
        kept_bytes: int = DEFAULT_KEPT_BYTES,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        check_address(bind, "address", has_keys=keys is not None)
        self._source, self._clock = source, clock
        self._budget_bytes, self._kept_bytes = budget_bytes, kept_bytes
        self._clients: OrderedDict[bytes, _Client] = OrderedDict()
        self._waiting: dict[Hashable, list[tuple[bytes, Request]]] = {}
        self._kept: OrderedDict[AskChunk, tuple[bytes, bytes]] = OrderedDict()
        self._num_kept_bytes = 0
        self._logged_s: dict[str, float] = {}
        self._swept_s = clock()
        self.counters: Counter[str] = Counter()
        self._context: zmq.Context[Any] = zmq.Context()
        self._socket: zmq.Socket[bytes] = self._context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.setsockopt(zmq.MAXMSGSIZE, 16 * MAX_REQUEST_BYTES)
        self._socket.setsockopt(zmq.RCVHWM, MAX_OPEN)
        self._socket.setsockopt(zmq.SNDHWM, 2 * MAX_OPEN)
        self._socket.setsockopt(zmq.TCP_KEEPALIVE, 1)
        self._doorkeeper: Doorkeeper | None = None
        try:
            if keys is not None:
                self._doorkeeper = Doorkeeper(self._context, self._socket, keys)
            self._bind(bind, preferred)
        except InputError:
            self.close()
            raise
        self.address: str = self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def serve(self, should_stop: Callable[[], bool]) -> None:
        """Serve until ``should_stop`` says so."""
        while not should_stop():
            self.turn(0.2)

    def turn(self, timeout_s: float) -> None:
        """Take requests in, wait for some if there is nothing to do, and answer one of each client."""
        is_blocked = self._answer_all()
        can_work = any(client.ready for client in self._clients.values())
        self._wait(_FULL_POLL_S if is_blocked and can_work else 0.0 if can_work else timeout_s)
        self._receive()
        for key in self._source.turn(self._clock()):
            self._wake(key)
        self._sweep()

    def close(self) -> None:
        """Stop listening."""
        self._socket.close()
        if self._doorkeeper is not None:
            self._doorkeeper.close()
        self._context.term()
        self._source.close()

    # ----------------------------------------------------------------------------------------------- requests

    def _bind(self, bind: str, preferred: str | None) -> None:
        is_free_choice = bind.endswith((":0", ":*"))
        give_up_s = time.monotonic() + _BIND_WAIT_S
        if (
            is_free_choice
            and preferred is not None
            and preferred.rpartition(":")[0] == bind.rpartition(":")[0]
        ):
            try:
                self._socket.bind(preferred)
                return
            except zmq.ZMQError as error:
                log.warning("address %s of the earlier process is taken (%s); a new port", preferred, error)
        while True:
            try:
                self._socket.bind(bind.removesuffix("0") + "*" if bind.endswith(":0") else bind)
                return
            except zmq.ZMQError as error:
                if error.errno != zmq.EADDRINUSE or time.monotonic() > give_up_s:
                    raise InputError(f"cannot listen on {bind!r}: {error}; choose another address") from None
                time.sleep(0.05)  # the earlier process may still be dying

    def _wait(self, timeout_s: float) -> None:
        poller = zmq.Poller()
        poller.register(self._socket, zmq.POLLIN)
        if self._source.socket is not None:
            poller.register(self._source.socket, zmq.POLLIN)
        poller.poll(max(0, round(1000 * timeout_s)))

    def _receive(self) -> None:
        for _ in range(_MAX_RECEIVED_PER_TURN):
            try:
                client_id = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                return
            parts: list[bytes] = []
            while self._socket.getsockopt(zmq.RCVMORE):
                part = self._socket.recv(zmq.NOBLOCK)
                if len(parts) < 2:  # requests have one; the rest is thrown away
                    parts.append(part)
            self.counters["requests"] += 1
            try:
                self._take(client_id, decode_request(parts))
            except WireError as error:
                self._refuse(client_id, error, None)

    def _take(self, client_id: bytes, request: Request) -> None:
        """Queue a request; the same one again is the same one."""
        client = self._clients.get(client_id)
        if client is None:
            if len(self._clients) >= MAX_CLIENTS:
                self._refuse(client_id, WireError("busy", f"{MAX_CLIENTS} clients are being served"), request)
                return
            client = self._clients[client_id] = _Client()
        if request in client.ready or request in client.aside:
            return
        if len(client.ready) + len(client.aside) >= MAX_OPEN:
            self._refuse(client_id, WireError("busy", f"{MAX_OPEN} requests of yours are open"), request)
            return
        client.ready[request] = None

    # ------------------------------------------------------------------------------------------------ answers

    def _answer_all(self) -> bool:
        """Answer one request of every client that can take an answer; return whether any one cannot."""
        is_blocked = False
        num_allowed = self._num_allowed()
        for client_id, client in list(self._clients.items()):
            if not client.ready:
                continue
            if client.num_under_way() >= num_allowed:
                is_blocked = True
                continue
            request = next(iter(client.ready))
            if not self._answer(client_id, client, request):
                is_blocked = True
        return is_blocked

    def _num_allowed(self) -> int:
        """Return how many chunks ZMQ may hold for each client."""
        num_active = sum(not client.is_idle for client in self._clients.values())
        largest = max((len(data) for data, _ in self._kept.values()), default=1)
        return max(1, min(MAX_UNDER_WAY, self._budget_bytes // (largest * max(1, num_active))))

    def _answer(self, client_id: bytes, client: _Client, request: Request) -> bool:
        """Answer one request or set it aside; return False if it cannot be sent now."""
        payload: bytes | None = None
        reply: Files | Chunk | Digests
        try:
            answer = self._ask_source(request)
        except WireError as error:
            del client.ready[request]
            self._refuse(client_id, error, request)
            return True
        if isinstance(answer, Later):
            del client.ready[request]
            client.aside[request] = self._clock()
            self._waiting.setdefault(answer.key, []).append((client_id, request))
            return True
        match request, answer:
            case AskChunk(), (bytes() as payload, bytes() as digest):
                reply = Chunk(request.version, request.file, request.offset, digest)
            case AskDigests(), bytes() as digests:
                reply = Digests(request.version, request.file, request.first, digests)
            case _, Files() as reply:
                pass
            case _:
                raise TypeError(f"a source answered {type(request).__name__} with {type(answer).__name__}")
        try:
            if payload is None:
                self._socket.send_multipart([client_id, encode(reply)], zmq.NOBLOCK)
            else:
                self._socket.send_multipart([client_id, encode(reply)], zmq.NOBLOCK | zmq.SNDMORE)
                tracker = self._socket.send(payload, zmq.NOBLOCK, copy=False, track=True)
                client.under_way.append(tracker)
                self.counters["chunks"] += 1
                self.counters["bytes"] += len(payload)
        except zmq.Again:
            return False
        except zmq.ZMQError as error:
            if error.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(client_id)
            return True
        del client.ready[request]
        return True

    def _ask_source(self, request: Request) -> Files | bytes | tuple[bytes, bytes] | Later:
        match request:
            case AskFiles():
                return self._source.files(request)
            case AskDigests():  # somebody has found damage: whatever is kept of this file may be it
                for ask in [ask for ask in self._kept if _is_same_file(ask, request)]:
                    self._num_kept_bytes -= len(self._kept.pop(ask)[0])
                return self._source.digests(request)
        kept = self._kept.get(request)
        if kept is not None:
            self._kept.move_to_end(request)
            return kept
        answer = self._source.chunk(request)
        if not isinstance(answer, Later):
            self.counters["reads"] += 1
            self._kept[request] = answer
            self._num_kept_bytes += len(answer[0])
            while self._num_kept_bytes > self._kept_bytes and len(self._kept) > 1:
                self._num_kept_bytes -= len(self._kept.popitem(last=False)[1][0])
        return answer

    def _refuse(self, client_id: bytes, error: WireError, about: Request | None) -> None:
        self.counters[f"refused_{error.code}"] += 1
        now = self._clock()
        if now - self._logged_s.get(error.code, float("-inf")) >= _REFUSAL_LOG_S:
            self._logged_s[error.code] = now
            num_refused = self.counters[f"refused_{error.code}"]
            log.warning("refused a request of client %s: %s (%d so far)", client_id.hex(), error, num_refused)
        try:
            refusal = Refusal(error.code, error.detail[:1000], about)
            self._socket.send_multipart([client_id, encode(refusal)], zmq.NOBLOCK)
        except zmq.Again:
            pass  # it does not read, so it does not miss this either; it will ask again
        except zmq.ZMQError as gone:
            if gone.errno != zmq.EHOSTUNREACH:
                raise
            self._forget(client_id)

    def _wake(self, key: Hashable) -> None:
        """An answer has come: the requests that wait for it are next."""
        for client_id, request in self._waiting.pop(key, []):
            client = self._clients.get(client_id)
            if client is not None and client.aside.pop(request, None) is not None:
                client.ready[request] = None
                client.ready.move_to_end(request, last=False)

    def _forget(self, client_id: bytes) -> None:
        self._clients.pop(client_id, None)

    def _sweep(self) -> None:
        """Now and then forget clients that want nothing, and requests that have waited for too long."""
        now = self._clock()
        if now - self._swept_s < 1.0:
            return
        self._swept_s = now
        for client_id, client in list(self._clients.items()):
            for request, since_s in list(client.aside.items()):
                if now - since_s > SET_ASIDE_S:
                    del client.aside[request]
                    self._refuse(client_id, WireError("upstream", self._source.cause), request)
            if client.is_idle:
                self._forget(client_id)
        for key, waiting in list(self._waiting.items()):
            self._waiting[key] = [
                (client_id, request)
                for client_id, request in waiting
                if client_id in self._clients and request in self._clients[client_id].aside
            ]
            if not self._waiting[key]:
                del self._waiting[key]


def _is_same_file(one: AskChunk, other: AskDigests) -> bool:
    return (one.version, one.file) == (other.version, other.file)
