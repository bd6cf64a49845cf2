"""A delta and its base make the published file again, byte for byte, or nothing at all."""

from __future__ import annotations

import resource
from pathlib import Path

import msgspec
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pull_world import (
    CHUNK,
    RUN,
    OddSource,
    make_tensors,
    publish_version,
    pull_a_part,
    pulling,
    same_files,
    serving,
)
from safetensors.numpy import load_file, save_file

from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.delta import (
    DELTA_FILE,
    DELTA_INFO_FILE,
    DeltaInfo,
    apply_delta,
    decode_info,
    write_delta,
)
from cod_async.weights.folders import file_sha256, version_folder
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import publish
from cod_async.weights.pull.fetch import Patience
from cod_async.weights.pull.protocol import AskChunk
from cod_async.weights.pull.server import Later
from cod_async.weights.source import PublishedWeights

DTYPES = [
    torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int8, torch.uint8,
    torch.bool, torch.float8_e4m3fn,
]  # fmt: skip
BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def flipped(tensor: torch.Tensor, share: float, generator: torch.Generator) -> torch.Tensor:
    """The tensor with random bits of a share of its elements turned over: NaN and -0.0 come out as well."""
    if tensor.dtype == torch.bool:
        return tensor ^ (torch.rand(tensor.shape, generator=generator) < share)
    bits = tensor.clone().view(BITS[tensor.element_size()])
    mask = torch.rand(bits.shape, generator=generator) < share
    noise = torch.randint(1, 100, bits.shape, generator=generator).to(bits.dtype)
    return torch.where(mask, bits ^ noise, bits).view(tensor.dtype)


def rebuild(run_dir: Path, base: Manifest, manifest: Manifest, info: DeltaInfo, out: Path) -> None:
    out.mkdir(exist_ok=True)
    apply_delta(run_dir, base, manifest, info, run_dir / version_folder(manifest.version) / DELTA_FILE, out)
    shard = manifest.shards[0]
    assert (out / "model.safetensors").read_bytes() == (run_dir / shard.file).read_bytes()
    assert file_sha256(out / "model.safetensors") == shard.sha256


@given(
    seed=st.integers(0, 2**31),
    shapes=st.lists(
        st.tuples(st.sampled_from(DTYPES), st.lists(st.integers(0, 40), max_size=2)), min_size=1, max_size=5
    ),
    share=st.sampled_from([0.0, 0.01, 0.2, 1.0]),
    fate=st.sampled_from(["same", "dropped", "new", "reshaped"]),
)
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_every_change_comes_back_to_the_bit(
    tmp_path_factory: pytest.TempPathFactory,
    seed: int,
    shapes: list[tuple[torch.dtype, list[int]]],
    share: float,
    fate: str,
) -> None:
    run_dir = tmp_path_factory.mktemp("run")
    generator = torch.Generator().manual_seed(seed)
    old = {
        f"t{i}": torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=generator).to(dtype)
        for i, (dtype, shape) in enumerate(shapes)
    }
    new = {name: flipped(tensor, share, generator) for name, tensor in old.items()}
    if fate == "dropped":
        old["extra"] = torch.ones(3)
    elif fate == "new":
        new["extra"] = torch.full((3,), float("nan"))
    elif fate == "reshaped":
        old["t0"] = torch.ones(2, 5, dtype=torch.int16)
    base = publish(run_dir, RUN, Version(0, 1), old, 4)
    manifest = publish(run_dir, RUN, Version(0, 2), new, 4)
    info = write_delta(run_dir, base, manifest, max_share=100.0)
    assert info is not None
    rebuild(run_dir, base, manifest, info, run_dir / "out")


def few_changed(run_dir: Path) -> tuple[Manifest, Manifest]:
    old = {
        "w": torch.randn(300, 200, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16),
        "kept": torch.zeros(100),
    }
    new = {name: tensor.clone() for name, tensor in old.items()}
    new["w"].view(-1)[::100] = float("nan")  # one percent
    return publish_version(run_dir, 1, old), publish_version(run_dir, 2, new)


def test_one_percent_changed_is_a_small_delta(tmp_path: Path) -> None:
    base, manifest = few_changed(tmp_path)
    info = write_delta(tmp_path, base, manifest)
    assert info is not None
    assert info.tensors == {"w": "sparse", "kept": "unchanged"}
    assert info.num_bytes < 600 * 4 + 1000  # a gap and a value of two bytes each, and the headers
    folder = tmp_path / version_folder(manifest.version)
    assert decode_info((folder / DELTA_INFO_FILE).read_bytes()) == info
    assert file_sha256(folder / DELTA_FILE) == info.sha256
    rebuild(tmp_path, base, manifest, info, tmp_path / "out")
    assert PublishedWeights.open(tmp_path, manifest).version == manifest.version  # it is in nobody's way


def test_signs_of_zero_and_kinds_of_nan_are_changes(tmp_path: Path) -> None:
    old = {"w": torch.zeros(4000)}
    new = {"w": torch.zeros(4000)}
    new["w"][7] = -0.0
    new["w"].view(torch.int32)[3999] = 0x7FC00001  # a NaN with a payload
    base, manifest = publish_version(tmp_path, 1, old), publish_version(tmp_path, 2, new)
    info = write_delta(tmp_path, base, manifest)
    assert info is not None
    parts = load_file(tmp_path / version_folder(manifest.version) / DELTA_FILE)
    assert parts["gaps/0"].tolist() == [7, 3992]
    assert parts["bits/0"].tolist() == [0x80000000, 0x7FC00001]
    rebuild(tmp_path, base, manifest, info, tmp_path / "out")


def test_far_apart_changes_need_wide_gaps(tmp_path: Path) -> None:
    old = {"w": torch.zeros(200_000, dtype=torch.int16)}
    new = {"w": old["w"].clone()}
    new["w"][-1] = 1
    base, manifest = publish_version(tmp_path, 1, old), publish_version(tmp_path, 2, new)
    info = write_delta(tmp_path, base, manifest)
    assert info is not None
    parts = load_file(tmp_path / version_folder(manifest.version) / DELTA_FILE)
    assert parts["gaps/0"].tolist() == [199_999]
    rebuild(tmp_path, base, manifest, info, tmp_path / "out")


def test_what_changed_too_much_gets_no_delta(tmp_path: Path) -> None:
    base, manifest = publish_version(tmp_path, 1), publish_version(tmp_path, 2)
    assert write_delta(tmp_path, base, manifest) is None
    assert not list((tmp_path / version_folder(manifest.version)).glob("*delta*"))


@pytest.mark.parametrize("damage", ["base", "version", "value", "order", "outside", "no part", "rubbish"])
def test_a_wrong_delta_leaves_nothing(tmp_path: Path, damage: str) -> None:
    base, manifest = few_changed(tmp_path)
    info = write_delta(tmp_path, base, manifest)
    assert info is not None
    path = tmp_path / version_folder(manifest.version) / DELTA_FILE
    parts = dict(load_file(path))
    gaps, bits = next(name for name in parts if name.startswith("gaps")), next(
        name for name in parts if name.startswith("bits")
    )  # fmt: skip
    match damage:
        case "base":
            info = msgspec.structs.replace(info, base_digest="0" * 64)
        case "version":
            info = msgspec.structs.replace(info, version=Version(0, 9))
        case "value":
            parts[bits] = parts[bits] + 1
        case "order":
            parts[bits] = parts[bits][:-1]
        case "outside":
            parts[gaps] = parts[gaps] + 1000
        case "no part":
            del parts[bits]
        case _:
            pass
    save_file(parts, path)
    if damage == "rubbish":
        path.write_bytes(b"\xff" * 100)
    out = tmp_path / "out"
    out.mkdir()
    with pytest.raises(WeightsError):
        apply_delta(tmp_path, base, manifest, info, path, out)
    assert list(out.iterdir()) == []


@given(st.binary(max_size=200))
@settings(max_examples=50, deadline=None)
def test_any_bytes_for_an_info_are_an_error_of_ours(data: bytes) -> None:
    with pytest.raises(WeightsError):
        decode_info(data)


def test_a_pull_takes_the_delta_if_it_has_the_base(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    run.mkdir()
    base, manifest = few_changed(run)
    info = write_delta(run, base, manifest)
    assert info is not None
    source = OddSource(run, chunk_bytes=5 * CHUNK)
    with serving(source) as served, pulling(cache, served.address) as puller:
        puller.pull(base)
        num_full_bytes = puller.counters.pulled_bytes
        puller.pull(manifest)
        assert puller.counters.pulled_bytes == num_full_bytes + info.num_bytes
        assert (puller.counters.delta_hits, puller.counters.delta_misses) == (1, 0)
        assert same_files(run, cache, manifest)
    with serving(source) as served, pulling(tmp_path / "empty", served.address) as puller:
        puller.pull(manifest)  # without the base: in full
        assert puller.counters.delta_hits == puller.counters.delta_misses == 0
    assert same_files(run, tmp_path / "empty", manifest)


@pytest.mark.parametrize("damage", ["delta", "base", "info"])
def test_a_delta_of_no_use_is_counted_and_the_version_comes_in_full(tmp_path: Path, damage: str) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    run.mkdir()
    base, manifest = few_changed(run)
    info = write_delta(run, base, manifest)
    assert info is not None
    folder = run / version_folder(manifest.version)
    with serving(OddSource(run, chunk_bytes=5 * CHUNK)) as served, pulling(cache, served.address) as puller:
        puller.pull(base)
        if damage == "delta":
            data = bytearray((folder / DELTA_FILE).read_bytes())
            data[-1] ^= 1
            (folder / DELTA_FILE).write_bytes(data)
        elif damage == "base":
            with (cache / base.shards[0].file).open("r+b") as file:
                file.seek(-1, 2)
                file.write(b"\x55")
        else:
            wrong = msgspec.structs.replace(info, digest="0" * 64)
            (folder / DELTA_INFO_FILE).write_bytes(msgspec.json.encode(wrong))
        puller.pull(manifest)
        assert (puller.counters.delta_hits, puller.counters.delta_misses) == (0, 1)
    assert same_files(run, cache, manifest)


class WithheldChunk(OddSource):
    """Answers everything but one chunk, however often that is asked for."""

    withheld: tuple[Version, int] | None = None

    def chunk(self, ask: AskChunk) -> tuple[bytes, bytes] | Later:  # type: ignore[override]
        return Later(ask) if (ask.version, ask.offset) == self.withheld else super().chunk(ask)


def test_a_pull_that_is_nearly_done_is_not_begun_again_for_a_delta(tmp_path: Path) -> None:
    run, cache = tmp_path / "run", tmp_path / "cache"
    run.mkdir()
    base, manifest = few_changed(run)
    source = WithheldChunk(run, chunk_bytes=5 * CHUNK)
    patient = Patience(retry_s=60, reconnect_s=60, max_reconnect_s=60, deadline_s=120)  # no chunk comes twice
    with serving(source) as served, pulling(cache, served.address, patience=patient) as puller:
        puller.pull(base)
        last = (manifest.shards[0].num_bytes - 1) // (5 * CHUNK) * (5 * CHUNK)
        source.withheld = (manifest.version, last)
        pull_a_part(puller, manifest, puller.counters.pulled_bytes + last)
    source.withheld = None
    info = write_delta(run, base, manifest)
    assert info is not None
    assert info.num_bytes > manifest.shards[0].num_bytes - last  # the delta is more than what is missing
    with serving(source) as served, pulling(cache, served.address) as puller:
        puller.pull(manifest)
        assert puller.counters.delta_hits == 0
        assert puller.counters.resumed_bytes == last
    assert same_files(run, cache, manifest)


def test_a_full_disk_is_an_error_that_the_learner_knows(tmp_path: Path) -> None:
    """It goes on without a delta then, see ``Learner._write_delta``; nothing of one is left."""
    base, manifest = few_changed(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        with pytest.raises(OSError, match="cannot be written"):
            write_delta(tmp_path, base, manifest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not list((tmp_path / version_folder(manifest.version)).glob("*delta*"))


def test_deltas_of_versions_made_of_tensors_with_several_sizes(tmp_path: Path) -> None:
    tensors = make_tensors(0)
    changed = dict(tensors)
    changed["a.half"] = -tensors["a.half"]
    base, manifest = publish_version(tmp_path, 1, tensors), publish_version(tmp_path, 2, changed)
    info = write_delta(tmp_path, base, manifest)
    assert info is not None
    assert info.tensors == {"a.half": "dense", "b.weight": "unchanged", "c.empty": "unchanged"}
    rebuild(tmp_path, base, manifest, info, tmp_path / "out")
