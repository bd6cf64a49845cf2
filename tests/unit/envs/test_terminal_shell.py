"""Terminal: reading command lines, against shlex where it says something, and by hand where it doesn't."""

from __future__ import annotations

import shlex

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cod_async.envs.terminal.shell import (
    MAX_COMMANDS,
    MAX_EXPANDED_CHARS,
    MAX_WORDS,
    ShellError,
    clean,
    expand_text,
    split_line,
    words_of,
)

VARIABLES = {"HOME": "/home/ops", "USER": "ops", "PWD": "/opt"}
WINDOWS = {"USERPROFILE": "C:\\Users\\user", "CD": "C:\\"}


@given(st.text(alphabet="ab/.-~$ \t\"'\\", max_size=30))
@settings(max_examples=300, deadline=None)
def test_unix_words_are_those_of_shlex(text: str) -> None:
    """With variables off, words are cut as the standard library cuts them."""
    try:
        expected: list[str] | None = shlex.split(text)
    except ValueError:
        expected = None
    # In double quotes shlex drops the backslash before a quote or a backslash only; shells also before $.
    if '"' in text and "\\$" in text:
        return
    try:
        assert words_of(text, "unix", None) == expected
    except ShellError:
        assert expected is None


def test_parity_windows_words_keep_their_quotes() -> None:
    assert words_of('type "C:\\a b.txt" c:\\d', "cmd_parity", None) == ["type", '"C:\\a b.txt"', "c:\\d"]
    with pytest.raises(ShellError):
        words_of('type "C:\\a', "cmd_parity", None)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("cp $HOME/a ${USER}.txt", ["cp", "/home/ops/a", "ops.txt"]),
        ("echo '$HOME' \"$HOME\" \\$HOME", ["echo", "$HOME", "/home/ops", "$HOME"]),
        ("echo $NOPE x$NOPE", ["echo", "", "x"]),
        ("echo $ $1 ${", ["echo", "$", "$1", "${"]),
        ("cd ~", ["cd", "/home/ops"]),
        ("cp ~/a ~b a~ '~' \"~\" ops@h:~/x", ["cp", "/home/ops/a", "~b", "a~", "~", "~", "ops@h:~/x"]),
        ("ls # all of it", ["ls"]),
        ("ls a#b", ["ls", "a#b"]),
        ("''", [""]),
        ("", []),
    ],
)
def test_unix_expansion(text: str, words: list[str]) -> None:
    assert words_of(text, "unix", VARIABLES) == words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('type "C:\\a b\\c.txt"', ["type", "C:\\a b\\c.txt"]),
        ("copy C:\\a\\ b", ["copy", "C:\\a\\", "b"]),
        ("echo %userprofile%\\x %NOPE% %", ["echo", "C:\\Users\\user\\x", "%NOPE%", "%"]),
        ("echo 'a b' ~ $HOME", ["echo", "'a", "b'", "~", "$HOME"]),
        ('echo "open', ["echo", "open"]),
    ],
)
def test_windows_words(text: str, words: list[str]) -> None:
    assert words_of(text, "cmd", WINDOWS) == words


def test_parity_expands_even_in_quotes_but_not_behind_a_colon() -> None:
    assert expand_text("'$HOME' ~/a h:~/b", "unix", VARIABLES) == "'/home/ops' /home/ops/a h:~/b"
    assert expand_text('"%CD%x"', "cmd_parity", WINDOWS) == '"C:\\x"'


@pytest.mark.parametrize(
    ("line", "pieces"),
    [
        ("a && b ; c", [(";", "a"), ("&&", "b"), (";", "c")]),
        ("a;b;", [(";", "a"), (";", "b")]),
        ("a 'x && y; z' \"; &&\"", [(";", "a 'x && y; z' \"; &&\"")]),
        ("a \\; b \\&\\& c", [(";", "a \\; b \\&\\& c")]),
        ("a\nb\n\nc", [(";", "a"), (";", "b"), (";", "c")]),
        ("echo 'a|b>c*' \\* \\|", [(";", "echo 'a|b>c*' \\* \\|")]),
        (";;", []),
        ("", []),
    ],
)
def test_split(line: str, pieces: list[tuple[str, str]]) -> None:
    assert split_line(line, "unix", False) == pieces


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("ls | wc", "pipes"),
        ("a || b", "pipes"),
        ("ls > x", "redirects"),
        ("cat < x", "redirects"),
        ("ls 2>/dev/null", "redirects"),
        ("ls &", "background"),
        ("rm *", "wildcards"),
        ("rm ?", "wildcards"),
        ("echo `ls`", "substitutions"),
        ("echo $(ls)", "substitutions"),
        ("echo 'a", "matching '"),
        ('echo "a', 'matching "'),
        ("&& a", "near unexpected"),
        ("a &&", "near unexpected"),
        ("a && && b", "near unexpected"),
        ("a && ; b", "near unexpected"),
        ("a;" * (MAX_COMMANDS + 1), "too many commands"),
    ],
)
def test_refused_lines(line: str, words: str) -> None:
    with pytest.raises(ShellError, match=words):
        split_line(line, "unix", False)


def test_parity_refuses_pipes_and_redirects_only() -> None:
    assert split_line("rm *.txt & x", "unix", True) == [(";", "rm *.txt & x")]
    assert split_line("a\nb", "unix", True) == [(";", "a\nb")]
    for line in ("a | b", "a > b", "a < b"):
        with pytest.raises(ShellError):
            split_line(line, "unix", True)


def test_backslashes_escape_nothing_on_windows() -> None:
    assert split_line('cd "C:\\a\\" && dir', "cmd", False) == [(";", 'cd "C:\\a\\"'), ("&&", "dir")]
    assert split_line("type it's;dir", "cmd", False) == [(";", "type it's"), (";", "dir")]


def test_limits() -> None:
    assert len(words_of("a " * MAX_WORDS, "unix", VARIABLES)) == MAX_WORDS
    with pytest.raises(ShellError, match="too long"):
        words_of("a " * (MAX_WORDS + 1), "unix", VARIABLES)
    long = {"HOME": "x" * (MAX_EXPANDED_CHARS // 2), "PWD": "y"}
    for call in (
        lambda: words_of("$HOME $HOME$PWD", "unix", long),
        lambda: expand_text("$HOME$HOME$PWD", "unix", long),
    ):
        with pytest.raises(ShellError, match="too long"):
            call()


def test_clean_leaves_nothing_that_cannot_be_printed() -> None:
    assert clean("  a\x00b\ud800\x1b[0m\r\nc\t\u202e ") == "a?b??[0m\nc\t?"
