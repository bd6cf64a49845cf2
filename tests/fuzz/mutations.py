"""What may happen to a response between a policy that means well and a parser: mutations by name.

A mutation takes a generator and a text and returns another text. Some know the structure of answers (tags,
numbers, XML), some bring what has broken parsers elsewhere: entity bombs, numbers that no float holds,
nesting, invisible and look-alike characters, texts of a megabyte. The result depends on the generator alone.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable

MAX_CHARS = 1_500_000
"""Longest text that a mutation makes; what a policy can write in a run is shorter by far."""

Mutation = Callable[[random.Random, str], str]

_TAG = re.compile(r"<[^<>]{0,200}>")
_NUMBER = re.compile(r"[0-9]+(?:\.[0-9]+)?")
_WORD = re.compile(r"\S+")

TAGS = (
    "<answer>", "</answer>", "<answer/>", "<ANSWER>", "< answer>", "</ answer>", "<answer\n>",
    "<answer a='1'>", "<controller>", "</controller>", "<point_grid>", "</point_grid>", "<point/>", "<a>",
    "</a>", "<a/>", "<", ">", "</", "/>", "<>", "</>", "<stop />", "<item>", "</item>", "<advice>",
    "=== HINTS BEGIN ===", "=== HINTS END ===", "[", "]", "```", "```xml", "<think>", "</think>",
    "<|im_end|>", "&&", ";", "|",
)  # fmt: skip
_BOMB = "".join(f'<!ENTITY l{i} "{f"&l{i - 1};" * 10}">' for i in range(1, 10))
_BOMB = f'<!DOCTYPE a [<!ENTITY l0 "lol">{_BOMB}]>'
DOCTYPES = (
    '<!DOCTYPE a [<!ENTITY b "x">]>', '<!DOCTYPE a [<!ENTITY b SYSTEM "file:///etc/passwd">]>',
    '<!DOCTYPE a SYSTEM "http://127.0.0.1:9/a.dtd">', _BOMB,
    '<!DOCTYPE a [<!ENTITY b "' + "x" * 5_000 + '">]>', "<!doctype html>", "<!", "<!DOCTYPE",
)  # fmt: skip
ATTRIBUTES = (
    " a='1' a='2'",
    ' x="0.5" t="nan"',
    " xmlns='u'",
    " xmlns:a='u' a:b='1'",
    " a=1",
    " a",
    " a='<'",
)
ENTITIES = (
    "&b;", "&l9;", "&amp;", "&amp;amp;", "&lt;", "&#65;", "&#x41;", "&#0;", "&#xD800;", "&#x110000;", "&",
    "&;", "&#99999999999999;", "&b;" * 200, "&lt;!DOCTYPE&gt;",
)  # fmt: skip
INSTRUCTIONS = (
    "<?xml version='1.0'?>", "<?xml version='1.0' encoding='utf-16'?>", "<?xml-stylesheet href='x'?>",
    "<?php ?>", "<?", "?>", "<!--", "-->", "<!-- <answer> -->", "<![CDATA[", "]]>", "<![CDATA[<answer>]]>",
)  # fmt: skip
NUMBERS = (
    "9" * 20, "9" * 400, "9" * 5_000, "-" + "9" * 5_000, "1e308", "1e309", "-1e400", "1e-400", "5e-324",
    "1e99999", "0." + "0" * 400 + "1", "1" + "0" * 100_000, "nan", "NaN", "inf", "-Infinity", "0x10", "0b1",
    "0o7", "1_000", "1,5", "--1", "+-1", "1.", ".5", ".", "1e", "1.2.3", "1j", "00", "-0", "2147483648",
    "18446744073709551616", "1e5e5", "True", "None", "9**9**9**9", "1/0", "0/0",
)  # fmt: skip
INVISIBLE = (
    "\x00", "\x01", "\x07", "\x08", "\x0b", "\x0c", "\x1b[2J", "\x7f", "\x85", "\xa0", "\xad", "\u200b",
    "\u200d", "\u2028", "\u2029", "\u202a", "\u202e", "\u2066", "\u2069", "\u200f", "\ufeff", "\ufffe",
    "\uffff", "\ud800", "\udfff", "\udc80", "\U0010ffff", "\U000e0041", "\u0301" * 50, "\r", "\r\n", "\t",
    "\u3000",
)  # fmt: skip
DIGIT_ZEROS = (0x0660, 0x06F0, 0x0966, 0x0E50, 0xFF10, 0x1D7CE, 0x1D7F6, 0x2080)
"""Digit zero of other scripts: Arabic-Indic to mathematical; the last ones are subscripts."""
_CYRILLIC_CODES = (
    0x430, 0x441, 0x435, 0x456, 0x43E, 0x440, 0x455, 0x445, 0x443, 0x410, 0x412, 0x415, 0x41D, 0x41A, 0x41C,
    0x41E, 0x420, 0x422, 0x425,
)  # fmt: skip
_CYRILLIC = dict(zip("aceiopsxyABEHKMOPTX", map(chr, _CYRILLIC_CODES), strict=True))
_FULL_WIDTH = {char: chr(ord(char) + 0xFEE0) for char in "+-*/(),<>=&"}
LOOK_ALIKES = _CYRILLIC | _FULL_WIDTH
"""Characters of other blocks that look like those of answers."""
PATTERNS = (
    "a", " ", "\t", "\n", "1", "0", "_", "-", "+-", "not ", "(", ")", "()", "[", "<", "<a", "<a>", "</",
    "\\", "'", '"', "$HOME", "%CD%", "&&", ";", ".", "..", "../", "a.", "?!", "1e", "0_", "*", "**", "?",
    "u+", "ab ", "[\"", "{", "\u4e00", "\u00df", "\u0130", "<answer>", "</answer>",
)  # fmt: skip
"""What is repeated a thousand or a hundred thousand times."""
TEMPLATES = (
    "{0.__class__.__mro__}", "%s%s%n", "${jndi:ldap://127.0.0.1/a}", "{dialogue}", "{stop_tag}", "{{", "}}",
    "{", "{0}", "__import__('os').system('true')", "lambda: x", "x.__class__", "().__class__.__bases__",
    "[x for x in ()]", "x[0]", "'; DROP TABLE segments; --", "$(reboot)", "`reboot`", "\\u0041", "\\x41",
    "<script>", "../../etc/passwd", "NUL",
)  # fmt: skip


def _capped(text: str) -> str:
    return text if len(text) <= MAX_CHARS else text[:MAX_CHARS]


def _place(rng: random.Random, text: str) -> int:
    return rng.randint(0, len(text))


def _insert(rng: random.Random, text: str, piece: str) -> str:
    """Put a piece anywhere, but half of the time behind a tag, where content begins."""
    spots = [match.end() for match in _TAG.finditer(text)] if rng.random() < 0.5 else []
    place = rng.choice(spots) if spots else _place(rng, text)
    return text[:place] + piece + text[place:]


def _times(rng: random.Random) -> int:
    """Draw how often something is repeated: mostly a few times, rarely a hundred thousand times."""
    return rng.choice((2, 2, 3, 5, 10, 40, 70, 300)) if rng.random() < 0.985 else rng.choice((5_000, 100_000))


def _repeated(text: str, times: int) -> str:
    """Return ``text * times``, but not much more than :data:`MAX_CHARS`."""
    return text * min(times, MAX_CHARS // max(len(text), 1) + 1)


def _edit_tag(rng: random.Random, text: str, edit: Callable[[str], str]) -> str:
    tags = list(_TAG.finditer(text))
    if not tags:
        return _insert(rng, text, rng.choice(TAGS))
    match = rng.choice(tags)
    return text[: match.start()] + edit(match.group()) + text[match.end() :]


def delete_tag(rng: random.Random, text: str) -> str:
    return _edit_tag(rng, text, lambda tag: "")


def duplicate_tag(rng: random.Random, text: str) -> str:
    times = _times(rng)
    return _capped(_edit_tag(rng, text, lambda tag: _repeated(tag, times)))


def swap_tags(rng: random.Random, text: str) -> str:
    tags = list(_TAG.finditer(text))
    if len(tags) < 2:
        return _insert(rng, text, rng.choice(TAGS))
    first, second = sorted(rng.sample(tags, 2), key=lambda match: match.start())
    middle = text[first.end() : second.start()]
    return text[: first.start()] + second.group() + middle + first.group() + text[second.end() :]


def foreign_tag(rng: random.Random, text: str) -> str:
    return _insert(rng, text, rng.choice(TAGS))


def rename_tag(rng: random.Random, text: str) -> str:
    name = rng.choice(
        ("a", "ANSWER", "x" * 300, "_", "a:b", "1", "update_scientific_context", "sample_pde_data", "é")
    )
    return _edit_tag(rng, text, lambda tag: re.sub(r"[A-Za-z_]+", name, tag, count=1))


def attributes(rng: random.Random, text: str) -> str:
    many = "".join(f" a{i}='{i}'" for i in range(rng.choice((1, 2, 50, 3_000))))
    chosen = rng.choice(
        (" a='1' a='2'", ' x="0.5" t="nan"', " xmlns='u'", " xmlns:a='u' a:b='1'", " a=1", " a", many)
    )
    return _edit_tag(rng, text, lambda tag: tag[:-1] + chosen + tag[-1:])


def nest(rng: random.Random, text: str) -> str:
    name, times = rng.choice(("a", "answer", "point_grid", "item")), _times(rng)
    start = text.find("<answer>") + len("<answer>") if "<answer>" in text else 0
    end = text.rfind("</answer>") if "</answer>" in text else len(text)
    inner = text[start : max(start, end)]
    closed = f"</{name}>" * (times if rng.random() < 0.8 else times - 1)
    return _capped(f"{text[:start]}{f'<{name}>' * times}{inner}{closed}{text[max(start, end) :]}")


def truncate(rng: random.Random, text: str) -> str:
    return text[: _place(rng, text)]


def behead(rng: random.Random, text: str) -> str:
    return text[_place(rng, text) :]


def repeat(rng: random.Random, text: str) -> str:
    return _capped(_repeated(text, _times(rng)))


def repeat_inside(rng: random.Random, text: str) -> str:
    """Repeat a part of the text, such as one operand, one point or one command."""
    first, second = sorted((_place(rng, text), _place(rng, text)))
    return _capped(text[:first] + _repeated(text[first:second], _times(rng)) + text[second:])


def entity_bomb(rng: random.Random, text: str) -> str:
    doctype = rng.choice(DOCTYPES)
    text = _insert(rng, text, rng.choice(ENTITIES))
    return doctype + text if rng.random() < 0.3 else _insert(rng, text, doctype)


def entity(rng: random.Random, text: str) -> str:
    return _insert(rng, text, rng.choice(ENTITIES))


def cdata(rng: random.Random, text: str) -> str:
    first, second = sorted((_place(rng, text), _place(rng, text)))
    return f"{text[:first]}<![CDATA[{text[first:second]}]]>{text[second:]}"


def instruction(rng: random.Random, text: str) -> str:
    return _insert(rng, text, rng.choice(INSTRUCTIONS))


def other_digits(rng: random.Random, text: str) -> str:
    zero, share = rng.choice(DIGIT_ZEROS), rng.choice((0.3, 1.0))
    return "".join(
        chr(zero + ord(char) - ord("0")) if "0" <= char <= "9" and rng.random() < share else char
        for char in text[:5_000]
    )


def look_alikes(rng: random.Random, text: str) -> str:
    share = rng.choice((0.05, 0.3, 1.0))
    return "".join(LOOK_ALIKES.get(char, char) if rng.random() < share else char for char in text[:5_000])


def invisible(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice((1, 1, 2, 10))):
        text = _insert(rng, text, rng.choice(INVISIBLE))
    return text


def other_number(rng: random.Random, text: str) -> str:
    numbers = list(_NUMBER.finditer(text[:20_000]))
    if not numbers:
        return _insert(rng, text, rng.choice(NUMBERS))
    match = rng.choice(numbers)
    return text[: match.start()] + rng.choice(NUMBERS) + text[match.end() :]


def deep(rng: random.Random, text: str) -> str:
    """Wrap the content in brackets, or put a chain of signs before it."""
    start = max(text.find(">") + 1, 0)
    end = text.rfind("</")
    end = end if end >= start else len(text)
    times, opening, closing = (
        _times(rng),
        *rng.choice((("(", ")"), ("-", ""), ("not ", ""), ("(-", ")"), ("[", "]"))),
    )
    inner = text[start:end]
    return _capped(text[:start] + opening * times + inner + closing * times + text[end:])


def pattern(rng: random.Random, text: str) -> str:
    """Insert what makes a backtracking pattern catastrophic, and an end that does not match."""
    times = rng.choice((30, 200, 2_000)) if rng.random() < 0.97 else 200_000
    piece = rng.choice(PATTERNS) * times
    return _insert(rng, text, piece[:MAX_CHARS] + rng.choice(("", "!", "x", "<", "\x00")))


def template(rng: random.Random, text: str) -> str:
    return _insert(rng, text, rng.choice(TEMPLATES))


def edit_char(rng: random.Random, text: str) -> str:
    for _ in range(rng.choice((1, 1, 2, 5))):
        place = _place(rng, text)
        char = chr(rng.choice((rng.randrange(32, 127), rng.randrange(32, 127), rng.randrange(0x3000))))
        text = text[:place] + rng.choice(("", char)) + text[place + rng.randint(0, 1) :]
    return text


def shuffle_words(rng: random.Random, text: str) -> str:
    words = _WORD.findall(text[:5_000])
    rng.shuffle(words)
    return " ".join(words)


def case(rng: random.Random, text: str) -> str:
    return rng.choice((str.upper, str.lower, str.title, str.swapcase))(text)


def spaces(rng: random.Random, text: str) -> str:
    blank = rng.choice((" ", "\t", "\n", "\r", "\xa0", "\u3000", "\u2028", "\x0b")) * rng.choice(
        (1, 3, 1_000)
    )
    return rng.choice(
        (lambda: blank + text + blank, lambda: _insert(rng, text, blank), lambda: text.replace(" ", ""))
    )()


def reasoning(rng: random.Random, text: str) -> str:
    said = rng.choice(
        ("I answer with <answer>.", "So:", "<think>hm</think>", "```xml\n", "Answer: ", "x" * 3_000)
    )
    return rng.choice((said + text, text + said, said + text + "\n```"))


def nothing_else(rng: random.Random, text: str) -> str:
    """Return a text that has nothing to do with the answer."""
    return rng.choice(
        (
            lambda: "",
            lambda: " \n",
            lambda: rng.choice(TAGS) + rng.choice(TAGS),
            lambda: "".join(chr(rng.randrange(0x110000)) for _ in range(rng.choice((5, 100)))),
            lambda: "".join(rng.choice(TAGS) for _ in range(rng.choice((5, 100, 3_000)))),
            lambda: f"<answer>{rng.choice(NUMBERS + TEMPLATES + INVISIBLE)}</answer>",
            lambda: f"<answer>{rng.choice(PATTERNS) * rng.choice((1, 50, 5_000))}</answer>",
        )
    )()


_FUNCTIONS = (
    delete_tag, duplicate_tag, swap_tags, foreign_tag, rename_tag, attributes, nest, truncate, behead,
    repeat, repeat_inside, entity_bomb, entity, cdata, instruction, other_digits, look_alikes, invisible,
    other_number, deep, pattern, template, edit_char, shuffle_words, case, spaces, reasoning, nothing_else,
)  # fmt: skip
MUTATIONS: dict[str, Mutation] = {function.__name__: function for function in _FUNCTIONS}
"""All mutations by name."""
_ALL = tuple(MUTATIONS)


def mutate(rng: random.Random, text: str) -> tuple[str, list[str]]:
    """Apply one to three mutations.

    Returns:
        The text, at most :data:`MAX_CHARS` characters, and the names of what was done to it.
    """
    names = [rng.choice(_ALL) for _ in range(rng.choice((1, 1, 1, 2, 3)))]
    for name in names:
        text = _capped(MUTATIONS[name](rng, text))
    return text, names
