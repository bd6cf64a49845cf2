"""The meaning of controller expressions: a tree of small nodes, each of which knows its value in a scope.

A value is a float or a boolean. Comparisons give booleans, arithmetic takes a boolean as 0.0 or 1.0 and
always gives a float, ``and`` / ``or`` give one of their operands, and ``ifelse`` evaluates only the branch
it takes. Because there are no integers, no operation costs more than constant time or memory; a power that
overflows is an error like a division by zero. Nothing here is Python's own evaluation: a node can only do
what its class says.
"""

from __future__ import annotations

import math
import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from cod_async.errors import CodError

Value = float | bool
Scope = Mapping[str, float]
"""Values of the variables at one step."""


class EvaluationError(CodError):
    """An expression has no usable value in this state (an *action error*); the message says why."""


class Node(ABC):
    """One part of an expression."""

    @abstractmethod
    def value(self, scope: Scope) -> Value:
        """Return the value in a scope.

        Raises:
            EvaluationError: division by zero, overflow of a power, a complex power, reversed clip bounds.
        """


@dataclass(frozen=True, slots=True)
class Number(Node):
    """A literal; always a finite float."""

    literal: float

    def value(self, scope: Scope) -> Value:
        """Return the literal."""
        return self.literal


@dataclass(frozen=True, slots=True)
class Variable(Node):
    """One of the variables of the scope."""

    name: str

    def value(self, scope: Scope) -> Value:
        """Look the variable up."""
        return scope[self.name]


@dataclass(frozen=True, slots=True)
class Sign(Node):
    """Unary plus or minus."""

    is_minus: bool
    operand: Node

    def value(self, scope: Scope) -> Value:
        """Return the operand as a float, negated for a minus."""
        number = float(self.operand.value(scope))
        return -number if self.is_minus else number


@dataclass(frozen=True, slots=True)
class Not(Node):
    """Logical negation; a number counts as true unless it is 0."""

    operand: Node

    def value(self, scope: Scope) -> Value:
        """Return a boolean."""
        return not self.operand.value(scope)


@dataclass(frozen=True, slots=True)
class Arithmetic(Node):
    """Operands joined by operators of one precedence (``+ -`` or ``* /``), evaluated left to right."""

    first: Node
    rest: tuple[tuple[str, Node], ...]

    def value(self, scope: Scope) -> Value:
        """Return a float; infinities and NaN are values here."""
        total = float(self.first.value(scope))
        for symbol, node in self.rest:
            number = float(node.value(scope))
            if symbol == "+":
                total += number
            elif symbol == "-":
                total -= number
            elif symbol == "*":
                total *= number
            elif number == 0.0:
                raise EvaluationError("division by zero")
            else:
                total /= number
        return total


@dataclass(frozen=True, slots=True)
class Power(Node):
    """``base ** exponent``."""

    base: Node
    exponent: Node

    def value(self, scope: Scope) -> Value:
        """Return a float, see :func:`power`."""
        return power(self.base.value(scope), self.exponent.value(scope))


@dataclass(frozen=True, slots=True)
class Comparison(Node):
    """A chain ``a < b <= c``: true if every neighboring pair compares so; stops at the first failure."""

    first: Node
    rest: tuple[tuple[str, Node], ...]

    def value(self, scope: Scope) -> Value:
        """Return a boolean; comparisons with NaN are false, except ``!=``."""
        left = self.first.value(scope)
        for symbol, node in self.rest:
            right = node.value(scope)
            if not COMPARISONS[symbol](left, right):
                return False
            left = right
        return True


@dataclass(frozen=True, slots=True)
class Junction(Node):
    """``and`` / ``or``: gives the first operand that decides, or the last; the rest is not evaluated."""

    is_or: bool
    operands: tuple[Node, ...]

    def value(self, scope: Scope) -> Value:
        """Return the deciding operand's value, unconverted."""
        result: Value = False
        for operand in self.operands:
            result = operand.value(scope)
            if bool(result) == self.is_or:
                break
        return result


@dataclass(frozen=True, slots=True)
class Choice(Node):
    """``a if condition else b`` and ``ifelse(condition, a, b)``."""

    condition: Node
    accepted: Node
    rejected: Node

    def value(self, scope: Scope) -> Value:
        """Return the value of one branch; the other is not evaluated."""
        return (self.accepted if self.condition.value(scope) else self.rejected).value(scope)


@dataclass(frozen=True, slots=True)
class Call(Node):
    """A function of its evaluated arguments."""

    function: Callable[..., Value]
    arguments: tuple[Node, ...]

    def value(self, scope: Scope) -> Value:
        """Evaluate the arguments in order and apply the function."""
        return self.function(*[argument.value(scope) for argument in self.arguments])


def power(base: Value, exponent: Value) -> float:
    """Return ``base ** exponent`` as a float.

    Raises:
        EvaluationError: 0 to a negative power, overflow, or a negative base with a fractional exponent (the
            result would be complex).
    """
    try:
        result = float(base) ** float(exponent)
    except ZeroDivisionError:
        raise EvaluationError("0 raised to a negative power") from None
    except OverflowError:
        raise EvaluationError("a power is too large") from None
    if isinstance(result, complex):
        raise EvaluationError("a negative number raised to a fractional power")
    return float(result)


def absolute(number: Value) -> float:
    """Return the absolute value; a boolean counts as 0 or 1."""
    return abs(float(number))


def _any_nan(values: tuple[Value, ...]) -> bool:
    return any(math.isnan(value) for value in values)


def smallest(*values: Value) -> float:
    """Return the smallest value as a float; NaN if any is NaN, whatever the order."""
    return math.nan if _any_nan(values) else float(min(values))


def largest(*values: Value) -> float:
    """Return the largest value as a float; NaN if any is NaN, whatever the order."""
    return math.nan if _any_nan(values) else float(max(values))


def clip(number: Value, low: Value, high: Value) -> float:
    """Return ``number`` limited to [low, high]; NaN if any is NaN.

    Raises:
        EvaluationError: ``low`` is larger than ``high``.
    """
    if _any_nan((number, low, high)):
        return math.nan
    if low > high:
        raise EvaluationError("clip() was given a lower bound above its upper bound")
    return float(max(low, min(number, high)))


def parity_smallest(*values: Value) -> Value:
    """Return the smallest value as it is; with NaN the answer depends on the order."""
    return min(values)


def parity_largest(*values: Value) -> Value:
    """Return the largest value as it is; with NaN the answer depends on the order."""
    return max(values)


def parity_clip(number: Value, low: Value, high: Value) -> Value:
    """Return max(low, min(number, high)): ``low`` for NaN and for reversed bounds."""
    return max(low, min(number, high))


COMPARISONS: dict[str, Callable[[Value, Value], bool]] = {
    "==": operator.eq,
    "!=": operator.ne,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
}
"""Comparison operators by their symbol."""

_COMMON: dict[str, tuple[Callable[..., Value], int, int | None]] = {
    "abs": (absolute, 1, 1),
    "pow": (power, 2, 2),
    "lt": (operator.lt, 2, 2),
    "le": (operator.le, 2, 2),
    "gt": (operator.gt, 2, 2),
    "ge": (operator.ge, 2, 2),
    "eq": (operator.eq, 2, 2),
    "ne": (operator.ne, 2, 2),
}

FUNCTIONS = _COMMON | {"min": (smallest, 1, None), "max": (largest, 1, None), "clip": (clip, 3, 3)}
"""Functions by name: (function, fewest arguments, most arguments or None); ``ifelse`` is :class:`Choice`."""

PARITY_FUNCTIONS = _COMMON | {
    "min": (parity_smallest, 1, None),
    "max": (parity_largest, 1, None),
    "clip": (parity_clip, 3, 3),
}
"""The same, with ``min``, ``max`` and ``clip`` as the paper's reference implementation has them."""
