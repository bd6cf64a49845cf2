"""Numeric arrays as they travel and rest: raw little-endian bytes with a dtype and a length.

Lists of Python numbers cost ten times the size and nineteen times the decoding time, so tokens and log-probs
are kept as bytes from the moment an episode is sealed until the learner packs it. An :class:`Array` is
checked when it is decoded (dtype known, byte count equal to length times item size); values are checked by
whoever knows their range.
"""

from __future__ import annotations

from typing import Any, Literal

import msgspec
import numpy as np
import numpy.typing as npt

DType = Literal["<i4", "<i8", "<f4", "|u1"]

_ITEM_BYTES = {"<i4": 4, "<i8": 8, "<f4": 4, "|u1": 1}


class Array(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A one-dimensional array of ``length`` items of ``dtype``, little-endian, as raw bytes.

    Raises:
        ValueError: the byte count does not fit dtype and length (surfaces as a decoding error on the wire).
    """

    dtype: DType
    length: int
    data: bytes

    def __post_init__(self) -> None:
        expected = self.length * _ITEM_BYTES[self.dtype]
        if self.length < 0 or len(self.data) != expected:
            raise ValueError(
                f"array of {self.length} x {self.dtype} needs {expected} bytes, has {len(self.data)}"
            )

    @classmethod
    def of(cls, values: npt.ArrayLike, dtype: DType) -> Array:
        """Build from any one-dimensional array-like, converting to ``dtype``."""
        array = np.ascontiguousarray(values, dtype=np.dtype(dtype)).reshape(-1)
        return cls(dtype=dtype, length=int(array.size), data=array.tobytes())

    def numpy(self) -> npt.NDArray[Any]:
        """Return a read-only view of shape [length]; no copy."""
        return np.frombuffer(self.data, dtype=np.dtype(self.dtype))
