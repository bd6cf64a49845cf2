"""Finished lifecycles on disk: one append-only file per set of weights, so that an evaluation can be stopped
at any moment and continued.

A line is a checksum, a space, and one JSON object with the lifecycle's key and what it came to. It is written
with one call, so a kill leaves whole lines and at most one torn one at the end, which is cut off when the
file is opened again; a line whose checksum is wrong counts as missing and is played again. Only keys and
offsets are held in memory. There is one writer per folder, under a lock.
"""

from __future__ import annotations

import fcntl
import logging
import os
import time
import zlib
from pathlib import Path
from types import TracebackType

import msgspec

from cod_async.errors import InputError, WorkError

_log = logging.getLogger(__name__)
_SYNC_S = 1.0
"""Lines are flushed to disk this often: a power cut costs what came after, a kill costs nothing."""
_MAX_LINE_BYTES = 64 << 20
_CRC_BYTES = 8


class LifecycleResult(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What one lifecycle came to; lists have one item per position.

    Attributes:
        key: identifies it among all lifecycles of these weights.
        what: entry, mode, split, control, seed, pack and member, for people who read the file.
        rewards, raw_rewards: task rewards with and without penalties.
        finishes: how each task ended.
        num_responses: policy responses of each task.
        updates: how the update after each task ended; None where none was played.
        num_hint_tokens, num_tokens: generated tokens of all updates; tokens of all rows.
        hints: the hint that was carried to each task, whatever its solver was shown; empty unless the control
            is ``normal`` and hints are carried.
        world: digest of the hidden world, empty where no hints are carried.
        num_retries: episodes that were played again because environment or engine failed.
        wall_s: seconds from start to end, beside others.
    """

    key: str
    what: dict[str, str | int]
    rewards: tuple[float, ...]
    raw_rewards: tuple[float, ...]
    finishes: tuple[str, ...]
    num_responses: tuple[int, ...]
    updates: tuple[str | None, ...]
    num_hint_tokens: int
    num_tokens: int
    hints: tuple[str, ...] = ()
    world: str = ""
    num_retries: int = 0
    wall_s: float = 0.0


class ResultFile:
    """The lifecycles of one set of weights.

    Args:
        path: the file; made with its folder if missing.

    Attributes:
        num_bad_lines: complete lines that were not what was once written.

    Raises:
        InputError: the file cannot be opened.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.num_bad_lines = 0
        self._places: dict[bytes, tuple[int, int]] = {}
        self._synced_s = time.monotonic()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise InputError(
                f"{path}: cannot be written, {error.strerror or error}; choose another --out"
            ) from (error)
        self._size = self._scan()
        os.ftruncate(self._file, self._size)
        if self.num_bad_lines:
            _log.warning("%s: %d damaged lines, their lifecycles are played again", path, self.num_bad_lines)

    def __enter__(self) -> ResultFile:
        """Return the file itself."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close it."""
        self.close()

    def __len__(self) -> int:
        """Return the number of lifecycles."""
        return len(self._places)

    def __contains__(self, key: str) -> bool:
        """Say whether a lifecycle is there."""
        return bytes.fromhex(key) in self._places

    def get(self, key: str) -> LifecycleResult | None:
        """Return a lifecycle, or None if it is not there."""
        place = self._places.get(bytes.fromhex(key))
        if place is None:
            return None
        return _parse(os.pread(self._file, place[1], place[0]))

    def add(self, result: LifecycleResult) -> None:
        """Append a lifecycle.

        Raises:
            WorkError: the disk is full or failed; nothing of it counts as written.
        """
        body = msgspec.json.encode(result)
        line = f"{zlib.crc32(body):08x} ".encode() + body + b"\n"
        try:
            if os.pwrite(self._file, line, self._size) != len(line):
                os.ftruncate(self._file, self._size)
                raise OSError("the line was cut")
        except OSError as error:
            raise WorkError(f"{self.path}: cannot be written, {error}; make room and run it again") from error
        self._places[bytes.fromhex(result.key)] = (self._size, len(line))
        self._size += len(line)
        if time.monotonic() - self._synced_s > _SYNC_S:
            os.fsync(self._file)
            self._synced_s = time.monotonic()

    def close(self) -> None:
        """Flush to disk and close."""
        os.fsync(self._file)
        os.close(self._file)

    def _scan(self) -> int:
        """Note where every lifecycle is and return where the last whole line ends."""
        end = 0
        with os.fdopen(os.dup(self._file), "rb") as file:
            file.seek(0)
            while line := file.readline(_MAX_LINE_BYTES):
                if not line.endswith(b"\n"):
                    break
                result = _parse(line)
                if result is None:
                    self.num_bad_lines += 1
                else:
                    self._places[bytes.fromhex(result.key)] = (end, len(line))
                end += len(line)
        return end


def _parse(line: bytes) -> LifecycleResult | None:
    """Return what a line holds, or None if it is not what was written."""
    body = line[_CRC_BYTES + 1 : -1]
    if line[: _CRC_BYTES + 1] != f"{zlib.crc32(body):08x} ".encode():
        return None
    try:
        result = msgspec.json.decode(body, type=LifecycleResult)
        bytes.fromhex(result.key)
    except (msgspec.MsgspecError, ValueError):
        return None
    return result


class FolderLock:
    """Keeps a second evaluation out of a folder; held until the process ends, however it ends.

    Raises:
        InputError: another evaluation is at work there, or the folder cannot be written.
    """

    def __init__(self, folder: Path) -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(folder / "evaluation.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._file)
            raise InputError(
                f"{folder}: another evaluation is at work there; wait for it, or choose another --out"
            ) from None
        except OSError as error:
            raise InputError(
                f"{folder}: cannot be written, {error.strerror or error}; choose another --out"
            ) from (error)

    def __enter__(self) -> FolderLock:
        """Return the lock, which is held already."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let others in."""
        self.release()

    def release(self) -> None:
        """Let others in."""
        os.close(self._file)
