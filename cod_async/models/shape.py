"""The shape of a model, read from a ``config.json`` alone: how many parameters, how many bytes.

A shape directory holds the ``config.json`` of a Hugging Face model and nothing else, so a training run can be
planned and checked on a machine that does not have the weights. Two families are known: ``qwen3`` (dense,
full attention in every layer), which this version trains, and ``qwen3_5`` (Qwen3.5 and Qwen3.6: three linear
attention layers to one of full attention), whose language model is counted and which it does not train yet.
Loads no torch.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec

from cod_async.errors import InputError

CONFIG_FILE = "config.json"
TRAINABLE_TYPES = ("qwen3",)
"""Model types that this version trains and generates with."""
BYTES_PER_PARAMETER = 4
"""Parameters, gradients and each of AdamW's two moments are float32 in this version."""
NUM_MOMENTS = 2
_MAX_FILE_BYTES = 1 << 20
_MAX_SIZE = 1 << 40

_DENSE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)
_HYBRID = (
    *_DENSE,
    "full_attention_interval",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_FIELDS = {"qwen3": _DENSE, "qwen3_5": _HYBRID}


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a model directory says about the size of its language model.

    Attributes:
        model_type: ``qwen3`` or ``qwen3_5``.
        sizes: the fields of ``config.json`` that count, by their Hugging Face names.
        is_tied: whether the output head is the embedding matrix.
    """

    model_type: str
    sizes: dict[str, int]
    is_tied: bool

    @property
    def is_trainable(self) -> bool:
        """Whether this version trains the architecture."""
        return self.model_type in TRAINABLE_TYPES

    @property
    def max_position_embeddings(self) -> int:
        """Longest row the model claims to handle, in tokens."""
        return self.sizes["max_position_embeddings"]

    @property
    def num_parameters(self) -> int:
        """Parameters of the language model; a tied head counts once, vision and draft heads not at all."""
        size = self.sizes
        hidden = size["hidden_size"]
        num_full = self._num_full_attention_layers()
        num_linear = size["num_hidden_layers"] - num_full
        every_layer = 3 * hidden * size["intermediate_size"] + 2 * hidden  # gated MLP, two norms
        embeddings = size["vocab_size"] * hidden * (1 if self.is_tied else 2)
        return (
            embeddings
            + size["num_hidden_layers"] * every_layer
            + num_full * self._full_attention()
            + num_linear * (self._linear_attention() if num_linear else 0)
            + hidden  # the final norm
        )

    @property
    def weights_bytes(self) -> int:
        """Bytes of the parameters as they are trained."""
        return BYTES_PER_PARAMETER * self.num_parameters

    @property
    def optimizer_bytes(self) -> int:
        """Bytes of AdamW's moments."""
        return NUM_MOMENTS * BYTES_PER_PARAMETER * self.num_parameters

    def differences(self, other: ModelShape) -> list[str]:
        """Name the fields in which another shape differs, as ``field: mine, not other``.

        ``max_position_embeddings`` is a claim and no size: releases of one architecture differ in it.
        """
        mine = {"model_type": self.model_type, "tie_word_embeddings": self.is_tied, **self.sizes}
        theirs = {"model_type": other.model_type, "tie_word_embeddings": other.is_tied, **other.sizes}
        return [
            f"{name}: {mine.get(name)}, not {theirs.get(name)}"
            for name in dict.fromkeys((*mine, *theirs))
            if mine.get(name) != theirs.get(name) and name != "max_position_embeddings"
        ]

    def _num_full_attention_layers(self) -> int:
        num_layers = self.sizes["num_hidden_layers"]
        return num_layers // self.sizes.get("full_attention_interval", 1)

    def _full_attention(self) -> int:
        size = self.sizes
        hidden, head_dim = size["hidden_size"], size["head_dim"]
        queries = size["num_attention_heads"] * head_dim
        keys = size["num_key_value_heads"] * head_dim
        gate = hidden * queries if self.model_type == "qwen3_5" else 0  # on the attention's output
        return 2 * hidden * queries + gate + 2 * hidden * keys + 2 * head_dim  # q and o, k and v, two norms

    def _linear_attention(self) -> int:
        """Count a gated DeltaNet layer (arXiv 2412.06464) as Qwen3.5 has it."""
        size = self.sizes
        hidden, num_values = size["hidden_size"], size["linear_num_value_heads"]
        keys = size["linear_num_key_heads"] * size["linear_key_head_dim"]
        values = num_values * size["linear_value_head_dim"]
        mixed = 2 * keys + values
        projections = hidden * (mixed + values + 2 * num_values) + values * hidden  # qkv, z, b and a; out
        convolution = mixed * size["linear_conv_kernel_dim"]
        return projections + convolution + 2 * num_values + size["linear_value_head_dim"]


def read_shape(folder: Path) -> ModelShape:
    """Read the shape from ``folder/config.json``.

    Raises:
        InputError: the file is missing or not JSON, its model type is unknown, or sizes are missing or no
            positive integers; all problems are listed.
    """
    path = folder / CONFIG_FILE
    raw = _read(path)
    model_type = raw.get("model_type")
    if not isinstance(model_type, str) or model_type not in _FIELDS:
        known = ", ".join(_FIELDS)
        raise InputError(f'{path}: model_type "{model_type}" is unknown here; known are {known}')
    nested = raw.get("text_config")
    values = nested if model_type == "qwen3_5" and isinstance(nested, dict) else raw
    sizes: dict[str, int] = {}
    problems = []
    for name in _FIELDS[model_type]:
        value = values.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
            problems.append(f"{path}: {name} is {value!r}; it must be a positive integer")
        else:
            sizes[name] = value
    is_tied = values.get("tie_word_embeddings", False)
    if not isinstance(is_tied, bool):
        problems.append(f"{path}: tie_word_embeddings is {is_tied!r}; it must be true or false")
    if problems:
        raise InputError(problems)
    return ModelShape(model_type=model_type, sizes=sizes, is_tied=bool(is_tied))


def _read(path: Path) -> dict[str, Any]:
    advice = "give a folder with the config.json of a Hugging Face model"
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise InputError(f"{path}: larger than {_MAX_FILE_BYTES} bytes; {advice}")
        raw = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path}: cannot be read, {error}; {advice}") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: expected a JSON object; {advice}")
    return raw
