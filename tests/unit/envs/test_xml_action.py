"""The XML action parser: what each form of an element means, and that no text is too nasty for it."""

from __future__ import annotations

from typing import Any
from xml.sax.saxutils import escape, quoteattr

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.xml_action import (
    MAX_ANSWER_CHARS,
    MAX_DEPTH,
    MAX_ELEMENTS,
    ActionParseError,
    AnswerTagError,
    InvalidXmlError,
    parse_action,
)

LISTS = frozenset({"points", "terms"})


def wrapped(content: str) -> str:
    return f"thinking\n<answer>{content}</answer>\nmore"


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<go/>", ("go", {})),
        ("  \n <go>  </go>\t", ("go", {})),
        ("<go> x + 1\n</go>", ("go", "x + 1")),
        ("<go>a &lt; b &amp;&#65;</go>", ("go", "a < b &A")),
        ('<go a="1" b=" 2 ">ignored</go>', ("go", {"a": "1", "b": " 2 "})),
        ("<go><a>1</a><b/></go>", ("go", {"a": "1", "b": ""})),
        ('<go k="v"><a>1</a></go>', ("go", {"k": "v", "a": "1"})),
        ("<go><a>1</a><b>2</b><a>3</a></go>", ("go", {"a": ["1", "3"], "b": "2"})),
        ('<go a="0"><a>1</a><a>2</a></go>', ("go", {"a": ["0", "1", "2"]})),
        ("<points><p>1</p><q>2</q></points>", ("points", ["1", "2"])),
        ('<points n="2"><p x="1" t="2"/></points>', ("points", [{"x": "1", "t": "2"}])),
        ("<points/>", ("points", {})),
        ("<go><points><p>1</p></points></go>", ("go", {"points": ["1"]})),
        (  # two list-valued children stay two lists
            "<go><terms><t>a</t></terms><terms><t>b</t><t>c</t></terms></go>",
            ("go", {"terms": [["a"], ["b", "c"]]}),
        ),
        ("<go>\n  <a>\n    <b>1</b>\n  </a>\n</go>", ("go", {"a": {"b": "1"}})),
    ],
)
def test_values(content: str, expected: tuple[str, Any]) -> None:
    assert parse_action(wrapped(content), LISTS) == expected


@pytest.mark.parametrize(
    "response",
    [
        "",
        "<go/>",
        "<answer><go/>",
        "<go/></answer>",
        "</answer><go/><answer>",
        "<answer><go/></answer><answer><go/></answer>",
        "the <answer> tag: <answer><go/></answer>",
        "<ANSWER><go/></ANSWER>",
    ],
)
def test_answer_tags_must_be_unique(response: str) -> None:
    with pytest.raises(AnswerTagError, match="exactly one"):
        parse_action(response, LISTS)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "   ",
        "text",
        "<go>",
        "</go>",
        "<a></b>",
        "<a/><b/>",
        "text <a/>",
        "<a/> text",
        "<a>x<b/></a>",
        "<a><b/>x</a>",
        "<a>x < 1</a>",
        "<a>x & y</a>",
        "<a>&undefined;</a>",
        "<a>&#0;</a>",
        '<a k="1" k="2"/>',
        "<a k=1/>",
        "<p:a/>",
        "<!-- note --><a/>",
        "<a><!-- note --></a>",
        "<a><![CDATA[x]]></a>",
        '<?xml version="1.0"?><a/>',
        "<a><?do it?></a>",
        '<!DOCTYPE a [<!ENTITY e "x">]><a>&e;</a>',
        "<a>\x00</a>",
        "\x00",
        "<a>\ud800</a>",
        "<\ud800/>",
        "<a>\x01</a>",
        "<a>" * 100_000,
        "<a>" * 6_000,
        "<a>" + "x" * MAX_ANSWER_CHARS + "</a>",
    ],
)
def test_invalid_xml(content: str) -> None:
    with pytest.raises(InvalidXmlError, match="invalid XML"):
        parse_action(wrapped(content), LISTS)


def nested(depth: int) -> str:
    return "<a>" * depth + "</a>" * depth


def test_limits_are_exact() -> None:
    value: Any = parse_action(wrapped(nested(MAX_DEPTH)), LISTS)[1]
    for _ in range(MAX_DEPTH - 1):
        value = value["a"]
    assert value == ""
    with pytest.raises(InvalidXmlError, match="deep"):
        parse_action(wrapped(nested(MAX_DEPTH + 1)), LISTS)
    many = parse_action(wrapped("<points>" + "<p/>" * (MAX_ELEMENTS - 1) + "</points>"), LISTS)[1]
    assert many == [""] * (MAX_ELEMENTS - 1)
    with pytest.raises(InvalidXmlError, match="elements"):
        parse_action(wrapped("<points>" + "<p/>" * MAX_ELEMENTS + "</points>"), LISTS)
    text = "x" * (MAX_ANSWER_CHARS - 7)
    assert parse_action(wrapped(f"<a>{text}</a>"), LISTS) == ("a", text)
    with pytest.raises(InvalidXmlError, match="longer"):
        parse_action(wrapped(f"<a>{text}x</a>"), LISTS)


def test_a_million_characters_are_refused_without_parsing() -> None:
    for text in ("<a>" * 333_333, "x" * 1_000_000, "<answer>" * 125_000, "\ud800" * 1_000_000):
        for response in (text, wrapped(text)):
            with pytest.raises(ActionParseError):
                parse_action(response, LISTS)


@settings(max_examples=200, deadline=None)
@given(st.text(alphabet=st.sampled_from(list("<>/!?&;\"'= ax1#\x00\ud800é")), max_size=80))
def test_no_text_raises_anything_else(content: str) -> None:
    try:
        tag, value = parse_action(wrapped(content), LISTS)
    except ActionParseError:
        return
    assert isinstance(tag, str) and isinstance(value, str | dict | list)


names = st.sampled_from(["a", "b", "c"])
texts = st.text(alphabet="x<>&\"'é 1", max_size=6).map(str.strip)
values = st.recursive(
    texts, lambda inner: st.dictionaries(names, inner, min_size=1, max_size=3), max_leaves=8
)


def rendered(tag: str, value: Any) -> str:
    """An independent writer: strings as text, maps as children."""
    if isinstance(value, str):
        return f"<{tag}>{escape(value)}</{tag}>"
    return f"<{tag}>" + "".join(rendered(key, inner) for key, inner in value.items()) + f"</{tag}>"


@settings(max_examples=100, deadline=None)
@given(names, values)
def test_round_trip(tag: str, value: Any) -> None:
    assert parse_action(wrapped(rendered(tag, value)), LISTS) == (tag, {} if value == "" else value)


@settings(max_examples=50, deadline=None)
@given(st.dictionaries(names, st.text(alphabet="x<>&\"'é 1", max_size=6), min_size=1))
def test_attributes_round_trip(attributes: dict[str, str]) -> None:
    text = " ".join(f"{name}={quoteattr(value)}" for name, value in attributes.items())
    assert parse_action(wrapped(f"<go {text}/>"), LISTS) == ("go", attributes)
