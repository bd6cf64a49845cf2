"""What ranks do together besides computing: failing, telling, publishing."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from parallel_world import mixed_job, model_of
from pull_world import CHUNK, RUN, pulling, serving
from ranks import LOOPBACK, run_ranks
from safetensors.torch import load_file

from cod_async.config.learner import LearnerConfig
from cod_async.errors import InputError
from cod_async.learner.parallel.world import RENDEZVOUS_VARIABLE, World, _meet, device_of
from cod_async.models.export import weights_of
from cod_async.weights.delta import write_delta
from cod_async.weights.digest import tensors_digest
from cod_async.weights.load import load_weights
from cod_async.weights.manifest import Manifest
from cod_async.weights.pull.folder_source import FolderSource
from cod_async.weights.sharded import deal
from cod_async.weights.source import PublishedWeights

FAILING = [
    {"data": 2, "poison": 3},
    {"sequence": 2, "poison": 3},
    {"data": 2, "poison": 3, "loss": {"clip": "m2po"}},
]


@pytest.fixture(scope="module")
def results() -> Iterator[list[dict[str, Any]]]:
    found = run_ranks(2, mixed_job, FAILING)
    yield found
    shutil.rmtree(found[0]["folder"])


@pytest.mark.parametrize("number", range(len(FAILING)))
def test_a_value_that_is_not_finite_on_one_rank_is_refused_by_all_and_changes_nothing(
    results: list[dict[str, Any]], number: int
) -> None:
    errors = [result[f"{number}:error"] for result in results]
    assert errors[0] == errors[1]
    assert "step 0" in errors[0] and "not applied" in errors[0]
    assert all(result[f"{number}:is_untouched"] for result in results)
    losses = [result[f"{number}:loss"] for result in results]
    assert losses[0] == losses[1]


def test_words_between_ranks(results: list[dict[str, Any]]) -> None:
    assert [result["told"] for result in results] == [True, True]
    assert [result["problem"] for result in results] == ["from 1 (rank 1)"] * 2
    assert [result["no_problem"] for result in results] == [None, None]
    assert all("there are 2 ranks" in result["mesh"] and "is 3" in result["mesh"] for result in results)


def test_weights_published_from_shards_are_those_of_one_process(results: list[dict[str, Any]]) -> None:
    manifests = [msgspec.json.decode(result["manifest"], type=Manifest) for result in results]
    assert manifests[0] == manifests[1]
    assert results[0]["again"] == results[0]["manifest"]
    manifest, run_dir = manifests[0], Path(results[0]["folder"])
    expected = weights_of(model_of(is_tied=False, dtype="float32"))
    assert manifest.digest == tensors_digest(expected)
    loaded = load_weights(run_dir, manifest)
    assert set(loaded) == set(expected)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())
    assert PublishedWeights.open(run_dir, manifest).tensors().keys() == expected.keys()
    sizes = [shard.num_bytes for shard in manifest.shards]
    assert len(sizes) == 2 and max(sizes) < 1.5 * min(sizes)
    index = json.loads(
        (run_dir / manifest.shards[0].file).with_name("model.safetensors.index.json").read_text()
    )
    assert index["metadata"]["total_size"] == sum(t.numel() * 4 for t in expected.values())
    for shard in manifest.shards:
        name = Path(shard.file).name
        inside = set(load_file(run_dir / shard.file))
        assert inside == {tensor for tensor, file in index["weight_map"].items() if file == name}


def test_transformers_loads_the_folder_with_its_index(results: list[dict[str, Any]]) -> None:
    transformers = pytest.importorskip("transformers")
    manifest = msgspec.json.decode(results[0]["manifest"], type=Manifest)
    folder = Path(results[0]["folder"], manifest.shards[0].file).parent
    loaded = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).state_dict()
    for name, tensor in weights_of(model_of(is_tied=False, dtype="float32")).items():
        assert torch.equal(loaded[name], tensor), name


def test_a_version_in_several_files_is_pulled_whole(results: list[dict[str, Any]], tmp_path: Path) -> None:
    run_dir, cache = Path(results[0]["folder"]), tmp_path / "cache"
    manifest = msgspec.json.decode(results[0]["manifest"], type=Manifest)
    with serving(FolderSource(run_dir, RUN, CHUNK)) as served, pulling(cache, served.address) as puller:
        folder = puller.pull(manifest)
    published = {
        path.name: path.read_bytes() for path in (run_dir / manifest.shards[0].file).parent.iterdir()
    }
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == published
    assert tensors_digest(PublishedWeights.open(cache, manifest).tensors()) == manifest.digest
    assert "model.safetensors.index.json" in published


def test_a_delta_between_versions_in_several_files(results: list[dict[str, Any]], tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(results[0]["folder"], run_dir)
    base = msgspec.json.decode(results[0]["manifest"], type=Manifest)
    info = write_delta(run_dir, base, base)
    assert info is not None
    assert set(info.tensors.values()) == {"unchanged"}


def test_nothing_is_published_when_one_rank_cannot(results: list[dict[str, Any]]) -> None:
    assert all("published before with other weights" in result["other"] for result in results)
    assert "No space left" in results[1]["full"]
    assert "was not published" in results[0]["full"] and "No space left" in results[0]["full"]
    assert [result["num_published"] for result in results] == [1, 1]


def test_tensors_are_dealt_evenly_and_always_alike() -> None:
    sizes = {f"t{index}": 1 + (index * 7919) % 1000 for index in range(100)}
    owners = deal(sizes, 7)
    assert owners == deal(dict(reversed(sizes.items())), 7)
    loads = [sum(sizes[name] for name, owner in owners.items() if owner == rank) for rank in range(7)]
    assert max(loads) - min(loads) <= max(sizes.values())
    assert set(deal({"a": 1, "b": 2}, 5).values()) == {0, 1}


@pytest.mark.parametrize(
    ("place", "problem"),
    [("", "ranks meet at"), ("carrier-pigeon", "ranks meet at"), ("tcp://:9", "ranks meet at")],
)
def test_a_place_where_nobody_can_meet(place: str, problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(RENDEZVOUS_VARIABLE, place)
    with pytest.raises(InputError, match=problem):
        World.join(0, 2, 1)


def test_ranks_do_not_meet_where_others_can_read(tmp_path: Path) -> None:
    folder = tmp_path / "open"
    folder.mkdir()
    folder.chmod(0o755)
    with pytest.raises(InputError, match="chmod 700"):
        World.join(0, 2, 1, rendezvous=f"file:{folder}/store")


def test_ranks_that_meet_in_a_file_listen_on_loopback_whatever_the_machine_is_set_to(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    for name in names:
        monkeypatch.setenv(name, "eth0")
    folder = tmp_path / "own"
    folder.mkdir(mode=0o700)
    _meet(f"file:{folder}/store", 0, 2)
    assert {os.environ[name] for name in names} == {LOOPBACK}


def test_a_rank_that_the_mesh_does_not_have() -> None:
    with pytest.raises(InputError, match=r"rank 4: .*is 4 ranks"):
        World.join(4, 2, 2)


def test_one_process_is_a_world_without_a_process_group() -> None:
    world = World.join(0, 1, 1)
    assert world.is_main and world.mesh is None
    assert world.tell(b"x") == b"x"
    assert world.first_problem("y") == "y"
    assert world.collect(torch.ones(2))[0].sum() == world.add_up(torch.ones(2)).sum() == 2
    assert not torch.distributed.is_initialized()
    world.close()


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    assert device_of(LearnerConfig(device="cpu"), 3) == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert device_of(LearnerConfig()) == torch.device("cpu")
    with pytest.raises(InputError, match="no CUDA device"):
        device_of(LearnerConfig(device="cuda"))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert device_of(LearnerConfig(), 1) == torch.device("cuda", 1)
    with pytest.raises(InputError, match="there are 2 here"):
        device_of(LearnerConfig(data_parallel=4), 2)
