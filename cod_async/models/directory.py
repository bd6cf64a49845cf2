"""Qwen3 model directories, in and out, and tensors that are brought to a Qwen3 model as it stands.

A model directory is ``config.json`` and ``model.safetensors`` (or shards with an index), plus whatever the
tokenizer put beside them. Loading is strict (:mod:`cod_async.models.loading`): every tensor of the
architecture must be there with its shape, nothing else may be, and all problems are listed at once. Nothing
is ever unpickled. Saving writes every file under a temporary name, flushes it to disk and renames it, so a
crash leaves the old file or the new one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from cod_async.durable import write_atomic
from cod_async.errors import InputError
from cod_async.models.export import weights_of
from cod_async.models.loading import fill_policy
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.stored import (
    CONFIG_FILE,
    INDEX_FILE,
    WEIGHTS_FILE,
    StoredWeights,
    raise_problems,
    read_json,
)
from cod_async.models.supported import NATIVE_ARCHITECTURE, not_plain_qwen3

__all__ = [
    "ARCHITECTURE",
    "CONFIG_FILE",
    "GENERATION_FILE",
    "INDEX_FILE",
    "WEIGHTS_FILE",
    "build_qwen3",
    "check_weights",
    "config_from_dir",
    "config_to_json",
    "load_model",
    "save_model",
    "set_weights",
    "weights_of",
]

ARCHITECTURE = NATIVE_ARCHITECTURE
"""The one architecture this module knows, as ``config.json`` spells it."""

GENERATION_FILE = "generation_config.json"

_REQUIRED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
)
_DTYPES = {
    torch.float32: "float32",
    torch.float64: "float64",
    torch.bfloat16: "bfloat16",
    torch.float16: "float16",
}
_HEAD = "lm_head.weight"
_EMBEDDING = "model.embed_tokens.weight"


def save_model(path: Path, model: Qwen3) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``generation_config.json``; other files are left
    alone.

    Args:
        path: model directory, made if missing.
        model: weights are written in their own dtype; a tied head is stored once, as the embedding.

    Raises:
        InputError: the directory cannot be written.
    """
    config = config_to_json(model.config, model.dtype)
    generation = {
        key: value
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if (value := getattr(model.config, key)) is not None
    }
    tensors = {name: tensor.contiguous().cpu() for name, tensor in weights_of(model).items()}
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        write_atomic(path / CONFIG_FILE, _json_bytes(config))
        write_atomic(path / GENERATION_FILE, _json_bytes(generation))
    except OSError as error:
        raise InputError(
            f"cannot write the model directory {path}: {error}; choose a writable folder"
        ) from error


def load_model(path: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu") -> Qwen3:
    """Load a model directory strictly.

    Args:
        path: directory with ``config.json`` and safetensors weights (one file, or shards with an index).
        dtype: type of the loaded parameters; stored values are converted.
        device: where the parameters go.

    Returns:
        The model, in evaluation mode, gradients enabled.

    Raises:
        InputError: a file is missing or damaged, the architecture is not supported, or tensors are missing,
            unknown or of the wrong shape; all problems that can be seen are listed.
    """
    model = build_qwen3(path)
    fill_policy(model, StoredWeights(path), dtype=dtype, device=torch.device(device))
    return model.eval()


def build_qwen3(path: Path) -> Qwen3:
    """Build the model of ``path/config.json`` without weights, on the meta device.

    Raises:
        InputError: as :func:`config_from_dir`.
    """
    config = config_from_dir(path)
    with torch.device("meta"):
        return Qwen3(config)


def check_weights(config: Qwen3Config, tensors: Mapping[str, Tensor]) -> list[str]:
    """Compare tensors with what the architecture needs.

    Returns:
        One sentence per problem (missing, unknown, wrong shape, not floating point); empty if all is well.
        With a tied head, a stored ``lm_head.weight`` is accepted only if it equals the embedding.
    """
    with torch.device("meta"):
        expected = {name: tuple(tensor.shape) for name, tensor in Qwen3(config).state_dict().items()}
    if config.tie_word_embeddings:
        del expected[_HEAD]
    problems = [f"tensor {name} is missing" for name in expected if name not in tensors]
    for name, tensor in tensors.items():
        if name == _HEAD and config.tie_word_embeddings:
            if _EMBEDDING in tensors and not torch.equal(tensor, tensors[_EMBEDDING]):
                problems.append(
                    f"tensor {_HEAD} differs from {_EMBEDDING} although tie_word_embeddings is true"
                )
        elif name not in expected:
            problems.append(f"tensor {name} is unknown")
        elif tuple(tensor.shape) != expected[name]:
            problems.append(f"tensor {name} has shape {list(tensor.shape)}, needs {list(expected[name])}")
        elif not tensor.is_floating_point():
            problems.append(f"tensor {name} has dtype {tensor.dtype}, needs a floating-point type")
    return problems


@torch.no_grad()
def set_weights(model: Qwen3, tensors: Mapping[str, Tensor], *, source: str) -> None:
    """Copy tensors into the model's parameters, strictly; on any problem nothing is changed.

    Raises:
        InputError: all problems, each naming ``source`` and the tensor.
    """
    raise_problems(source, check_weights(model.config, tensors))
    for name, parameter in weights_of(model).items():
        parameter.copy_(tensors[name])


def config_to_json(config: Qwen3Config, dtype: torch.dtype) -> dict[str, Any]:
    """Return the ``config.json`` that transformers reads, in both its current and its older spelling."""
    values: dict[str, Any] = {
        "architectures": [ARCHITECTURE],
        "model_type": "qwen3",
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "use_sliding_window": False,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "dtype": _DTYPES[dtype],
    }
    for name in (*_REQUIRED, "rms_norm_eps", "max_position_embeddings", "tie_word_embeddings"):
        values[name] = getattr(config, name)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[name] = getattr(config, name)
    return values


def config_from_dir(path: Path) -> Qwen3Config:
    """Read and check ``config.json``.

    Raises:
        InputError: the file is missing or not JSON, the architecture is not Qwen3ForCausalLM (it is named),
            or it uses a variant that is not implemented (attention bias, sliding window, scaled rotary,
            another activation).
    """
    raw = read_json(path / CONFIG_FILE)
    where = path / CONFIG_FILE
    problems = not_plain_qwen3(raw)
    if raw.get("architectures") != [ARCHITECTURE]:
        raise InputError(f"{where}: {problems[0]}")
    kwargs: dict[str, Any] = {}
    for name in (*_REQUIRED, "max_position_embeddings"):
        value = raw.get(name)
        if value is None and name == "max_position_embeddings":
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            problems.append(f"{name} must be a positive integer, is {value!r}")
        kwargs[name] = value
    rope = raw.get("rope_parameters") or {}
    kwargs["rope_theta"] = rope.get("rope_theta", raw.get("rope_theta", 10_000.0))
    kwargs["rms_norm_eps"] = raw.get("rms_norm_eps", 1e-6)
    for name in ("rope_theta", "rms_norm_eps"):
        if (
            not isinstance(kwargs[name], int | float)
            or isinstance(kwargs[name], bool)
            or not kwargs[name] > 0
        ):
            problems.append(f"{name} must be a positive number, is {kwargs[name]!r}")
    kwargs["tie_word_embeddings"] = bool(raw.get("tie_word_embeddings", False))
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        kwargs[name] = raw.get(name)
    if problems:
        raise InputError([f"{where}: {problem}" for problem in problems])
    try:
        return Qwen3Config(**kwargs)
    except ValueError as error:
        raise InputError(f"{where}: {error}") from error


def _json_bytes(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True) + "\n").encode()
