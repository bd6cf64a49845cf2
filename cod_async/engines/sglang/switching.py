"""Changing a server's weights: pause, bring them in, compare checksums, resume. Resuming is never left out.

====================  =============================  ====================================================
mode                  running requests               cached prefixes
====================  =============================  ====================================================
``retract``           computed again under the new   dropped
                      weights; exact
``in_place``          go on with the KV cache of     kept; blocks written across the switch belong to the
                      the old weights; their next    old version's namespace, which no later request uses
                      tokens are sampled from a
                      mixture, reported truly
``idle``              there are none                 kept, each version in its namespace
====================  =============================  ====================================================

Every step has its own deadline, in the client. If one fails, is refused, or the caller is cancelled, what was
opened is closed again and the server resumed, and then the failure is raised with the label that the server
gives its weights, so that the caller knows what it has: the old version, the new one, or none
(:func:`~.pushes.making_label`).
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Coroutine
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from cod_async.engines.sglang.pushes import Checker, Push
from cod_async.errors import (
    EngineDownError,
    EngineError,
    EngineMismatchError,
    EngineRefusedError,
    WeightsError,
)
from cod_async.lifecycle.segment import Version
from cod_async.weights.source import PublishedWeights

if TYPE_CHECKING:
    from cod_async.engines.sglang.client import ServerClient

log = logging.getLogger(__name__)

SwitchMode = Literal["retract", "in_place", "idle"]

RESUME_WAITS_S = (0.1, 1.0)
"""Waits before a resume that failed is tried again."""


@dataclass(frozen=True)
class SwitchReport:
    """A switch that succeeded.

    Attributes:
        version: what the server has now.
        mode: how it was switched.
        pause_s: seconds from the request to pause until the server had resumed; with ``idle``, seconds of
            the update and its check, during which it would not have answered.
        push_s: seconds that bringing the weights in took, a part of ``pause_s``.
        total_s: seconds of everything, preparation included.
        num_paused_requests: requests that were running or waiting at the server just before.
    """

    version: Version
    mode: SwitchMode
    pause_s: float
    push_s: float
    total_s: float
    num_paused_requests: int


async def switch(
    client: ServerClient, push: Push, source: PublishedWeights, mode: SwitchMode, *, is_checked: bool
) -> SwitchReport:
    """Bring a published version into a server.

    Args:
        client: the server.
        push: the way in, of this server.
        source: the version.
        mode: see above; with ``idle`` the caller makes sure that no request is running.
        is_checked: compare checksums before anything is sampled from the new weights.

    Raises:
        WeightsError: the server did not take the version, took something else, or could not drop its cache.
        EngineDownError: it does not answer, or does not resume.
        EngineMismatchError: wrong key, or weights cannot enter this server in this way.
        The first two carry ``label``: what the server calls its weights now; None: it does not say.
    """
    started = time.perf_counter()
    try:
        await push.prepare(client)
        checker = await Checker.prepare(client, source) if is_checked else None
        load = await client.load()
        paused = time.perf_counter()
        push_s = await _change(client, push, source, mode, checker)
        resumed = time.perf_counter()
        if (label := await client.label()) != source.label:
            raise WeightsError(
                f"{client.url}: its weights are called {label!r} after the update to {source.label}"
            )
    except EngineMismatchError:
        raise
    except EngineRefusedError as error:
        raise WeightsError(
            f"{client.url} did not switch to {source.label}: {error}", label=await _label(client)
        ) from error
    except (EngineDownError, WeightsError) as error:
        error.label = await _label(client)
        raise
    return SwitchReport(
        version=source.version,
        mode=mode,
        pause_s=resumed - paused,
        push_s=push_s,
        total_s=time.perf_counter() - started,
        num_paused_requests=load.num_running + load.num_waiting,
    )


async def _change(
    client: ServerClient, push: Push, source: PublishedWeights, mode: SwitchMode, checker: Checker | None
) -> float:
    """Pause, push, check, resume; return the seconds of the push."""
    has_begun = False
    try:
        if mode != "idle":
            await client.pause(mode)
        if push.is_bracketed:
            has_begun = True
            await client.begin_update()
        started = time.perf_counter()
        try:
            await push.push(client, source, is_flushing=mode == "retract")
        except EngineRefusedError:
            # A refused flush leaves the new weights behind; without their flush nothing may be resumed
            # as if it were exact.
            if mode != "retract" or await client.label() != source.label:
                raise
            await client.flush_cache()
        push_s = time.perf_counter() - started
        if push.is_bracketed:
            await client.end_update()
            has_begun = False
        if checker is not None:
            await checker.check()
    except BaseException as error:
        await undo(error, _leave(client, has_begun=has_begun, is_paused=mode != "idle"))
        raise
    await _whatever_happens(_leave(client, has_begun=False, is_paused=mode != "idle"))
    return push_s


async def _leave(client: ServerClient, *, has_begun: bool, is_paused: bool) -> None:
    """Close what is open and let the server go on.

    Raises:
        EngineDownError: it does not resume; it generates nothing until it is restarted.
        EngineMismatchError: wrong key.
    """
    if has_begun:
        with suppress(EngineError):
            await client.end_update()
    if not is_paused:
        return
    for wait_s in (*RESUME_WAITS_S, None):
        try:
            await client.resume()
            return
        except EngineMismatchError:
            raise
        except EngineError as error:
            if wait_s is None:
                raise EngineDownError(f"{client.url} does not resume: {error}") from error
            log.warning("%s did not resume, it is asked again: %s", client.url, error)
            await asyncio.sleep(wait_s)


async def undo(error: BaseException, work: Coroutine[Any, Any, None]) -> None:
    """Do ``work`` to its end because of ``error``, which the caller raises again after this.

    A cancellation stays one even if the work fails, which is all that a server that is gone lets it do: as an
    ordinary error it would be taken for one more failed update, by a task that has to end.

    Raises:
        EngineError: the work failed, and ``error`` is no cancellation.
    """
    try:
        await _whatever_happens(work)
    except EngineError as trouble:
        if not isinstance(error, asyncio.CancelledError):
            raise
        log.warning("%s", trouble)


async def _whatever_happens(work: Coroutine[Any, Any, None]) -> None:
    """Do it to its end, also when the caller is cancelled meanwhile; then be cancelled."""
    task = asyncio.ensure_future(work)
    is_cancelled = False
    while not task.done():
        try:
            await asyncio.wait((task,))
        except asyncio.CancelledError:
            is_cancelled = True
    if is_cancelled:
        if not task.cancelled() and (error := task.exception()) is not None:
            log.warning("%s", error)
        raise asyncio.CancelledError
    task.result()


async def _label(client: ServerClient) -> str | None:
    try:
        return await client.label()
    except EngineError:
        return None
