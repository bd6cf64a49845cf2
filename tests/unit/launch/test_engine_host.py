"""The process that hosts a server: what it says about it, what it does when it dies, hangs or never starts,
and that neither keys nor processes get away. SGLang is a fake one behind a real interpreter.
"""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sglang_stand_in import make_stand_in

from cod_async.config import Config, load_config, save_resolved
from cod_async.engines.sglang.command import Interpreter
from cod_async.engines.sglang.complaints import complain, take_complaint
from cod_async.engines.sglang.records import ServerRecord, read_records
from cod_async.errors import EngineDownError, EngineError, InputError, WorkError
from cod_async.launch.engine_host import EngineHost
from cod_async.launch.run_folder import _is_alive, cod_command
from cod_async.launch.supervisor import LOST_CODE, MAX_OWN_FAILURES, Supervisor

TIMEOUT_S = 60.0
MODEL = {
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "vocab_size": 320, "hidden_size": 64,
    "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 16, "max_position_embeddings": 4096,
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run folder, and an interpreter with a fake SGLang for whoever runs in it."""
    monkeypatch.setenv("PYTHONPATH", str(make_stand_in(tmp_path / "stand_in")))
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(MODEL))
    return folder


def configured(run_dir: Path, *overrides: str) -> Config:
    base = ['environments=[{name="hidden_buttons", preset="door"}]', 'engine.kind="sglang"']
    quick = ["engine.server.probe_every_s=0.05", "run.grace_s=10"]
    config = load_config([], [*base, *quick, *overrides])
    save_resolved(config, run_dir)
    return config


def host_of(run_dir: Path, *overrides: str) -> EngineHost:
    python = Interpreter(python=sys.executable, release="0.5.23", torch="2", has_cuda=False)
    return EngineHost(configured(run_dir, *overrides), run_dir, "engine-0", python)


def record_of(run_dir: Path) -> ServerRecord | None:
    return next(iter(read_records(run_dir)), None)


def state_of(run_dir: Path) -> str:
    record = record_of(run_dir)
    return record.state if record else ""


def wait_until(is_so: Callable[[], bool]) -> None:
    deadline = time.monotonic() + TIMEOUT_S
    while not is_so():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def until_ready(run_dir: Path, log: Path) -> ServerRecord:
    wait_until(lambda: state_of(run_dir) == "ready" or "Error" in log.read_text())
    record = record_of(run_dir)
    assert record is not None and record.state == "ready", log.read_text()
    return record


def group(pid: int) -> list[int]:
    """Living processes of a process group."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = path.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        if int(fields[2]) == pid and fields[0] != "Z":
            found.append(int(path.parent.name))
    return found


def command_lines(pids: list[int]) -> str:
    return "\n".join(Path(f"/proc/{pid}/cmdline").read_text().replace("\0", " ") for pid in pids)


async def after(run_dir: Path, act: Callable[[ServerRecord], None]) -> None:
    """Act once the server is ready."""
    while True:
        record = record_of(run_dir)
        if record is not None and record.state == "ready":
            return act(record)
        await asyncio.sleep(0.01)


async def hosted(host: EngineHost, run_dir: Path, act: Callable[[ServerRecord], None]) -> int:
    acting = asyncio.create_task(after(run_dir, act))
    try:
        async with asyncio.timeout(TIMEOUT_S):
            return await host.run()
    finally:
        acting.cancel()


def the_server(run_dir: Path) -> int:
    """Process id of the run's server, which this process hosts."""
    lines = subprocess.run(
        ["ps", "-ww", "-o", "pid=,args=", "--ppid", str(os.getpid())], capture_output=True, text=True
    )
    (pid,) = [
        int(line.split()[0])
        for line in lines.stdout.splitlines()
        if "sglang.launch_server" in line and str(run_dir) in line
    ]
    return pid


@pytest.fixture
def supervisor(run_dir: Path) -> Iterator[Supervisor]:
    made = Supervisor(run_dir / "logs", dict(os.environ), grace_s=10)
    yield made
    made.kill()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_server_is_started_found_and_stopped_and_its_keys_stay_secret(
    run_dir: Path, supervisor: Supervisor
) -> None:
    configured(run_dir)
    child = supervisor.start("engine", "engine-0", cod_command("engine", str(run_dir), "--name", "engine-0"))
    log = supervisor.log_path(child)
    record = until_ready(run_dir, log)
    assert child.pid is not None and record.pid == child.pid
    assert record.url.startswith("http://127.0.0.1:") and record.api_key != record.admin_key
    path = run_dir / "engines" / "engine-0.json"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert [found.name for found in path.parent.iterdir()] == [
        "engine-0.json"
    ]  # the server has read its keys
    pids = group(child.pid)
    shown = command_lines(pids) + log.read_text()
    assert len(pids) == 3 and "--port" in shown and "no line end yet: ***" in shown
    assert record.api_key not in shown and record.admin_key not in shown
    assert supervisor.stop(20.0) == []
    assert child.returncode == 0
    wait_until(lambda: group(child.pid or 0) == [])
    down = record_of(run_dir)
    assert down is not None and (down.state, down.api_key, down.admin_key) == ("down", "", "")


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux only")
def test_a_killed_host_takes_everything_with_it_and_another_server_comes(
    run_dir: Path, supervisor: Supervisor
) -> None:
    configured(run_dir)
    child = supervisor.start("engine", "engine-0", cod_command("engine", str(run_dir), "--name", "engine-0"))
    first = until_ready(run_dir, supervisor.log_path(child))
    assert child.pid is not None and child.process is not None
    old, (server,) = (
        child.pid,
        [pid for pid in group(child.pid) if "sglang.launch_server" in command_lines([pid])],
    )
    os.kill(old, signal.SIGKILL)
    wait_until(lambda: not _is_alive(server))  # without anybody's help
    child.process.wait(TIMEOUT_S)
    supervisor.poll()
    wait_until(lambda: group(old) == [])

    def has_come_back() -> bool:
        supervisor.poll()
        record = record_of(run_dir)
        return record is not None and record.state == "ready" and record.instance != first.instance

    wait_until(has_come_back)
    second = record_of(run_dir)
    assert second is not None and second.api_key not in (first.api_key, "")
    assert child.num_restarts == 1


def test_a_server_that_dies_is_lost_and_its_record_says_so(run_dir: Path) -> None:
    host = host_of(run_dir)
    with pytest.raises(EngineDownError, match="SIGKILL"):
        asyncio.run(hosted(host, run_dir, lambda _: os.kill(the_server(run_dir), signal.SIGKILL)))
    assert state_of(run_dir) == "down"


def test_a_server_that_hangs_is_taken_down(run_dir: Path) -> None:
    pids: list[int] = []

    def wedge(_: ServerRecord) -> None:
        pids.append(the_server(run_dir))
        (run_dir / "engines" / "wedge").touch()

    host = host_of(
        run_dir, "engine.server.probe_timeout_s=1", "engine.server.max_failed_probes=2", "run.grace_s=2"
    )
    with pytest.raises(EngineDownError, match="2 probes in a row failed"):
        asyncio.run(hosted(host, run_dir, wedge))
    assert not _is_alive(pids[0])
    assert state_of(run_dir) == "down"


def test_an_actor_that_complains_twice_is_believed(run_dir: Path) -> None:
    host = host_of(run_dir)
    taken = []

    async def life() -> None:
        async def grumble() -> None:
            record: ServerRecord | None = None
            while record is None or record.state != "ready":
                await asyncio.sleep(0.01)
                record = record_of(run_dir)
            for number in range(2):
                complain(run_dir, record, f"requests break off, {number}")
                while (run_dir / "engines" / "engine-0.complaint").exists():
                    await asyncio.sleep(0.01)
                taken.append(number)

        grumbling = asyncio.create_task(grumble())
        async with asyncio.timeout(TIMEOUT_S):
            try:
                await host.run()
            finally:
                await grumbling

    with pytest.raises(EngineDownError, match="given it up: requests break off, 1"):
        asyncio.run(life())
    assert taken == [0, 1]


def test_complaints_are_about_one_instance_and_attached_servers_have_no_host(tmp_path: Path) -> None:
    (tmp_path / "engines").mkdir()
    record = ServerRecord(name="engine-0", url="http://127.0.0.1:1", instance="a", pid=7)
    complain(tmp_path, record, "x" * 1000)
    assert take_complaint(tmp_path, "engine-0", "b") is None
    assert take_complaint(tmp_path, "engine-0", "a") is None  # gone with the first look
    complain(tmp_path, record, "x" * 1000)
    assert take_complaint(tmp_path, "engine-0", "a") == "x" * 500
    complain(tmp_path, ServerRecord(name="url-0", url="http://127.0.0.1:1"), "slow")
    assert list((tmp_path / "engines").iterdir()) == []


@pytest.mark.parametrize(
    ("args", "error", "cause"),
    [
        (["--fault", "dies"], EngineError, "code 1; its last words: no memory left for weights"),
        (["--fault", "never"], EngineError, "start_timeout_s = 1 s"),
        (["--fault", "model"], EngineError, "from /elsewhere, not Qwen3ForCausalLM L0-S0"),
        (["--nonsense"], InputError, "unrecognized arguments: --nonsense"),
    ],
)
def test_a_server_that_cannot_be_used(
    run_dir: Path, args: list[str], error: type[Exception], cause: str
) -> None:
    never = ["engine.server.start_timeout_s=1"] if "never" in args else []
    host = host_of(run_dir, f"engine.server.args={json.dumps(args)}", *never)
    with pytest.raises(error, match=cause) as caught:
        asyncio.run(hosted(host, run_dir, lambda _: None))
    assert not isinstance(caught.value, EngineDownError)  # it never worked: a start again would not help
    assert state_of(run_dir) == "down"
    assert [path.name for path in (run_dir / "engines").iterdir()] == ["engine-0.json"]


def test_a_log_that_cannot_be_written_does_not_stop_the_server(
    run_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full(io.BytesIO):
        def write(self, data: object) -> int:
            raise OSError(errno.ENOSPC, "No space left on device")

    async def main() -> str:
        host, output = host_of(run_dir), asyncio.StreamReader()
        output.feed_data(b"one\nlast words\n")
        output.feed_eof()
        with monkeypatch.context() as patched:
            patched.setattr(sys, "stderr", io.TextIOWrapper(Full(), write_through=True))
            await host._pass_on(output)
        return host._last_line

    assert asyncio.run(main()) == "last words"


def test_told_to_stop_while_the_server_starts(run_dir: Path) -> None:
    host = host_of(run_dir, 'engine.server.args=["--fault", "never"]')

    async def life() -> int:
        async def stop() -> None:
            while not state_of(run_dir):
                await asyncio.sleep(0.01)
            os.kill(os.getpid(), signal.SIGTERM)

        stopping = asyncio.create_task(stop())
        async with asyncio.timeout(TIMEOUT_S):
            code = await host.run()
        await stopping
        return code

    assert asyncio.run(life()) == 0
    assert state_of(run_dir) == "down"


def test_a_lost_server_is_no_defect_of_its_host_but_one_that_never_starts_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now_s = [1000.0]

    def lives(code: int) -> Supervisor:
        made = Supervisor(tmp_path / str(code), dict(os.environ), grace_s=5, clock=lambda: now_s[0])
        made.start(
            "engine", "engine-0", [sys.executable, "-S", "-c", f"print('why'); raise SystemExit({code})"]
        )
        return made

    def live_on(made: Supervisor, num_lives: int) -> None:
        (child,) = made.children
        for _ in range(num_lives):
            assert child.process is not None
            child.process.wait(TIMEOUT_S)
            now_s[0] += 500.0  # a server may take minutes until it is clear that it will not start
            made.poll()
            now_s[0] += 10.0
            made.poll()

    lost = lives(LOST_CODE)
    live_on(lost, MAX_OWN_FAILURES + 2)
    assert lost.children[0].num_restarts == MAX_OWN_FAILURES + 2
    lost.kill()
    broken = lives(1)
    with pytest.raises(WorkError, match="why"):
        live_on(broken, MAX_OWN_FAILURES + 2)
    assert broken.children[0].num_restarts == MAX_OWN_FAILURES - 1
