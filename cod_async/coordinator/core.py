"""What the parts of the coordinator's mind share: the store, the clock, the lineages, and what is to be sent.

Everything that decides lives in the run database. What is kept here in memory is either derived from it at
start-up, or a monotonic time, or something that clients will say again after a restart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec

from cod_async.config.schema import Config
from cod_async.coordinator.forecast import Forecast
from cod_async.coordinator.health import Health
from cod_async.coordinator.mix import MixCounts, Place
from cod_async.coordinator.planner import Limits
from cod_async.lifecycle.segment import Version
from cod_async.store.database import RunStore
from cod_async.store.lineage import LineageTree
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import Fence, LeaseRef, Role, ToClient


class Settled(NamedTuple):
    """A sequence number that is settled: committed (``reason`` None) or dropped for good."""

    session: int
    seq: int
    reason: str | None


class Outbox:
    """What one transaction leads to; nothing of it may be sent before the commit."""

    def __init__(self) -> None:
        self.replies: list[tuple[int, ToClient]] = []
        self.settled: list[Settled] = []
        self.checkpoint: tuple[Version, str] | None = None
        """Version and folder of a checkpoint that was recorded."""
        self._fences: dict[tuple[int, str], Fence] = {}
        self._fenced: set[tuple[int, str, LeaseRef]] = set()

    def send(self, session: int, message: ToClient) -> None:
        """Send a message to a session's client."""
        self.replies.append((session, message))

    def settle(self, session: int, seq: int, reason: str | None = None) -> None:
        """Acknowledge a segment."""
        self.settled.append(Settled(session, seq, reason))

    def fence(self, session: int, lease: LeaseRef, reason: str) -> None:
        """Tell a client that a lease is no longer its own; fences with one reason travel together."""
        message = self._fences.get((session, reason))
        if message is None:
            message = self._fences[session, reason] = Fence(leases=[], reason=reason)
            self.send(session, message)
        if (session, reason, lease) not in self._fenced:
            self._fenced.add((session, reason, lease))
            message.leases.append(lease)


class Core:
    """Shared state of one coordinator.

    Args:
        store: the run database.
        config: the resolved configuration.
        run: run id; it is written into a new database and checked against an old one.
        now: monotonic clock in seconds.
    """

    def __init__(self, store: RunStore, config: Config, run: str, now: Callable[[], float]) -> None:
        self.store = store
        self.config = config
        self.run = run
        self.now = now
        self.forecast = Forecast(config.staleness.forecast_quantile, now)
        self.health = Health(config)
        self.dropped_tokens: Counter[str] = Counter()
        """Action tokens dropped since the last plan, by reason."""
        self.dropped_mix = MixCounts()
        """Committed segments dropped since the last plan."""
        self.waits_for = ""
        """What the learner's parked request waits for; empty when none is parked."""
        self.out = Outbox()
        self.sessions: dict[int, tuple[Role, str]] = {}
        self.tally: Counter[str] = Counter()
        self.dropped: Counter[str] = Counter()
        self.tree: LineageTree | None = None
        self.step = 0
        self.manifest: Manifest | None = None
        self.finished: str | None = None
        self.should_stop = False
        self.generation = 0
        self.reload()

    def reload(self) -> None:
        """Read everything that is derived from the database."""
        history = self.store.history
        self.tree = history.tree(self.config.weights.publish_every_steps)
        if self.tree is not None:
            self.step = history.current_step(self.tree.current)
            newest = self.tree.newest_published()
            self.manifest = None if newest is None else history.manifest(newest)
            window = self.config.staleness.mix_window_steps
            self.health.restore(history.recent_reports(Version(self.tree.current, self.step), window))
        self.sessions = {row.session: (row.role, row.name) for row in self.store.sessions.live()}
        self.finished = self.store.get_meta("finished") or None
        for fate, (num_segments, _) in self.store.segments.totals().items():
            if fate.startswith("dropped:"):
                self.dropped[fate.removeprefix("dropped:")] = num_segments

    def changed(self) -> None:
        """Note that a waiting request may be answerable now: leases, groups, versions or steps changed."""
        self.generation += 1

    @property
    def limits(self) -> Limits:
        """What admission and selection obey now; the autopilot may have lowered the lag."""
        return self.health.limits

    @property
    def version(self) -> Version | None:
        """The version that the learner works on, or None before its first word."""
        return None if self.tree is None else Version(self.tree.current, self.step)

    def is_live(self, session: int) -> bool:
        """Whether a session may still act."""
        return session in self.sessions

    def sessions_of(self, role: Role) -> list[int]:
        """Return the live sessions of a role."""
        return [session for session, (its_role, _) in self.sessions.items() if its_role == role]

    def count_drop(
        self, reason: str, num_segments: int, num_tokens: int, places: Sequence[Place] = ()
    ) -> None:
        """Count dropped segments and their action tokens for the status line and the next step's report.

        Args:
            reason: why.
            num_segments: how many.
            num_tokens: their action tokens.
            places: of those that count as generated: committed, and not played again in their own place.
        """
        self.dropped[reason] += num_segments
        self.tally["dropped_tokens"] += num_tokens
        self.dropped_tokens[reason] += num_tokens
        self.dropped_mix.count(places, is_trained=False)

    def give_back_drops(self, report: Mapping[str, Any]) -> None:
        """Count what an undone plan's report had taken: the next plan reports it."""
        self.dropped_tokens.update(report.get("dropped_action_tokens", {}))
        before = msgspec.convert(report.get("mix", {}), MixCounts)
        for into, more in (
            (self.dropped_mix.dropped, before.dropped),
            (self.dropped_mix.dropped_lengths, before.dropped_lengths),
        ):
            for name, count in more.items():
                into[name] = into.get(name, 0) + count

    def take_drops(self) -> tuple[dict[str, int], MixCounts]:
        """Return what was dropped since the last call, and begin to count anew."""
        tokens = {reason: num for reason, num in sorted(self.dropped_tokens.items()) if num}
        mix = self.dropped_mix
        self.dropped_tokens, self.dropped_mix = Counter(), MixCounts()
        return tokens, mix
