"""Files that survive a crash: written beside their place, flushed to disk, then renamed into it.

A rename is atomic on a local file system, but only durable once the folder that holds the name has been
flushed too.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from pathlib import Path

_CHUNK_BYTES = 1 << 20


def fsync_path(path: Path) -> None:
    """Flush one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Write ``data`` to ``path`` atomically and durably (temp file in the same folder, flush, rename,
    flush).
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "wb") as handle:
        handle.write(data)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    fsync_path(path.parent)


def commit_folder(temporary: Path, final: Path) -> None:
    """Flush every file below ``temporary``, rename it to ``final`` (which must not exist), flush the
    parent.
    """
    for folder, _, names in os.walk(temporary):
        for name in names:
            fsync_path(Path(folder, name))
        fsync_path(Path(folder))
    os.rename(temporary, final)
    fsync_path(final.parent)


def remove_folder(path: Path) -> None:
    """Remove a folder tree so that a half-removed one can never be mistaken for a whole one (renamed
    first).
    """
    doomed = path.with_name(f"{path.name}.tmp")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as lower-case hex, reading a megabyte at a time."""
    digest = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(_CHUNK_BYTES):
            digest.update(chunk)
    return digest.hexdigest()
