"""What the learner of a run will need: ranks, memory line by line, operations per step; and all parts' GPUs.

Numbers are forecasts from the ``config.json`` of the model alone (:mod:`cod_async.learner.budget`); nothing
is loaded. Operations are counted, seconds are not given: what a device reaches is a matter of measurement
(``python -m bench.learner.gpu``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from cod_async.config.schema import Config
from cod_async.learner.budget import memory_budget, step_flops
from cod_async.learner.fitting import fit, has_reference
from cod_async.models.shape import ModelShape

GIB = 1 << 30


def plan_gpus(config: Config) -> dict[str, int]:
    """Return how many GPUs each part of a run takes when it runs on GPUs, and all of them together."""
    engine, learner = config.engine, config.learner
    if engine.kind == "embedded":
        engines = config.actors.num_processes
    else:
        engines = (len(engine.urls) or engine.server.num_servers) * _tensor_parallel(engine.server.args)
    parts = {"engines": engines, "learner": learner.data_parallel * learner.sequence_parallel}
    return parts | {"together": sum(parts.values())}


def plan_learner(config: Config, shape: ModelShape, per_step: dict[str, int]) -> dict[str, Any]:
    """Return ranks, memory and operations of the learner.

    Args:
        config: a valid configuration.
        shape: of its model.
        per_step: totals of a step, with ``tokens`` and ``responses``.
    """
    learner = config.learner
    max_row_tokens = config.model.max_context_tokens
    has_copy = has_reference(config)
    budget = memory_budget(shape, learner, max_row_tokens=max_row_tokens, has_reference=has_copy)
    answer: dict[str, Any] = {
        "ranks": f"{learner.data_parallel} data x {learner.sequence_parallel} sequence",
        "compute_dtype": learner.compute_dtype,
        "recompute": learner.recompute,
        "tokens_per_rank_at_most": budget.tokens_per_rank,
        "memory": {
            line.name: f"{line.num_bytes / GIB:.2f} GiB {line.where}: {line.made_of}" for line in budget.lines
        },
        "device_bytes": budget.device_bytes,
        "host_bytes": budget.host_bytes,
    }
    if budget.unknown:
        answer["not_forecast"] = budget.unknown
    if learner.device_memory_bytes:
        found = fit(
            shape,
            learner,
            learner.device_memory_bytes,
            max_row_tokens=max_row_tokens,
            has_reference=has_copy,
        )
        if not (budget.unknown and found.tokens_per_micro_batch):
            answer |= {
                "fits": found.tokens_per_micro_batch > 0,
                "longest_row_tokens": found.longest_row_tokens,
                "tokens_per_micro_batch_used": found.tokens_per_micro_batch,
            }
    num_rows = max(1, per_step["tokens_at_most"] // max_row_tokens)
    mean_row = max(1, per_step["tokens"] // num_rows)
    flops = step_flops(
        shape, learner, [mean_row] * num_rows, min(per_step["tokens"], _action_tokens(config, per_step))
    )
    return answer | {
        "step_pflop": round(flops.model / 1e15, 3),
        "step_pflop_recomputed": round(flops.recomputed / 1e15, 3),
    }


def _tensor_parallel(args: Sequence[str]) -> int:
    """Return the GPUs of one server, from the arguments that it is started with."""
    for index, arg in enumerate(args):
        name, _, value = arg.partition("=")
        if name in ("--tp-size", "--tp", "--tensor-parallel-size"):
            text = value or (args[index + 1] if index + 1 < len(args) else "")
            return int(text) if text.isdigit() and int(text) > 0 else 1
    return 1


def _action_tokens(config: Config, per_step: dict[str, int]) -> int:
    limit = config.lifecycle.length_notice_tokens or config.lifecycle.max_response_tokens
    return per_step["responses"] * limit
