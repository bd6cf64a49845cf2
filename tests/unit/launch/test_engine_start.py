"""What is known before servers are started: the interpreter, the command line, whose server is whose; and
that a launcher starts as many as it should.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from rich.console import Console
from sglang_stand_in import make_stand_in

from cod_async.config import Config, load_config
from cod_async.engines.sglang.command import (
    Interpreter,
    inspect_interpreter,
    server_command,
    server_environment,
)
from cod_async.engines.sglang.dealing import deal_servers
from cod_async.engines.sglang.records import ServerRecord, write_record
from cod_async.errors import InputError
from cod_async.launch.engines import check_engines
from cod_async.launch.interrupts import Interrupts
from cod_async.launch.local import _Launch
from cod_async.observe.progress import Progress

MODEL = {
    "model_type": "qwen3", "vocab_size": 320, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
    "max_position_embeddings": 4096, "dtype": "float16",
}  # fmt: skip
CPU = Interpreter(python="/env/bin/python", release="0.5.23", torch="2", has_cuda=False)
CUDA = Interpreter(python="/env/bin/python", release="0.5.23", torch="2", has_cuda=True)


def made(*overrides: str) -> Config:
    return load_config(
        [], ['environments=[{name="hidden_buttons", preset="door"}]', 'engine.kind="sglang"', *overrides]
    )


def command_of(folder: Path, interpreter: Interpreter, *overrides: str, index: int = 0) -> list[str]:
    (folder / "config.json").write_text(json.dumps(MODEL))
    keys = folder / "keys.yaml"
    return server_command(
        made(*overrides), folder, interpreter=interpreter, port=4000, keys_path=keys, index=index
    )


def value(command: Sequence[str], name: str) -> str:
    """What argparse would take: the last one."""
    (*_, last) = [i for i, word in enumerate(command) if word == name]
    return command[last + 1]


def test_the_command_line_follows_from_the_configuration(tmp_path: Path) -> None:
    sizes = ["engine.max_running=16", "model.max_context_tokens=96", "lifecycle.max_response_tokens=8"]
    command = command_of(tmp_path, CPU, *sizes)
    assert command[:3] == ["/env/bin/python", "-m", "sglang.launch_server"]
    assert value(command, "--max-running-requests") == "16"
    assert int(value(command, "--context-length")) == 96 + 8  # a row of N tokens needs a length of N + 2
    assert int(value(command, "--max-total-tokens")) == 2 * 16 * 104
    assert (value(command, "--device"), value(command, "--dtype")) == ("cpu", "float32")
    assert "--api-key" not in command and value(command, "--config") == str(tmp_path / "keys.yaml")
    assert "--disable-radix-cache" not in command


def test_a_cpu_cache_has_a_ceiling_and_always_holds_two_rows(tmp_path: Path) -> None:
    command = command_of(tmp_path, CPU, "engine.max_running=100000", "model.max_context_tokens=4096")
    assert int(value(command, "--max-total-tokens")) == (2 << 30) // (2 * 4 * 2 * 2 * 16)
    huge = command_of(tmp_path, CPU, "model.max_context_tokens=3000000")
    assert int(value(huge, "--max-total-tokens")) == 2 * 3000008


@pytest.mark.parametrize(
    ("args", "index", "first"),
    [
        ("[]", 0, None),
        ("[]", 3, "3"),
        ('["--tp-size", "2"]', 3, "6"),
        ('["--tp=4", "--pp-size", "2"]', 1, "8"),
        ('["--base-gpu-id", "5"]', 1, "5"),
    ],
)
def test_servers_on_one_machine_take_different_gpus(
    tmp_path: Path, args: str, index: int, first: str | None
) -> None:
    command = command_of(tmp_path, CUDA, f"engine.server.args={args}", index=index)
    assert value(command, "--dtype") == "float16"  # the model's: "auto" would narrow float32
    assert (value(command, "--base-gpu-id") if first else None) == first
    assert first is not None or "--base-gpu-id" not in command


def test_our_own_folders_are_kept_off_the_servers_path() -> None:
    base = {"PYTHONPATH": os.pathsep.join(["/ours", "/theirs"]), "OMP_NUM_THREADS": "2"}
    environment = server_environment(base, ["/ours"])
    assert environment["PYTHONPATH"] == "/theirs" and environment["OMP_NUM_THREADS"] == "2"
    assert "PYTHONPATH" not in server_environment({"PYTHONPATH": "/ours"}, ["/ours"])


def test_the_interpreter_is_asked(tmp_path: Path) -> None:
    def asked(release: str) -> Interpreter:
        path = str(make_stand_in(tmp_path / release, release=release))
        return inspect_interpreter(sys.executable, {**os.environ, "PYTHONPATH": path})

    found = asked("0.5.23")
    assert found == Interpreter(python=sys.executable, release="0.5.23", torch="0.0", has_cuda=False)
    assert asked("0.5.17.post1").release == "0.5.17.post1"
    for release in ("0.5.9", "0.4.99", "unknown"):
        with pytest.raises(InputError, match=f"has sglang {release}; use 0.5.17 or newer"):
            asked(release)
    bare = {**os.environ, "PYTHONPATH": ""}
    with pytest.raises(InputError, match="cannot be executed"):
        inspect_interpreter("/no/such/python", bare)
    with pytest.raises(InputError, match="cannot start SGLang"):
        inspect_interpreter("", bare)
    with pytest.raises(InputError, match="does not answer as a Python should"):
        inspect_interpreter("/bin/true", bare)


def test_every_server_has_exactly_one_actor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = ["engine.server.num_servers=11", "actors.num_processes=3"]
    for index in range(11):
        write_record(tmp_path, ServerRecord(name=f"engine-{index}", url=f"http://127.0.0.1:{index + 1}"))
    config = made(*sizes)
    dealt = [[r.name for r in deal_servers(config, tmp_path, f"actor-{i}")()] for i in range(3)]
    assert dealt[1] == ["engine-1", "engine-4", "engine-7", "engine-10"]
    assert sorted(name for names in dealt for name in names) == sorted(f"engine-{i}" for i in range(11))
    for name, problem in (("actor-3", "actor-0.*actor-2"), ("by-hand", "no index"), ("7", "no index")):
        with pytest.raises(InputError, match=problem):
            deal_servers(config, tmp_path, name)
    urls = 'engine.urls=["http://h:1", "http://h:2", "http://h:3"]'
    attached = made(urls, 'engine.server.api_key_env="SGL_KEY"', "actors.num_processes=2")
    with pytest.raises(InputError, match="SGL_KEY"):
        deal_servers(attached, tmp_path, "actor-0")
    monkeypatch.setenv("SGL_KEY", "k")
    records = deal_servers(attached, tmp_path, "actor-0")()
    assert [(r.url, r.api_key, r.admin_key, r.pid) for r in records] == [
        ("http://h:1", "k", "k", 0),
        ("http://h:3", "k", "k", 0),
    ]


def test_servers_that_are_not_there_are_found_before_anything_starts(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({**MODEL, "architectures": ["Qwen3ForCausalLM"]}))
    urls = 'engine.urls=["http://127.0.0.1:1", "http://127.0.0.1:2"]'
    with pytest.raises(InputError) as caught:
        check_engines(made(urls), tmp_path)
    assert len(caught.value.problems) == 2 and "127.0.0.1:2" in caught.value.problems[1]


class Recorder:
    """Stands in for a supervisor: notes what is started."""

    def __init__(self) -> None:
        self.started: list[tuple[str, str]] = []

    def start(self, role: str, name: str, argv: Sequence[str]) -> None:
        self.started.append((role, argv[-1]))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["engine.server.num_servers=2"], ["engine-0", "engine-1"]),
        (['engine.urls=["http://127.0.0.1:1"]'], []),
        (['engine.kind="embedded"'], []),
    ],
)
def test_the_launcher_starts_what_is_not_attached(
    tmp_path: Path, overrides: list[str], names: list[str]
) -> None:
    config, recorder = made(*overrides), Recorder()
    write_record(tmp_path, ServerRecord(name="engine-7", url="http://127.0.0.1:1"))  # of an earlier launch
    launch = _Launch(config, tmp_path, [], 0, Interrupts(), Progress(config, Console(quiet=True)))
    launch._start_engines(recorder)  # type: ignore[arg-type]
    assert recorder.started == [("engine", name) for name in names]
    assert (tmp_path / "engines").exists() == (config.engine.kind == "embedded")
