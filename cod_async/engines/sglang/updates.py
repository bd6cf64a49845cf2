"""Keeping one server's weights current: when a switch may happen, doing it, and what follows when it fails.

Modes (``engine.on_publish``). ``retract`` (``auto``): at once, unless computing the running contexts again
would cost more than the budget allows. ``in_place``: at once. ``wait``: new completions wait until the
running ones are done. ``at_segment_boundary``: new sessions wait until the open ones are closed. The last two
then switch an idle server, whose cache need not be flushed, because every version has its own cache
namespace. Nothing is put off for more than ``engine.max_versions_behind`` publications or, held back, for
longer than ``engine.hold_timeout_s``; then the switch is forced, with ``retract``.

What a server has is never assumed: after it was connected to, and after a failed update, its weights count
as unknown until they were verified, and requests that ran meanwhile are thrown away.
"""

from __future__ import annotations

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING, Literal

from cod_async.engines.sglang.budget import ReprefillBudget
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.pushes import Push, verify
from cod_async.engines.sglang.switching import SwitchMode, SwitchReport, switch, undo
from cod_async.errors import EngineError, EngineMismatchError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.weights.source import PublishedWeights

if TYPE_CHECKING:
    from cod_async.engines.sglang.attempts import Attempt
    from cod_async.engines.sglang.slot import ServerSlot

_log = logging.getLogger(__name__)

RETRY_S = (0.5, 1.0, 2.0, 5.0, 10.0)
"""Waits before a version that a server did not take is tried again."""

Hold = Literal["turns", "sessions"]
"""What a switch holds back: every new request, or those of new sessions."""


class Updater:
    """The weights of one slot.

    Args:
        slot: whose.

    Attributes:
        weights: what the server has, verified; None: unknown.
        hold: what is held back for a switch; None: nothing.
        is_switching: whether the weights are being changed or verified.
        num_failures: failed attempts in a row.
        failed_number: publication that was last tried in vain, and is tried again later; 0: none.
        has_number: publication that the weights came with; 0: those that the run starts from, or unknown.
        trouble: why the last attempt failed; empty: it did not.
        last_report: of the last switch.
    """

    def __init__(self, slot: ServerSlot) -> None:
        config = slot.shared.config
        self.weights: PublishedWeights | None = None
        self.hold: Hold | None = None
        self.is_switching = False
        self.num_failures = 0
        self.failed_number = 0
        self.trouble = ""
        self.last_report: SwitchReport | None = None
        self._slot = slot
        self._client: ServerClient | None = None
        self._config = config
        self._mode = "retract" if config.engine.on_publish == "auto" else config.engine.on_publish
        self._budget = ReprefillBudget(config.engine.max_reprefill_frac)
        self._wanted: Manifest | None = None
        self._number = 0
        self.has_number = 0
        self._put_off_number = 0
        self._held_since_s: float | None = None
        self._is_start_refused = False
        self._look = asyncio.Event()

    @property
    def version(self) -> Version | None:
        """Version of the verified weights."""
        return None if self.weights is None else self.weights.version

    @property
    def num_behind(self) -> int:
        """Publications since the one that the server has."""
        return self._number - self.has_number

    @property
    def is_due(self) -> bool:
        """Whether there is something to do for the weights."""
        if self.weights is None:
            return self._wanted is not None or not self._is_start_refused
        return self._wanted is not None and not _is_same(self.weights.manifest, self._wanted)

    def is_pending_for(self, number: int) -> bool:
        """Whether a publication, or a newer one, is still to be tried."""
        return self.has_number < number and self.failed_number < number

    def want(self, manifest: Manifest, number: int) -> None:
        """Take this version up.

        Args:
            manifest: what was published.
            number: how many publications there were so far, this one included.
        """
        if self.weights is not None and _is_same(self.weights.manifest, manifest):
            self.has_number = number
        self._wanted, self._number = manifest, number
        self._look.set()

    def retry(self) -> None:
        """Try again now what failed."""
        if self.failed_number:
            self.failed_number = 0
            self._look.set()

    def look(self) -> None:
        """Something changed that a held switch may have waited for."""
        self._look.set()

    def ended(self, attempt: Attempt) -> None:
        """A request ended."""
        self._budget.ended(attempt.num_made, attempt.elapsed_s)
        self._look.set()

    def doubt(self, why: str) -> None:
        """The server showed weights that it should not have: take it for unknown until it is updated anew."""
        if self.weights is not None and not self.is_switching:
            self.weights, self.has_number = None, 0
            self._slot.cut(why)
            self._slot.shared.notify()
            self._look.set()

    def forget(self) -> None:
        """The connection is new, or gone: nothing is known of the server's weights."""
        self._client = None
        self.weights = None
        self.has_number = 0
        self.hold = self._held_since_s = None
        self.is_switching = False
        self.trouble = ""
        self.num_failures = self.failed_number = 0
        self._is_start_refused = False
        self._budget = ReprefillBudget(self._config.engine.max_reprefill_frac)

    async def keep_current(self, client: ServerClient, push: Push) -> None:
        """Bring the server to the wanted version, whenever it is not there. Never returns.

        Raises:
            EngineMismatchError: the server refuses our key.
        """
        self.forget()
        self._client = client
        while True:
            if not self.is_due:
                await self._wait()
                continue
            number = self._number
            try:
                if self._wanted is None:
                    await self._prove_start(client)
                else:
                    await self._take(client, push, self._wanted, number)
            except EngineMismatchError:
                raise
            except (WeightsError, EngineError) as error:
                self._note_failure(error, number)
                await self._wait_newer(RETRY_S[min(self.num_failures, len(RETRY_S)) - 1], number)

    def _note_failure(self, error: Exception, number: int) -> None:
        self.num_failures += 1
        self.failed_number = number
        self.trouble = str(error)
        self.hold = None
        name = self._slot.name
        if self._wanted is None and isinstance(error, WeightsError):
            self._is_start_refused = True
            _log.info("%s waits for published weights: %s", name, error)
        else:
            self._slot.shared.tally.count("num_switches_failed")
            has = "unknown weights, it takes no requests" if self.weights is None else f"{self.version}"
            _log.warning("%s did not take new weights (it has %s): %s", name, has, error)
        self._slot.shared.notify()

    async def _prove_start(self, client: ServerClient) -> None:
        """Before anything was published: verify that the server has the weights that the run starts from."""
        weights = await self._slot.shared.load(None)
        self.is_switching = True
        try:
            await client.pause("retract")
            try:
                await verify(client, weights)
                await client.flush_cache()
                await client.set_label(weights.label)
            except BaseException as error:
                await undo(error, client.resume())
                raise
            await client.resume()
            self._has(weights, 0)
        finally:
            self._left(client)

    async def _take(self, client: ServerClient, push: Push, manifest: Manifest, number: int) -> None:
        """Switch to a version when the mode allows it; return without, if a newer one came meanwhile."""
        weights = await self._slot.shared.load(manifest)
        while self._number == number:
            mode = self._mode_now()
            if mode is not None:
                await self._switch(client, push, weights, number, mode)
                return
            await self._wait(self._hold_left_s())

    def _mode_now(self) -> SwitchMode | None:
        """Return how to switch now; None: not now. Holds new work back where the mode says so."""
        slot = self._slot
        if self.weights is None:
            return "retract"  # whatever is running or cached there is none of ours
        if self._mode == "in_place":
            return "in_place"
        if self.num_behind > self._config.engine.max_versions_behind:
            return "retract"
        if self._mode == "retract":
            if not slot.running or self._budget.allows(slot.running):
                return "retract"
            if self._put_off_number != self._number:
                self._put_off_number = self._number
                slot.shared.tally.count("num_switches_put_off")
            return None
        if self._held_since_s is None:
            self._held_since_s = asyncio.get_running_loop().time()
        self.hold = "turns" if self._mode == "wait" else "sessions"
        if not slot.running and (self.hold == "turns" or not slot.sessions):
            return "idle"
        if self._hold_left_s() == 0.0:
            _log.warning("%s: a switch was held back for too long; it is forced", slot.name)
            return "retract"
        return None

    def _hold_left_s(self) -> float | None:
        if self._held_since_s is None:
            return None
        held_s = asyncio.get_running_loop().time() - self._held_since_s
        return max(0.0, self._config.engine.hold_timeout_s - held_s)

    async def _switch(
        self, client: ServerClient, push: Push, weights: PublishedWeights, number: int, mode: SwitchMode
    ) -> None:
        slot, had = self._slot, self.weights
        attempts = [attempt for attempt in slot.running if weights.label not in attempt.labels]
        for attempt in attempts:
            attempt.labels.append(weights.label)
        self.is_switching = True
        try:
            report = await switch(client, push, weights, mode, is_checked=self._config.weights.is_checked)
            self._has(weights, number)
            self.last_report = report
            slot.shared.tally.switched(report.pause_s)
            _log.info("%s: %s by %s, paused %.3f s", slot.name, weights.version, mode, report.pause_s)
        except (WeightsError, EngineError) as error:
            self.weights = None
            if await self._still_has(client, had, getattr(error, "label", None)):
                self.weights = had
                for attempt in attempts:
                    attempt.labels.remove(weights.label)
            else:
                slot.cut(f"its weights are not known after a failed update ({error})")
            raise
        finally:
            self._left(client)

    def _left(self, client: ServerClient) -> None:
        """The weights are not being changed any more.

        On a connection that was given up that can come late, when another one has taken its place: then it
        says nothing about the server.
        """
        if self._client is client:
            self.hold = self._held_since_s = None
            self.is_switching = False
            self._slot.shared.notify()

    def _has(self, weights: PublishedWeights, number: int) -> None:
        """The server has these weights, verified."""
        self.weights, self.has_number = weights, number
        self.num_failures = self.failed_number = 0
        self.trouble = ""
        self._budget.switched(self._slot.running)

    async def _still_has(self, client: ServerClient, had: PublishedWeights | None, label: str | None) -> bool:
        """Whether a server whose update failed has its old weights, all of them, and is not paused."""
        if had is None or label != had.label:
            return False
        try:
            await client.resume()
            if self._config.weights.is_checked:
                await verify(client, had)
        except (WeightsError, EngineError) as error:
            _log.warning("%s: %s", self._slot.name, error)
            return False
        return True

    async def _wait(self, timeout_s: float | None = None) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout_s):
                await self._look.wait()
        self._look.clear()

    async def _wait_newer(self, timeout_s: float, number: int) -> None:
        """Wait, but not when there is a newer version to try."""
        loop = asyncio.get_running_loop()
        until_s = loop.time() + timeout_s
        while self.failed_number == number == self._number and (left_s := until_s - loop.time()) > 0:
            await self._wait(left_s)


def _is_same(one: Manifest, other: Manifest) -> bool:
    return one.version == other.version and one.digest == other.digest
