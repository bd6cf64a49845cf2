"""One server: its connection, its health, and what runs on it.

A slot is driven by one task: connect and check who answers, then probe at intervals while an
:class:`~cod_async.engines.sglang.updates.Updater` keeps the weights current. A server that fails its probes
is given up: its requests are cut, so that they can go elsewhere, and the slot connects anew, to the address
and keys that the record holds by then. It takes requests only while it is well, under weights that were
verified on this very connection, and not held back by a switch.

States: ``up``; ``updating`` (connected, but its weights are being changed or are not known yet); ``draining``
(too far behind: no new requests, running ones go on); ``down``.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Literal

from cod_async.config.schema import Config
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang.affinity import Load
from cod_async.engines.sglang.attempts import Attempt, Connection
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.protocol import ServerInfo
from cod_async.engines.sglang.pushes import Push
from cod_async.engines.sglang.records import ServerRecord
from cod_async.engines.sglang.switching import undo
from cod_async.engines.sglang.tally import Tally
from cod_async.engines.sglang.updates import Updater
from cod_async.errors import CodError, EngineDownError, EngineError, EngineMismatchError
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.weights.source import PublishedWeights

_log = logging.getLogger(__name__)

RETIRE_S = 10.0
"""Time for telling a server that is given up what it no longer has to do, and for letting it go on."""

SlotState = Literal["up", "updating", "draining", "down"]


@dataclass(frozen=True)
class Shared:
    """What all slots of an engine have in common.

    Attributes:
        config: the run's configuration.
        tally: counts.
        connect: makes a client for a record.
        make_push: makes what brings weights into one server.
        load: returns verified weights of a manifest, or with None those the run started from.
        check: names what makes a server unusable for this run; empty if nothing does.
        reread: looks at the records again, at once.
        notify: something changed that waiting requests or updates may care about.
        fail: ends the engine.
        complain: tells who hosts a server that it was given up, and why.
    """

    config: Config
    tally: Tally
    connect: Callable[[ServerRecord], ServerClient]
    make_push: Callable[[], Push]
    load: Callable[[Manifest | None], Awaitable[PublishedWeights]]
    check: Callable[[str, ServerClient, ServerInfo], list[str]]
    reread: Callable[[], None]
    notify: Callable[[], None]
    fail: Callable[[CodError], None]
    complain: Callable[[ServerRecord, str], None] = lambda record, reason: None


class ServerSlot:
    """A place for a server; whoever is behind its record at the time.

    Args:
        record: where it is.
        shared: see :class:`Shared`.
    """

    def __init__(self, record: ServerRecord, shared: Shared) -> None:
        self.name = record.name
        self.record = record
        self.is_suspect = False
        self.is_left_behind = False
        self.sessions: set[str] = set()
        self.running: set[Attempt] = set()
        self.shared = shared
        self.updater = Updater(self)
        self._connection: Connection | None = None
        self._numbers = itertools.count(1)
        self._id = secrets.token_hex(4)
        self._look_now = asyncio.Event()
        self._retired: set[asyncio.Task[None]] = set()
        self._num_broken = 0
        self._trouble = ""
        self._task: asyncio.Task[None] | None = None

    # What others see

    @property
    def state(self) -> SlotState:
        """See the module."""
        if self._connection is None:
            return "down"
        if self.updater.is_switching or self.updater.weights is None:
            return "updating"
        return "draining" if self.is_left_behind else "up"

    @property
    def version(self) -> Version | None:
        """Verified weights; None: unknown."""
        return self.updater.version

    @property
    def is_serving(self) -> bool:
        """Whether it takes requests, now or when a switch that is under way is done."""
        return self._connection is not None and self.updater.weights is not None and not self.is_left_behind

    @property
    def trouble(self) -> str:
        """What is wrong with it, as far as known; empty: nothing."""
        return self._trouble or self.updater.trouble

    @property
    def load(self) -> Load:
        """How busy it is."""
        return Load(len(self.sessions), len(self.running))

    def admits(self, *, is_open: bool) -> bool:
        """Whether a request may start now.

        Args:
            is_open: it goes on with a session that is open here.
        """
        hold = self.updater.hold
        return (
            self.state == "up" and not self.is_suspect and (hold is None or (hold == "sessions" and is_open))
        )

    # Requests

    def start(self, token_ids: Sequence[int], params: SamplingParams, session: str | None) -> Attempt:
        """Begin a request; the caller has just seen that the slot admits it."""
        connection, weights = self._connection, self.updater.weights
        if connection is None or weights is None:
            raise RuntimeError(f"{self.name} takes no requests")
        if session is not None:
            self.sessions.add(session)
        attempt = Attempt(
            connection,
            token_ids,
            params,
            rid=f"{self._id}-{next(self._numbers)}",
            label=weights.label,
            on_end=self._attempt_ended,
        )
        self.running.add(attempt)
        return attempt

    def close_session(self, session: str) -> None:
        """A session ended, or went elsewhere."""
        if session in self.sessions:
            self.sessions.discard(session)
            self.updater.look()

    def broke_off(self, attempt: Attempt) -> None:
        """The server broke a request off: look at once whether it is well, and send it no more until then."""
        if attempt.connection is self._connection:
            if not self.is_suspect:  # one blow that cuts many connections counts once
                self._num_broken += 1
            self.is_suspect = True
            self._look_now.set()

    def refused_key(self, attempt: Attempt, error: EngineMismatchError) -> None:
        """The server refused our key: right if another one has taken its place, else the end of the run."""
        self.broke_off(attempt)
        before = self.record
        self.shared.reread()
        if attempt.connection is self._connection and self.record == before:
            self.shared.fail(error)

    def succeeded(self) -> None:
        """A request was answered as it should be."""
        self._num_broken = 0

    def cut(self, reason: str) -> None:
        """Take all running requests away from the server."""
        for attempt in list(self.running):
            attempt.abandon(EngineDownError(f"{self.name}: {reason}"))

    def _attempt_ended(self, attempt: Attempt) -> None:
        if attempt in self.running:
            self.running.discard(attempt)
            self.updater.ended(attempt)

    # Life

    def start_life(self) -> None:
        """Begin to connect."""
        self._task = asyncio.create_task(self._live(), name=f"slot {self.name}")

    def take_record(self, record: ServerRecord) -> None:
        """The record was read again; a new server behind it ends the connection to the old one."""
        if record != self.record:
            self.record = record
            self._look_now.set()

    async def aclose(self) -> None:
        """Cut what runs, tell the server, end all tasks."""
        self.cut("the engine was closed")
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)
        while self._retired:
            await asyncio.wait(self._retired)

    async def _live(self) -> None:
        try:
            while True:
                client, record = await self._connected()
                self._connection = Connection(client, self.shared.tally)
                self.is_suspect, self._num_broken, self._trouble = False, 0, ""
                self.shared.notify()  # who waits for a connection need not wait for the weights too
                push = self.shared.make_push()
                reason = "it cannot be used"
                keeping = asyncio.create_task(
                    self.updater.keep_current(client, push), name=f"weights of {self.name}"
                )
                try:
                    reason = await self._probe(client, record, keeping)
                    self.shared.tally.count("num_servers_lost")
                    _log.warning("%s (%s) is given up: %s", self.name, client.url, reason)
                    self.shared.complain(record, reason)
                except asyncio.CancelledError:
                    reason = "the engine was closed"
                    raise
                finally:
                    self._give_up(client, push, keeping, reason)
        except CodError as error:
            self.shared.fail(error)
        except Exception as error:
            _log.exception("%s failed", self.name)
            self.shared.fail(EngineError(f"{self.name} failed: {type(error).__name__}: {error}"))

    def _give_up(self, client: ServerClient, push: Push, keeping: asyncio.Task[None], reason: str) -> None:
        """End a connection without waiting for the server."""
        self._connection, self._trouble = None, reason
        self.sessions.clear()
        attempts = list(self.running)
        self.cut(reason)
        self.running.clear()
        keeping.cancel()
        self.updater.forget()
        retiring = asyncio.create_task(_retire(client, push, keeping, attempts), name=f"old {self.name}")
        self._retired.add(retiring)
        retiring.add_done_callback(self._retired.discard)
        self.shared.notify()

    async def _connected(self) -> tuple[ServerClient, ServerRecord]:
        """Connect, however long it takes, check who answers, and return where that was."""
        settings = self.shared.config.engine.server
        while True:
            self._look_now.clear()
            record = self.record
            if record.state == "ready":
                client = self.shared.connect(record)
                try:
                    info = await client.info()
                    problems = self.shared.check(record.url, client, info)
                    if problems:
                        raise EngineMismatchError("; ".join(problems))
                    await _clear_leftovers(client)
                    return client, record
                except BaseException as error:
                    await client.aclose()
                    if isinstance(error, EngineMismatchError):
                        self.shared.reread()
                        if self.record == record:
                            raise
                    elif not isinstance(error, EngineError):
                        raise
                    self._trouble = str(error)
                    _log.info("%s is not there yet: %s", self.name, error)
            await self._wait(settings.probe_every_s)

    async def _probe(self, client: ServerClient, record: ServerRecord, keeping: asyncio.Task[None]) -> str:
        """Probe until the server is to be given up; return why."""
        settings = self.shared.config.engine.server
        num_failed = 0
        while True:
            waiting = asyncio.create_task(self._wait(settings.probe_every_s))
            try:
                await asyncio.wait({waiting, keeping}, return_when=asyncio.FIRST_COMPLETED)
            finally:
                waiting.cancel()
            self._look_now.clear()
            if keeping.done():
                self.shared.reread()
            if self.record.instance != record.instance or self.record.url != record.url:
                return "another server has taken its place"
            if keeping.done():
                keeping.result()  # raises: it never ends by itself
            problem = await self._look(client, record)
            if problem is None:
                num_failed = 0
                if self._num_broken >= settings.max_failed_probes:
                    return f"it broke requests off {self._num_broken} times in a row, but answers probes"
                if self.is_suspect:
                    self.is_suspect = False
                    self.shared.notify()
                self.updater.look()  # budgets and holds also change with time
                continue
            num_failed += 1
            self.is_suspect = True
            if num_failed >= settings.max_failed_probes:
                return f"{num_failed} probes in a row failed; the last: {problem}"

    async def _look(self, client: ServerClient, record: ServerRecord) -> str | None:
        """Ask the server for a sign of life; return what is wrong.

        While its weights change, its scheduler may be loading for longer than a probe may take, so only the
        process in front of it is asked then; the update has deadlines of its own.
        """
        settings = self.shared.config.engine.server
        try:
            async with asyncio.timeout(settings.probe_timeout_s):
                if self.updater.is_switching:
                    await client.label()
                else:
                    await client.load()
        except TimeoutError:
            return f"no answer within {settings.probe_timeout_s:g} s"
        except EngineMismatchError as error:
            self.shared.reread()
            if self.record == record:
                raise
            return str(error)
        except EngineError as error:
            return str(error)
        return None

    async def _wait(self, timeout_s: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._look_now.wait()


async def _clear_leftovers(client: ServerClient) -> None:
    """Undo what somebody who died in the middle of an update may have left behind."""
    await client.pause("retract")
    try:
        await client.end_update()
    except BaseException as error:
        await undo(error, client.resume())
        raise
    await client.resume()


async def _retire(
    client: ServerClient, push: Push, keeping: asyncio.Task[None], attempts: Sequence[Attempt]
) -> None:
    """Let what still talks to a server end, then close the connections, which ends the rest at once."""
    ending = asyncio.gather(keeping, *(attempt.wait_ended() for attempt in attempts), return_exceptions=True)
    await asyncio.wait([ending], timeout=RETIRE_S)
    try:
        await push.aclose()
    finally:
        await client.aclose()
    await ending
