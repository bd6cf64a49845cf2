"""Checks of an engine under way: many requests at once, sessions, cancelled requests, versions, updates."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable

from cod_async.engines.base import Completion
from cod_async.engines.conformance.asking import (
    Answer,
    Differences,
    Subject,
    ask,
    ask_all,
    compare,
    expected,
    params,
)
from cod_async.engines.conformance.findings import CheckFailedError, CheckSkippedError
from cod_async.engines.conformance.reference import Reference
from cod_async.engines.conformance.sampling import needed_reference
from cod_async.engines.conformance.updating import Updater
from cod_async.lifecycle.segment import Version

NUM_CONCURRENT = 24
ABORT_LIMIT_S = 5.0
"""A cancelled request must be over within this time."""
PROGRESS_S = 1.0
"""How long to wait for a sign that a request is being worked on."""
SETTLE_S = 5.0
"""How long counters may take to agree after a cancelled request."""
NUM_RUNNING = 6
MAX_LONG_TOKENS = 1024


async def batch_equals_one_by_one(subject: Subject) -> str:
    """Log-probs do not depend on what else is running: many prompts at once, then some one by one."""
    reference = needed_reference(subject)
    lengths = subject.lengths([1 + 7 * i % 40 for i in range(NUM_CONCURRENT)], 16)
    requests = [
        (subject.prompt(800 + number, length), params(16 - number % 9, seed=number))
        for number, length in enumerate(lengths)
    ]
    together = compare(reference, await ask_all(subject, requests))
    alone = compare(reference, [await ask(subject, prompt, asked) for prompt, asked in requests[::4]])
    text = f"{NUM_CONCURRENT} at once: {together}; one by one: {alone}; {subject.tolerance}"
    if not (together.fit(subject.tolerance) and alone.fit(subject.tolerance)):
        raise CheckFailedError(text)
    return text


async def session_turns(subject: Subject) -> str:
    """A conversation that keeps its cache, and one whose history was changed, get the right log-probs."""
    reference = needed_reference(subject)
    found = Differences()
    num_turns = 0
    for number in range(3):
        session = f"conformance-{subject.seed}-{number}"
        row = subject.prompt(900 + number, subject.lengths((6,), 48)[0])
        try:
            for turn in range(4):
                if turn == 3:
                    row = [*row[:3], *subject.prompt(950 + number, 5)]  # another history under the same name
                answer = await ask(subject, row, params(5, seed=turn), session)
                found.values += compare(reference, [answer]).values
                row = [*answer.row, *subject.prompt(960 + number, 1 + turn)]
                num_turns += 1
        finally:
            await subject.engine.close_session(session)
    await subject.engine.close_session("conformance-never-opened")
    text = f"{num_turns} turns of 3 sessions: {found}; {subject.tolerance}"
    if not found.fit(subject.tolerance):
        raise CheckFailedError(text)
    return text


async def abort(subject: Subject) -> str:
    """A cancelled request ends at once, its tokens are counted, and the engine goes on."""
    engine = subject.engine
    sampled, aborted = engine.counters.sampled_tokens, engine.counters.aborted_tokens
    room = engine.max_context_tokens - 8
    task = asyncio.ensure_future(engine.generate(subject.prompt(1000, 4), params(room, seed=1)))
    await _progress(lambda: engine.counters.sampled_tokens > sampled or task.done())
    if task.done():
        raise CheckSkippedError(f"{room} tokens were done before they could be cancelled")
    started = time.monotonic()
    task.cancel()
    done, _ = await asyncio.wait([task], timeout=ABORT_LIMIT_S)
    took_s = time.monotonic() - started
    if not done:
        raise CheckFailedError(f"a cancelled request was not over after {ABORT_LIMIT_S:g} s")
    if not task.cancelled():
        raise CheckFailedError(f"a cancelled request ended with {task.exception()!r}, not as cancelled")

    def open_tokens() -> int:
        counters = engine.counters
        return (counters.sampled_tokens - sampled) - (counters.aborted_tokens - aborted)

    def is_settled() -> bool:  # an engine may count only once its server has been told
        is_counted = engine.counters.aborted_tokens > aborted or not subject.counts_aborted
        return is_counted and open_tokens() == 0

    await _progress(is_settled, SETTLE_S)
    counted = engine.counters.aborted_tokens - aborted
    if open_tokens():
        raise CheckFailedError(f"{open_tokens()} sampled tokens were neither returned nor counted as aborted")
    if subject.counts_aborted and counted == 0:
        raise CheckFailedError("no token of a cancelled request was counted as aborted")
    await ask(subject, subject.prompt(1001, 3), params(3, seed=2))
    return f"over in {took_s:.3f} s, {counted} tokens counted as aborted, and the engine goes on"


async def _progress(is_there: Callable[[], bool], limit_s: float = PROGRESS_S) -> None:
    """Wait for a sign, at most ``limit_s`` seconds."""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            while not is_there():
                await asyncio.sleep(0.005)


async def versions_are_true(subject: Subject) -> str:
    """Without an update every token has the version that the engine says it has."""
    before = subject.engine.version
    answers = await ask_all(subject, [(subject.prompt(1100 + i, 1 + i), params(9, seed=i)) for i in range(8)])
    if subject.engine.version != before:
        raise CheckSkippedError(
            f"somebody changed the weights meanwhile, {before} to {subject.engine.version}"
        )
    found = {span.version for answer in answers for span in answer.completion.versions}
    if found != {before}:
        told = ", ".join(map(str, sorted(found)))
        raise CheckFailedError(f"the engine has version {before}, its tokens say {told}")
    return f"{sum(len(answer.completion.token_ids) for answer in answers)} tokens, all of version {before}"


async def live_update(subject: Subject) -> str:
    """Across a switch of weights every token names the weights that made it, proven by their log-probs."""
    updater, old = subject.updater, subject.reference
    if updater is None:
        raise CheckSkippedError("changes the weights for a moment; allow it with --allow-updates")
    await updater.prepare()
    before = subject.engine.version
    try:
        running, (version, new) = await _switch_under_load(subject, updater.switch)
        fresh = await ask(subject, subject.prompt(1300, 5), params(8, seed=1))
    finally:
        restored = await updater.restore()
    if version == before:
        raise CheckFailedError(f"the update left the version at {before}")
    wanted = before if updater.goes_back else restored
    if restored == version or {restored, subject.engine.version} != {wanted}:
        raise CheckFailedError(
            f"version {subject.engine.version} after the weights of {before} were restored"
        )
    _check_order(running, before, version)
    told = {span.version for span in fresh.completion.versions}
    if told != {version}:
        raise CheckFailedError(f"a request after the switch to {version} names {sorted(map(str, told))}")
    num_across = sum(len(answer.completion.versions) == 2 for answer in running)
    parts = [f"{before} to {version} ({updater.mode}): {num_across} of {len(running)} completions span it"]
    has_failed = _compare_spans(subject, updater, (running, fresh), (old, new), (before, parts))
    if not updater.has_other_weights:
        parts.append("the same weights under both names")
    if updater.mode == "wait" and num_across:
        has_failed = True
    if has_failed:
        raise CheckFailedError("; ".join(parts))
    if updater.mode in ("retract", "in_place") and num_across == 0:
        raise CheckSkippedError(f"all completions were done before the switch; {parts[0]}")
    return "; ".join(parts)


async def _switch_under_load(
    subject: Subject, switch: Callable[[], Awaitable[tuple[Version, Reference | None]]]
) -> tuple[list[Answer], tuple[Version, Reference | None]]:
    """Switch while requests are running; return their answers and what the switch returned."""
    engine = subject.engine
    num_tokens = min(MAX_LONG_TOKENS, engine.max_context_tokens - 16)
    before = engine.counters.sampled_tokens
    answers = asyncio.ensure_future(
        ask_all(
            subject,
            [(subject.prompt(1200 + i, 2 + i), params(num_tokens, seed=i)) for i in range(NUM_RUNNING)],
        )
    )
    try:
        # Some tokens of the old version in every completion, if the engine counts as it goes.
        enough = before + 4 * NUM_RUNNING
        await _progress(lambda: engine.counters.sampled_tokens >= enough or answers.done())
        switched = await switch()
        return await answers, switched
    finally:
        answers.cancel()
        await asyncio.gather(answers, return_exceptions=True)


def _check_order(answers: list[Answer], before: Version, version: Version) -> None:
    allowed = ([before], [version], [before, version])
    for answer in answers:
        told = [span.version for span in answer.completion.versions]
        if told not in allowed:
            raise CheckFailedError(
                f"a completion names {' then '.join(map(str, told))} across one switch {before} to {version}"
            )


def _compare_spans(
    subject: Subject,
    updater: Updater,
    answers: tuple[list[Answer], Answer],
    references: tuple[Reference | None, Reference | None],
    notes: tuple[Version, list[str]],
) -> bool:
    """Compare every span with the weights it names; add the numbers to the notes; True if some are wrong."""
    (running, fresh), (old, new), (before, parts) = answers, references, notes
    if old is None or new is None:
        parts.append("no reference to compare with")
        return False
    spans = {"old span": Differences(), "new span": Differences()}
    for answer in running:
        for name, reference in (("old span", old), ("new span", new)):
            first, last = _part(answer.completion, before, is_old=name == "old span")
            if last > first:
                told = answer.completion.logprobs[first:last]
                values = expected(reference, answer)[first:last]
                spans[name].values += [abs(one - other) for one, other in zip(told, values, strict=True)]
    after = compare(new, [fresh])
    is_bad = not (spans["old span"].fit(subject.tolerance) and after.fit(subject.tolerance))
    is_kept = updater.mode == "in_place" and updater.has_other_weights
    if not is_kept:
        is_bad = is_bad or not spans["new span"].fit(subject.tolerance)
    note = " (over the old cache, so no forward gives them)" if is_kept else ""
    parts += [f"old span {spans['old span']}", f"new span {spans['new span']}{note}", f"after {after}"]
    parts.append(str(subject.tolerance))
    return is_bad


def _part(completion: Completion, before: Version, *, is_old: bool) -> tuple[int, int]:
    """Return [first, last) of the tokens of the old version, or of those after them."""
    num_old = sum(span.num_tokens for span in completion.versions if span.version == before)
    return (0, num_old) if is_old else (num_old, len(completion.token_ids))
