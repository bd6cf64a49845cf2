"""The file twin: the same protocol through a folder, so that every message can be listed, read, kept and
replayed.

For debugging, not for speed. A message is one file, written under a temporary name and renamed, removed by
its receiver. ``to_coordinator/CLIENT-NUMBER.msg`` goes up, ``to_client/CLIENT/NUMBER.msg`` comes down; a file
holds the length of the first frame (4 bytes, little-endian) and both frames. A client is gone when its folder
is.
"""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from select import select

from cod_async.transport.pipe import Delivery

POLL_S = 0.005
MAX_QUEUED_FILES = 4096


def _write(folder: Path, name: str, parts: Sequence[bytes]) -> None:
    head, body = parts
    temporary = folder / f".{name}"
    # No fsync: a file here is a message on its way, not a record; what is lost is sent again.
    temporary.write_bytes(len(head).to_bytes(4, "little") + head + body)
    os.replace(temporary, folder / f"{name}.msg")


def _read(path: Path) -> list[bytes]:
    data = path.read_bytes()
    path.unlink()
    stop = 4 + int.from_bytes(data[:4], "little")
    return [data[4:stop], data[stop:]]


class _Inbox:
    """Lists a folder's messages in the order of their names and hands them out one by one."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._listed: Iterator[Path] = iter(())

    def next(self) -> Path | None:
        path = next(self._listed, None)
        if path is None:
            names = sorted(name for name in os.listdir(self._folder) if name.endswith(".msg"))
            self._listed = (self._folder / name for name in names)
            path = next(self._listed, None)
        return path


class FileClientPipe:
    """A client's end in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._client = secrets.token_hex(8)
        self._up = folder / "to_coordinator"
        self._down = folder / "to_client" / self._client
        self._down.mkdir(parents=True)
        self._up.mkdir(exist_ok=True)
        self._inbox = _Inbox(self._down)
        self._num_sent = 0

    def send(self, parts: Sequence[bytes]) -> bool:
        """Write one message into the coordinator's folder."""
        self._num_sent += 1
        _write(self._up, f"{self._client}-{self._num_sent:012d}", parts)
        return True

    def recv(self) -> list[bytes] | None:
        """Return the next message's frames, or None."""
        path = self._inbox.next()
        return None if path is None else _read(path)

    def wait(self, wake: socket.socket, timeout_s: float, *, wants_to_send: bool) -> None:
        """Sleep a little, or until ``wake`` is readable."""
        select([wake], [], [], max(0.0, min(timeout_s, POLL_S)))

    def close(self, linger_s: float) -> None:
        """Remove the client's folder: the coordinator sees it gone."""
        shutil.rmtree(self._down, ignore_errors=True)


class FileServerPipe:
    """The coordinator's end in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self.address = f"file://{folder}"
        self._up = folder / "to_coordinator"
        self._clients = folder / "to_client"
        self._up.mkdir(parents=True, exist_ok=True)
        self._clients.mkdir(exist_ok=True)
        self._inbox = _Inbox(self._up)
        self._num_sent = 0

    def send(self, client_id: bytes, parts: Sequence[bytes]) -> Delivery:
        """Write one message into the client's folder."""
        folder = self._clients / client_id.decode("ascii")
        self._num_sent += 1
        try:
            if len(os.listdir(folder)) >= MAX_QUEUED_FILES:
                return "full"
            _write(folder, f"{self._num_sent:012d}", parts)
        except FileNotFoundError:
            return "gone"
        return "sent"

    def recv(self) -> tuple[bytes, list[bytes]] | None:
        """Return (client, frames) of the next message, or None."""
        path = self._inbox.next()
        if path is None:
            return None
        client = path.name.partition("-")[0]
        if not client.isalnum() or not client.isascii():
            client = "0"  # someone else's file: refused by the codec, answered to nobody
        return client.encode(), _read(path)

    def wait(self, timeout_s: float) -> None:
        """Look every few milliseconds until a message is there or time is up."""
        give_up_at = time.monotonic() + timeout_s
        while time.monotonic() < give_up_at:
            if any(name.endswith(".msg") for name in os.listdir(self._up)):
                return
            time.sleep(POLL_S)

    def close(self, linger_s: float) -> None:
        """Nothing to close; the folder stays for reading."""
