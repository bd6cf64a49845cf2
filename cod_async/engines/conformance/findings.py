"""One finding per check: what was looked at, whether it holds, and the numbers.

A check is an asynchronous function that returns its numbers, raises :class:`CheckFailedError` with them, or
raises :class:`CheckSkippedError` with the reason. Whatever else it raises is a failure of what it looked at,
and so is an answer that does not come: every check has a deadline.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import msgspec

from cod_async.errors import CodError

Status = Literal["ok", "failed", "skipped"]
MAX_DETAIL = 1000
"""Characters of a detail; what an engine sends is not repeated without end."""


class Finding(msgspec.Struct, frozen=True):
    """What a check found.

    Attributes:
        check: its name.
        status: ``ok``, ``failed`` or ``skipped``.
        detail: numbers with their limits, or why it was skipped.
    """

    check: str
    status: Status
    detail: str


class CheckFailedError(CodError):
    """What was looked at is not as it must be; the text has the numbers."""


class CheckSkippedError(CodError):
    """The check could not be made here; the text says why, and what to give for it."""


@dataclass(frozen=True)
class Check:
    """A named check.

    Attributes:
        name: what it is called in findings.
        run: returns the numbers, or raises one of the errors above.
        deadline_s: longest time it may take, in seconds.
    """

    name: str
    run: Callable[[], Awaitable[str]]
    deadline_s: float = 300.0


async def find(check: Check) -> Finding:
    """Carry one check out; only cancellation gets through."""
    try:
        async with asyncio.timeout(check.deadline_s):
            return _finding(check.name, "ok", await check.run())
    except CheckFailedError as error:
        return _finding(check.name, "failed", str(error))
    except CheckSkippedError as error:
        return _finding(check.name, "skipped", str(error))
    except TimeoutError:
        return _finding(check.name, "failed", f"not done within {check.deadline_s:g} s")
    except CodError as error:
        return _finding(check.name, "failed", f"{type(error).__name__}: {error}")
    except Exception as error:
        return _finding(check.name, "failed", f"unexpected {error!r}")


async def find_all(
    checks: Sequence[Check], report: Callable[[Finding], None] = lambda finding: None
) -> list[Finding]:
    """Carry checks out one after the other; ``report`` hears of each finding at once."""
    findings = []
    for check in checks:
        finding = await find(check)
        report(finding)
        findings.append(finding)
    return findings


def _finding(name: str, status: Status, detail: str) -> Finding:
    return Finding(name, status, detail if len(detail) <= MAX_DETAIL else detail[: MAX_DETAIL - 1] + "…")
