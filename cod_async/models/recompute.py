"""What backward computes again instead of keeping it: activation checkpointing, layer by layer.

Without it, memory grows with every intermediate result of every layer. ``full`` keeps a layer's input alone
and runs the layer a second time in backward (arXiv 1604.06174): a third more matrix products, a fraction of
the memory. ``selective`` also keeps what is dear to compute and small: the results of attention, whose cost
grows with the square of a row, and every second matrix product. ``offload`` is ``full`` with the layers'
inputs in host memory. The layers' ``forward`` is replaced, not the layers: names of parameters, sharding and
export never see it. Gradients are the same to the bit where kernels are deterministic.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from cod_async.models.policy import Policy

Recompute = Literal["none", "selective", "full", "offload"]

_aten = torch.ops.aten
_ATTENTION_OPS = (
    "_scaled_dot_product_flash_attention_for_cpu",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_cudnn_attention",
    "_flash_attention_forward",
    "_efficient_attention_forward",
)
_PRODUCT_OPS = ("mm", "addmm", "bmm")
PRODUCTS_KEPT_OF = 2
"""With ``selective`` every this-many-th matrix product of a layer is kept."""

_Context = contextlib.AbstractContextManager[Any]


def apply_recompute(policy: Policy, mode: Recompute) -> None:
    """Make every layer of ``policy`` compute again in backward what ``mode`` does not keep.

    Args:
        policy: any; its layers' ``forward`` is wrapped in place. Sharding (FSDP2) comes after this.
        mode: ``none`` leaves everything as it is.

    Raises:
        ValueError: the layers were wrapped before.
    """
    if mode == "none":
        return
    for block in policy.blocks:
        if getattr(block, "recompute_mode", None) is not None:
            raise ValueError(f"the layers recompute already ({block.recompute_mode}); apply it once")
        # A bound method, because deepcopy binds those to the copy; a closure would go on computing with the
        # original's parameters.
        bound: Any = block.forward
        block.forward = MethodType(_wrapped(bound.__func__, mode), block)
        block.recompute_mode = mode  # type: ignore[assignment]


def _wrapped(forward: Callable[..., Any], mode: Recompute) -> Callable[..., Any]:
    contexts = _selective_contexts if mode == "selective" else None

    @functools.wraps(forward)
    def run(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        own = MethodType(forward, block)
        if not torch.is_grad_enabled():
            return own(*args, **kwargs)
        options: dict[str, Any] = {"use_reentrant": False, "preserve_rng_state": False}
        if contexts is not None:
            options["context_fn"] = contexts
        with _inputs_on_host(args) if mode == "offload" else contextlib.nullcontext():
            return checkpoint(own, *args, **options, **kwargs)

    return run


def _inputs_on_host(args: tuple[Any, ...]) -> _Context:
    is_cuda = any(isinstance(arg, Tensor) and arg.is_cuda for arg in args)
    return save_on_cpu(pin_memory=is_cuda)


def _selective_contexts() -> tuple[_Context, _Context]:
    """Return the contexts of one forward and of its recomputation; each counts products for itself."""
    attention = {op for name in _ATTENTION_OPS for op in _overloads(name)}
    products = {op for name in _PRODUCT_OPS for op in _overloads(name)}
    num_products = {False: 0, True: 0}

    def decide(ctx: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        if op in attention:
            return CheckpointPolicy.MUST_SAVE
        if op in products:
            number = num_products[ctx.is_recompute]
            num_products[ctx.is_recompute] += 1
            if number % PRODUCTS_KEPT_OF == 0:
                return CheckpointPolicy.MUST_SAVE
        return CheckpointPolicy.PREFER_RECOMPUTE

    contexts: tuple[_Context, _Context] = create_selective_checkpoint_contexts(decide)  # type: ignore[no-untyped-call]
    return contexts


def _overloads(name: str) -> Iterator[Any]:
    """Yield the default overload of an operator, if this torch has the operator."""
    packet = getattr(_aten, name, None)
    if packet is not None and hasattr(packet, "default"):
        yield packet.default
