"""An actor's own record of what was acknowledged to it, for fault tests: a witness beside the run database.

Whoever checks that nothing acknowledged was lost must not take the coordinator's word for what it
acknowledged. With ``transport.ack_journal_dir`` set, every client process appends one JSON line per settled
segment to a file of its own, handed to the kernel before anybody acts on the acknowledgement, so that the
line outlives ``kill -9``. Off by default; bounded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path

import msgspec

from cod_async.config.schema import TransportConfig
from cod_async.lifecycle.segment import Segment

MAX_JOURNAL_BYTES = 64 << 20
"""At this size a last line ``{"is_full": true}`` is written and nothing after it."""


class AckLine(msgspec.Struct, frozen=True):
    """One settled segment. ``reason`` is None for an acknowledged one, else why it was dropped."""

    group: int
    member: int
    ordinal: int
    lease_epoch: int
    reason: str | None


class AckJournal:
    """Appends to ``FOLDER/NAME-PID.jsonl``. The link calls it under its lock.

    Args:
        folder: made if it is missing.
        name: of the client.

    Raises:
        OSError: the folder cannot be made or written.
    """

    def __init__(self, folder: Path, name: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{re.sub(r'[^A-Za-z0-9._-]', '_', name)}-{os.getpid()}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._num_bytes = os.fstat(self._fd).st_size
        self._lines: dict[int, tuple[int, int, int, int]] = {}
        self._encoder = msgspec.json.Encoder()

    @classmethod
    def of(cls, config: TransportConfig, name: str) -> AckJournal | None:
        """Return the journal that the configuration asks for, or None."""
        return cls(Path(config.ack_journal_dir), name) if config.ack_journal_dir else None

    def offered(self, outbox_id: int, segment: Segment) -> None:
        """Remember which segment an outbox id stands for."""
        key = segment.key
        self._lines[outbox_id] = (key.group, key.member, key.ordinal, segment.lease_epoch)

    def settled(self, settled: Iterable[tuple[int, str | None]]) -> None:
        """Write down what was acknowledged (reason None) or dropped."""
        text = bytearray()
        for outbox_id, reason in settled:
            found = self._lines.pop(outbox_id, None)
            if found is not None:
                text += self._encoder.encode(AckLine(*found, reason)) + b"\n"
        if not text or self._num_bytes >= MAX_JOURNAL_BYTES:
            return
        self._num_bytes += len(text)
        os.write(self._fd, text)
        if self._num_bytes >= MAX_JOURNAL_BYTES:
            os.write(self._fd, b'{"is_full": true}\n')

    def close(self) -> None:
        """Close the file; nothing is buffered."""
        os.close(self._fd)
