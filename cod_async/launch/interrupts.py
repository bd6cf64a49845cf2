"""Ctrl-C and SIGTERM for the launcher: noted while children are supervised, raised while something blocks.

A signal that arrives while a child is being started must not lose track of that child, so the supervising
loop only looks at a flag. Blocking parts (bootstrap, evaluation) run under :meth:`Interrupts.raising`, where
the first signal raises. Later signals change nothing: the shutdown is already under way and bounded by the
grace period.
"""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class InterruptedRunError(BaseException):
    """Raised in a blocking phase when the user asks to stop. A BaseException, so that no ``except Exception``
    eats it.
    """


class Interrupts:
    """Installs handlers for SIGINT and SIGTERM while in use as a context manager (main thread only).

    Attributes:
        signum: the first signal received, None before.
    """

    def __init__(self) -> None:
        self.signum: int | None = None
        self._is_raising = False
        self._old: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Interrupts:
        """Install the handlers."""
        for number in SIGNALS:
            self._old[number] = signal.signal(number, self._handle)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Put the old handlers back."""
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        is_first = self.signum is None
        self.signum = self.signum or signum
        if is_first and self._is_raising:
            raise InterruptedRunError

    @contextlib.contextmanager
    def raising(self) -> Iterator[None]:
        """Let the first signal raise :class:`InterruptedRunError` inside the block, or at its start if it
        came before.
        """
        self._is_raising = True
        try:
            if self.signum is not None:
                raise InterruptedRunError
            yield
        finally:
            self._is_raising = False
