"""Reading a server's event stream at the cost of its last event.

SGLang sends ``data: {JSON}`` events whose JSON holds everything generated so far, so that only the newest
event matters. This parser finds the events' ends, keeps the newest one as raw bytes and decodes nothing: a
completion is decoded once, when it is complete, or when it broke off and somebody wants to know how far it
came.
"""

from __future__ import annotations

_END = b"\n\n"
_DATA = b"data:"
_DONE = b"[DONE]"


class StreamOverflowError(ValueError):
    """An event is longer than any answer to the request could be."""


class EventStream:
    """Events out of bytes that arrive in pieces of any size.

    Args:
        max_event_bytes: longest event accepted.

    Attributes:
        newest: data of the last complete event other than the end mark; empty before the first.
        is_done: the end mark has come; what follows is ignored.
    """

    def __init__(self, max_event_bytes: int) -> None:
        self._max_event_bytes = max_event_bytes
        self._rest = bytearray()
        self.newest = b""
        self.is_done = False

    def feed(self, piece: bytes) -> None:
        """Take the next piece.

        Raises:
            StreamOverflowError: an event is too long.
        """
        if self.is_done:
            return
        # An end may lie across the seam, so the search begins one byte before it.
        start = max(0, len(self._rest) - 1)
        self._rest += piece
        begin = 0
        while (end := self._rest.find(_END, start)) >= 0:
            self._take(begin, end)
            begin = start = end + len(_END)
            if self.is_done:
                self._rest.clear()
                return
        del self._rest[:begin]
        if len(self._rest) > self._max_event_bytes:
            raise StreamOverflowError(f"an event of over {self._max_event_bytes} bytes")

    def feed_plain(self, piece: bytes) -> None:
        """Take the next piece of an answer that is no stream but one JSON text.

        Raises:
            StreamOverflowError: it is too long.
        """
        self._rest += piece
        if len(self._rest) > self._max_event_bytes:
            raise StreamOverflowError(f"an answer of over {self._max_event_bytes} bytes")

    def finish_plain(self) -> None:
        """Take what :meth:`feed_plain` was given as the only event."""
        self.newest, self.is_done = bytes(self._rest), True

    def _take(self, begin: int, end: int) -> None:
        while self._rest.startswith(b"\n", begin, end):
            begin += 1
        if not self._rest.startswith(_DATA, begin, end):
            return  # a comment, sent to keep the connection open
        if end - begin > self._max_event_bytes:
            raise StreamOverflowError(f"an event of over {self._max_event_bytes} bytes")
        data = bytes(memoryview(self._rest)[begin + len(_DATA) : end]).strip()
        if data == _DONE:
            self.is_done = True
        else:
            self.newest = data
