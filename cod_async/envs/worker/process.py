"""The actor's side of one environment worker: calls with time limits, and an end that leaves nothing behind.

A call's clock starts when the worker says that the call has its turn. A call that takes too long ends the
worker, because code that computes cannot be interrupted in any other way: its process group and whatever it
started are killed, and every call that was under way fails as infrastructure.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, cast

import msgspec

from cod_async.envs.worker.messages import (
    Answer,
    Began,
    Call,
    Close,
    Failed,
    FrameReader,
    decode_answer,
    encode_frame,
)
from cod_async.errors import EnvironmentInputError, InfrastructureError

log = logging.getLogger(__name__)

EndReason = Literal["timeout", "memory", "died", "protocol", "closed"]
"""Why a worker ended: a call took too long; its memory limit; by itself (crash, kernel's OOM killer); it said
something unreadable; the actor needs it no more.
"""
QUIET_S = 60.0
"""A worker with nothing else to do that does not begin a call (or start up) within this time is hung."""
CLOSE_S = 2.0
"""Time that a worker has to end by itself when it is no longer needed."""
_POLL_S = 0.01
_MAX_REAP_POLLS = 500


@dataclass
class _Pending:
    """A call that is not answered yet."""

    answer: asyncio.Future[Answer]
    what: str
    limit_s: float
    timer: asyncio.TimerHandle
    has_begun: bool = False


class WorkerProcess(asyncio.Protocol):
    """One child process. Make it with :meth:`start`.

    Attributes:
        num_instances: environment objects that live in it; kept by the pool.
        end: why it ended; None while it lives.
    """

    def __init__(self, process: subprocess.Popen[bytes], lifeline: int) -> None:
        self._process = process
        self._lifeline = lifeline
        self._transport: asyncio.Transport | None = None
        self._frames = FrameReader()
        self._pending: dict[int, _Pending] = {}
        self._loop = asyncio.get_running_loop()
        self._heard_at = self._loop.time()
        self._on_end: Callable[[WorkerProcess], None] = lambda worker: None
        self.num_instances = 0
        self.end: EndReason | None = None
        self._reaping: asyncio.Task[None] | None = None

    @classmethod
    async def start(cls, memory_bytes: int, on_end: Callable[[WorkerProcess], None]) -> WorkerProcess:
        """Start a worker whose address space is limited to ``memory_bytes`` (0: not limited).

        Args:
            memory_bytes: the limit.
            on_end: called once, when the worker has ended for any reason.
        """
        ours, theirs = socket.socketpair()
        lifeline_read, lifeline_write = os.pipe()
        command = [sys.executable, "-P", "-m", "cod_async.envs.worker"]
        command += [str(number) for number in (theirs.fileno(), lifeline_read, memory_bytes)]
        try:
            process = subprocess.Popen(
                command,
                pass_fds=(theirs.fileno(), lifeline_read),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                env=_variables(),
                start_new_session=True,
            )
        except OSError as error:
            ours.close()
            os.close(lifeline_write)
            raise InfrastructureError(f"no environment worker can be started: {error}") from error
        finally:
            theirs.close()
            os.close(lifeline_read)
        worker = cls(process, lifeline_write)
        worker._on_end = on_end
        ours.setblocking(False)
        await worker._loop.create_connection(lambda: worker, sock=ours)
        return worker

    @property
    def pid(self) -> int:
        """Process id, which is also that of its process group."""
        return self._process.pid

    @property
    def is_collected(self) -> bool:
        """Whether it has ended and left no zombie."""
        return self._reaping is not None and self._reaping.done()

    # ------------------------------------------------------------------------------------------------ calls

    async def call(self, call: Call, what: str, limit_s: float) -> Answer:
        """Let the worker do something.

        Args:
            call: with a number that was not used before.
            what: how a failure names it.
            limit_s: most seconds from when the call has its turn; past them the worker is killed.

        Raises:
            InfrastructureError: the environment raised, took too long or used too much memory, or the worker
                ended because of somebody else.
            EnvironmentInputError: the environment found its record, preset or options wrong.
        """
        if self.end is not None or self._transport is None:
            raise InfrastructureError(
                f"{what}: its environment worker has ended ({self.end or 'not started'})"
            )
        frame = encode_frame(call)
        timer = self._loop.call_later(QUIET_S, self._check_turn, call.call)
        pending = _Pending(self._loop.create_future(), what, limit_s, timer)
        self._pending[call.call] = pending
        self._transport.write(frame)
        answer = await pending.answer
        if isinstance(answer, Failed):
            if answer.is_input:
                raise EnvironmentInputError(answer.problems)
            raise InfrastructureError(f"{what}: {'; '.join(answer.problems)}")
        return answer

    def forget(self, instance: int) -> None:
        """Let the worker close an environment object; what it is doing is stopped."""
        if self.end is None and self._transport is not None:
            self._transport.write(encode_frame(Close(instance=instance)))

    def _check_turn(self, number: int) -> None:
        """See to a call that waits long for its turn: another's clock is running, or the worker is hung."""
        pending = self._pending[number]
        is_busy = any(other.has_begun for other in self._pending.values())
        quiet_s = self._loop.time() - self._heard_at
        if not is_busy and quiet_s >= QUIET_S:
            self._kill("timeout", f"it has said nothing for {quiet_s:.0f} s")
        else:
            wait_s = QUIET_S if is_busy else QUIET_S - quiet_s
            pending.timer = self._loop.call_later(wait_s, self._check_turn, number)

    def _overdue(self, number: int) -> None:
        pending = self._pending.pop(number)
        detail = f"{pending.what} took longer than {pending.limit_s:g} s"
        self._fail(pending, detail)
        self._kill("timeout", detail)

    # ------------------------------------------------------------------------------------- asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport; called by asyncio."""
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        """Take answers; called by asyncio."""
        self._heard_at = self._loop.time()
        try:
            for payload in self._frames.feed(data):
                self._take(decode_answer(payload))
        except (InfrastructureError, msgspec.MsgspecError) as error:
            self._kill("protocol", f"it said something unreadable: {error}")

    def connection_lost(self, error: Exception | None) -> None:
        """See to the end; called by asyncio."""
        self._kill("died", "it ended by itself")

    def _take(self, message: Began | Answer) -> None:
        pending = self._pending.get(message.call)
        if pending is None or self.end is not None:
            return
        pending.timer.cancel()
        if isinstance(message, Began):
            pending.has_begun = True
            pending.timer = self._loop.call_later(pending.limit_s, self._overdue, message.call)
            return
        del self._pending[message.call]
        if not pending.answer.done():  # its lifecycle may have been cancelled meanwhile
            pending.answer.set_result(message)
        if isinstance(message, Failed) and message.is_out_of_memory:
            self._kill("memory", f"{pending.what} ran out of memory")

    # ---------------------------------------------------------------------------------------------- its end

    def _fail(self, pending: _Pending, detail: str) -> None:
        pending.timer.cancel()
        if not pending.answer.done():
            pending.answer.set_exception(InfrastructureError(detail))

    def _kill(self, reason: EndReason, detail: str) -> None:
        """End the worker and everything that it started; all of its calls fail."""
        if self.end is not None:
            return
        self.end = reason
        log.warning("environment worker %d is lost (%s): %s", self.pid, reason, detail)
        kill_tree(self._process)
        pending, self._pending = self._pending, {}
        for call in pending.values():
            self._fail(call, f"{call.what}: its environment worker {self.pid} was lost: {detail}")
        self._release()
        self._on_end(self)

    def _release(self) -> None:
        if self._transport is not None:
            self._transport.abort()
        os.close(self._lifeline)
        self._reaping = self._loop.create_task(self._reap())

    async def _reap(self) -> None:
        """Collect the exit code of a process that was killed."""
        for _ in range(_MAX_REAP_POLLS):
            code = self._process.poll()
            if code is not None:
                if self.end == "died":
                    log.warning("environment worker %d had ended with exit code %d", self.pid, code)
                return
            await asyncio.sleep(_POLL_S)

    async def close(self) -> None:
        """Let the worker close its environments and end; kill it when it takes more than :data:`CLOSE_S`."""
        if self.end is None and self._transport is not None:
            self.end = "closed"
            for call in self._pending.values():
                self._fail(call, f"{call.what}: its environment worker is being closed")
            self._pending.clear()
            self._transport.close()
            deadline = self._loop.time() + CLOSE_S
            while not _has_exited(self._process) and self._loop.time() < deadline:
                await asyncio.sleep(_POLL_S)
            kill_tree(self._process)
            self._release()
        if self._reaping is not None:
            await self._reaping


def kill_tree(process: subprocess.Popen[bytes]) -> None:
    """Kill a worker that was not waited for yet, its process group, and descendants outside of that."""
    import psutil

    try:
        descendants = psutil.Process(process.pid).children(recursive=True)
    except psutil.Error:
        descendants = []
    # Until it is waited for, its process id cannot belong to anybody else.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    for descendant in descendants:
        with contextlib.suppress(psutil.Error):
            descendant.kill()


def _has_exited(process: subprocess.Popen[bytes]) -> bool:
    """Whether a process has ended, without collecting its exit code."""
    try:
        return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
    except ChildProcessError:
        return True


def _variables() -> dict[str, str]:
    """Return a worker's environment variables: our import paths, and one thread for numeric libraries."""
    paths = [path or os.getcwd() for path in sys.path]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    return {**os.environ, **threads, "PYTHONPATH": os.pathsep.join(dict.fromkeys(paths))}
