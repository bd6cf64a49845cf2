"""The one rule by which blocks and answers are cut out of the policy's text.

The same strict rule serves hint delimiters and answer tags: a response that quotes a delimiter twice, in the
wrong order or not at all is refused as a whole, because guessing which of several blocks was meant would
reward ambiguity.
"""

from __future__ import annotations


def extract_between(text: str, start: str, end: str) -> str | None:
    """Return the text strictly between two delimiters, or None.

    Succeeds if and only if ``start`` occurs exactly once, ``end`` occurs exactly once, and ``start`` comes
    first. What comes before and after the block is ignored. Nothing is stripped.
    """
    begin, stop = _only(text, start), _only(text, end)
    if begin is None or stop is None or begin + len(start) > stop:
        return None
    return text[begin + len(start) : stop]


def _only(text: str, key: str) -> int | None:
    """Return where ``key`` occurs if it does so exactly once; occurrences may overlap."""
    place = text.find(key)
    return None if place < 0 or text.find(key, place + 1) >= 0 else place
