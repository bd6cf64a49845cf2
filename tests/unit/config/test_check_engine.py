"""Rules on engines and servers: each contradiction has a sentence that names the setting and what to do."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from cod_async.config import Config, load_config
from cod_async.config.check import check
from cod_async.config.check_engine import find_python
from cod_async.loopback import is_loopback

BASE = ['environments=[{name="hidden_buttons", preset="door"}]']
STARTED = ['engine.kind="sglang"']
ATTACHED = [*STARTED, 'engine.urls=["http://127.0.0.1:30000"]']
PULL = 'weights.source="pull"'
FAR = [*STARTED, 'engine.urls=["http://10.1.2.3:30000"]']


@pytest.fixture(autouse=True)
def _keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGL_KEY", "secret")
    monkeypatch.delenv("SGL_NONE", raising=False)


def made(tmp_path: Path, *overrides: str) -> Config:
    return load_config([], [*BASE, f'run.output_dir="{tmp_path}"', *overrides])


@pytest.mark.parametrize(
    "overrides",
    [
        STARTED,
        ATTACHED,
        [*STARTED, "engine.server.num_servers=2", "actors.num_processes=2"],
        [*STARTED, 'engine.server.host="0.0.0.0"'],  # started servers always have keys
        [*STARTED, 'engine.server.host="::1"', 'engine.on_publish="wait"', 'weights.into_engine="group"'],
        [*STARTED, 'engine.server.args=["--tp-size", "2", "--mem-fraction-static=0.7"]'],
        [*STARTED, f'engine.python="{sys.executable}"'],
        [*ATTACHED, 'weights.into_engine="ipc"'],
        [*FAR, 'engine.server.api_key_env="SGL_KEY"', 'engine.server.admin_key_env="SGL_KEY"'],
        [*STARTED, 'engine.urls=["https://[::1]:30000", "http://localhost:30001"]'],
        ['engine.on_publish="wait"'],
        [PULL, "weights.has_deltas=true", 'weights.cache_dir="x"'],
        [PULL, 'weights.serve="tcp://[::1]:0"', 'weights.pull_from="tcp://localhost:5000"'],
        ["engine.hold_timeout_s=5", 'engine.on_publish="at_segment_boundary"'],
    ],
)
def test_what_goes_together(tmp_path: Path, overrides: list[str]) -> None:
    assert check(made(tmp_path, *overrides)) == []


@pytest.mark.parametrize(
    ("overrides", "path", "advice"),
    [
        (['engine.python="python3"'], "engine.python", '"sglang"'),
        (["engine.max_reprefill_frac=0.2"], "engine.max_reprefill_frac", "remove"),
        (["engine.server.num_servers=2"], "engine.server.num_servers", "remove"),
        (['weights.into_engine="group"'], "weights.into_engine", "remove"),
        (["engine.urls=[\"http://127.0.0.1:1\"]"], "engine.urls", "remove"),
        ([*STARTED, "engine.is_batch_invariant=true"], "engine.is_batch_invariant", '"embedded"'),
        ([*STARTED, "actors.num_processes=2"], "engine.server.num_servers", "at least"),
        ([*ATTACHED, "actors.num_processes=2"], "engine.urls", "1 servers for actors.num_processes = 2"),
        ([*STARTED, 'engine.python="/no/such/python"'], "engine.python", "make sglang-env"),
        ([*STARTED, 'engine.python="/etc/passwd"'], "engine.python", "cannot be executed"),
        ([*STARTED, 'engine.server.host="not a host"'], "engine.server.host", "127.0.0.1"),
        ([*STARTED, 'engine.server.args=["--port=3"]'], "engine.server.args", "free one"),
        ([*STARTED, 'engine.server.args=["--api-key", "x"]'], "engine.server.args", "no place"),
        ([*STARTED, 'engine.server.api_key_env="SGL_KEY"'], "engine.server.api_key_env", "own"),
        ([*STARTED, "engine.server.stall_timeout_s=9e3"], "engine.server.stall_timeout_s", "raise"),
        ([*STARTED, "engine.server.probe_timeout_s=500"], "engine.server.probe_timeout_s", "lower"),
        ([*STARTED, "engine.server.start_timeout_s=1e4"], "engine.server.start_timeout_s", "started again"),
        ([*STARTED, "engine.server.connect_timeout_s=1e4"], "engine.server.connect_timeout_s", "lower"),
        ([*ATTACHED, 'engine.python="python3"'], "engine.python", "nothing is started"),
        ([*ATTACHED, "engine.server.num_servers=2"], "engine.server.num_servers", "nothing is started"),
        ([*STARTED, 'engine.urls=["127.0.0.1:30000"]'], "engine.urls.0", "http://HOST:PORT"),
        ([*STARTED, 'engine.urls=["http://127.0.0.1"]'], "engine.urls.0", "http://HOST:PORT"),
        ([*STARTED, 'engine.urls=["http://127.0.0.1:3/v1"]'], "engine.urls.0", "http://HOST:PORT"),
        ([*STARTED, 'engine.urls=["ftp://127.0.0.1:3"]'], "engine.urls.0", "http://HOST:PORT"),
        ([*STARTED, 'engine.urls=["http://127.0.0.1:99999"]'], "engine.urls.0", "http://HOST:PORT"),
        ([*STARTED, 'engine.urls=["http://a b:3"]'], "engine.urls.0", "http://HOST:PORT"),
        ([*STARTED, 'engine.urls=["http://[::1:3"]'], "engine.urls.0", "http://HOST:PORT"),
        ([*STARTED, 'engine.urls=["http://localhost:3", "http://LOCALHOST:3"]'], "engine.urls.1", "twice"),
        (FAR, "engine.server.api_key_env", "--api-key"),
        (
            [*FAR, 'engine.server.api_key_env="SGL_KEY"', 'weights.into_engine="ipc"'],
            "weights.into_engine", "group",
        ),
        ([*ATTACHED, 'engine.server.admin_key_env="SGL_KEY"'], "engine.server.admin_key_env", "both"),
        ([*ATTACHED, 'engine.server.api_key_env="SGL_NONE"'], "engine.server.api_key_env", "not set"),
        (["weights.has_deltas=true"], "weights.has_deltas", "pull"),
        (['weights.pull_from="tcp://h:1"'], "weights.pull_from", "pull"),
        (['weights.cache_dir="x"'], "weights.cache_dir", "pull"),
        (['weights.serve="tcp://h:1"'], "weights.serve", "pull"),
        ([PULL, 'weights.serve="here"'], "weights.serve", "tcp://HOST:PORT"),
        ([PULL, 'weights.serve="ipc:///tmp/x"'], "weights.serve", "tcp://HOST:PORT"),
        ([PULL, 'weights.serve="tcp://127.0.0.1:70000"'], "weights.serve", "tcp://HOST:PORT"),
        ([PULL, 'weights.serve="tcp://::1:5"'], "weights.serve", "tcp://HOST:PORT"),
        ([PULL, 'weights.serve="tcp://*:5000"'], "weights.serve", "cod weights --from"),
        ([PULL, 'weights.serve="tcp://0.0.0.0:0"'], "weights.serve", "a run has none yet"),
        ([PULL, 'weights.pull_from="tcp://10.1.1.1:5"'], "weights.pull_from", "--client-key"),
        ([PULL, 'weights.pull_from="tcp://learner-0:5"'], "weights.pull_from", "own address"),
        ([PULL, 'weights.pull_from="tcp://127.0.0.1"'], "weights.pull_from", "tcp://HOST:PORT"),
        ([PULL, 'weights.pull_from="tcp://127.0.0.1:0"'], "weights.pull_from", "names no port"),
    ],
)  # fmt: skip
def test_contradiction(tmp_path: Path, overrides: list[str], path: str, advice: str) -> None:
    problems = check(made(tmp_path, *overrides))
    assert len(problems) == 1, problems
    assert problems[0].startswith(f"{path}: ")
    assert advice in problems[0]


def test_all_at_once_and_a_password_is_not_shown(tmp_path: Path) -> None:
    urls = 'engine.urls=["http://me:hunter2@127.0.0.1:1", "http://h:2", "http://h:2"]'
    config = made(tmp_path, *STARTED, urls, "engine.is_batch_invariant=true", 'engine.python="x"')
    problems = check(config)
    assert [problem.split(":")[0] for problem in problems] == [
        "engine.is_batch_invariant", "engine.python", "engine.urls.0", "engine.urls.2",
        "engine.server.api_key_env",
    ]  # fmt: skip
    assert "hunter2" not in " ".join(problems)


def test_an_evaluation_needs_neither_interpreter_nor_keys(tmp_path: Path) -> None:
    for overrides in (
        [*STARTED, 'engine.python="/none"'],
        [*ATTACHED, 'engine.server.api_key_env="SGL_NONE"'],
    ):
        config = made(tmp_path, *overrides)
        assert len(check(config)) == 1
        assert check(config, for_train=False) == []


def test_an_interpreter_is_named_by_its_link(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    link = tmp_path / "env" / "python"
    link.parent.mkdir()
    link.symlink_to(sys.executable)
    assert find_python(str(link)) == str(link)  # where it points to is another environment
    monkeypatch.chdir(tmp_path)
    assert find_python("env/python") == str(link)
    assert find_python("") == sys.executable


@pytest.mark.parametrize(
    ("host", "is_near"),
    [
        ("127.0.0.1", True),
        ("127.8.8.8", True),
        ("::1", True),
        ("localhost", True),
        ("10.0.0.1", False),
        ("h", False),
    ],
)
def test_loopback(host: str, is_near: bool) -> None:
    assert is_loopback(host) == is_near
