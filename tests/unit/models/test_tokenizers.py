"""Small tokenizers: what transformers reads is what our renderers read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cod_async.errors import InputError
from cod_async.lifecycle.rendering import TextTokenizer
from cod_async.models.tokenizers import (
    CHATML_SPECIAL_TOKENS,
    TERSE_SPECIAL_TOKENS,
    write_chatml_tokenizer,
    write_word_tokenizer,
)

WORDS = ["Hints", ":", "3=Left", "Up", "["]
SAME_DIR = settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)


def test_word_tokenizer_ids_follow_the_given_order(tmp_path: Path) -> None:
    assert write_word_tokenizer(tmp_path, [*WORDS, "Up"], 64) == 11
    tokenizer = TextTokenizer(tmp_path)
    assert tokenizer.vocab_size == 11
    assert [tokenizer.token_id(token) for token in (*TERSE_SPECIAL_TOKENS, *WORDS)] == list(range(11))
    assert tokenizer.encode(" Up\n: 3=Left unknown ") == [9, 7, 8, 1]
    assert tokenizer.decode([2, 9, 7, 8, 3]) == "<bos> Up : 3=Left <eot>"
    assert tokenizer.special_ids == frozenset(range(6))
    assert tokenizer.find_id("nothing") is None
    with pytest.raises(InputError, match="nothing"):
        tokenizer.token_id("nothing")


@pytest.mark.parametrize("word", ["", "two words", " x", "<eot>"])
def test_impossible_words_are_refused(word: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be words"):
        write_word_tokenizer(tmp_path, ["fine", word], 64)
    assert list(tmp_path.iterdir()) == []


def test_chatml_tokenizer_has_its_tokens_and_at_most_the_size_asked_for(tmp_path: Path) -> None:
    size = write_chatml_tokenizer(tmp_path, ["the cat and the hat and the bat"] * 50, 300, 128)
    tokenizer = TextTokenizer(tmp_path)
    assert 261 < size <= 300 and tokenizer.vocab_size == size
    assert [tokenizer.token_id(token) for token in CHATML_SPECIAL_TOKENS] == [0, 1, 2]
    think = {tokenizer.token_id("<think>"), tokenizer.token_id("</think>")}
    assert tokenizer.special_ids == frozenset(range(3)) | think
    assert tokenizer.token_id("</think>") == size - 1
    assert len(tokenizer.encode("the cat")) < 7
    assert write_chatml_tokenizer(tmp_path, [], 300, 128) == 261
    with pytest.raises(InputError, match="at least 300"):
        write_chatml_tokenizer(tmp_path, [], 299, 128)


@SAME_DIR
@given(text=st.text())
def test_byte_level_texts_survive(text: str, tmp_path: Path) -> None:
    if not (tmp_path / "tokenizer.json").exists():
        write_chatml_tokenizer(tmp_path, ["some words to merge"], 320, 128)
    tokenizer = TextTokenizer(tmp_path)
    for piece in (text, f"<|im_end|>{text}<|im_start|>"):
        ids = tokenizer.encode(piece)
        assert tokenizer.special_ids.isdisjoint(ids)
        assert tokenizer.decode(ids) == piece


@SAME_DIR
@given(text=st.text() | st.lists(st.sampled_from([*WORDS, *TERSE_SPECIAL_TOKENS])).map(" ".join))
def test_word_level_texts_never_hold_a_control_token(text: str, tmp_path: Path) -> None:
    if not (tmp_path / "tokenizer.json").exists():
        write_word_tokenizer(tmp_path, WORDS, 64)
    tokenizer = TextTokenizer(tmp_path)
    ids = tokenizer.encode(text)
    assert all(i == 1 or i >= 6 for i in ids)
    # Python takes four more control characters for white space than Unicode does.
    assert len(ids) <= len(text.translate(dict.fromkeys(range(0x1C, 0x20), "x")).split())


@pytest.mark.parametrize("family", ["terse", "chatml"])
def test_transformers_reads_the_same(family: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    if family == "terse":
        write_word_tokenizer(tmp_path, WORDS, 64)
        text, end = "Hints : 3=Left nope", "<eot>"
    else:
        write_chatml_tokenizer(tmp_path, ["some words to merge"], 320, 128)
        text, end = "some words\n\nmore, ünïcode", "<|im_end|>"
    theirs, ours = AutoTokenizer.from_pretrained(str(tmp_path)), TextTokenizer(tmp_path)
    assert theirs(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
    assert theirs.eos_token == end and theirs.eos_token_id == ours.token_id(end)
    assert len(theirs) == ours.vocab_size
    assert theirs.model_max_length == (64 if family == "terse" else 128)
    # a model directory names its model type; the tokenizer must not change because of it
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "qwen3"}))
    again = AutoTokenizer.from_pretrained(str(tmp_path))
    assert again(text, add_special_tokens=False)["input_ids"] == ours.encode(text)
