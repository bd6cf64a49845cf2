"""Low-rank adapters (LoRA, arXiv 2106.09685) in a policy, through peft.

Every chosen linear layer ``W`` becomes ``W + (alpha / rank) * B @ A`` with A [rank, in] and B [out, rank]; W
is frozen and only the adapters train. B starts at 0, so the policy starts as the model it was loaded from; A
is drawn from a generator seeded by its name, so that every rank and every repetition draws the same. Engines
that know no adapters get the sum (:func:`merged`); engines that do get the adapters alone
(:func:`save_adapter`).
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from cod_async.config.learner import LoraConfig
from cod_async.durable import write_atomic
from cod_async.errors import InputError
from cod_async.models.policy import Policy

ADAPTER_CONFIG_FILE = "adapter_config.json"
ADAPTER_WEIGHTS_FILE = "adapter_model.safetensors"
_ADAPTER = "default"
_BASE = ".base_layer."
_PARTS = ("lora_A", "lora_B")
_HOLDER = "policy"
_PEFT_PREFIX = "base_model.model."


def add_adapters(policy: Policy, lora: LoraConfig) -> None:
    """Put adapters into a policy, in place, and freeze everything else.

    Args:
        policy: on any device, the meta device too.
        lora: a rank of at least 1.

    Raises:
        InputError: peft is not installed, or a target names no layer of the policy's blocks, or one that is
            no linear layer; all problems are listed.
    """
    try:
        import peft
    except ImportError as error:
        raise InputError(
            f"learner.lora.rank: {lora.rank} needs peft, which is not installed; "
            "pip install 'cod-async[lora]'"
        ) from error
    _check_targets(policy, lora)
    # peft takes a target for any layer whose name ends so; the head and the embedding are never meant.
    names = [name for name, _ in _targets(policy, lora.targets)]
    chosen = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,  # type: ignore[arg-type]
        target_modules=[f"{_HOLDER}.{name}" for name in names],
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=False,
    )
    # In a holder without a configuration peft sees layers, and does nothing of its own for a kind of model.
    holder = nn.ModuleDict({_HOLDER: policy})
    peft.inject_adapter_in_model(chosen, holder, adapter_name=_ADAPTER, low_cpu_mem_usage=True)
    for name, parameter in policy.named_parameters():
        parameter.requires_grad_(is_adapter(name))
    values = f"{lora.rank} {lora.alpha!r} {' '.join(names)}"
    policy.adapter_id = f"lora-{hashlib.sha256(values.encode()).hexdigest()[:12]}"


def is_adapter(name: str) -> bool:
    """Whether a parameter's name is that of an adapter."""
    return any(f".{part}." in name for part in _PARTS)


def plain_name(name: str) -> str:
    """Return the name that a frozen parameter had before adapters were added."""
    return name.replace(_BASE, ".")


@torch.no_grad()
def fill_adapters(policy: Policy, *, dtype: torch.dtype, device: torch.device) -> None:
    """Give the adapters memory and their first values: A uniform within ``1 / sqrt(in)``, as peft draws it,
    and B zero.
    """
    for name, old in list(policy.named_parameters()):
        if not is_adapter(name):
            continue
        fresh = torch.zeros(old.shape, dtype=torch.float32)
        if ".lora_A." in name:
            seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
            limit = 1.0 / math.sqrt(old.shape[1])
            fresh.uniform_(-limit, limit, generator=torch.Generator().manual_seed(seed))
        prefix, _, leaf = name.rpartition(".")
        owner = policy.get_submodule(prefix)
        owner._parameters[leaf] = nn.Parameter(fresh.to(device, dtype))


@torch.no_grad()
def merged(policy: nn.Module, name: str, weight: Tensor) -> Tensor:
    """Return a weight with its adapter added; the weight itself if it has none.

    Args:
        policy: with or without adapters.
        name: of the parameter, as ``policy`` calls it.
        weight: its value, [out, in].

    Returns:
        ``weight + (alpha / rank) * B @ A``, in the weight's type.
    """
    if not name.endswith(f"{_BASE}weight"):
        return weight
    layer: Any = policy.get_submodule(name.removesuffix(f"{_BASE}weight"))
    down, up = layer.lora_A[_ADAPTER].weight, layer.lora_B[_ADAPTER].weight
    total: Tensor = weight + (up.detach() @ down.detach()) * layer.scaling[_ADAPTER]
    return total


def adapter_of(policy: Policy) -> dict[str, Tensor]:
    """Return the adapters by the names that peft gives them in a file: detached, sharing memory."""
    return {
        _PEFT_PREFIX + name.replace(f".{_ADAPTER}.", "."): tensor.detach()
        for name, tensor in policy.named_parameters()
        if is_adapter(name)
    }


def save_adapter(path: Path, policy: Policy, lora: LoraConfig, *, source: Path) -> None:
    """Write the adapters as a directory that peft, and engines that serve adapters, load onto ``source``.

    Args:
        path: directory, made if missing.
        policy: with adapters; a sharded one must be whole.
        lora: as it was loaded with.
        source: model directory that the policy was loaded from.

    Raises:
        InputError: the policy has no adapters, or the directory cannot be written.
    """
    tensors = {name: tensor.contiguous().cpu() for name, tensor in adapter_of(policy).items()}
    if not tensors:
        raise InputError(f"{path}: the policy has no adapters; set learner.lora.rank")
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source),
        "inference_mode": True,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "target_modules": sorted(set(lora.targets)),
        "modules_to_save": None,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_atomic(path / ADAPTER_WEIGHTS_FILE, save(tensors, metadata={"format": "pt"}))
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        write_atomic(path / ADAPTER_CONFIG_FILE, text.encode())
    except OSError as error:
        raise InputError(f"cannot write the adapter {path}: {error}; choose a writable folder") from error


def _targets(policy: Policy, targets: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    """Return the layers of the policy's blocks that ``targets`` name, by their full names."""
    inside = {id(module) for block in policy.blocks for module in block.modules()}
    return [
        (name, module)
        for name, module in policy.named_modules()
        if id(module) in inside and name.rpartition(".")[2] in targets
    ]


def _check_targets(policy: Policy, lora: LoraConfig) -> None:
    found = _targets(policy, lora.targets)
    known = {name.rpartition(".")[2] for name, _ in found}
    linear = {
        name.rpartition(".")[2]
        for block in policy.blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear)
    }
    has = f"the layers have {', '.join(sorted(linear))}"
    problems = [
        f'learner.lora.targets: "{target}" names no layer; {has}'
        for target in lora.targets
        if target not in known
    ]
    others = sorted({name.rpartition(".")[2] for name, module in found if not isinstance(module, nn.Linear)})
    problems += [f'learner.lora.targets: "{name}" is no linear layer; {has}' for name in others]
    if problems or not found:
        raise InputError(problems or [f"learner.lora.targets: empty; {has}"])
