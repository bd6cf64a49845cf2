"""A tiny model directory and the configuration around it."""

from __future__ import annotations

from pathlib import Path

import pytest
from learner_world import tiny_model

from cod_async.config.load import save_resolved
from cod_async.config.schema import (
    Config,
    EnvironmentConfig,
    LearnerConfig,
    LossConfig,
    ModelConfig,
    RunSection,
    TransportConfig,
    WeightsConfig,
)
from cod_async.models.directory import save_model


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return Config(
        environments=(EnvironmentConfig(name="hidden_buttons", preset="door"),),
        run=RunSection(name="t", output_dir=str(tmp_path), num_steps=4, grace_s=5.0),
        model=ModelConfig(max_context_tokens=48),
        learner=LearnerConfig(
            lr=1e-2, warmup_steps=2, checkpoint_every_steps=2, keep_checkpoints=2, tokens_per_micro_batch=256
        ),
        loss=LossConfig(kl_coef=0.01),
        weights=WeightsConfig(publish_every_steps=1, keep_versions=2),
        transport=TransportConfig(heartbeat_s=0.2, session_timeout_s=1.0, resend_s=0.3),
    )


@pytest.fixture
def run_dir(tmp_path: Path, config: Config) -> Path:
    path = tmp_path / "t"
    path.mkdir()
    save_model(path / "model", tiny_model())
    (path / "model" / "tokenizer.json").write_text("{}")
    (path / "model" / "bootstrap.json").write_text("{}")
    save_resolved(config, path)
    return path
