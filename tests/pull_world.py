"""Runs with published versions, servers of them in threads of this process, and sources that misbehave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import publish
from cod_async.weights.pull.cache import PullCache
from cod_async.weights.pull.client import Puller
from cod_async.weights.pull.fetch import Patience
from cod_async.weights.pull.folder_source import FolderSource
from cod_async.weights.pull.keys import ServerKeys
from cod_async.weights.pull.protocol import AskChunk, AskFiles, Files
from cod_async.weights.pull.relay import RelaySource
from cod_async.weights.pull.server import Later, Source, WeightServer

RUN = "r"
LOOPBACK = "tcp://127.0.0.1:0"
CHUNK = 1000
"""Small and no divisor of anything, so that files have many chunks and a short last one."""
QUICK = Patience(retry_s=0.2, reconnect_s=0.4, max_reconnect_s=1.0, deadline_s=20.0)


def make_tensors(seed: int = 0, num_elements: int = 5000) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.weight": torch.randn(num_elements, generator=generator),
        "a.half": torch.randn(7, 11, generator=generator).to(torch.bfloat16),
        "c.empty": torch.zeros(0, 3),
    }


def publish_version(run_dir: Path, step: int, tensors: dict[str, torch.Tensor] | None = None) -> Manifest:
    config = run_dir / "model_config.json"
    config.write_text('{"architectures": ["Tiny"]}')
    return publish(
        run_dir, RUN, Version(0, step), tensors or make_tensors(step), keep_versions=3, config_file=config
    )


def same_files(run_dir: Path, cache: Path, manifest: Manifest) -> bool:
    """Whether the committed version in the cache is the published one, byte for byte."""
    names = [*(shard.file for shard in manifest.shards)]
    folder = str(Path(names[0]).parent)
    names += [f"{folder}/config.json", f"{folder}/manifest.json"]
    return all((run_dir / name).read_bytes() == (cache / name).read_bytes() for name in names) and len(
        names
    ) == len(list((cache / folder).iterdir()))


class OddSource(FolderSource):
    """A folder source that holds chunks back, or changes them.

    Attributes:
        allowed: chunks handed out before the next one is held back for good; None: all.
        is_held: set when a chunk is held back.
        asked: every chunk that was asked for, in order.
    """

    def __init__(
        self, run_dir: Path, *, run: str = RUN, chunk_bytes: int = CHUNK, allowed: int | None = None
    ) -> None:
        super().__init__(run_dir, run, chunk_bytes)
        self.allowed = allowed
        self.is_held = threading.Event()
        self.asked: list[AskChunk] = []
        self.change: Callable[[AskChunk, bytes, bytes], tuple[bytes, bytes]] = lambda ask, data, digest: (
            data,
            digest,
        )
        self.before: Callable[[AskFiles], None] = lambda ask: None
        self._held: list[Hashable] = []

    def files(self, ask: AskFiles) -> Files:
        self.before(ask)
        return super().files(ask)

    def chunk(self, ask: AskChunk) -> tuple[bytes, bytes] | Later:  # type: ignore[override]
        if self.allowed is not None and len(self.asked) >= self.allowed:
            self.is_held.set()
            self._held.append(ask)
            return Later(ask)
        self.asked.append(ask)
        return self.change(ask, *super().chunk(ask))

    def turn(self, now: float) -> list[Hashable]:
        """Let go of what was held back once more is allowed."""
        if self.allowed is not None and len(self.asked) >= self.allowed:
            return []
        held, self._held = self._held, []
        return held


class Serving:
    """A weight server in a thread."""

    def __init__(
        self,
        source: Source,
        *,
        bind: str = LOOPBACK,
        keys: ServerKeys | None = None,
        kept_bytes: int = 0,
        budget_bytes: int = 256 << 20,
    ) -> None:
        self.server = WeightServer(source, bind, keys=keys, kept_bytes=kept_bytes, budget_bytes=budget_bytes)
        self.address = self.server.address
        self._is_over = False
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    def _serve(self) -> None:
        while not self._is_over:
            self.server.turn(0.02)
        self.server.close()

    def close(self) -> None:
        self._is_over = True
        self._thread.join()


@contextmanager
def serving(source: Source, **options: object) -> Iterator[Serving]:
    served = Serving(source, **options)  # type: ignore[arg-type]
    try:
        yield served
    finally:
        served.close()


@contextmanager
def pulling(cache: Path, address: str | Callable[[], str | None], **options: object) -> Iterator[Puller]:
    addresses = (lambda: address) if isinstance(address, str) else address
    options.setdefault("patience", QUICK)
    puller = Puller(PullCache(cache, 2), addresses, **options)  # type: ignore[arg-type]
    try:
        yield puller
    finally:
        puller.close()


def relay_source(cache: Path, address: str | Callable[[], str | None], keep_versions: int = 2) -> RelaySource:
    addresses = (lambda: address) if isinstance(address, str) else address
    return RelaySource(PullCache(cache, keep_versions), addresses, patience=QUICK)


def pull_a_part(puller: Puller, manifest: Manifest, num_bytes: int) -> None:
    """Pull until ``num_bytes`` have come (the source must hold the rest back), then stop for good."""
    errors: list[WeightsError] = []

    def pull() -> None:
        try:
            puller.pull(manifest)
        except WeightsError as error:
            errors.append(error)

    thread = threading.Thread(target=pull)
    thread.start()
    while puller.counters.pulled_bytes < num_bytes:
        time.sleep(0.001)
    puller.stop()
    thread.join()
    assert len(errors) == 1
