"""Cross-field rules: each contradiction has a sentence that names the setting, its value and what to do."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import pytest

from cod_async.config import Config, load_config
from cod_async.config.check import check, check_run_dir, parse_bind, require
from cod_async.errors import ConfigError

BASE = ['environments=[{name="hidden_buttons", preset="door"}]']


def made(tmp_path: Path, *overrides: str) -> Config:
    return load_config([], [*BASE, f'run.output_dir="{tmp_path}"', *overrides])


def test_the_defaults_contradict_nothing(tmp_path: Path) -> None:
    assert check(made(tmp_path)) == []


@pytest.mark.parametrize(
    ("overrides", "path", "advice"),
    [
        (['environments.0.name="hidden_button"'], "environments.0.name", "hidden_buttons"),
        (['environments.0.preset="dor"'], "environments.0", "door"),
        (["environments.0.options.nonsense=1"], "environments.0", "nonsense"),
        (["environments=[]"], "environments", "add at least one"),
        (
            ['lifecycle.carry="transcript"', 'engine.on_publish="at_segment_boundary"'],
            "engine.on_publish",
            '"in_place"',
        ),
        (["lifecycle.has_transcript_updates=true"], "lifecycle.has_transcript_updates", "false"),
        (["lifecycle.group_size=1"], "lifecycle.group_size", "at least 2"),
        (["lifecycle.max_response_tokens=4096"], "lifecycle.max_response_tokens", "lower"),
        (["lifecycle.max_hint_tokens=5000"], "lifecycle.max_hint_tokens", "lower"),
        (['model.path="/no/such/model"'], "model.path", "Hugging Face model directory"),
        (["bootstrap.model.num_kv_heads=3"], "bootstrap.model.num_kv_heads", "divisor"),
        (["bootstrap.model.head_dim=15"], "bootstrap.model.head_dim", "even"),
        (['bootstrap.kind="random"', "bootstrap.vocab_size=256"], "bootstrap.vocab_size", "at least 300"),
        (['bootstrap.kind="random"', 'model.renderer="terse"'], "model.renderer", "chatml"),
        (
            ['environments.0={name="frozen_lake_obscure", preset="easy"}', "bootstrap.vocab_size=256"],
            "bootstrap.vocab_size", "at least 300",
        ),
        (['model.renderer="chatml"'], "model.renderer", "terse"),
        (['bootstrap.kind="documents"', 'model.renderer="chatml"'], "model.renderer", "terse"),
        (['bootstrap.also=[{name="hidden_button", preset="door"}]'], "bootstrap.also.0.name", "buttons"),
        (['bootstrap.also=[{name="hidden_buttons", preset="dor"}]'], "bootstrap.also.0", "door"),
        (
            ['bootstrap.kind="random"', 'bootstrap.also=[{name="hidden_buttons", preset="door"}]'],
            "bootstrap.also", 'kind = "random" reads none',
        ),
        (
            ['bootstrap.also=[{name="frozen_lake_obscure", preset="easy"}]'],
            "bootstrap.also", "frozen_lake_obscure has none",
        ),
        (
            ['bootstrap.kind="documents"', 'environments.0={name="frozen_lake_obscure", preset="easy"}'],
            "bootstrap.kind", "frozen_lake_obscure has none",
        ),
        (["bootstrap.warmup_steps=400"], "bootstrap.warmup_steps", "lower"),
        (['engine.urls=["http://127.0.0.1:1"]'], "engine.urls", "remove"),
        (["engine.top_p=0.9"], "engine.top_p", "1.0"),
        (["transport.session_timeout_s=2"], "transport.session_timeout_s", "at least 3"),
        (['transport.bind="tcp://0.0.0.0:0"'], "transport.bind", "127.0.0.1"),
        (['transport.bind="ipc://x"'], "transport.bind", "tcp://127.0.0.1:0"),
        (["transport.credit_bytes=1024"], "transport.credit_bytes", "raise"),
        (["transport.max_message_bytes=4096"], "transport.max_message_bytes", "at least"),
        (["staleness.max_lag=0", "staleness.plan_ahead_steps=1"], "staleness.plan_ahead_steps", "at most"),
        (["staleness.max_lag=1", "weights.publish_every_steps=3"], "weights.publish_every_steps", "most 2"),
        (['groups.close="quorum"'], "groups.quorum_members", "between 2"),
        (['groups.close="quorum"', "groups.quorum_members=9"], "groups.quorum_members", "group_size = 8"),
        (['groups.close="quorum"', "groups.quorum_members=2", "groups.after_s=1e3"], "groups.after_s", "low"),
        (["groups.after_s=3"], "groups.close", "quorum"),
        (['credit_assignment.style="discounted"'], "credit_assignment.gamma", "needs it"),
        (['credit_assignment.style="sliding_window_mean"'], "credit_assignment.window", "needs it"),
        (["credit_assignment.window=2"], "credit_assignment.window", "remove"),
        (["credit_assignment.gamma=0.9"], "credit_assignment.gamma", "remove"),
        (["credit_assignment.parity=true"], "credit_assignment.parity", "remove"),
        (["learner.tokens_per_micro_batch=100"], "learner.tokens_per_micro_batch", "raise"),
        (["learner.betas=[0.9, 1.0]"], "learner.betas.1", "under 1"),
        (['loss.clip="ppo"', "loss.eps_low=1.5"], "loss.eps_low", "under 1"),
        (["run.early_stop.is_enabled=true", "run.num_steps=5"], "run.early_stop.window_steps", "lower"),
        (["run.early_stop.is_enabled=true", "lifecycle.pack_size=1"], "run.early_stop", "at least 2"),
        (['run.output_dir="/dev/null/runs"'], "run.output_dir", "choose another"),
        (['run.output_dir="/proc/runs"'], "run.output_dir", "not writable"),
    ],
)  # fmt: skip
def test_contradiction(tmp_path: Path, overrides: list[str], path: str, advice: str) -> None:
    problems = check(made(tmp_path, *overrides))
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}: ")
    assert advice in problems[0]


def test_all_contradictions_at_once(tmp_path: Path) -> None:
    config = made(tmp_path, "engine.top_p=0.5", "lifecycle.group_size=1", "engine.server.num_servers=2")
    with pytest.raises(ConfigError) as caught:
        require(config)
    assert len(caught.value.problems) == 3


def test_what_only_training_needs_does_not_stop_an_evaluation(tmp_path: Path) -> None:
    config = made(tmp_path, "engine.top_p=0.5", 'run.output_dir="/proc/runs"')
    assert check(config, for_train=False) == []


def test_a_busy_port_is_noticed_and_a_free_one_is_not(tmp_path: Path) -> None:
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        holder.listen()
        port = holder.getsockname()[1]
        problems = check(made(tmp_path, f'transport.bind="tcp://127.0.0.1:{port}"'))
        assert problems == [f"transport.bind: port {port} is in use; choose another, or 0 for a free one"]
    assert check(made(tmp_path, f'transport.bind="tcp://127.0.0.1:{port}"')) == []


@pytest.mark.parametrize(
    ("bind", "expected"),
    [
        ("tcp://127.0.0.1:0", ("127.0.0.1", 0)),
        ("tcp://[::1]:5555", ("[::1]", 5555)),
        ("tcp://*:1", ("*", 1)),
        ("tcp://127.0.0.1", None),
        ("tcp://127.0.0.1:70000", None),
        ("tcp://127.0.0.1:²", None),
        ("udp://127.0.0.1:1", None),
        ("tcp://:1", None),
    ],
)
def test_bind_addresses(bind: str, expected: tuple[str, int] | None) -> None:
    assert parse_bind(bind) == expected


def test_incomplete_and_foreign_model_directories(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": 5}))
    problems = check(made(tmp_path, f'model.path="{model}"'))
    assert "lacks tokenizer.json, tokenizer_config.json, model.safetensors" in problems[0]
    assert 'model_type "llama"' in problems[1]
    (model / "config.json").write_text("{")
    assert any("cannot be read" in problem for problem in check(made(tmp_path, f'model.path="{model}"')))


def test_context_beyond_the_model_is_refused(tmp_path: Path) -> None:
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "qwen3", "max_position_embeddings": 1024}))
    problems = check(made(tmp_path, f'model.path="{model}"'))
    assert any(problem.startswith("model.max_context_tokens: 4096 is beyond") for problem in problems)


def test_run_folders(tmp_path: Path) -> None:
    fresh, used = tmp_path / "fresh", tmp_path / "used"
    assert check_run_dir(fresh, is_resume=False) == []
    assert "no config.json" in check_run_dir(fresh, is_resume=True)[0]
    used.mkdir()
    assert check_run_dir(used, is_resume=False) == []  # an empty folder is as good as none
    (used / "config.json").write_text("{}")
    assert f"--resume {used}" in check_run_dir(used, is_resume=False)[0]
    assert check_run_dir(used, is_resume=True) == []
