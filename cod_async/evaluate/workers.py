"""Playing an agenda: in this process, or spread over worker processes that share one queue.

A worker is a fresh interpreter that reads lines of JSON (a model to open, lifecycles to play) and answers
with lines of JSON (results, failures), so nothing is pickled and a crash has a name. It is given as many
lifecycles as its engine decodes at once and a new one for each that it finishes, so all workers stay busy
until the queue is empty. Torch threads are pinned to one per worker. A worker ends when its standard input
does, so nothing outlives the process that started it.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import queue
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol, cast

import msgspec

from cod_async.config.schema import Config, EngineConfig
from cod_async.errors import CodError, InfrastructureError, InputError, WorkError
from cod_async.evaluate.agenda import MAX_FAILURES, Agenda
from cod_async.evaluate.playing import Unit, open_engine, play_unit
from cod_async.evaluate.results import LifecycleResult

_MAX_ERROR_CHARS = 4000
_POLL_S = 0.5
_LEAVE_S = 5.0
"""Time that a worker has to end by itself when its standard input has ended."""


class Model(msgspec.Struct, frozen=True, kw_only=True, tag=True, forbid_unknown_fields=True):
    """A model to open, and the settings that will be played with it.

    Attributes:
        model_dir: Hugging Face model directory.
        engine: how to generate.
        max_context_tokens: the longest row of all settings.
        renderer: the model's template family.
        configs: of the settings, by their index.
    """

    model_dir: str
    engine: EngineConfig
    max_context_tokens: int
    renderer: str
    configs: tuple[Config, ...]


class _Play(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    unit: Unit


class _Done(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    number: int
    result: LifecycleResult


class _Failed(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    number: int
    reason: str


class _Refused(msgspec.Struct, frozen=True, tag=True, forbid_unknown_fields=True):
    problems: tuple[str, ...]


_ToWorker = Model | _Play
_FromWorker = _Done | _Failed | _Refused


class Stage(Protocol):
    """One set of weights and what is left to play with it."""

    @property
    def agenda(self) -> Agenda:
        """What is left."""
        ...

    @property
    def model(self) -> Model:
        """How to open the weights."""
        ...

    def close(self) -> None:
        """Called once, when the agenda is over."""
        ...


Tell = Callable[[Stage], None]


def play_here(stage: Stage, tell: Tell) -> None:
    """Play a stage in this process, ``engine.max_running`` lifecycles at a time.

    Raises:
        InputError: the model cannot be opened, or something cannot be played with this configuration.
        WorkError: too many lifecycles failed.
    """
    asyncio.run(_play_here(stage, tell))


async def _play_here(stage: Stage, tell: Tell) -> None:
    first = stage.agenda.take()
    if first is None:
        return
    async with _Table(stage.model) as table:
        running: dict[asyncio.Task[LifecycleResult], Unit] = {}
        waiting: Unit | None = first
        try:
            while waiting is not None or running:
                while waiting is not None:
                    running[asyncio.create_task(table.play(waiting))] = waiting
                    has_room = len(running) < stage.model.engine.max_running
                    waiting = stage.agenda.take() if has_room else None
                done, _ = await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    _settle(stage.agenda, running.pop(task), task)
                tell(stage)
                waiting = stage.agenda.take()
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)


def _settle(agenda: Agenda, unit: Unit, task: asyncio.Task[LifecycleResult]) -> None:
    try:
        agenda.finish(unit.number, task.result())
    except InfrastructureError as error:
        _note_failure(agenda, unit, str(error))


def _note_failure(agenda: Agenda, unit: Unit, reason: str) -> None:
    agenda.fail(unit, reason)
    if len(agenda.failures) > MAX_FAILURES:
        raise WorkError(
            "more than "
            f"{MAX_FAILURES} lifecycles cannot be played; what is finished is kept. The first of them: "
            f"{agenda.failures[0]}"
        )


class _Table:
    """An open model and everything else that lifecycles of its settings are played with."""

    def __init__(self, model: Model) -> None:
        from cod_async.envs.worker import WorkerPool
        from cod_async.lifecycle.rendering import load_renderer

        model_dir = Path(model.model_dir)
        self._configs = model.configs
        self._renderer = load_renderer(model_dir, cast(Any, model.renderer))
        self._engine = open_engine(model_dir, model.engine, model.max_context_tokens)
        self._workers = WorkerPool()

    async def __aenter__(self) -> _Table:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self._engine.aclose()
        await self._workers.aclose()

    async def play(self, unit: Unit) -> LifecycleResult:
        """Play one lifecycle."""
        return await play_unit(unit, self._configs[unit.setting], self._engine, self._renderer, self._workers)


# ------------------------------------------------------------------------------------- the parent of workers


@dataclass
class _Worker:
    """One worker process, as its parent sees it; started when there is something to play."""

    index: int
    events: queue.SimpleQueue[tuple[int, bytes | None]]
    process: subprocess.Popen[bytes] | None = None
    errors: bytearray = field(default_factory=bytearray)
    stage: int = 0
    opened: int | None = None
    in_flight: dict[int, Unit] = field(default_factory=dict)


def play_in_processes(stages: Sequence[Stage], num_processes: int, tell: Tell) -> None:
    """Play stages one after the other in worker processes; a worker goes on as soon as it has nothing to do.

    Must be called from the main thread. Whatever ends it, no worker is left behind.

    Raises:
        InputError: a model cannot be opened, or something cannot be played with this configuration.
        WorkError: a worker ended, with the end of what it wrote, or too many lifecycles failed.
    """
    events: queue.SimpleQueue[tuple[int, bytes | None]] = queue.SimpleQueue()
    workers = [_Worker(index, events) for index in range(num_processes)]
    num_closed = 0
    try:
        while num_closed < len(stages):
            for worker in workers:
                _feed(worker, stages, num_processes)
            while num_closed < len(stages) and stages[num_closed].agenda.is_over:
                stages[num_closed].close()
                num_closed += 1
            if not any(worker.in_flight for worker in workers):
                continue
            with contextlib.suppress(queue.Empty):
                number, line = events.get(timeout=_POLL_S)
                _take_in(workers[number], line, stages, tell)
    finally:
        for worker in workers:
            _end(worker)


def _start() -> subprocess.Popen[bytes]:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
    # The checkout or the installed package, whichever this process was loaded from.
    environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
    return subprocess.Popen(
        [sys.executable, "-m", "cod_async.evaluate.workers"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    )


def _read_answers(worker: _Worker, stdout: IO[bytes]) -> None:
    for line in stdout:
        worker.events.put((worker.index, line))
    worker.events.put((worker.index, None))


def _read_errors(worker: _Worker, stderr: IO[bytes]) -> None:
    """Keep the end of what a worker complains about, so that a full pipe never blocks it."""
    for line in stderr:
        worker.errors += line
        del worker.errors[:-_MAX_ERROR_CHARS]


def _feed(worker: _Worker, stages: Sequence[Stage], num_processes: int) -> None:
    """Hand a worker as much as it can play at once."""
    while worker.stage < len(stages):
        stage = stages[worker.stage]
        share = math.ceil(stage.agenda.total / num_processes)
        if len(worker.in_flight) >= min(stage.model.engine.max_running, max(1, share)):
            return
        unit = stage.agenda.take()
        if unit is not None:
            if worker.opened != worker.stage:
                _say(worker, stage.model)
                worker.opened = worker.stage
            worker.in_flight[unit.number] = unit
            _say(worker, _Play(unit))
        elif worker.in_flight or not stage.agenda.is_handed_out:
            return
        else:
            worker.stage += 1


def _say(worker: _Worker, message: _ToWorker) -> None:
    if worker.process is None:
        worker.process = _start()
        for target, stream in (
            (_read_answers, worker.process.stdout),
            (_read_errors, worker.process.stderr),
        ):
            threading.Thread(target=target, args=(worker, stream), daemon=True).start()
    with contextlib.suppress(BrokenPipeError):  # its end is reported by the thread that reads from it
        stdin = cast(Any, worker.process.stdin)
        stdin.write(msgspec.json.encode(message) + b"\n")
        stdin.flush()


def _take_in(worker: _Worker, line: bytes | None, stages: Sequence[Stage], tell: Tell) -> None:
    if line is None:
        code = None if worker.process is None else worker.process.wait()
        told = worker.errors.decode(errors="replace").strip()
        raise WorkError(f"an evaluation worker ended with code {code}; what is finished is kept:\n{told}")
    message = msgspec.json.decode(line, type=_FromWorker)
    if isinstance(message, _Refused):
        raise InputError(message.problems)
    unit, stage = worker.in_flight.pop(message.number), stages[worker.stage]
    if isinstance(message, _Done):
        stage.agenda.finish(unit.number, message.result)
    else:
        _note_failure(stage.agenda, unit, message.reason)
    tell(stage)


def _end(worker: _Worker) -> None:
    process = worker.process
    if process is None:
        return
    if process.poll() is None:
        process.kill()
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        with contextlib.suppress(OSError):
            cast(Any, stream).close()


# ------------------------------------------------------------------------------------------ the worker itself


class _Serving:
    """The worker's side: reads what to play and plays it."""

    def __init__(self, out: Any) -> None:
        self._out = out
        self._inbox: asyncio.Queue[_ToWorker | None] = asyncio.Queue()
        self._running: set[asyncio.Task[None]] = set()
        self._table: _Table | None = None

    async def run(self) -> None:
        """Serve until standard input ends."""
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._read, args=(loop,), daemon=True).start()
        try:
            while (message := await self._inbox.get()) is not None:
                if isinstance(message, Model):
                    await asyncio.gather(*self._running)
                    await self._close()
                    self._table = _Table(message)
                else:
                    task = asyncio.create_task(self._play(message.unit))
                    self._running.add(task)
                    task.add_done_callback(self._running.discard)
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            await self._close()

    def _read(self, loop: asyncio.AbstractEventLoop) -> None:
        for line in sys.stdin.buffer:
            message = msgspec.json.decode(line, type=_ToWorker)
            loop.call_soon_threadsafe(self._inbox.put_nowait, message)
        loop.call_soon_threadsafe(self._inbox.put_nowait, None)
        threading.Event().wait(_LEAVE_S)
        os._exit(1)  # something computes and does not let go

    async def _play(self, unit: Unit) -> None:
        assert self._table is not None  # noqa: S101  (a model comes first)
        try:
            self.say(_Done(unit.number, await self._table.play(unit)))
        except InfrastructureError as error:
            self.say(_Failed(unit.number, str(error)))
        except InputError as error:
            self.say(_Refused(error.problems))
        except Exception:  # a defect; the parent would wait for this lifecycle for ever
            traceback.print_exc()
            os._exit(1)

    async def _close(self) -> None:
        table, self._table = self._table, None
        if table is not None:
            await table.__aexit__()

    def say(self, message: _FromWorker) -> None:
        """Answer with one line."""
        self._out.write(msgspec.json.encode(message) + b"\n")
        self._out.flush()


def _main() -> int:
    """Serve on standard input and output; whatever else prints goes to standard error."""
    out = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    import torch

    torch.set_num_threads(1)
    serving = _Serving(out)
    try:
        asyncio.run(serving.run())
    except InputError as error:
        serving.say(_Refused(error.problems))
        return 2
    except CodError as error:
        sys.stderr.write(f"{type(error).__name__}: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(_main())
