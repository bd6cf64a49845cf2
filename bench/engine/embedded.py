"""Throughput of the embedded engine on one core: ``python -m bench.engine.embedded``.

A closed loop of sessions keeps the batch full the way an actor does: every session sends a prompt, takes its
completion (8 to 40 tokens, drawn per turn, so that rows end at different times), optionally goes on with
further turns that extend the row, closes, and starts anew at once. Weights are random and of the quickstart's
shape; speed does not depend on values. Reported per CPU second of this process and per wall second; on a busy
machine only the former means much.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cod_async.config.schema import EngineConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.embedded import EmbeddedEngine
from cod_async.lifecycle.segment import Version
from cod_async.models.qwen3 import Qwen3, Qwen3Config

BAR = 15_000
"""Generated tokens per second and core that the project asks for at batch 128."""


def make_model(arguments: argparse.Namespace) -> Qwen3:
    """Random weights of the quickstart's shape."""
    config = Qwen3Config(
        vocab_size=arguments.vocab_size,
        hidden_size=arguments.hidden_size,
        intermediate_size=3 * arguments.hidden_size,
        num_hidden_layers=arguments.num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=arguments.hidden_size // 4,
    )
    return Qwen3(config, torch.Generator().manual_seed(0)).eval()


async def session_loop(
    engine: EmbeddedEngine, number: int, arguments: argparse.Namespace, deadline: list[float]
) -> None:
    """One session after the other until the deadline (mutable, so that the warm-up can end first)."""
    random = np.random.default_rng(number)
    episode = 0
    while time.perf_counter() < deadline[0]:
        name = f"{number}-{episode}"
        row = random.integers(0, arguments.vocab_size, arguments.prompt_tokens).tolist()
        for turn in range(arguments.turns):
            params = SamplingParams(
                max_tokens=int(random.integers(arguments.min_tokens, arguments.max_tokens + 1)),
                stop_ids=frozenset(),  # lengths are drawn, not sampled, so that runs are comparable
                seed=(number << 32) + (episode << 8) + turn,
            )
            completion = await engine.generate(row, params, session=name)
            row += completion.token_ids
            row += random.integers(0, arguments.vocab_size, arguments.delta_tokens).tolist()
        await engine.close_session(name)
        episode += 1


async def measure(arguments: argparse.Namespace, *, is_batch_invariant: bool) -> dict[str, Any]:
    """Run the closed loop and count what the engine sampled after the warm-up."""
    config = EngineConfig(max_running=arguments.batch, is_batch_invariant=is_batch_invariant)
    longest = arguments.prompt_tokens + arguments.turns * (arguments.max_tokens + arguments.delta_tokens)
    with tempfile.TemporaryDirectory() as folder:
        engine = EmbeddedEngine(
            make_model(arguments),
            config,
            max_context_tokens=longest + 1,
            version=Version(0, 0),
            run_dir=Path(folder),
        )
        deadline = [time.perf_counter() + arguments.warmup_s + arguments.seconds]
        loops = [
            asyncio.create_task(session_loop(engine, number, arguments, deadline))
            for number in range(arguments.batch)
        ]
        await asyncio.sleep(arguments.warmup_s)
        before = (engine.counters.sampled_tokens, engine.counters.prefilled_tokens, engine.counters.busy_s)
        wall, cpu = time.perf_counter(), time.process_time()
        await asyncio.sleep(arguments.seconds)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
        sampled = engine.counters.sampled_tokens - before[0]
        prefilled = engine.counters.prefilled_tokens - before[1]
        busy = engine.counters.busy_s - before[2]
        deadline[0] = 0.0
        await asyncio.gather(*loops)
        await engine.aclose()
    return {
        "mode": "batch_invariant" if is_batch_invariant else "default",
        "batch": arguments.batch,
        "turns": arguments.turns,
        "sampled_tokens": sampled,
        "prefilled_tokens": prefilled,
        "wall_s": round(wall, 3),
        "cpu_s": round(cpu, 3),
        "sampled_tokens_per_cpu_s": round(sampled / cpu),
        "sampled_tokens_per_wall_s": round(sampled / wall),
        "prefilled_tokens_per_cpu_s": round(prefilled / cpu),
        "engine_busy_frac": round(busy / wall, 3),
        "bar_ratio": round(sampled / cpu / BAR, 2),
    }


def print_table(results: list[dict[str, Any]]) -> None:
    """Print one line per run."""
    columns = [
        "mode",
        "batch",
        "turns",
        "sampled_tokens_per_cpu_s",
        "sampled_tokens_per_wall_s",
        "prefilled_tokens_per_cpu_s",
        "engine_busy_frac",
        "bar_ratio",
    ]
    rows = [columns, *([str(result[column]) for column in columns] for result in results)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    for row in rows:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)))


def main() -> int:
    """Measure, print a table, and write JSON if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=5.0, help="measured time per run")
    parser.add_argument("--warmup-s", type=float, default=1.0)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--turns", type=int, default=1, help="turns per session; 1 = every prompt is new")
    parser.add_argument("--prompt-tokens", type=int, default=40)
    parser.add_argument("--delta-tokens", type=int, default=4, help="context tokens added between two turns")
    parser.add_argument("--min-tokens", type=int, default=8)
    parser.add_argument("--max-tokens", type=int, default=40)
    parser.add_argument("--hidden-size", type=int, default=64)
    parser.add_argument("--num-layers", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=119)
    parser.add_argument("--modes", nargs="+", default=["default", "batch_invariant"])
    parser.add_argument("--json", type=Path, help="write the results here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    results = [
        asyncio.run(measure(arguments, is_batch_invariant=mode == "batch_invariant"))
        for mode in arguments.modes
    ]
    print_table(results)
    document = {
        "bench": "engine.embedded",
        "bar_tokens_per_s": BAR,
        "machine": {"cpu": platform.processor() or platform.machine(), "load": os.getloadavg()[0]},
        "torch": torch.__version__,
        "results": results,
    }
    if arguments.json:
        arguments.json.write_text(json.dumps(document, indent=2) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
