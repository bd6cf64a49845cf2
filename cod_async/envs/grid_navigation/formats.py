"""What goes in and out of Grid Navigation as text and bytes: moves, maps, and the state between two tasks."""

from __future__ import annotations

import re

import numpy as np
import numpy.typing as npt

from cod_async.envs.grid_navigation.options import MAX_SIZE
from cod_async.envs.grid_navigation.worlds import MAX_COST, Cell
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.parsing import extract_between

SNAPSHOT_VERSION = 1
"""First byte of every snapshot. Behind it: nothing (no task was started), or the pack seed (8 bytes, big
endian), the side of the map (1 byte) and the revealed mask (row by row, one bit a cell, high bit first)."""

UNKNOWN = -1
"""Stands for the cost of a cell that is not revealed."""

FAR = 10**9
"""Every number of a move beyond this counts as this."""

_SNAPSHOT_HEADER_BYTES = 10
_MOVE = re.compile(r"\s*([+-]?[0-9]+)\s*,\s*([+-]?[0-9]+)\s*", re.ASCII)
_CELL_TEXTS = (*(f"{cost:>3}" for cost in range(MAX_COST + 1)), "  ?")  # UNKNOWN indexes the last


def parse_move(response: str) -> Cell | None:
    """Read the cell of a response, or None if it has none.

    The content of the only answer-tag pair must be two signed decimal integers with a comma between them and
    nothing else but white space around each. Numbers beyond 10^9 count as 10^9.
    """
    content = extract_between(response, "<answer>", "</answer>")
    match = None if content is None else _MOVE.fullmatch(content)
    return (_integer(match.group(1)), _integer(match.group(2))) if match else None


def _integer(text: str) -> int:
    # Python refuses to convert more than a few thousand digits, and the policy may write a million.
    digits = text.lstrip("+-").lstrip("0")
    size = int(digits or "0") if len(digits) < 10 else FAR
    return -size if text[0] == "-" else size


def draw_map(costs: npt.NDArray[np.int64]) -> str:
    """Draw a map: column numbers, then each row's number and its costs, three characters each, ? unknown."""
    lines = ["     " + "".join(f"{col:>3}" for col in range(len(costs)))]
    for row, values in enumerate(costs.tolist()):
        lines.append(f"{row:>3}  " + "".join([_CELL_TEXTS[value] for value in values]))
    return "\n".join(lines)


def encode_state(pack_seed: int | None, revealed: npt.NDArray[np.bool_]) -> bytes:
    """Return a snapshot, see :data:`SNAPSHOT_VERSION`.

    Args:
        pack_seed: 0 .. 2^64-1, or None before the first task.
        revealed: shape [n, n]; not looked at before the first task.
    """
    if pack_seed is None:
        return bytes([SNAPSHOT_VERSION])
    header = bytes([SNAPSHOT_VERSION]) + pack_seed.to_bytes(8, "big") + bytes([len(revealed)])
    return header + np.packbits(revealed).tobytes()


def decode_state(state: bytes) -> tuple[int | None, npt.NDArray[np.bool_] | None]:
    """Return the pack seed and the revealed mask of a snapshot; None and None before the first task.

    Raises:
        EnvironmentInputError: an unknown version, or bytes that no map has.
    """
    if state[:1] != bytes([SNAPSHOT_VERSION]):
        raise EnvironmentInputError(
            f"environment grid_navigation: snapshot: version {state[0] if state else 'none'}; this "
            f"program reads version {SNAPSHOT_VERSION}: continue with the program that wrote it"
        )
    if len(state) == 1:
        return None, None
    size = state[_SNAPSHOT_HEADER_BYTES - 1] if len(state) >= _SNAPSHOT_HEADER_BYTES else 0
    bits = np.unpackbits(np.frombuffer(state[_SNAPSHOT_HEADER_BYTES:], dtype=np.uint8))
    num_cells = size * size
    if not 2 <= size <= MAX_SIZE or len(bits) != -(-num_cells // 8) * 8 or bits[num_cells:].any():
        raise EnvironmentInputError(
            f"environment grid_navigation: snapshot: {len(state)} bytes for a map of side {size} are not "
            "a revealed mask; the bytes were damaged or are another environment's"
        )
    return int.from_bytes(state[1:9], "big"), bits[:num_cells].reshape(size, size).astype(np.bool_)
