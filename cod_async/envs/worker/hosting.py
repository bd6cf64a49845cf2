"""Where an environment lives: in this process, or behind limits in a worker; a rollout cannot tell.

Wherever it lives, what it raises and a call that takes too long are failures of the infrastructure: the
episode is played again, and nobody is scored for it. In this process a call that *awaits* too long is
cancelled; one that computes too long cannot be, and memory is not limited.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, NoReturn

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import (
    Closing,
    Environment,
    EnvironmentSpec,
    Opening,
    Playable,
    PromptStyle,
    StepResult,
    TaskSpec,
    canonical_json,
    environment_errors,
)
from cod_async.envs.worker.messages import Answer, Finish, Finished, Made, Start, Started, Step, Stepped
from cod_async.envs.worker.pool import WorkerPool
from cod_async.envs.worker.process import WorkerProcess
from cod_async.envs.worker.results import (
    checked_closing,
    checked_opening,
    checked_result,
    checked_snapshot,
)
from cod_async.errors import InfrastructureError
from cod_async.lifecycle.hint import HintPrompts

log = logging.getLogger(__name__)

CLOSE_S = 1.0
"""Time that an environment in this process has to close itself."""


def settings_for(environments: Sequence[EnvironmentConfig], task: TaskSpec) -> EnvironmentConfig:
    """Return the part of the configuration that a task's environment is played under.

    Args:
        environments: ``config.environments``; may lack the environment (in evaluation), which gives the
            defaults. Of several entries of the same environment the one with the task's preset and options
            counts, else the first.
        task: any task of the pack.
    """
    same = [settings for settings in environments if settings.name == task.environment]
    if not same:
        return EnvironmentConfig(name=task.environment, preset=task.preset, options=task.options)
    wanted = (True, True)
    return max(same, key=lambda found: (found.preset == task.preset, found.options == task.options) == wanted)


async def make_environment(
    task: TaskSpec, environments: Sequence[EnvironmentConfig], pool: WorkerPool
) -> Playable:
    """Return a fresh environment for a pack, under the limits of the configuration. Close it after use.

    Args:
        task: any task of the pack; only environment, preset and options are read.
        environments: ``config.environments``.
        pool: of this process.

    Raises:
        InfrastructureError: it cannot be made.
        EnvironmentInputError: there is no such environment or preset, or the options are wrong.
    """
    settings = settings_for(environments, task)
    with environment_errors(task.environment):
        spec = registry.get(task.environment)
        options = spec.options(task.preset, task.options)
        is_isolated = settings.isolation == "process" or (
            settings.isolation == "auto" and bool(spec.needs_limits)
        )
        if not is_isolated:
            return InlineEnvironment(spec.make(options), settings)
        worker, instance, made = await pool.make(settings, options)
        try:
            prompts = _own_prompts(spec, options, pool) if made.has_update_prompts else None
        except BaseException:
            pool.release(worker, instance)
            raise
        return IsolatedEnvironment(pool, worker, instance, made, prompts, settings)


def _own_prompts(spec: EnvironmentSpec, options: dict[str, Any], pool: WorkerPool) -> HintPrompts | None:
    """Return an environment's own update prompts: code, so an object in this process is asked for them."""
    key = (spec.name, canonical_json(options))
    if key not in pool.prompts:
        pool.prompts[key] = spec.make(options).update_prompts()
    return pool.prompts[key]


class InlineEnvironment:
    """An environment in this process, with a time limit on what it awaits.

    Args:
        environment: the object.
        settings: its limits.
    """

    def __init__(self, environment: Environment, settings: EnvironmentConfig) -> None:
        self._environment = environment
        self._settings = settings
        self.is_response_cut = False

    @property
    def name(self) -> str:
        """See :class:`~cod_async.envs.base.Environment`, as for all members."""
        return self._environment.name

    @property
    def prompt_style(self) -> PromptStyle:
        """Whose wording prompts have."""
        return self._environment.prompt_style

    @property
    def is_resumable(self) -> bool:
        """Whether state can be carried to another object."""
        return self._environment.is_resumable

    @property
    def is_step_penalized(self) -> bool:
        """Whether steps cost reward."""
        return self._environment.is_step_penalized

    def update_prompts(self) -> HintPrompts | None:
        """Return the environment's own update prompts."""
        return self._environment.update_prompts()

    def snapshot(self) -> bytes:
        """Return the state to carry."""
        return checked_snapshot(self._environment.snapshot())

    async def start(self, task: TaskSpec, state: bytes) -> Opening:
        """Start a task."""
        async with self._within("starting a task", self._settings.reset_timeout_s):
            return checked_opening(await self._environment.start(task, state))

    async def step(self, response: str) -> StepResult:
        """Apply a response."""
        self._environment.is_response_cut = self.is_response_cut
        async with self._within("a step", self._settings.step_timeout_s):
            return checked_result(await self._environment.step(response))

    async def finish(self, messages: list[tuple[str, str]] | None, has_feedback: bool) -> Closing:
        """End a task."""
        async with self._within("ending a task", self._settings.step_timeout_s):
            return checked_closing(await self._environment.finish(messages, has_feedback))

    async def close(self) -> None:
        """Release what the environment holds; what goes wrong in it is noted in the log only."""
        try:
            async with asyncio.timeout(CLOSE_S):
                await self._environment.close()
        except (Exception, SystemExit) as error:
            log.warning("environment %s did not close: %s: %s", self.name, type(error).__name__, error)

    @asynccontextmanager
    async def _within(self, what: str, limit_s: float) -> AsyncIterator[None]:
        with environment_errors(self.name):
            try:
                async with asyncio.timeout(limit_s) as scope:
                    yield
            except TimeoutError:
                if not scope.expired():
                    raise
                raise InfrastructureError(
                    f"environment {self.name}: {what} took longer than {limit_s:g} s"
                ) from None


class IsolatedEnvironment:
    """An environment in a worker process, with limits on time and memory.

    Args:
        pool: that the worker belongs to.
        worker, instance: where the object is.
        made: what the worker said about it.
        prompts: its own update prompts.
        settings: its limits.
    """

    def __init__(
        self,
        pool: WorkerPool,
        worker: WorkerProcess,
        instance: int,
        made: Made,
        prompts: HintPrompts | None,
        settings: EnvironmentConfig,
    ) -> None:
        self._pool = pool
        self._worker = worker
        self._instance = instance
        self._snapshot = made.snapshot
        self._prompts = prompts
        self._settings = settings
        self._is_closed = False
        self.name: str = made.name
        self.prompt_style: PromptStyle = made.prompt_style
        self.is_resumable: bool = made.is_resumable
        self.is_step_penalized: bool = made.is_step_penalized
        self.is_response_cut = False

    def update_prompts(self) -> HintPrompts | None:
        """Return the environment's own update prompts."""
        return self._prompts

    def snapshot(self) -> bytes:
        """Return the state after the last finished task, or of the fresh object."""
        return self._snapshot

    async def start(self, task: TaskSpec, state: bytes) -> Opening:
        """Start a task; see :class:`~cod_async.envs.base.Environment`, as for all members."""
        call = Start(call=self._pool.number(), instance=self._instance, task=task, state=state)
        answer = await self._worker.call(call, self._what("starting a task"), self._settings.reset_timeout_s)
        return answer.opening if isinstance(answer, Started) else self._wrong(answer)

    async def step(self, response: str) -> StepResult:
        """Apply a response."""
        call = Step(
            call=self._pool.number(),
            instance=self._instance,
            response=response,
            is_response_cut=self.is_response_cut,
        )
        answer = await self._worker.call(call, self._what("a step"), self._settings.step_timeout_s)
        return answer.result if isinstance(answer, Stepped) else self._wrong(answer)

    async def finish(self, messages: list[tuple[str, str]] | None, has_feedback: bool) -> Closing:
        """End a task."""
        call = Finish(
            call=self._pool.number(),
            instance=self._instance,
            messages=messages,
            has_feedback=has_feedback,
        )
        answer = await self._worker.call(call, self._what("ending a task"), self._settings.step_timeout_s)
        if not isinstance(answer, Finished):
            self._wrong(answer)
        self._snapshot = answer.closing.snapshot
        return answer.closing

    async def close(self) -> None:
        """Let the worker close the object; waits for nothing."""
        if not self._is_closed:
            self._is_closed = True
            self._pool.release(self._worker, self._instance)

    def _what(self, action: str) -> str:
        return f"environment {self.name}: {action}"

    def _wrong(self, answer: Answer) -> NoReturn:
        raise InfrastructureError(f"environment worker {self._worker.pid} answered {type(answer).__name__}")
