"""The learner that one would write in an afternoon: transformers, one padded row per turn, logits of every
token.

The same weights, the same rows and the same loss as the real trainer: the paper's one-sided clip over the
exact mean of action tokens, AdamW. Rows come in the order in which they were recorded, as many to a batch as
the token budget holds, padded to the longest; log-probs are gathered from ``log_softmax`` over full logits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.learner.packing import FlatRows
from cod_async.learner.step import parameter_groups
from cod_async.models.directory import save_model
from cod_async.models.qwen3 import Qwen3


@dataclass(frozen=True)
class PaddedRows:
    """A batch of rows, padded on the right; all but the ids are of the tokens that follow each position.

    Attributes:
        ids: int64 [B, T].
        seen: int64 [B, T], 1 where a token stands.
        is_action: bool [B, T-1].
        behavior: float32 [B, T-1].
        advantages: float32 [B, T-1].
    """

    ids: Tensor
    seen: Tensor
    is_action: Tensor
    behavior: Tensor
    advantages: Tensor


def padded_rows(flat: FlatRows, max_tokens: int) -> list[PaddedRows]:
    """Cut a step's rows, in their order, into padded batches of at most ``max_tokens`` tokens."""
    batches: list[list[int]] = [[]]
    for row in range(flat.num_rows):
        rows = [*batches[-1], row]
        if batches[-1] and len(rows) * int(flat.lengths[rows].max()) > max_tokens:
            batches.append([row])
        else:
            batches[-1] = rows
    return [_padded(flat, rows) for rows in batches]


def _padded(flat: FlatRows, rows: Sequence[int]) -> PaddedRows:
    width = int(flat.lengths[list(rows)].max())
    ids = torch.zeros(len(rows), width, dtype=torch.int64)
    seen = torch.zeros_like(ids)
    is_action = torch.zeros(len(rows), width, dtype=torch.bool)
    behavior, advantages = torch.zeros(len(rows), width), torch.zeros(len(rows), width)
    for line, row in enumerate(rows):
        start, length = int(flat.starts[row]), int(flat.lengths[row])
        ids[line, :length] = torch.from_numpy(flat.tokens[start : start + length])
        seen[line, :length] = 1
        own = flat.action_rows == row
        places = torch.from_numpy(flat.action_offsets[own])
        is_action[line, places] = True
        behavior[line, places] = torch.from_numpy(flat.behavior_logprobs[own])
        advantages[line, places] = torch.from_numpy(flat.advantages[flat.action_items[own]]).float()
    return PaddedRows(ids, seen, is_action[:, 1:], behavior[:, 1:], advantages[:, 1:])


class PlainLearner:
    """The plain loop around a copy of a policy's weights."""

    def __init__(self, policy: Qwen3, learner: LearnerConfig, loss: LossConfig) -> None:
        with tempfile.TemporaryDirectory() as folder:
            save_model(Path(folder), policy)
            self.model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="sdpa"
            )
        self.loss = loss
        self.learner = learner
        self.optimizer = torch.optim.AdamW(
            parameter_groups(self.model, learner.weight_decay), lr=learner.lr, betas=learner.betas, fused=True
        )

    def accumulate(self, batches: Sequence[PaddedRows]) -> float:
        """Run forward and backward over all batches and return the loss."""
        num_actions = sum(int(batch.is_action.sum()) for batch in batches)
        total = 0.0
        for batch in batches:
            out = self.model(input_ids=batch.ids, attention_mask=batch.seen, use_cache=False)
            logprobs = torch.log_softmax(out.logits[:, :-1].float(), dim=-1)
            own = logprobs.gather(-1, batch.ids[:, 1:, None]).squeeze(-1)
            ratio = (own.detach() - batch.behavior).exp()
            is_kept = torch.where(
                batch.advantages >= 0, ratio <= 1 + self.loss.eps_high, ratio >= 1 - self.loss.eps_low
            )
            loss = -(own * batch.advantages * (is_kept & batch.is_action)).sum() / num_actions
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total

    def take_step(self, batches: Sequence[PaddedRows]) -> float:
        """Take one optimizer step and return the loss before it."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = self.accumulate(batches)
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), self.learner.grad_clip)
        self.optimizer.step()
        return loss
