"""Fake servers with published weights, and an engine over them."""

from __future__ import annotations

import asyncio
import json
import zlib
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any

import torch
from aiohttp import web
from fake_sglang import FakeServer, digest_of_folder, next_token
from msgspec.structs import replace
from safetensors.torch import save_file

from cod_async.config.schema import (
    ActorsConfig,
    Config,
    EngineConfig,
    EnvironmentConfig,
    ModelConfig,
    ServerConfig,
    WeightsConfig,
)
from cod_async.engines.base import Completion, SamplingParams
from cod_async.engines.sglang.engine import SGLangEngine
from cod_async.engines.sglang.records import ServerRecord
from cod_async.engines.sglang.slot import ServerSlot
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import publish, version_folder

VOCAB = 320
CONTEXT = 400
API_KEY, ADMIN_KEY = "key-of-all", "key-of-admins"

QUICK = ServerConfig(
    start_timeout_s=20.0,
    connect_timeout_s=2.0,
    stall_timeout_s=10.0,
    request_timeout_s=30.0,
    control_timeout_s=5.0,
    update_timeout_s=5.0,
    probe_every_s=0.02,
    probe_timeout_s=0.5,
    max_failed_probes=2,
    down_timeout_s=20.0,
)
OWN: dict[str, Any] = {"max_reprefill_frac": 1e6, "hold_timeout_s": 30.0}


class WatchedServer(FakeServer):
    """A fake server that notes what happens in which order.

    Attributes:
        events: (what, detail): ``start`` and ``end`` of requests with their namespace, ``update`` with its
            label and how many requests were in flight.
    """

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.events: list[tuple[str, Any]] = []
        self.update_gate: asyncio.Event | None = None

    async def _run(self, item: Any) -> None:
        self.events.append(("start", item.extra_key))
        try:
            await super()._run(item)
        finally:
            self.events.append(("end", item.extra_key))

    async def _load(self, body: dict[str, Any], weights: str) -> web.Response:
        self.events.append(("update", (body.get("weight_version"), len(self.running))))
        if self.update_gate is not None:
            await self.update_gate.wait()
        return await super()._load(body, weights)


def tensors_of(step: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return {
        "model.norm.weight": torch.randn(8, generator=generator),
        "model.layers.0.input_layernorm.weight": torch.randn(8, generator=generator),
    }


def make_model_dir(folder: Path, step: int = 0, **changes: Any) -> Path:
    folder.mkdir(parents=True)
    shape = {"architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCAB, "hidden_size": 8}
    (folder / "config.json").write_text(json.dumps(shape | {"num_hidden_layers": 1} | changes))
    save_file(tensors_of(step), folder / "model.safetensors")
    return folder


def make_config(**changes: Any) -> Config:
    """A config; ``server``, ``weights`` and ``actors`` are replaced field by field, all else is engine's."""
    server = replace(QUICK, **changes.pop("server", {}))
    weights = replace(WeightsConfig(), **changes.pop("weights", {}))
    actors = replace(ActorsConfig(lifecycles_per_process=8), **changes.pop("actors", {}))
    engine = EngineConfig(kind="sglang", server=server, **(OWN | changes))
    return Config(
        environments=(EnvironmentConfig(name="hidden_buttons", preset="door"),),
        model=ModelConfig(max_context_tokens=CONTEXT),
        engine=engine,
        weights=weights,
        actors=actors,
    )


class World:
    """A run folder, servers, and an engine over them."""

    def __init__(self, folder: Path, config: Config) -> None:
        self.run_dir = folder
        self.config = config
        self.model_dir = make_model_dir(folder / "model")
        self.servers: list[WatchedServer] = []
        self.records: list[ServerRecord] = []
        self.engine: SGLangEngine = None  # type: ignore[assignment]

    async def add(self, stack: AsyncExitStack, name: str = "", **arguments: Any) -> WatchedServer:
        arguments = {"model_dir": self.model_dir, "api_key": API_KEY, "admin_key": ADMIN_KEY} | arguments
        server = await stack.enter_async_context(WatchedServer(**arguments))
        self.servers.append(server)
        self.records.append(self.record(server, name or f"engine-{len(self.records)}"))
        return server

    def record(self, server: WatchedServer, name: str, instance: str = "1") -> ServerRecord:
        return ServerRecord(
            name=name, url=server.url, api_key=server.api_key, admin_key=server.admin_key, instance=instance
        )

    async def open(self) -> SGLangEngine:
        self.engine = await SGLangEngine.open(
            lambda: list(self.records), self.config, run_dir=self.run_dir, model_dir=self.model_dir
        )
        return self.engine

    def publish(self, step: int) -> Manifest:
        return publish(
            self.run_dir,
            "run",
            Version(0, step),
            tensors_of(step),
            64,
            config_file=self.model_dir / "config.json",
        )

    def weights(self, step: int) -> str:
        """What the fake server calls the weights of a version."""
        if step == 0:
            return digest_of_folder(self.model_dir)
        return digest_of_folder(self.run_dir / version_folder(Version(0, step)))

    def slot(self, number: int = 0) -> ServerSlot:
        return self.engine.pool.slots[self.records[number].name]

    async def until_up(self, *numbers: int) -> None:
        for number in numbers or range(len(self.records)):
            await until(lambda number=number: self.slot(number).admits(is_open=False))  # type: ignore[misc]

    def check(self, prompt: Sequence[int], completion: Completion) -> None:
        """Every token is what the weights of its version answer."""
        context, start = list(prompt), 0
        for span in completion.versions:
            weights = self.weights(span.version.step)
            for token in completion.token_ids[start : start + span.num_tokens]:
                assert token == next_token(context, weights, VOCAB)
                context.append(token)
            start += span.num_tokens
        assert start == len(completion.token_ids) == len(completion.logprobs)


@asynccontextmanager
async def world(
    folder: Path, num_servers: int = 1, *, config: Config | None = None, token_s: float = 0.0, **changes: Any
) -> AsyncIterator[World]:
    made = World(folder, config or make_config(**changes))
    async with AsyncExitStack() as stack:
        for _ in range(num_servers):
            await made.add(stack, token_s=token_s)
        await made.open()
        try:
            await made.until_up()
            yield made
        finally:
            await made.engine.aclose()


def params(max_tokens: int = 8, **changes: Any) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, stop_ids=frozenset(), **changes)


def prompt_of(number: int, length: int = 6) -> list[int]:
    return [zlib.crc32(f"{number} {i}".encode()) % 256 for i in range(length)]


async def until(is_so: Callable[[], bool]) -> None:
    while not is_so():
        await asyncio.sleep(0.001)


def run(coroutine: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(coroutine, 60))
