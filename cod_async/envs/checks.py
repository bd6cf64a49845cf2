"""The checks that options and records of environments have in common, with one wording for each.

A user sees every problem of a configuration at once, so nothing here raises before all checks have been made:
an :class:`OptionCheck` collects sentences in the order in which its methods are called.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeGuard

from cod_async.errors import EnvironmentInputError


def is_int(value: Any) -> TypeGuard[int]:
    """Return whether a JSON value is an integer (booleans are not)."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: Any, low: float, high: float) -> TypeGuard[float]:
    """Return whether a JSON value is a number in [low, high], both finite (booleans and NaN are not)."""
    return (is_int(value) or isinstance(value, float)) and low <= value <= high


class OptionCheck:
    """Options merged with their defaults, and what is wrong with them.

    Args:
        environment: registry name, for the messages.
        defaults: every option with its value.
        options: given ones; unknown names are a problem and are left out.

    Attributes:
        values: one per default.
        problems: sentences, without the environment's name.
    """

    def __init__(self, environment: str, defaults: Mapping[str, Any], options: Mapping[str, Any]) -> None:
        unknown = sorted(set(options) - set(defaults))
        self._environment = environment
        self.values: dict[str, Any] = {**defaults, **{k: options[k] for k in options if k in defaults}}
        self.problems: list[str] = []
        if unknown:
            known = ", ".join(sorted(defaults))
            self.problems.append(f"unknown option {', '.join(unknown)}; options are {known}")

    def integers(self, ranges: Mapping[str, tuple[int, int]]) -> None:
        """Demand integers, each in its range, both ends included."""
        for key, (low, high) in ranges.items():
            value = self.values[key]
            if not is_int(value) or not low <= value <= high:
                self.problems.append(f"{key} is {value!r}; it must be an integer from {low} to {high}")

    def numbers(self, ranges: Mapping[str, tuple[float, float]]) -> None:
        """Demand numbers, each in its range, both ends included."""
        for key, (low, high) in ranges.items():
            value = self.values[key]
            if not is_number(value, low, high):
                self.problems.append(f"{key} is {value!r}; it must be a number from {low:g} to {high:g}")

    def choices(self, allowed: Mapping[str, Sequence[str]]) -> None:
        """Demand one of some words each."""
        for key, words in allowed.items():
            value = self.values[key]
            if not isinstance(value, str) or value not in words:
                self.problems.append(f"{key} is {value!r}; it must be one of {', '.join(words)}")

    def switches(self, keys: Iterable[str]) -> None:
        """Demand true or false each."""
        for key in keys:
            if not isinstance(self.values[key], bool):
                self.problems.append(f"{key} is {self.values[key]!r}; it must be true or false")

    def ordered(self, subjects: Mapping[str, str]) -> None:
        """Demand that ranges are not reversed: lower end -> upper end. Asked of right types only."""
        if self.problems:
            return
        for low_key, high_key in subjects.items():
            low, high = self.values[low_key], self.values[high_key]
            if low > high:
                self.problems.append(
                    f"{low_key} is {low} but {high_key} is {high}; {low_key} must not be larger"
                )

    def finish(self) -> dict[str, Any]:
        """Return the values.

        Raises:
            EnvironmentInputError: every problem that was found, with the environment's name.
        """
        if self.problems:
            raise EnvironmentInputError([f"environment {self._environment}: {p}" for p in self.problems])
        return self.values
