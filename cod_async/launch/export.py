"""A trained policy version as a Hugging Face model directory, assembled from what the run left on disk.

The weights come from the newest durable checkpoint (or the one asked for), or from a published version that
has none; everything else (config, tokenizer, chat template) from the run's starting model. What is written
shares nothing with the run folder, so the directory outlives the run's retention. Checkpoints are in shards
and are put together with torch, which is loaded only then; published versions are copied.
"""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from cod_async.errors import InputError
from cod_async.learner.checkpoints.record import (
    CHECKPOINTS_FOLDER,
    TRAINER_FILE,
    WEIGHTS_KIND,
    version_of_folder,
)
from cod_async.lifecycle.segment import Version
from cod_async.weights.folders import WEIGHTS_FOLDER, version_folder

_PUBLISHED = re.compile(r"^L(\d+)-S(\d+)$")
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_NOT_EXPORTED = "bootstrap.json"
"""It describes the starting weights."""


def has_plain_weights(folder: Path) -> bool:
    """Whether a folder holds weights as a model directory does: one file, or shards with their index."""
    return (folder / WEIGHTS_FILE).is_file() or (folder / INDEX_FILE).is_file()


def weight_files(folder: Path) -> list[Path]:
    """Return the files of a folder with plain weights."""
    if (folder / WEIGHTS_FILE).is_file():
        return [folder / WEIGHTS_FILE]
    return [folder / INDEX_FILE, *sorted(folder.glob("model-*-of-*.safetensors"))]


def trained_versions(
    run_dir: Path, folders: Sequence[str] = (WEIGHTS_FOLDER, CHECKPOINTS_FOLDER)
) -> dict[Version, Path]:
    """Return every version whose weights are on disk, with the folder that holds them; checkpoints before
    others.

    Args:
        run_dir: the run folder.
        folders: where to look: published versions, checkpoints, or both.
    """
    found: dict[Version, Path] = {}
    for folder in folders:
        root = run_dir / folder
        for path in root.iterdir() if root.is_dir() else ():
            version = _version_of(path.name)
            is_sharded = (path / TRAINER_FILE).is_file() and (path / WEIGHTS_KIND).is_dir()
            if version is not None and (is_sharded or has_plain_weights(path)):
                found[version] = path
    return found


def plain_folder(run_dir: Path, version: Version) -> Path | None:
    """Return a folder that holds a version's weights as a model directory does; None if there is none."""
    places = [trained_versions(run_dir).get(version), run_dir / version_folder(version)]
    return next((place for place in places if place is not None and has_plain_weights(place)), None)


def assemble(run_dir: Path, version: Version, out: Path) -> None:
    """Put a checkpoint together as a model directory; loads torch, and needs memory for the model.

    Args:
        run_dir: a run folder.
        version: of the checkpoint.
        out: directory that does not exist yet.

    Raises:
        InputError: the checkpoint is missing or damaged, or ``out`` cannot be written.
    """
    from cod_async.learner.checkpoints.assemble import assemble_model

    assemble_model(run_dir, version, out)
    (out / _NOT_EXPORTED).unlink(missing_ok=True)


def _version_of(name: str) -> Version | None:
    match = _PUBLISHED.match(name)
    return version_of_folder(name) if match is None else Version(lineage=int(match[1]), step=int(match[2]))


def _may_replace(out: Path) -> bool:
    """Whether ``out`` is empty or holds nothing but an earlier export: flat, with a config and weights."""
    if not out.is_dir():
        return False
    entries = list(out.iterdir())
    is_flat = all(entry.is_file() for entry in entries)
    return not entries or (is_flat and (out / "config.json").is_file() and has_plain_weights(out))


def newest_version(run_dir: Path, step: int | None = None) -> Version:
    """Return the newest version on disk, or the newest lineage's at ``step``.

    Raises:
        InputError: no weights on disk, or none of that step.
    """
    versions = trained_versions(run_dir)
    chosen = [version for version in versions if step is None or version.step == step]
    if not chosen:
        known = ", ".join(str(number) for number in sorted({version.step for version in versions})) or "none"
        wanted = "trained weights" if step is None else f"weights of step {step}"
        raise InputError(f"{run_dir}: no {wanted}; steps on disk: {known}")
    return max(chosen)


def export_model(run_dir: Path, out: Path, step: int | None = None) -> Version:
    """Write the newest version (or the newest lineage's version at ``step``) as a model directory.

    Args:
        run_dir: a run folder.
        out: directory to make; an earlier export there is replaced when it appears whole.
        step: optimizer step; None takes the newest.

    Returns:
        The version that was written.

    Raises:
        InputError: no weights on disk, none of that step, or ``out`` is something else than an export.
    """
    version = newest_version(run_dir, step)
    if out.exists() and not _may_replace(out):
        raise InputError(f"{out}: exists and is not an earlier export; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.export")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        source = trained_versions(run_dir).get(version)
        if source is not None and has_plain_weights(source):
            _copy(run_dir, source, temporary)
        else:
            assemble(run_dir, version, temporary)
    except (OSError, shutil.Error) as error:
        raise InputError(
            f"{run_dir}: version {version} was not copied ({error}); a running learner prunes old versions: "
            "try again"
        ) from error
    else:
        if out.exists():
            shutil.rmtree(out)
        os.replace(temporary, out)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return version


def _copy(run_dir: Path, source: Path, target: Path) -> None:
    skipped = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", _NOT_EXPORTED)
    shutil.copytree(run_dir / "model", target, ignore=skipped)
    for path in weight_files(source):
        shutil.copyfile(path, target / path.name)
