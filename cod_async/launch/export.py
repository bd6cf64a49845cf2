"""A trained policy version as a Hugging Face model directory, assembled from what the run left on disk.

The weights come from the newest durable checkpoint (or the one asked for), everything else (config,
tokenizer, chat template) from the run's starting model. Files are copied, so the directory outlives the run's
retention.
"""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

from cod_async.errors import InputError
from cod_async.lifecycle.segment import Version

_CHECKPOINT = re.compile(r"^step_(\d+)-L(\d+)$")
_PUBLISHED = re.compile(r"^L(\d+)-S(\d+)$")
WEIGHTS_FILE = "model.safetensors"


def trained_versions(run_dir: Path) -> dict[Version, Path]:
    """Return every version whose weights are on disk, with the folder that holds them; checkpoints before
    others.
    """
    found: dict[Version, Path] = {}
    for folder, pattern, order in (("weights", _PUBLISHED, (1, 2)), ("checkpoints", _CHECKPOINT, (2, 1))):
        root = run_dir / folder
        for path in root.iterdir() if root.is_dir() else ():
            match = pattern.match(path.name)
            if match and (path / WEIGHTS_FILE).is_file():
                found[Version(lineage=int(match[order[0]]), step=int(match[order[1]]))] = path
    return found


def _may_replace(out: Path) -> bool:
    """Whether ``out`` is empty or holds nothing but an earlier export: flat, with a config and weights."""
    if not out.is_dir():
        return False
    entries = list(out.iterdir())
    names = {entry.name for entry in entries}
    is_flat = all(entry.is_file() for entry in entries)
    return not entries or (is_flat and {"config.json", WEIGHTS_FILE} <= names)


def export_model(run_dir: Path, out: Path, step: int | None = None) -> Version:
    """Write the newest version (or the newest lineage's version at ``step``) as a model directory.

    Args:
        run_dir: a run folder.
        out: directory to make; an earlier export there is replaced when it appears whole.
        step: optimiser step; None takes the newest.

    Returns:
        The version that was written.

    Raises:
        InputError: no weights on disk, none of that step, or ``out`` is something else than an export.
    """
    versions = trained_versions(run_dir)
    chosen = [version for version in versions if step is None or version.step == step]
    if not chosen:
        known = ", ".join(str(number) for number in sorted({version.step for version in versions})) or "none"
        wanted = "trained weights" if step is None else f"weights of step {step}"
        raise InputError(f"{run_dir}: no {wanted}; steps on disk: {known}")
    version = max(chosen)
    if out.exists() and not _may_replace(out):
        raise InputError(f"{out}: exists and is not an earlier export; choose another folder")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(f".{out.name}.{os.getpid()}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    skipped = shutil.ignore_patterns("*.safetensors", "*.safetensors.index.json", "bootstrap.json")
    try:
        shutil.copytree(run_dir / "model", temporary, ignore=skipped)
        shutil.copyfile(versions[version] / WEIGHTS_FILE, temporary / WEIGHTS_FILE)
    except (OSError, shutil.Error) as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{run_dir}: version {version} was not copied ({error}); a running learner prunes old versions: "
            "try again"
        ) from error
    if out.exists():
        shutil.rmtree(out)
    os.replace(temporary, out)
    return version
