"""The optimizers, and their state by parameter name, whatever holds it.

``adamw`` is torch's fused AdamW; ``adamw_8bit`` see :mod:`.eight_bit`; with ``has_optimizer_offload`` either
one runs on the host over copies of this rank's parameters, and only gradients and parameters cross the bus.

A state has three tensors per parameter: ``step``, ``exp_avg`` and ``exp_avg_sq``, the last two float32 and
sharded as the parameter is. So a checkpoint does not know which optimizer wrote it, nor on how many ranks,
and each can go on from what another one left. Moments of 8-bit or offloaded optimizers are given on the host.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from cod_async.config.learner import LearnerConfig
from cod_async.errors import CheckpointError
from cod_async.learner.parallel.eight_bit import AdamW8bit
from cod_async.learner.parallel.local import like, local

STATE_NAMES = ("exp_avg", "exp_avg_sq", "step")


class HostOptimizer:
    """An optimizer that keeps its moments in host memory and steps there.

    Args:
        groups: parameter groups, wherever the parameters are.
        make: makes the optimizer that does the work, of the same groups over host copies.
    """

    def __init__(self, groups: list[dict[str, Any]], make: Any) -> None:
        self._devices = [p for group in groups for p in group["params"]]
        self._hosts = [nn.Parameter(_host_copy(local(p))) for p in self._devices]
        hosts = iter(self._hosts)
        self.inner = make([{**group, "params": [next(hosts) for _ in group["params"]]} for group in groups])
        self._twins = dict(zip(self._devices, self._hosts, strict=True))

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The groups that the work is done on; set learning rates here."""
        groups: list[dict[str, Any]] = self.inner.param_groups
        return groups

    @torch.no_grad()
    def step(self) -> None:
        """Bring the gradients to the host, step, and bring the parameters back."""
        for device, host in self._twins.items():
            if device.grad is None:
                host.grad = None
                continue
            if host.grad is None:
                host.grad = _host_copy(local(device.grad))
            else:
                host.grad.copy_(local(device.grad), non_blocking=True)
        _synchronize(self._devices)
        self.inner.step()
        for device, host in self._twins.items():
            local(device).copy_(host, non_blocking=True)
        _synchronize(self._devices)

    def register_step_pre_hook(self, hook: Any) -> Any:
        """Have ``hook`` called before each step; the parameters still have their gradients then."""
        return self.inner.register_step_pre_hook(hook)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients of the parameters; the host's buffers stay."""
        for parameter in self._devices:
            parameter.grad = None

    @torch.no_grad()
    def reread(self) -> None:
        """Take over parameters that somebody else has changed, such as a checkpoint."""
        for device, host in self._twins.items():
            host.copy_(local(device))

    def twin(self, parameter: Tensor) -> Tensor:
        """Return the host's copy of a parameter."""
        host: Tensor = self._twins[parameter]
        return host


def _host_copy(tensor: Tensor) -> Tensor:
    is_pinned = tensor.device.type == "cuda"
    found = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=is_pinned)
    return found.copy_(tensor.detach())


def _synchronize(parameters: Iterable[Tensor]) -> None:
    for device in {p.device for p in parameters if p.device.type == "cuda"}:
        torch.cuda.synchronize(device)


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split trained parameters for AdamW: matrices decay, norms, biases and embeddings do not."""
    embeddings = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    named = [p for p in model.parameters() if p.requires_grad]
    decays = [p for p in named if p.dim() >= 2 and id(p) not in embeddings]
    others = [p for p in named if p.dim() < 2 or id(p) in embeddings]
    return [{"params": decays, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]


def make_optimizer(model: nn.Module, learner: LearnerConfig) -> Any:
    """Return the configured optimizer over the parameters of ``model`` as they are, sharded or not."""
    groups = [group for group in parameter_groups(model, learner.weight_decay) if group["params"]]

    def make(of: list[dict[str, Any]]) -> Any:
        if learner.optimizer == "adamw_8bit":
            return AdamW8bit(of, lr=learner.lr, betas=learner.betas)
        return torch.optim.AdamW(of, lr=learner.lr, betas=learner.betas, fused=True)

    return HostOptimizer(groups, make) if learner.has_optimizer_offload else make(groups)


def optimizer_state(model: nn.Module, optimizer: Any, host_mesh: Any = None) -> dict[str, Tensor]:
    """Return ``exp_avg/NAME``, ``exp_avg_sq/NAME`` and ``step/NAME`` of every trained parameter.

    Moments that do not exist yet are zeros, so that the result is also a template to load into.

    Args:
        model: has the parameters, by name.
        optimizer: from :func:`make_optimizer`.
        host_mesh: over the ranks of a sharded model on CUDA, for moments in host memory.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained(model):
        own, inner = _own(optimizer, parameter)
        if isinstance(inner, AdamW8bit):
            found = inner.moments(own)
        else:
            state = _adamw_state(inner, own)
            found = {key: state[key] for key in STATE_NAMES}
        for key, value in found.items():
            is_share = key != "step" and not hasattr(value, "to_local")
            tensors[f"{key}/{name}"] = like(value, parameter, host_mesh) if is_share else value
    return tensors


@torch.no_grad()
def load_optimizer_state(model: nn.Module, optimizer: Any, tensors: dict[str, Tensor]) -> None:
    """Put back what :func:`optimizer_state` returned, perhaps of another optimizer; nothing if it is empty.

    Args:
        model: has the parameters, by name.
        optimizer: from :func:`make_optimizer`.
        tensors: moments sharded as the parameters are, or whole on an unsharded model.

    Raises:
        CheckpointError: a tensor is missing, unknown, or has another shape than its parameter.
    """
    if isinstance(optimizer, HostOptimizer):
        optimizer.reread()
    parameters = dict(_trained(model))
    expected = {f"{key}/{name}" for key in STATE_NAMES for name in parameters} if tensors else set()
    if expected != set(tensors):
        odd = sorted(expected ^ set(tensors))
        raise CheckpointError(f"optimizer state: {odd[0]} is missing or unknown; use an older checkpoint")
    for name, parameter in parameters.items() if tensors else ():
        found = {key: tensors[f"{key}/{name}"] for key in STATE_NAMES}
        for key in ("exp_avg", "exp_avg_sq"):
            if found[key].shape != parameter.shape:
                raise CheckpointError(f"optimizer state: {key}/{name} has shape {list(found[key].shape)}")
        own, inner = _own(optimizer, parameter)
        if isinstance(inner, AdamW8bit):
            inner.set_moments(own, {key: local(value) for key, value in found.items()})
            continue
        for key, value in _adamw_state(inner, own).items():
            local(value).copy_(local(found[key]))


def _trained(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return ((name, p) for name, p in model.named_parameters() if p.requires_grad)


def _own(optimizer: Any, parameter: Tensor) -> tuple[Tensor, Any]:
    """Return (the tensor that has the state, the optimizer that keeps it)."""
    if isinstance(optimizer, HostOptimizer):
        return optimizer.twin(parameter), optimizer.inner
    return parameter, optimizer


def _adamw_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> dict[str, Tensor]:
    """Return torch's state of a parameter, made of zeros if there is none yet, as its first step would."""
    state: dict[str, Tensor] = optimizer.state[parameter]
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
        state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
    return state
