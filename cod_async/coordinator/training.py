"""The learner's side of the coordinator: lineages, steps, publications, checkpoints, the end of the run.

Every request is idempotent: a repeated one gets the same answer. A learner that speaks of a lineage that is
not the newest is an old process that does not know it was replaced; it is told to stop.
"""

from __future__ import annotations

import logging

from msgspec import UNSET

from cod_async.coordinator.core import Core
from cod_async.coordinator.leasing import Leasing
from cod_async.coordinator.report import reward_gap
from cod_async.coordinator.selection import Selection, report_of
from cod_async.lifecycle.segment import Version
from cod_async.store.history import StepRow
from cod_async.wire.messages import (
    Checkpointed,
    Finished,
    LineageOpened,
    NewVersion,
    OpenLineage,
    Published,
    PublishRecorded,
    Refused,
    StepDone,
    StepRecorded,
    StepRequest,
    Stop,
)

log = logging.getLogger(__name__)


class Training:
    """Everything that the learner says. The caller owns the transaction."""

    def __init__(self, core: Core, leasing: Leasing, selection: Selection) -> None:
        self._core = core
        self._leasing = leasing
        self._selection = selection
        self._waiting: dict[int, Version] = {}
        self._seen_generation = -1
        core.should_stop = core.version is not None and self._should_stop()

    @property
    def is_learner_waiting(self) -> bool:
        """Whether a StepRequest could not be answered yet."""
        return bool(self._waiting)

    def forget_session(self, session: int, reason: str) -> None:
        """The session ended; its open request will come again from another one.

        A learner that had nothing left to do and left in peace has finished, even if that word was lost.
        """
        self._waiting.pop(session, None)
        core = self._core
        core.waits_for = core.waits_for if self._waiting else ""
        version = core.version
        if version is None or not core.should_stop or core.finished is not None:
            return
        if reason == "bye" or version in core.store.history.checkpoints():
            self.finish(Finished(version=version, reason="all steps are done"))

    def tick(self) -> None:
        """Answer the step request that waits, if it can be answered now."""
        if self._core.generation == self._seen_generation:
            return
        self._seen_generation = self._core.generation
        for session, version in list(self._waiting.items()):
            self.request_step(session, StepRequest(version=version))

    # -------------------------------------------------------------------------------------------------------
    # lineages

    def open_lineage(self, session: int, message: OpenLineage) -> None:
        """Open a new lineage at a checkpoint or at the very start; roll back what it does not contain."""
        core, history = self._core, self._core.store.history
        known = history.lineage_of_nonce(message.nonce)
        if known is not None:
            lineage, step, num_rolled_back = known
            if core.tree is not None and lineage == core.tree.current:
                self._say_opened(session, message.nonce, lineage, step, num_rolled_back)
            else:
                self._refuse(session, "lineage_replaced", f"lineage {lineage} is not the newest any more")
            return
        branch = message.branch
        if branch is None:
            parent, step = history.current_lineage(), 0
        else:
            if not history.has_lineage(branch.lineage) or not self._proves(branch, message.trained_digest):
                detail = f"no recorded history up to {branch} has the digest {message.trained_digest!r}"
                self._refuse(session, "trained_digest", f"{detail}; resume from another checkpoint")
                return
            parent, step = branch.lineage, branch.step
        num_rolled_back = history.roll_back(parent, step)
        lineage = history.open_lineage(parent, step, message.nonce, num_rolled_back)
        core.reload()
        core.should_stop = self._should_stop()
        core.finished = None
        core.store.set_meta("finished", "")
        core.changed()
        self._waiting.clear()
        core.waits_for = ""
        self._leasing.call_back_unreachable()
        log.info(
            "run %s: lineage %d opened at step %d, %d steps rolled back",
            core.run,
            lineage,
            step,
            num_rolled_back,
        )
        self._say_opened(session, message.nonce, lineage, step, num_rolled_back)

    def _proves(self, branch: Version, digest: str) -> bool:
        """Whether the learner's digest is that of the recorded history up to ``branch``.

        The last step before the checkpoint may be known here as planned only: then the digest proves that it
        was taken.
        """
        history = self._core.store.history
        if history.trained_digest(branch) == digest:
            return True
        planned = history.step_before(branch)
        if planned is None or planned.state != "planned" or planned.trained_digest != digest:
            return False
        history.finish_step(planned.version, planned.report)
        return True

    def _say_opened(self, session: int, nonce: str, lineage: int, step: int, num_rolled_back: int) -> None:
        opened = LineageOpened(nonce=nonce, lineage=lineage, step=step, num_rolled_back=num_rolled_back)
        self._core.out.send(session, opened)

    # --------------------------------------------------------------------------------------------------------
    # -- steps

    def request_step(self, session: int, message: StepRequest) -> None:
        """Answer with the step's batch, or keep the request until there is one."""
        version = message.version
        if not self._is_current(session, version):
            return
        if version.step < self._core.step:
            return  # repeated on the way; the step was taken
        plan = self._selection.plan(version) if version.step == self._core.step else None
        self._core.waits_for = "" if plan is not None else self._selection.waits_for
        if plan is None:
            self._waiting[session] = version
            return
        self._waiting.pop(session, None)
        for batch in self._selection.batches(plan):
            self._core.out.send(session, batch)

    def finish_step(self, session: int, message: StepDone) -> None:
        """Record that a step was taken: its segments are trained."""
        core, history = self._core, self._core.store.history
        version = message.version
        if not self._is_current(session, version):
            return
        plan = history.step(version)
        if message.dropped_as is not UNSET:
            self._drop_plan(session, message, message.dropped_as, plan)
            return
        if plan is None or plan.plan_digest != message.plan_digest:
            self._refuse_plan(session, message, plan)
            return
        if plan.state == "planned":
            report = core.health.judge(report_of(plan, message), message.metrics)
            history.finish_step(version, report)
            core.forecast.step_taken(_busy_s(message.metrics))
            core.step = version.step + 1
            core.changed()
            core.tally["steps"] += 1
            core.should_stop = self._should_stop()
        is_last = version.step + 1 == core.step
        core.out.send(session, StepRecorded(version=version, should_stop=is_last and core.should_stop))

    def _drop_plan(self, session: int, message: StepDone, reason: str, plan: StepRow | None) -> None:
        """Drop a plan that the learner could not train, once, and say so as often as it asks."""
        core, version, digest = self._core, message.version, message.plan_digest
        if plan is not None and plan.plan_digest == digest and plan.state == "planned":
            self._selection.drop(plan, reason)
            log.warning("run %s: the plan of step %s is dropped: %s", core.run, version, reason)
        elif not core.store.history.has_dropped_plan(version, digest):
            self._refuse_plan(session, message, plan)
            return
        core.out.send(session, StepRecorded(version=version, dropped_plan=digest))

    def _refuse_plan(self, session: int, message: StepDone, plan: StepRow | None) -> None:
        recorded = "none" if plan is None else f"{plan.plan_digest} ({plan.state})"
        detail = f"step {message.version}: plan {message.plan_digest}, recorded {recorded}"
        self._refuse(session, "plan_mismatch", detail)

    def _should_stop(self) -> bool:
        """Whether the run is long enough, or the effect it was after stands (``run.early_stop``)."""
        run = self._core.config.run
        version = self._core.version
        if version is None:
            return False
        if version.step >= run.num_steps:
            return True
        stop = run.early_stop
        if not stop.is_enabled or version.step < max(stop.min_steps, stop.window_steps):
            return False
        reports = self._core.store.history.recent_reports(version, stop.window_steps)
        gap = reward_gap(reports)
        return len(reports) == stop.window_steps and gap is not None and gap >= stop.gap

    # -------------------------------------------------------------------------------- versions, checkpoints,
    # the end

    def publish(self, session: int, message: Published) -> None:
        """Record a version and announce it to the actors."""
        core, manifest = self._core, message.manifest
        version = manifest.version
        known = None if core.tree is None else core.tree.digest(version)
        if known is not None and known == manifest.digest:
            core.out.send(session, PublishRecorded(version=version))
            return
        if known is not None:
            self._refuse(session, "digest_mismatch", f"version {version} was published with digest {known}")
            return
        if manifest.run != core.run:
            self._refuse(session, "wrong_run", f"a manifest of run {manifest.run!r}")
            return
        if not self._is_current(session, version):
            return
        assert core.tree is not None  # noqa: S101  (the lineage is current)
        core.store.history.add_version(manifest)
        core.tree.publish(version, manifest.digest)
        core.changed()
        if core.manifest is None or version > core.manifest.version:
            core.manifest = manifest
            for actor in core.sessions_of("actor"):
                core.out.send(actor, NewVersion(manifest=manifest))
        core.out.send(session, PublishRecorded(version=version))

    def checkpoint(self, session: int, message: Checkpointed) -> None:
        """Record a durable checkpoint and let go of payloads that no resume can need any more."""
        core, history = self._core, self._core.store.history
        version = message.version
        if not self._is_current(session, version):
            return
        recorded = history.trained_digest(version)
        if recorded != message.trained_digest:
            self._refuse(session, "trained_digest", f"checkpoint {version}: trained digest is not {recorded}")
            return
        history.add_checkpoint(version, message.path, message.digest, message.trained_digest)
        core.out.checkpoint = (version, message.path)
        if core.config.store.retention == "until_checkpoint":
            assert core.tree is not None  # noqa: S101
            surviving = sorted(saved.step for saved in history.checkpoints() if core.tree.is_surviving(saved))
            if len(surviving) > 1:
                # a step after a resume from there may use again what is within the bound
                again = core.limits.max_lag if core.config.replay.max_uses > 1 else 0
                core.store.prune_payloads(before_step=surviving[-2] - again)
        core.out.send(session, PublishRecorded(version=version))

    def finish(self, message: Finished) -> None:
        """The run is over: tell everyone."""
        core = self._core
        if core.tree is None or message.version.lineage != core.tree.current:
            return
        core.finished = message.reason or "finished"
        core.store.set_meta("finished", core.finished)
        for session in core.sessions:
            self.tell_if_over(session)

    def tell_if_over(self, session: int) -> None:
        """Tell a client of a finished run to stop; again at every sign of life, as any word may be lost."""
        role, _ = self._core.sessions.get(session, ("observer", ""))
        if self._core.finished and role != "learner":
            self._core.out.send(session, Stop(reason=self._core.finished))

    # --------------------------------------------------------------------------------------------------------
    # - helpers

    def _is_current(self, session: int, version: Version) -> bool:
        tree = self._core.tree
        if tree is not None and version.lineage == tree.current:
            return True
        newest = "none" if tree is None else str(tree.current)
        self._refuse(
            session, "lineage_replaced", f"lineage {version.lineage} is not the newest, which is {newest}"
        )
        return False

    def _refuse(self, session: int, code: str, detail: str) -> None:
        log.error("run %s: refused the learner's message: %s: %s", self._core.run, code, detail)
        self._core.out.send(session, Refused(code=code, detail=detail[:4096], is_fatal=True))


def _busy_s(metrics: dict[str, float]) -> float:
    """Return the seconds of a step without its wait for a batch; -1 when the learner does not say."""
    if "step_s" not in metrics:
        return -1.0
    return max(0.0, metrics["step_s"] - metrics.get("wait_s", 0.0))
