"""One step: forward, loss and backward per micro-batch, then AdamW, or nothing at all.

Only the hidden states that predict action tokens go through the output head, and tokens of segments without
advantage go through it once, in the forward direction. Gradients of micro-batches add up to the gradient of
the exact global mean, because every segment's weight comes from the whole of what an optimiser step trains on
(with ``minibatches_per_step`` above 1, a part of the plan). A loss or gradient that is not finite leaves
parameters and optimiser untouched.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cod_async.algo.corrections.step_size import step_size_factor
from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import NumericsError, WorkError
from cod_async.learner.gaps import gap_metrics, gap_sums, token_ess_frac
from cod_async.learner.objective import Objective, make_objective, needs_start, needs_survey
from cod_async.learner.packing import (
    MAX_BUCKET_TOKENS,
    FlatRows,
    MicroBatch,
    micro_batches,
    split_lifecycles,
    upload,
)
from cod_async.models.qwen3 import Qwen3
from cod_kernels import (
    KernelInputError,
    linear_logprob,
    linear_segment_loss,
    merge_metrics,
    raise_faults,
    summarize_metrics,
)


def predicting_states(model: Qwen3, batch: MicroBatch) -> Tensor:
    """Return the hidden states that predict a micro-batch's action tokens, [A, H]."""
    hidden: Tensor = model(batch.input_ids).flatten(0, 1).index_select(0, batch.predictors)
    return hidden


def action_logprobs(
    model: Qwen3, batch: MicroBatch, temperature: float, *, has_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return log-prob (and entropy) of a micro-batch's action tokens under ``model``, float32 [A] each."""
    hidden = predicting_states(model, batch)
    result = linear_logprob(
        hidden, model.head_weight, batch.targets, temperature=temperature, return_entropy=has_entropy
    )
    return result if isinstance(result, tuple) else (result, None)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Split parameters for AdamW: matrices decay, norms, biases and embeddings do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = list(model.named_parameters())
    decays = [p for _, p in named if p.dim() >= 2 and id(p) not in embeddings]
    others = [p for _, p in named if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def learning_rate(config: LearnerConfig, step: int) -> float:
    """Return the rate of the optimiser step that turns version ``step`` into ``step + 1`` (linear
    warm-up).
    """
    if step >= config.warmup_steps:
        return config.lr
    return config.lr * (step + 1) / config.warmup_steps


class Accumulated(NamedTuple):
    """What forward and backward over all micro-batches leave behind, on the device.

    Attributes:
        losses: of the micro-batches; their sum is the step's.
        metrics: of the micro-batches, for ``merge_metrics``.
        current: [A] log-probs under the weights being trained, in the order of the step's action tokens.
        objective: what was trained on.
    """

    losses: list[Tensor]
    metrics: list[Tensor]
    current: Tensor
    objective: Objective


class _Update(NamedTuple):
    """One optimiser step in numbers; ``metrics`` and ``gaps`` are vectors of sums."""

    metrics: Tensor
    gaps: list[float]
    loss: float
    grad_norm: float
    lr: float
    num_micro_batches: int
    optimizer_s: float


@dataclass
class Trainer:
    """A model and its optimiser.

    Attributes:
        model: the policy; float32 parameters.
        optimizer: AdamW over the groups of :func:`parameter_groups`.
        learner, loss: configuration.
        temperature: of the sampled distribution.
        reference: the starting model when there is a KL term, else None.
    """

    model: Qwen3
    optimizer: torch.optim.AdamW
    learner: LearnerConfig
    loss: LossConfig
    temperature: float
    reference: Qwen3 | None = None

    @classmethod
    def create(
        cls,
        model: Qwen3,
        learner: LearnerConfig,
        loss: LossConfig,
        temperature: float,
        reference: Qwen3 | None = None,
    ) -> Trainer:
        """Build the optimiser for ``model``; ``reference`` is frozen."""
        optimizer = torch.optim.AdamW(
            parameter_groups(model, learner.weight_decay), lr=learner.lr, betas=learner.betas, fused=True
        )
        if reference is not None:
            reference.requires_grad_(False)
        return cls(model, optimizer, learner, loss, temperature, reference)

    @property
    def max_rectangle_tokens(self) -> int:
        """Token budget of one rectangle: the configured one, on a CPU no more than fits its cache."""
        configured = self.learner.tokens_per_micro_batch
        return configured if self.model.device.type != "cpu" else min(configured, MAX_BUCKET_TOKENS)

    def take_step(self, flat: FlatRows, step: int) -> dict[str, float]:
        """Train on one step's rows.

        Args:
            flat: the whole step.
            step: version step before the update.

        Returns:
            Metrics of the step (finite numbers).

        Raises:
            NumericsError: loss, log-ratio or gradient is not finite; parameters and optimiser are as before
                the optimiser step that failed, which with ``minibatches_per_step`` = 1 is the whole step.
        """
        if flat.num_action_tokens == 0:
            raise WorkError(
                f"step {step}: the batch has no action tokens; the coordinator must not plan empty steps"
            )
        started = time.perf_counter()
        parts = split_lifecycles(flat, self.learner.minibatches_per_step)
        start = None
        try:
            if needs_start(self.loss, len(parts)):
                start = self.logprobs(flat)
            updates = [
                self._update(part, step, None if start is None else start[upload(actions, start.device)])
                for part, actions in parts
            ]
        except KernelInputError as error:
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericsError(f"step {step}: {error}; the step was not applied") from None
        done = time.perf_counter()
        numbers = summarize_metrics(merge_metrics([update.metrics for update in updates]))
        numbers |= gap_metrics([update.gaps for update in updates], numbers)
        optimizer_s = sum(update.optimizer_s for update in updates)
        count = len(updates)
        numbers |= {
            "loss": sum(update.loss for update in updates) / count,
            "grad_norm": sum(update.grad_norm for update in updates) / count,
            "lr": sum(update.lr for update in updates) / count,
            "num_tokens": float(flat.num_tokens),
            "num_micro_batches": float(sum(update.num_micro_batches for update in updates)),
            "num_updates": float(count),
            "forward_backward_s": done - started - optimizer_s,
            "optimizer_s": optimizer_s,
            "train_tokens_per_s": flat.num_tokens / (done - started),
        }
        return numbers

    def _update(self, flat: FlatRows, step: int, start: Tensor | None) -> _Update:
        """Take one optimiser step, or none at all; the host waits for the device once.

        Raises:
            KernelInputError: a value that the loss refuses.
            NumericsError: loss or gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        done = self.accumulate(flat, self._trained_items(flat), start)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.learner.grad_clip)
        metrics = merge_metrics(done.metrics)
        ends = torch.stack([torch.stack(done.losses).sum().double(), norm.double()])
        everything = torch.cat([metrics, ends, gap_sums(done.objective, done.current)])
        raise_faults(self.model.device)  # found on a device while it ran; nothing on a CPU
        host = everything.tolist()
        metrics = torch.tensor(host[: metrics.numel()], dtype=torch.float64)
        summarize_metrics(metrics)  # refuses what only the device has seen
        loss, grad_norm, *gaps = host[metrics.numel() :]
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericsError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; the step was not applied"
            )
        lr = learning_rate(self.learner, step)
        lr *= step_size_factor(token_ess_frac(gaps), self.loss.ess_lr_power)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        computed = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return _Update(metrics, gaps, loss, grad_norm, lr, len(done.losses), time.perf_counter() - computed)

    def _trained_items(self, flat: FlatRows) -> npt.NDArray[np.bool_] | None:
        """Return which items get a gradient, for the packing to put the others last; None for all.

        On the CPU the op looks for chunks without gradient itself, and the order stays as it is.
        """
        has_price = self.loss.kl_coef > 0 or self.loss.log_ratio_coef > 0
        if self.model.device.type == "cpu" or has_price:
            return None
        is_trained: npt.NDArray[np.bool_] = flat.advantages != 0
        return is_trained

    @torch.no_grad()
    def logprobs(self, flat: FlatRows, is_trained: npt.NDArray[np.bool_] | None = None) -> Tensor:
        """Return the log-probs of all action tokens under the weights as they are, [A], on the device.

        Args:
            flat: the rows.
            is_trained: as of :meth:`accumulate`, whose rectangles this pass has too.
        """
        found: Tensor | None = None
        for batch in micro_batches(flat, self.max_rectangle_tokens, self.model.device, is_trained=is_trained):
            if batch.targets.numel() == 0:
                continue
            part, _ = action_logprobs(self.model, batch, self.temperature)
            if found is None:
                found = part.new_zeros(flat.num_action_tokens)
            found.index_copy_(0, batch.actions, part)
        if found is None:
            raise WorkError("there are no action tokens to take log-probs of")
        return found

    def accumulate(
        self,
        flat: FlatRows,
        is_trained: npt.NDArray[np.bool_] | None = None,
        start: Tensor | None = None,
    ) -> Accumulated:
        """Run forward and backward over all micro-batches; gradients add up in the parameters.

        Items that are not trained cost a forward pass, for their metrics. Nothing is read back from a device.

        Args:
            flat: what one optimiser step trains on.
            is_trained: bool [N], items that get a gradient; all do when None.
            start: [A] log-probs under the step's starting weights, where the recipe needs them.
        """
        device = self.model.device
        survey = self.logprobs(flat, is_trained) if needs_survey(self.loss) else None
        objective = make_objective(self.loss, flat, device, survey=survey, proximal=start)
        losses: list[Tensor] = []
        metrics: list[Tensor] = []
        current: Tensor | None = None
        for batch in micro_batches(flat, self.max_rectangle_tokens, device, is_trained=is_trained):
            if batch.targets.numel() == 0:
                continue
            reference = None
            if self.reference is not None:
                with torch.no_grad():
                    reference, _ = action_logprobs(self.reference, batch, self.temperature)
            head = self.model.head_weight
            with torch.set_grad_enabled(batch.num_trained > 0):
                hidden = predicting_states(self.model, batch)
            loss, numbers, logprobs = linear_segment_loss(
                hidden,
                head if batch.num_trained > 0 else head.detach(),
                batch.targets,
                temperature=self.temperature,
                reference_logprobs=reference,
                has_entropy=True,
                options=objective.options,
                num_trained=batch.num_trained,
                **objective.of(batch),
            )
            if batch.num_trained > 0:
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            metrics.append(numbers)
            if current is None:
                current = logprobs.new_zeros(flat.num_action_tokens)
            current.index_copy_(0, batch.actions, logprobs)
        if current is None:
            raise WorkError("there are no action tokens to train on")
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:  # no item has an advantage
                parameter.grad = torch.zeros_like(parameter)
        return Accumulated(losses, metrics, current, objective)
