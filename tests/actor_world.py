"""A real actor worker with a real embedded engine, and a coordinator that does what a test says.

The coordinator is a thread around the real server link. It hands out the leases that a test gives it,
acknowledges unless told to hold back, and keeps the books that the actor's counters are compared with.
"""

from __future__ import annotations

import asyncio
import contextlib
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec

from cod_async.actor.teaching import Teachers
from cod_async.actor.worker import ActorWorker
from cod_async.config.schema import (
    ActorsConfig,
    Config,
    EngineConfig,
    EnvironmentConfig,
    LifecycleConfig,
    ModelConfig,
    RunSection,
    TransportConfig,
)
from cod_async.engines.embedded import EmbeddedEngine
from cod_async.envs.base import canonical_json
from cod_async.envs.hidden_buttons import SPEC
from cod_async.envs.hidden_buttons.documents import vocabulary
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.rendering import load_renderer
from cod_async.lifecycle.segment import LifecycleState, Segment, Version
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.tokenizers import write_word_tokenizer
from cod_async.transport.link import KnownSession, Opened, Received, ServerLink
from cod_async.weights.manifest import Manifest
from cod_async.wire.messages import (
    Bye,
    Fence,
    Heartbeat,
    Lease,
    LeaseRef,
    LeaseRequest,
    LeaseReturn,
    Leases,
    SegmentData,
    ToClient,
    ToCoordinator,
)

RUN = "t"
CONTEXT = 64


DOOR = EnvironmentConfig(name="hidden_buttons", preset="door")


def make_config(environment: EnvironmentConfig = DOOR, **sections: dict[str, Any]) -> Config:
    base: dict[str, dict[str, Any]] = {
        "actors": {"lifecycles_per_process": 4, "max_retries": 2},
        "transport": {"heartbeat_s": 0.1, "session_timeout_s": 3.0, "resend_s": 0.3},
        "run": {"name": RUN, "grace_s": 6.0},
        "lifecycle": {"pack_size": 3, "group_size": 2, "max_response_tokens": 5, "max_hint_tokens": 5},
        "engine": {"max_running": 8, "is_batch_invariant": True},
    }
    merged = {name: {**base.get(name, {}), **sections.get(name, {})} for name in {*base, *sections}}
    return Config(
        environments=(environment,),
        actors=ActorsConfig(**merged["actors"]),
        transport=TransportConfig(**merged["transport"]),
        run=RunSection(**merged["run"]),
        lifecycle=LifecycleConfig(**merged["lifecycle"]),
        engine=EngineConfig(**merged["engine"]),
        model=ModelConfig(max_context_tokens=CONTEXT, renderer="terse"),
    )


def make_lease(
    group: int,
    member: int = 0,
    *,
    epoch: int = 0,
    version: int = 0,
    state: LifecycleState | None = None,
    environment: EnvironmentConfig = DOOR,
) -> Lease:
    """A lease of a *door* pack of three tasks; lifecycles of a group share the pack, not the seed."""
    plan = plan_pack((environment,), 3, 0, group)
    return Lease(
        ref=LeaseRef(group, member, epoch),
        environment=plan.environment,
        preset=plan.preset,
        options_json=canonical_json(plan.options),
        records_json=tuple(canonical_json(record) for record in plan.records),
        pack_seed=plan.pack_seed,
        sampling_seed=1000 * group + member,
        min_version=Version(0, version),
        state=state,
    )


def tiny_model(folder: Path, seed: int = 0) -> Qwen3:
    """A model over the tokenizer that is written into ``folder``."""
    import torch

    vocab_size = write_word_tokenizer(folder, vocabulary(SPEC.options("door")), CONTEXT)
    shape = Qwen3Config(
        vocab_size=vocab_size,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        max_position_embeddings=CONTEXT,
    )
    return Qwen3(shape, torch.Generator().manual_seed(seed))


class Coordinator(threading.Thread):
    """Hands out what a test gives it; everything it heard is in its lists.

    Attributes:
        leases: to be handed out, in order.
        is_acking: whether segments are settled as they come; else they wait in ``held_back``.
        segments: unique segments in order of arrival.
        drops: reasons to settle segments of a lease with, instead of acknowledging.
    """

    def __init__(self, config: Config, manifest: Manifest | None = None) -> None:
        super().__init__(daemon=True)
        self.config, self.manifest = config, manifest
        self.leases: list[Lease] = []
        self.is_acking = True
        self.segments: list[Segment] = []
        self.heartbeats: list[tuple[int, Heartbeat]] = []
        self.requests: list[LeaseRequest] = []
        self.returns: list[LeaseReturn] = []
        self.byes: list[Bye] = []
        self.held_back: list[tuple[int, int, Segment]] = []
        self.drops: dict[LeaseRef, str] = {}
        self.settled: dict[tuple[object, int], int] = {}
        self.sessions: list[int] = []
        self._answers: dict[int, Leases] = {}
        self._parked: dict[int, tuple[int, LeaseRequest]] = {}
        self._calls: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._should_end = threading.Event()
        self._link = self._listen(())
        self.address = self._link.address

    def _listen(self, known: tuple[KnownSession, ...], preferred: str | None = None) -> ServerLink:
        link = ServerLink(
            self.config.transport.bind,
            RUN,
            self.config.transport,
            allocate_session=lambda hello: max(self.sessions, default=0) + 1,
            known_sessions=known,
            preferred_address=preferred,
        )
        if self.manifest is not None:
            link.set_manifest(self.manifest)
        return link

    def run(self) -> None:
        while not self._should_end.is_set():
            while not self._calls.empty():
                self._calls.get()()
            for event in self._link.poll(0.002):
                if isinstance(event, Opened):
                    self.sessions.append(event.session.session)
                if isinstance(event, Received):
                    self._take(event.session.session, event.message)
            self._serve()
            self._link.flush_acks()
        self._link.close()

    def _take(self, session: int, message: ToCoordinator) -> None:
        match message:
            case SegmentData():
                self.held_back.append((session, message.seq, message.segment))
                known = {(segment.key, segment.lease_epoch) for segment in self.segments}
                if (message.segment.key, message.segment.lease_epoch) not in known:
                    self.segments.append(message.segment)
                if self.is_acking:
                    self._settle_all()
            case Heartbeat():
                self.heartbeats.append((session, message))
            case LeaseRequest():
                self.requests.append(message)
                self._parked[message.request] = (session, message)
            case LeaseReturn():
                self.returns.append(message)
            case Bye():
                self.byes.append(message)

    def _serve(self) -> None:
        for number, (session, request) in list(self._parked.items()):
            if number not in self._answers and self.leases:
                count = min(request.num_lifecycles, len(self.leases))
                self._answers[number] = Leases(request=number, leases=self.leases[:count])
                del self.leases[:count]
            if number in self._answers:
                self._link.send(session, self._answers[number])
                del self._parked[number]

    def _settle_all(self, limit: int | None = None) -> None:
        for session, seq, segment in self.held_back[:limit]:
            ref = LeaseRef(segment.key.group, segment.key.member, segment.lease_epoch)
            if session in self._link.sessions:
                self._link.settle(session, seq, self.drops.get(ref))
                self.settled[segment.key, segment.lease_epoch] = segment.num_action_tokens
        del self.held_back[:limit]

    # ---------------------------------------------------------------------------------- for the test's thread

    def do(self, call: Callable[[], object]) -> None:
        """Run something on the coordinator's thread and wait until it is done."""
        done = threading.Event()

        def run() -> None:
            call()
            done.set()

        self._calls.put(run)
        assert done.wait(10)

    def say(self, message: ToClient) -> None:
        """Send a message to the newest session."""
        self.do(lambda: self._link.send(self.sessions[-1], message))

    def fence(self, *refs: LeaseRef) -> None:
        self.say(Fence(leases=list(refs), reason="test"))

    def give(self, *leases: Lease) -> None:
        """Hand leases out with the next answers, all of them at once."""
        self.do(lambda: self.leases.extend(leases))

    def ack(self, limit: int | None = None) -> None:
        """Settle what is held back, oldest first."""
        self.do(lambda: self._settle_all(limit))

    def resume_acks(self) -> None:
        def resume() -> None:
            self.is_acking = True
            self._settle_all()

        self.do(resume)

    def restart(self, *, is_remembering: bool) -> None:
        """Die and come back at the same address, with or without knowing the session."""

        def again() -> None:
            self._link.close()
            known = (KnownSession(self.sessions[-1], "actor", "a"),) if is_remembering else ()
            self.held_back.clear()
            self._parked.clear()
            self._link = self._listen(known, self.address)

        self.do(again)

    def end(self) -> None:
        self._should_end.set()
        self.join(timeout=10)

    @property
    def last(self) -> Heartbeat:
        """The newest heartbeat."""
        return self.heartbeats[-1][1] if self.heartbeats else Heartbeat()

    def check_counters(self) -> None:
        """Every heartbeat adds up: nothing is negative, what is settled grows and is no more than came."""
        num_tokens = sum(segment.num_action_tokens for segment in self.segments)
        settled_before = 0.0
        reports = [heartbeat.counters for _, heartbeat in self.heartbeats if heartbeat.counters]
        for counters in [*reports, *(bye.counters for bye in self.byes)]:
            assert min(counters.values()) >= 0, counters
            lost = {unit: _total(counters, f"discarded_{unit}_") for unit in ("segments", "tokens")}
            out_segments = counters["outbox_segments"] + lost["segments"]
            assert counters["sealed_segments"] - out_segments <= len(self.segments)
            settled = counters["sampled_tokens"] - sum(
                (
                    counters["open_tokens"],
                    counters["aborted_tokens"],
                    counters["outbox_tokens"],
                    lost["tokens"],
                )
            )
            assert settled_before <= settled <= num_tokens, counters
            settled_before = settled
        for bye in self.byes:
            assert bye.counters["open_tokens"] == bye.counters["outbox_tokens"] == 0
            if not _total(bye.counters, "discarded_tokens_undelivered"):
                assert settled_before == sum(self.settled.values())


def _total(counters: dict[str, float], prefix: str) -> float:
    return sum(value for name, value in counters.items() if name.startswith(prefix))


class World:
    """One worker against one coordinator; use it inside :func:`playing`."""

    def __init__(
        self, folder: Path, config: Config, engine: EmbeddedEngine, teachers: Teachers | None = None
    ) -> None:
        self.folder, self.config, self.engine = folder, config, engine
        self.coordinator = Coordinator(config)
        self.coordinator.start()
        self.worker = ActorWorker(
            config,
            RUN,
            "a",
            engine,
            load_renderer(folder, "terse"),
            lambda: self.coordinator.address,
            teachers=teachers,
        )
        self.task = asyncio.create_task(self.worker.run())

    async def until(self, condition: Callable[[], object], timeout_s: float = 20.0) -> None:
        """Wait for something that must come."""
        deadline = time.monotonic() + timeout_s
        while not condition():
            if self.task.done() and not self.task.cancelled() and self.task.exception() is not None:
                self.task.result()
            assert time.monotonic() < deadline, "it did not come"
            await asyncio.sleep(0.003)

    async def heartbeats(self, count: int = 2) -> None:
        """Let some more heartbeats pass."""
        target = len(self.coordinator.heartbeats) + count
        await self.until(lambda: len(self.coordinator.heartbeats) >= target)

    async def until_idle(self) -> None:
        """Wait until two heartbeats say the same of the engine."""
        seen = -1.0
        while True:
            await self.heartbeats()
            sampled = self.coordinator.last.counters.get("sampled_tokens", -1.0)
            if sampled == seen:
                return
            seen = sampled

    async def ended(self, timeout_s: float = 20.0) -> int:
        """Wait for the worker's own end."""
        return await asyncio.wait_for(asyncio.shield(self.task), timeout_s)

    def played(self) -> list[tuple[int, int, int]]:
        return [(s.key.group, s.key.member, s.key.ordinal) for s in self.coordinator.segments]


@contextlib.asynccontextmanager
async def playing(
    folder: Path,
    environment: EnvironmentConfig = DOOR,
    teachers: Teachers | None = None,
    **sections: dict[str, Any],
) -> AsyncIterator[World]:
    """Run a worker; at the end it is stopped if it still runs, and its counters are checked."""
    config = make_config(environment, **sections)
    model = tiny_model(folder)
    engine = EmbeddedEngine(
        model, config.engine, max_context_tokens=CONTEXT, version=Version(0, 0), run_dir=folder
    )
    world = World(folder, config, engine, teachers)
    try:
        yield world
        if not world.task.done():
            world.worker._stop("the test is over")
            world.coordinator.resume_acks()
            assert await world.ended() == 0
        world.coordinator.check_counters()
    finally:
        if not world.task.done():
            world.task.cancel()
            await asyncio.gather(world.task, return_exceptions=True)
        await asyncio.to_thread(world.coordinator.end)


def same(one: Segment, other: Segment) -> bool:
    """Whether two segments differ in nothing but who played them, when, and under which lease."""
    blank = {"lease_epoch": 0, "actor": "", "wall_s": 0.0}
    return msgspec.structs.replace(one, **blank) == msgspec.structs.replace(other, **blank)
