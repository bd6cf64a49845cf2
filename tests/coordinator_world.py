"""A small world around the coordinator's brain: scripted actors and a learner, a clock, crashes.

Everything is driven by messages; the actors and the learner keep their own books, independent of the run
database, so that tests can compare. The weights are a digest of what they were trained on, so a deterministic
resume is visible as equal digests.
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from pathlib import Path
from typing import Any

import msgspec

from cod_async.config.schema import Config
from cod_async.coordinator.brain import Brain
from cod_async.coordinator.core import Outbox
from cod_async.errors import StoreError
from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import (
    LifecycleState,
    PendingUpdate,
    Row,
    Segment,
    SegmentKey,
    Transcript,
    Version,
    VersionSpan,
    kind_and_position,
    num_episodes,
)
from cod_async.lifecycle.transcript import NO_PARENT, mark_after
from cod_async.store.database import RunStore
from cod_async.store.trained import extend_trained_digest, plan_digest
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import (
    Bye,
    Checkpointed,
    Fence,
    Finished,
    Heartbeat,
    Hello,
    Lease,
    LeaseRef,
    LeaseRequest,
    LeaseReturn,
    Leases,
    LineageOpened,
    NewVersion,
    OpenLineage,
    Published,
    Refused,
    SegmentData,
    StepBatch,
    StepDone,
    StepRecorded,
    StepRequest,
    Stop,
    ToClient,
    ToCoordinator,
    TrainItem,
)
from cod_async.wire.session import Closed, Event, Opened, Received, Session

RUN = "test-run"
MEMORY_FOLDER = "/dev/shm" if Path("/dev/shm").is_dir() else None
"""Where databases that need no real disk are made; ``None`` is the system's default."""


def make_config(**sections: dict[str, Any]) -> Config:
    """A small configuration; keyword arguments override sections."""
    base: dict[str, Any] = {
        "environments": [{"name": "hidden_buttons", "preset": "door"}],
        "run": {"name": RUN, "num_steps": 1000},
        "lifecycle": {"pack_size": 2, "group_size": 2},
        "learner": {"groups_per_step": 2},
        "staleness": {"max_lag": 2},
        "model": {"max_context_tokens": 64},
    }
    for name, section in sections.items():
        if isinstance(section, dict):
            base[name] = {**base.get(name, {}), **section}
        else:
            base[name] = section
    return msgspec.convert(base, Config)


def make_segment(
    lease: Lease,
    state: LifecycleState,
    version: Version,
    *,
    actor: str = "actor-0",
    num_action_tokens: int = 3,
    reward: float = 1.0,
    stride: int = 1,
    is_transcript: bool = False,
    is_distilled: bool = False,
) -> Segment:
    """The next episode of a lifecycle, all of it sampled under one version."""
    ordinal = state.next_ordinal
    kind, position = kind_and_position(ordinal)
    pack_size = len(lease.records_json)
    following = ordinal + stride if ordinal + stride < num_episodes(pack_size) else num_episodes(pack_size)
    is_last = following == num_episodes(pack_size)
    rewards = (*state.task_rewards, reward) if kind == "solve" else state.task_rewards
    needs_update = not is_last and following % 2 == 1
    transcript = None
    parent = None
    if is_transcript:
        parent = NO_PARENT if state.transcript is None else state.transcript.mark
    row = Row(
        token_ids=Array.of(range(2 + num_action_tokens), "<i4"),
        action_spans=((2, 2 + num_action_tokens),),
        behavior_logprobs=Array.of([-0.5] * num_action_tokens, "<f4"),
        versions=(VersionSpan(version, num_action_tokens),),
        parent=parent,
        teacher_logprobs=Array.of([-0.75] * num_action_tokens, "<f4") if is_distilled else msgspec.UNSET,
    )
    if is_transcript:
        transcript = Transcript(mark=mark_after(row))
    return Segment(
        run=RUN,
        key=SegmentKey(lease.ref.group, lease.ref.member, ordinal),
        lease_epoch=lease.ref.lease_epoch,
        actor=actor,
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
            next_ordinal=following,
            hint=f"hint {ordinal}",
            task_rewards=rewards,
            pending=PendingUpdate("t", reward, "f") if needs_update else None,
            transcript=transcript,
        ),
    )


class World:
    """The coordinator, its database and its clock; clients register to get their messages."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.folder = folder
        self.config = config
        self.time = 0.0
        self.clients: dict[int, Actor | Learner] = {}
        self.num_crashes = 0
        self.weights_of_lineage: dict[int, list[str]] = {}
        self.reload()

    def reload(self) -> None:
        self.store = RunStore(self.folder)
        self.brain = Brain(self.store, self.config, RUN, lambda: self.time)

    def crash(self) -> None:
        """The coordinator dies and starts again; clients keep their sessions and their unacknowledged
        segments.
        """
        self.num_crashes += 1
        self.store.close()
        self.reload()
        for client in list(self.clients.values()):
            client.reconnected()

    def apply(self, *events: Event) -> Outbox:
        out = self.brain.apply(events)
        self.dispatch(out)
        return out

    def dispatch(self, out: Outbox) -> None:
        for session, seq, reason in out.settled:
            client = self.clients.get(session)
            if isinstance(client, Actor):
                client.settled(seq, reason)
        for session, message in out.replies:
            client = self.clients.get(session)
            if client is not None:
                client.receive(message)

    def say(
        self,
        session: int,
        message: ToCoordinator,
        *,
        is_lost_before: bool = False,
        is_lost_after: bool = False,
    ) -> Outbox:
        """Deliver a message; the coordinator may die before it is written, or after the commit and before the
        reply.
        """
        if is_lost_before:
            self.crash()
            return Outbox()
        event = Received(self.session(session), message, 100)
        if is_lost_after:
            self.brain.apply([event])
            self.crash()
            return Outbox()
        return self.apply(event)

    def fail_inside(self, session: int, message: ToCoordinator, num_instructions: int) -> bool:
        """Interrupt the transaction after so many instructions and restart; False if it got through."""
        left = num_instructions

        def interrupt() -> int:
            nonlocal left
            left -= 1
            return int(left < 0)

        connection = self.store._connection
        event = Received(self.session(session), message, 100)
        connection.set_progress_handler(interrupt, 1)
        try:
            out = self.brain.apply([event])
        except StoreError:
            self.crash()
            return True
        connection.set_progress_handler(None, 1)
        self.dispatch(out)
        return False

    def session(self, session: int) -> Session:
        row = self.store.sessions.get(session)
        assert row is not None
        return Session(session, row.role, row.name, 0.0)

    def open(self, client: Actor | Learner, role: str, name: str, instance: int = 0) -> int:
        hello = Hello(role=role, name=name, protocol=2, pid=1, host="h", instance=instance)  # type: ignore[arg-type]
        session = self.brain.allocate(hello)
        self.clients[session] = client
        self.apply(Opened(self.session(session), False))
        return session

    def close(self, session: int, reason: str) -> None:
        self.clients.pop(session, None)
        self.apply(Closed(self.session(session), reason))  # type: ignore[arg-type]

    def tick(self, seconds: float = 0.0) -> Outbox:
        self.time += seconds
        return self.apply()


class Actor:
    """Plays leases one episode at a time and keeps its own books."""

    def __init__(
        self, world: World, name: str = "actor-0", instance: int = 0, rng: random.Random | None = None
    ) -> None:
        self.world = world
        self.name = name
        self.rng = rng or random.Random(0)
        self.instance = instance or self.rng.randrange(1, 1 << 60)
        self.version = Version(0, 0)
        self.lives: dict[LeaseRef, tuple[Lease, LifecycleState]] = {}
        self.outbox: dict[int, Segment] = {}
        self.counters: Counter[str] = Counter()
        self.acked: dict[SegmentKey, int] = {}
        self.dropped: Counter[str] = Counter()
        self.messages: list[ToClient] = []
        self.next_seq = 1
        self.request = 0
        self.is_stopped = False
        self.open_frac = 0.0
        self.connect()

    def connect(self) -> None:
        self.session = self.world.open(self, "actor", self.name, self.instance)
        if self.world.brain.manifest is not None:
            self.version = max(self.version, self.world.brain.manifest.version)

    def reconnected(self) -> None:
        """The coordinator restarted: everything unacknowledged is sent again."""
        for seq, segment in list(self.outbox.items()):
            if seq in self.outbox:
                self.world.say(self.session, SegmentData(seq=seq, segment=segment))

    def start_over(self) -> None:
        """The session expired while the process lives on: a new session, its outbox offered again."""
        self.world.close(self.session, "expired")
        self.abandon(list(self.lives))
        old, self.outbox = list(self.outbox.values()), {}
        self.connect()
        for segment in old:
            self.outbox[self.next_seq] = segment
            self.next_seq += 1
        self.reconnected()

    def receive(self, message: ToClient) -> None:
        self.messages.append(message)
        match message:
            case Leases(request=request, leases=leases) if request == self.request:
                for lease in leases:
                    if lease.ref not in self.lives:
                        assert (
                            self.version >= lease.min_version
                            or self.version.lineage == lease.min_version.lineage
                        )
                        self.lives[lease.ref] = (lease, lease.state or LifecycleState(0, ""))
            case Fence(leases=leases):
                self.abandon(leases)
            case NewVersion(manifest=manifest):
                self.version = max(self.version, manifest.version)
            case Stop():
                self.is_stopped = True
            case _:
                pass

    def abandon(self, leases: list[LeaseRef]) -> None:
        for ref in leases:
            if self.lives.pop(ref, None) is not None and self.rng.random() < self.open_frac:
                num_tokens = self.rng.randrange(4)  # an unsealed episode is thrown away
                self.counters["sampled_tokens"] += num_tokens
                self.counters["discarded_tokens_cancelled"] += num_tokens

    def settled(self, seq: int, reason: str | None) -> None:
        segment = self.outbox.pop(seq, None)
        if segment is None:
            return
        if reason is None:
            self.acked[segment.key] = segment.lease_epoch
        else:
            self.dropped[reason] += 1
            ref = LeaseRef(segment.key.group, segment.key.member, segment.lease_epoch)
            self.abandon([ref])

    def ask(self, num_lifecycles: int = 4, **crash: bool) -> None:
        self.request += 1
        self.world.say(
            self.session, LeaseRequest(request=self.request, num_lifecycles=num_lifecycles), **crash
        )

    def seal(self, ref: LeaseRef, reward: float | None = None, num_tokens: int | None = None) -> int:
        """Play one episode into the outbox and return its sequence number."""
        lease, state = self.lives[ref]
        num_tokens = num_tokens or self.rng.randrange(1, 6)
        segment = make_segment(
            lease,
            state,
            self.version,
            actor=self.name,
            num_action_tokens=num_tokens,
            reward=float(self.rng.randrange(2)) if reward is None else reward,
            stride=1 if self.world.config.lifecycle.has_updates else 2,
            is_transcript=self.world.config.lifecycle.carry == "transcript",
            is_distilled=self.world.config.loss.is_distilled,
        )
        self.counters["sealed_segments"] += 1
        self.counters["sampled_tokens"] += num_tokens
        seq, self.next_seq = self.next_seq, self.next_seq + 1
        self.outbox[seq] = segment
        if segment.is_last:
            del self.lives[ref]
        else:
            self.lives[ref] = (lease, segment.state_after)
        return seq

    def send(self, seq: int, **crash: bool) -> Outbox:
        return self.world.say(self.session, SegmentData(seq=seq, segment=self.outbox[seq]), **crash)

    def play(self, ref: LeaseRef, **crash: bool) -> None:
        """Play one episode and deliver it."""
        self.send(self.seal(ref), **crash)

    def play_all(self) -> None:
        """Play every lease to its end."""
        while self.lives:
            self.play(next(iter(self.lives)))

    def report(self) -> dict[str, float]:
        return {
            **{name: float(value) for name, value in self.counters.items()},
            "outbox_segments": float(len(self.outbox)),
            "outbox_tokens": float(sum(s.num_action_tokens for s in self.outbox.values())),
        }

    def heartbeat(self) -> None:
        self.world.say(self.session, Heartbeat(counters=self.report(), held=list(self.lives)))

    def give_back(self, ref: LeaseRef, reason: str = "infrastructure") -> None:
        del self.lives[ref]
        self.world.say(self.session, LeaseReturn(lease=ref, reason=reason))  # type: ignore[arg-type]

    def leave(self) -> None:
        self.abandon(list(self.lives))
        for segment in self.outbox.values():
            self.counters["discarded_segments_undelivered"] += 1
            self.counters["discarded_tokens_undelivered"] += segment.num_action_tokens
        self.outbox.clear()
        self.world.say(self.session, Bye(counters=self.report()))
        self.world.close(self.session, "bye")

    def die(self) -> None:
        """Killed: whatever it held is gone, and its session expires."""
        self.world.close(self.session, "expired")


class Learner:
    """Trains on batches by hashing them, checkpoints, and remembers the surviving history by itself."""

    def __init__(self, world: World, checkpoint: LearnerCheckpoint | None = None, nonce: str = "") -> None:
        self.world = world
        self.parts: dict[int, StepBatch] = {}
        self.batch: tuple[str, list[TrainItem]] | None = None
        self.messages: list[ToClient] = []
        self.opened: LineageOpened | None = None
        self.should_stop = False
        self.version = Version(0, 0)
        start = checkpoint or LearnerCheckpoint(None, "", ("start",), ())
        self.trained_digest = start.trained_digest
        self.weights_by_step = list(start.weights)
        self.history: list[list[TrainItem]] = [list(items) for items in start.history]
        self.session = world.open(self, "learner", "learner", id(self))
        self.nonce = nonce or hashlib.sha256(f"{world.time}-{self.session}".encode()).hexdigest()[:16]
        self.open_message = OpenLineage(
            branch=start.version, trained_digest=self.trained_digest, nonce=self.nonce
        )
        world.say(self.session, self.open_message)
        if self.opened is None:
            self.refused = [m for m in self.messages if isinstance(m, Refused)]
            return
        self.version = Version(self.opened.lineage, self.opened.step)
        world.weights_of_lineage[self.version.lineage] = self.weights_by_step
        self.publish()

    def reconnected(self) -> None:
        if self.opened is not None:
            self.request_step()

    def receive(self, message: ToClient) -> None:
        self.messages.append(message)
        match message:
            case LineageOpened():
                self.opened = message
            case StepBatch():
                if any(part.plan_digest != message.plan_digest for part in self.parts.values()):
                    self.parts = {}
                self.parts[message.part] = message
                if len(self.parts) == message.num_parts and message.version == self.version:
                    items = [item for part in range(message.num_parts) for item in self.parts[part].items]
                    self.batch = message.plan_digest, items
            case StepRecorded():
                self.should_stop = message.should_stop
            case _:
                pass

    def publish(self, **crash: bool) -> None:
        manifest = Manifest(RUN, self.version, self.weights_by_step[-1], ())
        self.world.say(self.session, Published(manifest=manifest), **crash)
        if crash:
            self.world.say(self.session, Published(manifest=manifest))

    def request_step(self, **crash: bool) -> None:
        self.world.say(self.session, StepRequest(version=self.version), **crash)

    def take_step(self, noise: str = "", **crash: bool) -> list[TrainItem]:
        """Train on the batch that was received, report it, publish."""
        assert self.batch is not None
        digest, items = self.batch
        done = StepDone(version=self.version, plan_digest=digest, metrics={"loss": 0.5})
        self.world.say(self.session, done, **crash)
        if crash:
            self.world.say(self.session, done)
        self.batch, self.parts = None, {}
        self.trained_digest = extend_trained_digest(self.trained_digest, digest)
        weights = hashlib.sha256(f"{self.weights_by_step[-1]}{digest}{noise}".encode()).hexdigest()
        self.weights_by_step.append(weights)
        self.history.append(items)
        self.version = Version(self.version.lineage, self.version.step + 1)
        self.publish()
        return items

    def checkpoint(self) -> LearnerCheckpoint:
        path = f"checkpoints/{self.version.step}"
        message = Checkpointed(
            version=self.version, path=path, digest="d", trained_digest=self.trained_digest
        )
        self.world.say(self.session, message)
        history = tuple(tuple(items) for items in self.history)
        return LearnerCheckpoint(self.version, self.trained_digest, tuple(self.weights_by_step), history)

    def finish(self) -> None:
        self.world.say(self.session, Finished(version=self.version, reason="done"))
        self.world.say(self.session, Bye())
        self.world.close(self.session, "bye")

    def die(self) -> None:
        self.world.close(self.session, "expired")


class LearnerCheckpoint(msgspec.Struct, frozen=True):
    """What the learner saves."""

    version: Version | None
    trained_digest: str
    weights: tuple[str, ...]
    history: tuple[tuple[TrainItem, ...], ...]


def true_lag(world: World, learner: Learner, version: Version, step: int) -> int:
    """The lag of a token by comparing whole weight histories: the oracle for the coordinator's rule.

    The token counts as the last step at which the history that generated it and the surviving one had equal
    weights.
    """
    theirs = world.weights_of_lineage[version.lineage][: version.step + 1]
    ours = learner.weights_by_step[: step + 1]
    shared = [t for t, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a == b]
    return step - max(shared)


def check_plan_digest(batch: tuple[str, list[TrainItem]], epochs: dict[SegmentKey, int]) -> None:
    """The digest that came with a batch is that of its items."""
    digest, items = batch
    assert digest == plan_digest((item.key, epochs[item.key], item.advantage) for item in items)
