"""The section ``[learner]``: the optimiser step, and how a model is computed on what there is."""

from __future__ import annotations

from typing import Literal

import msgspec

from cod_async.config.fields import Count, Fraction, NonNegative, Positive, PositiveFloat


class LoraConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Low-rank adapters (LoRA, arXiv 2106.09685), through peft."""

    rank: Count = 0
    """Rank of every adapter; 0: all parameters are trained."""
    alpha: PositiveFloat = 16.0
    """An adapter's product is multiplied by ``alpha / rank``."""
    targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the linear layers that get an adapter."""


class LearnerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The optimiser step."""

    groups_per_step: Positive = 16
    """Closed groups per optimiser step."""
    minibatches_per_step: Positive = 1
    """Cut each step's plan into this many parts, by lifecycles and with about equal action tokens, and take
    one optimiser step on each; they make one policy version together."""
    tokens_per_micro_batch: Positive = 16384
    """Token budget of a micro-batch, padding included."""
    lr: PositiveFloat = 1e-6
    """Learning rate after warm-up, constant."""
    warmup_steps: Count = 0
    """Linear warm-up."""
    betas: tuple[Fraction, Fraction] = (0.9, 0.999)
    """AdamW betas."""
    weight_decay: NonNegative = 0.01
    """AdamW weight decay."""
    grad_clip: PositiveFloat = 1.0
    """Ceiling of the gradient norm."""
    num_threads: Positive = 1
    """OpenMP threads of the learner process."""
    checkpoint_every_steps: Positive = 20
    """Optimiser steps between durable checkpoints; the last step is always saved."""
    keep_checkpoints: Positive = 3
    """Older ones are deleted, the newest and the first are kept."""
    keep_checkpoint_every_steps: Count = 0
    """Checkpoints at multiples of this stay too; 0: none more."""
    has_async_checkpoints: bool = True
    """Write checkpoints beside training: the step waits only for a copy in memory. The last one is waited
    for."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite never touches the parameters, and its batch is kept in
    ``failed_steps/``. ``stop`` ends the run; ``skip`` drops the batch by name and goes on, at most
    ``max_skipped_steps`` times in a row."""
    max_skipped_steps: Positive = 3
    """With ``skip``: so many in a row mean that the model is broken, and end the run."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """``auto``: CUDA where there is one."""
    compute_dtype: Literal["float32", "bfloat16"] = "float32"
    """Type of matrix products; parameters, moments and reductions of gradients stay float32."""
    layout: Literal["auto", "rectangles", "packed"] = "auto"
    """How rows lie in a micro-batch. ``rectangles``: rows of similar length side by side, padded;
    ``packed``: end to end without padding, attention row by row. ``auto``: packed on CUDA, rectangles on a
    CPU and for models with recurrent layers."""
    has_prefix_merging: bool = True
    """Rows of a lifecycle that continue each other are computed as one row."""
    has_prefix_tree: bool = False
    """Rows of a group that begin alike share the computation of their common beginning; gradients stay
    exact."""
    recompute: Literal["none", "selective", "full", "offload"] = "none"
    """What backward computes again instead of keeping it: nothing; all but attention and matrix products
    whose results are cheap to keep; every layer; ``offload``: every layer, with the layers' inputs kept in
    host memory."""
    optimizer: Literal["adamw", "adamw_8bit"] = "adamw"
    """``adamw_8bit``: both moments in blocks of 8-bit numbers, a quarter of the memory."""
    has_optimizer_offload: bool = False
    """Keep the moments in host memory and step there."""
    data_parallel: Positive = 1
    """Ranks that share a step's rows; parameters, gradients and moments are sharded over all ranks
    (FSDP2)."""
    sequence_parallel: Positive = 1
    """Ranks that share each row's tokens. Needs ``layout`` packed."""
    sequence_mode: Literal["auto", "ulysses", "ring"] = "auto"
    """How attention crosses the ranks of a row: ``ulysses`` exchanges heads for tokens, ``ring`` passes keys
    and values around; ``auto``: ulysses where heads divide, but ring where it sends less than half the bytes
    and each rank has at least 32,768 tokens."""
    has_token_records: bool = False
    """Write log-prob, ratio, mask and entropy of every trained token to ``token_records/``, for viewers. It
    takes one more forward pass, about a third of a step."""
    max_token_records_bytes: Positive = 1 << 30
    """Ceiling of ``token_records/``; the oldest steps' files go first."""
    device_memory_bytes: Count = 0
    """Memory of one device, which the forecast of ``cod train --dry-run`` must fit; 0: no verdict there. A
    learner on CUDA compares the forecast with the device that it finds."""
    trace_every_steps: Count = 0
    """Write a Perfetto trace of every this many steps to ``traces/``; 0: never."""
    lora: LoraConfig = LoraConfig()
    """Train low-rank adapters instead of the model."""
