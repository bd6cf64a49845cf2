"""Where evaluation gets its environments from: one place for playing, one for looking behind the scenes.

Lifecycles are played in environments that stand under the limits of the configuration, as in an actor.
Hidden worlds and true hints come from objects in this process: they are asked for by evaluation itself, never
by the policy.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

from cod_async.config.schema import EnvironmentConfig
from cod_async.envs import registry
from cod_async.envs.base import (
    Environment,
    EnvironmentSpec,
    Playable,
    TaskSpec,
    canonical_json,
    environment_errors,
)
from cod_async.envs.worker import WorkerPool, make_environment
from cod_async.errors import InputError


async def open_environment(
    task: TaskSpec, environments: Sequence[EnvironmentConfig], workers: WorkerPool
) -> Playable:
    """Return a fresh environment to play a pack in; close it after use.

    Raises:
        InfrastructureError: it cannot be made.
        EnvironmentInputError: unknown environment, preset or option.
    """
    return await make_environment(task, environments, workers)


def make_here(spec: EnvironmentSpec, options: Mapping[str, Any]) -> Environment:
    """Return a fresh environment object of this process, without limits.

    Raises:
        EnvironmentInputError: options that contradict each other.
    """
    return spec.make(options)


def world_of(task: TaskSpec) -> str:
    """Return a digest of a task's hidden world, to compare packs by."""
    spec = registry.get(task.environment)
    with environment_errors(task.environment):
        environment = make_here(spec, spec.options(task.preset, task.options))
        environment.reset(task)
        world = canonical_json(environment.hidden())
    return hashlib.sha256(world.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def truth_of(task: TaskSpec) -> str:
    """Return the hint that states the hidden world of a task.

    Raises:
        InputError: the environment has no such hint.
    """
    spec = registry.get(task.environment)
    if spec.truth_hint is None:
        raise InputError(f"control 'truth': environment {spec.name} has no truth hint")
    with environment_errors(task.environment):
        return spec.truth_hint(make_here(spec, spec.options(task.preset, task.options)), task)
