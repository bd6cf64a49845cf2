"""What a weight update costs a real SGLang server: seconds of pause, and generation lost, by transport and
mode.

A fixed load (so many requests at once, each of a fixed length) is timed with switches inside it and
without, in turns within one call; what a switch adds to the wall time is generation lost, in seconds and in
tokens. The pause is what :func:`cod_async.engines.sglang.switching.switch` reports: from the request to
pause until the server has resumed, checksums of all parameters compared in between. Versions are published
as the learner does it; two of them take turns, so every update changes every tensor.

Usage: ``python -m bench.pipeline.weight_updates [--sizes tiny,60m,0.6b] [--transports disk,group]
[--modes retract,in_place,idle] [--rounds R] [--json FILE]``; ``make sglang-env`` first.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import platform
import statistics
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, get_args

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import sglang_world
import torch

from cod_async.config.schema import ServerConfig, WeightsConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.pushes import push_for
from cod_async.engines.sglang.switching import SwitchMode, switch
from cod_async.lifecycle.segment import Version
from cod_async.weights.publish import publish
from cod_async.weights.source import PublishedWeights

TRANSPORTS = ("disk", "group")


@dataclass(frozen=True)
class Size:
    """A model to update and the load that it carries meanwhile."""

    shape: dict[str, int]
    dtype: str
    concurrency: int
    num_tokens: int
    is_tied: bool = False


SIZES = {
    "tiny": Size({"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 320,
                  "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}, "float32", 16, 96),
    "60m": Size({"hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 8, "vocab_size": 32_000,
                 "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64}, "float32", 8, 32),
    "0.6b": Size({"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
                  "vocab_size": 151_936, "num_attention_heads": 16, "num_key_value_heads": 8,
                  "head_dim": 128}, "bfloat16", 4, 8, is_tied=True),
}  # fmt: skip


@dataclass(frozen=True)
class Row:
    """Medians over the switches of one setting."""

    size: str
    num_parameters: int
    num_bytes: int
    transport: str
    mode: str
    pause_s: float
    push_s: float
    total_s: float
    lost_s: float
    lost_tokens: float
    tokens_per_s: float
    num_switches: int


def write_model(folder: Path, size: Size, seed: int) -> Path:
    """Write a random model directory of this size, with the tests' tokenizer."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    sglang_world.tiny_model(folder, seed)  # for its tokenizer
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = Qwen3Config(
            **size.shape, tie_word_embeddings=size.is_tied, max_position_embeddings=2048, eos_token_id=256,
            bos_token_id=None,
        )  # fmt: skip
        Qwen3ForCausalLM(config).to(getattr(torch, size.dtype)).save_pretrained(folder)
    return folder


def publish_two(run_dir: Path, size: Size) -> tuple[Path, list[PublishedWeights]]:
    """Return the starting model and two published versions of other weights."""
    from safetensors.torch import load_file

    model_dir = write_model(run_dir / "model", size, 0)
    versions = []
    for step in (1, 2):
        other = write_model(run_dir / "other", size, step)
        tensors = load_file(other / "model.safetensors")
        manifest = publish(run_dir, "bench", Version(0, step), tensors, 4, config_file=other / "config.json")
        versions.append(PublishedWeights.open(run_dir, manifest))
    return model_dir, versions


class Load:
    """The fixed load: ``concurrency`` requests at once, each of ``num_tokens``."""

    def __init__(self, client: ServerClient, size: Size, turns: int) -> None:
        self._client, self._size, self._turns = client, size, turns
        self._number = 0
        self.num_tokens = size.concurrency * turns * size.num_tokens

    async def run(self) -> float:
        """Carry it once; return wall seconds."""
        started = time.perf_counter()
        await asyncio.gather(*(self._one(index) for index in range(self._size.concurrency)))
        return time.perf_counter() - started

    async def _one(self, index: int) -> None:
        params = SamplingParams(max_tokens=self._size.num_tokens, stop_ids=frozenset())
        for turn in range(self._turns):
            self._number += 1
            prompt = [(index * 37 + turn * 11 + k) % 256 for k in range(64)]
            await self._client.generate(prompt, params, rid=f"load-{self._number}", namespace="bench")


async def measure(
    url: str, name: str, versions: list[PublishedWeights], options: argparse.Namespace
) -> list[Row]:
    """Measure every transport and mode on one server."""
    size, rows = SIZES[name], []
    client = ServerClient(url, settings=ServerConfig(), vocab_size=size.shape["vocab_size"])
    num_bytes = sum(tensor.nbytes for tensor in versions[0].tensors().values())
    num_parameters = sum(tensor.numel() for tensor in versions[0].tensors().values())
    try:
        await client.info()
        load = Load(client, size, options.turns)
        await load.run()  # warm
        for transport in options.transports:
            push = push_for(WeightsConfig(into_engine=transport), ServerConfig())
            try:
                for mode in options.modes:
                    reports, plain, switched = [], [], []
                    for index in range(options.rounds + 1):
                        plain_s = await load.run()
                        task = asyncio.create_task(load.run()) if mode != "idle" else None
                        if task is not None:
                            await asyncio.sleep(0.3 * plain_s)
                        report = await switch(client, push, versions[index % 2], mode, is_checked=True)
                        switched_s = await task if task is not None else plain_s + report.pause_s
                        if index:
                            reports.append(report)
                            plain.append(plain_s)
                            switched.append(switched_s)
                        await client.flush_cache()
                    lost_s = statistics.median(b - a for a, b in zip(plain, switched, strict=True))
                    rate = load.num_tokens / statistics.median(plain)
                    rows.append(
                        Row(
                            size=name, num_parameters=num_parameters, num_bytes=num_bytes,
                            transport=transport, mode=mode,
                            pause_s=round(statistics.median(r.pause_s for r in reports), 3),
                            push_s=round(statistics.median(r.push_s for r in reports), 3),
                            total_s=round(statistics.median(r.total_s for r in reports), 3),
                            lost_s=round(lost_s, 3), lost_tokens=round(lost_s * rate, 1),
                            tokens_per_s=round(rate, 1), num_switches=len(reports),
                        )
                    )  # fmt: skip
                    print(rows[-1], file=sys.stderr, flush=True)
            finally:
                await push.aclose()
    finally:
        await client.aclose()
    return rows


def table(rows: list[Row]) -> str:
    """Return the rows as Markdown."""
    lines = [
        "| model | bytes | transport | mode | pause s | push s | total s | lost s | lost tokens | tokens/s |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row.size} | {row.num_bytes / 1e6:,.1f} MB | {row.transport} | {row.mode} | {row.pause_s} | "
        f"{row.push_s} | {row.total_s} | {row.lost_s} | {row.lost_tokens:,.0f} | {row.tokens_per_s:,.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> int:
    """Measure all sizes, print the table, write JSON if asked."""

    def names(allowed: tuple[str, ...]) -> Any:
        def parse(text: str) -> list[str]:
            found = text.split(",")
            if wrong := [name for name in found if name not in allowed]:
                raise argparse.ArgumentTypeError(f"{wrong[0]!r} is none of {', '.join(allowed)}")
            return found

        return parse

    modes = get_args(SwitchMode)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=names(tuple(SIZES)), default=list(SIZES))
    parser.add_argument("--transports", type=names(TRANSPORTS), default=list(TRANSPORTS))
    parser.add_argument("--modes", type=names(modes), default=list(modes))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--turns", type=int, default=3, help="completions of each request slot per round")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not sglang_world.PYTHON.exists():
        print(f"{sglang_world.PYTHON} is missing: run `make sglang-env`", file=sys.stderr)
        return 2
    rows: list[Row] = []
    for name in options.sizes:
        with tempfile.TemporaryDirectory(prefix="cod-bench-") as folder:
            run_dir = Path(folder)
            model_dir, versions = publish_two(run_dir, SIZES[name])
            arguments = ("--dtype", SIZES[name].dtype)
            with sglang_world.serving(
                model_dir, run_dir / "server.log", *arguments, has_keys=False
            ) as server:
                rows += asyncio.run(measure(server.url, name, versions, options))
    print(table(rows))
    if options.json:
        answer = {"machine": f"{platform.machine()}, CPU", "rows": [asdict(row) for row in rows]}
        options.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
