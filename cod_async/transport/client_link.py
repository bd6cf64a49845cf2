"""A client's link: its session runs on an I/O thread of its own, so that a long computation never stops
heartbeats.

Any thread may call the public methods; they hand work to the I/O thread through a queue and a wake-up byte.
Segments and requests survive lost connections and coordinator restarts inside the session; the link makes new
connections, reads the coordinator's address again, and gives results back as futures.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import socket
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from typing import Any, TypeVar, overload

from cod_async.config.schema import Config, TransportConfig
from cod_async.errors import CodError, ProtocolRefusedError, WireError
from cod_async.lifecycle.segment import Segment
from cod_async.transport.ack_journal import AckJournal
from cod_async.transport.address import address_source
from cod_async.transport.connector import AddressSource, Connector
from cod_async.wire.codec import decode_for_client, encode_body, encode_segment, frame_body
from cod_async.wire.messages import (
    Bye,
    Checkpointed,
    Heartbeat,
    LeaseRef,
    LeaseRequest,
    Leases,
    LineageOpened,
    OpenLineage,
    Published,
    PublishRecorded,
    Role,
    StepBatch,
    StepDone,
    StepRecorded,
    StepRequest,
    ToClient,
    ToCoordinator,
)
from cod_async.wire.requests import Request
from cod_async.wire.session import ClientSession, Outgoing

log = logging.getLogger(__name__)

ACKED = "acked"
MAX_REMEMBERED_DROPS = 65536
BURST = 64
T = TypeVar("T")


class ClientLink:
    """One client's connection to the coordinator, for a process's whole life.

    Args:
        addresses: returns the coordinator's address, or None while there is none; called again before
            every new connection (``coordinator.json`` may have changed). May raise OSError or ValueError.
        role: ``actor``, ``learner`` or ``observer``.
        name: unique in the run; a newer process with the same name replaces this one.
        run: run id.
        config: the transport's section of the config.
        max_outbox_segments: at this many unacknowledged segments :meth:`send_segment` waits.
    """

    def __init__(
        self,
        addresses: AddressSource,
        role: Role,
        name: str,
        run: str,
        config: TransportConfig,
        *,
        max_outbox_segments: int = 1024,
    ) -> None:
        self.rejected: Counter[str] = Counter()
        self._run, self._config, self._name = run, config, name
        self._journal = AckJournal.of(config, name) if role == "actor" else None
        self._on_message: Callable[[ToClient], object] = _ignore
        self._on_settled: Callable[[int, str | None], object] = _ignore
        self._max_outbox = max_outbox_segments
        self._session = ClientSession(
            role=role,
            name=name,
            pid=os.getpid(),
            host=socket.gethostname(),
            instance=1 + secrets.randbelow(1 << 62),
            resend_s=config.resend_s,
            heartbeat_s=config.heartbeat_s,
            session_timeout_s=config.session_timeout_s,
        )
        self._session.heartbeat = self._heartbeat
        self._heartbeat_source: Callable[[], Heartbeat] = Heartbeat
        self._connector = Connector(addresses, config)
        self._lock = threading.Condition()
        self._commands: deque[Callable[[float], object]] = deque()
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._is_awake = False
        self._next_outbox_id = 1
        self._unsettled: set[int] = set()
        self._drops: OrderedDict[int, str] = OrderedDict()
        self._settlements: dict[int, Future[str]] = {}
        self._waiting_for_room: list[Future[None]] = []
        self._replies: dict[int, Future[Any]] = {}
        self._next_request_id = 1
        self._failure: CodError | None = None
        self._close_at: float | None = None
        self._last_words: bytes | None = None
        self._held: Outgoing | None = None
        self._logged_at: dict[str, float] = {}
        self._is_welcomed = threading.Event()
        self._thread = threading.Thread(target=self._main, name=f"link-{name}", daemon=True)

    # ----------------------------------------------------------------------------------------- for any thread

    @classmethod
    def for_run(
        cls, run_dir: Path, config: Config, *, role: Role, name: str, max_outbox_segments: int | None = None
    ) -> ClientLink:
        """Make the link of a client of the run in ``run_dir``, whose coordinator.json names the address."""
        return cls(
            address_source(run_dir),
            role,
            name,
            config.run.name,
            config.transport,
            max_outbox_segments=max_outbox_segments or config.actors.max_outbox_segments,
        )

    def start(
        self,
        on_message: Callable[[ToClient], object] | None = None,
        on_settled: Callable[[int, str | None], object] | None = None,
    ) -> None:
        """Start the I/O thread; it connects and greets by itself and keeps trying.

        Both callbacks run on the I/O thread: they must be quick, must not block, and hop elsewhere to do
        work.

        Args:
            on_message: gets every message that answers no request: Welcome, Stop, Fence, NewVersion, and the
                fatal Refused after which the link has stopped.
            on_settled: gets (outbox id, None or the reason of the drop) of every segment as it is settled.
        """
        self._on_message = on_message or self._on_message
        self._on_settled = on_settled or self._on_settled
        self._thread.start()

    def wait_connected(self, timeout_s: float) -> bool:
        """Wait for the first Welcome; False if it did not come in time.

        Raises:
            ProtocolRefusedError: the coordinator refused this client for good.
        """
        is_welcomed = self._is_welcomed.wait(timeout_s)
        self._raise_failure()
        return is_welcomed

    @property
    def session(self) -> int:
        """The present session epoch; 0 before the first Welcome."""
        return self._session.session

    @property
    def is_connected(self) -> bool:
        """Whether the session is open now."""
        return self._session.state == "open"

    @property
    def failure(self) -> CodError | None:
        """Why the link stopped for good, if it did."""
        return self._failure

    @property
    def num_unacked(self) -> int:
        """Segments sent or waiting that are not settled."""
        return len(self._unsettled)

    @property
    def max_outbox_segments(self) -> int:
        """Ceiling of :attr:`num_unacked`."""
        return self._max_outbox

    @property
    def num_resent(self) -> int:
        """Segments that were sent again so far."""
        return self._session.num_resent

    def set_heartbeat(self, source: Callable[[], Heartbeat]) -> None:
        """Set what heartbeats say; ``source`` runs on the I/O thread every ``heartbeat_s``: be quick."""
        self._heartbeat_source = source

    def send_segment(self, segment: Segment, *, timeout_s: float | None = None) -> int:
        """Put a sealed segment into the outbox and return its outbox id (1, 2, …); it is sent until it is
        settled.

        Blocks while the outbox is full.

        Raises:
            WireError: the segment cannot be sent (``too_large``, ``not_finite``, …); ``outbox_full`` after
                ``timeout_s``.
            ProtocolRefusedError: the coordinator refused this client for good.
        """
        raw = encode_segment(segment, max_message_bytes=self._config.max_message_bytes)
        lease = LeaseRef(segment.key.group, segment.key.member, segment.lease_epoch)
        with self._lock:
            has_room = self._lock.wait_for(
                lambda: self._failure is not None or len(self._unsettled) < self._max_outbox, timeout_s
            )
            self._raise_failure()
            if not has_room:
                raise WireError("outbox_full", f"{len(self._unsettled)} segments are not acknowledged")
            outbox_id = self._next_outbox_id
            self._next_outbox_id += 1
            self._unsettled.add(outbox_id)
            if self._journal is not None:
                self._journal.offered(outbox_id, segment)
            self._commands.append(lambda now: self._session.offer(raw, lease))
        self._wake()
        return outbox_id

    def room(self) -> Future[None]:
        """Return a future that is done when the outbox has room, and fails when the link has."""
        future: Future[None] = Future()
        with self._lock:
            if self._failure is not None:
                future.set_exception(self._failure)
            elif len(self._unsettled) < self._max_outbox:
                future.set_result(None)
            else:
                self._waiting_for_room.append(future)
        return future

    def settlement(self, outbox_id: int) -> Future[str]:
        """Return a future of ``"acked"`` or the drop reason of a segment that :meth:`send_segment` took."""
        with self._lock:
            future = self._settlements.get(outbox_id)
            if future is None:
                future = Future()
                if outbox_id not in self._unsettled:
                    future.set_result(self._drops.get(outbox_id, ACKED))
                elif self._failure is not None:
                    future.set_exception(self._failure)
                else:
                    self._settlements[outbox_id] = future
            return future

    def wait_acked(self, outbox_id: int, timeout_s: float | None = None) -> str:
        """Wait until a segment is settled; return ``"acked"`` or the drop reason.

        Raises:
            TimeoutError: not in time.
            ProtocolRefusedError: the coordinator refused this client for good.
        """
        return _wait(self.settlement(outbox_id), timeout_s, f"segment {outbox_id} is not settled")

    def send(self, message: ToCoordinator) -> None:
        """Send a one-way message once, after the segments offered before it; it may be lost with a
        connection.

        Raises:
            WireError: the message is malformed.
            ProtocolRefusedError: the coordinator refused this client for good.
        """
        self._raise_failure()
        body = encode_body(message, max_message_bytes=self._config.max_message_bytes)
        self._submit(lambda now: self._session.say(body))

    @overload
    def request(self, message: LeaseRequest, timeout_s: float | None = None) -> Leases: ...
    @overload
    def request(self, message: OpenLineage, timeout_s: float | None = None) -> LineageOpened: ...
    @overload
    def request(self, message: StepRequest, timeout_s: float | None = None) -> list[StepBatch]: ...
    @overload
    def request(self, message: StepDone, timeout_s: float | None = None) -> StepRecorded: ...
    @overload
    def request(
        self, message: Published | Checkpointed, timeout_s: float | None = None
    ) -> PublishRecorded: ...

    def request(self, message: Request, timeout_s: float | None = None) -> Any:
        """Send a request until it is answered and return the answer, in order of parts if it comes in parts.

        Raises:
            TimeoutError: no answer in time; the request is given up.
            WireError: the message is malformed; ``closed``.
            ProtocolRefusedError: the coordinator refused this client for good.
        """
        future = self.request_future(message)
        try:
            return _wait(future, timeout_s, f"no answer to {type(message).__name__}")
        except TimeoutError:
            future.cancel()
            raise

    def request_future(self, message: Request) -> Future[Any]:
        """Send a request until answered; return a future of the answer. Cancelling gives the request up."""
        body = encode_body(message, max_message_bytes=self._config.max_message_bytes)
        future: Future[Any] = Future()
        with self._lock:
            self._raise_failure()
            request_id = self._next_request_id
            self._next_request_id += 1
            self._replies[request_id] = future
            self._commands.append(lambda now: self._session.requests.ask(request_id, message, body, now))
        self._wake()
        future.add_done_callback(lambda done: self._forget(request_id) if done.cancelled() else None)
        return future

    def close(self, bye: Bye | None = None, *, drain_s: float = 0.0) -> bool:
        """Wait up to ``drain_s`` for the outbox to empty, say Bye if given, and end the I/O thread.

        Returns:
            Whether every segment was settled.
        """
        self._last_words = encode_body(bye) if bye is not None else None
        self._close_at = time.monotonic() + drain_s
        self._wake()
        if self._thread.ident is not None:
            self._thread.join()
        self._fail(WireError("closed", "the link was closed"))
        self._wake_receiver.close()
        self._wake_sender.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None
        return not self._unsettled

    def _forget(self, request_id: int) -> None:
        with self._lock:
            self._replies.pop(request_id, None)
        self._submit(lambda now: self._session.requests.forget(request_id))

    def _submit(self, command: Callable[[float], object]) -> None:
        with self._lock:
            self._commands.append(command)
        self._wake()

    def _wake(self) -> None:
        if not self._is_awake:
            self._is_awake = True
            with contextlib.suppress(OSError):  # full: it will wake anyway; closed: nobody is left to wake
                self._wake_sender.send(b"w")

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    # ----------------------------------------------------------------------------------------- the I/O thread

    def _main(self) -> None:
        try:
            while not self._turn(time.monotonic()):
                pass
        except ProtocolRefusedError as error:
            self._fail(error)
        except Exception as error:
            # Whatever ends this thread must reach those who wait for it, or they would wait forever.
            log.exception("link of %s ended", self._name)
            self._fail(WireError("link_failed", f"{type(error).__name__}: {error}"))
        finally:
            self._connector.close(linger_s=1.0 if self._failure is None else 0.0)

    def _turn(self, now: float) -> bool:
        """Do what is due, then wait; return True when the link is to end."""
        self._run_commands(now)
        num_received = self._receive_burst(now)
        if self._session.state == "refused":
            self._connector.close(linger_s=0.0)
            return self._fail_refused()
        if self._connector.update(self._session, now):
            self._held = None
        num_sent = self._send_burst(now)
        if self._close_at is not None and self._is_drained(now):
            return True
        if num_received < BURST and (num_sent < BURST or self._held is not None):
            self._wait(now)
        return False

    def _run_commands(self, now: float) -> None:
        # In this order no wake-up is lost: a command queued before the flag falls is seen by the loop below.
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        self._is_awake = False
        while self._commands:
            self._commands.popleft()(now)

    def _receive_burst(self, now: float) -> int:
        pipe = self._connector.pipe
        for count in range(BURST):
            parts = pipe.recv() if pipe is not None else None
            if parts is None:
                return count
            try:
                envelope, message = decode_for_client(
                    parts, run=self._run, max_message_bytes=self._config.max_message_bytes
                )
            except WireError as error:
                if error.code == "protocol":  # the coordinator will never be understood
                    raise ProtocolRefusedError(error.code, error.detail) from None
                self.rejected[error.code] += 1
                self._log_once(error.code, f"refused a message of the coordinator: {error}", now)
                continue
            self._handle(envelope.session, message, now)
        return BURST

    def _handle(self, session: int, message: ToClient, now: float) -> None:
        incoming = self._session.receive(session, message, now)
        if incoming.settled:
            self._settle(incoming.settled)
        for request_id, reply in incoming.replies:
            with self._lock:
                future = self._replies.pop(request_id, None)
            if future is not None and future.set_running_or_notify_cancel():
                future.set_result(reply)
        if self._session.state == "open":
            self._is_welcomed.set()
        if incoming.is_for_owner:
            self._call(self._on_message, message)

    def _send_burst(self, now: float) -> int:
        pipe = self._connector.pipe
        if pipe is None:
            return 0
        for count in range(BURST):
            outgoing = self._held or self._session.next_outgoing(now)
            if outgoing is None:
                return count
            if not pipe.send(frame_body(outgoing.body, run=self._run, session=outgoing.session)):
                self._held = outgoing
                return count
            self._held = None
        return BURST

    def _is_drained(self, now: float) -> bool:
        """Whether the link may end: all settled and said, or out of time. Says the last words.

        While there is time it waits for a lost connection to come back, or nobody would hear them.
        """
        assert self._close_at is not None  # noqa: S101
        is_out_of_time = now >= self._close_at
        if not is_out_of_time and (self._session.num_unacked or self._commands):
            return False
        if self._last_words is not None and self._session.state == "open":
            self._session.say(self._last_words, is_last=True)
            self._last_words = None
            self._send_burst(now)
        is_said = self._last_words is None and self._session.num_oneway == 0 and self._held is None
        return is_out_of_time or is_said

    def _wait(self, now: float) -> None:
        deadline = self._connector.deadline(now)
        if self._held is None:  # else nothing new becomes due before the connection takes what is held
            deadline = min(deadline, self._session.deadline(now))
        if self._close_at is not None:
            deadline = min(deadline, max(self._close_at, now + 0.01))
        pipe = self._connector.pipe
        if pipe is not None:
            pipe.wait(self._wake_receiver, deadline - now, wants_to_send=self._held is not None)
        else:
            self._connector.wait(self._wake_receiver, deadline - now)

    def _heartbeat(self) -> Heartbeat:
        try:
            heartbeat = self._heartbeat_source()
            encode_body(heartbeat)
        except Exception:
            # A wrong counter must not look like a dead process.
            self._log_once(
                "heartbeat", "the heartbeat's source failed; sending an empty one", time.monotonic(), True
            )
            return Heartbeat()
        return heartbeat

    def _settle(self, settled: list[tuple[int, str | None]]) -> None:
        done: list[tuple[Future[Any], Any]] = []
        with self._lock:
            done.extend((future, None) for future in self._waiting_for_room)
            self._waiting_for_room.clear()
            if self._journal is not None:
                self._journal.settled(settled)
            for outbox_id, reason in settled:
                self._unsettled.discard(outbox_id)
                if reason is not None:
                    self._drops[outbox_id] = reason
                    if len(self._drops) > MAX_REMEMBERED_DROPS:
                        self._drops.popitem(last=False)
                future = self._settlements.pop(outbox_id, None)
                if future is not None:
                    done.append((future, reason or ACKED))
            self._lock.notify_all()
        for future, result in done:
            if future.set_running_or_notify_cancel():
                future.set_result(result)
        for outbox_id, reason in settled:
            self._call(self._on_settled, outbox_id, reason)

    def _fail_refused(self) -> bool:
        refused = self._session.refused
        assert refused is not None  # noqa: S101
        self._fail(ProtocolRefusedError(refused.code, refused.detail))
        return True

    def _fail(self, error: CodError) -> None:
        with self._lock:
            if self._failure is not None:
                return
            self._failure = error
            waiting: list[Future[Any]] = [*self._settlements.values(), *self._replies.values()]
            waiting.extend(self._waiting_for_room)
            self._settlements.clear()
            self._replies.clear()
            self._waiting_for_room.clear()
            self._lock.notify_all()
        self._is_welcomed.set()
        for future in waiting:
            if future.set_running_or_notify_cancel():
                future.set_exception(error)

    def _call(self, callback: Callable[..., object], *arguments: object) -> None:
        try:
            callback(*arguments)
        except Exception:
            # The owner's bug must not stop the link; it is logged with its traceback.
            log.exception("a callback of the link of %s failed", self._name)

    def _log_once(self, key: str, text: str, now: float, has_traceback: bool = False) -> None:
        if now - self._logged_at.get(key, -1e18) >= 10.0:
            self._logged_at[key] = now
            log.warning("link of %s: %s", self._name, text, exc_info=has_traceback)


def _ignore(*arguments: object) -> None:
    """The callback of an owner who does not ask for one."""


def _wait(future: Future[T], timeout_s: float | None, what: str) -> T:
    try:
        return future.result(timeout_s)
    except FutureTimeoutError:
        raise TimeoutError(f"{what} after {timeout_s} s") from None
