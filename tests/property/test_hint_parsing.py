"""The one parsing rule against a brute-force restatement, on texts made of delimiters and their fragments."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cod_async.lifecycle.hint import HintPrompts, prompts_for
from cod_async.lifecycle.parsing import extract_between


def places(text: str, key: str) -> list[int]:
    return [i for i in range(len(text)) if text[i : i + len(key)] == key]


def pieces(prompts: HintPrompts) -> st.SearchStrategy[str]:
    parts = [prompts.start, prompts.end, prompts.start[:3], prompts.end[1:], " ", "\n", "3=Left", "- é", ""]
    return st.lists(st.sampled_from(parts) | st.text(max_size=4), max_size=8).map("".join)


@pytest.mark.parametrize("style", ["full", "terse"])
@given(data=st.data())
def test_parse_is_exactly_the_rule(style: str, data: st.DataObject) -> None:
    prompts = prompts_for("full" if style == "full" else "terse")
    text = data.draw(pieces(prompts))
    starts, ends = places(text, prompts.start), places(text, prompts.end)
    expected = None
    if len(starts) == 1 and len(ends) == 1 and starts[0] + len(prompts.start) <= ends[0]:
        expected = text[starts[0] + len(prompts.start) : ends[0]]
    assert extract_between(text, prompts.start, prompts.end) == expected
    parsed = prompts.parse(text)
    assert (parsed is not None) == (expected is not None and expected.strip() != "")
    if parsed is not None and expected is not None:
        assert parsed.startswith(prompts.label + " ")
        assert parsed.removeprefix(prompts.label).split() == expected.split()


@pytest.mark.parametrize("style", ["full", "terse"])
@given(
    body=st.text(alphabet=st.characters(blacklist_characters="[]=", blacklist_categories=["Cs"]), min_size=1)
)
def test_a_block_written_as_asked_is_carried(style: str, body: str) -> None:
    prompts = prompts_for("full" if style == "full" else "terse")
    parsed = prompts.parse(f"reasoning\n{prompts.start}\n{body}\n{prompts.end}\n")
    if not body.strip():
        assert parsed is None
    elif style == "full":
        assert parsed == prompts.carried(body.strip())
    else:
        assert parsed == prompts.carried(" ".join(body.split()))


@given(before=st.text(max_size=5), inner=st.text(max_size=5), after=st.text(max_size=5))
def test_equal_delimiters_never_parse(before: str, inner: str, after: str) -> None:
    assert extract_between(f"{before}##{inner}##{after}", "##", "##") is None
