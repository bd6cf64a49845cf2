"""Selecting a step's batch: which groups, with which weighted advantages, in how many parts.

A plan is committed before any of it is sent, so a repeated request, also after a crash of either side, gets
the same plan bit for bit. Items are sorted by key, never by arrival. Beside the groups that are due, a step
takes the late members of groups that were trained before, and, if asked for, some groups once more.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

import msgspec

from cod_async.algo.credit import SelectedEpisode, weigh_selection
from cod_async.coordinator.core import Core
from cod_async.coordinator.grouping import Grouping, credit_settings
from cod_async.coordinator.planner import Choice, GroupView, choose_groups, may_lease
from cod_async.coordinator.replay import Used, choose_replays
from cod_async.coordinator.report import PlannedItem, step_report
from cod_async.lifecycle.segment import SegmentKey, Version
from cod_async.store.batches import step_items
from cod_async.store.history import StepItem, StepRow
from cod_async.store.segments import SegmentFate, SegmentRow
from cod_async.store.trained import extend_trained_digest, plan_digest
from cod_async.wire.messages import StepBatch, StepDone, TrainItem

MAX_PART_FRACTION = 0.5
"""A part of a batch is kept below this share of ``max_message_bytes``."""
_encoder = msgspec.msgpack.Encoder()


class _Selected(NamedTuple):
    """A segment of the selection with the number of its group's environment."""

    row: SegmentRow
    environment: str
    is_replay: bool = False


class Selection:
    """Plans steps. The caller owns the transaction."""

    def __init__(self, core: Core, grouping: Grouping) -> None:
        self._core = core
        self._grouping = grouping
        self._settings = credit_settings(core.config)
        self.waits_for = ""

    def plan(self, version: Version) -> StepRow | None:
        """Return the plan of the step that starts from ``version``, making it if it can be made now."""
        row = self._core.store.history.step(version)
        if row is not None:
            return row
        groups = self._choose(version.step)
        if not groups:
            return None
        selected = self._selected(groups, "ready")
        selected += self._late(version.step, {chosen.row.key for chosen in selected})
        selected += self._replayed(version)
        selected.sort(key=lambda chosen: chosen.row.key)
        return self._commit_plan(version, selected)

    def drop(self, plan: StepRow, reason: str) -> None:
        """Undo a plan for good: its segments are dropped, and its step gets another one."""
        core = self._core
        keys = core.store.history.drop_plan(plan.version, reason)
        core.give_back_drops(plan.report)
        self._grouping.drop_unplanned(keys, reason)

    def batches(self, plan: StepRow) -> Iterator[StepBatch]:
        """Return the parts of a plan, each of them small enough to send."""
        parts = list(self._parts(plan.version))
        for index, items in enumerate(parts):
            yield StepBatch(
                version=plan.version,
                plan_digest=plan.plan_digest,
                part=index,
                num_parts=len(parts),
                items=items,
            )

    # ------------------------------------------------------------------------------------------------------
    # choosing

    def _choose(self, step: int) -> tuple[int, ...]:
        """Choose the groups of ``step``, dropping what became too old; empty when it has to wait."""
        while True:
            choice = choose_groups(self._views(step), step, self._core.limits)
            if choice.reason == "unknown_weights" and self._is_stuck(choice):
                choice = choose_groups(self._views(step), step, self._core.limits, may_defer=False)
            if choice.stale:
                self._drop(choice, step)
            elif not choice.last_call:
                break
            for group in choice.last_call:
                self._grouping.close_now(group)
        self.waits_for = choice.reason
        for group in choice.selected:
            self._core.store.work.set_group_state(group, "planned")
        return choice.selected

    def _is_stuck(self, choice: Choice) -> bool:
        """Whether nothing that is running or could be started will ever make the step possible."""
        core = self._core
        untrained = core.store.work.untrained()
        has_open = any(state == "open" for _, state, _ in untrained)
        published = -1 if core.manifest is None else core.manifest.version.step
        is_published = published == core.step or core.step % core.config.weights.publish_every_steps != 0
        can_start = may_lease(len(untrained), core.step, published, core.limits)
        return is_published and not has_open and not can_start and not choice.selected

    def _views(self, step: int) -> list[GroupView]:
        tree = self._core.tree
        assert tree is not None  # noqa: S101  (a step is being planned)
        views = []
        has_last_call = self._core.limits.on_bound == "expire"
        for group, state, floor in self._core.store.work.untrained():
            if state == "planned":
                continue
            if state == "closed":
                births = [
                    tree.birth(version)
                    for version in self._core.store.segments.oldest_versions(group, "ready")
                ]
            else:
                births = [] if floor is None else [tree.birth(floor)]
            oldest = min(births, default=None)
            is_settled = oldest is None or all(
                birth.is_settled for birth in births if birth.step == oldest.step
            )
            is_closed = state == "closed"
            is_closable = has_last_call and not is_closed and self._grouping.can_close_now(group)
            birth = None if oldest is None else oldest.step
            views.append(GroupView(group, is_closed, birth, is_settled, is_closable))
        return views

    def _drop(self, choice: Choice, step: int) -> None:
        """Drop stale groups: of a closed one only the segments that are too old themselves."""
        tree = self._core.tree
        assert tree is not None  # noqa: S101
        for group in choice.stale:
            row = self._core.store.work.group(group)
            if row is None or row.state == "open":
                self._grouping.drop(group, "stale")
                continue
            ready = [
                segment for segment in self._core.store.segments.of_group(group) if segment.state == "ready"
            ]
            bound = step - self._core.limits.max_lag
            keys = [segment.key for segment in ready if tree.birth(segment.oldest).step < bound]
            self._grouping.drop_stale_segments(group, keys)

    # -------------------------------------------------------------------------------------------------------
    # planning

    def _selected(
        self, groups: Sequence[int], state: SegmentFate, *, is_replay: bool = False
    ) -> list[_Selected]:
        store = self._core.store
        selected = []
        for group in groups:
            row = store.work.group(group)
            assert row is not None  # noqa: S101  (it was just selected)
            found = [segment for segment in store.segments.of_group(group) if segment.state == state]
            selected += [_Selected(segment, row.environment, is_replay) for segment in found]
        return selected

    def _late(self, step: int, taken: Collection[SegmentKey]) -> list[_Selected]:
        """Return the late members' segments that wait for any step, and drop those that came too late."""
        core, tree = self._core, self._core.tree
        assert tree is not None  # noqa: S101  (a step is being planned)
        selected, too_late = [], []
        for row in core.store.segments.late_ready():
            if row.key in taken:
                continue
            birth = tree.birth(row.oldest)
            if step - birth.step <= core.limits.max_lag:
                group = core.store.work.group(row.key.group)
                assert group is not None  # noqa: S101  (foreign key)
                selected.append(_Selected(row, group.environment))
            elif birth.is_settled:
                too_late.append(row.key)
        self._grouping.drop_segments(too_late, "late_group")
        return selected

    def _replayed(self, version: Version) -> list[_Selected]:
        """Return the segments that the step uses again; none of them is older than the bound."""
        core, config = self._core, self._core.config.replay
        if config.max_uses < 2 or not config.groups_per_step:
            return []
        tree, first = core.tree, version.step - core.limits.max_lag
        assert tree is not None  # noqa: S101  (a step is being planned)
        pool = []
        for group, num_uses in core.store.history.uses_since(version, first):
            if num_uses < config.max_uses:
                oldest = core.store.segments.oldest_versions(group, "trained")
                births = [birth for found in oldest if (birth := tree.birth(found).step) >= first]
                if births:
                    pool.append(Used(group, min(births), num_uses))
        seed = core.config.run.seed
        groups = choose_replays(pool, config, seed, version.step, core.limits.max_lag)
        kept = {key for group in groups for key in core.store.segments.kept(group)}
        return [
            chosen
            for chosen in self._selected(groups, "trained", is_replay=True)
            if chosen.row.key in kept and tree.birth(chosen.row.oldest).step >= first
        ]

    def _commit_plan(self, version: Version, selected: list[_Selected]) -> StepRow:
        tree, history = self._core.tree, self._core.store.history
        assert tree is not None  # noqa: S101
        episodes = [
            SelectedEpisode(
                return_=chosen.row.return_value or 0.0,
                advantage=chosen.row.advantage or 0.0,
                num_tokens=chosen.row.num_action_tokens,
                pack=chosen.row.key.group,
                taskset=chosen.environment,
                lifecycle=chosen.row.key.member,
            )
            for chosen in selected
        ]
        weighted = weigh_selection(episodes, self._settings)
        items = [
            StepItem(
                key=chosen.row.key,
                lease_epoch=chosen.row.lease_epoch,
                advantage=advantage,
                lag_steps=max(0, version.step - tree.birth(chosen.row.oldest).step),
                is_replay=chosen.is_replay,
            )
            for chosen, advantage in zip(selected, weighted.weighted_advantages, strict=True)
        ]
        digest = plan_digest((item.key, item.lease_epoch, item.advantage) for item in items)
        before = history.trained_digest(version)
        assert before is not None  # noqa: S101  (the step before was recorded)
        planned = [PlannedItem(chosen.row, item) for chosen, item in zip(selected, items, strict=True)]
        report = step_report(version, planned, tree, *self._core.take_drops())
        report["red_temperatures"] = {str(name): value for name, value in weighted.red_temperatures}
        history.add_step(version, digest, extend_trained_digest(before, digest), items, report)
        return StepRow(version, digest, extend_trained_digest(before, digest), "planned", report)

    # --------------------------------------------------------------------------------------------------------
    # sending

    def _parts(self, version: Version) -> Iterator[list[TrainItem]]:
        limit = int(self._core.config.transport.max_message_bytes * MAX_PART_FRACTION)
        part: list[TrainItem] = []
        num_bytes = 0
        is_transcript = self._core.config.lifecycle.carry == "transcript"
        store = self._core.store
        for train in step_items(store.history, store.segments, version, is_transcript=is_transcript):
            size = len(_encoder.encode(train))
            if part and num_bytes + size > limit:
                yield part
                part, num_bytes = [], 0
            part.append(train)
            num_bytes += size
        yield part


def report_of(plan: StepRow, done: StepDone) -> dict[str, Any]:
    """Return a step's report with the learner's metrics and digests merged in."""
    witness = {} if done.witness is msgspec.UNSET else {"witness": done.witness}
    return {**plan.report, "learner": done.metrics, **witness}
