"""Files and folders that survive a crash: written beside their place, flushed to disk, then renamed into it.

A rename is atomic on a local file system, but only durable once the folder that holds the name has been
flushed too. Readers, also after a crash, see the old contents or the new ones, never a mixture.
"""

from __future__ import annotations

import os
from pathlib import Path


def fsync_path(path: Path) -> None:
    """Flush one file or folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, data: bytes, *, mode: int = 0o666) -> None:
    """Replace ``path`` by ``data``: temporary file in the same folder, flush, rename, flush of the folder.

    Args:
        path: the file.
        data: what will be in it.
        mode: permissions, less the process's umask, from the first moment on.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        temporary.unlink(missing_ok=True)
        with os.fdopen(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode), "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def commit_folder(temporary: Path, final: Path) -> None:
    """Flush every file below ``temporary``, rename it to ``final``, flush the parent.

    ``final`` must not exist, or be an empty folder.
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
    import shutil  # slow to import, and every process imports this module through its configuration

    doomed = path.with_name(f"{path.name}.tmp")
    try:
        shutil.rmtree(doomed, ignore_errors=True)
        os.rename(path, doomed)
    except FileNotFoundError:
        return
    shutil.rmtree(doomed, ignore_errors=True)
