"""What a step costs before it is taken: bytes on one rank's device, and floating-point operations.

Memory is a sum of lines, each with what it is made of, so that a forecast can be checked line by line:
parameters with their gradients and moments, sharded over all ranks; what is gathered on every rank; what the
layers of one micro-batch keep for backward; the working set of the layer that is being recomputed; and the
chunk of logits of the output head. Operations follow the model's matrix products and its attention over each
row's own length. Loads no torch; works on a ``config.json`` alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Literal

import msgspec

from cod_async.config.learner import LearnerConfig
from cod_async.models.shape import ModelShape

FLOAT_BYTES = 4
HEAD_CHUNK_BYTES = 5 << 29
"""What the output head's loss holds at once, at most: the chunk budget of ``cod_kernels.linear_logprob``."""
HEAD_CHUNK_ROWS = 8192
CPU_CHUNK_NUMBERS = 1 << 21
"""Numbers in a chunk of logits on a CPU."""
NUM_MULTIPROCESSORS = 132
"""Of an H100 or H200. With deterministic algorithms flash attention's backward pass adds up the gradient of
queries in ``ceil(multiprocessors / (rows x heads))`` parts: nine for one row and 16 heads."""
MAX_ROW_TOKENS = 1 << 30
_ALIGNMENT = 64
BYTES_8BIT_MOMENT = 1 + FLOAT_BYTES / 256
"""A moment in blocks of 256 eight-bit numbers, each block with one float32 scale."""
WASTE_FRAC = 0.04
"""The allocator's rounding and fragments, of everything else."""


class Line(msgspec.Struct, frozen=True):
    """One line of a memory budget.

    Attributes:
        name: what it is.
        num_bytes: on one rank.
        where: on the device or in host memory.
        made_of: how the number comes about, for people.
    """

    name: str
    num_bytes: int
    where: Literal["device", "host"]
    made_of: str


class MemoryBudget(msgspec.Struct, frozen=True):
    """Forecast of one rank's memory while it trains on its largest micro-batch.

    Attributes:
        lines: everything that is counted.
        tokens_per_rank: of that micro-batch.
        unknown: what is missing in the sum, and why; empty if nothing is.
    """

    lines: tuple[Line, ...]
    tokens_per_rank: int
    unknown: str = ""

    @property
    def device_bytes(self) -> int:
        """Peak on the device."""
        return sum(line.num_bytes for line in self.lines if line.where == "device")

    @property
    def host_bytes(self) -> int:
        """In host memory, of what belongs to the device's work."""
        return sum(line.num_bytes for line in self.lines if line.where == "host")


def compute_bytes(learner: LearnerConfig) -> int:
    """Return the bytes of one number in a matrix product."""
    return 2 if learner.compute_dtype == "bfloat16" else FLOAT_BYTES


def layer_parameters(shape: ModelShape) -> int:
    """Return the parameters of one layer, the mean where layers differ."""
    ends = shape.sizes["vocab_size"] * shape.sizes["hidden_size"] * (1 if shape.is_tied else 2)
    return (shape.num_parameters - ends) // shape.sizes["num_hidden_layers"]


def kept_bytes_per_token(shape: ModelShape, learner: LearnerConfig) -> float:
    """Return what one layer keeps of a token for backward, without recomputation.

    Counted from the layers as they are written (``models/qwen3.py``): each RMSNorm keeps its input in
    float32, the scaled value and its result; attention keeps queries, keys, values, its result twice (as it
    comes and as the output projection reads it) and one float32 per head; the gated block keeps gate, its
    activation, up and their product.
    """
    size, number = shape.sizes, compute_bytes(learner)
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    queries = size["num_attention_heads"] * size["head_dim"]
    keys = size["num_key_value_heads"] * size["head_dim"]
    norm = FLOAT_BYTES + 2 * number  # its input widened, the scaled value, its result
    attention = number * (3 * queries + 2 * keys) + FLOAT_BYTES * size["num_attention_heads"]
    if shape.model_type == "qwen3":  # query and key heads are normalized
        attention += (FLOAT_BYTES + number) * (queries + keys)
    return 2 * hidden * norm + attention + 4 * inner * number + 2 * FLOAT_BYTES


def memory_budget(
    shape: ModelShape,
    learner: LearnerConfig,
    *,
    max_row_tokens: int,
    has_reference: bool = False,
    is_deterministic: bool = True,
) -> MemoryBudget:
    """Forecast the peak memory of one learner rank; on CUDA, unless ``learner.device`` is ``cpu``.

    What is always there is summed up, and of the three moments in which most is needed besides (the loss of
    the head, a layer's feed-forward part in backward, its attention in backward) the largest is added.

    Args:
        shape: of the model.
        learner: how it is trained.
        max_row_tokens: the longest row; one that exceeds the micro-batch's budget is a micro-batch of its
            own.
        has_reference: whether a frozen copy of the model is there too.
        is_deterministic: whether torch uses deterministic algorithms, as it does in a run.
    """
    tokens = max(learner.tokens_per_micro_batch, max_row_tokens)
    num_rows = max(1, tokens // max(max_row_tokens, 1))
    tokens = math.ceil(tokens / learner.sequence_parallel)
    lines = [*_state(shape, learner), *_copies(shape, learner)]
    if has_reference:
        lines += _reference(shape, learner)
    lines += _kept(shape, learner, tokens)
    moments = [
        _head_moment(shape, learner, tokens),
        *_layer_moments(shape, learner, tokens, num_rows if is_deterministic else tokens),
    ]
    lines += max(moments, key=lambda moment: sum(line.num_bytes for line in moment))
    known = sum(line.num_bytes for line in lines if line.where == "device")
    lines.append(_line("allocator", WASTE_FRAC * known, f"{WASTE_FRAC:.0%} of the above"))
    unknown = ""
    if shape.is_recurrent:
        unknown = "what a recurrent layer holds while it works depends on its kernels; it is not in the sum"
    return MemoryBudget(tuple(line for line in lines if line.num_bytes), tokens, unknown)


def longest_row_tokens(
    shape: ModelShape, learner: LearnerConfig, device_bytes: int, *, has_reference: bool = False
) -> int:
    """Return the tokens of the longest row that fits a device as a micro-batch of its own; 0 if none does.

    Args:
        shape: of the model.
        learner: how it is trained; its ``tokens_per_micro_batch`` does not count.
        device_bytes: memory of each rank's device.
        has_reference: as of :func:`memory_budget`.
    """
    alone = msgspec.structs.replace(learner, tokens_per_micro_batch=1)

    def fits(num_tokens: int) -> bool:
        budget = memory_budget(shape, alone, max_row_tokens=num_tokens, has_reference=has_reference)
        return budget.device_bytes <= device_bytes

    return _largest(fits, 1, MAX_ROW_TOKENS)


def micro_batch_that_fits(
    shape: ModelShape,
    learner: LearnerConfig,
    device_bytes: int,
    *,
    max_row_tokens: int,
    has_reference: bool = False,
) -> int:
    """Return the largest budget of a micro-batch that fits a device, in tokens: at most the configured one,
    at least ``max_row_tokens``; 0 if not even that fits. Arguments as of :func:`memory_budget`.
    """

    def fits(num_tokens: int) -> bool:
        smaller = msgspec.structs.replace(learner, tokens_per_micro_batch=num_tokens)
        budget = memory_budget(shape, smaller, max_row_tokens=max_row_tokens, has_reference=has_reference)
        return budget.device_bytes <= device_bytes

    return _largest(fits, max_row_tokens, max(learner.tokens_per_micro_batch, max_row_tokens))


def _largest(fits: Callable[[int], bool], low: int, high: int) -> int:
    """Return the largest number in [low, high] that fits, 0 if ``low`` does not; what fits is not above what
    does not.
    """
    if fits(high):
        return high
    if not fits(low):
        return 0
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def _line(name: str, num_bytes: float, made_of: str, where: Literal["device", "host"] = "device") -> Line:
    return Line(name, math.ceil(num_bytes), where, made_of)


def _num_trained(shape: ModelShape, learner: LearnerConfig) -> int:
    return lora_parameters(shape, learner) if learner.lora.rank else shape.num_parameters


def _num_ranks(learner: LearnerConfig) -> int:
    return learner.data_parallel * learner.sequence_parallel


def _head_numbers(shape: ModelShape) -> int:
    return shape.sizes["vocab_size"] * shape.sizes["hidden_size"]


def _state(shape: ModelShape, learner: LearnerConfig) -> list[Line]:
    """Return parameters, gradients and moments, float32 and sharded over all ranks."""
    world, trained = _num_ranks(learner), _num_trained(shape, learner)
    count = shape.num_parameters + (trained if learner.lora.rank else 0)
    each = BYTES_8BIT_MOMENT if learner.optimizer == "adamw_8bit" else float(FLOAT_BYTES)
    where: Literal["device", "host"] = "host" if learner.has_optimizer_offload else "device"
    lines = [
        _line("parameters", FLOAT_BYTES * count / world, f"4 B x {count:,} / {world} ranks"),
        _line("gradients", FLOAT_BYTES * trained / world, f"4 B x {trained:,} / {world} ranks"),
        _line(
            "moments", 2 * each * trained / world, f"2 x {each:.3g} B x {trained:,} / {world} ranks", where
        ),
    ]
    if learner.has_optimizer_offload:
        made_of = f"parameters and gradients, 2 x 4 B x {trained:,} / {world} ranks"
        lines.append(_line("copies for the optimizer", 2 * FLOAT_BYTES * trained / world, made_of, "host"))
    return lines


def _copies(shape: ModelShape, learner: LearnerConfig) -> list[Line]:
    """Return what is computed with besides the parameters (``parallel/shard.py``), and gradients on their way
    to them.
    """
    world, number = _num_ranks(learner), compute_bytes(learner)
    head, layer = _head_numbers(shape), layer_parameters(shape)
    trained = _num_trained(shape, learner)
    is_whole = not learner.lora.rank  # the head and the embedding are trained
    lines = []
    if world == 1:
        if number != FLOAT_BYTES:
            count = shape.num_parameters + (0 if is_whole else trained)
            lines.append(_line("copy in bfloat16", number * count, f"{number} B x {count:,}"))
    else:
        share = trained // shape.sizes["num_hidden_layers"] if learner.lora.rank else layer
        lines += [
            _line("gathered embedding", number * head, f"with the final norm: {number} B x {head:,}"),
            _line("gathered head", number * head, f"{number} B x {head:,}"),
            _line(
                "gathered layers",
                3 * number * layer,
                f"one at work, the next, and where it arrives: 3 x {number} B x {layer:,}",
            ),
            _line(
                "gradients of a layer",
                (number + 2 * FLOAT_BYTES) * share,
                f"as made, and two layers' in float32 to be scattered: {number + 8} B x {share:,}",
            ),
        ]
        if is_whole:
            lines.append(
                _line("gradient of the head", FLOAT_BYTES * head, f"4 B x {head:,}, scattered once a step")
            )
    if is_whole:
        is_added_later = shape.is_tied and world == 1  # to the embedding's, when all layers are done
        each = FLOAT_BYTES + (number if is_added_later else 0)
        lines.append(
            _line("head's gradient of a micro-batch", each * head, f"{each} B x {head:,}, in float32 first")
        )
    return lines


def _reference(shape: ModelShape, learner: LearnerConfig) -> list[Line]:
    """Return the frozen starting model: float32, and as it is computed with."""
    world, number, count = _num_ranks(learner), compute_bytes(learner), shape.num_parameters
    lines = [_line("reference model", FLOAT_BYTES * count / world, f"4 B x {count:,} / {world} ranks")]
    if world > 1:
        head = _head_numbers(shape)
        lines.append(_line("gathered head of the reference", number * head, f"{number} B x {head:,}"))
    elif number != FLOAT_BYTES:
        lines.append(_line("reference in bfloat16", number * count, f"{number} B x {count:,}"))
    return lines


def _selective_bytes_per_token(shape: ModelShape, learner: LearnerConfig) -> float:
    size, number = shape.sizes, compute_bytes(learner)
    queries = size["num_attention_heads"] * size["head_dim"]
    wide = 2 * queries + 2 * size["hidden_size"] + size["intermediate_size"]
    return number * wide + FLOAT_BYTES * size["num_attention_heads"]


def _kept(shape: ModelShape, learner: LearnerConfig, tokens: int) -> list[Line]:
    """Return what a micro-batch keeps from its forward pass for backward."""
    number, hidden = compute_bytes(learner), shape.sizes["hidden_size"]
    num_layers, angles = shape.sizes["num_hidden_layers"], shape.sizes["head_dim"]
    if shape.is_recurrent and learner.recompute not in ("full", "offload"):
        return []
    # Final norm: its input widened, the scaled value, its result; cosines and sines of the positions.
    ends = hidden * (FLOAT_BYTES + 2 * number) + angles * number
    lines = [_line("final norm and positions", tokens * ends, f"{ends:,} B x {tokens:,} tokens")]
    where: Literal["device", "host"] = "device"
    if learner.recompute == "none":
        name, each = "layers", kept_bytes_per_token(shape, learner)
    else:
        name, each = "layer inputs", float(hidden * number)
        if learner.recompute == "selective":
            name, each = "kept of the layers", each + _selective_bytes_per_token(shape, learner)
        if learner.recompute == "offload":
            where, each = "host", each + angles * number  # cosines and sines go along with every layer
    made_of = f"{each:,.0f} B x {num_layers} x {tokens:,} tokens"
    return [*lines, _line(name, tokens * num_layers * each, made_of, where)]


def _head_moment(shape: ModelShape, learner: LearnerConfig, tokens: int) -> list[Line]:
    """Return what the loss of the head holds: a chunk of logits, states that predict and their gradients."""
    number, hidden = compute_bytes(learner), shape.sizes["hidden_size"]
    vocab = shape.sizes["vocab_size"]
    if learner.device == "cpu":  # logits and softmax, states and their gradients, and the head, in float32
        rows, row = min(max(128, CPU_CHUNK_NUMBERS // vocab), tokens), 2 * FLOAT_BYTES * vocab
        states = (number + FLOAT_BYTES + (number if number != FLOAT_BYTES else 0)) * hidden
        wide = FLOAT_BYTES * _head_numbers(shape) if number != FLOAT_BYTES else 0
    else:
        row = FLOAT_BYTES * (-(-vocab // _ALIGNMENT) * _ALIGNMENT)
        rows = max(128, min(HEAD_CHUNK_ROWS, HEAD_CHUNK_BYTES // row // 128 * 128, tokens))
        states, wide = 3 * number * hidden, 0
    return [
        _line("chunk of logits", rows * row, f"{rows:,} rows x {row:,} B"),
        _line("states that predict", tokens * states + wide, f"{states:,} B x {tokens:,} tokens at most"),
    ]


def _layer_moments(shape: ModelShape, learner: LearnerConfig, tokens: int, num_rows: int) -> list[list[Line]]:
    """Return what a layer in backward holds: with its feed-forward part, and with its attention, at work."""
    if shape.is_recurrent:
        return []
    size, number = shape.sizes, compute_bytes(learner)
    hidden, inner, heads = size["hidden_size"], size["intermediate_size"], size["num_attention_heads"]
    queries, keys = heads * size["head_dim"], size["num_key_value_heads"] * size["head_dim"]
    again = 0.0
    if learner.recompute != "none":
        again = kept_bytes_per_token(shape, learner)
        if learner.recompute == "offload":
            again += hidden * number
    made_of = f"{again:,.0f} B x {tokens:,} tokens"
    between = number * hidden  # more takes the place of what the final norm has given back
    feed = between + number * inner  # down_proj has given its input back
    first = [
        _line("one layer, recomputed", tokens * again, made_of),
        _line("gradients in a layer", tokens * feed, f"{feed:,} B x {tokens:,} tokens"),
    ]
    if learner.device == "cpu":
        return [first]
    done = 4 * inner * number + hidden * (FLOAT_BYTES + 2 * number) if again else 0  # given back already
    # Gradients of queries, keys and values, of the latter two for every query head at first.
    work = number * (2 * queries + 2 * keys + 2 * queries)
    if number != FLOAT_BYTES:  # flash attention adds queries' gradients in float32: deterministic, in parts
        num_parts = -(-NUM_MULTIPROCESSORS // (num_rows * heads))
        work += FLOAT_BYTES * queries * num_parts
    left = max(again - done, 0.0)
    second = [
        _line("one layer, recomputed", tokens * left, f"{left:,.0f} B x {tokens:,} tokens"),
        _line(
            "gradients in attention", tokens * (between + work), f"{between + work:,} B x {tokens:,} tokens"
        ),
    ]
    return [first, second]


def lora_parameters(shape: ModelShape, learner: LearnerConfig) -> int:
    """Return the number of trained parameters with adapters."""
    size, rank = shape.sizes, learner.lora.rank
    hidden, inner = size["hidden_size"], size["intermediate_size"]
    queries = size["num_attention_heads"] * size["head_dim"]
    keys = size["num_key_value_heads"] * size["head_dim"]
    widths = {
        "q_proj": hidden + queries, "k_proj": hidden + keys, "v_proj": hidden + keys, "o_proj": hidden +
        queries, "gate_proj": hidden + inner, "up_proj": hidden + inner, "down_proj": hidden + inner,
    }  # fmt: skip
    return rank * size["num_hidden_layers"] * sum(widths.get(name, 0) for name in learner.lora.targets)


# ---------------------------------------------------------------------------------------------------- time


class Flops(msgspec.Struct, frozen=True):
    """Floating-point operations of one step.

    Attributes:
        layers: forward and backward of the layers' matrix products.
        attention: forward and backward of causal attention, row by row.
        head: forward and backward of the output head, on action tokens alone.
        recomputed: what recomputation adds; not counted as the model's.
    """

    layers: float
    attention: float
    head: float
    recomputed: float

    @property
    def model(self) -> float:
        """The model's own: what MFU counts."""
        return self.layers + self.attention + self.head


def step_flops(
    shape: ModelShape, learner: LearnerConfig, row_tokens: Iterable[int], num_action_tokens: int
) -> Flops:
    """Count the operations of one step: a multiplication and an addition are two.

    Args:
        shape: of the model.
        learner: says what is recomputed.
        row_tokens: tokens of every row; attention is causal, so a row of T tokens has T (T + 1) / 2 pairs.
        num_action_tokens: tokens that go through the head.
    """
    size = shape.sizes
    rows = list(row_tokens)
    num_layers = size["num_hidden_layers"]
    tokens, pairs = sum(rows), sum(n * (n + 1) / 2 for n in rows)
    layers = 2.0 * layer_parameters(shape) * num_layers * tokens
    heads = size["num_attention_heads"] * size["head_dim"]
    attention = 4.0 * heads * pairs * shape.num_full_attention_layers
    head = 2.0 * size["vocab_size"] * size["hidden_size"] * num_action_tokens
    again = {
        "none": 0.0,
        "selective": 0.5 * layers,
        "full": layers + attention,
        "offload": layers + attention,
    }
    frozen = 2.0 if learner.lora.rank else 3.0  # the gradient of a frozen matrix is not computed
    return Flops(frozen * layers, 3.0 * attention, frozen * head, again[learner.recompute])
