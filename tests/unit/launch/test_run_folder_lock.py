"""The run folder: one launcher at a time, described before anything starts, and exported afterwards."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cod_async.config import load_config, load_resolved
from cod_async.errors import InputError
from cod_async.launch import run_folder
from cod_async.launch.export import export_model, trained_versions
from cod_async.launch.interrupts import InterruptedRunError, Interrupts
from cod_async.launch.run_folder import RunLock, child_environment, cod_command, prepare, read_versions
from cod_async.lifecycle.segment import Version


def test_two_launchers_cannot_share_a_folder(tmp_path: Path) -> None:
    first, second = RunLock(tmp_path), RunLock(tmp_path)
    first.acquire(0.0, lambda text: None)
    with pytest.raises(InputError, match=f"another launcher \\(pid {os.getpid()}\\)"):
        second.acquire(0.0, lambda text: None)
    first.release()
    second.acquire(0.0, lambda text: None)
    second.release()


def test_a_resume_waits_for_the_children_of_a_dead_launcher(tmp_path: Path) -> None:
    lock = RunLock(tmp_path)
    lock.acquire(0.0, lambda text: None)
    holder = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], pass_fds=(lock.fd,))
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    os.ftruncate(lock.fd, 0)
    os.pwrite(lock.fd, str(dead.pid).encode(), 0)  # the launcher that wrote its pid is gone, its child is not
    lock.release()
    told: list[str] = []

    def on_wait(text: str) -> None:
        told.append(text)
        holder.kill()
        holder.wait()

    again = RunLock(tmp_path)
    again.acquire(20.0, on_wait)
    again.release()
    assert len(told) == 1


def test_left_over_processes_that_do_not_end_are_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_folder, "_EXTRA_WAIT_S", 0.0)
    lock = RunLock(tmp_path)
    lock.acquire(0.0, lambda text: None)
    os.ftruncate(lock.fd, 0)
    with pytest.raises(InputError, match="still run"):
        RunLock(tmp_path).acquire(0.0, lambda text: None)
    lock.release()


def test_the_folder_says_what_is_run_on_what(tmp_path: Path) -> None:
    config = load_config([], ['environments=[{name="hidden_buttons", preset="door"}]'])
    prepare(tmp_path, config, ["run.seed=0"], is_resume=False)
    prepare(tmp_path, config, [], is_resume=True)
    assert load_resolved(tmp_path) == config
    versions = read_versions(tmp_path)
    assert versions["libraries"]["msgspec"] and versions["python"]
    launches = [json.loads(line) for line in (tmp_path / "launches.jsonl").read_text().splitlines()]
    assert [launch["is_resume"] for launch in launches] == [False, True]
    assert launches[0]["overrides"] == ["run.seed=0"]
    assert read_versions(tmp_path / "nowhere") == {}


def test_children_find_this_source_tree_and_their_threads() -> None:
    environment = child_environment(2)
    assert environment["OMP_NUM_THREADS"] == "2"
    environment = {key: value for key, value in environment.items() if key != "COD_PARENT"}
    answer = subprocess.run(
        [*cod_command("--help")], env=environment, cwd="/", capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0 and "train" in answer.stdout


def make_run(folder: Path) -> None:
    model = folder / "model"
    model.mkdir(parents=True)
    for name in ("config.json", "tokenizer.json", "model.safetensors", "bootstrap.json"):
        (model / name).write_text(f"start {name}")
    for name in ("weights/L0000-S00000030", "checkpoints/step_00000020-L0", "checkpoints/step_00000025-L1",
                 "checkpoints/step_00000040-L0.tmp"):  # fmt: skip
        (folder / name).mkdir(parents=True)
        (folder / name / "model.safetensors").write_text(name)


def test_export_takes_the_newest_of_the_surviving_history(tmp_path: Path) -> None:
    make_run(tmp_path)
    assert set(trained_versions(tmp_path)) == {Version(0, 30), Version(0, 20), Version(1, 25)}
    out = tmp_path / "out"
    assert export_model(tmp_path, out) == Version(1, 25)
    assert (out / "model.safetensors").read_text() == "checkpoints/step_00000025-L1"
    assert (out / "tokenizer.json").read_text() == "start tokenizer.json"
    assert not (out / "bootstrap.json").exists()  # it describes other weights
    assert export_model(tmp_path, out, 20) == Version(0, 20)  # an earlier export is replaced
    assert (out / "model.safetensors").read_text() == "checkpoints/step_00000020-L0"


def test_export_refuses_by_name(tmp_path: Path) -> None:
    make_run(tmp_path)
    with pytest.raises(InputError, match="no weights of step 7; steps on disk: 20, 25, 30"):
        export_model(tmp_path, tmp_path / "out", 7)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match="not an earlier export"):
        export_model(tmp_path, tmp_path / "mine")
    with pytest.raises(InputError, match="no trained weights"):
        export_model(tmp_path / "mine", tmp_path / "out")


def test_signals_are_noted_or_raised() -> None:
    with Interrupts() as interrupts:
        assert interrupts.signum is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.signum == signal.SIGTERM
        with pytest.raises(InterruptedRunError), interrupts.raising():
            pytest.fail("a phase must not start after a signal")
    with Interrupts() as interrupts, pytest.raises(InterruptedRunError), interrupts.raising():
        os.kill(os.getpid(), signal.SIGINT)
        pytest.fail("the signal must have raised")


def test_export_never_replaces_a_run_folder(tmp_path: Path) -> None:
    """A run folder holds a config.json and weights too, and far more than an export."""
    run = tmp_path / "run"
    (run / "model").mkdir(parents=True)
    (run / "weights" / "L0000-S00000003").mkdir(parents=True)
    (run / "weights" / "L0000-S00000003" / "model.safetensors").write_bytes(b"w")
    (run / "config.json").write_text("{}")
    (run / "model.safetensors").write_bytes(b"w")
    with pytest.raises(InputError, match="not an earlier export"):
        export_model(run, run)
    assert (run / "config.json").is_file()
    assert (run / "weights" / "L0000-S00000003" / "model.safetensors").is_file()
