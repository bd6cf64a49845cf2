"""What the engine client costs per generated token, against a bare HTTP loop on the same server.

Both send the same prompts with the same sampling parameters to one real SGLang server at the same
concurrency, in turns within one call, so that a busy machine hurts both alike. The bare loop is a
kept-alive aiohttp session that posts JSON, reads the answer whole, and decodes nothing but JSON. The client
validates ids, checks every answer, tracks versions and deadlines, and can be cancelled; with and without
streaming. Wall time per token is what an actor feels; CPU time of this process per token is what the client
itself costs.

Usage: ``python -m bench.pipeline.client_overhead [--url URL] [--concurrency C] [--rounds R] [--json FILE]``.
Without ``--url`` a server with a tiny random model is started on the CPU (``make sglang-env`` first).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import platform
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tests"))

import aiohttp
import sglang_world

from cod_async.config.schema import ServerConfig
from cod_async.engines.base import SamplingParams
from cod_async.engines.sglang.client import ServerClient

GOAL = 1.2
VARIANTS = ("bare", "client", "client_streaming")
Complete = Callable[[list[int], int], Awaitable[int]]


@contextlib.contextmanager
def server_url(url: str, folder: Path) -> Iterator[str]:
    """Yield the given server, or one that is started for the occasion, without keys."""
    if url:
        yield url
        return
    model = sglang_world.tiny_model(folder / "model", seed=0)
    with sglang_world.serving(model, folder / "server.log", has_keys=False) as server:
        yield server.url


def bare(session: aiohttp.ClientSession, url: str, num_tokens: int) -> Complete:
    """Return a completion by nothing but an HTTP post."""

    async def complete(prompt: list[int], number: int) -> int:
        body = {
            "input_ids": prompt,
            "sampling_params": {"max_new_tokens": num_tokens, "temperature": 1.0, "ignore_eos": True},
            "return_logprob": True,
        }
        async with session.post(f"{url}/generate", json=body) as answer:
            values = json.loads(await answer.read())
        return len(values["output_ids"])

    return complete


def through(client: ServerClient, num_tokens: int) -> Complete:
    """Return a completion by the project's client."""
    params = SamplingParams(max_tokens=num_tokens, stop_ids=frozenset())

    async def complete(prompt: list[int], number: int) -> int:
        generated = await client.generate(prompt, params, rid=f"bench-{number}", namespace="L0-S0")
        return len(generated.token_ids)

    return complete


class Round:
    """One round of one variant: so many completions, so many at once."""

    def __init__(self, complete: Complete, prompts: list[list[int]], concurrency: int, first: int) -> None:
        self._complete = complete
        self._left = list(enumerate(prompts, first))
        self._concurrency = concurrency
        self._num_tokens = 0

    async def _work(self) -> None:
        while self._left:
            number, prompt = self._left.pop()
            num_tokens = await self._complete(prompt, number)
            self._num_tokens += num_tokens  # not in one line: others add while this one waits

    async def run(self) -> tuple[float, float]:
        """Return wall and CPU microseconds per generated token."""
        started, cpu_started = time.perf_counter(), time.process_time()
        await asyncio.gather(*(self._work() for _ in range(self._concurrency)))
        wall_s, cpu_s = time.perf_counter() - started, time.process_time() - cpu_started
        return 1e6 * wall_s / self._num_tokens, 1e6 * cpu_s / self._num_tokens


async def measure(url: str, options: argparse.Namespace) -> dict[str, dict[str, list[float]]]:
    """Run all variants in turn, in an order that rotates; the first round is thrown away."""
    rng = random.Random(0)
    results: dict[str, dict[str, list[float]]] = {name: {"wall_us": [], "cpu_us": []} for name in VARIANTS}
    number = 0
    async with contextlib.AsyncExitStack() as stack:
        session = await stack.enter_async_context(
            aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        )
        completes = {"bare": bare(session, url, options.tokens)}
        for name, has_streaming in (("client", False), ("client_streaming", True)):
            settings = ServerConfig(has_streaming=has_streaming)
            client = ServerClient(url, settings=settings, vocab_size=sglang_world.VOCAB_SIZE)
            stack.push_async_callback(client.aclose)
            await client.info()
            completes[name] = through(client, options.tokens)
        for index in range(options.rounds + 1):
            for name in (*VARIANTS[index % 3 :], *VARIANTS[: index % 3]):
                prompts = [
                    [rng.randrange(256) for _ in range(options.prompt)] for _ in range(options.requests)
                ]
                wall_us, cpu_us = await Round(completes[name], prompts, options.concurrency, number).run()
                number += options.requests
                if index:
                    results[name]["wall_us"].append(wall_us)
                    results[name]["cpu_us"].append(cpu_us)
            print(f"round {index} of {options.rounds}", file=sys.stderr, flush=True)
    return results


def report(results: dict[str, dict[str, list[float]]], options: argparse.Namespace) -> dict[str, object]:
    """Return medians, and ratios to the bare loop round by round."""
    bare_us = results["bare"]["wall_us"]
    rows = [
        {
            "variant": name,
            "wall_us_per_token": round(statistics.median(values["wall_us"]), 1),
            "cpu_us_per_token": round(statistics.median(values["cpu_us"]), 1),
            "wall_ratio_to_bare": round(
                statistics.median(a / b for a, b in zip(values["wall_us"], bare_us, strict=True)), 3
            ),
        }
        for name, values in results.items()
    ]
    return {
        "machine": f"{platform.machine()}, {platform.processor() or platform.system()}",
        "concurrency": options.concurrency,
        "tokens_per_completion": options.tokens,
        "prompt_tokens": options.prompt,
        "rounds": options.rounds,
        "goal_ratio": GOAL,
        "rows": rows,
    }


def main() -> int:
    """Measure, print a table, write JSON if asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--url", default="", help="a running server without keys")
    parser.add_argument("--concurrency", type=int, default=32)
    parser.add_argument("--requests", type=int, default=128, help="completions per round and variant")
    parser.add_argument("--tokens", type=int, default=32, help="tokens per completion")
    parser.add_argument("--prompt", type=int, default=64, help="tokens per prompt")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if not options.url and not sglang_world.PYTHON.exists():
        print(f"{sglang_world.PYTHON} is missing: run `make sglang-env`, or give --url", file=sys.stderr)
        return 2
    with (
        tempfile.TemporaryDirectory(prefix="cod-bench-") as folder,
        server_url(options.url, Path(folder)) as url,
    ):
        answer = report(asyncio.run(measure(url, options)), options)
    print(f"{'variant':18} {'wall us/token':>14} {'CPU us/token':>14} {'ratio to bare':>14}")
    for row in answer["rows"]:  # type: ignore[attr-defined]
        print(
            f"{row['variant']:18} {row['wall_us_per_token']:14} {row['cpu_us_per_token']:14} "
            f"{row['wall_ratio_to_bare']:14}"
        )
    print(f"goal: at most {GOAL} at concurrency 32")
    if options.json:
        options.json.write_text(json.dumps(answer, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
