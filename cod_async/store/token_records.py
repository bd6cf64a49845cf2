"""Per-token records: what each generated token was to the step that trained on it, one file a step.

``RUN/token_records/step_00000012-L0.safetensors`` holds, for all action tokens of a step in the order in
which they were recorded (by segment key, row, position): log-probs, ratio, entropy, what the loss did with
the token, its lag, and the micro-batch that it was computed in. ``keys`` and ``offsets`` say which tokens are
whose, so that a viewer reads one segment without the rest. The format is safetensors: a JSON header and raw
arrays, no pickle. Nothing here loads torch.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from cod_async.durable import write_atomic
from cod_async.errors import StoreError
from cod_async.lifecycle.segment import SegmentKey, Version

TOKEN_RECORDS_FOLDER = "token_records"  # noqa: S105  (a folder, no secret)
FORMAT = "1"

STATES = (
    "trained",
    "no_advantage",
    "clipped_high",
    "clipped_low",
    "dual_clipped",
    "segment_masked",
    "weight_outside",
    "clamped",
    "nonfinite",
)
"""What the loss did with a token; the first of these from behind that is true.

``trained``: nothing held its gradient back. ``no_advantage``: its segment's advantage is 0.
``clipped_high``, ``clipped_low``: the advantage wants the token more (less) likely, and its ratio has passed
the bound. ``dual_clipped``: the advantage is negative and the ratio beyond the dual clip.
``segment_masked``: its whole segment was left out. ``weight_outside``: its behaviour weight lay outside its
range. ``clamped``: its log-ratio lay outside [-20, 20]. ``nonfinite``: a log-prob is not finite. Whether a
clipped token still had a gradient depends on the recipe; ``gradient`` says it.
"""

FIELDS: Mapping[str, str] = {
    "logprob": "<f4",
    "behavior_logprob": "<f4",
    "ratio": "<f4",
    "entropy": "<f4",
    "gradient": "<f4",
    "advantage": "<f4",
    "state": "u1",
    "lag": "<i4",
    "update": "<i4",
    "micro_batch": "<i4",
}
"""The arrays of a file, [A] each, and their types.

``logprob``: natural log, under the weights being trained. ``behavior_logprob``: at sampling. ``ratio``: that
the clip looks at. ``entropy``: of the distribution at the token, nats. ``gradient``: d loss / d log-prob.
``advantage``: of its segment, as planned. ``state``: index into ``STATES``. ``lag``: steps. ``update``: which
of the step's optimizer steps. ``micro_batch``: which of that optimizer step's micro-batches.
"""

_ABOUT = "about"
_FILE = re.compile(r"step_(\d{8,})-L(\d+)\.safetensors")


class _About(msgspec.Struct, frozen=True):
    """What the header of a file says."""

    format: str
    version: Version
    states: tuple[str, ...]


@dataclass(frozen=True)
class TokenRecords:
    """The tokens of one segment in one step.

    Attributes:
        version: that the step started from.
        key: of the segment.
        tokens: the arrays of ``FIELDS``, [A] each, in the order of the segment's action tokens.
        states: names of the numbers in ``tokens["state"]``.
    """

    version: Version
    key: SegmentKey
    tokens: dict[str, npt.NDArray[Any]]
    states: tuple[str, ...]

    @property
    def state_names(self) -> list[str]:
        """The state of every token by name."""
        return [self.states[number] for number in self.tokens["state"]]


def records_file(run_dir: Path, version: Version) -> Path:
    """Return the file of a step's records."""
    return run_dir / TOKEN_RECORDS_FOLDER / f"step_{version.step:08d}-L{version.lineage}.safetensors"


def write_token_records(
    path: Path,
    version: Version,
    keys: npt.NDArray[np.int64],
    counts: npt.NDArray[np.int64],
    tokens: Mapping[str, npt.NDArray[Any]],
) -> None:
    """Write the records of a step in one piece.

    Args:
        path: the file.
        version: that the step started from.
        keys: int64 [N, 3], group, member and ordinal of each segment.
        counts: int64 [N], action tokens of each; they lie one segment after the other.
        tokens: the arrays of ``FIELDS``.
    """
    arrays = {name: np.ascontiguousarray(tokens[name].astype(kind)) for name, kind in FIELDS.items()}
    arrays["keys"] = np.ascontiguousarray(keys.astype("<i8"))
    arrays["offsets"] = np.concatenate([[0], np.cumsum(counts)]).astype("<i8")
    about = _About(FORMAT, version, STATES)
    # One entry, because safetensors writes several in any order: equal records are equal files.
    write_atomic(path, save(arrays, {_ABOUT: msgspec.json.encode(about).decode()}))


def prune_token_records(run_dir: Path, max_bytes: int) -> list[Path]:
    """Remove the oldest files until the rest is at most ``max_bytes``; the newest stays. Return the removed
    ones.
    """
    folder = run_dir / TOKEN_RECORDS_FOLDER
    files = sorted(
        ((int(match[2]), int(match[1])), path)
        for path in (folder.iterdir() if folder.is_dir() else ())
        if (match := _FILE.fullmatch(path.name))
    )
    sizes = {path: path.stat().st_size for _, path in files}
    total = sum(sizes.values())
    removed = []
    for _, path in files[:-1]:
        if total <= max_bytes:
            break
        path.unlink(missing_ok=True)
        total -= sizes[path]
        removed.append(path)
    return removed


def read_token_records(run_dir: Path, key: SegmentKey) -> list[TokenRecords]:
    """Return what every step that trained on a segment recorded of its tokens, oldest step first.

    Args:
        run_dir: a run folder.
        key: of the segment.

    Returns:
        One entry per step whose file is there: several if a segment was used again or trained again after a
        rollback, none where records are off or pruned.

    Raises:
        StoreError: a file is damaged or of another format.
    """
    folder = run_dir / TOKEN_RECORDS_FOLDER
    if not folder.is_dir():
        return []
    found = []
    for path in sorted(folder.iterdir()):
        if _FILE.fullmatch(path.name):
            with contextlib.suppress(FileNotFoundError):  # pruned meanwhile
                found += [one for one in [read_file(path, key)] if one is not None]
    return sorted(found, key=lambda one: (one.version.lineage, one.version.step))


def read_file(path: Path, key: SegmentKey) -> TokenRecords | None:
    """Return a segment's records from one file, of which only that part is read; None if it is not in it.

    Raises:
        StoreError: the file is damaged or of another format.
        FileNotFoundError: there is no such file.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            about = msgspec.json.decode((file.metadata() or {}).get(_ABOUT, "{}"), type=_About)
            if about.format != FORMAT:
                raise StoreError(f"{path}: token records of format {about.format}, not {FORMAT}; remove it")
            where = np.flatnonzero((file.get_tensor("keys") == [key.group, key.member, key.ordinal]).all(1))
            if not where.size:
                return None
            start, stop = file.get_tensor("offsets")[int(where[0]) : int(where[0]) + 2].tolist()
            tokens = {name: file.get_slice(name)[start:stop] for name in FIELDS}
    except (SafetensorError, msgspec.MsgspecError, ValueError, KeyError) as error:
        raise StoreError(f"{path}: not a file of token records ({error}); remove it") from None
    return TokenRecords(about.version, key, tokens, about.states)
