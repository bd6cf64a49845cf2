"""The learner publishes what changed beside the whole if asked to, and all the same if it cannot."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import msgspec
import torch
from learner_world import tiny_model

from cod_async.config.schema import Config
from cod_async.learner.loop import Learner
from cod_async.learner.step import Trainer
from cod_async.lifecycle.segment import Version
from cod_async.weights.delta import DELTA_FILE, DELTA_INFO_FILE, apply_delta, decode_info
from cod_async.weights.folders import version_folder
from cod_async.weights.manifest import Manifest


class _Port:
    """Notes what is published."""

    def __init__(self) -> None:
        self.manifests: list[Manifest] = []

    def published(self, manifest: Manifest) -> None:
        self.manifests.append(manifest)


def make_learner(run_dir: Path, config: Config, *, has_deltas: bool) -> tuple[Learner, _Port]:
    weights = msgspec.structs.replace(config.weights, has_deltas=has_deltas)
    config = msgspec.structs.replace(config, weights=weights)
    port, stop = _Port(), cast(Any, None)
    trainer = Trainer.create(tiny_model(), config.learner, config.loss, 1.0, tiny_model())
    return Learner(run_dir, config, trainer, cast(Any, port), stop, Version(0, 0), "", None), port


def change_one_element(learner: Learner) -> None:
    with torch.no_grad():
        next(iter(learner.trainer.model.parameters())).view(-1)[0] += 1.0
    learner.version = Version(0, learner.version.step + 1)


def test_a_small_change_is_published_as_a_delta_too(run_dir: Path, config: Config, tmp_path: Path) -> None:
    learner, port = make_learner(run_dir, config, has_deltas=True)
    learner._publish()
    change_one_element(learner)
    learner._publish()
    base, manifest = port.manifests
    folder = run_dir / version_folder(manifest.version)
    info = decode_info((folder / DELTA_INFO_FILE).read_bytes())
    assert info.base == base.version
    assert sorted(set(info.tensors.values())) == ["sparse", "unchanged"]
    out = tmp_path / "out"
    out.mkdir()
    apply_delta(run_dir, base, manifest, info, folder / DELTA_FILE, out)
    assert (out / "model.safetensors").read_bytes() == (run_dir / manifest.shards[0].file).read_bytes()
    assert not (run_dir / version_folder(base.version) / DELTA_INFO_FILE).exists()


def test_a_base_that_cannot_be_read_costs_the_delta_only(run_dir: Path, config: Config) -> None:
    learner, port = make_learner(run_dir, config, has_deltas=True)
    learner._publish()
    (run_dir / port.manifests[0].shards[0].file).write_bytes(b"short")
    change_one_element(learner)
    learner._publish()
    assert len(port.manifests) == 2
    assert not (run_dir / version_folder(Version(0, 1)) / DELTA_INFO_FILE).exists()


def test_no_deltas_unless_asked_for(run_dir: Path, config: Config) -> None:
    learner, _ = make_learner(run_dir, config, has_deltas=False)
    learner._publish()
    change_one_element(learner)
    learner._publish()
    assert not (run_dir / version_folder(Version(0, 1)) / DELTA_INFO_FILE).exists()
