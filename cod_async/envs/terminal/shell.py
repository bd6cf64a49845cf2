"""Reading a command line: splitting it into commands, expanding variables, cutting words.

The text is the policy's and is only ever looked up, never evaluated. There are three dialects: ``unix``
(bash and zsh: both kinds of quotes, backslash escapes, ``$NAME``, ``~``), ``cmd`` (Windows: double quotes,
``%NAME%``, backslashes are path separators) and ``cmd_parity``, the reference's reading of Windows lines
(:mod:`shlex` without POSIX rules), where quotes stay in the words. Pipes, redirects, background jobs,
wildcards and command substitution do not exist; a line that asks for one is refused as a whole.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from typing import Literal

Dialect = Literal["unix", "cmd", "cmd_parity"]

MAX_LINE_CHARS = 4_096
"""Longest command line that is run."""
MAX_COMMANDS = 16
"""Most commands in one line."""
MAX_WORDS = 48
"""Most words in one command."""
MAX_EXPANDED_CHARS = 2 * MAX_LINE_CHARS
"""Longest text that a line or command may become when its variables are replaced."""

_NAME = re.compile(r"\$(?:\{([A-Za-z_][A-Za-z0-9_]*)\}|([A-Za-z_][A-Za-z0-9_]*))", re.ASCII)
_PERCENT = re.compile(r"%([A-Za-z_][A-Za-z0-9_]*)%", re.ASCII)
_TILDE = re.compile(r"(^|\s)~(?=/|\s|$)")
_QUOTES: dict[Dialect, str] = {"unix": "'\"", "cmd": '"', "cmd_parity": "'\""}


class ShellError(Exception):
    """A command line cannot be read; the text says why, in the shell's words."""


def clean(line: str) -> str:
    """Return a line without outer blanks, with unprintable characters (surrogates too) as question marks."""
    line = line.strip().replace("\r\n", "\n")
    return "".join(char if char.isprintable() or char in "\n\t" else "?" for char in line)


def split_line(line: str, dialect: Dialect, is_parity: bool) -> list[tuple[str, str]]:
    """Cut a line at ``&&``, ``;`` and line ends that stand outside quotes.

    Returns:
        (operator before it, text) of each command; the operator is ``&&`` or ``;``.

    Raises:
        ShellError: a pipe, redirect or other thing that does not exist here, an open quote, nothing beside an
            ``&&``, or too many commands.
    """
    pieces: list[tuple[str, str]] = []
    operator, start, quote, place = ";", 0, "", 0
    while place < len(line):
        char, found, width = line[place], "", 1
        if quote:
            if char == quote:
                quote = ""
            elif char == "\\" and dialect == "unix" and quote == '"':
                width = 2
        elif char in _QUOTES[dialect]:
            quote = char
        elif char == "\\" and dialect == "unix":
            width = 2
        elif line.startswith("&&", place):
            found, width = "&&", 2
        elif char == ";" or (char == "\n" and not is_parity):
            found = ";"
        else:
            _check_char(line, place, dialect, is_parity)
        if found:
            pieces.append((operator, line[start:place].strip()))
            operator, start = found, place + width
        place += width
    if quote and (dialect == "unix" or is_parity):
        raise ShellError(f"unexpected end of line while looking for the matching {quote}")
    pieces.append((operator, line[start:].strip()))
    return _without_blanks(pieces)


def _check_char(line: str, place: int, dialect: Dialect, is_parity: bool) -> None:
    """Refuse what this terminal cannot do."""
    char = line[place]
    what = ""
    if char == "|":
        what = "pipes are"
    elif char in "<>":
        what = "redirects are"
    elif is_parity:
        return
    elif char == "&":
        what = "background jobs are"
    elif char in "*?":
        what = "wildcards are"
    elif dialect == "unix" and (char == "`" or line.startswith("$(", place)):
        what = "command substitutions are"
    if what:
        raise ShellError(f"{what} not supported in this terminal; nothing was run")


def _without_blanks(pieces: list[tuple[str, str]]) -> list[tuple[str, str]]:
    last = len(pieces) - 1
    for index, (operator, text) in enumerate(pieces):
        is_joined = operator == "&&" or (index < last and pieces[index + 1][0] == "&&")
        if not text and is_joined:
            raise ShellError("syntax error near unexpected token '&&'")
    kept = [piece for piece in pieces if piece[1]]
    if len(kept) > MAX_COMMANDS:
        raise ShellError(f"too many commands in one line (at most {MAX_COMMANDS}); nothing was run")
    return kept


def expand_text(text: str, dialect: Dialect, variables: Mapping[str, str]) -> str:
    """Replace variables and leading tildes everywhere, quoted or not (the reference's way).

    Raises:
        ShellError: the text becomes too long.
    """
    if dialect == "unix":
        text = _NAME.sub(lambda match: variables.get(match.group(1) or match.group(2), ""), text)
        text = _TILDE.sub(lambda match: match.group(1) + variables["HOME"], text)
    else:
        text = _PERCENT.sub(lambda match: variables.get(match.group(1).upper(), match.group(0)), text)
    if len(text) > MAX_EXPANDED_CHARS:
        raise ShellError("argument list too long")
    return text


def words_of(text: str, dialect: Dialect, variables: Mapping[str, str] | None) -> list[str]:
    """Cut one command into words, without the quotes and with variables replaced.

    Args:
        text: one command, as :func:`split_line` gives it.
        dialect: how to read it; ``cmd_parity`` leaves the quotes in the words.
        variables: values of variables, with ``HOME`` for the tilde of ``unix``; None: nothing is replaced.

    Raises:
        ShellError: an open quote, a trailing backslash, or too many words.
    """
    words = _unix_words(text, variables) if dialect == "unix" else _cmd_words(text, dialect, variables)
    if len(words) > MAX_WORDS or sum(map(len, words)) > MAX_EXPANDED_CHARS:
        raise ShellError("argument list too long")
    return words


def _unix_words(text: str, variables: Mapping[str, str] | None) -> list[str]:
    words: list[str] = []
    word: list[str] | None = None  # None: between words
    quote, place = "", 0
    while place < len(text):
        char = text[place]
        place += 1
        if not quote and char.isspace():
            if word is not None:
                words.append("".join(word))
                word = None
            continue
        if not quote and word is None and char == "#":
            return words  # a comment
        is_first = word is None
        word = [] if word is None else word
        if char == quote:
            quote = ""
        elif not quote and char in "'\"":
            quote = char
        elif char == "\\" and quote != "'":
            if place >= len(text):
                raise ShellError("unexpected end of line after a backslash")
            if quote and text[place] not in '"\\$`':
                word.append(char)
            word.append(text[place])
            place += 1
        elif (
            char == "$" and quote != "'" and variables is not None and (name := _NAME.match(text, place - 1))
        ):
            word.append(variables.get(name.group(1) or name.group(2), ""))
            place = name.end()
        elif char == "~" and is_first and variables is not None and _ends_tilde(text, place):
            word.append(variables["HOME"])
        else:
            word.append(char)
    if quote:
        raise ShellError(f"unexpected end of line while looking for the matching {quote}")
    return words if word is None else [*words, "".join(word)]


def _ends_tilde(text: str, place: int) -> bool:
    return place >= len(text) or text[place] == "/" or text[place].isspace()


def _cmd_words(text: str, dialect: Dialect, variables: Mapping[str, str] | None) -> list[str]:
    if variables is not None:
        text = expand_text(text, dialect, variables)
    if dialect == "cmd_parity":
        try:
            return shlex.split(text, posix=False)
        except ValueError as error:
            raise ShellError(str(error)) from error
    words: list[str] = []
    word: list[str] | None = None
    is_quoted = False
    for char in text:
        if not is_quoted and char.isspace():
            if word is not None:
                words.append("".join(word))
                word = None
            continue
        word = [] if word is None else word
        if char == '"':
            is_quoted = not is_quoted
        else:
            word.append(char)
    return words if word is None else [*words, "".join(word)]
