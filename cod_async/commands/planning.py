"""What a run will start and how much it will do, from its configuration alone: ``cod train --dry-run``.

Nothing is started and no weights are needed. Numbers called *at most* are bounds: every row at the context
length. The others are estimates from the environments themselves: their scripted policies ``random`` and
``oracle``, between which a language model moves, play some packs, and turns and prompts are counted; every
response is taken to be as long as the prompt asks for (else at its limit). Prompts are counted in the words,
digits and signs that a tokenizer with a large vocabulary cuts text into.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cod_async.commands.planning_learner import plan_gpus, plan_learner
from cod_async.commands.turns import Estimate, estimate
from cod_async.config import config_digest
from cod_async.config.schema import Config
from cod_async.errors import InputError
from cod_async.launch.ranks import num_ranks
from cod_async.models.shape import CONFIG_FILE, read_shape
from cod_async.observe.summary import CURVES


def plan(config: Config) -> dict[str, Any]:
    """Return what a run will start and how much it will do.

    Raises:
        EnvironmentInputError: an environment refuses the packs that were planned for it.
        WorkError: an environment failed while it was played.
    """
    environments = [
        _environment(config, index, estimate(config, index)) for index in range(len(config.environments))
    ]
    per_step = _per_step(config, environments)
    lifecycles = per_step["lifecycles"]
    staleness = config.staleness
    ahead = staleness.plan_ahead_steps
    if ahead < 0:
        ahead = max(1, staleness.max_lag // 2) if staleness.max_lag else 0
    at_once = config.actors.num_processes * config.actors.lifecycles_per_process
    num_steps = config.run.num_steps
    return {
        "config_digest": config_digest(config),
        "processes": {
            "coordinator": 1,
            "learner": num_ranks(config.learner),
            "actors": config.actors.num_processes,
            "engines": _num_started(config),
        },
        "threads": (config.actors.num_processes + _num_started(config)) * config.engine.num_threads
        + num_ranks(config.learner) * config.learner.num_threads,
        "lifecycles_at_once": at_once,
        "environments": environments,
        "per_step": per_step,
        "run": {
            "steps_at_most": num_steps,
            "packs_at_most": num_steps * per_step["packs"],
            "tasks_at_most": num_steps * per_step["packs"] * config.lifecycle.pack_size,
            "lifecycles_at_most": num_steps * lifecycles,
            "segments_at_most": num_steps * per_step["segments"],
        },
        "staleness": {
            "max_lag": staleness.max_lag,
            "plan_ahead_steps": ahead,
            "lifecycles_under_way_at_most": (ahead + 1) * lifecycles,
            "are_actors_filled": at_once >= lifecycles,
        },
        "evaluation_lifecycles": config.evaluation.num_packs
        * config.evaluation.lifecycles_per_pack
        * len(CURVES)
        * len(config.environments)
        if config.evaluation.is_enabled
        else 0,
        "model": _model(config),
        "learner": _learner(config, per_step),
        "gpus": plan_gpus(config),
        "engine": _engine(config),
    }


def _num_started(config: Config) -> int:
    """Return the number of servers that the launcher will start."""
    is_starting = config.engine.kind == "sglang" and not config.engine.urls
    return config.engine.server.num_servers if is_starting else 0


def _engine(config: Config) -> dict[str, Any]:
    """Return what generates, where, and how new weights get there; asks the interpreter of started servers,
    unless the run is planned from a shape alone, on a machine where nothing can be started yet.

    Raises:
        InputError: that interpreter cannot start one.
    """
    engine, weights = config.engine, config.weights
    answer: dict[str, Any] = {
        "kind": engine.kind,
        "max_running": engine.max_running,
        "on_publish": engine.on_publish,
    }
    if engine.kind == "embedded":
        return answer | {"weights": weights.source}
    from cod_async.launch.engines import inspect_engine

    answer["weights"] = f"{weights.source}, then {weights.into_engine}"
    names = list(engine.urls) or [f"engine-{index}" for index in range(engine.server.num_servers)]
    num_actors = config.actors.num_processes
    answer["servers"] = {f"actor-{index}": names[index::num_actors] for index in range(num_actors)}
    model = config.model
    if engine.urls or (model.path and not (Path(model.path) / CONFIG_FILE).is_file()):
        return answer
    interpreter = inspect_engine(config)
    return answer | {
        "listening_at": f"{engine.server.host}, free ports",
        "python": interpreter.python,
        "sglang": interpreter.release,
        "torch": interpreter.torch,
        "device": "cuda" if interpreter.has_cuda else "cpu",
    }


def _episodes(config: Config) -> tuple[int, int]:
    """Return how many solve and update episodes a lifecycle has."""
    lifecycle = config.lifecycle
    return lifecycle.pack_size, lifecycle.pack_size - 1 if lifecycle.has_updates else 0


def _environment(config: Config, index: int, found: Estimate) -> dict[str, Any]:
    """Return one environment's share of an optimiser step."""
    environment = config.environments[index]
    share = environment.weight / sum(other.weight for other in config.environments)
    num_solves, num_updates = _episodes(config)
    packs = share * config.learner.groups_per_step
    lifecycles = packs * config.lifecycle.group_size
    rows = 1 if config.lifecycle.carry == "transcript" else num_solves + num_updates
    return {
        "environment": environment.name,
        "preset": environment.preset,
        "share": round(share, 4),
        "packs": round(packs, 2),
        "lifecycles": round(lifecycles, 2),
        "solves": round(lifecycles * num_solves, 2),
        "updates": round(lifecycles * num_updates, 2),
        "turns_per_solve": {**found.turns_by_policy, "at_most": found.max_turns},
        "responses": round(lifecycles * (num_solves * found.turns + num_updates)),
        "tokens": round(lifecycles * found.tokens_per_lifecycle),
        "tokens_at_most": round(lifecycles * rows * config.model.max_context_tokens),
    }


def _per_step(config: Config, environments: list[dict[str, Any]]) -> dict[str, int]:
    """Return the totals of an optimiser step; packs and groups are the same number."""
    lifecycle, num_groups = config.lifecycle, config.learner.groups_per_step
    num_lifecycles = num_groups * lifecycle.group_size
    num_segments = num_lifecycles * sum(_episodes(config))
    num_rows = num_lifecycles if lifecycle.carry == "transcript" else num_segments
    tokens_at_most = num_rows * config.model.max_context_tokens
    budget = config.learner.tokens_per_micro_batch
    return {
        "packs": num_groups,
        "groups": num_groups,
        "lifecycles": num_lifecycles,
        "segments": num_segments,
        "responses": sum(row["responses"] for row in environments),
        "tokens": sum(row["tokens"] for row in environments),
        "tokens_at_most": tokens_at_most,
        "micro_batches_at_most": math.ceil(tokens_at_most / budget),
    }


def _model(config: Config) -> dict[str, Any]:
    """Return where the model comes from and what it is."""
    model = config.model
    if not model.path:
        return {"source": f"bootstrap ({config.bootstrap.kind}), {config.bootstrap.num_steps} steps"}
    is_there = (Path(model.path) / CONFIG_FILE).is_file()
    answer: dict[str, Any] = {"source": model.path, "shape": model.shape or None, "is_there": is_there}
    try:
        shape = read_shape(Path(model.path if is_there else model.shape))
    except InputError:  # a directory that loads although it leaves out what counting needs
        return answer
    return answer | {
        "model_type": shape.model_type,
        "is_trainable": shape.is_trainable,
        "num_parameters": shape.num_parameters,
    }


def _learner(config: Config, per_step: dict[str, int]) -> dict[str, Any]:
    """Return what the learner needs; empty where no ``config.json`` says what the model is."""
    model = config.model
    if not model.path:
        return {}
    is_there = (Path(model.path) / CONFIG_FILE).is_file()
    try:
        return plan_learner(config, read_shape(Path(model.path if is_there else model.shape)), per_step)
    except InputError:
        return {}
