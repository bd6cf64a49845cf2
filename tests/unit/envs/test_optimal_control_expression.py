"""Controller expressions: what parses, what it means, and that nothing gets past the limits."""

from __future__ import annotations

import math
from typing import Any

import pytest

from cod_async.envs.optimal_control.evaluation import EvaluationError
from cod_async.envs.optimal_control.syntax import (
    MAX_CHARS,
    MAX_DEPTH,
    MAX_NODES,
    VARIABLES,
    ExpressionSyntaxError,
    parse_expression,
)

SCOPE = {
    "x": 2.0,
    "v": -0.5,
    "t": 3.0,
    "x_target": 5.0,
    "v_target": 0.0,
    "horizon": 12.0,
    "remaining_steps": 9.0,
}


def value(text: str, **changes: float) -> Any:
    return parse_expression(text).root.value(SCOPE | changes)


def control(text: str, is_parity: bool = False, **changes: float) -> float:
    return parse_expression(text, is_parity).control(SCOPE | changes)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("1_0*x", 20.0),
        ("0x10", 16.0),
        ("0b101 + 0o17 + 0XfF", 275.0),
        ("1_0.5_0e-0_1 + .5 + 2. + 00", 3.55),
        ("x  # double it later", 2.0),
        ("(x +\n  v  # inner\n)", 1.5),
        ("x + \\\n v", 1.5),
        ("ifelse(0 < x < 3, 1, 2)", 1.0),
        ("ifelse(0 < x < 1, 1, 2)", 2.0),
        ("1 if x > 1 else 2", 1.0),
        ("1if x<1else 2", 2.0),
        ("0.25*(x_target-x)-0.32*v", 0.91),
        ("horizon - t - remaining_steps + v_target", 0.0),
        ("-x**2", -4.0),
        ("(-x)**2", 4.0),
        ("2**-1", 0.5),
        ("2**3**2", 512.0),
        ("2 - 3 - 4", -5.0),
        ("2 / 4 / 2 * 3", 0.75),
        ("- - + - x", -2.0),
        ("x + x * x ** x", 10.0),
        ("not x == 2", False),
        ("not not x", True),
        ("x and v", -0.5),
        ("v_target and 1/v_target", 0.0),
        ("v_target or x", 2.0),
        ("x or 1/v_target", 2.0),
        ("0 or v_target and 1 or 7", 7.0),
        ("ifelse(1, x, 1/0)", 2.0),
        ("x if 1 else 1/0", 2.0),
        ("3 > 1 > 0/1 < 2", True),
        ("1 > 2 > 1/0", False),
        ("lt(x, 3) + le(2, x) + gt(x, 3) + ge(x, 2) + eq(x, 2) + ne(x, 2)", 4.0),
        ("lt(1, 2) * 0.5", 0.5),
        ("+lt(1, 2)", 1.0),
        ("abs(v)", 0.5),
        ("abs(x < 3)", 1.0),
        ("min(3, x, 4) + max(v) + min(1,)", 2.5),
        ("pow(x, 3) + clip(x, -1, 1) + clip(-3, -1, 1) + clip(.5, -1, 1)", 8.5),
        ("clip((x>1) + (x>1), 0, 1)", 1.0),
        ("1 if (2 if 0 else 0) else 3", 3.0),
        ("1 if 0 else 2 if 0 else 3", 3.0),
        ("max (x, 1)", 2.0),
        ("1e308*10 > 1", True),
        ("123456789012345678901234567890", 123456789012345678901234567890.0),
        ("9007199254740993", 9007199254740992.0),
    ],
)
def test_values(text: str, expected: float | bool) -> None:
    assert value(text) == pytest.approx(expected, rel=1e-15)
    assert isinstance(value(text), bool) == isinstance(expected, bool)


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "# only a comment", "True", "False", "None", "True and x", "1j", "1.5e3J", "x.y",
        "x.real", "1..real", "x[0]", "f(x)", "y", "X", "max", "max + 1", "x(1)", "max(1)(2)", "lambda: x",
        "lambda x: x", "(y := x)", "y = x", "x; v", "x, v", "(x, v)", "()", "(x,)", "[x]", "{x}", "'x'",
        '"x"', "f'{x}'", "...", "9" * 5000, "9" * 400, "1e999", "0x" + "f" * 300, "x % 2", "x // 2",
        "x @ v", "x & 1", "x | 1", "x ^ 1", "~x", "x << 1", "x >> 1", "x <> 1", "x = 1", "x === 1", "!x",
        "x ! = 1", "x in v", "x is v", "x not in v", "x && v", "x || v", "x ? 1 : 2", "if x", "x if v",
        "x else v", "x if v else", "1 + not x", "x == not v", "- not x", "x +", "* x", "x v", "x 1", "1 x",
        "1x", "1_", "1__0", "_1", "0123", "0_1", "0xg", "0x", "0o8", "0b2", "0or 1", "1e", "1e+", "1._5",
        ".", "1.2.3", "(x", "x)", "(", ")", "((x)", "abs()", "abs(x, v)", "min()", "max()", "pow(x)",
        "pow(1, 2, 3)", "clip(x, 1)", "clip(1, 2, 3, 4)", "ifelse(x, 1)", "ifelse(1, 2, 3, 4)", "lt(x)",
        "min(,)", "min(x,,v)", "min(,x)", "min(x v)", "max(*x)", "max(x=1)", "max(**x)",
        "max(x for x in v)", "sqrt(x)", "sin(x)", "exp(x)", "round(x)", "int(x)", "__import__('os')",
        "eval(x)", "x.__class__", "await x", "yield x", "x\nv", "x +\nv", "x\n+ v", "\\x", "x \\",
        "x \\ \n + v", "x\x00", "x\x0c+1", "\xb2", "x\xb2", "\u0445", "\uff58", "\uff11", "x + \u00a0 1",
        "\u22121", "x\u22641", "\xd7", "\ud800", "# comment\n  x", "x\n)", "3 4", "--", "**", "2 ** ** 3",
        "not", "and x", "x and", "or", "1 if 2 if 0 else 0 else 3",
    ],
)  # fmt: skip
def test_not_in_the_language(text: str) -> None:
    with pytest.raises(ExpressionSyntaxError):
        parse_expression(text)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("1/(t-t)", "division by zero"),
        ("x/v_target", "division by zero"),
        ("1/(1>2)", "division by zero"),
        ("9**9**9**9", "too large"),
        ("pow(9, pow(9, 9))", "too large"),
        ("0**-1", "negative power"),
        ("(-1)**0.5", "fractional power"),
        ("abs((-1)**0.5)", "fractional power"),
        ("x<1", "truth value"),
        ("lt(x, 1)", "truth value"),
        ("not x", "truth value"),
        ("x > 1 and x < 1", "truth value"),
        ("ifelse(x > 0, x > 1, 0)", "truth value"),
        ("1e308*10", "finite"),
        ("1e308*10 - 1e308*10", "finite"),
        ("min(x, 1e308*10 - 1e308*10)", "finite"),
        ("clip(x, 1, -1)", "lower bound above"),
    ],
)
def test_action_errors(text: str, reason: str) -> None:
    with pytest.raises(EvaluationError, match=reason):
        control(text)


NAN = "(1e308*10 - 1e308*10)"


@pytest.mark.parametrize(
    ("text", "parity", "default"),
    [
        (f"clip({NAN}, -1, 1)", -1.0, "finite"),
        ("clip(x, 1, -1)", 1.0, "lower bound above"),
        (f"min(0.5, {NAN})", 0.5, "finite"),
        (f"max(0.5, {NAN})", 0.5, "finite"),
        (f"min({NAN}, 0.5)", "finite", "finite"),
        ("min(0.5, x < 1)", "truth value", 0.0),
        ("max(0.5, x > 1)", "truth value", 1.0),
        ("max(0.5, x < 1)", 0.5, 0.5),
        ("clip(x > 1, 0, 2)", "truth value", 1.0),
        ("clip(x < 1, 0.5, 2)", 0.5, 0.5),
        ("+min(0.5, x < 1)", 0.0, 0.0),
        ("x < 1", "truth value", "truth value"),
    ],
)
def test_parity_keeps_the_traps(text: str, parity: float | str, default: float | str) -> None:
    for is_parity, expected in ((True, parity), (False, default)):
        if isinstance(expected, str):
            with pytest.raises(EvaluationError, match=expected):
                control(text, is_parity)
        else:
            assert control(text, is_parity) == expected


def test_without_traps_parity_changes_nothing() -> None:
    text = "min(x, v, 3) + max(x, v) * clip(x, -1, 1)"
    assert control(text) == control(text, True) == 1.5


def test_every_variable_is_known() -> None:
    assert sorted(VARIABLES) == sorted(SCOPE)
    for name in VARIABLES:
        assert value(name) == SCOPE[name]


def test_length_is_limited_exactly() -> None:
    text = "x" + " " * (MAX_CHARS - 4) + "+ v"
    assert len(text) == MAX_CHARS and control(text) == 1.5
    assert control("  \n" + text + " " * 10_000) == 1.5  # surrounding white space does not count
    with pytest.raises(ExpressionSyntaxError, match=f"longer than {MAX_CHARS}"):
        parse_expression(text.replace("+", " +"))


def deep(kind: str, depth: int) -> str:
    """An expression nested ``depth`` levels deep."""
    inner = depth - 1
    return {
        "brackets": "(" * inner + "x" + ")" * inner,
        "minus": "-" * inner + "x",
        "not": "not " * inner + "x",
        "power": "1**" * inner + "x",
        "call": "abs(" * inner + "x" + ")" * inner,
        "ternary": "1 if x else " * inner + "x",
        "ifelse": "ifelse(x,1," * inner + "x" + ")" * inner,
        "horner": "1+x*(" * (inner // 3) + "x" + ")" * (inner // 3),
    }[kind]


@pytest.mark.parametrize("kind", ["brackets", "minus", "not", "power", "call", "ternary", "ifelse"])
def test_depth_is_limited_exactly(kind: str) -> None:
    assert math.isfinite(value(deep(kind, MAX_DEPTH)))
    with pytest.raises(ExpressionSyntaxError, match="deep"):
        parse_expression(deep(kind, MAX_DEPTH + 1))


def test_horner_form_nests_less_than_the_limit() -> None:
    assert value(deep("horner", MAX_DEPTH), x=0.5) == pytest.approx(2.0, abs=1e-5)


def test_number_of_parts_is_limited_exactly() -> None:
    terms = MAX_NODES // 2
    assert value("+".join(["1"] * terms)) == terms  # 2 n - 1 parts, one level deep
    with pytest.raises(ExpressionSyntaxError, match="parts"):
        parse_expression("+".join(["1"] * (terms + 1)))


@pytest.mark.parametrize("text", ["-" * 1_000_000, "(" * 1_000_000, "9" * 1_000_000, "\x00" * 1_000_000])
def test_a_million_characters_are_refused(text: str) -> None:
    with pytest.raises(ExpressionSyntaxError, match="longer"):
        parse_expression(text)


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("x", "x"),
        ("  x +  v\t", "x + v"),
        ("x+v", "x+v"),
        ("(x # note: a = 0.9\n + v) # secret", "(x + v)"),
        ("# first\nx", "x"),
        ("x \\\n+ v", "x + v"),
        ("x\r\n", "x"),
    ],
)
def test_shown_text_has_no_comments(text: str, shown: str) -> None:
    expression = parse_expression(text)
    assert expression.text == shown
    assert parse_expression(expression.text) == expression


def test_messages_name_place_and_problem() -> None:
    for text, words in [
        ("x + foo", r"no variable 'foo' \(character 5\)"),
        ("foo(x)", r"no function 'foo' \(character 1\)"),
        ("x // 2", r"'//' is not allowed \(character 3\)"),
        ("(x", r"unexpected end; expected '\)' \(character 3\)"),
        ("min()", "takes at least 1 arguments, not 0"),
        ("clip(x)", "takes 3 arguments, not 1"),
        ("y" * 1000, r"'y{30}'"),
    ]:
        with pytest.raises(ExpressionSyntaxError, match=words):
            parse_expression(text)
