"""Failures in a row of something that is tried until it works: how long to wait, and what is worth a line.

Waits grow from try to try. A log that repeats one sentence every few seconds buries everything else, so a
cause is told when it is new, and from then on now and then.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable

RETRY_S = (0.2, 0.5, 1.0, 2.0, 5.0)
"""Waits after the first, second, … failure in a row; the last one from then on."""
REPEAT_S = 30.0
"""A cause is told again after this time."""
MAX_CAUSES = 64
"""So many causes are remembered; beyond that the one told longest ago is forgotten."""


class Failures:
    """Counts failures of one thing; not for use by several threads.

    Args:
        clock: monotonic seconds.

    Attributes:
        num_in_row: failures since it last worked.
        is_wait_cuttable: whether news may still end a wait early. Only the first one since it last worked
            may: it can be the cure. News that come all the time must not undo the waits.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._told: dict[str, float] = {}
        self.num_in_row = 0
        self.is_wait_cuttable = True

    def failed(self, cause: str) -> tuple[float, bool]:
        """Note a failure.

        Args:
            cause: a sentence; sentences that differ in numbers alone are one cause.

        Returns:
            Seconds to wait before the next try, and whether the cause is worth a line in the log.
        """
        self.num_in_row += 1
        wait_s = RETRY_S[min(self.num_in_row, len(RETRY_S)) - 1]
        now, key = self._clock(), re.sub(r"[0-9]+", "0", cause)
        if key in self._told and now - self._told[key] < REPEAT_S:
            return wait_s, False
        self._told.pop(key, None)  # the dict stays in the order of telling
        self._told[key] = now
        if len(self._told) > MAX_CAUSES:
            del self._told[next(iter(self._told))]
        return wait_s, True

    def cut(self) -> None:
        """News have ended a wait."""
        self.is_wait_cuttable = False

    def worked(self) -> None:
        """It worked: the next failure is the first of its row. What was told stays told."""
        self.num_in_row = 0
        self.is_wait_cuttable = True
