"""Forward, loss and backward over the micro-batches of a step, on one rank or on many.

Only the hidden states that predict action tokens go through the output head, and tokens of segments without
advantage go through it once, in the forward direction. Gradients of micro-batches, and of ranks, add up to
the gradient of the exact global mean, because every segment's weight comes from the whole of what an
optimizer step trains on. Log-probs of a whole step are made whole on every rank, so what is decided from them
(masks, weights of segments, bounds) is decided alike everywhere.

A rank that meets a value that the loss refuses must not leave the others waiting in a collective: it goes on
taking its turns, without gradients, and all ranks leave together at the end of the pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cod_async.config.schema import LossConfig
from cod_async.errors import WorkError
from cod_async.learner.fitting import Memory, naming_exhausted_memory
from cod_async.learner.objective import Objective, make_objective, needs_survey
from cod_async.learner.parallel.local import whole
from cod_async.learner.parallel.shard import Plain
from cod_async.learner.parallel.turns import Sharing, Turn
from cod_async.learner.rows.batches import MicroBatch
from cod_async.learner.rows.flat import FlatRows
from cod_async.learner.timeline import Span, Timeline
from cod_async.models.policy import Policy
from cod_kernels import KernelInputError, linear_logprob, linear_segment_loss


def predicting_states(model: Policy, batch: MicroBatch) -> Tensor:
    """Return the hidden states that predict a micro-batch's action tokens, [A, H]."""
    hidden: Tensor = model(batch.input_ids, batch.layout).flatten(0, 1).index_select(0, batch.predictors)
    return hidden


def action_logprobs(
    model: Policy, batch: MicroBatch, temperature: float, *, has_entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Return log-prob (and entropy) of a micro-batch's action tokens under ``model``, float32 [A] each.

    Of a sharded model all ranks must ask for the same micro-batches.
    """
    hidden = predicting_states(model, batch)
    head = whole(model.head_weight).to(hidden.dtype)
    result = linear_logprob(hidden, head, batch.targets, temperature=temperature, return_entropy=has_entropy)
    return result if isinstance(result, tuple) else (result, None)


class Accumulated(NamedTuple):
    """What forward and backward over all micro-batches leave behind, on the device.

    Attributes:
        losses: of this rank's micro-batches; the sum over all ranks is the step's.
        metrics: of this rank's micro-batches, for ``merge_metrics``.
        current: [A] log-probs under the weights being trained, in the order of the step's action tokens.
        objective: what was trained on.
        num_turns: forward passes of each rank.
    """

    losses: list[Tensor]
    metrics: list[Tensor]
    current: Tensor
    objective: Objective
    num_turns: int


@dataclass
class Passes:
    """Everything that a pass over the rows of a step needs.

    Attributes:
        compute: the policy.
        reference: the starting policy where there is a KL term, else None.
        sharing: layout and ranks.
        loss: the recipe.
        temperature: of the sampled distribution.
        timeline: where the time goes.
        memory: what is said when the device runs out of it.
    """

    compute: Plain
    reference: Plain | None
    sharing: Sharing
    loss: LossConfig
    temperature: float
    timeline: Timeline
    memory: Memory = field(default_factory=Memory, init=False)
    _problem: str | None = field(default=None, init=False)

    @property
    def device(self) -> torch.device:
        """Where the policy is computed."""
        return self.compute.policy.device

    def logprobs(self, flat: FlatRows, is_trained: npt.NDArray[np.bool_] | None = None) -> Tensor:
        """Return the log-probs of all action tokens under the weights as they are, [A], on the device.

        Args:
            flat: the rows.
            is_trained: as of :meth:`accumulate`, whose micro-batches this pass has too.

        Raises:
            KernelInputError: on a CPU, a log-prob on some rank is not finite.
        """
        with naming_exhausted_memory(self.memory), torch.no_grad(), self.timeline.span("survey"):
            found = self._vector(flat)
            for turn in self.sharing.turns(flat, self.device, is_trained):
                part = self._logprobs_of(self.compute, turn.batch)
                if part is not None:
                    found.index_copy_(0, turn.batch.actions, part)
        self._leave_together()
        return self.sharing.world.add_up(found)

    def accumulate(
        self,
        flat: FlatRows,
        is_trained: npt.NDArray[np.bool_] | None = None,
        start: Tensor | None = None,
    ) -> Accumulated:
        """Run forward and backward over all micro-batches; gradients add up in the parameters.

        Items that are not trained cost a forward pass, for their metrics. Nothing is read back from a device.

        Args:
            flat: what one optimizer step trains on.
            is_trained: bool [N], items that get a gradient; all do when None.
            start: [A] log-probs under the step's starting weights, where the recipe needs them.

        Raises:
            KernelInputError: a value on some rank that the loss refuses; the gradients are of no use.
        """
        survey = self.logprobs(flat, is_trained) if needs_survey(self.loss) else None
        objective = make_objective(self.loss, flat, self.device, survey=survey, proximal=start)
        losses: list[Tensor] = []
        metrics: list[Tensor] = []
        current = self._vector(flat)
        num_turns = 0
        for turn in self.sharing.turns(flat, self.device, is_trained):
            with naming_exhausted_memory(self.memory):
                done = self._turn(turn, objective, num_turns)
            num_turns += 1
            if done is not None:
                loss, numbers, logprobs = done
                losses.append(loss)
                metrics.append(numbers)
                current.index_copy_(0, turn.batch.actions, logprobs)
        if not num_turns:
            raise WorkError("there are no action tokens to train on")
        self.compute.settle()
        for parameter in self.compute.policy.parameters():
            if parameter.requires_grad and parameter.grad is None:  # no item has an advantage
                parameter.grad = torch.zeros_like(parameter)
        self._leave_together()
        return Accumulated(losses, metrics, self.sharing.world.add_up(current), objective, num_turns)

    def _turn(self, turn: Turn, objective: Objective, number: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """Compute one turn; return loss, metrics and log-probs of its action tokens, None without any."""
        self.memory.num_tokens = turn.batch.input_ids.numel()
        batch, head = turn.batch, self.compute.head()
        reference = objective.teacher_of(batch)
        if self.reference is not None:
            with torch.no_grad(), self.timeline.span("survey", micro_batch=number):
                reference = self._logprobs_of(self.reference, batch)
        with (
            torch.set_grad_enabled(turn.has_gradient),
            self.timeline.span("forward", micro_batch=number, num_tokens=batch.num_tokens),
        ):
            hidden = self.compute.hidden(batch.input_ids, batch.layout)
        is_trained = turn.has_gradient and batch.num_trained > 0
        loss, done = None, None
        if batch.targets.numel() and self._problem is None:
            with self._head_span(batch, number), self._noting():
                states = hidden if is_trained else hidden.detach()
                loss, numbers, logprobs = linear_segment_loss(
                    states.flatten(0, 1).index_select(0, batch.predictors),
                    head if is_trained else head.detach(),
                    batch.targets,
                    temperature=self.temperature,
                    reference_logprobs=reference,
                    has_entropy=True,
                    options=objective.options,
                    num_trained=batch.num_trained,
                    **objective.of(batch),
                )
                done = loss.detach(), numbers, logprobs
        if turn.has_gradient:
            with self.timeline.span("backward", micro_batch=number, num_tokens=batch.num_tokens):
                if loss is not None and is_trained:
                    loss.backward()  # type: ignore[no-untyped-call]
                else:  # nothing of its own to add, but others wait for its part of theirs
                    hidden.backward(torch.zeros_like(hidden))  # type: ignore[no-untyped-call]
        return done

    def _logprobs_of(self, compute: Plain, batch: MicroBatch) -> Tensor | None:
        """Return the log-probs of a micro-batch's action tokens, None if there are none."""
        self.memory.num_tokens = batch.input_ids.numel()
        hidden, head = compute.hidden(batch.input_ids, batch.layout), compute.head()
        if not batch.targets.numel() or self._problem is not None:
            return None
        found = None
        with self._noting():
            result = linear_logprob(
                hidden.flatten(0, 1).index_select(0, batch.predictors),
                head.detach(),
                batch.targets,
                temperature=self.temperature,
            )
            found = result if isinstance(result, Tensor) else result[0]
        return found

    def _head_span(self, batch: MicroBatch, number: int) -> Span:
        return self.timeline.span("head_loss", micro_batch=number, num_tokens=batch.targets.numel())

    def _vector(self, flat: FlatRows) -> Tensor:
        """Return zeros for the log-probs of all action tokens, in the type that they are computed in."""
        is_wide = self.compute.policy.dtype == torch.float64
        dtype = torch.float64 if is_wide else torch.float32
        return torch.zeros(flat.num_action_tokens, dtype=dtype, device=self.device)

    @contextmanager
    def _noting(self) -> Iterator[None]:
        """Keep a refusal for later if other ranks would wait for this one."""
        try:
            yield
        except KernelInputError as error:
            if self.sharing.world.size == 1:
                raise
            self._problem = str(error)

    def _leave_together(self) -> None:
        """Raise on every rank if any rank met a value that the loss refuses."""
        problem, self._problem = self.sharing.world.first_problem(self._problem), None
        if problem is not None:
            raise KernelInputError(problem)
