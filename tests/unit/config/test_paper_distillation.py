"""The paper's distillation run: its file says what the paper says, and can be planned without the weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cod_async.cli import main
from cod_async.config import load_config
from cod_async.config.check import check

ROOT = Path(__file__).resolve().parents[3]
FILE = ROOT / "configs" / "paper" / "pde_control_grid_opd.toml"
TEACHERS = (("pde_discovery", "train"), ("optimal_control", "hard"), ("grid_navigation", "train_27b"))


def test_the_numbers_are_those_of_the_paper(tmp_path: Path) -> None:
    config = load_config([FILE], [f'run.output_dir="{tmp_path}"'])
    assert tuple((e.name, e.preset) for e in config.environments) == TEACHERS
    for environment, (name, _) in zip(config.environments, TEACHERS, strict=True):
        own = config_of(f"{FOLDER_OF[name]}.toml").environments[0]
        assert (environment.options, environment.preset) == (own.options, own.preset)
        teacher = config.distillation.teacher_of(name, environment.preset)
        assert teacher is not None and teacher.url
    assert len({teacher.url for teacher in config.distillation.teachers}) == 3
    assert config.distillation.max_requests == 32
    lifecycle, learner, loss = config.lifecycle, config.learner, config.loss
    assert (lifecycle.pack_size, lifecycle.group_size, lifecycle.carry) == (4, 1, "hint")
    lengths = lifecycle.max_response_tokens, config.model.max_context_tokens, lifecycle.length_notice_tokens
    assert lengths == (4000, 26001, 4000)
    assert (config.run.num_steps, learner.checkpoint_every_steps) == (200, 5)
    assert (learner.lr, learner.warmup_steps, learner.grad_clip) == (1e-6, 10, 1.0)
    assert (config.staleness.max_lag, config.weights.publish_every_steps) == (5, 1)
    assert (config.engine.temperature, config.engine.server.num_servers, learner.data_parallel) == (1.0, 4, 8)
    assert (loss.clip, loss.behavior_weight, loss.kl_coef, loss.kl) == ("none", "none", 1.0, "k2")
    assert loss.aggregation == "token_mean"
    assert "`pde_control_grid_opd.toml`" in FILE.with_name("README.md").read_text()


FOLDER_OF = {
    "pde_discovery": "pde_discovery",
    "optimal_control": "optimal_control",
    "grid_navigation": "grid_navigation_27b",
}
"""The file of each teacher's own run."""


def config_of(name: str) -> Any:
    return load_config([FILE.with_name(name)])


def test_it_is_planned_without_weights_and_teachers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert check(load_config([FILE]), for_train=False) == []
    assert main(["train", str(FILE), "--dry-run", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)["plan"]
    per_step = plan["per_step"]
    assert per_step["lifecycles"] == per_step["packs"] == 50
    assert per_step["segments"] == 50 * 7
    # As near to 720 responses as half a lifecycle, give or take what a sample leaves to chance.
    assert abs(per_step["responses"] - 720) <= per_step["responses"] / 50 / 2 + 0.07 * 720
    assert list(tmp_path.iterdir()) == []
