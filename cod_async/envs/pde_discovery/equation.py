"""Equations as text: ``f(u) = 0.61*u - 1.35*u**4``. Written with three significant digits, read strictly.

An equation is a sum of ``coefficient*term`` with the terms spelled exactly as in the dictionary (white space
and case are free). What is read is what the text says in mathematics or nothing at all. The one courtesy is a
single join ``+ -`` instead of ``-``. Candidates for a regression may leave the coefficients out or write
symbols for them; then only the set of terms is read. Texts come from a model: reading takes time linear in
their length, which has a ceiling.
"""

from __future__ import annotations

import math
import re

from cod_async.envs.pde_discovery.basis import INDEX, TERMS, Equation

MAX_EQUATION_CHARS = 2_000
"""Longest equation that is read; the longest one written here has about 400 characters."""
MIN_COEFFICIENT = 1e-12
"""Smaller coefficients are read as 0."""

_NUMBER = r"(?:[0-9]+(?:\.[0-9]*)?|\.[0-9]+)(?:e[+-]?[0-9]+)?"
_LONGEST_FIRST = sorted(TERMS, key=len, reverse=True)
_IN_PARENTHESES = [term for term in _LONGEST_FIRST if "+" in term or "-" in term]
_TERM = "|".join([re.escape(f"({t})") for t in _IN_PARENTHESES] + [re.escape(t) for t in _LONGEST_FIRST])
_SUMMAND = re.compile(rf"([+-]?)([+-]?)({_NUMBER})\*({_TERM})(?=[+-]|$)", re.ASCII)
# A term name with nothing around it that would make it a part of another expression.
_NAME = re.compile(
    "|".join(rf"(?<![a-z_]){re.escape(t)}(?!\*\*|[a-z0-9_(/^.])" for t in _LONGEST_FIRST), re.ASCII
)
_SYMBOL = re.compile(
    r"(?<![a-z0-9_])(?:c_?[0-9]*|a|b|alpha|beta|gamma|coef[a-z0-9_]*)(?![a-z0-9_(])", re.ASCII | re.IGNORECASE
)


def render(equation: Equation) -> str:
    """Write an equation in dictionary order with three significant digits; the empty one is ``f(u) = 0``."""
    text = ""
    for term in sorted(equation, key=INDEX.__getitem__):
        number = f"{abs(equation[term]):.3g}"
        shown = f"({term})" if term == "exp(u)-1" else term
        sign = "-" if equation[term] < 0 else "+"
        text += f" {sign} {number}*{shown}"
    if not text:
        return "f(u) = 0"
    return "f(u) = " + (text[3:] if text.startswith(" + ") else "-" + text[3:])


def as_written(equation: Equation) -> Equation:
    """Return the equation that :func:`render` and then :func:`parse` give: three significant digits."""
    written = ((term, float(f"{coefficient:.3g}")) for term, coefficient in equation.items())
    return {term: value for term, value in written if abs(value) > MIN_COEFFICIENT}


def parse(text: str) -> Equation | None:
    """Read an equation with explicit numbers, or return None.

    Repeated terms are summed. ``exp(u)-1`` may stand without parentheses: ``0.7*exp(u)-1`` is
    0.7 (e^u - 1).

    Returns:
        Term -> coefficient in dictionary order, at least one; None if anything in the text cannot be read, a
        number is too large, or nothing is left.
    """
    body = _right_side(text)
    if not body:
        return None
    totals: Equation = {}
    place, num_joins = 0, 0
    while place < len(body):
        match = _SUMMAND.match(body, place)
        if match is None:
            return None
        join, sign, number, term = match.groups()
        if place > 0 and not join:
            return None
        if sign:
            num_joins += 1
            if join != "+" or place == 0 or num_joins > 1:
                return None
        is_negative = (sign or join) == "-"
        name = term if term in INDEX else term[1:-1]
        totals[name] = totals.get(name, 0.0) + (-float(number) if is_negative else float(number))
        place = match.end()
    if not all(math.isfinite(value) for value in totals.values()):
        return None
    kept = {term: totals[term] for term in TERMS if abs(totals.get(term, 0.0)) > MIN_COEFFICIENT}
    return kept or None


def read_support(text: str) -> tuple[str, ...] | None:
    """Read which terms an equation has, with or without coefficients: ``u - c1*u**3``, ``0.5*u + sin(u)``.

    Returns:
        Its terms in dictionary order, at least one; None if a summand is not exactly one term of the
        dictionary times at most numbers and symbols.
    """
    equation = parse(text)
    if equation is not None:
        return tuple(equation)
    body = _right_side(text)
    if not body:
        return None
    found = {match.group() for match in _NAME.finditer(body)}
    rest = re.sub(_NUMBER, "", _NAME.sub("#", body), flags=re.ASCII)
    for summand in re.split(r"[+-]", re.sub(r"[()]", "", rest)):
        factors = [factor for factor in summand.split("*") if factor]
        others = [factor for factor in factors if factor != "#"]
        if len(factors) - len(others) > 1 or (others and len(factors) == len(others)):
            return None
        if any(not _SYMBOL.fullmatch(factor) for factor in others):
            return None
    return tuple(term for term in TERMS if term in found) or None


def has_symbols(text: str) -> bool:
    """Return whether a text uses symbols for coefficients (c1, a, b, alpha, beta, gamma, coef...)."""
    return _SYMBOL.search(text[:MAX_EQUATION_CHARS]) is not None


def is_equal(first: Equation, second: Equation, rel_tol: float = 1e-9) -> bool:
    """Return whether two equations have the same terms and coefficients within a relative tolerance."""
    return set(first) == set(second) and all(
        math.isclose(first[term], second[term], rel_tol=rel_tol) for term in first
    )


def _right_side(text: str) -> str | None:
    """Return what follows an optional ``f(u) =``, in lower case without white space, or None."""
    if len(text) > MAX_EQUATION_CHARS:
        return None
    body = "".join(text.split()).lower()
    body = body.removeprefix("f(u)=")
    return None if "=" in body or not body.isascii() else body
