"""What the learner asks of a model, whatever class computes it.

Two classes answer: :class:`cod_async.models.qwen3.Qwen3`, written out in plain torch, and
:class:`cod_async.models.hugging_face.HuggingFacePolicy`, any causal language model of transformers. Both stop
at the last hidden states, both take the attention of :mod:`cod_async.models.attention`.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor, nn

from cod_async.models.layout import RECTANGLE, Layout


class Policy(nn.Module):
    """A causal language model up to its last hidden states.

    Attributes:
        is_recurrent: some layers carry a state from token to token (gated delta layers and the like); such a
            model takes rectangles only.
        adapter_id: name of the trained adapter, empty when all parameters are trained.
    """

    is_recurrent: bool = False
    adapter_id: str = ""

    @property
    def head_weight(self) -> Tensor:
        """The output head, [vocab_size, hidden_size]: ``logits = hidden @ head_weight.T``."""
        raise NotImplementedError

    @property
    def blocks(self) -> list[nn.Module]:
        """The layers, in order: the units of sharding and of recomputation."""
        raise NotImplementedError

    @property
    def device(self) -> torch.device:
        """Where the parameters live."""
        return self.head_weight.device

    @property
    def dtype(self) -> torch.dtype:
        """Type of the parameters."""
        return self.head_weight.dtype

    def forward(self, input_ids: Tensor, layout: Layout = RECTANGLE) -> Tensor:
        """Return the hidden states after the final norm.

        Args:
            input_ids: int64 [B, T]; in a rectangle short rows are padded on the right with any valid id.
            layout: how rows lie.

        Returns:
            [B, T, hidden_size]; what stands at padded positions is meaningless.
        """
        raise NotImplementedError


class Attend(Protocol):
    """The one signature of attention: see :func:`cod_async.models.attention.attend`."""

    def __call__(self, query: Tensor, key: Tensor, value: Tensor, layout: Layout, *, scale: float) -> Tensor:
        """Return [B, T, Hq, D] for query [B, Hq, T, D], key and value [B, Hkv, T, D]."""
        ...
