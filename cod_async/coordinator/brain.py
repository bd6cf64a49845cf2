"""The coordinator's mind: what happens in sessions goes in, messages and acknowledgements come out.

:meth:`Brain.apply` takes the events of one poll, writes everything they lead to in one transaction, and
returns what may be sent now that it is on the disk. It knows no sockets and asks a clock only for monotonic
time, so tests drive it with messages, kill it after any of them, and load it again from the database.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

from cod_async.config.schema import Config
from cod_async.coordinator.core import Core, Outbox
from cod_async.coordinator.grouping import Grouping
from cod_async.coordinator.intake import Intake
from cod_async.coordinator.leasing import Leasing
from cod_async.coordinator.selection import Selection
from cod_async.coordinator.training import Training
from cod_async.errors import StoreError
from cod_async.store.database import RunStore
from cod_async.store.history import StepRow
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import (
    Bye,
    Checkpointed,
    Finished,
    Heartbeat,
    Hello,
    LeaseRequest,
    LeaseReturn,
    NewVersion,
    OpenLineage,
    Published,
    Refused,
    SegmentData,
    StepDone,
    StepRequest,
    ToCoordinator,
)
from cod_async.wire.session import Closed, Event, KnownSession, Opened, Received

log = logging.getLogger(__name__)


class Brain:
    """The coordinator without its sockets.

    Args:
        store: the run database, opened for writing.
        config: the resolved configuration.
        run: run id.
        now: monotonic clock in seconds.

    Raises:
        StoreError: the database belongs to another run.
    """

    def __init__(
        self, store: RunStore, config: Config, run: str, now: Callable[[], float] = time.monotonic
    ) -> None:
        self._store = store
        with store.transaction():
            before = store.get_meta("run")
            if before is not None and before != run:
                raise StoreError(f"{store.path}: holds run {before!r}, not {run!r}; use another run folder")
            if before is None:
                store.set_meta("run", run)
            self._core = Core(store, config, run, now)
        self._grouping = Grouping(self._core)
        self._leasing = Leasing(self._core, self._grouping)
        self._intake = Intake(self._core, self._leasing, self._grouping)
        self._selection = Selection(self._core, self._grouping)
        self._training = Training(self._core, self._leasing, self._selection)
        self._leasing.restore_clocks()

    # ------------------------------------------------------------------------------------------------------
    # sessions

    def allocate(self, hello: Hello) -> int:
        """Open a session for a Hello and return its number; it is durable when this returns."""
        with self._store.transaction():
            session = self._store.sessions.open(hello.role, hello.name, hello.instance, hello.pid, hello.host)
        self._core.sessions[session] = (hello.role, hello.name)
        return session

    def known_sessions(self) -> list[KnownSession]:
        """Return the sessions that were live when an earlier coordinator of this run ended."""
        return [KnownSession(row.session, row.role, row.name) for row in self._store.sessions.live()]

    # ------------------------------------------------------------------------------------------------------
    # the cycle

    def apply(self, events: Sequence[Event]) -> Outbox:
        """Apply the events of one poll and everything that time has brought, in one transaction.

        Returns:
            What may be sent and acknowledged now.

        Raises:
            StoreError: nothing was written; end the process, it must be loaded again from the database.
        """
        out = self.stage(events)
        self._store.commit()
        return out

    def stage(self, events: Sequence[Event]) -> Outbox:
        """Apply events as :meth:`apply` does, but leave the flush to ``RunStore.commit``.

        Until that has returned, nothing of the answer may be sent and nothing else may use the store.
        """
        out = self._core.out = Outbox()
        with self._store.staged():
            for event in events:
                match event:
                    case Opened():
                        self._training.tell_if_over(event.session.session)
                    case Closed():
                        self._closed(event.session.session, event.reason)
                    case Received():
                        self._received(event.session.session, event.message)
            self._tick()
        return out

    def _tick(self) -> None:
        self._intake.tick()
        self._grouping.tick()
        self._training.tick()
        self._leasing.tick()

    def _closed(self, session: int, reason: str) -> None:
        role, _ = self._core.sessions.pop(session, (None, ""))
        if role is None:
            return
        self._store.sessions.close(session, "ended" if reason == "bye" else "lost", reason)
        self._leasing.take_session(session, reason)
        self._intake.forget_session(session)
        if role == "learner":
            self._training.forget_session(session, reason)
        log.info("run %s: session %d (%s) is over: %s", self._core.run, session, role, reason)

    def _received(self, session: int, message: ToCoordinator) -> None:
        core = self._core
        if not core.is_live(session):
            return  # an event of a session that was closed by an earlier event of the same poll
        role, _ = core.sessions[session]
        match message:
            case Heartbeat():
                core.store.sessions.report(session, message.counters)
                self._leasing.heartbeat(session, message)
                self._retell_version(session, role, message)
                self._training.tell_if_over(session)
            case Bye():
                core.store.sessions.report(session, message.counters)
            case SegmentData() | LeaseRequest() | LeaseReturn() if role == "actor":
                self._from_actor(session, message)
            case OpenLineage() | StepRequest() | StepDone() | Published() | Checkpointed() | Finished() if (
                role == "learner"
            ):
                self._from_learner(session, message)
            case _:
                detail = f"{type(message).__name__} from a client with role {role}"
                core.out.send(session, Refused(code="wrong_role", detail=detail, is_fatal=True))

    def _retell_version(self, session: int, role: str, heartbeat: Heartbeat) -> None:
        """Announce the newest version again to an actor that is behind: the first word may have been lost,
        and with a lag bound of 0 no later one would ever come.
        """
        manifest, engine = self._core.manifest, heartbeat.engine_version
        if role == "actor" and manifest is not None and engine is not None and engine < manifest.version:
            self._core.out.send(session, NewVersion(manifest=manifest))

    def _from_actor(self, session: int, message: SegmentData | LeaseRequest | LeaseReturn) -> None:
        match message:
            case SegmentData():
                self._intake.take(session, message)
            case LeaseRequest() if session not in self._intake.expelled:
                self._leasing.request(session, message)
            case LeaseReturn():
                self._leasing.give_back(session, message)
            case _:
                detail = "this actor sent bad segments and gets no more lifecycles"
                self._core.out.send(session, Refused(code="quarantined", detail=detail, is_fatal=True))

    def _from_learner(
        self,
        session: int,
        message: OpenLineage | StepRequest | StepDone | Published | Checkpointed | Finished,
    ) -> None:
        match message:
            case OpenLineage():
                self._training.open_lineage(session, message)
            case StepRequest():
                self._training.request_step(session, message)
            case StepDone():
                self._training.finish_step(session, message)
            case Published():
                self._training.publish(session, message)
            case Checkpointed():
                self._training.checkpoint(session, message)
            case Finished():
                self._training.finish(message)

    # -------------------------------------------------------------------------------------------------- views
    # and end

    @property
    def manifest(self) -> Manifest | None:
        """The newest published version of the current lineage."""
        return self._core.manifest

    @property
    def lineage(self) -> int:
        """The lineage that the learner works on, -1 before its first word."""
        return -1 if self._core.tree is None else self._core.tree.current

    @property
    def step(self) -> int:
        """The step that the learner takes next."""
        return self._core.step

    @property
    def finished(self) -> str:
        """Why the run is over, or empty."""
        return self._core.finished or ""

    @property
    def is_nothing_left(self) -> bool:
        """Whether a finished run has nothing more to do under the present configuration."""
        return bool(self._core.finished) and self._core.should_stop

    def reopen(self) -> None:
        """A finished run goes on, because the configuration now asks for more steps."""
        with self._store.transaction():
            self._store.set_meta("finished", "")
        self._core.finished = None

    def unreported_steps(self) -> list[StepRow]:
        """Return the done steps that have no line in the metrics file yet."""
        return self._store.history.unreported_steps()

    def mark_reported(self, rows: Sequence[StepRow]) -> None:
        """Note that steps have their lines in the metrics file."""
        with self._store.transaction():
            for row in rows:
                self._store.history.mark_reported(row.version)

    @property
    def num_segments(self) -> int:
        """Segments committed since this process started."""
        return self._core.tally["segments"]

    @property
    def num_dropped(self) -> int:
        """Segments of the run that were dropped, whatever for."""
        return self._core.dropped.total()

    @property
    def num_live_sessions(self) -> int:
        """Clients that are connected or expected back."""
        return len(self._core.sessions)

    def close_run(self) -> None:
        """After the last client has gone: what was never selected is dropped as ``run_over``.

        Who has not said goodbye by now is lost; nobody would find that out any more.
        """
        with self._store.transaction():
            for session in list(self._core.sessions):
                self._closed(session, "run_over")
            for group, state, _ in self._store.work.untrained():
                if state != "planned":
                    self._grouping.drop(group, "run_over")
            self._grouping.drop_segments(self._store.segments.unsettled(), "run_over")  # of late members

    def status(self) -> dict[str, Any]:
        """Return the JSON-able numbers of the present moment; rates are the caller's business."""
        core = self._core
        groups = self._store.work.count_groups()
        leases = self._store.work.count_leases()
        return {
            "lineage": -1 if core.tree is None else core.tree.current,
            "step": core.step,
            "published_step": -1 if core.manifest is None else core.manifest.version.step,
            "num_segments": core.tally["segments"],
            "num_tokens": core.tally["tokens"],
            "num_action_tokens": core.tally["action_tokens"],
            "groups": {
                state: groups.get(state, 0) for state in ("open", "closed", "planned", "trained", "dropped")
            },
            "leases": leases,
            "sessions": {role: len(core.sessions_of(role)) for role in ("actor", "learner", "observer")},
            "drops": dict(core.dropped),
            "is_learner_waiting": self._training.is_learner_waiting,
            "waits_for": self._selection.waits_for if self._training.is_learner_waiting else "",
            "lag_limit_steps": core.limits.admission_lag,
        }
