"""Supervised training of the starting model on short token documents.

Documents are a few dozen tokens long and all different, so a step's documents are sorted by length and cut
into a few rectangles: little padding, and no attention mask, because padding to the right cannot be seen
under a causal mask. Every token has a category code (0: context, no loss); the loss is the mean over all
tokens with a category, and the mean per category is reported, because the gate looks at one of them only.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from cod_async.config.schema import BootstrapConfig
from cod_async.errors import NumericsError

GATE_WINDOW_STEPS = 10
"""The gate looks at the mean over this many last steps; documents are fresh, so this is not a training-set
loss."""

MAX_EXTENSION = 2
"""At most this many times ``num_steps``."""

_ADAM_BETAS = (0.9, 0.95)
_GRAD_CLIP = 1.0
_NUM_RECTANGLES = 3


class TokenDocument(NamedTuple):
    """One training document.

    Attributes:
        token_ids: T ids.
        categories: T codes; 0 is context, c >= 1 indexes ``categories[c - 1]`` of the trainer.
    """

    token_ids: Sequence[int]
    categories: Sequence[int]


class LossModel(nn.Module):
    """What the trainer needs of a model: hidden states and the head's weight."""

    head_weight: torch.Tensor


@dataclass
class TrainingResult:
    """What came of a training run.

    Attributes:
        num_steps: optimiser steps done.
        losses: mean loss per category over the last :data:`GATE_WINDOW_STEPS` steps, in nats per token.
        is_gate_met: whether the gate's loss is below its bar (True when there is no gate category).
        gate_loss: what the gate looked at, in nats per document of that category; None without such
            documents.
        history: (step, losses by category) every tenth step.
    """

    num_steps: int
    losses: dict[str, float]
    is_gate_met: bool
    gate_loss: float | None
    history: list[tuple[int, dict[str, float]]] = field(default_factory=list)


def learning_rate(step: int, *, peak: float, num_steps: int, warmup_steps: int) -> float:
    """Return the rate of optimiser step ``step`` (0-based): linear warm-up, then linear decay to a tenth of
    ``peak``.

    Past ``num_steps`` the rate stays at the tenth.
    """
    warm = min(1.0, (step + 1) / warmup_steps) if warmup_steps else 1.0
    progress = min(1.0, step / max(1, num_steps - 1))
    return peak * warm * (1.0 - 0.9 * progress)


def rectangles(
    documents: Sequence[TokenDocument],
) -> list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]]:
    """Sort documents by length and cut them into a few right-padded ([B, T] ids, [B, T] categories) pairs.

    Pads with id 0 and category 0; under a causal mask padding to the right changes nothing to its left.
    """
    order = sorted(range(len(documents)), key=lambda i: len(documents[i].token_ids))
    size = max(1, math.ceil(len(order) / _NUM_RECTANGLES))
    out = []
    for start in range(0, len(order), size):
        chosen = [documents[i] for i in order[start : start + size]]
        width = len(chosen[-1].token_ids)
        ids = np.zeros((len(chosen), width), dtype=np.int64)
        categories = np.zeros((len(chosen), width), dtype=np.int64)
        for row, document in enumerate(chosen):
            length = len(document.token_ids)
            ids[row, :length] = document.token_ids
            categories[row, :length] = document.categories
        out.append((ids, categories))
    return out


def token_losses(model: Any, ids: torch.Tensor, targets: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return (losses [M] in nats, categories [M]) of the M target tokens of a rectangle.

    Args:
        model: maps ids [B, T] to hidden [B, T, H] and has ``head_weight`` [V, H].
        ids: int64 [B, T].
        targets: int64 [B, T] category codes; tokens with code 0 and first tokens have no loss.
    """
    hidden = model(ids[:, :-1])
    wanted = targets[:, 1:] > 0
    # Only positions that carry loss go through the head: about a third of all.
    logits = hidden[wanted] @ model.head_weight.T
    losses = nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="none")
    return losses, targets[:, 1:][wanted]


class _Meter:
    """Means per category over a sliding window of steps."""

    def __init__(self, categories: Sequence[str]) -> None:
        self.categories = list(categories)
        self.window: deque[tuple[npt.NDArray[np.float64], npt.NDArray[np.float64], int]] = deque(
            maxlen=GATE_WINDOW_STEPS
        )

    def add(
        self, sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], num_gate_documents: int
    ) -> None:
        self.window.append((sums, counts, num_gate_documents))

    def means(self) -> dict[str, float]:
        if not self.window:
            return {}
        sums = np.sum([entry[0] for entry in self.window], axis=0)
        counts = np.sum([entry[1] for entry in self.window], axis=0)
        return {
            name: round(float(sums[i] / counts[i]), 5)
            for i, name in enumerate(self.categories)
            if counts[i] > 0
        }

    def gate(self, code: int | None) -> float | None:
        if code is None:
            return None
        num = sum(entry[2] for entry in self.window)
        return float(sum(entry[0][code - 1] for entry in self.window)) / num if num else None


def train(
    model: Any,
    next_documents: Callable[[int, int], Sequence[TokenDocument]],
    categories: Sequence[str],
    config: BootstrapConfig,
    *,
    gate_category: str = "qa",
    on_progress: Callable[[dict[str, Any]], None] | None = None,
) -> TrainingResult:
    """Train ``model`` in place.

    Args:
        model: a causal model with ``head_weight`` (see :func:`token_losses`).
        next_documents: (step, number) -> that many fresh documents, deterministic in its arguments.
        categories: names of the category codes 1..
        config: steps, documents per step, learning rate, gate.
        gate_category: the category whose loss per document must fall below ``config.qa_loss_gate``; training
            goes on past ``num_steps``, at most twice as long, until it does.
        on_progress: called every tenth step with ``{step, num_steps, loss, losses}``.

    Raises:
        NumericsError: the loss is not finite; lower ``bootstrap.lr``.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr, betas=_ADAM_BETAS, weight_decay=0.0)
    gate_code = list(categories).index(gate_category) + 1 if gate_category in categories else None
    meter = _Meter(categories)
    history: list[tuple[int, dict[str, float]]] = []
    step = 0
    while step < config.num_steps * MAX_EXTENSION:
        gate_loss = meter.gate(gate_code)
        if step >= config.num_steps and (gate_loss is None or gate_loss < config.qa_loss_gate):
            break
        for parameter_group in optimizer.param_groups:
            parameter_group["lr"] = learning_rate(
                step, peak=config.lr, num_steps=config.num_steps, warmup_steps=config.warmup_steps
            )
        loss = _step(model, optimizer, next_documents(step, config.documents_per_step), meter, gate_code)
        if not math.isfinite(loss):
            raise NumericsError(
                f"bootstrap loss is {loss} at step {step}; lower bootstrap.lr (now {config.lr})"
            )
        step += 1
        if step % 10 == 0 or step == config.num_steps:
            history.append((step, meter.means()))
            if on_progress is not None:
                on_progress(
                    {
                        "step": step,
                        "num_steps": config.num_steps,
                        "loss": round(loss, 4),
                        "losses": meter.means(),
                    }
                )
    gate_loss = meter.gate(gate_code)
    is_met = gate_loss is None or gate_loss < config.qa_loss_gate
    return TrainingResult(step, meter.means(), is_met, gate_loss, history)


def _step(
    model: Any,
    optimizer: torch.optim.Optimizer,
    documents: Sequence[TokenDocument],
    meter: _Meter,
    gate_code: int | None,
) -> float:
    """Run one optimiser step and return the mean loss over all target tokens."""
    num_targets = sum(sum(1 for code in d.categories[1:] if code) for d in documents)
    num_gate_documents = sum(1 for d in documents if gate_code is not None and gate_code in d.categories)
    num_categories = len(meter.categories)
    sums, counts = np.zeros(num_categories), np.zeros(num_categories)
    optimizer.zero_grad(set_to_none=True)
    for ids, codes in rectangles(documents):
        losses, kinds = token_losses(model, torch.from_numpy(ids), torch.from_numpy(codes))
        (losses.sum() / max(1, num_targets)).backward()  # type: ignore[no-untyped-call]
        flat = losses.detach().double().numpy()
        index = kinds.numpy() - 1
        sums += np.bincount(index, weights=flat, minlength=num_categories)
        counts += np.bincount(index, minlength=num_categories)
    nn.utils.clip_grad_norm_(model.parameters(), _GRAD_CLIP)
    optimizer.step()
    meter.add(sums, counts, num_gate_documents)
    return float(sums.sum() / max(1.0, counts.sum()))
