"""What evaluation knows of environments and policies do not: hidden worlds and true hints.

They come from objects in this process, without limits, and are asked for by evaluation itself, never by the
policy. Lifecycles are played in environments that stand under the limits of the configuration, as in an actor
(:func:`cod_async.envs.worker.make_environment`).
"""

from __future__ import annotations

import hashlib

from cod_async.envs import registry
from cod_async.envs.base import TaskSpec, canonical_json, environment_errors
from cod_async.errors import InputError


def world_of(task: TaskSpec) -> str:
    """Return a digest of a task's hidden world, to compare packs by."""
    spec = registry.get(task.environment)
    with environment_errors(task.environment):
        environment = spec.make(spec.options(task.preset, task.options))
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
        return spec.truth_hint(spec.make(spec.options(task.preset, task.options)), task)
