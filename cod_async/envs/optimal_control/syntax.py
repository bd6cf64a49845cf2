"""The grammar of controller expressions: our own tokenizer and parser, with a ceiling on everything.

The language is the part of Python's expression syntax that the environment's README lists: numbers, seven
variables, arithmetic, comparisons, ``and or not``, the conditional expression, and a dozen functions called
by their bare names. Precedence, number formats, comments and line continuation are Python's, because that
is what models write; whatever else Python has is an error here. Length, nesting and size are limited, so
parsing is quick and the recursion shallow for any text.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from cod_async.envs.optimal_control.evaluation import (
    COMPARISONS,
    FUNCTIONS,
    PARITY_FUNCTIONS,
    Arithmetic,
    Call,
    Choice,
    Comparison,
    EvaluationError,
    Junction,
    Node,
    Not,
    Number,
    Power,
    Scope,
    Sign,
    Variable,
)
from cod_async.errors import CodError

MAX_CHARS = 2_000
"""Longest expression, in characters."""
MAX_DEPTH = 64
"""Deepest nesting: every operand, argument and bracket lies one level below what it belongs to. A chain of
operators of one precedence, like a sum of many terms, is one level."""
MAX_NODES = 500
"""Most parts: numbers, variables, operators, calls and conditionals."""

VARIABLES = ("x", "v", "t", "x_target", "v_target", "horizon", "remaining_steps")
"""Names that a controller may read."""

_DIGITS = r"[0-9](?:_?[0-9])*"
_NUMBER = re.compile(
    rf"""(?P<float> (?:(?:{_DIGITS})?\.{_DIGITS} | {_DIGITS}\.) (?:[eE][+-]?{_DIGITS})?
        | {_DIGITS}[eE][+-]?{_DIGITS})
    | 0[xX](?P<hex>(?:_?[0-9a-fA-F])+) | 0[oO](?P<oct>(?:_?[0-7])+) | 0[bB](?P<bin>(?:_?[01])+)
    | (?P<int> [1-9](?:_?[0-9])* | 0(?![xXoObB])(?:_?0)*)""",
    re.VERBOSE,
)
_BASES = {"hex": 16, "oct": 8, "bin": 2, "int": 10}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_SYMBOL = re.compile(r"\*\*|==|!=|<=|>=|[-+*/<>(),]")
_OTHER_SYMBOL = re.compile(r"//|<<|>>|:=|->")
_JOINS_NUMBER = re.compile(r"and|else|for|if|in|is|not|or")
"""What Python lets follow a number without a space."""

# Levels of precedence; an operand of a level is parsed at the next one.
_TERNARY, _OR, _AND, _NOT, _COMPARE, _SUM, _TERM, _UNARY, _POWER = range(9)
_LEVELS = {
    "or": _OR,
    "and": _AND,
    "+": _SUM,
    "-": _SUM,
    "*": _TERM,
    "/": _TERM,
    "**": _POWER,
    **dict.fromkeys(COMPARISONS, _COMPARE),
}
_WORDS = frozenset({"and", "or", "not", "if", "else"})


class ExpressionSyntaxError(CodError):
    """A text is not an expression of the language, or exceeds a limit; the message says where and why."""


@dataclass(frozen=True, slots=True)
class _Token:
    """A lexical unit: ``text`` as written (empty at the end), its offset, and a number's value."""

    text: str
    place: int
    is_spaced: bool
    number: float | None = None
    is_name: bool = False


@dataclass(frozen=True, slots=True)
class Expression:
    """A parsed controller.

    Attributes:
        text: the expression on one line, without comments and surplus white space.
        root: its tree.
    """

    text: str
    root: Node

    def control(self, scope: Scope) -> float:
        """Return the value in a scope: a finite float, not yet clipped.

        Raises:
            EvaluationError: the value is a boolean or not finite, or has no value at all.
        """
        value = self.root.value(scope)
        if isinstance(value, bool):
            raise EvaluationError("the result is a truth value, not a number")
        if not math.isfinite(value):
            raise EvaluationError("the result is not a finite number")
        return value


def parse_expression(text: str, is_parity: bool = False) -> Expression:
    """Parse a controller.

    Args:
        text: any text.
        is_parity: give ``min``, ``max`` and ``clip`` the reference's meaning, see :mod:`.evaluation`.

    Raises:
        ExpressionSyntaxError: not in the language, empty, or beyond :data:`MAX_CHARS`, :data:`MAX_DEPTH` or
            :data:`MAX_NODES`.
    """
    text = text.strip()
    if len(text) > MAX_CHARS:
        raise ExpressionSyntaxError(f"the expression is longer than {MAX_CHARS} characters")
    tokens = _tokenize(text.replace("\r\n", "\n").replace("\r", "\n"))
    root = _Parser(tokens, is_parity).parse()
    shown = "".join(f" {token.text}" if token.is_spaced else token.text for token in tokens)
    return Expression(text=shown.strip(), root=root)


def _tokenize(text: str) -> list[_Token]:
    """Cut a text into tokens, the last of which is empty; line ends only count outside brackets."""
    tokens: list[_Token] = []
    place, depth = 0, 0
    is_spaced, is_ended, is_line_start, is_indented = False, False, True, False
    while place < len(text):
        char = text[place]
        if char in " \t":
            is_indented = is_indented or is_line_start
            is_spaced, is_line_start, place = True, False, place + 1
            continue
        if char == "\n":
            is_ended = is_ended or (bool(tokens) and depth == 0)
            is_spaced, is_line_start, is_indented, place = True, True, False, place + 1
            continue
        if char == "#":
            end = text.find("\n", place)
            place = len(text) if end < 0 else end
            continue
        if text.startswith("\\\n", place) and place + 2 < len(text):
            is_spaced, place = True, place + 2
            continue
        if is_ended:
            raise _error("the expression goes on after a line end; put it in brackets", place)
        if is_indented and not tokens:
            raise _error("unexpected indentation", place)
        token = _token_at(text, place, is_spaced)
        depth += {"(": 1, ")": -1}.get(token.text, 0)
        tokens.append(token)
        is_spaced, is_line_start, place = False, False, place + len(token.text)
    return [*tokens, _Token("", place, False)]


def _token_at(text: str, place: int, is_spaced: bool) -> _Token:
    """Return the token that starts at a place."""
    match = _NUMBER.match(text, place)
    if match:
        end = match.end()
        follows_word = end < len(text) and (text[end].isalnum() or text[end] == "_" or ord(text[end]) > 127)
        if follows_word and not _JOINS_NUMBER.match(text, end):
            raise _error("a number runs into a word or is not well formed", place)
        return _Token(match.group(), place, is_spaced, number=_number(match, place))
    match = _NAME.match(text, place)
    if match:
        return _Token(match.group(), place, is_spaced, is_name=True)
    other = _OTHER_SYMBOL.match(text, place)
    match = None if other else _SYMBOL.match(text, place)
    if match:
        return _Token(match.group(), place, is_spaced)
    symbol = other.group() if other else text[place]
    raise _error(f"{symbol!a} is not allowed", place)


def _number(match: re.Match[str], place: int) -> float:
    """Return a literal's value, correctly rounded.

    Raises:
        ExpressionSyntaxError: it is too large for a float.
    """
    digits = match.group(str(match.lastgroup)).replace("_", "")
    base = _BASES.get(str(match.lastgroup))
    try:
        value = float(digits) if base is None else float(int(digits, base))
    except OverflowError:
        value = math.inf
    if math.isinf(value):
        raise _error("a number is too large", place)
    return value


def _error(problem: str, place: int) -> ExpressionSyntaxError:
    return ExpressionSyntaxError(f"{problem} (character {place + 1})")


class _Parser:
    """Precedence climbing over tokens."""

    def __init__(self, tokens: list[_Token], is_parity: bool) -> None:
        self._tokens = tokens
        self._next = 0
        self._depth = 0
        self._num_nodes = 0
        self._functions = PARITY_FUNCTIONS if is_parity else FUNCTIONS

    def parse(self) -> Node:
        """Parse all tokens as one expression."""
        root = self._expression(_TERNARY)
        if self._token.text:
            raise self._unexpected()
        return root

    @property
    def _token(self) -> _Token:
        return self._tokens[self._next]

    def _take(self) -> _Token:
        token = self._token
        self._next += 1
        return token

    def _accept(self, text: str) -> bool:
        """Take the next token if it reads so."""
        is_there = self._token.text == text
        self._next += is_there
        return is_there

    def _expect(self, text: str) -> None:
        if not self._accept(text):
            raise self._unexpected(f"; expected {text!r}")

    def _unexpected(self, expected: str = "") -> ExpressionSyntaxError:
        token = self._token
        found = repr(token.text[:30]) if token.text else "end"
        return _error(f"unexpected {found}{expected}", token.place)

    def _count(self) -> None:
        self._num_nodes += 1
        if self._num_nodes > MAX_NODES:
            raise _error(f"the expression has more than {MAX_NODES} parts", self._token.place)

    def _expression(self, level: int) -> Node:
        """Parse as far as operators of at least this level reach."""
        self._depth += 1
        if self._depth > MAX_DEPTH:
            raise _error(f"the expression is nested more than {MAX_DEPTH} deep", self._token.place)
        left = self._prefixed(level)
        while (found := _LEVELS.get(self._token.text, -1)) >= max(level, _OR):
            if found == _POWER:
                self._take()
                self._count()
                left = Power(left, self._expression(_UNARY))
            else:
                left = self._chain(left, found)
        if level == _TERNARY and self._accept("if"):
            self._count()
            condition = self._expression(_OR)
            self._expect("else")
            left = Choice(condition, left, self._expression(_TERNARY))
        self._depth -= 1
        return left

    def _chain(self, first: Node, level: int) -> Node:
        """Parse the rest of a chain of operators of one level."""
        rest = []
        while _LEVELS.get(self._token.text) == level:
            self._count()
            symbol = self._take().text
            rest.append((symbol, self._expression(level + 1)))
        if level == _COMPARE:
            return Comparison(first, tuple(rest))
        if level in (_OR, _AND):
            return Junction(level == _OR, (first, *(node for _, node in rest)))
        return Arithmetic(first, tuple(rest))

    def _prefixed(self, level: int) -> Node:
        """Parse an operand with the prefix operators that may stand at this level."""
        if level <= _NOT and self._accept("not"):
            self._count()
            return Not(self._expression(_NOT))
        if self._token.text in ("+", "-"):
            self._count()
            return Sign(self._take().text == "-", self._expression(_UNARY))
        return self._atom()

    def _atom(self) -> Node:
        """Parse a number, a variable, a call, or an expression in brackets."""
        token = self._token
        if token.number is not None:
            self._take()
            self._count()
            return Number(token.number)
        if token.is_name and token.text not in _WORDS:
            self._take()
            self._count()
            if token.text in VARIABLES and self._token.text != "(":
                return Variable(token.text)
            return self._call(token)
        if self._accept("("):
            inner = self._expression(_TERNARY)
            self._expect(")")
            return inner
        raise self._unexpected()

    def _call(self, name: _Token) -> Node:
        """Parse the arguments of a function and apply it."""
        is_choice = name.text == "ifelse"
        if not is_choice and name.text not in self._functions:
            kind = "function" if self._token.text == "(" else "variable"
            raise _error(f"there is no {kind} {name.text[:30]!r}", name.place)
        self._expect("(")
        arguments: list[Node] = []
        while not self._accept(")"):
            arguments.append(self._expression(_TERNARY))
            if not self._accept(","):
                self._expect(")")
                break
        function, fewest, most = (None, 3, 3) if is_choice else self._functions[name.text]
        if len(arguments) < fewest or (most is not None and len(arguments) > most):
            wanted = f"{fewest}" if most == fewest else f"at least {fewest}"
            raise _error(f"{name.text}() takes {wanted} arguments, not {len(arguments)}", name.place)
        if function is None:
            return Choice(*arguments)
        return Call(function, tuple(arguments))
