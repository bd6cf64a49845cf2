"""What an engine is compared with: a plain forward of transformers over the whole row, in float32.

Nothing of this project takes part: no cache, no batching, no sampler. The scores are tempered and normalized
in float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from cod_async.errors import InputError


class Reference(Protocol):
    """Next-token distributions of known weights."""

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        ...

    def logprobs(self, token_ids: Sequence[int], first: int, temperature: float) -> Tensor:
        """Return the distributions that the tokens from index ``first`` on were drawn from.

        Args:
            token_ids: a row of T ids.
            first: 1 .. T; index of the first token asked for.
            temperature: > 0.

        Returns:
            float64 [T - first + 1, vocab_size], natural logs; row i is the distribution of the token at index
            ``first + i``, the last one of the token after the row.
        """
        ...


class TransformersReference:
    """A model directory, run by transformers on the CPU in float32.

    Args:
        model_dir: Hugging Face model directory with safetensors weights.

    Raises:
        InputError: transformers cannot load it.
    """

    def __init__(self, model_dir: Path) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
        try:
            model: Any = AutoModelForCausalLM.from_pretrained(
                str(model_dir), dtype=torch.float32, local_files_only=True, use_safetensors=True
            )
        except Exception as error:  # whatever a damaged directory makes the library raise
            raise InputError(
                f"{model_dir}: transformers cannot load it, {error}; give a complete model directory"
            ) from None
        self._model = model.eval()
        self._vocab_size = int(model.config.vocab_size)

    @property
    def vocab_size(self) -> int:
        """Number of token ids."""
        return self._vocab_size

    @torch.no_grad()
    def logprobs(self, token_ids: Sequence[int], first: int, temperature: float) -> Tensor:
        """Return distributions; see :meth:`Reference.logprobs`."""
        scores = self._model(input_ids=torch.tensor([list(token_ids)])).logits[0, first - 1 :]
        return torch.log_softmax(scores.double() / temperature, dim=-1)


def bytes_needed(model_dir: Path) -> int:
    """Return the memory that the float32 weights of a model directory take, from its files.

    Raises:
        InputError: there are no safetensors files, or they cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    files = sorted(model_dir.glob("*.safetensors"))
    if not files:
        raise InputError(f"{model_dir}: no safetensors files; give a Hugging Face model directory")
    total = 0
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    size = 1
                    for extent in file.get_slice(name).get_shape():
                        size *= extent
                    total += 4 * size
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file, {error}") from error
    return total
