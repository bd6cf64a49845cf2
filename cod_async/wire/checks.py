"""Value checks that a typed MessagePack decoder does not make, compiled once from the message types.

msgspec enforces types, declared bounds and lengths. It lets NaN and infinity through as floats and integers
up to 64 bit where no bound is declared. Walking every message generically would be slow; instead
:func:`compile_checks` reads the type once and returns a function that visits exactly the fields that can hold
such values. Raw arrays are left to those who know their range
(:func:`cod_async.wire.validate.validate_segment`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from msgspec import inspect as mi

from cod_async.errors import WireError
from cod_async.lifecycle.arrays import Array

MAX_INT = 1 << 62
MAX_UINT64 = (1 << 64) - 1

Check = Callable[[Any], None]


def compile_checks(message_type: Any) -> Check:
    """Return a function that raises WireError (``not_finite``, ``bad_int``) for a value of ``message_type``.

    Floats must be finite. Integers without a declared bound must be in 0 .. 2^62; seeds of hidden worlds
    (``pack_seed``) may use all 64 bits.
    """
    check = _Compiler().check(mi.type_info(message_type), "")
    return check if check is not None else lambda value: None


def _float_check(path: str) -> Check:
    isfinite = math.isfinite

    def check(value: Any) -> None:
        if not isfinite(value):
            raise WireError("not_finite", f"{path} is {value}")

    return check


def _int_check(path: str, upper: int) -> Check:
    def check(value: Any) -> None:
        if not 0 <= value <= upper:
            raise WireError("bad_int", f"{path} is {value}, must be in 0 .. {upper}")

    return check


def _each(item: Check) -> Check:
    def check(values: Any) -> None:
        for value in values:
            item(value)

    return check


def _tuple_check(items: list[Check | None]) -> Check:
    present = [(index, item) for index, item in enumerate(items) if item is not None]

    def check(values: Any) -> None:
        for index, item in present:
            item(values[index])

    return check


def _dict_check(key: Check | None, value: Check | None) -> Check:
    def check(items: Any) -> None:
        if key is not None:
            for name in items:
                key(name)
        if value is not None:
            for entry in items.values():
                value(entry)

    return check


class _Compiler:
    """Builds checks from types; struct checks are shared, so that recursive types end."""

    def __init__(self) -> None:
        self._structs: dict[tuple[type, str], Check | None] = {}

    def check(self, info: mi.Type, path: str) -> Check | None:
        """Return the check of one type, or None where nothing needs checking."""
        match info:
            case mi.FloatType():
                return _float_check(path)
            case mi.IntType():
                return self._int(info, path)
            case mi.ListType() | mi.VarTupleType() | mi.SetType() | mi.FrozenSetType():
                item = self.check(info.item_type, f"{path}[]")
                return None if item is None else _each(item)
            case mi.TupleType():
                items = [self.check(item_type, f"{path}[{i}]") for i, item_type in enumerate(info.item_types)]
                return _tuple_check(items) if any(items) else None
            case mi.DictType():
                key, value = (
                    self.check(info.key_type, f"{path} key"),
                    self.check(info.value_type, f"{path}{{}}"),
                )
                return None if key is None and value is None else _dict_check(key, value)
            case mi.UnionType():
                return self._union(info, path)
            case mi.StructType():
                return self._struct(info, path)
            case mi.Metadata():
                return self.check(info.type, path)
            case _:
                return None

    def _int(self, info: mi.IntType, path: str) -> Check | None:
        if info.ge is not None and info.le is not None:
            return None  # msgspec enforces both sides
        return _int_check(path, MAX_UINT64 if path.endswith("pack_seed") else MAX_INT)

    def _union(self, info: mi.UnionType, path: str) -> Check | None:
        by_type: dict[type, Check] = {}
        for member in info.types:
            check = self.check(member, path)
            if check is None:
                continue
            match member:
                case mi.StructType():
                    by_type[member.cls] = check
                case mi.IntType():
                    by_type[int] = check
                case mi.FloatType():
                    by_type[float] = check
                case _:
                    raise TypeError(f"no value check for {member} inside a union")

        def check_union(value: Any) -> None:
            chosen = by_type.get(type(value))
            if chosen is not None:
                chosen(value)

        return check_union if by_type else None

    def _struct(self, info: mi.StructType, path: str) -> Check | None:
        cls = info.cls
        if cls is Array:
            return None
        label = path or str(info.tag or cls.__name__)
        if (cls, label) in self._structs:
            return self._structs[cls, label]
        self._structs[cls, label] = None
        found = [(field.name, self.check(field.type, f"{label}.{field.name}")) for field in info.fields]
        present = [(name, check) for name, check in found if check is not None]

        def check_struct(value: Any) -> None:
            for name, check in present:
                check(getattr(value, name))

        self._structs[cls, label] = check_struct if present else None
        return self._structs[cls, label]
