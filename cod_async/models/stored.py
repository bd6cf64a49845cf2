"""The safetensors files of a model directory: what they hold by their headers, and tensors one by one.

Headers are read first and compared with what is needed, so that a wrong directory is refused, with all
problems at once, before a byte of weights is read. Tensors then come one at a time (their pages are mapped
from the file, not copied), so that loading needs room for the model and one tensor. Nothing is unpickled.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from cod_async.errors import InputError

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
DTYPES = {"F64": torch.float64, "F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
"""Types of weights, by their names in safetensors headers."""
_MAX_LISTED = 20


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as a header describes it.

    Attributes:
        file: shard that holds it.
        shape: sizes.
        dtype: type by its safetensors name, for example ``BF16``.
    """

    file: str
    shape: tuple[int, ...]
    dtype: str


class StoredWeights:
    """The weights of a model directory.

    Args:
        folder: directory with ``model.safetensors``, or with shards and their index.

    Raises:
        InputError: files are missing or damaged, or the index and the shards contradict each other.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        index = _index(folder)
        files = [WEIGHTS_FILE] if index is None else sorted(set(index.values()))
        missing = [name for name in files if not (folder / name).is_file()]
        if missing:
            raise InputError(
                [f"{folder / name} does not exist although the index names it" for name in missing]
            )
        self.tensors: dict[str, StoredTensor] = {}
        """Every stored tensor by name, in the order of the files."""
        problems: list[str] = []
        for file in files:
            for name, tensor in _header(folder, file).items():
                if name in self.tensors:
                    problems.append(f"tensor {name} is in {self.tensors[name].file} and in {file}")
                elif index is not None and index.get(name) != file:
                    problems.append(f"tensor {name} is in {file}, but the index says {index.get(name)}")
                self.tensors[name] = tensor
        lost = [] if index is None else [name for name in index if name not in self.tensors]
        problems += [f"tensor {name} is named by the index, but no shard has it" for name in lost]
        raise_problems(folder, problems)

    def read(self, names: Iterable[str]) -> Iterator[tuple[str, Tensor]]:
        """Yield tensors one by one, shard by shard; drop each before asking for the next.

        Args:
            names: which ones; all must be stored.

        Raises:
            InputError: a file is damaged.
        """
        for file, group in self._by_file(names).items():
            try:
                with safe_open(self.folder / file, framework="pt") as opened:
                    for name in group:
                        yield name, opened.get_tensor(name)
            except (SafetensorError, OSError) as error:
                raise _damaged(self.folder / file, error) from error

    def read_part(self, name: str, start: int, end: int) -> Tensor:
        """Return entries ``start`` to ``end`` of a tensor's first dimension."""
        path = self.folder / self.tensors[name].file
        try:
            with safe_open(path, framework="pt") as opened:
                part: Tensor = opened.get_slice(name)[start:end]
                return part
        except (SafetensorError, OSError) as error:
            raise _damaged(path, error) from error

    def are_equal(self, first: str, second: str) -> bool:
        """Compare two tensors, a few rows at a time."""
        left, right = self.tensors[first], self.tensors[second]
        if (left.shape, left.dtype) != (right.shape, right.dtype):
            return False
        num_rows = left.shape[0] if left.shape else 1
        step = 4096
        return all(
            torch.equal(self.read_part(first, at, at + step), self.read_part(second, at, at + step))
            for at in range(0, num_rows, step)
        )

    def _by_file(self, names: Iterable[str]) -> dict[str, list[str]]:
        groups: dict[str, list[str]] = {}
        for name in names:
            groups.setdefault(self.tensors[name].file, []).append(name)
        return groups


def compare(
    stored: Mapping[str, StoredTensor],
    expected: Mapping[str, tuple[int, ...]],
    is_ignored: Callable[[str], bool] = lambda name: False,
) -> list[str]:
    """Compare what is stored with what is needed.

    Args:
        stored: tensors by name.
        expected: shapes by name.
        is_ignored: names that may be there without being needed.

    Returns:
        One sentence per problem: missing, unknown, wrong shape, no floating-point type.
    """
    problems = [f"tensor {name} is missing" for name in expected if name not in stored]
    for name, tensor in stored.items():
        if name not in expected:
            if not is_ignored(name):
                problems.append(f"tensor {name} is unknown")
        elif tensor.shape != expected[name]:
            problems.append(f"tensor {name} has shape {list(tensor.shape)}, needs {list(expected[name])}")
        elif tensor.dtype not in DTYPES:
            problems.append(
                f"tensor {name} has dtype {tensor.dtype}, needs a floating-point type ({', '.join(DTYPES)})"
            )
    return problems


def raise_problems(where: Path | str, problems: list[str]) -> None:
    """Raise an :class:`InputError` that lists problems, at most 20 of them; nothing if there are none."""
    if not problems:
        return
    listed = [f"{where}: {problem}" for problem in problems[:_MAX_LISTED]]
    if len(problems) > _MAX_LISTED:
        listed.append(f"{where}: and {len(problems) - _MAX_LISTED} more problems with tensors")
    raise InputError(listed)


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that must hold one JSON object.

    Raises:
        InputError: it does not exist, cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise InputError(f"{path} does not exist; a model directory needs it") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON: {error}") from error
    if not isinstance(value, dict):
        raise InputError(f"{path} must hold a JSON object, holds {type(value).__name__}")
    return value


def _index(folder: Path) -> dict[str, str] | None:
    """Return which file holds which tensor, None for a single file."""
    if (folder / WEIGHTS_FILE).exists():
        return None
    if not (folder / INDEX_FILE).exists():
        raise InputError(f"{folder} has neither {WEIGHTS_FILE} nor {INDEX_FILE}; weights must be safetensors")
    weight_map = read_json(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise InputError(f"{folder / INDEX_FILE} has no weight_map")
    files = {str(name): str(file) for name, file in weight_map.items()}
    outside = sorted({file for file in files.values() if Path(file).name != file or file in ("", "..")})
    if outside:
        raise InputError(
            [f"{folder / INDEX_FILE}: shard {name!r} is not a plain file name" for name in outside]
        )
    return files


def _header(folder: Path, file: str) -> dict[str, StoredTensor]:
    try:
        with safe_open(folder / file, framework="pt") as opened:
            parts = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118
            return {
                name: StoredTensor(file, tuple(part.get_shape()), str(part.get_dtype()))
                for name, part in parts.items()
            }
    except (SafetensorError, OSError) as error:
        raise _damaged(folder / file, error) from error


def _damaged(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} is not a readable safetensors file: {error}")
