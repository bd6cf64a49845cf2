"""A policy as the trainer computes with it, on one rank or sharded over many, in either compute type.

The optimizer's parameters, their gradients and every sum of gradients are float32 (or whatever the policy was
loaded in). What differs is where the numbers are that forward and backward read:

- :class:`Plain`: the parameters themselves.
- :class:`LowPrecision`: one rank, a second copy in bfloat16, refreshed after each optimizer step. A gradient
  of the copy is added to its parameter's in float32 as soon as it is made, and freed.
- :class:`Sharded`: fully sharded data parallelism (ZeRO stage 3, arXiv 1910.02054; torch's FSDP2) over all
  ranks. Each layer's parameters are gathered, in the compute type, when it runs, and dropped again; gradients
  are reduce-scattered in float32 and summed, not averaged, because the weights of a step's segments already
  hold the whole step's normalisation.

The output head is apart from that, because its product is not in the policy's forward pass: it is gathered
once per optimizer step in the compute type, the micro-batches' gradients add up in float32 on each rank, and
that sum is reduce-scattered once. A head that is tied to the embedding gets both gradients.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from cod_async.config.learner import LearnerConfig
from cod_async.errors import InputError
from cod_async.learner.parallel.local import local, whole
from cod_async.learner.parallel.world import World
from cod_async.models.layout import RECTANGLE, Layout
from cod_async.models.policy import Policy
from cod_async.models.recompute import apply_recompute


class Plain:
    """The policy itself: one rank, computing in the parameters' own type."""

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def hidden(self, input_ids: Tensor, layout: Layout = RECTANGLE) -> Tensor:
        """Return the hidden states after the final norm, [B, T, H]."""
        states: Tensor = self.policy(input_ids, layout)
        return states

    def head(self) -> Tensor:
        """Return the output head [V, H] in the compute type; gradients of it find their way."""
        return self.policy.head_weight

    def settle(self) -> None:
        """Bring every gradient to its parameter, after the last backward pass of an optimizer step."""

    def refresh(self) -> None:
        """Notice that the parameters have changed."""


class LowPrecision(Plain):
    """One rank: a copy of the policy in the compute type, whose gradients are added up in the parameters'.

    Args:
        policy: has the parameters.
        dtype: to compute in.
    """

    def __init__(self, policy: Policy, dtype: torch.dtype) -> None:
        super().__init__(policy)
        masters = list(policy.parameters())
        twins = [nn.Parameter(p.detach().to(dtype), requires_grad=p.requires_grad) for p in masters]
        self._pairs = list(zip(masters, twins, strict=True))
        # The copy finds its parameters in the memo, so that there is no second float32 policy for a moment.
        self.computed = copy.deepcopy(policy, {id(p): twin for p, twin in self._pairs})
        for master, twin in self._pairs:
            if twin.requires_grad:
                _after_accumulating(twin, _adder(master))

    def hidden(self, input_ids: Tensor, layout: Layout = RECTANGLE) -> Tensor:
        """Return the hidden states after the final norm, [B, T, H], in the compute type."""
        states: Tensor = self.computed(input_ids, layout)
        return states

    def head(self) -> Tensor:
        """Return the copy's output head."""
        return self.computed.head_weight

    @torch.no_grad()
    def refresh(self) -> None:
        """Round the changed parameters into the copy."""
        for master, twin in self._pairs:
            if master.requires_grad:
                twin.copy_(master)


def _after_accumulating(tensor: Any, hook: Callable[[Tensor], None]) -> None:
    tensor.register_post_accumulate_grad_hook(hook)


def _adder(master: Tensor) -> Callable[[Tensor], None]:
    def add(twin: Tensor) -> None:
        if twin.grad is None:
            return
        if master.grad is None:
            master.grad = twin.grad.to(master.dtype)
        else:
            master.grad += twin.grad
        twin.grad = None

    return add


class Sharded(Plain):
    """The policy sharded over all ranks of a world, in place.

    Args:
        policy: whole, and equal on every rank; afterwards its parameters are DTensors.
        world: of several ranks.
        dtype: to compute in.
    """

    def __init__(self, policy: Policy, world: World, dtype: torch.dtype) -> None:
        super().__init__(policy)
        self._mesh = world.mesh
        self._dtype = dtype
        shard_policy(policy, world, dtype)
        self._weight = policy.head_weight  # the sharded one, whatever is gathered meanwhile
        self._head: Tensor | None = None
        self._head_gradient: Tensor | None = None

    def head(self) -> Tensor:
        """Return the whole head, gathered at the first call of an optimizer step."""
        if self._head is None:
            with torch.no_grad():
                self._head = whole(self._weight.to(self._dtype)).contiguous()
            if self._weight.requires_grad:
                self._head.requires_grad_()
                _after_accumulating(self._head, self._add)
        return self._head

    def _add(self, head: Tensor) -> None:
        if head.grad is None:
            return
        if self._head_gradient is None:
            self._head_gradient = head.grad.to(self._weight.dtype)
        else:
            self._head_gradient += head.grad
        head.grad = None

    @torch.no_grad()
    def settle(self) -> None:
        """Reduce-scatter the head's gradient to the shards; what :meth:`head` returned is dropped."""
        from torch.distributed.tensor import DTensor, Partial

        weight: Any = self._weight
        if self._weight.requires_grad:
            gradient = self._head_gradient
            if gradient is None:  # this rank had no trained token
                gradient = torch.zeros(
                    self._weight.shape, dtype=self._weight.dtype, device=self._weight.device
                )
            summed = DTensor.from_local(gradient, self._mesh, [Partial("sum")]).redistribute(
                self._mesh, weight.placements
            )
            if self._weight.grad is None:
                self._weight.grad = summed
            else:
                self._weight.grad += summed
        self._head_gradient = None
        self._head = None

    def refresh(self) -> None:
        """The next call of :meth:`head` gathers the new one."""
        self._head = None


def shard_policy(policy: Policy, world: World, dtype: torch.dtype) -> None:
    """Shard every layer, an untied output head, and what is left, over all ranks of a world, in place.

    Raises:
        InputError: the policy has no layers to shard.
    """
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard

    if not policy.blocks:
        raise InputError(f"{type(policy).__name__} names no layers; use one rank")
    own = policy.dtype
    precision = MixedPrecisionPolicy(
        param_dtype=None if dtype == own else dtype, reduce_dtype=None if dtype == own else own
    )
    owner = _untied_head(policy)  # before there are DTensors
    units = [*policy.blocks, *([] if owner is None else [owner]), policy]
    for unit in units:
        # The last unit would keep its parameters after a forward pass; gathering them once more is cheaper
        # than remembering to drop them after passes without gradients.
        fully_shard(unit, mesh=world.mesh, mp_policy=precision, reshard_after_forward=True)
    for module in policy.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other sum


def _untied_head(policy: Policy) -> nn.Module | None:
    """Return the module that has the output head for itself, None if the head is an embedding too."""
    head = policy.head_weight
    owners = [module for module in policy.modules() if any(p is head for p in module.parameters(False))]
    return owners[0] if len(owners) == 1 and not isinstance(owners[0], nn.Embedding) else None


def prepare(policy: Policy, world: World, learner: LearnerConfig) -> Plain:
    """Return ``policy`` ready to be computed with, as the configuration and the world have it.

    With several ranks its parameters become shards, in place. What backward recomputes is as configured, in
    the layers that are computed with.
    """
    own = policy.dtype
    dtype = torch.bfloat16 if learner.compute_dtype == "bfloat16" else own
    if world.size == 1 and dtype != own:
        found = LowPrecision(policy, dtype)
        apply_recompute(found.computed, learner.recompute)
        return found
    apply_recompute(policy, learner.recompute)  # before sharding
    return Sharded(policy, world, dtype) if world.size > 1 else Plain(policy)


@torch.no_grad()
def clip_gradients(parameters: Iterable[Tensor], max_norm: float, world: World) -> Tensor:
    """Scale all gradients so that their norm is at most ``max_norm``; return the norm before, on the device.

    The norm is that of the whole gradient, sharded or not, and equal on every rank.
    """
    found = [p for p in parameters if p.grad is not None]
    if world.size == 1:
        return nn.utils.clip_grad_norm_(found, max_norm)
    parts = [local(p.grad) for p in found if p.grad is not None]
    parts = [part for part in parts if part.numel()]
    squares = torch.zeros((), dtype=torch.float64, device=world.device)
    if parts:
        squares += torch.stack(torch._foreach_norm(parts)).double().square().sum()
    norm = world.add_up(squares).sqrt()
    if parts:
        torch._foreach_mul_(parts, (max_norm / (norm + 1e-6)).clamp(max=1.0).to(parts[0].dtype))
    return norm
