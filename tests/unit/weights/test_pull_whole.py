"""A version pulled over loopback is the published one, whatever happens on the way."""

from __future__ import annotations

import asyncio
import os
import threading
from pathlib import Path

import pytest
from pull_world import (
    CHUNK,
    QUICK,
    RUN,
    OddSource,
    Serving,
    make_tensors,
    publish_version,
    pull_a_part,
    pulling,
    same_files,
    serving,
)

from cod_async.actor.weights_source import PulledWeights
from cod_async.errors import InputError, SupersededError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.digest import tensors_digest
from cod_async.weights.load import load_weights
from cod_async.weights.manifest import Manifest, Shard
from cod_async.weights.publish import SHARD_FILE, prune, published_versions, version_folder
from cod_async.weights.pull.cache import PullCache
from cod_async.weights.pull.client import Puller
from cod_async.weights.pull.fetch import Patience, Upstream
from cod_async.weights.pull.folder_source import FolderSource
from cod_async.weights.pull.protocol import AskChunk, Request, num_chunks, sha256
from cod_async.weights.source import PublishedWeights


def test_a_pulled_version_is_used_like_a_published_one(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    run.mkdir()
    manifest = publish_version(run, 1)
    with serving(FolderSource(run, RUN, CHUNK)) as served, pulling(cache, served.address) as puller:
        folder = puller.pull(manifest)
        assert folder == cache / version_folder(manifest.version)
        assert same_files(run, cache, manifest)
        assert tensors_digest(load_weights(cache, manifest)) == manifest.digest
        assert PublishedWeights.open(cache, manifest).architecture == "Tiny"
        counters = puller.counters.named()
        assert counters["weights_pulled_bytes"] == manifest.shards[0].num_bytes
        assert counters["weights_pulled_versions"] == 1
        puller.pull(manifest)  # it is there: nothing is asked
        assert puller.counters.pulled_bytes == manifest.shards[0].num_bytes


def test_requests_that_could_not_be_sent_do_not_count_as_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The connection is down for a moment: what was due goes out with the next turn, not after retry_s."""
    manifest = publish_version(tmp_path, 1)
    patience = Patience(retry_s=60, reconnect_s=60, max_reconnect_s=60, deadline_s=4)
    send = Upstream.send
    refused: list[AskChunk] = []

    def send_later(upstream: Upstream, request: Request) -> bool:
        if isinstance(request, AskChunk) and len(refused) < 8:
            refused.append(request)
            return False
        return send(upstream, request)

    monkeypatch.setattr(Upstream, "send", send_later)
    with (
        serving(FolderSource(tmp_path, RUN, CHUNK)) as served,
        pulling(tmp_path / "cache", served.address, patience=patience) as puller,
    ):
        puller.pull(manifest)
    assert len(set(refused)) == 8
    assert same_files(tmp_path, tmp_path / "cache", manifest)


def test_old_versions_leave_the_cache(tmp_path: Path) -> None:
    manifests = [publish_version(tmp_path, step) for step in (1, 2, 3)]
    cache = tmp_path / "cache"
    with serving(FolderSource(tmp_path, RUN, CHUNK)) as served, pulling(cache, served.address) as puller:
        for manifest in manifests:
            puller.pull(manifest)
    assert published_versions(cache) == [Version(0, 2), Version(0, 3)]


def test_a_pull_goes_on_where_an_earlier_one_stopped(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    source = OddSource(tmp_path, allowed=7)
    with serving(source) as served:
        with pulling(cache, served.address) as first:
            pull_a_part(first, manifest, 7 * CHUNK)
        assert published_versions(cache) == []
        source.allowed = None
        with pulling(cache, served.address) as second:
            second.pull(manifest)
            assert second.counters.resumed_bytes == 7 * CHUNK
            assert second.counters.pulled_bytes == manifest.shards[0].num_bytes - 7 * CHUNK
    assert same_files(tmp_path, cache, manifest)


def test_damaged_chunks_are_asked_for_again(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    source = OddSource(tmp_path)
    spoiled: set[int] = set()

    def spoil(ask: AskChunk, data: bytes, digest: bytes) -> tuple[bytes, bytes]:
        if ask.offset % (3 * CHUNK) or ask.offset in spoiled:
            return data, digest
        spoiled.add(ask.offset)
        return (data[:-1] if ask.offset else bytes(len(data))), digest

    source.change = spoil
    with serving(source) as served, pulling(cache, served.address) as puller:
        puller.pull(manifest)
        # At least once each: the server may hand the chunk that it read last out again as it has it.
        assert puller.counters.bad_chunks >= len(spoiled) >= 3
    assert same_files(tmp_path, cache, manifest)


def test_only_bad_data_comes_again_when_the_file_does_not_add_up(tmp_path: Path) -> None:
    """A chunk that was read wrongly at its source, and so has a right digest, is found by asking again."""
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    source = OddSource(tmp_path)
    num_asked = {"n": 0}

    def misread(ask: AskChunk, data: bytes, digest: bytes) -> tuple[bytes, bytes]:
        num_asked["n"] += ask.offset == 2 * CHUNK
        if ask.offset == 2 * CHUNK and num_asked["n"] == 1:
            data = bytes(len(data))
            return data, sha256(data)
        return data, digest

    source.change = misread
    with serving(source) as served, pulling(cache, served.address) as puller:
        puller.pull(manifest)
        assert puller.counters.bad_chunks == 1
        assert puller.counters.pulled_bytes == manifest.shards[0].num_bytes + CHUNK
    assert same_files(tmp_path, cache, manifest)


def test_what_is_damaged_at_its_source_is_never_committed(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    path = tmp_path / manifest.shards[0].file
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with serving(FolderSource(tmp_path, RUN, CHUNK)) as served, pulling(cache, served.address) as puller:
        with pytest.raises(WeightsError, match="damaged at its source"):
            puller.pull(manifest)
        assert published_versions(cache) == []
        data[-1] ^= 1
        path.write_bytes(data)
        puller.pull(manifest)
    assert same_files(tmp_path, cache, manifest)


def test_a_chunk_that_rots_in_the_cache_is_pulled_again(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    source = OddSource(tmp_path, allowed=9)
    with serving(source) as served:
        with pulling(cache, served.address) as first:
            pull_a_part(first, manifest, 9 * CHUNK)
        part = cache / f"{version_folder(manifest.version)}.part" / SHARD_FILE
        with part.open("r+b") as file:
            file.seek(4 * CHUNK)
            file.write(b"rot")
        source.allowed = None
        with pulling(cache, served.address) as second:
            second.pull(manifest)
            assert second.counters.resumed_bytes == 8 * CHUNK
    assert same_files(tmp_path, cache, manifest)


def test_the_server_moves_in_the_middle(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    source = OddSource(tmp_path, allowed=5)
    first = Serving(source)
    addresses = [first.address]
    with pulling(cache, lambda: addresses[-1]) as puller:
        thread = threading.Thread(target=puller.pull, args=(manifest,))
        thread.start()
        source.is_held.wait()
        first.close()
        with serving(FolderSource(tmp_path, RUN, CHUNK)) as second:
            addresses.append(second.address)
            thread.join()
    assert same_files(tmp_path, cache, manifest)


@pytest.mark.parametrize("has_address", [True, False])
def test_nobody_answers(tmp_path: Path, has_address: bool) -> None:
    manifest = publish_version(tmp_path, 1)
    impatient = Patience(retry_s=0.1, reconnect_s=0.1, max_reconnect_s=0.2, deadline_s=0.5)
    address = "tcp://127.0.0.1:9" if has_address else None
    with (
        pulling(tmp_path / "cache", lambda: address, patience=impatient) as puller,
        pytest.raises(
            WeightsError, match="no answer from tcp://127.0.0.1:9" if has_address else "has no address"
        ),
    ):
        puller.pull(manifest)


def test_a_version_that_is_gone_has_a_name(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    newer = publish_version(tmp_path, 2)
    source = OddSource(tmp_path)

    def prune_early(ask: AskChunk, data: bytes, digest: bytes) -> tuple[bytes, bytes]:
        if len(source.asked) == 3 and ask.version == manifest.version:
            prune(tmp_path, 1)
        return data, digest

    source.change = prune_early
    with serving(source) as served, pulling(cache, served.address) as puller:
        with pytest.raises(WeightsError, match=r"no_version: version 0\.1 was pruned.*newer version"):
            puller.pull(manifest)
        with pytest.raises(WeightsError, match="no_version"):
            puller.pull(manifest)
        puller.pull(newer)
    assert same_files(tmp_path, cache, newer)
    assert [path.name for path in (cache / "weights").iterdir()] == ["L0000-S00000002"]


def test_an_old_pull_is_given_up_once_and_then_not_again(tmp_path: Path) -> None:
    manifests = [publish_version(tmp_path, step) for step in (1, 2, 3)]
    cache = tmp_path / "cache"
    source = OddSource(tmp_path)
    with serving(source) as served, pulling(cache, served.address) as puller:
        source.before = lambda ask: puller.supersede(Version(0, ask.version.step + 1))
        with pytest.raises(SupersededError, match=r"given up for the newer version 0\.2"):
            puller.pull(manifests[0])
        puller.pull(manifests[1])
        with pytest.raises(WeightsError, match="given up"):
            puller.pull(manifests[2])
        assert puller.counters.abandoned_pulls == 2
    assert published_versions(cache) == [Version(0, 2)]


def test_other_weights_under_the_same_name(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    other = Manifest(RUN, manifest.version, "0" * 64, manifest.shards)
    elsewhere = Manifest("s", manifest.version, manifest.digest, manifest.shards)
    escaping = Manifest(RUN, manifest.version, manifest.digest, (Shard("weights/../x", "0" * 64, 3),))
    with (
        serving(FolderSource(tmp_path, RUN, CHUNK)) as served,
        pulling(tmp_path / "cache", served.address) as puller,
    ):
        for wrong, message in ((other, "other weights"), (elsewhere, "wrong_run"), (escaping, "not to be")):
            with pytest.raises(WeightsError, match=message):
                puller.pull(wrong)


def test_a_stale_version_of_the_same_name_is_replaced(tmp_path: Path) -> None:
    cache, run = tmp_path / "cache", tmp_path / "run"
    cache.mkdir()
    run.mkdir()
    publish_version(cache, 1, make_tensors(99))
    manifest = publish_version(run, 1)
    with serving(FolderSource(run, RUN, CHUNK)) as served, pulling(cache, served.address) as puller:
        puller.pull(manifest)
    assert same_files(run, cache, manifest)


def test_processes_of_one_host_share_a_cache(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    with (
        serving(FolderSource(tmp_path, RUN, CHUNK)) as served,
        pulling(cache, served.address) as one,
        pulling(cache, served.address) as other,
    ):
        threads = [threading.Thread(target=puller.pull, args=(manifest,)) for puller in (one, other)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert one.counters.pulled_bytes + other.counters.pulled_bytes == manifest.shards[0].num_bytes
        assert one.counters.pulled_versions + other.counters.pulled_versions == 1


def test_no_room_on_the_disk_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = publish_version(tmp_path, 1)

    def full(fd: int, data: bytes, offset: int) -> int:
        raise OSError(28, "No space left on device")

    with (
        serving(FolderSource(tmp_path, RUN, CHUNK)) as served,
        pulling(tmp_path / "cache", served.address) as puller,
    ):
        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", full)
            with pytest.raises(WeightsError, match=r"No space left on device.*make room"):
                puller.pull(manifest)
        puller.pull(manifest)


def test_a_server_beyond_this_machine_needs_keys(tmp_path: Path) -> None:
    manifest = publish_version(tmp_path, 1)
    with (
        pulling(tmp_path / "cache", "tcp://10.0.0.1:5000") as puller,
        pytest.raises(InputError, match="needs keys"),
    ):
        puller.pull(manifest)


def test_the_actors_side_fetches_and_stops(tmp_path: Path) -> None:
    manifest, cache = publish_version(tmp_path, 1), tmp_path / "cache"
    newer = publish_version(tmp_path, 2)
    source = OddSource(tmp_path)

    async def play(address: str) -> dict[str, float]:
        made = lambda: Puller(PullCache(cache, 2), lambda: address, patience=QUICK)  # noqa: E731
        weights = PulledWeights(cache, made)
        weights.announce(manifest)
        await weights.fetch(manifest)
        source.allowed = len(source.asked) + 2
        held = asyncio.create_task(weights.fetch(newer))
        while not source.is_held.is_set():
            await asyncio.sleep(0.005)
        held.cancel()
        await asyncio.gather(held, return_exceptions=True)
        await weights.aclose()
        return weights.counters()

    with serving(source) as served:
        counters = asyncio.run(play(served.address))
    assert counters["weights_pulled_versions"] == 1
    num_bytes = manifest.shards[0].num_bytes
    assert num_bytes <= counters["weights_pulled_bytes"] <= num_bytes + 2 * CHUNK
    assert num_chunks(num_bytes, CHUNK) > 10
    assert same_files(tmp_path, cache, manifest)
