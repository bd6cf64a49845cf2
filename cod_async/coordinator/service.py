"""The coordinator process: one loop around the brain.

Poll, apply, commit, and only then acknowledge and reply. Between two polls nothing is kept that the database
or the clients do not know, so the process may die at any instruction; started again on the same run folder it
takes the same port if it can, gives every known session a fresh timeout, and goes on.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import signal
import sqlite3
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType

from cod_async.config.load import load_resolved, write_atomic
from cod_async.config.schema import Config
from cod_async.coordinator.brain import Brain
from cod_async.coordinator.meter import StatusMeter
from cod_async.errors import StoreError, WireError
from cod_async.store.database import RunStore
from cod_async.store.metrics_log import MetricsLog
from cod_async.transport.address import ADDRESS_NAME, read_address
from cod_async.transport.server_link import ServerLink
from cod_async.wire.messages import SegmentData
from cod_async.wire.session import Event, Received

log = logging.getLogger(__name__)

TICK_S = 0.05
"""Longest wait for a message; time-driven work happens at least this often."""
STATUS_INTERVAL_S = 1.0
MAX_STATUS_INTERVAL_S = 15.0
"""Status lines grow rarer with the age of the process, an hour adding a second, so that weeks fit the file."""


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
        self._store = RunStore(run_dir)
        self._brain = Brain(self._store, config, config.run.name)
        if self._brain.finished and not self._brain.is_nothing_left:
            self._brain.reopen()
        self._link = ServerLink(
            config.transport.bind,
            config.run.name,
            config.transport,
            allocate_session=self._brain.allocate,
            known_sessions=self._brain.known_sessions(),
            preferred_address=read_address(run_dir),
        )
        self._metrics = MetricsLog(run_dir)
        self._meter = StatusMeter(self._brain, self._metrics, self._store)
        address = json.dumps({"address": self._link.address, "pid": os.getpid()})
        write_atomic(run_dir / ADDRESS_NAME, address.encode() + b"\n")
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
            now = time.monotonic()
            has_met_anyone = has_met_anyone or self._brain.num_live_sessions > 0
            if now >= look_at:
                look_at = now + STATUS_INTERVAL_S
                self._give_or_withdraw_credit()
            if now >= status_at:
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
        if self._brain.finished:
            self._brain.close_run()
            log.info("run %s: over (%s)", self._config.run.name, self._brain.finished)
        return 0

    def turn(self) -> None:
        """One turn of the loop: poll, apply and commit, acknowledge and reply."""
        events = self._collect()
        out = self._brain.apply(events)
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
        self._meter.write_news()

    def close(self) -> None:
        """Release the address, the files and the database."""
        self._link.close()
        with contextlib.suppress(sqlite3.Error, OSError):  # a failed disk must not hide what it failed at
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
                "run %s: the database holds %d bytes, store.max_database_bytes is %d: actors wait. Checkpoints "
                "make room with store.retention = until_checkpoint; otherwise resume with a higher ceiling",
                *(run, num_bytes, ceiling),
            )

    def _collect(self) -> Sequence[Event]:
        """Wait for messages; when segments come, wait a little longer so that one flush covers many."""
        store = self._config.store
        events = self._link.poll(TICK_S, max_messages=store.commit_max_segments)
        until = time.monotonic() + store.commit_interval_s
        while any(isinstance(e, Received) and isinstance(e.message, SegmentData) for e in events):
            room, left_s = store.commit_max_segments - len(events), until - time.monotonic()
            more = self._link.poll(left_s, max_messages=room) if room > 0 and left_s > 0 else []
            if not more:
                break
            events += more
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
