"""What each token was to the step that trained on it.

The loss returns totals. A recorder looks once more, just before each optimizer step applies its gradients:
one forward pass gives log-probs and entropies under the very weights, and the loss's own formulas say what it
did with every token. That makes a step about a third longer, so it is an option
(``learner.has_token_records``); a replay always does it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from cod_async.config.schema import Config
from cod_async.learner.objective import Objective, make_objective, needs_start, needs_survey
from cod_async.learner.packing import FlatRows, MicroBatch, split_lifecycles, upload
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version
from cod_async.store.token_records import (
    FIELDS,
    STATES,
    prune_token_records,
    records_file,
    write_token_records,
)
from cod_async.wire.messages import TrainItem
from cod_kernels import KernelInputError, LossOptions, linear_logprob
from cod_kernels.segment_loss.op import loss_inputs
from cod_kernels.segment_loss.states import TokenStates, token_states

Tokens = dict[str, npt.NDArray[Any]]


class Looked(NamedTuple):
    """One forward pass over the action tokens, [A] each.

    Attributes:
        logprobs, entropy: under the weights as they are.
        reference: what the loss pulls towards (starting model or teacher), or None.
        micro_batch: number of the micro-batch.
    """

    logprobs: Tensor
    entropy: Tensor
    reference: Tensor | None
    micro_batch: Tensor


@torch.no_grad()
def look(trainer: Trainer, flat: FlatRows) -> Looked:
    """Compute log-prob and entropy of every action token, in the micro-batches that a step has.

    A micro-batch that has none because something in it is not finite gets NaN for all of its tokens. With
    several ranks all of them must call this; each gets everything.
    """
    device, world, passes = trainer.model.device, trainer.world, trainer.passes
    found = torch.zeros(3, flat.num_action_tokens, dtype=torch.float32, device=device)
    numbers = torch.zeros(flat.num_action_tokens, dtype=torch.int64, device=device)
    for number, turn in enumerate(trainer.turns(flat)):
        batch = turn.batch
        for row, compute in ((0, passes.compute), (2, passes.reference)):
            if compute is None:
                continue
            hidden, head = compute.hidden(batch.input_ids, batch.layout), compute.head()
            if not batch.targets.numel():
                continue
            states = hidden.flatten(0, 1).index_select(0, batch.predictors)
            found[row : row + 2, batch.actions] = _logprob_and_entropy(trainer, states, head, batch)[
                : 2 - row // 2
            ]
        numbers[batch.actions] = number
    found, numbers = world.add_up(found), world.add_up(numbers)
    return Looked(found[0], found[1], None if passes.reference is None else found[2], numbers)


def _logprob_and_entropy(trainer: Trainer, states: Tensor, head: Tensor, batch: MicroBatch) -> Tensor:
    """Return both, [2, A]; NaN where the op refuses a value."""
    try:
        result = linear_logprob(
            states, head, batch.targets, temperature=trainer.temperature, return_entropy=True
        )
    except KernelInputError:
        return torch.full((2, batch.targets.numel()), torch.nan, device=states.device)
    return torch.stack(list(result)).float()


def tokens_of(trainer: Trainer, flat: FlatRows, start: Tensor | None) -> Tokens:
    """Return the records of one optimizer step's action tokens, in their order; ``update`` is 0.

    Args:
        trainer: with the weights that the gradients are of.
        flat: what the optimizer step trains on.
        start: [A] log-probs under the weights that the whole step started with, where the recipe needs them.
    """
    looked = look(trainer, flat)
    survey = looked.logprobs if needs_survey(trainer.loss) else None
    objective = make_objective(trainer.loss, flat, trainer.model.device, survey=survey, proximal=start)
    reference = looked.reference if objective.teacher is None else objective.teacher
    states = _states(objective, looked.logprobs, reference, objective.options)
    whole = {
        "logprob": looked.logprobs,
        "behavior_logprob": objective.behavior,
        "ratio": states.ratio,
        "entropy": looked.entropy,
        "gradient": states.gradient,
        "advantage": objective.raw_advantages[objective.segment_ids],
        "state": _named(states, objective),
        "lag": objective.lags,
        "update": torch.zeros_like(looked.micro_batch),
        "micro_batch": looked.micro_batch,
    }
    return {name: whole[name].cpu().numpy().astype(kind) for name, kind in FIELDS.items()}


def _states(
    objective: Objective, logprobs: Tensor, reference: Tensor | None, options: LossOptions
) -> TokenStates:
    tokens = {
        "behavior_logprobs": objective.behavior,
        "proximal_logprobs": objective.proximal,
        "proximal_mix": objective.proximal_mix,
        "reference_logprobs": reference,
        "entropy": None,
    }
    segments = {
        "advantages": objective.advantages,
        "weights": objective.weights,
        "negative_advantages": None,
        "segment_log_ratios": objective.segment_log_ratios,
    }
    inputs = loss_inputs(logprobs, tokens, objective.segment_ids, segments, objective.m2po_bound)
    return token_states(inputs, options)


def _named(states: TokenStates, objective: Objective) -> Tensor:
    """Return the state of each token as its index in ``STATES``; later ones win."""
    ids = objective.segment_ids
    is_masked = torch.zeros_like(states.is_clamped)
    is_outside = states.is_weight_outside
    if objective.is_kept is not None:
        is_masked = ~objective.is_kept[ids]
    if objective.segment_weights is not None:
        is_masked = is_masked | (objective.segment_weights == 0)[ids]
    if objective.is_weight_outside is not None:
        is_outside = is_outside | objective.is_weight_outside[ids]
    found = torch.zeros_like(ids, dtype=torch.uint8)
    for name, mask in (
        ("no_advantage", (objective.raw_advantages == 0)[ids]),
        ("clipped_high", states.is_clipped_high),
        ("clipped_low", states.is_clipped_low),
        ("dual_clipped", states.is_dual_clipped),
        ("segment_masked", is_masked),
        ("weight_outside", is_outside & ~is_masked),
        ("clamped", states.is_clamped),
        ("nonfinite", states.is_nonfinite),
    ):
        found[mask] = STATES.index(name)
    return found


class TokenRecorder:
    """Makes the records of one step after the other, by a hook of the optimizer.

    Args:
        trainer: that takes the steps.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._parts: list[tuple[FlatRows, npt.NDArray[np.int64]]] = []
        self._start: Tensor | None = None
        self._tokens: Tokens = {}
        self._num_updates = 0
        trainer.optimizer.register_step_pre_hook(self._before_step)

    def begin(self, flat: FlatRows) -> None:
        """Get ready for a step on these rows; nothing has been applied yet."""
        trainer = self._trainer
        self._parts = split_lifecycles(flat, trainer.learner.minibatches_per_step)
        self._start = None
        if needs_start(trainer.loss, len(self._parts)):
            try:
                self._start = trainer.logprobs(flat)
            except KernelInputError:  # the step will refuse it, in its own words
                self._start = torch.full((flat.num_action_tokens,), torch.nan, device=trainer.model.device)
        self._tokens = {name: np.zeros(flat.num_action_tokens, kind) for name, kind in FIELDS.items()}
        self._num_updates = 0

    @property
    def has_begun(self) -> bool:
        """Whether there are rows to look at."""
        return bool(self._parts)

    def take(self) -> None:
        """Look at the tokens of the next optimizer step, which may be one that failed."""
        part, actions = self._parts[self._num_updates]
        start = None if self._start is None else self._start[upload(actions, self._start.device)]
        for name, values in tokens_of(self._trainer, part, start).items():
            self._tokens[name][actions] = self._num_updates if name == "update" else values
        self._num_updates += 1

    def found(self) -> Tokens:
        """Return the step's records, the arrays of ``FIELDS``; zeros for optimizer steps that never came."""
        return self._tokens

    def _before_step(self, *_: Any) -> None:
        if self._num_updates < len(self._parts):
            with self._trainer.timeline.span("records"):
                self.take()


def save_records(path: Path, version: Version, items: Sequence[TrainItem], tokens: Tokens) -> None:
    """Write a step's records to a file.

    Args:
        path: the file.
        version: that the step started from.
        items: its batch, sorted by key; segments of pure context have no tokens.
        tokens: the arrays of ``FIELDS``.
    """
    keys = np.array([(one.key.group, one.key.member, one.key.ordinal) for one in items], dtype=np.int64)
    counts = np.array(
        [0 if one.is_context else sum(row.num_action_tokens for row in one.rows) for one in items],
        dtype=np.int64,
    )
    write_token_records(path, version, keys.reshape(-1, 3), counts, tokens)


def keep_records(
    run_dir: Path, config: Config, version: Version, items: Sequence[TrainItem], tokens: Tokens
) -> None:
    """Write a step's records into the run folder and remove old ones above the ceiling."""
    path = records_file(run_dir, version)
    path.parent.mkdir(exist_ok=True)
    save_records(path, version, items, tokens)
    prune_token_records(run_dir, config.learner.max_token_records_bytes)
