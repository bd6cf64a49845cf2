"""One step: forward, loss and backward over all micro-batches, then the optimizer, or nothing at all.

With ``minibatches_per_step`` above 1 an optimizer step trains on a part of the plan. With several ranks each
of them calls :meth:`Trainer.take_step` with the same rows; what it returns is the same on all of them but for
times. A loss or gradient that is not finite, on whatever rank, leaves parameters and optimizer untouched.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cod_async.algo.corrections.step_size import step_size_factor
from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.errors import InputError, NumericsError, WorkError
from cod_async.learner.forward import Accumulated, Passes, action_logprobs, predicting_states
from cod_async.learner.gaps import gap_metrics, gap_sums, token_ess_frac
from cod_async.learner.objective import needs_start
from cod_async.learner.packing import FlatRows, split_lifecycles, upload
from cod_async.learner.parallel.optimizers import make_optimizer, parameter_groups
from cod_async.learner.parallel.shard import Plain, clip_gradients, prepare
from cod_async.learner.parallel.turns import Sharing, Turn
from cod_async.learner.parallel.world import World
from cod_async.learner.rows.plans import choose_layout, row_metrics, token_budget
from cod_async.learner.timeline import Timeline
from cod_async.models.layout import LayoutKind
from cod_async.models.policy import Policy
from cod_kernels import KernelInputError, merge_metrics, raise_faults, summarize_metrics
from cod_kernels.segment_loss.op import METRIC_NAMES
from cod_kernels.segment_loss.reference import NUM_ADDITIVE

__all__ = [
    "Accumulated",
    "Trainer",
    "action_logprobs",
    "learning_rate",
    "parameter_groups",
    "predicting_states",
]


def learning_rate(config: LearnerConfig, step: int) -> float:
    """Return the rate of the optimizer step that turns version ``step`` into ``step + 1`` (linear
    warm-up).
    """
    if step >= config.warmup_steps:
        return config.lr
    return config.lr * (step + 1) / config.warmup_steps


class _Update(NamedTuple):
    """One optimizer step in numbers; ``metrics`` and ``gaps`` are vectors of sums."""

    metrics: Tensor
    gaps: list[float]
    loss: float
    grad_norm: float
    lr: float
    num_micro_batches: int
    optimizer_s: float


@dataclass
class Trainer:
    """A model and its optimizer, on one rank or as one of several.

    Attributes:
        model: the policy; float32 parameters, shards of them with several ranks.
        optimizer: over the groups of :func:`parameter_groups`.
        learner, loss: configuration.
        temperature: of the sampled distribution.
        reference: the starting model when there is a KL term, else None.
        world: the ranks.
        compute: the policy as it is computed with.
        passes: forward, loss and backward over rows.
        timeline: where the seconds of a step go.
    """

    model: Policy
    optimizer: Any
    learner: LearnerConfig
    loss: LossConfig
    temperature: float
    reference: Policy | None
    world: World
    compute: Plain
    passes: Passes
    timeline: Timeline = field(default_factory=Timeline)

    @classmethod
    def create(
        cls,
        model: Policy,
        learner: LearnerConfig,
        loss: LossConfig,
        temperature: float,
        reference: Policy | None = None,
        world: World | None = None,
    ) -> Trainer:
        """Build the optimizer for ``model``; ``reference`` is frozen.

        Args:
            model: the policy, whole and equal on every rank; with several ranks it is sharded here, in place.
            learner: configuration.
            loss: the recipe.
            temperature: of the sampled distribution.
            reference: the starting model, or None.
            world: the ranks; this process alone when None.

        Raises:
            InputError: ranks and the model's layers do not go together.
        """
        world = World.alone(model.device) if world is None else world
        kind = _layout_kind(model, learner, world)
        if reference is not None:
            reference.requires_grad_(False)
        num_heads, num_kv_heads = _heads(model)
        sharing = Sharing(
            world,
            kind,
            token_budget(learner, world.device, kind),
            learner.sequence_mode,
            num_heads,
            num_kv_heads,
        )
        compute = prepare(model, world, learner)
        timeline = Timeline(model.device)
        passes = Passes(
            compute,
            None if reference is None else prepare(reference, world, learner),
            sharing,
            loss,
            temperature,
            timeline,
        )
        optimizer = make_optimizer(model, learner)
        return cls(model, optimizer, learner, loss, temperature, reference, world, compute, passes, timeline)

    @property
    def kind(self) -> LayoutKind:
        """How rows lie in a micro-batch."""
        return self.passes.sharing.kind

    @property
    def max_rectangle_tokens(self) -> int:
        """Token budget of one micro-batch: the configured one, of rectangles on a CPU no more than fits its
        cache.
        """
        return self.passes.sharing.max_tokens

    def take_step(self, flat: FlatRows, step: int) -> dict[str, float]:
        """Train on one step's rows.

        Args:
            flat: the whole step, the same on every rank.
            step: version step before the update.

        Returns:
            Metrics of the step (finite numbers).

        Raises:
            NumericsError: loss, log-ratio or gradient is not finite, on every rank if it is on one;
                parameters and optimizer are as before the optimizer step that failed, which with
                ``minibatches_per_step`` = 1 is the whole step.
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
        sharing = self.passes.sharing
        return numbers | row_metrics(
            flat,
            sharing.max_tokens,
            kind=sharing.kind,
            num_ranks=self.world.data_parallel,
            is_trained=self._trained_items(flat),
            multiple=sharing.multiple,
        )

    def _update(self, flat: FlatRows, step: int, start: Tensor | None) -> _Update:
        """Take one optimizer step, or none at all; the host waits for the device once.

        Raises:
            KernelInputError: a value that the loss refuses.
            NumericsError: loss or gradient is not finite.
        """
        self.optimizer.zero_grad(set_to_none=True)
        done = self.accumulate(flat, self._trained_items(flat), start)
        norm = clip_gradients(self.model.parameters(), self.learner.grad_clip, self.world)
        ends = torch.stack([self._total_loss(done).double(), norm.double()])
        everything = torch.cat([self._all_metrics(done), ends, gap_sums(done.objective, done.current)])
        self._raise_faults()
        host = everything.tolist()
        metrics = torch.tensor(host[: len(METRIC_NAMES)], dtype=torch.float64)
        summarize_metrics(metrics)  # refuses what only the device has seen
        loss, grad_norm, *gaps = host[len(METRIC_NAMES) :]
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
        with self.timeline.span("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.compute.refresh()
        return _Update(metrics, gaps, loss, grad_norm, lr, done.num_turns, time.perf_counter() - computed)

    def _total_loss(self, done: Accumulated) -> Tensor:
        own = torch.stack(done.losses).sum() if done.losses else done.current.new_zeros(())
        return self.world.add_up(own)

    def _all_metrics(self, done: Accumulated) -> Tensor:
        """Return the merged metrics of all ranks, in the order of the ranks."""
        if self.world.size == 1:
            return merge_metrics(done.metrics)
        own = merge_metrics(done.metrics) if done.metrics else _no_metrics(self.model.device)
        return merge_metrics(self.world.collect(own))

    def _raise_faults(self) -> None:
        """Raise what the kernels found while they ran on a device, on every rank; nothing on a CPU.

        Raises:
            KernelInputError: what the first rank with a fault found.
        """
        if self.world.size == 1 or self.model.device.type == "cpu":
            raise_faults(self.model.device)
            return
        problem = None
        try:
            raise_faults(self.model.device)
        except KernelInputError as error:
            problem = str(error)
        problem = self.world.first_problem(problem)
        if problem is not None:
            raise KernelInputError(problem)

    def turns(self, flat: FlatRows) -> Iterator[Turn]:
        """Yield the turns that an optimizer step on these rows has; with several ranks all must ask."""
        return self.passes.sharing.turns(flat, self.model.device, self._trained_items(flat))

    def _trained_items(self, flat: FlatRows) -> npt.NDArray[np.bool_] | None:
        """Return which items get a gradient, for the packing to put the others last; None for all.

        On the CPU the op looks for chunks without gradient itself, and the order stays as it is.
        """
        has_price = self.loss.kl_coef > 0 or self.loss.log_ratio_coef > 0
        if self.model.device.type == "cpu" or has_price:
            return None
        is_trained: npt.NDArray[np.bool_] = flat.advantages != 0
        return is_trained

    def logprobs(self, flat: FlatRows, is_trained: npt.NDArray[np.bool_] | None = None) -> Tensor:
        """Return the log-probs of all action tokens under the weights as they are, [A], on the device; see
        :meth:`.forward.Passes.logprobs`.
        """
        return self.passes.logprobs(flat, is_trained)

    def accumulate(
        self,
        flat: FlatRows,
        is_trained: npt.NDArray[np.bool_] | None = None,
        start: Tensor | None = None,
    ) -> Accumulated:
        """Run forward and backward over all micro-batches; see :meth:`.forward.Passes.accumulate`."""
        return self.passes.accumulate(flat, is_trained, start)


def _no_metrics(device: torch.device) -> Tensor:
    """Return the metrics of no tokens: they change nothing that they are merged with."""
    found = torch.zeros(len(METRIC_NAMES), dtype=torch.float64)
    found[NUM_ADDITIVE] = -torch.inf
    found[NUM_ADDITIVE + 1 :] = torch.inf
    return found.to(device)


def _layout_kind(model: Policy, learner: LearnerConfig, world: World) -> LayoutKind:
    """Return how rows will lie.

    Raises:
        InputError: ranks cannot share the tokens of this model's rows.
    """
    if (world.data_parallel, world.sequence_parallel) != (learner.data_parallel, learner.sequence_parallel):
        raise InputError(
            f"there are {world.data_parallel} x {world.sequence_parallel} ranks, but the configuration has "
            f"learner.data_parallel = {learner.data_parallel} and learner.sequence_parallel = "
            f"{learner.sequence_parallel}; start as many as it says"
        )
    is_recurrent = model.is_recurrent
    if world.sequence_parallel == 1:
        # Not the model's device: of several ranks each loads into host memory, and shards it from there.
        return choose_layout(learner, world.device, is_recurrent=is_recurrent)
    if is_recurrent:
        raise InputError(
            f"learner.sequence_parallel: {world.sequence_parallel} ranks cannot share the rows of this "
            "model, whose recurrent layers carry a state from token to token; use learner.data_parallel"
        )
    return "packed"


def _heads(model: Policy) -> tuple[int, int]:
    """Return query heads and key heads of a policy's attention."""
    config: Any = getattr(model, "config", None)
    if hasattr(config, "get_text_config"):
        config = config.get_text_config()
    num_heads = int(getattr(config, "num_attention_heads", 1))
    return num_heads, int(getattr(config, "num_key_value_heads", None) or num_heads)
