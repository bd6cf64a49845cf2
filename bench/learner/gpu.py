"""``python -m bench.learner.gpu``: the learner on one CUDA device, at the shape of Qwen3-0.6B.

Weights are random and made on the device, so nothing is downloaded. Rows are independent: one that fails is
recorded with its error, and one that no time is left for says so. Steps run as in a training run: bfloat16
products, float32 parameters and moments, packed rows, full recomputation, deterministic algorithms. MFU
counts the model's own operations (causal attention, recomputation not counted) against 989 TFLOP/s, which is
the dense bfloat16 peak of an H100 or H200; other devices get none. ``--device cpu --tiny`` tests the script.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import torch

from bench.kernels.measure import header, time_limit, write
from cod_async.config.schema import LearnerConfig, LossConfig
from cod_async.learner.budget import memory_budget, step_flops
from cod_async.learner.packing import FlatRows, flatten
from cod_async.learner.selftest import check_packing, random_items
from cod_async.learner.step import Trainer
from cod_async.models.attention import attend, attention_backend
from cod_async.models.layout import Layout
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.recompute import Recompute
from cod_async.models.shape import ModelShape

Row = dict[str, Any]
PEAK_FLOP_PER_S = {"H100": 989e12, "H200": 989e12}
SIZES = {
    "vocab_size": 151936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
    "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
}  # fmt: skip
TINY = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
FEW_LAYERS = 2
LR = 1e-6


class Setting(msgspec.Struct, frozen=True):
    """Where and how large.

    Attributes:
        device: of the model.
        sizes: of the model.
        num_tokens: of the packed step.
        row_tokens: of each of its rows.
        long_tokens: of the long row.
        longest_tokens: of the longest one.
        num_steps: timed ones.
    """

    device: str
    sizes: dict[str, int]
    num_tokens: int = 65536
    row_tokens: int = 4096
    long_tokens: int = 1 << 18
    longest_tokens: int = 1 << 20
    num_steps: int = 3

    @property
    def is_cuda(self) -> bool:
        """Whether there is a device to ask for its memory."""
        return self.device.startswith("cuda")


def shape_of(sizes: dict[str, int], num_layers: int | None = None) -> ModelShape:
    """Return the shape of a Qwen3 model with a tied head."""
    raw = {**sizes, "model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "tie_word_embeddings": True}
    raw |= {"max_position_embeddings": 1 << 20, "rms_norm_eps": 1e-6, "rope_theta": 1e6, "hidden_act": "silu"}
    raw["num_hidden_layers"] = num_layers or sizes["num_hidden_layers"]
    return ModelShape.of(raw)


def learner_of(setting: Setting, num_tokens: int, recompute: Recompute) -> LearnerConfig:
    """Return how everything here is trained."""
    return LearnerConfig(
        lr=LR,
        device="cuda" if setting.is_cuda else "cpu",
        compute_dtype="bfloat16",
        layout="packed",
        recompute=recompute,
        tokens_per_micro_batch=num_tokens,
    )


def make_trainer(
    setting: Setting, num_tokens: int, num_layers: int | None = None, recompute: Recompute = "full"
) -> Trainer:
    """Return a trainer of random weights, made on the device."""
    sizes: dict[str, Any] = {
        **setting.sizes,
        "num_hidden_layers": num_layers or setting.sizes["num_hidden_layers"],
    }
    config = Qwen3Config(**sizes, max_position_embeddings=1 << 20)
    with torch.device(setting.device):
        model = Qwen3(config, torch.Generator(setting.device).manual_seed(0))
    return Trainer.create(model, learner_of(setting, num_tokens, recompute), LossConfig(), 1.0)


def rows(setting: Setting, num_rows: int, row_tokens: int) -> FlatRows:
    """Return random rows of one length; all their tokens but two are action tokens."""
    vocab = setting.sizes["vocab_size"]
    return flatten(
        random_items(num_rows, vocab_size=vocab, min_tokens=row_tokens, max_tokens=row_tokens),
        vocab_size=vocab,
    )


def synchronize(setting: Setting) -> None:
    """Wait for the device."""
    if setting.is_cuda:
        torch.cuda.synchronize()


def steps(
    setting: Setting, trainer: Trainer, flat: FlatRows, count: int, num_layers: int | None = None
) -> Row:
    """Take a step to warm up and ``count`` timed ones; return rate, MFU and memory beside its forecast."""
    trainer.take_step(flat, 0)
    synchronize(setting)
    if setting.is_cuda:
        torch.cuda.reset_peak_memory_stats()
    times, metrics = [], {}
    for step in range(1, count + 1):
        trainer.timeline.begin(is_traced=False)
        began = time.perf_counter()
        metrics = trainer.take_step(flat, step)
        synchronize(setting)
        times.append(time.perf_counter() - began)
    shape, seconds = shape_of(setting.sizes, num_layers), statistics.median(times)
    lengths = flat.lengths.tolist()
    flops = step_flops(shape, trainer.learner, lengths, flat.num_action_tokens)
    is_deterministic = torch.are_deterministic_algorithms_enabled()
    budget = memory_budget(
        shape, trainer.learner, max_row_tokens=max(lengths), is_deterministic=is_deterministic
    )
    row: Row = {
        "num_layers": shape.sizes["num_hidden_layers"],
        "num_parameters": shape.num_parameters,
        "row_tokens": sorted(set(lengths)),
        "tokens": flat.num_tokens,
        "attention": attention_backend(setting.device, torch.bfloat16, "packed", setting.sizes["head_dim"]),
        "is_deterministic": is_deterministic,
        "step_s": times,
        "tokens_per_s": flat.num_tokens / seconds,
        "model_pflop": flops.model / 1e15,
        "mfu": None,
        "forecast_bytes": budget.device_bytes,
        "forecast_lines": {line.name: line.num_bytes for line in budget.lines},
        "peak_bytes": None,
        "times_s": trainer.timeline.metrics(),
        "grad_norm": metrics["grad_norm"],
    }
    if setting.is_cuda:
        name = torch.cuda.get_device_name(setting.device)
        peak = next((value for part, value in PEAK_FLOP_PER_S.items() if part in name), None)
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        row |= {
            "mfu": None if peak is None else flops.model / seconds / peak,
            "peak_bytes": allocated,
            "peak_reserved_bytes": reserved,
            "peak_over_forecast": allocated / budget.device_bytes,
        }
    return row


def packed_step(setting: Setting) -> Row:
    """64k tokens in rows of 4k, as one micro-batch."""
    trainer = make_trainer(setting, setting.num_tokens)
    flat = rows(setting, setting.num_tokens // setting.row_tokens, setting.row_tokens)
    return steps(setting, trainer, flat, setting.num_steps)


def packed_step_free(setting: Setting) -> Row:
    """The same without deterministic algorithms, which a run does not use: what they cost."""
    torch.use_deterministic_algorithms(False)
    return packed_step(setting)


def long_row(setting: Setting) -> Row:
    """One row of 256k tokens as a full step."""
    return steps(
        setting, make_trainer(setting, setting.long_tokens), rows(setting, 1, setting.long_tokens), 1
    )


def longest_row(setting: Setting) -> Row:
    """One row of 1M tokens with the compute of a few layers, and the memory of all of them: what the
    layers that are left out need is held as plain tensors. Layer inputs are in host memory (``offload``).
    """
    num_tokens, sizes = setting.longest_tokens, setting.sizes
    left_out = sizes["num_hidden_layers"] - min(FEW_LAYERS, sizes["num_hidden_layers"])
    torch.use_deterministic_algorithms(False)  # nine float32 copies of the queries' gradients would not fit
    trainer = make_trainer(setting, num_tokens, sizes["num_hidden_layers"] - left_out, "offload")
    full, few = shape_of(sizes), shape_of(sizes, FEW_LAYERS)
    inputs = torch.empty(left_out, num_tokens, sizes["hidden_size"], dtype=torch.bfloat16).fill_(0.0)
    missing = full.num_parameters - few.num_parameters
    state = torch.empty(missing, 18, dtype=torch.uint8, device=setting.device)  # 4 x 4 B and 2 B
    row = steps(setting, trainer, rows(setting, 1, num_tokens), 1, FEW_LAYERS)
    return row | {
        "label": f"memory of {sizes['num_hidden_layers']} layers, compute of {FEW_LAYERS}: not a full step",
        "held_for_missing_layers_bytes": {"host": inputs.nbytes, "device": state.nbytes},
    }


def checkpoint_pause(setting: Setting) -> Row:
    """How long the loop waits for a checkpoint to begin, beside a step; the second one, whose memory is
    there, and what the step after it takes longer.
    """
    from cod_async.learner.checkpoints.files import pieces_of
    from cod_async.learner.checkpoints.staging import Staging
    from cod_async.learner.checkpoints.state import named_state

    trainer = make_trainer(setting, setting.num_tokens)
    flat = rows(setting, setting.num_tokens // setting.row_tokens, setting.row_tokens)
    plain = steps(setting, trainer, flat, setting.num_steps)["step_s"]
    staging = Staging(torch.device(setting.device), trainer.optimizer)
    pauses, after = [], []
    for step in range(3):
        began = time.perf_counter()
        state = named_state(trainer.model, trainer.optimizer)
        staging.take({kind: pieces_of(tensors, 0) for kind, tensors in state.items()})
        pauses.append(time.perf_counter() - began)
        began = time.perf_counter()
        trainer.take_step(flat, step)
        synchronize(setting)
        after.append(time.perf_counter() - began)
        staging.finish()
    step_s = statistics.median(plain)
    lost = statistics.median(pauses[1:]) + max(0.0, statistics.median(after[1:]) - step_s)
    return {
        "step_s": plain,
        "pause_s": pauses,
        "step_after_s": after,
        "lost_frac_of_a_step": lost / step_s,
        "note": "copy to host memory; the first pause page-locks the memory",
    }


def attention_errors(setting: Setting) -> Row:
    """The attention kernel against float64, forward and backward; rows beyond one tile of it."""
    device, lengths = torch.device(setting.device), (1, 200, 77, 515)
    heads, keys, width = (
        setting.sizes[name] for name in ("num_attention_heads", "num_key_value_heads", "head_dim")
    )
    total = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(1, count, total, width, generator=generator) for count in (heads, keys, keys)]
    upstream = torch.randn(1, total, heads, width, generator=generator)

    def run(dtype: torch.dtype, is_reference: bool) -> list[torch.Tensor]:
        query, key, value = (part.bfloat16().to(device, dtype).detach().requires_grad_() for part in parts)
        if is_reference:
            done, begin = [], 0
            for length in lengths:
                rows = slice(begin, begin + length)
                begin += length
                many = [key, value]
                k, v = (x[:, :, rows].repeat_interleave(heads // keys, 1) for x in many)
                scores = query[:, :, rows] @ k.transpose(-1, -2) * width**-0.5
                mask = torch.ones(length, length, dtype=torch.bool, device=device).triu(1)
                done.append((scores.masked_fill(mask, -torch.inf).softmax(-1) @ v).transpose(1, 2))
            out = torch.cat(done, 1)
        else:
            out = attend(query, key, value, Layout("packed", lengths), scale=width**-0.5)
        out.backward(upstream.bfloat16().to(device, dtype))  # type: ignore[no-untyped-call]
        gradients = [x.grad for x in (query, key, value) if x.grad is not None]
        return [out.detach(), *gradients]

    found, exact = run(torch.bfloat16, is_reference=False), run(torch.float64, is_reference=True)
    errors = {
        name: float((one.double() - other).norm() / other.norm())
        for name, one, other in zip(("output", "query", "key", "value"), found, exact, strict=True)
    }
    backend = attention_backend(device, torch.bfloat16, "packed", width)
    return {
        "attention": backend,
        "relative_errors": errors,
        "is_within_bfloat16": max(errors.values()) < 0.02,
    }


def self_test(setting: Setting) -> Row:
    """The start-up test of rows laid out together, in the layout and type of training."""
    trainer = make_trainer(setting, 4096)
    error = check_packing(
        trainer.model, 1.0, 4096, 2048, kind=trainer.kind, logprobs=trainer.logprobs, is_bfloat16=True
    )
    return {"largest_difference": error, "kind": trainer.kind}


ROWS: dict[str, tuple[Callable[[Setting], Row], float]] = {
    "attention_errors": (attention_errors, 60.0),
    "self_test": (self_test, 60.0),
    "packed_64k": (packed_step, 90.0),
    "long_row_256k": (long_row, 150.0),
    "checkpoint_pause": (checkpoint_pause, 90.0),
    "longest_row_1m_few_layers": (longest_row, 120.0),
    "packed_64k_not_deterministic": (packed_step_free, 60.0),
}
"""What is measured, in this order, and the most seconds that each may take."""


def measure(setting: Setting, seconds: float, on_row: Callable[[dict[str, Row]], None]) -> dict[str, Row]:
    """Measure all rows; each failure is recorded with its error.

    Args:
        setting: where and how large.
        seconds: for everything; rows for which nothing is left say so.
        on_row: called with what there is after every row, so that a kill loses no finished one.
    """
    results: dict[str, Row] = {}
    began = time.monotonic()
    for name, (run, most_s) in ROWS.items():
        left = seconds - (time.monotonic() - began)
        started = time.monotonic()
        try:
            if left <= 1:
                raise TimeoutError("no time was left")
            torch.use_deterministic_algorithms(True)
            with time_limit(min(left, most_s)):
                results[name] = run(setting)
        except Exception as error:  # whatever a kernel, a full memory or the clock may raise
            first = str(error).strip().splitlines()
            results[name] = {"error": f"{type(error).__name__}: {first[0][:300] if first else ''}"}
        finally:
            torch.use_deterministic_algorithms(False)
        results[name]["row_s"] = round(time.monotonic() - started, 1)
        if setting.is_cuda:
            import gc

            gc.collect()
            torch.cuda.empty_cache()
        on_row(results)
    return results


def main() -> int:
    """Measure, print a line per row, write JSON if asked; return 1 if a row failed."""
    parser = argparse.ArgumentParser(prog="python -m bench.learner.gpu", description=__doc__)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="a shape for testing this script")
    parser.add_argument("--seconds", type=float, default=420.0, help="for everything")
    parser.add_argument("--json", type=Path, help="written after every row")
    arguments = parser.parse_args()
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here; --device cpu --tiny tests the script")
    if arguments.device == "cpu" and not arguments.tiny:
        parser.error("--device cpu needs --tiny: nothing is estimated")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    setting = Setting(arguments.device, SIZES)
    if arguments.tiny:
        setting = Setting(arguments.device, TINY, 512, 128, 512, 1024, 1)
    document = header(torch.device(arguments.device)) | {"bench": "learner.gpu", "is_tiny": arguments.tiny}

    def keep(results: dict[str, Row]) -> None:
        name, row = list(results.items())[-1]
        shown = {key: value for key, value in row.items() if key not in ("forecast_lines", "times_s")}
        print(f"{name}: {json.dumps(shown)}", flush=True)
        if arguments.json is not None:
            write(arguments.json, document | {"settings": msgspec.to_builtins(setting), "rows": results})

    results = measure(setting, arguments.seconds, keep)
    return 1 if any("error" in row for row in results.values()) else 0


if __name__ == "__main__":
    sys.exit(main())
