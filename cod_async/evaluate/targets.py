"""Which weights to evaluate: a model directory, a version of a run, or a sweep over a run's history.

Versions of a run are *pinned* before they are loaded: hard links (copies, across file systems) beside the
results, or a model directory put together from a checkpoint's shards, so a learner that prunes its old
versions cannot take them away. Weights are known by their digest,
whatever file holds them, so the same weights are never evaluated twice.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import msgspec

from cod_async.durable import remove_folder
from cod_async.errors import InputError
from cod_async.launch.export import assemble, plain_folder, trained_versions, weight_files
from cod_async.lifecycle.segment import Version

START = "start"
"""Label of the weights that a run started from."""
_BASE_FOLDER = "model"
_EVERY = re.compile(r"^every:([1-9][0-9]{0,8})$")
_STEPS = re.compile(r"^[0-9]{1,9}(,[0-9]{1,9})*$")
_NOT_LINKED = ("optimizer.safetensors", "trainer.json", "bootstrap.json", "manifest.json")
_HASHED = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_CHUNK_BYTES = 1 << 20
_MAX_HEADER_BYTES = 100 << 20


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """One set of weights.

    Attributes:
        label: what tables call it.
        model_dir: Hugging Face model directory.
        step, lineage: where on a run's history it lies; None for a bare model.
    """

    label: str
    model_dir: str
    step: int | None = None
    lineage: int | None = None


def surviving(versions: Sequence[Version]) -> list[Version]:
    """Return the versions that lie on the newest lineage's history, as far as the versions themselves tell.

    A lineage branches off at or before the first of its own versions, so what older lineages have from there
    on did not happen.
    """
    kept: list[Version] = []
    for version in sorted(versions, reverse=True):
        if not kept or version.lineage == kept[-1].lineage or version.step < kept[-1].step:
            kept.append(version)
    return kept[::-1]


def choose_versions(run_dir: Path, wanted: str | None, step: int | None) -> list[Version | None]:
    """Return the versions of a run to evaluate; None stands for the weights it started from.

    Args:
        run_dir: a run folder.
        wanted: ``all`` (every saved checkpoint), ``every:N`` (those whose step is a multiple of N),
            ``published`` (every published version still on disk), or steps like ``0,20,40``; each but the
            list begins with the starting weights. None: a single version.
        step: without ``wanted``, the step of that version; None takes the newest.

    Raises:
        InputError: not of that form, or no such weights on disk.
    """
    found = trained_versions(run_dir)
    if wanted is None:
        if step == 0:
            return [None]
        chosen = [version for version in found if step is None or version.step == step]
        if not chosen:
            asked = "trained weights" if step is None else f"weights of step {step}"
            raise InputError(f"{run_dir}: no {asked}; steps on disk: {_steps_text(found)}")
        return [max(chosen)]
    saved = surviving([version for version, folder in found.items() if folder.parent.name == "checkpoints"])
    every = _EVERY.match(wanted)
    if wanted == "all":
        return [None, *(version for version in saved if version.step)]
    if every:
        return [None, *(version for version in saved if version.step and version.step % int(every[1]) == 0)]
    if wanted == "published":
        published = (run_dir / "weights").iterdir() if (run_dir / "weights").is_dir() else ()
        names = {path.name for path in published}
        there = [version for version in found if _published_name(version) in names]
        return [None, *(version for version in surviving(there) if version.step)]
    if not _STEPS.match(wanted):
        raise InputError(f"--checkpoints {wanted}: write all, every:N, published, or steps like 0,20,40")
    at = {version.step: version for version in surviving(list(found))}
    steps = sorted({int(text) for text in wanted.split(",")})
    unknown = [number for number in steps if number and number not in at]
    if unknown:
        raise InputError(
            f"--checkpoints {wanted}: no weights of step {', '.join(map(str, unknown))}; steps on disk: "
            f"{_steps_text(found)}"
        )
    return [at[number] if number else None for number in steps]


def _published_name(version: Version) -> str:
    return f"L{version.lineage:04d}-S{version.step:08d}"


def _steps_text(found: Mapping[Version, Path]) -> str:
    return ", ".join(str(number) for number in sorted({version.step for version in found})) or "none"


@contextmanager
def pinned(run_dir: Path, versions: Sequence[Version | None], folder: Path) -> Iterator[list[Checkpoint]]:
    """Yield model directories of a run's versions that stay while the block runs.

    Args:
        run_dir: a run folder.
        versions: from :func:`choose_versions`.
        folder: where to make them; removed afterwards.

    Raises:
        InputError: a version is no longer there.
    """
    try:
        remove_folder(folder)
        yield [pin(run_dir, version, folder) for version in versions]
    finally:
        remove_folder(folder)


def pin(run_dir: Path, version: Version | None, folder: Path) -> Checkpoint:
    """Make a model directory of one version below ``folder`` and return it.

    Raises:
        InputError: the version is no longer there.
    """
    if version is None:
        return Checkpoint(label=START, model_dir=str(run_dir / _BASE_FOLDER), step=0, lineage=0)
    if version not in trained_versions(run_dir):
        raise InputError(f"{run_dir}: version {version} is no longer on disk; evaluate a newer one")
    target = folder / str(version)
    temporary = folder / f".{version}.partial"
    shutil.rmtree(temporary, ignore_errors=True)
    folder.mkdir(parents=True, exist_ok=True)
    source = plain_folder(run_dir, version)
    try:
        if source is None:
            assemble(run_dir, version, temporary)
        else:
            _link_model(run_dir, source, temporary)
    except OSError as error:
        shutil.rmtree(temporary, ignore_errors=True)
        raise InputError(
            f"{run_dir}: version {version} cannot be read ({error}); a running learner prunes old versions: "
            "try again"
        ) from error
    shutil.rmtree(target, ignore_errors=True)
    os.rename(temporary, target)
    return Checkpoint(label=str(version), model_dir=str(target), step=version.step, lineage=version.lineage)


def _link_model(run_dir: Path, source: Path, target: Path) -> None:
    """Make a model directory of links: weights from ``source``, everything else from the starting model."""
    target.mkdir()
    for path in sorted((run_dir / _BASE_FOLDER).iterdir()):
        is_weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
        if path.is_file() and not is_weights and path.name not in _NOT_LINKED:
            _link(path, target / path.name)
    for path in weight_files(source):
        _link(path, target / path.name)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without hard links
        shutil.copyfile(source, target)


def model_digest(model_dir: Path) -> str:
    """Return a digest of a model directory: its weights and everything that turns text into ids.

    Reads every byte of the weights, a megabyte at a time.

    Returns:
        32 hexadecimal digits; equal for equal tensors, whatever files they are spread over.

    Raises:
        InputError: the weights are missing or not safetensors.
    """
    digest = hashlib.sha256(_weights_digest(model_dir).encode())
    for name in _HASHED:
        path = model_dir / name
        if path.is_file():
            digest.update(f"\n{name} ".encode() + hashlib.sha256(path.read_bytes()).hexdigest().encode())
    return digest.hexdigest()[:32]


def _weights_digest(model_dir: Path) -> str:
    """Return the SHA-256 over (name, dtype, shape, bytes) of all tensors in name order."""
    places: dict[str, tuple[Path, int, dict[str, Any]]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        if path.name in _NOT_LINKED:
            continue
        try:
            base, header = _header(path)
        except (OSError, ValueError) as error:
            raise InputError(
                f"{path}: cannot be read as safetensors, {error}; give a complete model directory"
            ) from error
        places |= {name: (path, base, entry) for name, entry in header.items() if name != "__metadata__"}
    if not places:
        raise InputError(f"{model_dir}: no *.safetensors in it; give a complete Hugging Face model directory")
    digest = hashlib.sha256()
    for name in sorted(places):
        path, base, entry = places[name]
        digest.update(json.dumps([name, entry["dtype"], entry["shape"]]).encode() + b"\n")
        first, last = entry["data_offsets"]
        with path.open("rb") as file:
            file.seek(base + first)
            left = last - first
            while left > 0 and (chunk := file.read(min(left, _CHUNK_BYTES))):
                digest.update(chunk)
                left -= len(chunk)
    return digest.hexdigest()


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Return where the data of a safetensors file begins, and its header."""
    with path.open("rb") as file:
        num_bytes = int.from_bytes(file.read(8), "little")
        if not 2 <= num_bytes <= _MAX_HEADER_BYTES:
            raise ValueError(f"a header of {num_bytes} bytes")
        header = json.loads(file.read(num_bytes))
    if not isinstance(header, dict):
        raise ValueError("the header is not a table")
    return 8 + num_bytes, header
