"""Whether a learner fits its device, asked before it starts, and what to say when it does not.

The forecast (:mod:`cod_async.learner.budget`) of the largest micro-batch is compared with the memory of a
rank's device. Where a row of full length fits and the configured micro-batch does not, the micro-batch's
budget is lowered, alike on every rank; where not even the row fits, the learner does not start. A row that is
too long all the same, and a device that runs out of memory, end the step before the optimizer has changed
anything, with the numbers that tell why. Loads torch only where a device is asked.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from cod_async.config.learner import LearnerConfig
from cod_async.config.schema import Config
from cod_async.errors import InputError, WorkError
from cod_async.learner.budget import (
    MemoryBudget,
    longest_row_tokens,
    memory_budget,
    micro_batch_that_fits,
)
from cod_async.models.shape import ModelShape, read_shape

if TYPE_CHECKING:
    from cod_async.learner.parallel.world import World
    from cod_async.learner.rows.flat import FlatRows
    from cod_async.wire.messages import TrainItem

log = logging.getLogger(__name__)

GIB = 1 << 30
_LARGEST = 3


class Fit(msgspec.Struct, frozen=True):
    """What of a learner fits a device.

    Attributes:
        budget: of the micro-batch that will be used; of the configured one where nothing fits.
        device_bytes: memory of the device.
        longest_row_tokens: longest row that fits as a micro-batch of its own; 0: none does.
        tokens_per_micro_batch: budget that will be used; 0: a row of full length does not fit.
    """

    budget: MemoryBudget
    device_bytes: int
    longest_row_tokens: int
    tokens_per_micro_batch: int


class Room(msgspec.Struct, frozen=True):
    """What a learner starts with.

    Attributes:
        learner: its configuration, perhaps with a smaller budget of a micro-batch.
        max_row_tokens: longest row that fits; None: nobody knows.
        forecast_bytes: peak of a rank's device; 0: nobody knows.
    """

    learner: LearnerConfig
    max_row_tokens: int | None = None
    forecast_bytes: int = 0


def has_reference(config: Config) -> bool:
    """Whether a frozen copy of the starting model is held beside the policy."""
    return config.loss.kl_coef > 0 and not config.loss.is_distilled


def fit(
    shape: ModelShape,
    learner: LearnerConfig,
    device_bytes: int,
    *,
    max_row_tokens: int,
    has_reference: bool = False,
) -> Fit:
    """Return what of a learner fits a device.

    Args:
        shape: of the model.
        learner: how it is trained.
        device_bytes: memory of each rank's device.
        max_row_tokens: the longest row there can be.
        has_reference: whether a frozen copy of the model is there too.
    """
    longest = longest_row_tokens(shape, learner, device_bytes, has_reference=has_reference)
    tokens = micro_batch_that_fits(
        shape, learner, device_bytes, max_row_tokens=max_row_tokens, has_reference=has_reference
    )
    used = msgspec.structs.replace(
        learner, tokens_per_micro_batch=tokens or max(learner.tokens_per_micro_batch, max_row_tokens)
    )
    budget = memory_budget(shape, used, max_row_tokens=max_row_tokens, has_reference=has_reference)
    return Fit(budget, device_bytes, longest, tokens)


def refusal(found: Fit, learner: LearnerConfig, max_row_tokens: int, device: str) -> str:
    """Return one line that says why a learner does not fit, and what to change."""
    largest = sorted(
        (line for line in found.budget.lines if line.where == "device"), key=lambda line: -line.num_bytes
    )[:_LARGEST]
    lines = ", ".join(f"{line.name} {gib(line.num_bytes)}" for line in largest)
    advice = []
    if learner.recompute in ("none", "selective"):
        advice.append('learner.recompute = "full"')
    elif learner.recompute == "full":
        advice.append('learner.recompute = "offload"')
    if learner.compute_dtype == "float32" and device.startswith("cuda"):
        advice.append('learner.compute_dtype = "bfloat16"')
    if not learner.has_optimizer_offload and learner.device != "cpu":
        advice.append("learner.has_optimizer_offload = true")
    if learner.tokens_per_micro_batch > max_row_tokens:
        advice.append("a smaller learner.tokens_per_micro_batch")
    advice += ["more learner.sequence_parallel ranks", "a smaller model.max_context_tokens"]
    return (
        f"learner: a row of model.max_context_tokens = {max_row_tokens} does not fit {device} with "
        f"{gib(found.device_bytes)}; the longest that does has {found.longest_row_tokens} tokens; forecast "
        f"{gib(found.budget.device_bytes)}, most of it {lines}; use {', '.join(advice)}"
    )


def gib(num_bytes: int) -> str:
    """Return bytes for people."""
    return f"{num_bytes / GIB:.2f} GiB" if num_bytes >= GIB / 100 else f"{num_bytes / (1 << 20):.2f} MiB"


def find_room(model_dir: Path, config: Config, world: World) -> Room:
    """Compare the forecast with this rank's device; all ranks come to the same end.

    On CUDA that is the device that is there, elsewhere ``learner.device_memory_bytes``; without it, and for
    models that nobody can count, there is no limit.

    Args:
        model_dir: of the starting model.
        config: of the run.
        world: the ranks, all of which ask.

    Raises:
        InputError: a row of full length does not fit.
    """
    learner = config.learner
    device_bytes, device = _memory_of(learner, world.device)
    try:
        shape = read_shape(model_dir) if device_bytes else None
    except InputError as error:
        log.info("no forecast of memory: %s", error)
        shape = None
    if shape is None:
        return Room(learner)
    used = msgspec.structs.replace(learner, device="cpu" if world.device.type == "cpu" else "cuda")
    longest = config.model.max_context_tokens
    found = fit(shape, used, device_bytes, max_row_tokens=longest, has_reference=has_reference(config))
    problem = refusal(found, used, longest, device) if not found.tokens_per_micro_batch else None
    problem = world.first_problem(problem)
    if problem is not None:
        raise InputError(problem)
    # Devices may differ; what is laid out must not.
    tokens, row = (
        -value for value in world.largest([-found.tokens_per_micro_batch, -found.longest_row_tokens])
    )
    if tokens < learner.tokens_per_micro_batch:
        log.warning(
            "learner.tokens_per_micro_batch = %d does not fit %s with %s: split at %d tokens",
            *(learner.tokens_per_micro_batch, device, gib(device_bytes), tokens),
        )
        learner = msgspec.structs.replace(learner, tokens_per_micro_batch=tokens)
    log.info(
        "forecast %s of %s on %s; the longest row that fits has %d tokens",
        *(gib(found.budget.device_bytes), gib(device_bytes), device, row),
    )
    return Room(learner, row, found.budget.device_bytes)


def _memory_of(learner: LearnerConfig, device: Any) -> tuple[int, str]:
    """Return the bytes of a device, 0 if there is no limit, and what to call it."""
    if device.type != "cuda":
        return learner.device_memory_bytes, "learner.device_memory_bytes"
    import torch

    _, total = torch.cuda.mem_get_info(device)
    if learner.device_memory_bytes:
        total = min(total, learner.device_memory_bytes)
    return total, f"{device} ({torch.cuda.get_device_name(device)})"


def check_rows(flat: FlatRows, items: Sequence[TrainItem], max_row_tokens: int | None) -> None:
    """Refuse a row that no device holds; every rank has the same rows and refuses them alike.

    Raises:
        WorkError: names the segment, the row's length, the limit and what to do.
    """
    longest = int(flat.lengths[flat.action_rows].max(initial=0))
    if max_row_tokens is None or longest <= max_row_tokens:
        return
    token = int(flat.lengths[flat.action_rows].argmax())
    key = items[int(flat.action_items[token])].key
    raise WorkError(
        f"segment {key}: its row has {longest} tokens, and the longest that fits the learner's device has "
        f"{max_row_tokens}; nothing was trained on; use more learner.sequence_parallel ranks, "
        'learner.recompute = "full" or "offload", or a smaller model.max_context_tokens'
    )


@contextmanager
def naming_exhausted_memory(about: Memory) -> Iterator[None]:
    """Turn a device's lack of memory, before anything was applied, into an error with the numbers.

    Raises:
        WorkError: in place of torch's error.
    """
    import torch

    try:
        yield
    except torch.OutOfMemoryError as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else "out of memory"
        forecast = f"forecast {gib(about.forecast_bytes)}" if about.forecast_bytes else "there is no forecast"
        raise WorkError(
            f"out of memory in a micro-batch of {about.num_tokens} tokens ({forecast}; {first[:200]}); the "
            "parameters are as before; use a smaller learner.tokens_per_micro_batch, more recomputation "
            "(learner.recompute), or more learner.sequence_parallel ranks, and go on with cod train --resume"
        ) from None


class Memory:
    """What is said when a device runs out of memory.

    Attributes:
        forecast_bytes: peak that was expected; 0: no forecast.
        num_tokens: of the micro-batch under way, this rank's part.
    """

    def __init__(self) -> None:
        self.forecast_bytes = 0
        self.num_tokens = 0
