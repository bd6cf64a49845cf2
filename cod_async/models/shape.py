"""The shape of a model, read from a ``config.json`` alone: how many parameters, how many bytes.

A shape directory holds the ``config.json`` of a Hugging Face model and nothing else, so a training run can be
planned and checked on a machine that does not have the weights. Four families are counted: ``qwen3``,
``qwen2`` (Qwen2 and Qwen2.5) and ``llama``, with full attention in every layer, and ``qwen3_5`` (Qwen3.5 and
Qwen3.6: three gated delta layers to one of full attention), of which the language model is counted. Other
models may be trained too (:mod:`cod_async.models.supported`), but not planned. Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from cod_async.errors import InputError
from cod_async.models.supported import NATIVE_ARCHITECTURE, not_plain_qwen3, text_values, unsupported

CONFIG_FILE = "config.json"
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
_LINEAR = (
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
)
_HYBRID_TYPES = ("qwen3_5", "qwen3_5_text")
_FAMILIES = ("qwen3", "qwen2", "llama", *_HYBRID_TYPES)
DENSE_LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of every family."""
_HYBRID_LINEARS = ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a", "out_proj")


class _ShapeError(InputError):
    """Sizes are missing or wrong; the problems do not name the file yet."""


class ModelShape(msgspec.Struct, frozen=True, kw_only=True):
    """What a model directory says about the size of its language model.

    Attributes:
        model_type: family: ``qwen3``, ``qwen2``, ``llama`` or ``qwen3_5``.
        sizes: the fields of ``config.json`` that count, by their Hugging Face names; ``head_dim`` also where
            the file leaves it to ``hidden_size / num_attention_heads``, and ``num_full_attention_layers`` of
            a hybrid model.
        is_tied: whether the output head is the embedding matrix.
        has_attention_bias: whether the four projections of attention have a bias; those of ``qwen2`` always
            do, but for the last.
        has_mlp_bias: whether the three projections of the MLP have one.
        obstacles: what keeps this version from training the model; empty for nearly all.
        is_plain: whether the embedded engine can generate with the model.
    """

    model_type: str
    sizes: dict[str, int]
    is_tied: bool
    has_attention_bias: bool = False
    has_mlp_bias: bool = False
    obstacles: tuple[str, ...] = ()
    is_plain: bool = False

    @classmethod
    def of(cls, raw: Mapping[str, Any]) -> ModelShape:
        """Read the shape from the contents of a ``config.json``.

        Raises:
            InputError: as :func:`read_shape`, without the name of a file.
        """
        model_type = raw.get("model_type")
        if not isinstance(model_type, str) or model_type not in _FAMILIES:
            known = ", ".join(name for name in _FAMILIES if name != "qwen3_5_text")
            raise _ShapeError(f'model_type "{model_type}" is unknown here; known are {known}')
        is_hybrid = model_type in _HYBRID_TYPES
        sizes, problems = _sizes(raw, model_type)
        flags, wrong_flags = _flags(raw)
        if problems or wrong_flags:
            raise _ShapeError([*problems, *wrong_flags])
        return cls(
            model_type="qwen3_5" if is_hybrid else model_type,
            sizes=sizes,
            is_tied=flags["tie_word_embeddings"],
            has_attention_bias=flags["attention_bias"] and model_type != "qwen2",
            has_mlp_bias=flags["mlp_bias"] and model_type == "llama",
            obstacles=tuple(unsupported(raw)),
            is_plain=is_plain_qwen3(raw),
        )

    @property
    def is_trainable(self) -> bool:
        """Whether this version trains the model."""
        return not self.obstacles

    @property
    def is_recurrent(self) -> bool:
        """Whether some layers carry a state from token to token; such a model takes rectangles only."""
        return self.num_linear_attention_layers > 0

    @property
    def linear_layers(self) -> tuple[str, ...]:
        """Names of the linear layers that can get an adapter."""
        return (*DENSE_LINEARS, *(_HYBRID_LINEARS if self.is_recurrent else ()))

    @property
    def max_position_embeddings(self) -> int:
        """Longest row the model claims to handle, in tokens."""
        return self.sizes["max_position_embeddings"]

    @property
    def num_parameters(self) -> int:
        """Parameters of the language model; a tied head counts once, vision and draft heads not at all."""
        size = self.sizes
        hidden, inner = size["hidden_size"], size["intermediate_size"]
        every_layer = 3 * hidden * inner + 2 * hidden  # gated MLP, two norms
        every_layer += (2 * inner + hidden) if self.has_mlp_bias else 0
        embeddings = size["vocab_size"] * hidden * (1 if self.is_tied else 2)
        num_linear = self.num_linear_attention_layers
        return (
            embeddings
            + size["num_hidden_layers"] * every_layer
            + self.num_full_attention_layers * self._full_attention()
            + (num_linear * self._linear_attention() if num_linear else 0)
            + hidden  # the final norm
        )

    @property
    def num_full_attention_layers(self) -> int:
        """Layers in which every token looks at all before it."""
        return self.sizes.get("num_full_attention_layers", self.sizes["num_hidden_layers"])

    @property
    def num_linear_attention_layers(self) -> int:
        """Gated delta layers."""
        return self.sizes["num_hidden_layers"] - self.num_full_attention_layers

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
        mine, theirs = self._fields(), other._fields()
        return [
            f"{name}: {mine.get(name)}, not {theirs.get(name)}"
            for name in dict.fromkeys((*mine, *theirs))
            if mine.get(name) != theirs.get(name) and name != "max_position_embeddings"
        ]

    def _fields(self) -> dict[str, object]:
        return {
            "model_type": self.model_type,
            "tie_word_embeddings": self.is_tied,
            "attention_bias": self.has_attention_bias,
            "mlp_bias": self.has_mlp_bias,
            **self.sizes,
        }

    def _full_attention(self) -> int:
        size = self.sizes
        hidden, head_dim = size["hidden_size"], size["head_dim"]
        queries = size["num_attention_heads"] * head_dim
        keys = size["num_key_value_heads"] * head_dim
        is_gated = self.model_type == "qwen3_5"  # the gate on attention's output is made with the queries
        inputs = queries * (2 if is_gated else 1) + 2 * keys
        num_bias = 0
        if self.model_type == "qwen2":
            num_bias = inputs
        elif self.has_attention_bias:
            num_bias = inputs + hidden
        num_norms = 2 * head_dim if self.model_type in ("qwen3", "qwen3_5") else 0
        return hidden * inputs + queries * hidden + num_bias + num_norms

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
    try:
        return ModelShape.of(read_config(folder))
    except _ShapeError as error:
        raise InputError([f"{folder / CONFIG_FILE}: {problem}" for problem in error.problems]) from None


def is_plain_qwen3(raw: Mapping[str, Any]) -> bool:
    """Whether the plain-torch Qwen3, and with it the embedded engine, computes a model."""
    named = raw.get("architectures")
    if not named and raw.get("model_type") == "qwen3":
        raw = {**raw, "architectures": [NATIVE_ARCHITECTURE]}  # a shape may leave it out
    return not not_plain_qwen3(raw)


def read_config(folder: Path) -> dict[str, Any]:
    """Read ``folder/config.json``.

    Raises:
        InputError: it is missing, larger than 1 MiB, or no JSON object.
    """
    return _read(folder / CONFIG_FILE)


def _sizes(raw: Mapping[str, Any], model_type: str) -> tuple[dict[str, int], list[str]]:
    """Return the sizes that count, and what is wrong with them."""
    values, is_hybrid = text_values(raw), model_type in _HYBRID_TYPES
    sizes: dict[str, int] = {}
    problems = []
    for name in (*_DENSE, *(_LINEAR if is_hybrid else ())):
        value = values.get(name)
        if value is None and name == "head_dim" and model_type in ("qwen2", "llama"):
            value = _head_dim(values)
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= _MAX_SIZE:
            problems.append(f"{name} is {value!r}; it must be a positive integer")
        else:
            sizes[name] = value
    if is_hybrid and "num_hidden_layers" in sizes:
        num_full = _num_full(values, sizes["num_hidden_layers"])
        if num_full is None:
            problems.append("neither layer_types nor full_attention_interval says which layers are which")
        else:
            sizes["num_full_attention_layers"] = num_full
    return sizes, problems


def _flags(raw: Mapping[str, Any]) -> tuple[dict[str, bool], list[str]]:
    """Return the yes-or-no fields that count, and what is wrong with them."""
    values = text_values(raw)
    flags, problems = {}, []
    for name in ("tie_word_embeddings", "attention_bias", "mlp_bias"):
        flag = values.get(name, raw.get(name, False) if name == "tie_word_embeddings" else False)
        if not isinstance(flag, bool):
            problems.append(f"{name} is {flag!r}; it must be true or false")
        flags[name] = bool(flag)
    return flags, problems


def _head_dim(values: Mapping[str, Any]) -> object:
    """Return the width of a head where the file does not say it."""
    hidden, heads = values.get("hidden_size"), values.get("num_attention_heads")
    if isinstance(hidden, int) and isinstance(heads, int) and heads > 0 and hidden % heads == 0:
        return hidden // heads
    return None


def _num_full(values: Mapping[str, Any], num_layers: int) -> int | None:
    """Return how many layers of a hybrid model have full attention, None if the file does not say."""
    kinds = values.get("layer_types")
    if isinstance(kinds, list) and len(kinds) == num_layers:
        return len([kind for kind in kinds if kind == "full_attention"])
    interval: object = values.get("full_attention_interval")
    if isinstance(interval, int) and not isinstance(interval, bool) and interval >= 1:
        return num_layers // interval
    return None


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
