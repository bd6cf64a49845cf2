"""Equations of PDE Discovery as text: what is written is read back, and nothing makes the reader fail."""

from __future__ import annotations

import asyncio
import math

from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.base import TaskSpec
from cod_async.envs.pde_discovery import SPEC
from cod_async.envs.pde_discovery.basis import TERMS, Equation
from cod_async.envs.pde_discovery.env import ACTIONS
from cod_async.envs.pde_discovery.equation import (
    MIN_COEFFICIENT,
    as_written,
    has_symbols,
    parse,
    read_support,
    render,
)
from cod_async.envs.pde_discovery.regression import printed_digits

coefficients = st.floats(-1e6, 1e6, allow_nan=False).filter(lambda value: abs(value) > 1e-9)
equations = st.dictionaries(st.sampled_from(TERMS), coefficients, min_size=1, max_size=6)
fragments = st.sampled_from(
    [
        *TERMS,
        "u",
        "*",
        "**",
        "+",
        "-",
        "(",
        ")",
        "0.5",
        "1e",
        ".",
        "f(u)=",
        " ",
        "c1",
        "=",
        "/",
        "\x00",
        "\ud800",
        "²",
    ]
)


@given(equations)
@settings(max_examples=150, deadline=None)
def test_written_equations_are_read_back(equation: Equation) -> None:
    text = render(equation)
    back = parse(text)
    assert back == as_written(equation)
    assert back is not None and render(back) == text
    assert read_support(text) == tuple(back) == tuple(term for term in TERMS if term in equation)


ties = st.integers(-11_000, 11_000).map(lambda halves: halves / 2_000)
awkward = st.sampled_from((0.9995, -9.995, 9.9995, 9.99, 1e-4, -0.0, math.inf, -math.inf, 1e300))


@given(st.lists(st.one_of(coefficients, st.floats(-12, 12), ties, awkward), max_size=12))
@settings(max_examples=300, deadline=None)
def test_fits_are_printed_as_python_rounds(fit: list[float]) -> None:
    expected = [float(f"{round(value, 3):.3g}") for value in fit]
    assert printed_digits(fit) == expected
    rounded = {TERMS[index]: value for index, value in enumerate(fit)}
    assert as_written({t: round(v, 3) for t, v in rounded.items()}) == {
        t: v for t, v in zip(rounded, expected, strict=True) if abs(v) > MIN_COEFFICIENT
    }


@given(st.one_of(st.text(), st.lists(fragments, max_size=30).map("".join)))
@settings(max_examples=300, deadline=None)
def test_any_text_is_an_equation_or_nothing(text: str) -> None:
    equation = parse(text)
    assert equation is None or (equation and all(math.isfinite(value) for value in equation.values()))
    support = read_support(text)
    assert support is None or (support and set(support) <= set(TERMS))
    assert has_symbols(text) in (True, False)
    if equation is not None:
        assert support == tuple(equation)
        # What was read means what the text says: every term's number stands in it.
        assert parse(render(equation)) == as_written(equation)


arguments = st.sampled_from(
    [
        "<point_grid><point x='0.5' t='0'/></point_grid>",
        "<point_grid><point x='1e400' t='nan'/></point_grid>",
        "<point_grid/>",
        "<dataset_id>merged_t1_t9</dataset_id>",
        "<dataset_id><a/></dataset_id>",
        "<threshold>-0</threshold>",
        "<threshold>1e308</threshold>",
        "<dictionary><t>u</t><t>U ** 2</t></dictionary>",
        "<dictionary>u</dictionary>",
        "<candidate_equations><e>u</e><e x='1'/></candidate_equations>",
        "<candidate_equations><e>u + u**2</e></candidate_equations>",
        "<reveal_equations>yes</reveal_equations>",
        "<preferred_equation>0.5*u</preferred_equation>",
        "<preferred_equation/>",
        "<uncertain_terms><t>u</t></uncertain_terms>",
        "<alpha>3</alpha>",
        "text",
        "&#56320;",
        "<é>ü</é>",
    ]
)
responses = st.one_of(
    st.text(max_size=60),
    st.tuples(st.sampled_from(ACTIONS), st.lists(arguments, max_size=3).map("".join)).map(
        lambda parts: f"<answer><{parts[0]}>{parts[1]}</{parts[0]}></answer>"
    ),
)


@given(st.lists(responses, min_size=1, max_size=6), st.booleans())
@settings(max_examples=80, deadline=None)
def test_any_response_is_answered(texts: list[str], parity: bool) -> None:
    environment = SPEC.make(SPEC.options("train", {"parity": parity}))
    environment.reset(TaskSpec("pde_discovery", "train", {}, {"seed": 1}, 1234, 0, 1))
    for text in texts:
        result = asyncio.run(environment.step(text))
        result.observation.encode()  # what a tokenizer gets is valid text
        environment.feedback().encode()
        assert all(math.isfinite(value) for value in result.metrics.values())
        if result.is_done:
            break
