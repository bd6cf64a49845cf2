"""The real coordinator under virtual time: actors and a learner that only take time, and never compute.

Every message goes through :class:`cod_async.coordinator.brain.Brain` and the run database, exactly as in a
run; what is simulated is how long episodes and steps take. Tokens of an episode are spread evenly over its
time and sampled under the newest version of their moment, as with weights that are switched in flight. A run
of an hour takes seconds, and equal seeds give equal runs.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec

from cod_async.config.schema import Config
from cod_async.coordinator.brain import Brain
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import (
    LifecycleState,
    PendingUpdate,
    Row,
    Segment,
    SegmentKey,
    Version,
    VersionSpan,
    kind_and_position,
    num_episodes,
)
from cod_async.store.database import RunStore
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import (
    Fence,
    Finished,
    Hello,
    Lease,
    LeaseRef,
    LeaseRequest,
    Leases,
    OpenLineage,
    Published,
    SegmentData,
    StepBatch,
    StepDone,
    StepRecorded,
    StepRequest,
    ToClient,
    ToCoordinator,
)
from cod_async.wire.session import Event, Opened, Received, Session

RUN = "simulation"


class Timing(msgspec.Struct, frozen=True, kw_only=True):
    """How long things take, in virtual seconds.

    Attributes:
        step_s: a step of the learner, waiting excluded.
        lifecycle_s: mean of a whole lifecycle.
        sigma: of the lognormal spread between lifecycles: 0.5 makes one in twenty 2 times the mean.
        episode_sigma: of the lognormal spread between the episodes of a lifecycle.
        tokens_per_s: generated tokens per second of an episode.
        hung: (group, member) of lifecycles that never end.
    """

    step_s: float = 10.0
    lifecycle_s: float = 120.0
    sigma: float = 0.5
    episode_sigma: float = 0.3
    tokens_per_s: float = 2.0
    hung: tuple[tuple[int, int], ...] = ()


class Account(msgspec.Struct):
    """What the simulated actors and learner count by themselves, independently of the coordinator.

    Attributes:
        generated, trained: sealed segments, and trained ones, as (group, place, action tokens); a place
            is like ``solve/0``.
        cut_tokens: action tokens of episodes that were fenced before their end.
        refused: sealed segments that were settled with a reason.
        lags: trained action tokens by lag, in steps.
        step_at_s: when each step was taken.
        trained_at_s: when each group was first trained.
        wait_s: time that the learner waited for batches.
    """

    generated: list[tuple[int, str, int]] = []
    trained: list[tuple[int, str, int]] = []
    cut_tokens: int = 0
    refused: Counter[str] = msgspec.field(default_factory=Counter)
    lags: Counter[int] = msgspec.field(default_factory=Counter)
    step_at_s: list[float] = []
    trained_at_s: dict[int, float] = {}
    wait_s: float = 0.0


class _Playing(msgspec.Struct):
    lease: Lease
    state: LifecycleState
    speed: float
    began_at: float = 0.0
    duration_s: float = 0.0


class Simulation:
    """One simulated run.

    Args:
        folder: where the run database is made; in memory is fastest.
        config: of the run; ``run.name`` must be :data:`RUN`.
        timing: how long things take.
        num_slots: lifecycles that the actor plays at once.
        seed: of all durations.
    """

    def __init__(self, folder: Path, config: Config, timing: Timing, num_slots: int, seed: int = 0) -> None:
        self.config = config
        self.timing = timing
        self.account = Account()
        self.now_s = 0.0
        self._rng = random.Random(seed)
        self._seed = seed
        self._num_slots = num_slots
        self._heap: list[tuple[float, int, Callable[[], None]]] = []
        self._count = 0
        self._lives: dict[LeaseRef, _Playing] = {}
        self._published: list[tuple[float, Version]] = []
        self._seq = self._request = 0
        self._is_asking = False
        self._parts: dict[int, StepBatch] = {}
        self._asked_at_s: float | None = None
        self._is_over = False
        self.store = RunStore(folder)
        self.brain = Brain(self.store, config, RUN, lambda: self.now_s)
        self._actor = self._open("actor")
        self._learner = self._open("learner")
        self._version = Version(0, 0)

    # ----------------------------------------------------------------------------------------------- running

    def run(self, until_s: float = math.inf) -> Account:
        """Run until all steps are taken, or until ``until_s``."""
        self._say(self._learner, OpenLineage(branch=None, trained_digest="", nonce="first"))
        self._publish()
        self._request_step()
        self._tick()
        while self._heap and not self._is_over:
            at, _, act = heapq.heappop(self._heap)
            if at > until_s:
                break
            self.now_s = at
            act()
        return self.account

    def close(self) -> None:
        """Close the database."""
        self.store.close()

    def _after(self, seconds: float, act: Callable[[], None]) -> None:
        self._count += 1
        heapq.heappush(self._heap, (self.now_s + seconds, self._count, act))

    def _tick(self) -> None:
        self._apply([])
        self._ask()
        self._after(self.timing.step_s / 4, self._tick)

    def _open(self, role: Any) -> int:
        session = self.brain.allocate(Hello(role=role, name=role, protocol=2, pid=1, host="h", instance=1))
        self._apply([Opened(self._session(session), False)])
        return session

    def _session(self, session: int) -> Session:
        row = self.store.sessions.get(session)
        assert row is not None
        return Session(session, row.role, row.name, 0.0)

    def _say(self, session: int, message: ToCoordinator) -> None:
        self._apply([Received(self._session(session), message, 100)])

    def _apply(self, events: list[Event]) -> None:
        out = self.brain.apply(events)
        for _, _, reason in out.settled:
            if reason is not None:
                self.account.refused[reason] += 1
        for session, message in out.replies:
            (self._to_actor if session == self._actor else self._to_learner)(message)

    # ------------------------------------------------------------------------------------------------- actor

    def _ask(self) -> None:
        room = self._num_slots - len(self._lives)
        if room > 0 and not self._is_asking and not self._is_over:
            self._is_asking = True
            self._request += 1
            self._say(self._actor, LeaseRequest(request=self._request, num_lifecycles=room))

    def _to_actor(self, message: ToClient) -> None:
        match message:
            case Leases(request=request, leases=leases) if request == self._request:
                self._is_asking = False
                for lease in leases:
                    self._begin(lease)
                if leases:
                    self._after(0.0, self._ask)
            case Fence(leases=refs):
                for ref in refs:
                    playing = self._lives.pop(ref, None)
                    if playing is not None:
                        played_s = min(self.now_s - playing.began_at, playing.duration_s)
                        self.account.cut_tokens += int(played_s * self.timing.tokens_per_s)
                self._after(0.0, self._ask)
            case _:
                pass

    def _begin(self, lease: Lease) -> None:
        draw = random.Random(f"{self._seed} {lease.ref.group} {lease.ref.member}")
        sigma = self.timing.sigma
        speed = math.exp(draw.gauss(0.0, sigma) - sigma * sigma / 2)
        playing = _Playing(lease, lease.state or LifecycleState(0, ""), speed)
        self._lives[lease.ref] = playing
        self._begin_episode(lease.ref, playing)

    def _begin_episode(self, ref: LeaseRef, playing: _Playing) -> None:
        timing, pack_size = self.timing, self.config.lifecycle.pack_size
        sigma = timing.episode_sigma
        mean_s = timing.lifecycle_s / num_episodes(pack_size) * playing.speed
        playing.began_at = self.now_s
        playing.duration_s = mean_s * math.exp(self._rng.gauss(0.0, sigma) - sigma * sigma / 2)
        is_hung = (ref.group, ref.member) in timing.hung
        if not (is_hung and playing.state.next_ordinal == num_episodes(pack_size) // 2):
            self._after(playing.duration_s, lambda: self._seal(ref, playing))

    def _seal(self, ref: LeaseRef, playing: _Playing) -> None:
        if self._lives.get(ref) is not playing:
            return  # fenced meanwhile
        segment = self._segment(playing)
        place = f"{segment.kind}/{segment.position}"
        self.account.generated.append((ref.group, place, segment.num_action_tokens))
        playing.state = segment.state_after
        if segment.is_last:
            del self._lives[ref]
        self._seq += 1
        self._say(self._actor, SegmentData(seq=self._seq, segment=segment))
        if segment.is_last:
            self._ask()
        elif ref in self._lives:
            self._begin_episode(ref, playing)

    def _segment(self, playing: _Playing) -> Segment:
        lease, state = playing.lease, playing.state
        ordinal, pack_size = state.next_ordinal, len(lease.records_json)
        kind, position = kind_and_position(ordinal)
        num_tokens = max(1, round(playing.duration_s * self.timing.tokens_per_s))
        is_last = ordinal + 1 == num_episodes(pack_size)
        reward = float(self._rng.random() < 0.3 + 0.1 * position)
        row = Row(
            token_ids=Array.of(range(2 + num_tokens), "<i4"),
            action_spans=((2, 2 + num_tokens),),
            behavior_logprobs=Array.of([-0.5] * num_tokens, "<f4"),
            versions=self._versions(playing, num_tokens),
        )
        return Segment(
            run=RUN,
            key=SegmentKey(lease.ref.group, lease.ref.member, ordinal),
            lease_epoch=lease.ref.lease_epoch,
            actor="actor",
            environment=lease.environment,
            preset=lease.preset,
            pack_seed=lease.pack_seed,
            kind=kind,
            position=position,
            rows=(row,),
            reward=reward,
            raw_reward=reward,
            finish="success",
            is_last=is_last,
            state_after=LifecycleState(
                next_ordinal=ordinal + 1,
                hint="hint",
                task_rewards=(*state.task_rewards, reward) if kind == "solve" else state.task_rewards,
                pending=None if is_last or kind == "update" else PendingUpdate("t", reward, "f"),
            ),
            wall_s=playing.duration_s,
        )

    def _versions(self, playing: _Playing, num_tokens: int) -> tuple[VersionSpan, ...]:
        """Spread an episode's tokens over the versions that were the newest while it was played."""
        began, end = playing.began_at, self.now_s
        first = max(index for index, (at, _) in enumerate(self._published) if at <= began)
        spans, done = [], 0
        for index in range(first, len(self._published)):
            is_newest = index + 1 == len(self._published)
            until = end if is_newest else self._published[index + 1][0]
            upto = num_tokens if is_newest else int(num_tokens * (until - began) / max(end - began, 1e-9))
            if upto > done:
                spans.append(VersionSpan(self._published[index][1], upto - done))
                done = upto
        return tuple(spans)

    # ----------------------------------------------------------------------------------------------- learner

    def _to_learner(self, message: ToClient) -> None:
        match message:
            case StepBatch() if message.version == self._version:
                self._parts[message.part] = message
                if len(self._parts) == message.num_parts and self._asked_at_s is not None:
                    waited_s, self._asked_at_s = self.now_s - self._asked_at_s, None
                    self.account.wait_s += waited_s
                    self._after(self.timing.step_s, lambda: self._take_step(waited_s))
            case StepRecorded(should_stop=True):
                self._is_over = True
            case _:
                pass

    def _request_step(self) -> None:
        self._asked_at_s = self.now_s
        self._say(self._learner, StepRequest(version=self._version))

    def _take_step(self, waited_s: float) -> None:
        account, step = self.account, self._version.step
        digest = self._parts[0].plan_digest
        for item in [item for part in self._parts.values() for item in part.items]:
            num_tokens = sum(row.num_action_tokens for row in item.rows)
            account.trained.append((item.key.group, f"{item.kind}/{item.position}", num_tokens))
            account.trained_at_s.setdefault(item.key.group, self.now_s)
            for span in (span for row in item.rows for span in row.versions):
                account.lags[step - span.version.step] += span.num_tokens
        account.step_at_s.append(self.now_s)
        self._parts = {}
        metrics = {"step_s": self.timing.step_s + waited_s, "wait_s": waited_s}
        done = StepDone(version=self._version, plan_digest=digest, metrics=metrics)
        self._version = Version(0, step + 1)
        self._say(self._learner, done)
        self._publish()
        if self._is_over:
            self._say(self._learner, Finished(version=self._version, reason="all steps are done"))
        else:
            self._request_step()
        self._ask()

    def _publish(self) -> None:
        digest = hashlib.sha256(str(self._version).encode()).hexdigest()
        self._published.append((self.now_s, self._version))
        self._say(self._learner, Published(manifest=Manifest(RUN, self._version, digest, ())))
