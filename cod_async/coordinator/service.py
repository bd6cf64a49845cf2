"""The coordinator process: one loop around the brain.

Poll, apply, commit, and only then acknowledge and reply. A commit that holds segments is flushed on a second
thread, while this one already receives and decodes what the next commit will hold; the database itself is
used by one thread at a time. Nothing is kept beyond that which the database or the clients do not know, so
the process may die at any instruction; started again on the same run folder it takes the same port if it can,
gives every known session a fresh timeout, and goes on.
"""

from __future__ import annotations

import contextlib
import logging
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from pathlib import Path
from types import FrameType

from cod_async.config.load import load_resolved
from cod_async.config.schema import Config
from cod_async.coordinator.brain import Brain
from cod_async.coordinator.core import Outbox
from cod_async.coordinator.meter import StatusMeter
from cod_async.errors import StoreError, WireError
from cod_async.store.database import RunStore
from cod_async.store.metrics_log import MetricsLog
from cod_async.transport.address import read_address, write_address
from cod_async.transport.server_link import ServerLink
from cod_async.wire.messages import Hello, SegmentData
from cod_async.wire.session import Event, Received

log = logging.getLogger(__name__)

TICK_S = 0.05
"""Longest wait for a message; time-driven work happens at least this often."""
BURST_S = 0.001
"""Pause between two looks for messages while a commit fills or is flushed: taken in bursts they cost less."""
STATUS_INTERVAL_S = 1.0
MAX_STATUS_INTERVAL_S = 15.0
"""Status lines grow rarer with the age of the process, a second for an hour, so that weeks fit the file."""


class Service:
    """A running coordinator.

    Args:
        run_dir: run folder.
        config: the resolved configuration.

    Raises:
        InputError: the address is busy, malformed or not allowed.
        StoreError: the run database cannot be used.
    """

    def __init__(self, run_dir: Path, config: Config) -> None:
        self._config = config
        self._is_told_to_stop = False
        self._is_credit_open = True
        self._flusher = ThreadPoolExecutor(1, "flush")
        self._flush: tuple[Future[None], Outbox] | None = None
        self._store = RunStore(run_dir)
        self._brain = Brain(self._store, config, config.run.name)
        if self._brain.finished and not self._brain.is_nothing_left:
            self._brain.reopen()
        self._link = ServerLink(
            config.transport.bind,
            config.run.name,
            config.transport,
            allocate_session=self._allocate,
            known_sessions=self._brain.known_sessions(),
            preferred_address=read_address(run_dir),
        )
        self._metrics = MetricsLog(run_dir)
        self._meter = StatusMeter(self._brain, self._metrics, self._store)
        self._copies = self._store.copies(config.run.name, config.store.checkpoint_copies)
        write_address(run_dir, self._link.address)
        self._manifest_told = None if self._brain.manifest is None else self._brain.manifest.version
        if self._brain.manifest is not None:
            self._link.set_manifest(self._brain.manifest)
        log.info("run %s: listening on %s", config.run.name, self._link.address)

    def stop(self, number: int, frame: FrameType | None) -> None:
        """Handle SIGTERM and SIGINT: finish the commit under way and leave; clients find a successor.

        A run that is over is wound up first.
        """
        self._is_told_to_stop = True

    def run(self) -> int:
        """Serve until the run is over or the process is told to stop; return the exit code.

        A run that was finished before this process started is left after a session timeout in which nobody
        came.
        """
        look_at = status_at = 0.0
        began_at = time.monotonic()
        over_at: float | None = None
        has_met_anyone = False
        while not (self._is_told_to_stop and not self._brain.finished):
            self.turn()
            if self._is_told_to_stop or self._brain.finished or time.monotonic() >= look_at:
                self._end_commit()  # what follows uses the store
            now = time.monotonic()
            has_met_anyone = has_met_anyone or self._brain.num_live_sessions > 0
            if now >= look_at and self._flush is None:
                look_at = now + STATUS_INTERVAL_S
                self._give_or_withdraw_credit()
            if now >= status_at and self._flush is None:
                age_s = now - began_at
                status_at = now + min(MAX_STATUS_INTERVAL_S, max(STATUS_INTERVAL_S, age_s / 3600))
                self._write_status()
            if not self._brain.finished:
                over_at = None
                continue
            idle_s = self._config.transport.session_timeout_s
            over_at = over_at or now + (self._config.run.grace_s if has_met_anyone else idle_s)
            if self._is_told_to_stop:  # over anyway: let the last clients say goodbye, but not for long
                over_at = min(over_at, now + self._config.run.grace_s / 3)
                self._is_told_to_stop = False
            if now > over_at or (has_met_anyone and self._brain.num_live_sessions == 0):
                break
        self._end_commit()
        if self._brain.finished:
            self._brain.close_run()
            log.info("run %s: over (%s)", self._config.run.name, self._brain.finished)
        return 0

    @property
    def link(self) -> ServerLink:
        """The coordinator's end of all connections."""
        return self._link

    @property
    def num_segments(self) -> int:
        """Segments committed by this process."""
        return self._brain.num_segments

    @property
    def num_dropped(self) -> int:
        """Segments of the run that were dropped, whatever for."""
        return self._brain.num_dropped

    def turn(self) -> None:
        """One turn of the loop: poll, apply and commit, acknowledge and reply.

        When it returns, a commit of segments may still be under way; the next turn ends it.
        """
        events = self._collect()
        self._end_commit()
        out = self._brain.stage(events)
        if out.settled:
            self._flush = self._flusher.submit(self._store.commit), out
        else:
            self._store.commit()
            self._answer(out)

    def _end_commit(self) -> None:
        """Wait for the commit under way, if there is one, and send what had to wait for it."""
        if self._flush is not None:
            (future, out), self._flush = self._flush, None
            future.result()
            self._answer(out)

    def _allocate(self, hello: Hello) -> int:
        if self._flush is not None:
            wait([self._flush[0]])  # the store is in use; whether it failed, the next turn will hear
        return self._brain.allocate(hello)

    def _answer(self, out: Outbox) -> None:
        manifest = self._brain.manifest
        if manifest is not None and manifest.version != self._manifest_told:
            self._manifest_told = manifest.version
            self._link.set_manifest(manifest)
        for session, seq, reason in out.settled:
            self._link.settle(session, seq, reason)
        self._link.flush_acks()
        for session, message in out.replies:
            try:
                self._link.send(session, message)
            except WireError as error:
                log.error(
                    "run %s: a %s was not sent: %s", self._config.run.name, type(message).__name__, error
                )
        if out.checkpoint is not None:
            self._copies.request(*out.checkpoint)
        self._meter.write_news()
        self._write_copies()

    def _write_copies(self) -> None:
        while self._copies.news:
            self._meter.write_event(**self._copies.news.pop(0))

    def close(self) -> None:
        """Release the address, the files and the database.

        A copy of the database that is under way may end when the run is over; else it has a moment.
        """
        with contextlib.suppress(StoreError):  # it was raised where it mattered, or nobody was told of it
            self._end_commit()
        grace_s = self._config.run.grace_s
        self._copies.close(grace_s if self._brain.finished else min(2.0, grace_s / 10))
        self._flusher.shutdown()
        self._link.close()
        with contextlib.suppress(sqlite3.Error, OSError):  # a failed disk must not hide what it failed at
            self._write_copies()
            self._write_status()
            self._metrics.close()
        self._store.close()

    def _write_status(self) -> None:
        self._meter.write_status(rejected=dict(self._link.rejected), is_credit_open=self._is_credit_open)

    def _give_or_withdraw_credit(self) -> None:
        """At the ceiling of the database actors wait: nothing acknowledged is ever thrown away."""
        num_bytes, ceiling = self._store.num_bytes(), self._config.store.max_database_bytes
        is_open = num_bytes < ceiling
        self._link.set_credit_open(is_open)
        if is_open == self._is_credit_open:
            return
        self._is_credit_open = is_open
        run = self._config.run.name
        if is_open:
            log.warning("run %s: the database has room again; actors go on", run)
        else:
            log.error(
                "run %s: the database holds %d bytes, store.max_database_bytes is %d: actors wait. "
                "Checkpoints make room if store.retention is until_checkpoint; or resume with a higher one",
                *(run, num_bytes, ceiling),
            )

    def _collect(self) -> Sequence[Event]:
        """Wait for messages; when segments come, wait a little longer so that one flush covers many."""
        store = self._config.store
        events: list[Event] = []
        while self._flush is not None and not self._flush[0].done():
            room = store.commit_max_segments - len(events)
            if room <= 0:
                break
            more = self._link.poll(0.0, max_messages=room)
            events += more
            if not more:
                wait([self._flush[0]], BURST_S)
        self._end_commit()
        is_empty = not events
        room = store.commit_max_segments - len(events)
        events += self._link.poll(TICK_S if is_empty else 0.0, max_messages=room) if room > 0 else []
        until = time.monotonic() + store.commit_interval_s
        while any(isinstance(e, Received) and isinstance(e.message, SegmentData) for e in events):
            room, left_s = store.commit_max_segments - len(events), until - time.monotonic()
            if room <= 0 or left_s <= 0:
                break
            time.sleep(min(left_s, BURST_S))
            events += self._link.poll(0.0, max_messages=room)
        return events


def run_coordinator(run_dir: Path) -> int:
    """Run the coordinator of the run in ``run_dir``; the body of ``cod coordinator RUN``.

    Returns:
        0: the run is over, or the process was told to stop.

    Raises:
        InputError: the folder is not a run folder, or the address cannot be had.
        StoreError: the run database cannot be used or written; nothing unacknowledged was lost, start again.
    """
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    config = load_resolved(run_dir)
    service = Service(run_dir, config)
    old = {number: signal.signal(number, service.stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return service.run()
    except StoreError:
        log.exception("run %s: the run database failed; nothing more was acknowledged", config.run.name)
        raise
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
        service.close()
