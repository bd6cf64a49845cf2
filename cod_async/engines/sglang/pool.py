"""Many servers as one: which of them a request goes to, and what all of them should have.

A request waits until a server admits it: its session's own server, or one that :mod:`.affinity` chooses. It
waits as long as some server is well, and at most ``server.down_timeout_s`` while none is. Every server takes
new weights up by itself, so a slow or broken one holds no other up; one that falls too far behind is drained.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence
from contextlib import suppress

from cod_async.config.schema import Config
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang.affinity import Affinity
from cod_async.engines.sglang.attempts import Attempt
from cod_async.engines.sglang.protocol import version_label
from cod_async.engines.sglang.records import ServerRecord
from cod_async.engines.sglang.slot import ServerSlot, Shared
from cod_async.errors import CodError, EngineClosedError, EngineError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest

_log = logging.getLogger(__name__)

MAX_FAILED_UPDATES = 3
"""A server that failed to take new weights so often in a row, while others have newer ones, is drained."""

LIFECYCLES_REMEMBERED = 16
"""Lifecycles whose server is remembered, per lifecycle that is played at once."""


class ServerPool:
    """The servers of one actor.

    Args:
        records: returns where they are, now.
        config: the run's configuration.
        shared: given a pool, makes what its slots have in common.

    Attributes:
        slots: by name; a server that turns up later gets one.
        failure: what ends the engine, once something does.
    """

    def __init__(
        self,
        records: Callable[[], list[ServerRecord]],
        config: Config,
        shared: Callable[[ServerPool], Shared],
    ) -> None:
        self.slots: dict[str, ServerSlot] = {}
        self.failure: CodError | None = None
        self._records = records
        self._config = config
        self._shared = shared(self)
        self._affinity = Affinity(LIFECYCLES_REMEMBERED * config.actors.lifecycles_per_process)
        self._open: dict[str, ServerSlot] = {}
        self._begun_under: dict[str, Version] = {}
        self._changed = asyncio.Event()
        self._wanted: Manifest | None = None
        self._number = 0
        self._last_version = Version(0, 0)
        self._is_closed = False
        self._watching: asyncio.Task[None] | None = None

    @property
    def version(self) -> Version:
        """Oldest version among servers that take requests; if there are none, what it was last."""
        versions = [
            slot.version
            for slot in self.slots.values()
            if slot.state == "up" and slot.version is not None  # one that is switching has no say
        ]
        return min(versions, default=self._last_version)

    # Life

    def start(self) -> None:
        """Connect to all servers, and go on looking for others."""
        self.reread()
        self._watching = asyncio.create_task(self._watch(), name="server records")

    async def wait_connected(self) -> None:
        """Return when a server is connected.

        Raises:
            CodError: one of them cannot be used by this run.
        """
        while all(slot.state == "down" for slot in self.slots.values()):
            self.raise_if_over()
            await self._changed.wait()

    async def aclose(self) -> None:
        """Cut all requests, tell the servers, close the connections."""
        self._is_closed = True
        self.notify()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await asyncio.gather(*(slot.aclose() for slot in self.slots.values()))

    def fail(self, error: CodError) -> None:
        """End the engine: whoever waits, and whoever asks from now on, gets this error."""
        _log.error("the servers cannot be used: %s", error)
        self.failure = self.failure or error
        self.notify()

    def raise_if_over(self) -> None:
        """Raise what ended the engine, if anything did."""
        if self._is_closed:
            raise EngineClosedError("the engine is closed")
        if self.failure is not None:
            raise self.failure

    def notify(self) -> None:
        """Something changed: look again who is left behind, and wake all who wait."""
        for slot in self.slots.values():
            self._review(slot)
        self._last_version = self.version
        changed, self._changed = self._changed, asyncio.Event()
        changed.set()

    def reread(self) -> None:
        """Look at the records now."""
        try:
            records = self._records()
        except EngineError as error:
            _log.warning("%s", error)
            return
        for record in records:
            slot = self.slots.get(record.name)
            if slot is not None:
                slot.take_record(record)
                continue
            slot = self.slots[record.name] = ServerSlot(record, self._shared)
            if self._wanted is not None:
                slot.updater.want(self._wanted, self._number)
            slot.start_life()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._config.engine.server.probe_every_s)
            self.reread()

    # Requests

    async def begin(
        self, token_ids: Sequence[int], params: SamplingParams, session: str | None
    ) -> tuple[ServerSlot, Attempt]:
        """Begin a request at a server, as soon as one admits it.

        Raises:
            EngineError: no server became usable in time, or none has the weights any more under which the
                session was begun, in a mode where a session must not see others.
            CodError: the engine is over.
        """
        loop = asyncio.get_running_loop()
        down_since_s: float | None = None
        timeout_s = self._config.engine.server.down_timeout_s
        while True:
            self.raise_if_over()
            slot = self._choose(session)
            if slot is not None:
                if session is not None:
                    self._move(session, slot)
                return slot, slot.start(token_ids, params, session)
            left_s = None
            if any(slot.is_serving for slot in self.slots.values()):
                down_since_s = None
            else:
                down_since_s = loop.time() if down_since_s is None else down_since_s
                left_s = timeout_s - (loop.time() - down_since_s)
                if left_s <= 0:
                    raise EngineError(f"no server was usable for {timeout_s:g} s: {self._describe()}")
            with suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._changed.wait()

    def answered(self, session: str, version: Version) -> None:
        """A session's first completions came under ``version``."""
        if session in self._open:
            self._begun_under.setdefault(session, version)

    def close_session(self, session: str) -> None:
        """A session ended; unknown ones are ignored."""
        slot = self._open.pop(session, None)
        self._begun_under.pop(session, None)
        if slot is not None:
            slot.close_session(session)

    def _choose(self, session: str | None) -> ServerSlot | None:
        slot = None if session is None else self._open.get(session)
        if slot is not None and session in slot.sessions and slot.is_serving:
            return slot if slot.admits(is_open=True) else None
        serving = {name: slot for name, slot in self.slots.items() if slot.is_serving}
        if session is not None and self._config.engine.on_publish == "at_segment_boundary":
            begun = self._begun_under.get(session)
            if begun is not None and serving:
                serving = {name: slot for name, slot in serving.items() if slot.version == begun}
                if not serving:
                    raise EngineError(
                        f"session {session!r} lost its server, and no other one has version {begun}; play "
                        "the episode again"
                    )
        admitting = {name: slot.load for name, slot in serving.items() if slot.admits(is_open=False)}
        actors_room = -(-self._config.actors.lifecycles_per_process // max(1, len(serving)))
        room = min(actors_room, self._config.engine.max_running)
        name = self._affinity.place(session, admitting, serving=serving, room=room)
        return None if name is None else self.slots[name]

    def _move(self, session: str, slot: ServerSlot) -> None:
        old = self._open.get(session)
        if old is not None and old is not slot:
            old.close_session(session)
        self._open[session] = slot

    # Weights

    def announce(self, manifest: Manifest) -> int:
        """A version was published: all servers should take it up. Announced again: those that failed try
        again now.

        Returns:
            Number of the publication, for :meth:`settle`. An older version than the one wanted is ignored.
        """
        wanted = self._wanted
        if wanted is not None and manifest.version < wanted.version:
            return self._number
        if wanted is not None and (manifest.version, manifest.digest) == (wanted.version, wanted.digest):
            for slot in self.slots.values():
                slot.updater.retry()
            return self._number
        self._wanted = manifest
        self._number += 1
        for slot in self.slots.values():
            slot.updater.want(manifest, self._number)
        self.notify()
        return self._number

    async def settle(self, number: int) -> None:
        """Return when the servers that take requests have a publication, or a newer one.

        Servers that are down or being updated do not count, nor do those that failed to take it.

        Raises:
            WeightsError: no server could take it.
            CodError: the engine is over.
        """
        while True:
            self.raise_if_over()
            slots = self.slots.values()
            pending = [slot for slot in slots if slot.state != "down" and slot.updater.is_pending_for(number)]
            if any(slot.is_serving and slot.updater.has_number >= number for slot in slots):
                if all(slot.state != "up" for slot in pending):
                    return
            elif not pending:
                raise WeightsError(f"no server took the new weights up: {self._describe()}")
            await self._changed.wait()

    def _review(self, slot: ServerSlot) -> None:
        """See whether a server is to be drained. One that is about to switch is not."""
        updater = slot.updater
        limit = self._config.engine.max_versions_behind
        is_late = updater.num_behind > limit and (
            updater.is_switching or updater.num_failures > 0 or updater.num_behind > limit + 1
        )
        is_outrun = updater.num_failures >= MAX_FAILED_UPDATES and any(
            other.is_serving and other.updater.has_number > updater.has_number
            for other in self.slots.values()
        )
        is_left_behind = slot.version is not None and (is_late or is_outrun)
        if is_left_behind != slot.is_left_behind:
            slot.is_left_behind = is_left_behind
            text = "takes no new requests" if is_left_behind else "takes requests again"
            _log.info("%s %s: %d publications behind", slot.name, text, updater.num_behind)

    def _describe(self) -> str:
        parts = []
        for slot in self.slots.values():
            version = "unknown weights" if slot.version is None else version_label(slot.version)
            trouble = f" ({slot.trouble})" if slot.trouble else ""
            parts.append(f"{slot.name} is {slot.state}, {version}{trouble}")
        return "; ".join(parts) or "none has started"
