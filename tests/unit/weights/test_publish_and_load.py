"""Publication is atomic, loading trusts nothing."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import msgspec
import pytest
import torch

from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.digest import tensors_digest
from cod_async.weights.load import load_weights
from cod_async.weights.manifest import Manifest
from cod_async.weights.publish import prune, publish, published_versions, read_manifest, version_folder


def _tensors(seed: int = 0) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "b.weight": torch.randn(5, 3, generator=generator),
        "a.scale": torch.tensor(2.5),
        "c.half": torch.randn(4, 4, generator=generator).to(torch.bfloat16).t(),
        "d.empty": torch.zeros(0, 3),
    }


def test_round_trip_and_manifest(tmp_path: Path) -> None:
    tensors = _tensors()
    manifest = publish(tmp_path, "r", Version(0, 3), tensors, 4)
    assert manifest.shards[0].file == "weights/L0000-S00000003/model.safetensors"
    assert read_manifest(tmp_path, Version(0, 3)) == manifest
    loaded = load_weights(tmp_path, manifest)
    assert set(loaded) == set(tensors)
    assert all(torch.equal(loaded[k], tensors[k]) and loaded[k].dtype == tensors[k].dtype for k in tensors)
    assert not list((tmp_path / "weights").glob("*.tmp"))


def test_digest_is_the_documented_hash() -> None:
    tensors = {"b": torch.arange(3, dtype=torch.float32), "a": torch.ones(2, 2, dtype=torch.float64)}
    expected = hashlib.sha256()
    for name in ("a", "b"):
        dtype = "float64" if name == "a" else "float32"
        header = json.dumps([name, dtype, list(tensors[name].shape)], separators=(",", ":"))
        expected.update(header.encode() + b"\n" + tensors[name].numpy().tobytes())
    assert tensors_digest(tensors) == expected.hexdigest()
    assert tensors_digest(dict(reversed(tensors.items()))) == expected.hexdigest()


@pytest.mark.parametrize("change", ["name", "dtype", "shape", "value"])
def test_digest_sees_every_change(change: str) -> None:
    tensors = {"a": torch.zeros(2, 3)}
    other = {
        "name": {"b": torch.zeros(2, 3)},
        "dtype": {"a": torch.zeros(2, 3, dtype=torch.int32)},
        "shape": {"a": torch.zeros(3, 2)},
        "value": {"a": torch.full((2, 3), -0.0)},
    }[change]
    assert tensors_digest(tensors) != tensors_digest(other)


def test_same_version_twice(tmp_path: Path) -> None:
    first = publish(tmp_path, "r", Version(0, 1), _tensors(), 4)
    assert publish(tmp_path, "r", Version(0, 1), _tensors(), 4) == first
    with pytest.raises(WeightsError, match="open a new lineage"):
        publish(tmp_path, "r", Version(0, 1), _tensors(1), 4)


def test_pruning_keeps_the_newest_and_removes_leftovers(tmp_path: Path) -> None:
    for lineage, step in [(0, 0), (0, 1), (0, 9), (1, 5), (1, 6)]:
        publish(tmp_path, "r", Version(lineage, step), _tensors(step), 3)
    assert published_versions(tmp_path) == [Version(0, 9), Version(1, 5), Version(1, 6)]
    (tmp_path / "weights" / "L0001-S00000007.tmp").mkdir()
    (tmp_path / "weights" / "keep-me").mkdir()
    prune(tmp_path, 1)
    assert sorted(p.name for p in (tmp_path / "weights").iterdir()) == ["L0001-S00000006", "keep-me"]


def test_half_written_version_is_invisible_and_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / version_folder(Version(0, 2))
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"half")
    assert published_versions(tmp_path) == []
    with pytest.raises(WeightsError, match="no manifest"):
        read_manifest(tmp_path, Version(0, 2))
    manifest = publish(tmp_path, "r", Version(0, 2), _tensors(), 4)
    assert load_weights(tmp_path, manifest)
    (folder / "manifest.json").write_bytes(b'{"run": "r", "ver')
    with pytest.raises(WeightsError, match="is damaged"):
        read_manifest(tmp_path, Version(0, 2))


@pytest.mark.parametrize(
    ("damage", "part"),
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-1]), "instead of"),
        (lambda p: p.write_bytes(p.read_bytes() + b"x"), "more than"),
        (
            lambda p: p.write_bytes(bytes([p.read_bytes()[-1] ^ 1]).join([p.read_bytes()[:-1], b""])),
            "damaged",
        ),
        (lambda p: p.unlink(), "take a newer version"),
        (lambda p: (p.unlink(), p.symlink_to("/etc/hostname")), "outside the run folder"),
    ],
)
def test_damaged_shards_are_refused(tmp_path: Path, damage: object, part: str) -> None:
    manifest = publish(tmp_path, "r", Version(0, 1), _tensors(), 4)
    damage(tmp_path / manifest.shards[0].file)  # type: ignore[operator]
    with pytest.raises(WeightsError, match=part):
        load_weights(tmp_path, manifest)


def test_manifests_cannot_point_outside_or_lie(tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    manifest = publish(run_dir, "r", Version(0, 1), _tensors(), 4)
    (tmp_path / "secret").write_bytes(b"x")
    for file in ("../secret", "/etc/hostname", "weights/../../secret"):
        lie = msgspec.structs.replace(
            manifest, shards=(msgspec.structs.replace(manifest.shards[0], file=file),)
        )
        with pytest.raises(WeightsError, match="outside the run folder"):
            load_weights(run_dir, lie)
    lie: Manifest = msgspec.structs.replace(manifest, digest="0" * 64)
    with pytest.raises(WeightsError, match="do not belong together"):
        load_weights(run_dir, lie)
    double = msgspec.structs.replace(manifest, shards=manifest.shards * 2)
    with pytest.raises(WeightsError, match="two shards"):
        load_weights(run_dir, double)


def test_bytes_that_hash_right_but_are_not_safetensors(tmp_path: Path) -> None:
    manifest = publish(tmp_path, "r", Version(0, 1), _tensors(), 4)
    data = b"\xff" * 64
    (tmp_path / manifest.shards[0].file).write_bytes(data)
    shard = msgspec.structs.replace(
        manifest.shards[0], sha256=hashlib.sha256(data).hexdigest(), num_bytes=len(data)
    )
    with pytest.raises(WeightsError, match="not safetensors"):
        load_weights(tmp_path, msgspec.structs.replace(manifest, shards=(shard,)))


def test_a_version_that_disappears_is_a_named_error(tmp_path: Path) -> None:
    old = publish(tmp_path, "r", Version(0, 1), _tensors(), 2)
    for step in (2, 3):
        publish(tmp_path, "r", Version(0, step), _tensors(step), 2)
    with pytest.raises(WeightsError, match="take a newer version"):
        load_weights(tmp_path, old)
