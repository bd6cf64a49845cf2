"""How a server behaves: prefix cache, cancelled requests, health while paused, clients that die."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from collections.abc import Callable

from cod_async.engines.base import Completion
from cod_async.engines.conformance.asking import Answer, Subject, ask, compare, params
from cod_async.engines.conformance.findings import CheckFailedError, CheckSkippedError
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.conformance.target import ServerEngine, ServerTarget
from cod_async.engines.sglang.protocol import ServerInfo
from cod_async.lifecycle.segment import VersionSpan

ABORT_LIMIT_S = 5.0
MIN_PREFIX_TOKENS = 128
HELD_S = 0.2
"""How long a request must be held by a paused server."""


async def prefix_cache(subject: Subject, engine: ServerEngine, info: ServerInfo) -> str:
    """Cached prefixes are used within a namespace and never in another one, and do not change log-probs."""
    client, name = engine.client, secrets.token_hex(6)
    length = min(MIN_PREFIX_TOKENS, engine.max_context_tokens // 2)
    prompt = subject.prompt(3000, length)
    cached, answers = [], []
    for number, namespace in enumerate((f"{name}-a", f"{name}-a", f"{name}-b")):
        asked = params(8, seed=number)
        made = await client.generate(prompt, asked, rid=f"doctor-{name}-{number}", namespace=namespace)
        cached.append(made.num_cached_tokens)
        spans = (VersionSpan(engine.version, len(made.token_ids)),)
        answers.append(Answer(prompt, asked, Completion(made.token_ids, made.logprobs, spans, "length")))
    first, again, other = cached
    text = f"of {length} prompt tokens cached: first {first}, again {again}, under another version {other}"
    if first or other:
        raise CheckFailedError(f"{text}; caches of one version serve another (is extra_key known?)")
    if info.has_prefix_cache and not again:
        raise CheckFailedError(f"{text}; nothing is kept, every turn is computed from its start")
    if subject.reference is not None:
        found = compare(subject.reference, answers)
        text += f"; {found}"
        if not found.fit(subject.tolerance):
            raise CheckFailedError(f"{text}; {subject.tolerance}")
    return text


async def abort_at_server(subject: Subject, engine: ServerEngine) -> str:
    """A cancelled request leaves the server, which goes on."""
    client = engine.client
    before = (await client.load()).num_running
    room = engine.max_context_tokens - 16
    task = asyncio.ensure_future(engine.generate(subject.prompt(3100, 5), params(room, seed=1)))
    await _until(client, lambda running: running > before or task.done(), 2.0)
    if task.done():
        raise CheckSkippedError(f"{room} tokens were done before they could be cancelled")
    started = time.monotonic()
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    took_s = time.monotonic() - started
    is_gone = await _until(client, lambda running: running <= before, ABORT_LIMIT_S)
    gone_s = time.monotonic() - started
    if not is_gone:
        raise CheckFailedError(f"the server still runs a request {gone_s:.1f} s after it was cancelled")
    await ask(subject, subject.prompt(3101, 3), params(3, seed=2))
    return f"cancelled in {took_s:.3f} s, gone from the server in {gone_s:.3f} s, and it goes on"


async def _until(client: ServerClient, is_true: Callable[[int], bool], limit_s: float) -> bool:
    """Poll the number of running requests until it is as wanted, at most ``limit_s`` seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not is_true((await client.load()).num_running):
                await asyncio.sleep(0.02)
            return True
    return False


async def probe_while_paused(target: ServerTarget, subject: Subject, engine: ServerEngine) -> str:
    """The health probe answers while the server is paused, and requests of that time are served after it."""
    if not target.allow_updates:
        raise CheckSkippedError("pauses the server for a moment; allow it with --allow-updates")
    client = engine.client
    held: asyncio.Task[Answer] | None = None
    try:
        await client.pause("in_place")
        held = asyncio.create_task(ask(subject, subject.prompt(3200, 4), params(4, seed=1)))
        started = time.monotonic()
        await client.load()
        took_s = time.monotonic() - started
        await asyncio.sleep(HELD_S)
        is_held = not held.done()
    finally:
        await client.resume()
        if held is not None:
            await asyncio.wait([held])
    held.result()
    if not is_held:
        raise CheckFailedError("a paused server went on generating")
    return f"probe answered in {took_s:.3f} s while paused; a request of that time was served after it"


async def survives_lost_client(target: ServerTarget, subject: Subject, engine: ServerEngine) -> str:
    """A server that was left paused by a client that died goes on when the next one says so."""
    if not target.allow_updates:
        raise CheckSkippedError("pauses the server for a moment; allow it with --allow-updates")
    lost = target.client(subject.vocab_size)
    try:
        await lost.pause("retract")
        await lost.begin_update()
    finally:
        await lost.aclose()  # as if its process had died in the middle of an update
        try:
            await engine.client.load()
            await engine.client.end_update()
        finally:
            await engine.client.resume()
    await ask(subject, subject.prompt(3300, 4), params(4, seed=1))
    return "left paused in the middle of an update, another client resumed it, and it goes on"
