"""Model directories into policies: strictly, and with room for the model and one tensor.

What is stored is compared with what the architecture needs by headers alone, and every missing, unknown or
misshapen tensor is listed before anything is read. Then tensors are read one by one, converted straight into
their parameter, and looked at: a weight that is not finite is refused by name.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cod_async.config.learner import LoraConfig
from cod_async.models.lora import add_adapters, fill_adapters, is_adapter, plain_name
from cod_async.models.policy import Policy
from cod_async.models.stored import CONFIG_FILE, StoredWeights, compare, raise_problems, read_json
from cod_async.models.supported import not_plain_qwen3

VISION_PREFIX = "model.language_model."
"""Where checkpoints that also hold a vision tower keep the backbone of their language model."""
IGNORED_PREFIXES = ("model.visual.", "visual.", "mtp.")
"""Vision towers and draft heads: not loaded, not trained, copied from the source when a policy is saved."""
_IGNORED_SUFFIX = ".rotary_emb.inv_freq"
_CHUNK = 1 << 20
"""Values that are looked at together: looking takes a few times their bytes."""


def load_policy(
    path: Path, *, dtype: torch.dtype = torch.float32, device: str = "cpu", lora: LoraConfig | None = None
) -> Policy:
    """Load a model directory as a policy.

    Args:
        path: Hugging Face model directory with safetensors weights.
        dtype: type of the parameters; stored values are converted.
        device: where they go.
        lora: with a rank of at least 1: train adapters and freeze the rest.

    Returns:
        :class:`cod_async.models.qwen3.Qwen3` where it can compute the model, else a
        :class:`cod_async.models.hugging_face.HuggingFacePolicy`; in evaluation mode, gradients enabled.

    Raises:
        InputError: a file is missing or damaged, the model is not supported, tensors are missing, unknown, of
            a wrong shape or type or not finite, or a target of ``lora`` names no layer.
    """
    policy = _build(path)
    if lora is not None and lora.rank:
        add_adapters(policy, lora)
    fill_policy(policy, StoredWeights(path), dtype=dtype, device=torch.device(device))
    return policy.eval()


def _build(path: Path) -> Policy:
    if not not_plain_qwen3(read_json(path / CONFIG_FILE)):
        from cod_async.models.directory import build_qwen3

        return build_qwen3(path)
    from cod_async.models.hugging_face import build_policy  # transformers takes seconds to import

    return build_policy(path)


def fill_policy(policy: Any, stored: StoredWeights, *, dtype: torch.dtype, device: torch.device) -> None:
    """Read a policy's parameters from a directory, strictly.

    Args:
        policy: on the meta device; gets parameters of its own, one by one.
        stored: the directory's weights.
        dtype: type of the parameters.
        device: where they go.

    Raises:
        InputError: as :func:`load_policy`.
    """
    if any(name.startswith(VISION_PREFIX) for name in stored.tensors):
        policy.has_vision = True
    names = stored_names(policy)
    shapes = dict(policy.state_dict())
    expected = {theirs: tuple(shapes[ours].shape) for ours, theirs in names.items()}
    tied = tied_names(policy)
    problems = compare(stored.tensors, expected, lambda name: is_ignored(name) or name in tied)
    if tied and all(name in stored.tensors for name in tied) and not stored.are_equal(*tied):
        head, embedding = tied
        problems.append(f"tensor {head} differs from {embedding} although tie_word_embeddings is true")
    raise_problems(stored.folder, problems)
    ours_by_theirs = {theirs: ours for ours, theirs in names.items()}
    broken = []
    for theirs, tensor in stored.read(expected):
        value = torch.empty(tensor.shape, dtype=dtype, device=device)
        value.copy_(tensor)
        num_broken = _num_not_finite(value)
        if num_broken:
            broken.append(f"tensor {theirs} has {num_broken} values that are not finite as {dtype}")
        _put(policy, ours_by_theirs[theirs], value)
        del tensor, value  # before the next one is read
    raise_problems(stored.folder, broken)
    _tie(policy)
    fill_adapters(policy, dtype=dtype, device=device)
    _move_tables(policy, device)


def stored_names(policy: Any) -> dict[str, str]:
    """Return under which name a model directory keeps each of a policy's tensors.

    Args:
        policy: any, with adapters or without.

    Returns:
        Stored name by the policy's name; adapters and a tied head are left out. Names differ where there are
        adapters, or where the directory also holds a vision tower.
    """
    answer = {}
    for name in policy.state_dict():
        plain = plain_name(name)
        if is_adapter(name) or (is_tied(policy) and plain == head_name(policy)):
            continue
        answer[name] = _stored_name(policy, plain)
    return answer


def is_ignored(name: str) -> bool:
    """Whether a stored tensor is no part of a language model that is trained here."""
    return name.startswith(IGNORED_PREFIXES) or name.endswith(_IGNORED_SUFFIX)


def is_tied(policy: Any) -> bool:
    """Whether the output head is the embedding matrix."""
    return bool(policy.config.tie_word_embeddings)


def head_name(policy: Any) -> str:
    """Return the name of the output head's parameter."""
    return str(getattr(policy, "head_name", "lm_head.weight"))


def embedding_name(policy: Any) -> str:
    """Return the name of the embedding's parameter."""
    return str(getattr(policy, "embedding_name", "model.embed_tokens.weight"))


def _stored_name(policy: Any, name: str) -> str:
    if getattr(policy, "has_vision", False) and name.startswith("model."):
        return VISION_PREFIX + name.removeprefix("model.")
    return name


def tied_names(policy: Any) -> tuple[str, ...]:
    """Return the stored names of head and embedding if they are one matrix, else nothing."""
    if not is_tied(policy):
        return ()
    return head_name(policy), _stored_name(policy, embedding_name(policy))


def _tie(policy: Any) -> None:
    if is_tied(policy):
        head, _, leaf = head_name(policy).rpartition(".")
        policy.get_submodule(head)._parameters[leaf] = policy.get_parameter(embedding_name(policy))


def _put(policy: nn.Module, name: str, value: Tensor) -> None:
    """Make ``value`` the parameter or buffer called ``name``."""
    prefix, _, leaf = name.rpartition(".")
    owner = policy.get_submodule(prefix)
    if leaf in owner._parameters:
        old = owner._parameters[leaf]
        owner._parameters[leaf] = nn.Parameter(value, requires_grad=old is None or old.requires_grad)
    else:
        owner._buffers[leaf] = value


def _move_tables(policy: nn.Module, device: torch.device) -> None:
    """Bring buffers that no file stores to the parameters' device."""
    for module in policy.modules():
        for leaf in module._non_persistent_buffers_set:
            table = module._buffers[leaf]
            if table is not None:
                module._buffers[leaf] = table.to(device)


def _num_not_finite(value: Tensor) -> int:
    """Count NaN and infinities, a part at a time: a mask of a whole embedding would be a large copy."""
    flat = value.reshape(-1)
    count = 0
    for start in range(0, flat.numel(), _CHUNK):
        count += int((~flat[start : start + _CHUNK].isfinite()).sum())
    return count
