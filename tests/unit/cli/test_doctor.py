"""``cod doctor``: what it finds where all is well and where something is wrong, and its exit codes."""

from __future__ import annotations

import asyncio
import json
import socket
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
import torch
from sglang_stand_in import make_stand_in

from cod_async.cli import main
from cod_async.commands import doctor_checks
from cod_async.commands.doctor import Reporter
from cod_async.config.schema import Config, EngineConfig, EnvironmentConfig
from cod_async.engines.conformance.findings import CheckFailedError, CheckSkippedError
from cod_async.errors import EngineError
from cod_async.models.directory import save_model
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.tokenizers import write_chatml_tokenizer

ROOT = Path(__file__).resolve().parents[3]
DOOR = str(ROOT / "configs" / "ci" / "door.toml")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("doctor-model")
    vocab_size = write_chatml_tokenizer(path, ["the goal is Up\n\nIn : 1"] * 4, 300, 512)
    config = Qwen3Config(
        vocab_size=vocab_size + 12, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=8, tie_word_embeddings=True,
        max_position_embeddings=512, eos_token_id=2,
    )  # fmt: skip
    save_model(path, Qwen3(config, torch.Generator().manual_seed(0)))
    return path


def doctor(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, dict[str, Any], str]:
    code = main(["doctor", *arguments, "--json"])
    captured = capsys.readouterr()
    found = json.loads(captured.out) if captured.out else []
    assert all(set(item) == {"check", "status", "detail"} for item in found)
    return code, {item["check"]: item for item in found}, captured.err


def test_a_good_configuration(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, found, err = doctor(capsys, DOOR, "--set", f'run.output_dir="{tmp_path}"')
    assert (code, err) == (0, "")
    assert {name: item["status"] for name, item in found.items()} == {
        "config": "ok", "packages": "ok", "disk": "ok", "ports": "ok", "environment 0 hidden_buttons": "ok",
        "model": "skipped", "engine": "skipped",
    }  # fmt: skip
    assert "torch" in found["packages"]["detail"] and "GiB free" in found["disk"]["detail"]


def test_people_get_a_table(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", DOOR]) == 0
    assert "environment 0 hidden_buttons" in capsys.readouterr().out


def test_the_embedded_engine_is_examined_with_the_model(
    capsys: pytest.CaptureFixture[str], model_dir: Path
) -> None:
    sets = ("--set", f'model.path="{model_dir}"', "--set", 'model.renderer="chatml"')
    code, found, err = doctor(capsys, DOOR, *sets, "--set", "engine.max_running=16")
    assert {item["status"] for item in found.values()} <= {"ok", "skipped"}, found
    assert code == 0, err
    assert "family chatml" in found["model"]["detail"]
    assert found["logprob_parity"]["status"] == found["live_update"]["status"] == "ok"


def test_everything_wrong_is_listed_and_is_exit_code_2(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    path = tmp_path / "bad.toml"
    path.write_text(
        '[model]\npath = "/nowhere"\n[lifecycle]\ngroup_size = 1\n[transport]\nbind = "elsewhere"\n'
        '[[environments]]\nname = "hidden_buttons"\npreset = "door"\n'
    )
    code = main(["doctor", str(path), "--json"])
    captured = capsys.readouterr()
    failed = [item for item in json.loads(captured.out) if item["status"] == "failed"]
    assert code == 2
    problems = " ".join(item["detail"] for item in failed if item["check"] == "config")
    assert "group_size" in problems and "/nowhere" in problems and "elsewhere" in problems
    assert {"ports", "model", "engine"} <= {item["check"] for item in failed}
    assert "config: " in captured.err and "Traceback" not in captured.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "nothing to look at"),
        (("--engine", "tcp://x"), "--engine tcp://x"),
        (("--engine", "http://127.0.0.1:1", "--model", "/nowhere"), "--model /nowhere"),
        (
            ("--engine", "http://127.0.0.1:1", "--api-key-env", "NOT_SET_HERE"),
            "NOT_SET_HERE names no variable",
        ),
    ],
)
def test_wrong_flags(capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], message: str) -> None:
    code, _, err = doctor(capsys, *arguments)
    assert code == 2 and message in err


def test_a_key_given_instead_of_its_variable_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    code, _, err = doctor(capsys, "--engine", "http://127.0.0.1:1", "--api-key-env", "sk-very-secret")
    assert code == 2 and "secret" not in err


def test_an_unreachable_server_is_wrong_input(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
        code, found, err = doctor(capsys, "--engine", url)
    assert code == 2 and found["server_answers"]["status"] == "failed"
    assert url in err and "cannot connect" in err


def test_taken_ports_are_found() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        address = f"tcp://127.0.0.1:{taken.getsockname()[1]}"
        config = _config(transport={"bind": address})
        with pytest.raises(CheckFailedError, match="choose another port"):
            doctor_checks.ports(config)
        with pytest.raises(CheckFailedError, match=r"weights\.serve"):
            doctor_checks.ports(_config(weights={"source": "pull", "serve": address}))
    assert "is free" in doctor_checks.ports(config)


def _config(**sections: Any) -> Config:
    import msgspec

    return msgspec.convert({"environments": []} | sections, Config)


def test_network_file_systems_and_full_disks_are_found(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    import psutil

    config = _config(run={"output_dir": str(tmp_path / "not" / "yet")})
    (part, *_) = psutil.disk_partitions(all=True)
    network = part._replace(mountpoint=str(tmp_path), fstype="nfs4")
    monkeypatch.setattr(psutil, "disk_partitions", lambda all: [part._replace(mountpoint="/"), network])
    with pytest.raises(CheckFailedError, match="nfs4"):
        doctor_checks.disk(config)
    monkeypatch.undo()
    monkeypatch.setattr(doctor_checks, "MIN_FREE_BYTES", 1 << 60)
    with pytest.raises(CheckFailedError, match="at least"):
        doctor_checks.disk(config)


def test_environments_that_do_not_start_are_found() -> None:
    config = Config(environments=(EnvironmentConfig(name="learn2ask", preset="default"),))
    assert "records: " in doctor_checks.play_reset(config, 0)
    missing = EnvironmentConfig(name="learn2ask", preset="default", options={"path": "/nowhere.jsonl"})
    with pytest.raises(Exception, match=r"nowhere\.jsonl"):
        doctor_checks.play_reset(Config(environments=(missing,)), 0)


def test_endpoints_that_do_not_listen_are_found() -> None:
    environment = EnvironmentConfig(
        name="learn2ask", preset="default", options={"judge_url": "http://127.0.0.1:1/v1", "judge_model": "m"}
    )
    assert list(doctor_checks._endpoints(environment)) == [("judge_url", "http://127.0.0.1:1/v1")]
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        port = listening.getsockname()[1]
        with pytest.raises(CheckFailedError, match="cannot be reached"):
            doctor_checks.endpoint(f"http://127.0.0.1:{port}/v1")
        listening.listen()
        assert "listens" in doctor_checks.endpoint(f"http://127.0.0.1:{port}/v1")


def test_interpreters_without_sglang_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(python: str, packages: Path | None = None) -> str:
        monkeypatch.setenv("PYTHONPATH", str(packages or ""))
        engine = EngineConfig(kind="sglang", python=python)
        return doctor_checks.sglang_python(msgspec.structs.replace(_config(), engine=engine))

    with pytest.raises(CheckFailedError, match=r"engine\.python: .* cannot start SGLang"):
        asked(sys.executable)
    with pytest.raises(CheckFailedError, match="cannot be executed"):
        asked(str(tmp_path / "python"))
    with pytest.raises(CheckFailedError, match=r"0\.5\.17 or newer"):
        asked(sys.executable, make_stand_in(tmp_path / "old", release="0.5.3"))
    found = asked("", make_stand_in(tmp_path / "new", release="0.5.23"))
    assert found == f"{sys.executable}: SGLang 0.5.23, torch 0.0, no CUDA"


def test_a_machine_that_cannot_keep_the_promise_is_a_finding(
    model_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise EngineError("not batch invariant here")

    monkeypatch.setattr("cod_async.engines.conformance.embedded.embedded_checks", refuse)
    reporter = Reporter(is_json=True)
    asyncio.run(doctor_checks._embedded(_config(), model_dir, reporter))
    assert [(one.check, one.status) for one in reporter.findings] == [("engine", "failed")]
    assert reporter.exit_code == 1


def test_large_models_are_not_examined_here(model_dir: Path) -> None:
    from cod_async.engines.conformance.embedded import embedded_checks

    with pytest.raises(CheckSkippedError, match="GiB"):
        embedded_checks(_config(), model_dir, 1000)
