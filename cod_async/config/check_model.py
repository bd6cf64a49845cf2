"""What a configuration says about its model: the folder, its files, its shape and its tokenizer.

A folder with weights is needed to train. To plan a run ``model.shape`` is enough, a ``config.json`` without
weights; where both are there, they must agree. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from cod_async.config.schema import Config
from cod_async.errors import InputError
from cod_async.models.shape import DENSE_LINEARS, ModelShape, is_plain_qwen3, read_config, read_shape
from cod_async.models.supported import is_recurrent, text_values, unsupported

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json")
WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json")

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
        yield from _adapters(config, DENSE_LINEARS)
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
    yield from _architecture("model.shape", read_config(Path(config.model.shape)), config)
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
        raw = read_config(path.parent)
    except InputError as error:
        yield from (f"model.path: {problem}" for problem in error.problems)
        return
    yield from _architecture("model.path", raw, config)
    longest = text_values(raw).get("max_position_embeddings")
    if isinstance(longest, int) and config.model.max_context_tokens > longest:
        yield (
            f"model.max_context_tokens: {config.model.max_context_tokens} is beyond the model's "
            f"max_position_embeddings = {longest}; lower it"
        )


def _architecture(field: str, raw: Mapping[str, Any], config: Config) -> Problems:
    """List what this version cannot do with a kind of model, and which settings do not go with it."""
    model_type, learner = raw.get("model_type"), config.learner
    if not isinstance(model_type, str):
        yield f"{field}: model_type is {model_type!r}; give a complete Hugging Face model directory"
        return
    obstacles = unsupported(raw)
    yield from (f'{field}: model_type "{model_type}" cannot be trained, {problem}' for problem in obstacles)
    if obstacles:
        return
    if is_recurrent(raw):
        why = f'model_type "{model_type}" has recurrent layers, which take rows side by side only'
        if learner.has_prefix_tree:
            yield f"learner.has_prefix_tree: true, but {why}; set it to false"
        if learner.sequence_parallel > 1:
            yield f"learner.sequence_parallel: {learner.sequence_parallel}, but {why}; set it to 1"
        if learner.layout == "packed":
            yield f'learner.layout: "packed", but {why}; use "auto" or "rectangles"'
    if not is_plain_qwen3(raw):
        found = f'model_type "{model_type}"' if model_type != "qwen3" else "this variant of qwen3"
        if config.engine.kind == "embedded":
            yield (f'engine.kind: "embedded" computes plain qwen3 models only, not {found}; use "sglang"')
        if config.evaluation.is_enabled or config.evaluation.every_steps:
            yield (
                f"evaluation: plays with the embedded engine, which computes plain qwen3 models only, "
                f"not {found}; set evaluation.is_enabled = false and evaluation.every_steps = 0"
            )
    try:
        layers = ModelShape.of(raw).linear_layers
    except InputError:
        return  # a family that is not counted: loading knows its layers
    yield from _adapters(config, layers)


def _adapters(config: Config, layers: tuple[str, ...]) -> Problems:
    """List the targets of adapters that a model does not have."""
    lora = config.learner.lora
    if not lora.rank:
        return
    if not lora.targets:
        yield "learner.lora.targets: empty; name the linear layers that get an adapter"
    for target in lora.targets:
        if target not in layers:
            known = ", ".join(layers)
            yield f'learner.lora.targets: "{target}" is no linear layer of the model; it has {known}'


def _tokenizer(folder: Path, config: Config) -> Problems:
    from cod_async.lifecycle.rendering import load_renderer

    try:
        renderer = load_renderer(folder, config.model.renderer)
    except InputError as error:
        yield from (f"model.path: {problem}" for problem in error.problems)
        return
    try:
        vocab_size = text_values(read_config(folder)).get("vocab_size")
    except InputError:
        return  # said already
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
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
