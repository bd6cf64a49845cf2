"""Controller expressions against an independent reference: Python's own syntax tree, walked here.

The reference parses with the standard library's ``ast`` and evaluates with Python's numbers, where
comparisons give real booleans and arithmetic on them gives integers. It shares no code with the language
under test.
"""

from __future__ import annotations

import ast
import math
import operator
import re
import warnings
from collections.abc import Callable
from typing import Any

from hypothesis import example, given, settings
from hypothesis import strategies as st

from cod_async.envs.optimal_control.evaluation import EvaluationError
from cod_async.envs.optimal_control.syntax import VARIABLES, ExpressionSyntaxError, parse_expression

BINARY: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.Pow: lambda a, b: real_power(a, b),
}
UNARY: dict[type[ast.unaryop], Callable[[Any], Any]] = {
    ast.UAdd: operator.pos,
    ast.USub: operator.neg,
    ast.Not: operator.not_,
}
COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: operator.eq,
    ast.NotEq: operator.ne,
    ast.Lt: operator.lt,
    ast.LtE: operator.le,
    ast.Gt: operator.gt,
    ast.GtE: operator.ge,
}
ARITY = {"abs": 1, "pow": 2, "clip": 3, "ifelse": 3, "lt": 2, "le": 2, "gt": 2, "ge": 2, "eq": 2, "ne": 2}


class Failed(Exception):
    """The reference found no value."""


def real_power(a: Any, b: Any) -> float:
    """Floats, because powers of integers (sums of booleans) can be astronomically large."""
    result = float(a) ** float(b)
    if isinstance(result, complex):
        raise Failed
    return result


def is_allowed(node: ast.expr) -> bool:
    match node:
        case ast.Constant(value=value):
            if type(value) not in (int, float):
                return False
            try:
                return math.isfinite(float(value))
            except OverflowError:
                return False
        case ast.Name(id=name):
            return name in VARIABLES
        case ast.UnaryOp(op=op, operand=operand):
            return type(op) in UNARY and is_allowed(operand)
        case ast.BinOp(left=left, op=op, right=right):
            return type(op) in BINARY and is_allowed(left) and is_allowed(right)
        case ast.BoolOp(values=values):
            return all(map(is_allowed, values))
        case ast.Compare(left=left, ops=ops, comparators=rest):
            return all(type(op) in COMPARE for op in ops) and all(map(is_allowed, [left, *rest]))
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return all(map(is_allowed, (test, body, orelse)))
        case ast.Call(func=ast.Name(id=name), args=args, keywords=[]):
            fits = len(args) >= 1 if name in ("min", "max") else ARITY.get(name) == len(args)
            return fits and all(map(is_allowed, args))
    return False


def called(name: str, args: list[Any], is_parity: bool) -> Any:
    if name in ("lt", "le", "gt", "ge", "eq", "ne"):
        return getattr(operator, name)(*args)
    if name == "abs":
        return abs(args[0])
    if name == "pow":
        return real_power(*args)
    if is_parity:
        if name == "clip":
            return max(args[1], min(args[0], args[2]))
        return {"min": min, "max": max}[name](args)
    if any(math.isnan(arg) for arg in args):
        return math.nan
    if name == "clip":
        number, low, high = map(float, args)
        if low > high:
            raise Failed
        return sorted((low, number, high))[1]
    return float(sorted(args)[0 if name == "min" else -1])


def evaluated(node: ast.expr, scope: dict[str, float], is_parity: bool) -> Any:
    def of(inner: ast.expr) -> Any:
        return evaluated(inner, scope, is_parity)

    match node:
        case ast.Constant(value=value):
            assert isinstance(value, int | float)
            return float(value)
        case ast.Name(id=name):
            return scope[name]
        case ast.UnaryOp(op=op, operand=operand):
            return UNARY[type(op)](of(operand))
        case ast.BinOp(left=left, op=op, right=right):
            return BINARY[type(op)](of(left), of(right))
        case ast.BoolOp(op=op, values=values):
            result = of(values[0])
            for value in values[1:]:
                result = (result or of(value)) if isinstance(op, ast.Or) else (result and of(value))
            return result
        case ast.Compare(left=left, ops=ops, comparators=rest):
            a = of(left)
            for op, inner in zip(ops, rest, strict=True):
                b = of(inner)
                if not COMPARE[type(op)](a, b):
                    return False
                a = b
            return True
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return of(body) if of(test) else of(orelse)
        case ast.Call(func=ast.Name(id="ifelse"), args=[test, body, orelse]):
            return of(body) if of(test) else of(orelse)
        case ast.Call(func=ast.Name(id=name), args=args):
            return called(name, [of(arg) for arg in args], is_parity)
    raise AssertionError(ast.dump(node))


def reference(text: str, scope: dict[str, float], is_parity: bool) -> Any:
    """The value, or "syntax" or "action" for the two kinds of failure."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # numbers that run into keywords
            tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError):
        return "syntax"
    if not is_allowed(tree.body):
        return "syntax"
    try:
        return evaluated(tree.body, scope, is_parity)
    except (ZeroDivisionError, OverflowError, Failed):
        return "action"


def ours(text: str, scope: dict[str, float], is_parity: bool) -> Any:
    try:
        expression = parse_expression(text, is_parity)
    except ExpressionSyntaxError as error:
        assert not re.search("more than|longer", str(error)), "the examples stay below the limits"
        return "syntax"
    try:
        return expression.root.value(scope)
    except EvaluationError:
        return "action"


def check(text: str, scope: dict[str, float], is_parity: bool) -> None:
    expected, found = reference(text, scope, is_parity), ours(text, scope, is_parity)
    if isinstance(expected, str) or isinstance(found, str):
        assert found == expected, text
        return
    assert isinstance(found, bool) == isinstance(expected, bool), text
    assert found == expected or (math.isnan(found) and math.isnan(expected)), text


numbers = st.sampled_from(
    ["0", "1", "2", "3", "0.5", "1e308", "1e-3", ".25", "2.", "0x1F", "1_000", "0b11", "00", "1e400", "007"]
)
leaves = numbers | st.sampled_from(VARIABLES)
spaces = st.sampled_from(["", " ", "  "])
binary = st.sampled_from(
    ["+", "-", "*", "/", "**", "<", "<=", ">", ">=", "==", "!=", " and ", " or ", "//", "%", ","]
)
names = st.sampled_from([*ARITY, "min", "max", "x", "foo"])


def grown(inner: st.SearchStrategy[str]) -> st.SearchStrategy[str]:
    """Larger texts; nothing is put in brackets unasked, so precedence is what is tested."""
    return st.one_of(
        st.tuples(inner, spaces, binary, spaces, inner).map("".join),
        st.tuples(inner, binary, inner, binary, inner).map("".join),
        inner.map(lambda a: f"({a})"),
        st.tuples(st.sampled_from(["-", "+", "not ", "- ", "~"]), inner).map("".join),
        st.tuples(inner, inner, inner).map(lambda p: f"{p[0]} if {p[1]} else {p[2]}"),
        st.tuples(names, st.lists(inner, min_size=0, max_size=3)).map(lambda p: f"{p[0]}({', '.join(p[1])})"),
        st.tuples(st.sampled_from(["min", "max"]), st.lists(inner, min_size=1, max_size=3)).map(
            lambda p: f"{p[0]}({','.join(p[1])},)"
        ),
        st.tuples(inner, inner, inner).map(lambda p: f"clip({p[0]}, {p[1]}, {p[2]})"),
        st.tuples(inner, inner, inner).map(lambda p: f"ifelse({p[0]}, {p[1]}, {p[2]})"),
    )


expressions = st.recursive(leaves, grown, max_leaves=12)
values = st.sampled_from([0.0, 1.0, -1.0, 0.5, -2.5, 1e200, math.inf, math.nan]) | st.floats(-10, 10)
scopes = st.fixed_dictionaries(dict.fromkeys(VARIABLES, values))


@settings(max_examples=200, deadline=None)
@given(expressions, scopes, st.booleans())
@example("1 + not x", dict.fromkeys(VARIABLES, 1.0), False)
@example("x < v < t == 1", dict.fromkeys(VARIABLES, 1.0), False)
@example("-2 ** -x ** 2 * 3", dict.fromkeys(VARIABLES, 1.5), False)
@example("not x == v and t or 0", dict.fromkeys(VARIABLES, 0.0), True)
def test_expressions_mean_what_python_says(text: str, scope: dict[str, float], is_parity: bool) -> None:
    check(text, scope, is_parity)


pieces = st.sampled_from(
    [
        *"()()(),+-*/<>=!.#\\:%[", "**", "<=", "==", "!=", "//", "\n", "\n", " ", "  ", "\t", "x", "v",
        "t", "1", "2.5", ".5", "1.", "0", "e1", "_", "if", "else", "and", "or", "not", " if ", " else ",
        " and ", " or ", "not ", "max(", "abs(", "lt(", "ifelse(", "True", "y", "1j", "0x", "lambda",
        " in ", " is ", "'",
    ]
)  # fmt: skip
CALLED_IN_BRACKETS = re.compile(rf"\b(?:{'|'.join([*ARITY, 'min', 'max'])})\b[\s\\]*(?:#.*\n\s*)*\)")


@settings(max_examples=250, deadline=None)
@given(st.lists(pieces, max_size=10).map("".join), scopes)
@example("#c\nx", dict.fromkeys(VARIABLES, 1.0))
@example("#c\n x", dict.fromkeys(VARIABLES, 1.0))
@example("x\n#c", dict.fromkeys(VARIABLES, 1.0))
@example("x\n \n", dict.fromkeys(VARIABLES, 1.0))
@example("\\\n x", dict.fromkeys(VARIABLES, 1.0))
def test_any_pieces_parse_as_in_python(text: str, scope: dict[str, float]) -> None:
    if CALLED_IN_BRACKETS.search(text):
        return  # Python cannot tell (max)(1) from max(1); here only the bare name may be called
    check(text, scope, False)


@settings(max_examples=250, deadline=None)
@given(st.text(alphabet="0123456789_.eExXoObBjafinorltsd+- ", max_size=10))
@example("0or 1")
@example("1or 2")
@example("0xfor 1")
@example("1_000.0_1e-0_5")
@example("0_0")
@example("1.if 1else 2")
def test_numbers_are_cut_as_in_python(text: str) -> None:
    check(text, dict.fromkeys(VARIABLES, 1.5), False)
