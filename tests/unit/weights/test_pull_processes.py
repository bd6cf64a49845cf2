"""Real processes killed in the middle: nothing is lost but time."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from pull_world import (
    CHUNK,
    QUICK,
    RUN,
    OddSource,
    make_tensors,
    publish_version,
    pulling,
    same_files,
    serving,
)

from cod_async.config.load import save_resolved
from cod_async.config.schema import Config, EnvironmentConfig, RunSection, WeightsConfig
from cod_async.weights.pull.cache import PullCache
from cod_async.weights.pull.client import Puller
from cod_async.weights.pull.server import ADDRESS_NAME, read_server_address

PULLER = """
import sys
from pathlib import Path
import msgspec
from cod_async.weights.manifest import Manifest
from cod_async.weights.pull.cache import PullCache
from cod_async.weights.pull.client import Puller
manifest = msgspec.json.decode(Path(sys.argv[1]).read_bytes(), type=Manifest)
puller = Puller(PullCache(Path(sys.argv[2]), 2), lambda: sys.argv[3])
puller.pull(manifest)
assert "torch" not in sys.modules
"""


def test_a_killed_puller_goes_on_where_it_was(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    said = tmp_path / "manifest.json"
    said.write_bytes((tmp_path / manifest.shards[0].file).with_name("manifest.json").read_bytes())
    source = OddSource(tmp_path, allowed=9)
    with serving(source) as served:
        argv = [sys.executable, "-c", PULLER, str(said), str(cache), served.address]
        process = subprocess.Popen(argv, process_group=0)
        try:
            header = len(f"{manifest.shards[0].sha256} {manifest.shards[0].num_bytes} {CHUNK}\n")
            journal = cache / "weights" / "L0000-S00000001.part" / ".model.safetensors.chunks"
            while process.poll() is None and not (
                journal.is_file() and journal.stat().st_size >= header + 9 * 40 and source.is_held.is_set()
            ):
                time.sleep(0.002)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        source.allowed = None
        assert subprocess.run(argv, check=False).returncode == 0
    assert set(source.asked[:9]).isdisjoint(source.asked[9:])  # what the killed process had is not asked for
    assert same_files(tmp_path, cache, manifest)


class Server:
    """``cod weights RUN``."""

    def __init__(self, run: Path) -> None:
        before = (run / ADDRESS_NAME).read_bytes() if (run / ADDRESS_NAME).is_file() else b""
        argv = [sys.executable, "-m", "cod_async", "weights", str(run)]
        self.process = subprocess.Popen(argv, process_group=0, stderr=subprocess.DEVNULL)
        while not (run / ADDRESS_NAME).is_file() or (run / ADDRESS_NAME).read_bytes() == before:
            assert self.process.poll() is None
            time.sleep(0.01)

    def end(self, number: int = signal.SIGTERM) -> int:
        if self.process.poll() is None:
            self.process.send_signal(number)
        return self.process.wait()


def test_the_server_is_killed_and_started_again_in_the_middle(tmp_path: Path) -> None:
    config = Config(
        environments=(EnvironmentConfig(name="hidden_buttons", preset="door"),),
        run=RunSection(name=RUN),
        weights=WeightsConfig(source="pull"),
    )
    save_resolved(config, tmp_path)
    manifest = publish_version(tmp_path, 1, make_tensors(1, 8 << 18))  # 8 MiB, 9 chunks
    servers = [Server(tmp_path)]
    cache = tmp_path / "cache"

    def clock(puller: list[Puller]) -> Callable[[], float]:
        """The puller's clock, which kills the server when two chunks have come."""

        def now() -> float:
            if puller and puller[0].counters.pulled_bytes >= 2 << 20 and len(servers) == 1:
                assert servers[0].end(signal.SIGKILL) == -signal.SIGKILL
                servers.append(Server(tmp_path))
            return time.monotonic()

        return now

    made: list[Puller] = []
    puller = Puller(
        PullCache(cache, 2),
        lambda: read_server_address(tmp_path),
        window=2,
        patience=QUICK,
        clock=clock(made),
    )
    made.append(puller)
    try:
        puller.pull(manifest)
        assert len(servers) == 2
        assert puller.counters.pulled_bytes < manifest.shards[0].num_bytes + (4 << 20)
    finally:
        puller.close()
        codes = [server.end() for server in servers]
    assert codes == [-signal.SIGKILL, 0]
    assert same_files(tmp_path, cache, manifest)


def test_flags_of_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    from cod_async.cli import main

    assert main(["weights"]) == 2
    assert main(["weights", str(tmp_path)]) == 2
    assert main(["weights", "--from", "tcp://10.0.0.1:5", "--cache", str(tmp_path / "c")]) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == 3
    assert "needs keys" in lines[2]


def test_a_relay_as_a_process(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    source = OddSource(tmp_path)
    with serving(source) as served:
        cache = tmp_path / "relay"
        argv = [sys.executable, "-m", "cod_async", "weights", "--from", served.address, "--cache", str(cache)]
        process = subprocess.Popen(argv, process_group=0, stderr=subprocess.DEVNULL)
        try:
            with pulling(tmp_path / "cache", lambda: read_server_address(cache)) as puller:
                puller.pull(manifest)
        finally:
            process.terminate()
            assert process.wait() == 0
    assert len(source.asked) == -(-manifest.shards[0].num_bytes // CHUNK)
    assert same_files(tmp_path, tmp_path / "cache", manifest)
