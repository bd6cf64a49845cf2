"""Options of commands: short ones in any order and bundle, long ones by name, values where one is taken."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from cod_async.envs.terminal.terminal import Call, CommandError

LONG_NAMES = {
    "--recursive": "r",
    "--parents": "p",
    "--force": "f",
    "--verbose": "v",
    "--all": "a",
    "--quiet": "q",
    "--archive": "a",
    "--compress": "z",
    "--keep": "k",
    "--decompress": "d",
}
"""Long options that are understood, as the short one they mean."""

_SWITCH = re.compile(r"/[A-Za-z]{1,2}(:[A-Za-z-]*)?", re.ASCII)
_SWITCH_FLAGS: Mapping[str, Mapping[str, str]] = {
    "dir": {"/a": "a"},
    "del": {"/s": "r", "/f": "f"},
    "copy": {},
    "move": {},
    "type": {},
    "ren": {},
    "rename": {},
    "cd": {},
}
"""Windows commands that take switches like ``/q``, and those that mean one of our options."""


@dataclass
class Options:
    """A call's words, parted: option letters, the values that some of them take, and operands."""

    letters: set[str] = field(default_factory=set)
    values: dict[str, str] = field(default_factory=dict)
    operands: list[str] = field(default_factory=list)

    def has(self, letters: str) -> bool:
        """Return whether one of these options was given."""
        return not self.letters.isdisjoint(letters)


def read_options(call: Call, allowed: str, with_value: str = "", is_strict: bool = True) -> Options:
    """Part a call's words into options and operands.

    Args:
        call: the command.
        allowed: option letters that exist.
        with_value: letters that take a value, which is the rest of the word or the next word.
        is_strict: whether unknown options are refused (else they are ignored).

    Raises:
        CommandError: an unknown option, or a value is missing.
    """
    options = Options()
    words = without_switches(call, options.letters)
    place = 0
    while place < len(words):
        word = words[place]
        place += 1
        if word == "--":
            options.operands += words[place:]
            break
        if word == "-" or not word.startswith("-"):
            options.operands.append(word)
            continue
        bundle = LONG_NAMES.get(word, "") if word.startswith("--") else word[1:]
        if not bundle and is_strict:
            raise CommandError(f"{call.typed}: unrecognized option '{word}'")
        for index, letter in enumerate(bundle):
            if letter in with_value:
                value = bundle[index + 1 :]
                if not value:
                    if place >= len(words):
                        raise CommandError(f"{call.typed}: option requires an argument -- '{letter}'")
                    value = words[place]
                    place += 1
                options.values[letter] = value
                break
            if letter in allowed:
                options.letters.add(letter)
            elif is_strict:
                raise CommandError(f"{call.typed}: invalid option -- '{letter}'")
    return options


def without_switches(call: Call, letters: set[str]) -> list[str]:
    """Return a call's words; on Windows without switches such as ``/q``, whose letters go to ``letters``."""
    known = _SWITCH_FLAGS.get(call.typed)
    if known is None or not call.machine.is_windows or call.is_parity:
        return call.words
    switches = [word for word in call.words if _SWITCH.fullmatch(word)]
    letters.update(known[word.lower()] for word in switches if word.lower() in known)
    return [word for word in call.words if not _SWITCH.fullmatch(word)]


def need_operands(call: Call, operands: list[str], num: int = 1) -> None:
    """Refuse a call with fewer than ``num`` operands in the operating system's words.

    Raises:
        CommandError: as said.
    """
    if len(operands) >= num:
        return
    if call.machine.is_windows:
        raise CommandError("The syntax of the command is incorrect.")
    if call.machine.os == "mac":
        raise CommandError(f"usage: {call.typed} [options] " + " ".join(["operand"] * num))
    if operands:
        raise CommandError(f"{call.typed}: missing destination file operand after '{operands[-1]}'")
    raise CommandError(f"{call.typed}: missing operand")
