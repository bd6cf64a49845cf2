"""A published version as a model directory: what is handed on is what was checked."""

from __future__ import annotations

import json
import os
from pathlib import Path

import msgspec
import pytest
import torch
from learner_world import tiny_model
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from cod_async.engines.sglang.protocol import version_label
from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.models.directory import load_model, save_model, weights_of
from cod_async.weights.manifest import Manifest, Shard
from cod_async.weights.publish import publish, version_folder
from cod_async.weights.source import PublishedWeights


def _publish(root: Path, step: int = 1, *, keep: int = 4, seed: int = 0) -> Manifest:
    model = tiny_model(seed)
    save_model(root / "model", model)
    config = root / "model" / "config.json"
    return publish(root, "r", Version(0, step), weights_of(model), keep, config_file=config)


def test_a_version_is_a_model_directory_for_everybody(tmp_path: Path) -> None:
    source = PublishedWeights.open(tmp_path, _publish(tmp_path))
    assert source.folder == (tmp_path / "weights" / "L0000-S00000001").resolve()
    assert (source.architecture, source.is_tied) == ("Qwen3ForCausalLM", True)
    assert source.config == json.loads((tmp_path / "model" / "config.json").read_text())
    ids = torch.tensor([[3, 1, 4, 1, 5, 9]])
    model = tiny_model(0)
    with torch.no_grad():
        expected = model(ids) @ model.head_weight.T
        theirs = AutoModelForCausalLM.from_pretrained(source.folder, dtype=torch.float32).eval()
        torch.testing.assert_close(theirs(ids).logits, expected, atol=1e-5, rtol=1e-5)
    ours = weights_of(load_model(source.folder))
    assert ours.keys() == source.tensors().keys()
    assert all(torch.equal(tensor, ours[name]) for name, tensor in source.tensors().items())


@pytest.mark.parametrize("version", [Version(0, 0), Version(3, 12), Version(10, 123_456_789)])
def test_the_label_is_the_one_that_engines_understand(tmp_path: Path, version: Version) -> None:
    manifest = Manifest(run="r", version=version, digest="", shards=())
    assert PublishedWeights(manifest, tmp_path, {}, {}).label == version_label(version)


def test_tensors_outlive_the_folder(tmp_path: Path) -> None:
    source = PublishedWeights.open(tmp_path, _publish(tmp_path, 1, keep=2))
    for step in (2, 3):
        _publish(tmp_path, step, keep=2, seed=step)
    assert not source.folder.exists()
    expected = weights_of(tiny_model(0))
    assert all(torch.equal(tensor, expected[name]) for name, tensor in source.tensors().items())
    with pytest.raises(WeightsError, match="pruned"):
        PublishedWeights.open(tmp_path, source.manifest)


def _damage(folder: Path, manifest: Manifest, how: str) -> Manifest:
    shard = folder / "model.safetensors"
    data = shard.read_bytes()
    if how == "bit":
        shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    elif how == "short":
        shard.write_bytes(data[:-1])
    elif how == "no safetensors":
        shard.write_bytes(b"\xff" * len(data))
    elif how == "gone":
        shard.unlink()
    elif how == "link":
        target = folder.parent / "elsewhere"
        os.replace(shard, target)
        shard.symlink_to(target)
    elif how == "stowaway":
        save_file({"model.norm.weight": torch.zeros(16)}, folder / "zz.safetensors")
    elif how == "no config":
        (folder / "config.json").unlink()
    elif how == "bad config":
        (folder / "config.json").write_text("[1]")
    elif how == "torn config":
        (folder / "config.json").write_text('{"a"')
    elif how == "digest":
        return msgspec.structs.replace(manifest, digest="0" * 64)
    elif how == "twice":
        (folder / "other.safetensors").write_bytes(data)
        again = msgspec.structs.replace(
            manifest.shards[0], file=f"{version_folder(manifest.version)}/other.safetensors"
        )
        return msgspec.structs.replace(manifest, shards=(*manifest.shards, again))
    return manifest


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("bit", "hash to"),
        ("short", "bytes instead of"),
        ("no safetensors", "is not safetensors"),
        ("gone", "cannot be read"),
        ("link", "or is a link"),
        ("stowaway", "zz.safetensors is not in the manifest"),
        ("no config", "config.json is missing"),
        ("bad config", "no JSON object"),
        ("torn config", "as JSON"),
        ("digest", "hash to"),
        ("twice", "is in two shards"),
    ],
)
def test_damage_is_named_and_nothing_is_handed_on(tmp_path: Path, how: str, said: str) -> None:
    manifest = _publish(tmp_path)
    manifest = _damage(tmp_path / version_folder(manifest.version), manifest, how)
    with pytest.raises(WeightsError, match=said) as caught:
        PublishedWeights.open(tmp_path, manifest)
    assert str(manifest.version) in str(caught.value)


@pytest.mark.parametrize(
    "file",
    [
        "../model/model.safetensors",
        "weights/L0000-S00000002/model.safetensors",
        "weights/L0000-S00000001/../L0000-S00000002/model.safetensors",
        "weights/L0000-S00000001/model.bin",
        "/etc/passwd",
        "weights/L0000-S00000001/",
    ],
)
def test_a_manifest_cannot_name_files_elsewhere(tmp_path: Path, file: str) -> None:
    manifest = _publish(tmp_path)
    shard = Shard(file=file, sha256=manifest.shards[0].sha256, num_bytes=manifest.shards[0].num_bytes)
    with pytest.raises(WeightsError, match="is not to be trusted"):
        PublishedWeights.open(tmp_path, msgspec.structs.replace(manifest, shards=(shard,)))


def test_versions_without_a_config_are_refused_by_name(tmp_path: Path) -> None:
    manifest = publish(tmp_path, "r", Version(0, 1), {"a": torch.ones(2)}, 2)
    with pytest.raises(WeightsError, match="published without the model's config"):
        PublishedWeights.open(tmp_path, manifest)


def test_dtypes_and_odd_shapes_survive(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    tensors = {
        "half": torch.randn(3, 5).to(torch.bfloat16),
        "one": torch.tensor(2.0),
        "none": torch.zeros(0, 4),
    }
    manifest = publish(tmp_path, "r", Version(1, 2), tensors, 2, config_file=tmp_path / "config.json")
    found = PublishedWeights.open(tmp_path, manifest).tensors()
    assert all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype
        for name, tensor in tensors.items()
    )
    assert PublishedWeights.open(tmp_path, manifest).architecture == ""
