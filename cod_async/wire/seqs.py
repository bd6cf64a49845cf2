"""A set of sequence numbers that stays small while they are settled more or less in order."""

from __future__ import annotations

from collections.abc import Collection

MAX_SPREAD = 65536


class SeqSet:
    """The numbers 1 .. ``low`` and a few above; adding numbers in any order keeps it exact."""

    __slots__ = ("_above", "low")

    def __init__(self) -> None:
        self.low = 0
        self._above: set[int] = set()

    @classmethod
    def all_but(cls, last: int, missing: Collection[int]) -> SeqSet:
        """Return 1 .. ``last`` without ``missing`` (whose smallest must be within MAX_SPREAD of ``last``)."""
        seqs = cls()
        seqs.low = min(missing, default=last + 1) - 1
        seqs._above = set(range(seqs.low + 1, last + 1)) - set(missing)
        return seqs

    def add(self, seq: int) -> None:
        """Add one number, at least 1."""
        if seq == self.low + 1:
            self.low = seq
            while self.low + 1 in self._above:
                self.low += 1
                self._above.remove(self.low)
        elif seq > self.low:
            self._above.add(seq)

    def __contains__(self, seq: int) -> bool:
        return 1 <= seq <= self.low or seq in self._above

    def __len__(self) -> int:
        return self.low + len(self._above)
