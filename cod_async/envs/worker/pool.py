"""The environment workers of one process, shared by all of its lifecycles.

Workers are started when they are needed and live long. Environments of one name under one memory limit share
workers; a new object goes to the worker that holds the fewest. When a worker ends, its episodes fail as
infrastructure and are played again from their last sealed states, on another worker that is started in its
place: what dies with a worker is never more than one episode of each lifecycle in it.
"""

from __future__ import annotations

import asyncio
import itertools
from collections import Counter
from typing import Any

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs.worker.messages import Made, Make
from cod_async.envs.worker.process import WorkerProcess
from cod_async.errors import InfrastructureError
from cod_async.lifecycle.hint import HintPrompts

Key = tuple[str, int]
"""Environment name and memory limit: what workers are shared by."""


class WorkerPool:
    """Starts, shares, counts and ends environment workers; to be used inside one asyncio loop.

    Attributes:
        prompts: update prompts of environments that have their own, by name and options.
    """

    def __init__(self) -> None:
        self.prompts: dict[tuple[str, str], HintPrompts | None] = {}
        self._workers: dict[Key, list[WorkerProcess]] = {}
        self._starting: dict[Key, asyncio.Lock] = {}
        self._gone: set[WorkerProcess] = set()
        self._counts: Counter[str] = Counter()
        self._numbers = itertools.count()
        self._is_closed = False

    def counters(self) -> dict[str, float]:
        """Return cumulative counts: ``environment_workers_started`` and ``environment_workers_lost_<reason>``
        (``timeout``, ``memory``, ``died``, ``protocol``).
        """
        return {name: float(value) for name, value in self._counts.items()}

    def number(self) -> int:
        """Return a number for an object or a call that no other has in this pool."""
        return next(self._numbers)

    def pids(self) -> list[int]:
        """Return the process ids of the living workers."""
        return [worker.pid for workers in self._workers.values() for worker in workers]

    async def make(
        self, settings: EnvironmentConfig, options: dict[str, Any]
    ) -> tuple[WorkerProcess, int, Made]:
        """Make an environment object in a worker; return the worker, the object's number and its nature.

        Args:
            settings: names the environment and its limits.
            options: of the preset, with overrides.

        Raises:
            InfrastructureError: it cannot be made.
            EnvironmentInputError: the options are wrong.
        """
        worker = await self._worker(settings)
        instance = self.number()
        worker.num_instances += 1
        call = Make(call=self.number(), instance=instance, environment=settings.name, options=options)
        try:
            made = await worker.call(call, f"making {settings.name}", settings.reset_timeout_s)
            if not isinstance(made, Made):
                raise InfrastructureError(f"environment worker {worker.pid} answered {type(made).__name__}")
        except BaseException:
            self.release(worker, instance)
            raise
        return worker, instance, made

    def release(self, worker: WorkerProcess, instance: int) -> None:
        """Close an object; its worker has room for another."""
        worker.num_instances -= 1
        worker.forget(instance)

    async def aclose(self) -> None:
        """End all workers."""
        self._is_closed = True
        workers = [worker for workers in self._workers.values() for worker in workers]
        self._workers.clear()
        await asyncio.gather(*(worker.close() for worker in (*workers, *self._gone)))
        self._gone.clear()

    async def _worker(self, settings: EnvironmentConfig) -> WorkerProcess:
        """Return the worker for a new object; start one while there are fewer than allowed."""
        key = (settings.name, settings.memory_bytes)
        async with self._starting.setdefault(key, asyncio.Lock()):
            if self._is_closed:
                raise InfrastructureError("the environment workers were closed")
            workers = self._workers.setdefault(key, [])
            best = min(workers, key=lambda worker: worker.num_instances, default=None)
            if best is not None and (best.num_instances == 0 or len(workers) >= settings.num_workers):
                return best
            worker = await WorkerProcess.start(settings.memory_bytes, lambda ended: self._ended(key, ended))
            self._counts["environment_workers_started"] += 1
            if worker.end is not None:
                raise InfrastructureError(f"environment worker {worker.pid} ended as soon as it was started")
            workers.append(worker)
            return worker

    def _ended(self, key: Key, worker: WorkerProcess) -> None:
        """Take a worker that was lost off the list; :meth:`aclose` waits until it is collected."""
        self._counts[f"environment_workers_lost_{worker.end}"] += 1
        workers = self._workers.get(key, [])
        if worker in workers:
            workers.remove(worker)
        self._gone = {gone for gone in self._gone if not gone.is_collected} | {worker}
