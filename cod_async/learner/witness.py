"""What a step leaves behind so that a replay can prove itself: digests, and the conditions it ran under.

Loss, gradient norm and all other metrics are recorded exactly (JSON keeps every bit of a float64). Beside
them stand the SHA-256 of the weights that the step started from and of the gradients that it applied, and
what decides its micro-batches and the order of its sums: token budget, threads, ranks, machine. Digests are
taken of every step of a small model, and of a large one only at steps that start from a checkpoint, because
hashing reads every byte on the host.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from cod_async.config.learner import LearnerConfig
from cod_async.learner.parallel.local import WholeTensors
from cod_async.learner.step import Trainer
from cod_async.weights.digest import tensors_digest

MAX_BYTES_EVERY_STEP = 16 << 20
"""Models up to this size have digests of every step; with SHA instructions a core hashes 1.7 GB/s."""

SETTINGS: Mapping[str, type] = {
    "tokens_per_micro_batch": int,
    "num_threads": int,
    "data_parallel": int,
    "sequence_parallel": int,
    "recompute": str,
    "optimizer": str,
    "has_optimizer_offload": bool,
}
"""Fields of ``[learner]`` that change sums in their last bits, and that ``--resume --set`` may change."""


def conditions(learner: LearnerConfig, device: torch.device) -> dict[str, str]:
    """Return what decides the last bits of a step on this machine, by name."""
    machine = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else torch.backends.cpu.get_cpu_capability()
    )
    return {
        **{name: str(getattr(learner, name)) for name in SETTINGS},
        "device": device.type,
        "machine": machine,
        "torch": str(torch.__version__),
    }


def settings_of(witness: Mapping[str, str]) -> dict[str, Any]:
    """Return the fields of ``[learner]`` that a witness names, with their values at that step."""
    found = {name: witness[name] for name in SETTINGS if name in witness}
    return {
        name: text == "True" if SETTINGS[name] is bool else SETTINGS[name](text)
        for name, text in found.items()
    }


def num_ranks_of(witness: Mapping[str, str]) -> int:
    """Return the number of ranks that a step was computed on."""
    settings = settings_of(witness)
    return int(settings.get("data_parallel", 1) * settings.get("sequence_parallel", 1))


def weights_digest(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all parameters, in the order of their names; of a sharded model all ranks
    must ask.
    """
    return tensors_digest(WholeTensors({name: value.detach() for name, value in model.named_parameters()}))


def gradients_digest(model: nn.Module) -> str:
    """Return the SHA-256 (hex) of all gradients, in the order of their parameters' names."""
    named = model.named_parameters()
    return tensors_digest(WholeTensors({name: value.grad for name, value in named if value.grad is not None}))


def is_small(model: nn.Module) -> bool:
    """Whether a model's digests are cheap enough for every step."""
    num_bytes = sum(value.numel() * value.element_size() for value in model.parameters())
    return num_bytes <= MAX_BYTES_EVERY_STEP


class Witness:
    """Collects the witness of one step after the other.

    The digest of the gradients is taken by a hook of the optimizer, just before it applies them.

    Args:
        trainer: that takes the steps.
        learner: its configuration.
        is_always: take digests of every step, whatever the model's size.
    """

    def __init__(self, trainer: Trainer, learner: LearnerConfig, *, is_always: bool = False) -> None:
        self._model = trainer.model
        self._timeline = trainer.timeline
        self._every = 1 if is_always or is_small(trainer.model) else learner.checkpoint_every_steps
        self._conditions = conditions(learner, trainer.model.device)
        self._weights = ""
        self._gradients: list[str] = []
        self._is_due = False
        trainer.optimizer.register_step_pre_hook(self._before_step)

    def begin(self, step: int) -> None:
        """Take the digest of the weights that a step starts from, if it is due."""
        self._is_due = step % self._every == 0
        self._weights = weights_digest(self._model) if self._is_due else ""
        self._gradients = []

    def of_step(self) -> dict[str, str]:
        """Return what is to be kept of the step: ``weights``, ``gradients`` where they were due, and
        ``conditions``. With several optimizer steps ``gradients`` is the SHA-256 over the digests of all.
        """
        digests = {"weights": self._weights, "gradients": joined(self._gradients)}
        return {**{name: value for name, value in digests.items() if value}, **self._conditions}

    def _before_step(self, *_: Any) -> None:
        if self._is_due:
            with self._timeline.span("digest"):
                self._gradients.append(gradients_digest(self._model))


def joined(digests: Sequence[str]) -> str:
    """Return one digest for those of several optimizer steps: its own for one, empty for none."""
    if len(digests) < 2:
        return "".join(digests)
    return hashlib.sha256("".join(digests).encode()).hexdigest()
