"""The actor process: an engine, many lifecycles, one link.

Everything runs in one asyncio loop: the engine's steps, the lifecycles that wait for its completions, and
the messages that the link's I/O thread hands over. The worker asks for leases while it has room, plays them
(:mod:`cod_async.actor.lives`), delivers what is sealed, takes up new policy versions as they are announced,
and leaves
cleanly: what is sealed is delivered, the rest is returned or counted as discarded.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import sys
from collections import deque
from collections.abc import Callable, Collection
from pathlib import Path

from cod_async.actor.failures import Failures
from cod_async.actor.lives import Life, LifeOver
from cod_async.actor.meter import Meter
from cod_async.actor.teaching import Teachers, open_teachers
from cod_async.actor.weights_source import FolderWeights, WeightsSource, open_weights_source
from cod_async.config.load import load_resolved
from cod_async.config.schema import Config
from cod_async.engines.base import Engine
from cod_async.envs.worker import WorkerPool
from cod_async.errors import (
    CodError,
    EngineMismatchError,
    InfrastructureError,
    InputError,
    ProtocolRefusedError,
    SupersededError,
    WeightsError,
    WireError,
)
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.lifecycle.segment import Segment, Version
from cod_async.transport.address import address_source
from cod_async.transport.async_client import AsyncClient
from cod_async.transport.link import ACKED
from cod_async.weights.manifest import Manifest
from cod_async.wire.client_session import FENCED_BEFORE_SEND
from cod_async.wire.messages import (
    Bye,
    Fence,
    Heartbeat,
    Lease,
    LeaseRef,
    LeaseRequest,
    LeaseReturn,
    NewVersion,
    Refused,
    Stop,
    ToClient,
    Welcome,
)

log = logging.getLogger(__name__)

MAX_REMEMBERED = 4096
"""Fences and returns of this many leases are remembered; heartbeats and deadlines heal older ones."""


class ActorWorker:
    """One actor.

    Args:
        config: the run's configuration.
        run: run id.
        name: this actor's name, unique in the run.
        engine: generates; owned by the worker from now on.
        renderer: the model's template family.
        addresses: where the coordinator is, see :mod:`cod_async.transport.address`.
        source: brings published files to this host; owned by the worker. None: they are there already.
        teachers: score what is played; owned by the worker. None in runs that distill nothing.

    Make it inside a running asyncio loop.
    """

    def __init__(
        self,
        config: Config,
        run: str,
        name: str,
        engine: Engine,
        renderer: Renderer,
        addresses: Callable[[], str | None],
        source: WeightsSource | None = None,
        teachers: Teachers | None = None,
    ) -> None:
        self._config = config
        self._run = run
        self._name = name
        self._engine = engine
        self._source = source or FolderWeights(Path())
        self._teachers = teachers
        self._renderer = renderer
        self._client = AsyncClient(
            addresses,
            "actor",
            name,
            run,
            config.transport,
            self._receive,
            max_outbox_segments=config.actors.max_outbox_segments,
        )
        self._meter = Meter(engine)
        self._environments = WorkerPool()
        self._report = Heartbeat()
        self._lives: dict[LeaseRef, asyncio.Task[None]] = {}
        self._fenced: dict[LeaseRef, None] = {}
        self._returned: deque[LeaseReturn] = deque(maxlen=MAX_REMEMBERED)
        self._handing: set[asyncio.Task[asyncio.Future[str | None]]] = set()
        self._outbox: dict[int, Segment] = {}
        self._has_version = asyncio.Event()
        self._wanted: Manifest | None = None
        self._is_version_wanted = asyncio.Event()
        self._is_stopping = asyncio.Event()
        self._stop_reason = ""
        self._failure: CodError | None = None
        self._request = 0

    # -------------------------------------------------------------------------------------------- the process

    async def run(self) -> int:
        """Work until the run ends or the process is told to stop; return the exit code."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stop, "signal")
        self._client.set_heartbeat(lambda: self._report)
        self._client.start()
        taking = asyncio.create_task(self._take_leases())
        tasks = [taking, *map(asyncio.create_task, (self._take_versions(), self._refresh_report()))]
        stopping = asyncio.create_task(self._is_stopping.wait())
        try:
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            self._is_stopping.set()
            taking.cancel()
            await self._leave()
        finally:
            for task in (stopping, *tasks):
                task.cancel()
            ends = await asyncio.gather(stopping, *tasks, return_exceptions=True)
            await self._environments.aclose()
            await self._source.aclose()
            await self._engine.aclose()
            if self._teachers is not None:
                await self._teachers.aclose()
        if self._failure is not None:
            raise self._failure
        for end in ends:  # these tasks never return by themselves; whatever ended one has ended the actor
            if isinstance(end, Exception):
                raise end
        return 0

    def _stop(self, reason: str) -> None:
        log.info("stopping: %s", reason)
        self._stop_reason = self._stop_reason or reason
        self._is_stopping.set()

    def _fail(self, error: CodError) -> None:
        """End the actor because of ``error``; the first one is what it ends with."""
        self._failure = self._failure or error
        self._stop("failure")

    async def _leave(self) -> None:
        """Stop playing, deliver what is sealed within the grace time, and say goodbye."""
        held = list(self._lives)
        await self._cancel(held)
        deadline = asyncio.get_running_loop().time() + self._config.run.grace_s / 3
        await self._until_empty(self._handing, deadline)
        if self._stop_reason == "signal":
            for ref in held:
                self._give_back(LeaseReturn(lease=ref, reason="draining"))
        await self._until_empty(self._outbox, deadline)
        for handing in self._handing:
            handing.cancel()
        await asyncio.gather(*self._handing, return_exceptions=True)
        for segment in self._outbox.values():
            self._meter.discarded_segment(segment, "undelivered")
        self._outbox.clear()
        await self._client.close(Bye(counters=self._counters()), drain_s=1.0)

    async def _until_empty(self, things: Collection[object], deadline: float) -> None:
        """Wait until ``things`` are empty, the link has failed, or the loop's clock says ``deadline``."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout_at(deadline):
                while things and self._client.link.failure is None:
                    await asyncio.sleep(0.02)

    # ------------------------------------------------------------------------------------- messages that come

    def _receive(self, message: ToClient) -> None:
        """Handle a message; runs in the loop."""
        match message:
            case Welcome():
                if not message.is_continued:  # the coordinator has given our leases away
                    self._cancel_soon(list(self._lives))
                    self._returned.clear()
                for lease_return in list(self._returned):  # it may have been lost with the connection
                    self._send(lease_return)
                if message.manifest is not None:
                    self._want(message.manifest)
            case NewVersion():
                self._want(message.manifest)
            case Fence():
                self._cancel_soon([ref for ref in message.leases if ref in self._lives])
                self._fenced |= dict.fromkeys(message.leases)  # the answer that grants it may come later
                for ref in list(self._fenced)[:-MAX_REMEMBERED]:
                    del self._fenced[ref]
            case Stop():
                self._stop(message.reason)
            case Refused(is_fatal=True):
                self._fail(ProtocolRefusedError(message.code, message.detail))
            case _:
                pass

    # --------------------------------------------------------------------------------------------- lifecycles

    async def _take_leases(self) -> None:
        """Ask for lifecycles while there is room for more."""
        limit = self._config.actors.lifecycles_per_process
        while True:
            num_wanted = limit - len(self._lives)
            if num_wanted <= 0:
                await asyncio.wait(list(self._lives.values()), return_when=asyncio.FIRST_COMPLETED)
                await asyncio.sleep(0)  # let finished lives take themselves off the list
                continue
            self._request += 1
            request = LeaseRequest(request=self._request, num_lifecycles=num_wanted)
            reply = await self._client.request(request)
            for lease in reply.leases:
                self._begin(lease)

    def _begin(self, lease: Lease) -> None:
        if lease.ref in self._lives or lease.ref in self._fenced or self._is_stopping.is_set():
            return
        task = asyncio.create_task(self._live(lease), name=f"life {lease.ref}")
        self._lives[lease.ref] = task
        task.add_done_callback(lambda _: self._lives.pop(lease.ref, None))

    async def _live(self, lease: Lease) -> None:
        """Play one lease; whatever goes wrong is the lease's fate, not the actor's."""
        ref = lease.ref
        try:
            life = Life(
                lease,
                config=self._config,
                run=self._run,
                actor=self._name,
                engine=self._engine,
                meter=self._meter,
                renderer=self._renderer,
                workers=self._environments,
                delivery=self,
                wait_for_version=self._wait_for_version,
                teachers=self._teachers,
            )
            await life.run()
        except LifeOver as over:
            log.info("lifecycle g%d.m%d e%d ended early: %s", ref.group, ref.member, ref.lease_epoch, over)
        except CodError as error:
            ended = self._client.link.failure
            if ended is not None or not isinstance(error, InfrastructureError | InputError | WireError):
                self._fail(ended or error)
                return
            log.warning("lifecycle g%d.m%d e%d given back: %s", ref.group, ref.member, ref.lease_epoch, error)
            self._give_back(LeaseReturn(lease=ref, reason="infrastructure", detail=str(error)[:4096]))
        except Exception as error:
            log.exception("lifecycle g%d.m%d e%d failed", ref.group, ref.member, ref.lease_epoch)
            self._fail(CodError(f"actor {self._name}: {type(error).__name__}: {error}"))

    def _give_back(self, lease_return: LeaseReturn) -> None:
        """Return a lease, again after every lost connection of this session."""
        self._returned.append(lease_return)
        self._send(lease_return)

    def _send(self, message: LeaseReturn) -> None:
        with contextlib.suppress(CodError):  # the link has ended, and with it all leases
            self._client.send(message)

    def _cancel_soon(self, refs: list[LeaseRef]) -> None:
        for ref in refs:
            self._lives[ref].cancel()

    async def _cancel(self, refs: list[LeaseRef]) -> None:
        tasks = [self._lives[ref] for ref in refs if ref in self._lives]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def deliver(self, segment: Segment) -> asyncio.Future[str | None]:
        """Put a sealed segment into the outbox; at its ceiling, wait. See
        :class:`cod_async.actor.lives.Delivery`.

        Cancelled while it waits for room, the segment is discarded, but still handed over when the actor is
        about to leave.
        """
        handing = asyncio.create_task(self._hand_over(segment))
        self._handing.add(handing)
        handing.add_done_callback(self._handed_over)
        try:
            return await asyncio.shield(handing)
        except asyncio.CancelledError:
            if not self._is_stopping.is_set():
                handing.cancel()
            raise

    async def _hand_over(self, segment: Segment) -> asyncio.Future[str | None]:
        try:
            outbox_id = await self._client.send_segment(segment)
        except asyncio.CancelledError:
            self._meter.discarded_segment(segment, "cancelled")
            raise
        except CodError:
            self._meter.discarded_segment(segment, "undeliverable")
            raise
        self._outbox[outbox_id] = segment
        return asyncio.create_task(self._settle(outbox_id))

    def _handed_over(self, handing: asyncio.Task[asyncio.Future[str | None]]) -> None:
        self._handing.discard(handing)
        if not handing.cancelled():
            handing.exception()  # its lifecycle has seen it, or is gone

    async def _settle(self, outbox_id: int) -> str | None:
        """Wait until a segment is committed (None) or dropped (the reason), and take it off the outbox."""
        try:
            reason = await self._client.wait_settled(outbox_id)
        except CodError as error:
            return str(error)
        segment = self._outbox.pop(outbox_id, None)
        if segment is not None and reason == FENCED_BEFORE_SEND:
            self._meter.discarded_segment(segment, reason)
        elif segment is not None:
            self._meter.settled(segment)
        return None if reason == ACKED else reason

    # ----------------------------------------------------------------------------------------------- versions

    def _want(self, manifest: Manifest) -> None:
        """Note the newest announced version; the loader coalesces bursts."""
        self._wanted = manifest
        self._source.announce(manifest)
        self._is_version_wanted.set()

    async def _take_versions(self) -> None:
        """Load announced versions, newest first; a version that is gone is skipped for a newer one."""
        failures = Failures()
        while True:
            await self._is_version_wanted.wait()
            self._is_version_wanted.clear()
            manifest = self._wanted
            if manifest is None or manifest.version == self._engine.version:
                continue
            try:
                await self._source.fetch(manifest)
                await self._update(manifest)
            except SupersededError:
                self._is_version_wanted.set()
                continue
            except WeightsError as error:
                wait_s, is_told = failures.failed(str(error))
                log.log(
                    logging.WARNING if is_told else logging.DEBUG,
                    "version %s not taken, failure %d in a row, next try in %g s: %s",
                    manifest.version,
                    failures.num_in_row,
                    wait_s,
                    error,
                )
                await self._wait_to_retry(wait_s, failures)
                self._is_version_wanted.set()
                continue
            failures.worked()
            old, self._has_version = self._has_version, asyncio.Event()
            old.set()

    async def _wait_to_retry(self, wait_s: float, failures: Failures) -> None:
        """Wait after a failure; the first announcement of a row of failures ends the wait at once."""
        if not failures.is_wait_cuttable:
            await asyncio.sleep(wait_s)
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._is_version_wanted.wait(), wait_s)
            failures.cut()

    async def _update(self, manifest: Manifest) -> None:
        """Let the engine take a version up, and tell it of newer ones meanwhile: it may put that off."""
        update = asyncio.create_task(self._engine.update_weights(manifest))
        try:
            while not update.done():
                newer = asyncio.create_task(self._is_version_wanted.wait())
                await asyncio.wait({update, newer}, return_when=asyncio.FIRST_COMPLETED)
                newer.cancel()
                if not update.done() and self._wanted is not None:
                    self._is_version_wanted.clear()
                    with contextlib.suppress(WeightsError):  # it is fetched again when its turn comes
                        newest = self._wanted
                        await self._source.fetch(newest)
                        self._engine.announce(newest)
            update.result()
        finally:
            update.cancel()
            if self._wanted is not manifest:
                self._is_version_wanted.set()

    async def _wait_for_version(self, version: Version) -> None:
        """Return once the engine is at ``version`` or newer; servers may also get there by themselves."""
        while self._engine.version < version:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._has_version.wait(), self._config.transport.heartbeat_s)

    # --------------------------------------------------------------------------------------------- heartbeats

    async def _refresh_report(self) -> None:
        """Keep the next heartbeat fresh: made in the loop, between two awaits, so that its counts agree."""
        while True:
            self._report = Heartbeat(
                counters=self._counters(), engine_version=self._engine.version, held=list(self._lives)
            )
            await asyncio.sleep(self._config.transport.heartbeat_s / 2)

    def _counters(self) -> dict[str, float]:
        around = self._meter.counters() | self._environments.counters() | self._source.counters()
        taught = {} if self._teachers is None else self._teachers.counters()
        return around | self._engine.extra_counters | taught


async def _open_engine(config: Config, run_dir: Path, name: str, root: Path) -> Engine:
    """Return what this actor generates with.

    Args:
        config: the run's configuration.
        run_dir: run folder.
        name: this actor's name.
        root: folder that the shards of manifests are relative to.

    Raises:
        InputError: the model cannot be loaded, or a server is not what this run needs.
        EngineError: no server answered in time.
    """
    model_dir = run_dir / "model"
    if config.engine.kind == "sglang":
        from cod_async.engines.sglang.dealing import deal_servers
        from cod_async.engines.sglang.engine import SGLangEngine

        servers = deal_servers(config, run_dir, name)
        try:
            return await SGLangEngine.open(servers, config, run_dir=run_dir, model_dir=model_dir, root=root)
        except EngineMismatchError as error:  # starting this actor again would not help
            raise InputError(str(error)) from error
    import torch

    from cod_async.engines.embedded import load_engine

    torch.set_num_threads(config.engine.num_threads)
    max_context_tokens = config.model.max_context_tokens
    return load_engine(model_dir, config.engine, max_context_tokens=max_context_tokens, run_dir=root)


def run_actor(run_dir: Path, name: str) -> int:
    """Run an actor of the run in ``run_dir`` until the run ends.

    Args:
        run_dir: run folder; ``config.json`` and ``model/`` must exist.
        name: unique name, for example ``actor-0``.

    Raises:
        InputError: the run folder is not one, its model cannot be loaded, or its servers do not fit.
        EngineError: no server answered in time.
        ProtocolRefusedError: the coordinator speaks another protocol or serves another run.
    """
    config = load_resolved(run_dir)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")

    async def work() -> int:
        teachers = await open_teachers(config, run_dir / "model")
        source = open_weights_source(config, run_dir, name)
        engine = await _open_engine(config, run_dir, name, source.root)
        renderer = load_renderer(run_dir / "model", config.model.renderer)
        run, addresses = config.run.name, address_source(run_dir)
        return await ActorWorker(config, run, name, engine, renderer, addresses, source, teachers).run()

    return asyncio.run(work())
