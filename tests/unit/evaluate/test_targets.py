"""Which weights a sweep takes, and how they are known and kept."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from cod_async.errors import InputError
from cod_async.evaluate.targets import choose_versions, model_digest, pin, pinned, surviving
from cod_async.lifecycle.segment import Version


def run_with(tmp_path: Path, checkpoints: list[tuple[int, int]], published: list[tuple[int, int]]) -> Path:
    """A run folder as the learner leaves it, as far as this module looks."""
    run_dir = tmp_path / "run"
    folders = [run_dir / "model"]
    folders += [run_dir / "checkpoints" / f"step_{step:08d}-L{lineage}" for lineage, step in checkpoints]
    folders += [run_dir / "weights" / f"L{lineage:04d}-S{step:08d}" for lineage, step in published]
    for number, folder in enumerate(folders):
        folder.mkdir(parents=True)
        save_file({"w": torch.full((3,), float(number))}, folder / "model.safetensors")
    for name in ("config.json", "tokenizer.json", "tokenizer_config.json", "bootstrap.json"):
        (run_dir / "model" / name).write_text("{}")
    return run_dir


def steps(run_dir: Path, wanted: str | None, step: int | None = None) -> list[str]:
    return [
        "start" if version is None else str(version) for version in choose_versions(run_dir, wanted, step)
    ]


def test_a_sweep_begins_with_the_starting_weights(tmp_path: Path) -> None:
    run_dir = run_with(
        tmp_path, [(0, 0), (0, 10), (0, 20), (0, 30), (1, 25), (1, 40)], [(0, 0), (1, 39), (1, 40), (1, 41)]
    )
    # Lineage 1 went back to a version before 25: what lineage 0 had from there on did not happen.
    assert steps(run_dir, "all") == ["start", "0.10", "0.20", "1.25", "1.40"]
    assert steps(run_dir, "every:20") == ["start", "0.20", "1.40"]
    assert steps(run_dir, "published") == ["start", "1.39", "1.40", "1.41"]
    assert steps(run_dir, "41,0,10") == ["start", "0.10", "1.41"]
    assert steps(run_dir, None) == ["1.41"]
    assert steps(run_dir, None, 20) == ["0.20"] and steps(run_dir, None, 0) == ["start"]
    with pytest.raises(InputError, match="no weights of step 7, 30"):
        choose_versions(run_dir, "7,10,30", None)
    with pytest.raises(
        InputError, match=r"no weights of step 7; steps on disk: 0, 10, 20, 25, 30, 39, 40, 41"
    ):
        choose_versions(run_dir, None, 7)
    for wrong in ("every:0", "some", "1,,2", "-1", ""):
        with pytest.raises(InputError, match="write all, every:N"):
            choose_versions(run_dir, wrong, None)


@settings(deadline=None)
@given(st.sets(st.tuples(st.integers(0, 3), st.integers(0, 12)), max_size=12))
def test_surviving_versions_have_one_version_a_step(pairs: set[tuple[int, int]]) -> None:
    versions = [Version(lineage=lineage, step=step) for lineage, step in pairs]
    kept = surviving(versions)
    assert kept == sorted(kept, key=lambda version: version.step)
    assert len({version.step for version in kept}) == len(kept)
    if versions:
        assert kept[-1] == max(versions)
    for version in versions:
        later = [other for other in versions if other.lineage > version.lineage]
        assert (version in kept) == all(version.step < other.step for other in later)


def test_pinned_weights_outlive_their_folder(tmp_path: Path) -> None:
    run_dir = run_with(tmp_path, [(0, 10)], [(0, 12)])
    wanted = [None, Version(0, 10), Version(0, 12)]
    with pinned(run_dir, wanted, tmp_path / "out" / "models") as checkpoints:
        assert [(c.label, c.step) for c in checkpoints] == [("start", 0), ("0.10", 10), ("0.12", 12)]
        source = run_dir / "checkpoints" / "step_00000010-L0" / "model.safetensors"
        held = Path(checkpoints[1].model_dir)
        assert os.stat(held / "model.safetensors").st_ino == source.stat().st_ino  # no bytes were copied
        source.unlink()
        assert load_file(held / "model.safetensors")["w"].tolist() == [1.0, 1.0, 1.0]
        assert sorted(path.name for path in held.iterdir()) == [
            "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        ]  # fmt: skip
    assert not (tmp_path / "out" / "models").exists()
    assert load_file(run_dir / "model" / "model.safetensors")["w"].tolist() == [0.0, 0.0, 0.0]
    with pytest.raises(InputError, match="no longer on disk"):
        pin(run_dir, Version(0, 10), tmp_path / "out")


def test_digests_are_of_tensors_not_of_files(tmp_path: Path) -> None:
    tensors = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
    for name, metadata in (("one", None), ("other", {"format": "pt"})):
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors", metadata=metadata)
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "shards").mkdir()
    for index, (name, tensor) in enumerate(reversed(tensors.items())):
        save_file({name: tensor}, tmp_path / "shards" / f"model-{index}.safetensors")
    (tmp_path / "shards" / "config.json").write_text("{}")
    save_file({"exp_avg/a": torch.ones(3)}, tmp_path / "one" / "optimizer.safetensors")
    assert len({model_digest(tmp_path / name) for name in ("one", "other", "shards")}) == 1

    # An independent account of the same bytes.
    expected = hashlib.sha256()
    for name, dtype in (("a", "F32"), ("b", "BF16")):
        expected.update(json.dumps([name, dtype, list(tensors[name].shape)]).encode() + b"\n")
        expected.update(tensors[name].view(torch.uint8).numpy().tobytes())
    outer = hashlib.sha256(expected.hexdigest().encode())
    outer.update(b"\nconfig.json " + hashlib.sha256(b"{}").hexdigest().encode())
    assert model_digest(tmp_path / "one") == outer.hexdigest()[:32]

    found = {model_digest(tmp_path / "one")}
    for changed in ({**tensors, "a": tensors["a"].reshape(3, 2)}, {"c": tensors["a"], "b": tensors["b"]}):
        save_file(changed, tmp_path / "one" / "model.safetensors")
        found.add(model_digest(tmp_path / "one"))
    (tmp_path / "other" / "tokenizer.json").write_text("[1]")
    found.add(model_digest(tmp_path / "other"))
    assert len(found) == 4


@pytest.mark.parametrize("raw", [b"", b"\0" * 9, (5).to_bytes(8, "little") + b"[1,2]", b"\xff" * 40])
def test_weights_that_cannot_be_read_are_wrong_input(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "model.safetensors").write_bytes(raw)
    with pytest.raises(InputError, match="safetensors"):
        model_digest(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(InputError, match=r"no \*\.safetensors"):
        model_digest(tmp_path)
