"""The child's side: many environment objects, one loop, every call answered.

Calls of different objects interleave where they await something; code that computes has the process to
itself. When the actor's end of the socket closes, the objects are closed and the process ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket

from cod_async.envs import registry
from cod_async.envs.base import Environment
from cod_async.envs.worker.messages import (
    Answer,
    Began,
    Call,
    Close,
    Failed,
    Finish,
    Finished,
    FrameReader,
    FromWorker,
    Made,
    Make,
    Start,
    Started,
    Step,
    Stepped,
    ToWorker,
    decode_request,
    encode_frame,
)
from cod_async.envs.worker.results import (
    checked_closing,
    checked_opening,
    checked_result,
    checked_snapshot,
)
from cod_async.errors import InfrastructureError, InputError

MAX_PROBLEM_CHARS = 4096
MAX_PROBLEMS = 64
CLOSE_S = 1.0
"""Time that each environment object has to close itself."""
_READ_BYTES = 1 << 18


class Host:
    """Serves one actor over one connected socket."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._instances: dict[int, Environment] = {}
        self._running: dict[int, dict[int, asyncio.Task[None]]] = {}
        self._closing: set[asyncio.Task[None]] = set()

    async def serve(self) -> None:
        """Answer calls until the actor hangs up."""
        frames = FrameReader()
        with contextlib.suppress(ConnectionError):
            while data := await self._reader.read(_READ_BYTES):
                for payload in frames.feed(data):
                    self._take(decode_request(payload))
        for instance in list(self._instances):
            self._close(instance)
        await asyncio.gather(*self._closing, return_exceptions=True)

    def _take(self, message: ToWorker) -> None:
        if isinstance(message, Close):
            self._close(message.instance)
            return
        running = self._running.setdefault(message.instance, {})
        task = running[message.call] = asyncio.create_task(self._answer(message))
        task.add_done_callback(lambda _: running.pop(message.call, None))

    def _close(self, instance: int) -> None:
        task = asyncio.create_task(self._end(instance))
        self._closing.add(task)
        task.add_done_callback(self._closing.discard)

    async def _end(self, instance: int) -> None:
        """Stop what an object is doing, then let it release what it holds."""
        running = dict(self._running.pop(instance, {}))
        for task in running.values():
            task.cancel()
        await asyncio.gather(*running.values(), return_exceptions=True)
        for call in running:  # so that nobody's clock runs on
            await self._say(Failed(call=call, problems=("its environment was closed",)))
        environment = self._instances.pop(instance, None)
        if environment is not None:
            # What goes wrong here concerns no episode; what stays behind dies with this process.
            with contextlib.suppress(Exception, SystemExit):
                await asyncio.wait_for(environment.close(), CLOSE_S)

    async def _answer(self, call: Call) -> None:
        await self._say(Began(call=call.call))
        answer: Answer
        try:
            answer = await self._do(call)
            frame = encode_frame(answer)
        except MemoryError:
            answer = Failed(call=call.call, problems=("it ran out of memory",), is_out_of_memory=True)
            frame = encode_frame(answer)
        except (Exception, SystemExit) as error:
            answer = _failure(call, error)
            frame = encode_frame(answer)
        await self._send(frame)
        if isinstance(answer, Failed) and answer.is_out_of_memory:
            os._exit(1)  # whatever leaked is gone; the other objects' episodes are played again elsewhere

    async def _say(self, message: FromWorker) -> None:
        await self._send(encode_frame(message))

    async def _send(self, frame: bytes) -> None:
        with contextlib.suppress(ConnectionError):  # the actor is gone; `serve` is about to notice
            self._writer.write(frame)
            await self._writer.drain()

    async def _do(self, call: Call) -> Answer:
        if isinstance(call, Make):
            return self._make(call)
        environment = self._instances[call.instance]
        match call:
            case Start():
                opening = await environment.start(call.task, call.state)
                return Started(call=call.call, opening=checked_opening(opening))
            case Step():
                environment.is_response_cut = call.is_response_cut
                result = await environment.step(call.response)
                return Stepped(call=call.call, result=checked_result(result))
            case Finish():
                closing = await environment.finish(call.messages, call.has_feedback)
                return Finished(call=call.call, closing=checked_closing(closing))

    def _make(self, call: Make) -> Made:
        environment = registry.get(call.environment).make(call.options)
        made = Made(
            call=call.call,
            name=environment.name,
            prompt_style=environment.prompt_style,
            is_resumable=environment.is_resumable,
            is_step_penalized=environment.is_step_penalized,
            has_update_prompts=environment.update_prompts() is not None,
            snapshot=checked_snapshot(environment.snapshot()),
        )
        self._instances[call.instance] = environment
        return made


def _failure(call: Call, error: BaseException) -> Failed:
    """Say what an environment raised, in a sentence or more of bounded length."""
    if isinstance(error, InputError):
        problems = tuple(problem[:MAX_PROBLEM_CHARS] for problem in error.problems[:MAX_PROBLEMS])
        return Failed(call=call.call, problems=tuple(map(_sendable, problems)), is_input=True)
    text = str(error) if isinstance(error, InfrastructureError) else f"{type(error).__name__}: {error}"
    return Failed(call=call.call, problems=(_sendable(text[:MAX_PROBLEM_CHARS]),))


def _sendable(text: str) -> str:
    """Return a text without halves of surrogate pairs, which no message can carry."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def serve(connection: socket.socket) -> None:
    """Serve the actor at the other end of ``connection`` until it hangs up."""

    async def work() -> None:
        await Host(*await asyncio.open_connection(sock=connection)).serve()

    asyncio.run(work())
