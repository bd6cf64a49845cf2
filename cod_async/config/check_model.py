"""What a configuration says about its model: the folder, its files, its shape and its tokenizer.

A folder with weights is needed to train. To plan a run ``model.shape`` is enough, a ``config.json`` without
weights; where both are there, they must agree. Loads no torch.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cod_async.config.schema import Config
from cod_async.errors import InputError
from cod_async.models.shape import TRAINABLE_TYPES, ModelShape, read_shape

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")
_TRAINABLE = " and ".join(f'"{kind}"' for kind in TRAINABLE_TYPES)

Problems = Iterator[str]


def model_problems(config: Config, *, needs_weights: bool) -> Problems:
    """List what is wrong with the model that a configuration names.

    Args:
        config: a configuration of valid values.
        needs_weights: the model must be in ``model.path``, and one that this version trains, even if
            ``model.shape`` says what it is.
    """
    if not config.model.path:
        if config.model.shape:
            yield (
                f'model.shape: "{config.model.shape}" says what model.path must hold, but that is empty; '
                "give both, or neither"
            )
        return
    folder = Path(config.model.path)
    shape: ModelShape | None = None
    if config.model.shape:
        try:
            shape = read_shape(Path(config.model.shape))
        except InputError as error:
            yield from (f"model.shape: {problem}" for problem in error.problems)
            if not needs_weights:
                return
    if not folder.is_dir():
        yield from _absent_model(folder, shape, config, needs_weights)
        return
    if shape is not None and (folder / "config.json").is_file():
        yield from _shape_of(folder, shape)
        if not needs_weights and not shape.is_trainable:
            return  # it is planned, not trained
    missing = [name for name in MODEL_FILES if not (folder / name).is_file()]
    if not any((folder / name).is_file() for name in WEIGHT_FILES):
        missing.append(WEIGHT_FILES[0])
    if missing:
        yield (
            f'model.path: "{folder}" lacks {", ".join(missing)}; give a complete Hugging Face model directory'
        )
    if (folder / "config.json").is_file():
        yield from _model_config(folder / "config.json", config)
    if not missing:
        yield from _tokenizer(folder, config)


def _absent_model(folder: Path, shape: ModelShape | None, config: Config, needs_weights: bool) -> Problems:
    """List what is wrong when there is no folder at ``model.path``: nothing, for a plan from the shape."""
    if not config.model.shape:
        yield (
            f'model.path: no such folder, found "{folder}"; give a Hugging Face model directory, or "" for a '
            "new one"
        )
    elif needs_weights:
        yield (
            f'model.path: no such folder, found "{folder}"; put the model of "{config.model.shape}" there as '
            f"a Hugging Face directory ({', '.join(MODEL_FILES)}, {WEIGHT_FILES[0]}), or give the folder "
            "that has it"
        )
    if shape is None:
        return
    if needs_weights and not shape.is_trainable:
        yield f'model.shape: model_type "{shape.model_type}"; this version trains {_TRAINABLE} models only'
    if config.model.max_context_tokens > shape.max_position_embeddings:
        yield (
            f"model.max_context_tokens: {config.model.max_context_tokens} is beyond the model's "
            f"max_position_embeddings = {shape.max_position_embeddings}; lower it"
        )


def _shape_of(folder: Path, shape: ModelShape) -> Problems:
    try:
        differences = shape.differences(read_shape(folder))
    except InputError as error:
        yield from (f"model.path: {problem}" for problem in error.problems)
        return
    if differences:
        yield (
            f'model.path: "{folder}" is not the model that model.shape describes ({"; ".join(differences)}); '
            "give that model, or its own shape"
        )


def _model_config(path: Path, config: Config) -> Problems:
    try:
        values: Any = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        yield f"model.path: {path} cannot be read, {error}; give a complete Hugging Face model directory"
        return
    kind = values.get("model_type") if isinstance(values, dict) else None
    if kind not in TRAINABLE_TYPES:
        yield f'model.path: {path} says model_type "{kind}"; this version trains {_TRAINABLE} models only'
        return
    longest = values.get("max_position_embeddings")
    if isinstance(longest, int) and config.model.max_context_tokens > longest:
        yield (
            f"model.max_context_tokens: {config.model.max_context_tokens} is beyond the model's "
            f"max_position_embeddings = {longest}; lower it"
        )


def _tokenizer(folder: Path, config: Config) -> Problems:
    from cod_async.lifecycle.rendering import load_renderer

    try:
        renderer = load_renderer(folder, config.model.renderer)
    except InputError as error:
        yield from (f"model.path: {problem}" for problem in error.problems)
        return
    try:
        vocab_size = json.loads((folder / "config.json").read_text())["vocab_size"]
    except (OSError, ValueError, KeyError, TypeError):
        yield (
            f"model.path: {folder / 'config.json'} names no vocab_size; give a complete Hugging Face model "
            "directory"
        )
        return
    if renderer.tokenizer.vocab_size > vocab_size:
        yield (
            f"model.path: the tokenizer has {renderer.tokenizer.vocab_size} ids, the model only {vocab_size} "
            "embeddings; "
            "give a model with its own tokenizer"
        )
