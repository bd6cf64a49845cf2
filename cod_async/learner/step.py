"""One optimiser step: forward, loss and backward per micro-batch, then AdamW, or nothing at all.

Only the hidden states that predict action tokens go through the output head, and tokens of segments without
advantage go through it once, in the forward direction. Gradients of micro-batches add up to the gradient of
the exact global token mean, because every segment's weight is one over the action tokens of the whole step. A
loss or gradient that is not finite leaves parameters and optimiser untouched.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import NumericsError, WorkError
from cod_async.learner.packing import MAX_BUCKET_TOKENS, FlatRows, MicroBatch, micro_batches, upload
from cod_async.models.qwen3 import Qwen3
from cod_kernels import (
    KernelInputError,
    LossOptions,
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
            NumericsError: loss, log-ratio or gradient is not finite; parameters and optimiser are as before.
        """
        if flat.num_action_tokens == 0:
            raise WorkError(
                f"step {step}: the batch has no action tokens; the coordinator must not plan empty steps"
            )
        started = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        try:
            losses, parts = self._accumulate(flat, self._trained_items(flat))
            raise_faults(self.model.device)  # found on a device while it ran; nothing on a CPU
            numbers = summarize_metrics(merge_metrics(parts))  # synchronises with the device, once per step
        except KernelInputError as error:
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericsError(f"step {step}: {error}; the step was not applied") from None
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.learner, step)
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.learner.grad_clip)
        loss, grad_norm = float(torch.stack(losses).sum()), float(norm)
        if not (math.isfinite(loss) and math.isfinite(grad_norm)):
            self.optimizer.zero_grad(set_to_none=True)
            raise NumericsError(
                f"step {step}: loss {loss}, gradient norm {grad_norm}; the step was not applied"
            )
        computed = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        done = time.perf_counter()
        numbers |= {
            "loss": loss,
            "grad_norm": grad_norm,
            "lr": learning_rate(self.learner, step),
            "num_tokens": float(flat.num_tokens),
            "num_micro_batches": float(len(parts)),
            "forward_backward_s": computed - started,
            "optimizer_s": done - computed,
            "train_tokens_per_s": flat.num_tokens / (done - started),
        }
        return numbers

    def _trained_items(self, flat: FlatRows) -> npt.NDArray[np.bool_] | None:
        """Return which items get a gradient, for the packing to put the others last; None for all.

        On the CPU the op looks for chunks without gradient itself, and the order stays as it is.
        """
        if self.model.device.type == "cpu" or self.loss.kl_coef > 0:
            return None
        is_trained: npt.NDArray[np.bool_] = flat.advantages != 0
        return is_trained

    def _accumulate(
        self, flat: FlatRows, is_trained: npt.NDArray[np.bool_] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Run forward and backward over all micro-batches; return their losses and metrics, on the device.

        Items that are not trained cost a forward pass, for their metrics. Nothing is read back from a device.
        """
        device = self.model.device
        advantages = upload(flat.advantages, device).to(torch.float32)
        weights = torch.full_like(advantages, 1.0 / flat.num_action_tokens)
        options = LossOptions(
            clip=self.loss.clip,
            eps_low=self.loss.eps_low,
            eps_high=self.loss.eps_high,
            behavior_weight=self.loss.behavior_weight,
            weight_cap=self.loss.weight_cap,
            kl_coef=self.loss.kl_coef,
        )
        losses: list[Tensor] = []
        parts: list[Tensor] = []
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
            loss, metrics, _ = linear_segment_loss(
                hidden,
                head if batch.num_trained > 0 else head.detach(),
                batch.targets,
                batch.behavior_logprobs,
                batch.segment_ids,
                advantages,
                weights,
                temperature=self.temperature,
                reference_logprobs=reference,
                has_entropy=True,
                options=options,
                num_trained=batch.num_trained,
            )
            if batch.num_trained > 0:
                loss.backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            parts.append(metrics)
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is None:  # no item has an advantage
                parameter.grad = torch.zeros_like(parameter)
        return losses, parts
