"""A whole run with an environment of another package that breaks, in workers, and cannot be restored."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from third_party import NAME, order, write_package

from cod_async.launch.run_folder import child_environment, cod_command
from cod_async.store.ledger import ledger

from .checker import check_run

pytestmark = [pytest.mark.fault, pytest.mark.slow, pytest.mark.timeout(400)]
TIMEOUT_S = 200.0

CONFIG = """
[[environments]]
name = "{name}"
preset = "door"
options = {{ commands = "{commands}", is_resumable = false }}
num_workers = 1
step_timeout_s = 100.0
reset_timeout_s = 100.0

[run]
name = "run"
output_dir = "{folder}"
num_steps = 4

[lifecycle]
pack_size = 3
group_size = 2
max_response_tokens = 4
max_hint_tokens = 4

[model]
max_context_tokens = 256

[bootstrap]
kind = "random"
model = {{ hidden_size = 16, num_layers = 1, num_heads = 2, num_kv_heads = 1, head_dim = 8, \
intermediate_size = 24 }}

[actors]
lifecycles_per_process = 4

[transport]
ack_journal_dir = "{folder}/acks"
heartbeat_s = 0.2
session_timeout_s = 3.0

[learner]
groups_per_step = 2

[evaluation]
is_enabled = false

[observe]
has_plots = false
has_tensorboard = false
"""


def until(condition: Callable[[], object], process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < deadline and process.poll() is None, log.read_text()
        time.sleep(0.05)


def test_workers_crash_and_an_actor_dies_while_its_worker_hangs(tmp_path: Path) -> None:
    site, commands, log = tmp_path / "site", tmp_path / "commands", tmp_path / "log"
    write_package(site)
    commands.mkdir()
    (tmp_path / "acks").mkdir()
    config = tmp_path / "config.toml"
    config.write_text(CONFIG.format(name=NAME, commands=commands, folder=tmp_path))
    paths = os.pathsep.join([str(site), os.environ.get("PYTHONPATH", "")])
    environment = {**child_environment(1), "PYTHONPATH": paths, "NO_COLOR": "1"}
    with log.open("ab") as out:
        process = subprocess.Popen(
            cod_command("train", str(config)),
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=out,
        )
    try:
        until((tmp_path / "run" / "run.sqlite").exists, process, log)  # the model is made, nobody plays yet
        order(commands, "step", "crash")
        order(commands, "reset", "raise")
        order(commands, "task2", "daemon")  # starts a child, and hangs until somebody kills it
        until((commands / "pids").exists, process, log)
        hung, child, daemon = (int(pid) for pid in (commands / "pids").read_text().split())
        actor = psutil.Process(hung).parent()
        assert actor is not None and "actor" in actor.cmdline()
        actor.send_signal(signal.SIGKILL)
        assert process.wait(TIMEOUT_S) == 0, log.read_text()
    finally:
        process.kill()
    os.kill(daemon, signal.SIGKILL)  # had left its worker's process group before the actor was killed
    assert not any(psutil.pid_exists(pid) for pid in (hung, child))
    assert not [p for p in psutil.process_iter() if "cod_async.envs.worker" in _command(p, site)]
    verdict = check_run(tmp_path / "run", tmp_path / "acks")
    assert verdict.problems == []
    books = ledger(tmp_path / "run")
    assert books["balanced"] and books["segments"]["dropped"]["restarted"] >= 1
    assert not list(commands.glob("*.*"))


def _command(process: psutil.Process, site: Path) -> list[str]:
    """The command line of a process that knows the package's folder."""
    try:
        is_ours = str(site) in process.environ().get("PYTHONPATH", "")
        return process.cmdline() if is_ours else []
    except psutil.Error:
        return []
