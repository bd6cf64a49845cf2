"""``cod engine RUN --name engine-0``: the process that hosts one SGLang server.

It takes a free port, draws keys, starts the server as its child and within its own process group, says in the
server's record when it can be used, and from then on watches it. It never repairs anything: when the server
is dead or wedged the host takes it down and ends, and the launcher starts a host anew, with another port and
other keys; actors find them in the record and bring the new server up to the current weights. So that nothing
is left behind, the server dies with its host (parent-death signal) and the launcher kills the whole group.

What the server writes goes through the host into its own output (``logs/engine-0.log``), keys blotted out.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import secrets
import signal
import socket
import subprocess
import sys
from collections.abc import Awaitable
from pathlib import Path

import msgspec

from cod_async.config.load import load_resolved
from cod_async.config.schema import Config
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.command import (
    START_LABEL,
    Interpreter,
    ServerKeys,
    device_environment,
    server_command,
    write_keys,
)
from cod_async.engines.sglang.complaints import take_complaint
from cod_async.engines.sglang.dealing import index_in_name
from cod_async.engines.sglang.records import ENGINES_FOLDER, ServerRecord, ServerState, write_record
from cod_async.errors import EngineDownError, EngineError, EngineMismatchError, EngineRefusedError, InputError
from cod_async.launch.engines import engine_environment, inspect_engine
from cod_async.launch.parent import tied_command
from cod_async.launch.phases import MODEL_NAME
from cod_async.launch.supervisor import LOST_CODE

log = logging.getLogger(__name__)

KEY_BYTES = 24
STOP_S = 10.0
"""A server gets this long (and no more than half of ``run.grace_s``) to give its device back; it has nothing
to save."""
INPUT_ERROR_CODE = 2
_POLL_START_S = 0.3
_POLL_END_S = 0.1
_DRAIN_S = 1.0
"""What a dead server still has in its pipe is read for this long."""
_MAX_LINE_BYTES = 1 << 16
_MARGIN_BYTES = 4 * KEY_BYTES
_REACHED_AT = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - all addresses; ours is the nearest


def run_engine(run_dir: Path, name: str) -> int:
    """Host the server ``name`` of the run in ``run_dir`` until told to stop.

    Returns:
        Exit code: 0 stopped by a signal, ``LOST_CODE`` when a server that had been usable is dead or wedged.

    Raises:
        InputError: the configuration, the interpreter or the server's arguments are wrong.
        EngineError: the server did not become usable.
    """
    config = load_resolved(run_dir)
    if config.engine.kind != "sglang" or config.engine.urls:
        raise InputError(f'{run_dir}: its engine.kind is "{config.engine.kind}"; it has no servers to start')
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    host = EngineHost(config, run_dir, name, inspect_engine(config))
    try:
        return asyncio.run(host.run())
    except EngineDownError as error:
        log.error("%s is lost: %s", name, error)
        return LOST_CODE


def free_port(host: str) -> int:
    """Return a TCP port that nobody listens on at ``host`` now; who takes it first has it.

    Raises:
        InputError: ``host`` is no address of this machine.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((host, 0))
            return int(probe.getsockname()[1])
    except OSError as error:
        raise InputError(
            f'engine.server.host: nothing can listen at "{host}" ({error}); use an address of this machine'
        ) from error


class EngineHost:
    """One server and its host.

    Args:
        config: the run's configuration.
        run_dir: the run folder, with ``model/`` in it.
        name: of the server, ``engine-N``.
        interpreter: what to start it with.
    """

    def __init__(self, config: Config, run_dir: Path, name: str, interpreter: Interpreter) -> None:
        server = config.engine.server
        host = server.host.strip("[]")
        port = free_port(host)
        reached = _REACHED_AT.get(host, host)
        self._config = config
        self._name = name
        self._run_dir = run_dir
        self._model_dir = (run_dir / MODEL_NAME).resolve()
        self._interpreter = interpreter
        self._keys = ServerKeys(secrets.token_hex(KEY_BYTES), secrets.token_hex(KEY_BYTES))
        self._keys_path = run_dir.resolve() / ENGINES_FOLDER / f"{name}.yaml"
        self._command = server_command(
            config,
            self._model_dir,
            interpreter=interpreter,
            port=port,
            keys_path=self._keys_path,
            index=index_in_name(name),
        )
        self._record = ServerRecord(
            name=name,
            url=f"http://[{reached}]:{port}" if ":" in reached else f"http://{reached}:{port}",
            api_key=self._keys.api_key,
            admin_key=self._keys.admin_key,
            state="starting",
            instance=secrets.token_hex(8),
            pid=os.getpid(),
        )
        self._is_stopping = asyncio.Event()
        self._last_line = ""

    async def run(self) -> int:
        """Host the server; see :func:`run_engine`."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._is_stopping.set)
        self._write("starting")
        write_keys(self._keys_path, self._keys)
        environment = engine_environment(self._config) | device_environment(self._interpreter)
        log.info(
            "starting %s at %s: sglang %s, %s",
            self._name,
            self._record.url,
            self._interpreter.release,
            "CUDA" if self._interpreter.has_cuda else "CPU",
        )
        # Not asyncio's: its wait() also waits for whoever else holds the other end of the pipe.
        process = subprocess.Popen(
            tied_command(self._command),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=environment,
        )
        output = asyncio.StreamReader()
        pipe, _ = await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(output), process.stdout)
        reading = asyncio.create_task(self._pass_on(output))
        client = ServerClient(
            self._record.url,
            settings=self._config.engine.server,
            vocab_size=1,  # this client never generates
            api_key=self._keys.api_key,
            admin_key=self._keys.admin_key,
        )
        try:
            return await self._host(process, client)
        finally:
            with contextlib.suppress(OSError):  # a full disk must not keep the server alive
                self._write("down")
            await client.aclose()
            await self._end(process)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reading, _DRAIN_S)
            pipe.close()
            self._keys_path.unlink(missing_ok=True)

    async def _host(self, process: subprocess.Popen[bytes], client: ServerClient) -> int:
        timeout_s = self._config.engine.server.start_timeout_s
        try:
            async with asyncio.timeout(timeout_s):
                if not await self._unless_over(process, self._until_usable(client)):
                    return 0
        except TimeoutError:
            raise EngineError(
                f"{self._name} did not answer within engine.server.start_timeout_s = {timeout_s:g} s; "
                f"its last words: {self._last_line or 'none'}"
            ) from None
        except EngineDownError as error:
            raise self._never_started(process, error) from None
        self._keys_path.unlink(missing_ok=True)  # the server has read it
        self._write("ready")
        log.info("%s is ready", self._name)
        try:
            await self._unless_over(process, self._watch(client))
        except EngineDownError:
            process.kill()  # what is wedged does not listen either
            raise
        return 0

    async def _unless_over(self, process: subprocess.Popen[bytes], work: Awaitable[None]) -> bool:
        """Do ``work``; return False when told to stop before it was done.

        Raises:
            EngineDownError: the server's process ended before.
        """
        working = asyncio.ensure_future(work)
        ending = asyncio.create_task(_ended(process))
        stopping = asyncio.create_task(self._is_stopping.wait())
        try:
            await asyncio.wait({working, ending, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if stopping.done():
                log.info("%s is told to stop", self._name)
                return False
            if ending.done():
                raise EngineDownError(f"its process ended with {_cause(ending.result())}")
            await working
            return True
        finally:
            for task in (working, ending, stopping):
                task.cancel()
            await asyncio.gather(working, ending, stopping, return_exceptions=True)

    def _never_started(self, process: subprocess.Popen[bytes], error: EngineDownError) -> Exception:
        """Return what it means that the server ended before it could be used."""
        said = f"{self._name} could not start: {error}; its last words: {self._last_line or 'none'}"
        if process.returncode == INPUT_ERROR_CODE:  # argparse
            return InputError(f"engine.server.args: SGLang refuses its arguments; {said}")
        return EngineError(said)

    async def _until_usable(self, client: ServerClient) -> None:
        """Return once the server answers and is the one that was started.

        Raises:
            EngineError: something else answers.
        """
        while True:
            try:
                info = await client.info()
                break
            except (EngineDownError, EngineRefusedError):  # not listening yet, or not all of it
                await asyncio.sleep(_POLL_START_S)
            except EngineMismatchError as error:
                raise EngineError(f"{self._name} is not usable: {error}") from error
        wanted = _architecture(self._model_dir)
        if (
            os.path.realpath(info.model_path) != str(self._model_dir)
            or info.label != START_LABEL
            or wanted not in ("", info.architecture)
        ):
            raise EngineError(
                f"{self._record.url} serves {info.architecture} {info.label} from {info.model_path}, not "
                f"{wanted} {START_LABEL} from {self._model_dir}; it is another server, or engine.server.args "
                "name another model"
            )

    async def _watch(self, client: ServerClient) -> None:
        """Probe the server for as long as it is healthy.

        The HTTP process must answer each probe. The scheduler behind it may be silent for as long as a step
        of a weight update may take, unless the actor complains, which knows whether weights change.

        Raises:
            EngineDownError: it is wedged.
        """
        server = self._config.engine.server
        silence_s = max(server.stall_timeout_s, server.update_timeout_s)
        loop = asyncio.get_running_loop()
        num_failures, num_complaints, heard_s = 0, 0, loop.time()
        while True:
            await asyncio.sleep(server.probe_every_s)
            num_failures = 0 if await _answers(client.label(), server.probe_timeout_s) else num_failures + 1
            if num_failures >= server.max_failed_probes:
                raise EngineDownError(f"{num_failures} probes in a row failed; it is wedged")
            is_well = num_failures == 0 and await _answers(client.load(), server.probe_timeout_s)
            heard_s = loop.time() if is_well else heard_s
            if loop.time() - heard_s > silence_s:
                raise EngineDownError(f"its scheduler was silent for {silence_s:g} s; it is wedged")
            complaint = take_complaint(self._run_dir, self._name, self._record.instance)
            if complaint is not None:
                num_complaints += 1
                log.warning("%s: its actor has given it up: %s", self._name, complaint)
                if not is_well or num_complaints > 1:
                    raise EngineDownError(f"its actor has given it up: {complaint}")

    async def _end(self, process: subprocess.Popen[bytes]) -> None:
        """Stop the server's process; its own children die with it."""
        process.terminate()  # nothing happens to one that has ended
        try:
            await asyncio.wait_for(_ended(process), min(STOP_S, self._config.run.grace_s / 2))
        except TimeoutError:
            process.kill()
            await _ended(process)

    def _write(self, state: ServerState) -> None:
        keys = ServerKeys("", "") if state == "down" else self._keys
        record = msgspec.structs.replace(
            self._record, state=state, api_key=keys.api_key, admin_key=keys.admin_key
        )
        write_record(self._run_dir, record)

    async def _pass_on(self, output: asyncio.StreamReader) -> None:
        """Copy the server's output to this process's, keys blotted out, until it ends."""
        keys = [key.encode() for key in (self._keys.api_key, self._keys.admin_key)]
        held = b""
        while chunk := await output.read(_MAX_LINE_BYTES):
            held += chunk
            for key in keys:
                held = held.replace(key, b"***")
            cut = held.rfind(b"\n") + 1
            if not cut and len(held) > _MAX_LINE_BYTES:  # a key may be cut in two at its end
                cut = len(held) - _MARGIN_BYTES
            self._say(held[:cut])
            held = held[cut:]
        self._say(held)

    def _say(self, output: bytes) -> None:
        if not output:
            return
        with contextlib.suppress(OSError):  # a full disk; if nobody read on, the server would stand still
            sys.stderr.buffer.write(output)
            sys.stderr.buffer.flush()
        lines = output[-_MAX_LINE_BYTES:].decode(errors="replace").splitlines()
        self._last_line = next((line.strip() for line in reversed(lines) if line.strip()), self._last_line)[
            -500:
        ]


async def _ended(process: subprocess.Popen[bytes]) -> int:
    """Return the code of a process that has ended, once it has."""
    while (code := process.poll()) is None:
        await asyncio.sleep(_POLL_END_S)
    return code


async def _answers(call: Awaitable[object], timeout_s: float) -> bool:
    """Whether a call to the server is answered in time; a refusal is an answer."""
    try:
        async with asyncio.timeout(timeout_s):
            await call
    except EngineRefusedError:
        return True
    except (EngineError, TimeoutError) as error:
        log.warning("probe failed: %s", str(error) or "no answer in time")
        return False
    return True


def _cause(code: int) -> str:
    return f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"


def _architecture(model_dir: Path) -> str:
    """Return the architecture that a model directory names; empty if it names none."""
    try:
        found = json.loads((model_dir / "config.json").read_text()).get("architectures")
    except (OSError, ValueError) as error:
        raise InputError(f"{model_dir / 'config.json'}: cannot be read, {error}; correct it") from error
    return str(found[0]) if isinstance(found, list) and found else ""
