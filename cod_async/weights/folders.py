"""Published versions as folders: how they are named, listed, read and removed. Loads no torch, so that a
process which only hands files on stays small.

``ROOT/weights/L0000-S00000012/`` holds the shards, ``manifest.json``, and what belongs to them. A run folder
and a cache of pulled versions are laid out alike.
"""

from __future__ import annotations

import hashlib
import re
import shutil
from pathlib import Path

import msgspec

from cod_async.durable import remove_folder
from cod_async.errors import WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.manifest import Manifest

WEIGHTS_FOLDER = "weights"
MANIFEST_FILE = "manifest.json"

_FOLDER = re.compile(r"^L(\d{4,})-S(\d{8,})\Z")
_TEMPORARY = re.compile(r"^L\d{4,}-S\d{8,}\.tmp\Z")


def version_folder(version: Version) -> str:
    """Return the folder of a version, relative to the run folder: ``weights/L0000-S00000012``."""
    return f"{WEIGHTS_FOLDER}/L{version.lineage:04d}-S{version.step:08d}"


def published_versions(run_dir: Path) -> list[Version]:
    """Return every published version, oldest first (by lineage, then step)."""
    root = run_dir / WEIGHTS_FOLDER
    if not root.is_dir():
        return []
    found = []
    for path in root.iterdir():
        if (match := _FOLDER.match(path.name)) and (path / MANIFEST_FILE).is_file():
            found.append(Version(lineage=int(match[1]), step=int(match[2])))
    return sorted(found)


def read_manifest(run_dir: Path, version: Version) -> Manifest:
    """Read the manifest of a published version.

    Raises:
        WeightsError: it is missing (pruned or never published) or does not parse; take another version.
    """
    path = run_dir / version_folder(version) / MANIFEST_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=Manifest)
    except OSError as error:
        raise WeightsError(
            f"version {version}: no manifest at {path} ({error}); take a newer version"
        ) from None
    except msgspec.MsgspecError as error:
        raise WeightsError(f"version {version}: {path} is damaged ({error}); take another version") from None


def prune(run_dir: Path, keep_versions: int) -> list[Version]:
    """Remove all but the newest ``keep_versions`` versions and every half-written one; return what was
    removed.
    """
    root = run_dir / WEIGHTS_FOLDER
    for path in root.iterdir():
        if _TEMPORARY.match(path.name):
            shutil.rmtree(path, ignore_errors=True)
    doomed = published_versions(run_dir)[: -max(keep_versions, 1)]
    for version in doomed:
        remove_folder(run_dir / version_folder(version))
    return doomed


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file as lower-case hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
