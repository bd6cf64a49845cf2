"""Scripted policies: the floor and the ceiling.

``random`` types plausible commands with words that the sentence names and knows nothing of what they do.
``oracle`` knows how to do each of the seventeen types on each operating system; it reads the task's type and
places (which the sentence tells everyone), never the state of the machines.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

from cod_async.envs.base import Environment, Policy
from cod_async.envs.terminal.draft import DIRECTORY_NAMES, FILE_NAMES, MODES, Place
from cod_async.envs.terminal.env import TerminalSimulator
from cod_async.envs.terminal.filesystem import Path


def answer(line: str) -> str:
    """Return the response that types a command line."""
    return f"<answer>{line}</answer>"


def _environment(environment: Environment) -> TerminalSimulator:
    if not isinstance(environment, TerminalSimulator):
        raise TypeError(f"this policy plays terminal, not {type(environment).__name__}")
    return environment


_TEMPLATES = (
    "ls",
    "cd {path}",
    "pwd",
    "ssh {login}",
    "exit",
    "mkdir {path}",
    "mkdir -p {path}",
    "cp {path} {path}",
    "mv {path} {path}",
    "rm {path}",
    "chmod {mode} {path}",
    "scp {path} {path}",
    "scp -r {path} {path}",
    "tar -czf {path} {path}",
    "tar -xf {path}",
    "zip -r {path} {path}",
    "unzip {path}",
    "mv {path} {word}",
    "ssh {login} && rm {path}",
)


def random_policy(seed: int) -> Policy:
    """Return the policy that types random commands with random words of the sentence and the name pools."""
    rng = random.Random(seed)

    def act(environment: Environment, observation: str, memory: Any) -> str:
        view = _environment(environment).task_view()
        named = list(view["paths"].values())
        login = f"{view['remote_user']}@{view['remote_host']}"
        named += [path.removeprefix(f"{login}:") for path in named]
        words = [*view["words"].values(), rng.choice(FILE_NAMES), rng.choice(DIRECTORY_NAMES)]
        line = rng.choice(_TEMPLATES)
        while "{path}" in line:
            line = line.replace("{path}", rng.choice([*named, rng.choice(words)]), 1)
        mode = rng.choice([view["words"].get("mode", "644"), rng.choice(MODES)])
        return answer(
            line.replace("{login}", login).replace("{mode}", mode).replace("{word}", rng.choice(words))
        )

    return act


class _Script:
    """Writes the command lines that solve one task."""

    def __init__(self, environment: TerminalSimulator) -> None:
        self._environment = environment
        self._task = environment.task
        terminal = environment.terminal
        self._login = f"{terminal.remote.user}@{terminal.remote.host}"
        self._machines = {"local": terminal.local, "remote": terminal.remote}

    def __getitem__(self, role: str) -> Place:
        return self._task.paths[role]

    def word(self, role: str) -> str:
        """Return a word that the sentence names."""
        return self._task.words[role]

    def at(self, place: Place, path: Path | None = None) -> str:
        """Return a path as typed on its own machine."""
        return self._machines[place.side].show(place.path if path is None else path)

    def over(self, place: Place, path: Path | None = None) -> str:
        """Return a path as typed on the local machine: remote ones with the login in front."""
        typed = self.at(place, path)
        return f"{self._login}:{typed}" if place.side == "remote" else typed

    def on(self, place: Place, *lines: str) -> list[str]:
        """Return lines to be typed on a place's machine, with the login and logout that takes."""
        return list(lines) if place.side == "local" else [f"ssh {self._login}", *lines, "exit"]

    def inside(self, place: Place, name: str) -> Path:
        """Return the path of a name in a directory."""
        return (*place.path, name)

    def pack(self, source: Place, name: str) -> list[str]:
        """Return the lines that pack a directory into an archive beside it."""
        parent, directory = self.at(source, source.path[:-1]), source.path[-1]
        command = {"zip": "zip -r", "gz": "tar -czf", "tar": "tar -cf"}[name.rpartition(".")[2]]
        return [f"cd {parent}", f"{command} {name} {directory}"]

    def unpack(self, directory: Place, name: str) -> list[str]:
        """Return the lines that unpack an archive in the directory where it lies."""
        command = "unzip" if name.endswith(".zip") else "tar -xf"
        return [f"cd {self.at(directory)}", f"{command} {name}"]


def _transfer(script: _Script) -> list[str]:
    return [f"scp {script.over(script['source'])} {script.over(script['destination'])}"]


def _rename(script: _Script) -> list[str]:
    source = script["source"]
    target = (*source.path[:-1], script.word("name"))
    return script.on(source, f"mv {script.at(source)} {script.at(source, target)}")


def _move(script: _Script) -> list[str]:
    source = script["source"]
    return script.on(source, f"mv {script.at(source)} {script.at(script['destination'])}")


def _copy(script: _Script) -> list[str]:
    source = script["source"]
    return script.on(source, f"cp {script.at(source)} {script.at(script['destination'])}")


def _chmod(script: _Script) -> list[str]:
    return script.on(script["source"], f"chmod {script.word('mode')} {script.at(script['source'])}")


def _delete(script: _Script) -> list[str]:
    return script.on(script["source"], f"rm {script.at(script['source'])}")


def _pack(script: _Script) -> list[str]:
    return script.on(script["source"], *script.pack(script["source"], script["archive"].path[-1]))


def _mkdir(script: _Script) -> list[str]:
    return script.on(script["directory"], f"mkdir -p {script.at(script['directory'])}")


def _pack_upload(script: _Script) -> list[str]:
    name = script.word("name")
    return [*script.pack(script["source"], name), f"scp {name} {script.over(script['destination'])}"]


def _pack_upload_extract(script: _Script) -> list[str]:
    there = script["destination"]
    return [*_pack_upload(script), *script.on(there, *script.unpack(there, script.word("name")))]


def _download_extract(script: _Script) -> list[str]:
    """Unpack where tar exists: on the remote host if the local machine is Windows and the archive no zip."""
    source, here, archive = script["source"], script["destination"], script["source"].path[-1]
    parent = Place(source.side, source.path[:-1])
    if script._task.local_os == "windows" and not archive.endswith(".zip"):
        unpacked = script.over(source, (*parent.path, script.word("name")))
        return [*script.on(source, *script.unpack(parent, archive)), f"scp -r {unpacked} {script.at(here)}"]
    return [f"scp {script.over(source)} {script.at(here)}", *script.unpack(here, archive)]


def _mkdir_upload(script: _Script) -> list[str]:
    return [*_mkdir(script), f"scp {script.over(script['source'])} {script.over(script['directory'])}"]


def _upload_chmod(script: _Script) -> list[str]:
    source, there = script["source"], script["destination"]
    target = script.at(there, script.inside(there, source.path[-1]))
    return [*_transfer(script), *script.on(there, f"chmod {script.word('mode')} {target}")]


def _upload_delete_source(script: _Script) -> list[str]:
    return [*_transfer(script), f"rm {script.at(script['source'])}"]


def _download_rename(script: _Script) -> list[str]:
    here = script["destination"]
    target = script.at(here, script.inside(here, script.word("name")))
    return [f"scp {script.over(script['source'])} {target}"]


def _backup_replace(script: _Script) -> list[str]:
    target = script["target"]
    backup = script.at(target, (*target.path[:-1], script.word("name")))
    upload = f"scp {script.over(script['source'])} {script.over(target)}"
    return [*script.on(target, f"mv {script.at(target)} {backup}"), upload]


_SCRIPTS: dict[str, Callable[[_Script], list[str]]] = {
    "upload": _transfer,
    "download": _transfer,
    "rename": _rename,
    "move": _move,
    "chmod": _chmod,
    "delete": _delete,
    "copy": _copy,
    "pack": _pack,
    "mkdir": _mkdir,
    "pack_upload": _pack_upload,
    "download_extract": _download_extract,
    "mkdir_upload": _mkdir_upload,
    "upload_chmod": _upload_chmod,
    "upload_delete_source": _upload_delete_source,
    "pack_upload_extract": _pack_upload_extract,
    "download_rename": _download_rename,
    "backup_replace": _backup_replace,
}


def solution(environment: TerminalSimulator) -> list[str]:
    """Return command lines that solve the environment's task, typed from its start on."""
    return _SCRIPTS[environment.task.type](_Script(environment))


def oracle_policy(seed: int) -> Policy:
    """Return the policy that types the scripted solution, line by line; the seed has no effect."""

    def act(environment: Environment, observation: str, memory: dict[str, Any]) -> str:
        playing = _environment(environment)
        if playing.num_steps == 0:
            memory["lines"] = solution(playing)
        lines = memory["lines"]
        return answer(lines[playing.num_steps] if playing.num_steps < len(lines) else "ls")

    return act
