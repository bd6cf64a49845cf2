"""The learner's conversation with the coordinator, and the wish to stop.

Heartbeats run on the link's own thread. The learner's thread asks and waits; a wait for data ends at once
when somebody asks the learner to stop, a wait for an acknowledgement ends when the grace is over.
"""

from __future__ import annotations

import secrets
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeoutError
from pathlib import Path
from types import FrameType
from typing import Any

from cod_async.config.schema import Config
from cod_async.lifecycle.segment import Version
from cod_async.transport.client_link import ClientLink
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import (
    Bye,
    Checkpointed,
    Finished,
    Heartbeat,
    LineageOpened,
    OpenLineage,
    Published,
    StepBatch,
    StepDone,
    StepRecorded,
    StepRequest,
    Stop,
    ToClient,
    TrainItem,
)

_POLL_S = 0.1
_ACK_SHARE = 0.25
_MAX_ACK_S = 5.0
"""After a stop, acknowledgements are waited for during this share of the grace; the rest is for the
checkpoint."""


class StopWish:
    """Set once by SIGTERM, SIGINT or the coordinator; remembers why, and how long to wait for acks."""

    def __init__(self, grace_s: float) -> None:
        self.reason = ""
        self.ack_deadline = float("inf")
        self._grace_s = grace_s
        self._event = threading.Event()

    @property
    def is_set(self) -> bool:
        """Whether the learner has been asked to stop."""
        return self._event.is_set()

    def wish(self, reason: str) -> None:
        """Ask to stop; only the first reason counts. Safe in signal handlers and on any thread."""
        if not self._event.is_set():
            self.reason = reason
            self.ack_deadline = time.monotonic() + min(_ACK_SHARE * self._grace_s, _MAX_ACK_S)
            self._event.set()

    def install(self) -> Callable[[], None]:
        """Take over SIGTERM and SIGINT (main thread only); returns a function that puts the old handlers
        back.
        """
        if threading.current_thread() is not threading.main_thread():
            return lambda: None

        def handler(number: int, frame: FrameType | None) -> None:
            self.wish(signal.Signals(number).name)

        old = {number: signal.signal(number, handler) for number in (signal.SIGTERM, signal.SIGINT)}

        def restore() -> None:
            for number, previous in old.items():
                signal.signal(number, previous)

        return restore


class CoordinatorPort:
    """Requests of the learner, each waiting for its answer.

    Args:
        link: a link with role ``learner``.
        stop: ends waits.
    """

    def __init__(self, link: ClientLink, stop: StopWish) -> None:
        self._link = link
        self._stop = stop
        self._publishing: Future[Any] | None = None
        self._dropped: tuple[Version, str] | None = None
        self.counters: dict[str, float] = {}
        self.engine_version: Version | None = None
        link.set_heartbeat(
            lambda: Heartbeat(counters=dict(self.counters), engine_version=self.engine_version)
        )

    @classmethod
    def open(cls, run_dir: Path, config: Config, stop: StopWish) -> CoordinatorPort:
        """Connect to the run's coordinator; keeps trying until it answers."""

        def on_message(message: ToClient) -> None:
            if isinstance(message, Stop):
                stop.wish(f"coordinator: {message.reason}")

        link = ClientLink.for_run(run_dir, config, role="learner", name="learner")
        port = cls(link, stop)
        link.start(on_message)
        return port

    def open_lineage(self, branch: Version | None, trained_digest: str) -> LineageOpened | None:
        """Start at ``branch`` (None: from the starting model); None if asked to stop before the answer."""
        message = OpenLineage(branch=branch, trained_digest=trained_digest, nonce=secrets.token_hex(16))
        opened: LineageOpened | None = self._wait(self._link.request_future(message), is_interruptible=True)
        return opened

    def next_batch(self, version: Version) -> tuple[str, list[TrainItem]] | None:
        """Wait for the batch of the step from ``version``: (plan digest, items sorted by key), or None to
        stop.
        """
        while True:
            parts: list[StepBatch] | None = self._wait(
                self._link.request_future(StepRequest(version=version)), is_interruptible=True
            )
            if parts is None:
                return None
            if (version, parts[0].plan_digest) != self._dropped:
                break  # else: what was sent once more before the plan was dropped arrived only now
        items = sorted((item for part in parts for item in part.items), key=lambda item: item.key)
        return parts[0].plan_digest, items

    def step_done(
        self, version: Version, plan_digest: str, metrics: dict[str, float], witness: dict[str, str]
    ) -> Future[StepRecorded]:
        """Report a step that was taken; the answer is waited for with :meth:`recorded`."""
        message = StepDone(version=version, plan_digest=plan_digest, metrics=metrics, witness=witness)
        return self._link.request_future(message)

    def dropped(self, version: Version, plan_digest: str) -> None:
        """Report a plan that cannot be trained, and wait until it is dropped."""
        message = StepDone(version=version, plan_digest=plan_digest, metrics={}, dropped_as="nonfinite")
        self._wait(self._link.request_future(message))
        self._dropped = (version, plan_digest)

    def recorded(self, future: Future[StepRecorded]) -> bool:
        """Wait until the step is in the run database and return whether it was the last one.

        Asked to stop while the coordinator is silent, the wait ends with the ack deadline; the checkpoint
        that follows proves the step when the run is resumed.
        """
        recorded: StepRecorded | None = self._wait(future)
        return recorded is None or recorded.should_stop

    def published(self, manifest: Manifest) -> None:
        """Announce a durable version; waits for the previous announcement, not for this one."""
        self.settle()
        self.engine_version = manifest.version
        self._publishing = self._link.request_future(Published(manifest=manifest))

    def checkpointed(self, message: Checkpointed) -> None:
        """Announce a durable checkpoint and wait until it is known."""
        self._wait(self._link.request_future(message))

    def settle(self) -> None:
        """Wait until the last announced version is known to the coordinator."""
        if self._publishing is not None:
            self._wait(self._publishing)
            self._publishing = None

    def finished(self, version: Version, reason: str) -> None:
        """Say that the last step was taken."""
        self._link.send(Finished(version=version, reason=reason))

    def close(self) -> None:
        """Say Bye and end the link's thread."""
        self._link.close(Bye(counters=dict(self.counters)))

    def _wait(self, future: Future[Any], *, is_interruptible: bool = False) -> Any:
        """Return the answer, or None when asked to stop (at once if interruptible, else at the ack
        deadline).
        """
        while True:
            try:
                return future.result(timeout=_POLL_S)
            except FutureTimeoutError:
                if self._stop.is_set and (is_interruptible or time.monotonic() > self._stop.ack_deadline):
                    future.cancel()
                    return None
