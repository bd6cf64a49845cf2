"""A package of somebody else, with an environment that fails on command.

It is put on the import path as an installer would leave it: a module and a ``dist-info`` folder with entry
points. Its environment is ``hidden_buttons`` under another name, so that the tiny model can play it, and it
fails when a file in the folder ``commands`` tells it to: ``<place>.<fault>.<anything>``; whoever obeys a file
deletes it first, so each fails once, in whichever process that is.
"""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from cod_async.envs import registry

NAME = "faulty_buttons"
MODULE = "faulty_package_of_somebody"

_SOURCE = """
import asyncio
import os
import subprocess
import sys
import time
from pathlib import Path

from cod_async.envs.base import EnvironmentSpec, StepResult
from cod_async.envs.hidden_buttons import SPEC as BUTTONS
from cod_async.envs.hidden_buttons.env import HiddenButtons
from cod_async.errors import EnvironmentInputError
from cod_async.lifecycle.hint import TersePrompts

EXTRA = {"commands": "", "is_resumable": True, "has_prompts": False}


class OwnPrompts(TersePrompts):
    initial = "[ none yet ]"


class FaultyButtons(HiddenButtons):
    name = "faulty_buttons"

    def __init__(self, options):
        super().__init__({key: value for key, value in options.items() if key not in EXTRA})
        self.is_resumable = options["is_resumable"]
        self._has_prompts = options["has_prompts"]
        self._commands = options["commands"] and Path(options["commands"])
        self._num_started = 0
        self._obey("make")

    def _fault(self, place):
        for path in sorted(self._commands.glob(f"{place}.*")) if self._commands else ():
            try:
                path.unlink()
            except FileNotFoundError:
                continue  # somebody else was faster
            return path.name.split(".")[1]
        return ""

    def _obey(self, place):
        fault = self._fault(place)
        if fault == "raise":
            raise OSError("the simulator died")
        if fault == "input":
            raise EnvironmentInputError(["the record is odd", "and so is the preset"])
        if fault == "exit":
            sys.exit(3)
        if fault == "crash":
            os._exit(5)
        if fault == "hang":
            while True:
                pass
        if fault == "slow":
            time.sleep(0.15)
        if fault == "memory":
            kept = []
            while True:
                kept.append(bytearray(16 << 20))
        if fault == "daemon":
            child = subprocess.Popen(["sleep", "1000"])
            other = subprocess.Popen(["sleep", "1000"], start_new_session=True)
            (self._commands / "pids.part").write_text(f"{os.getpid()} {child.pid} {other.pid}")
            (self._commands / "pids.part").rename(self._commands / "pids")
            while True:
                pass
        return fault

    def reset(self, task):
        self._num_started += 1
        self._obey("reset")
        self._obey(f"task{self._num_started}")
        return super().reset(task)

    async def step(self, response):
        fault = self._obey("step")
        if fault == "wait":
            await asyncio.sleep(1000)
        if fault == "type":
            return StepResult(observation=None, is_done=False)
        if fault == "surrogate":
            return StepResult(observation="\\ud800", is_done=False)
        if fault == "finish":
            return StepResult(observation="", is_done=True, finish="bored")
        return await super().step(response)

    def feedback(self):
        self._obey("feedback")
        return super().feedback()

    def update_prompts(self):
        return OwnPrompts() if self._has_prompts else None

    def snapshot(self):
        return b"\\x01" + str(self._num_started).encode()

    def restore(self, state):
        self._num_started = int(state[1:])

    async def close(self):
        if self._commands:
            (self._commands / f"closed-{os.getpid()}-{id(self)}").touch()


SPEC = EnvironmentSpec(
    name="faulty_buttons",
    presets={name: {**options, **EXTRA} for name, options in BUTTONS.presets.items()},
    hidden=BUTTONS.hidden,
    default_preset="door",
    default_pack_size=3,
    make=FaultyButtons,
    records=lambda options, split, seed: BUTTONS.records(plain(options), split, seed),
    pack_seed_for=lambda options, split, seed: BUTTONS.pack_seed_for(plain(options), split, seed),
    policies=BUTTONS.policies,
)


def plain(options):
    return {key: value for key, value in options.items() if key not in EXTRA}
"""


def write_package(site: Path, name: str = NAME, module: str = MODULE, source: str = _SOURCE) -> None:
    """Write a package of one module, which offers one environment, into a folder for the import path."""
    site.mkdir(parents=True, exist_ok=True)
    (site / f"{module}.py").write_text(source)
    info = site / f"{module}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {module}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{registry.GROUP}]\n{name} = {module}:SPEC\n")


def put_on_path(site: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process, and the workers that it starts, find the packages of a folder."""
    monkeypatch.syspath_prepend(site)
    importlib.invalidate_caches()
    registry.forget()


def install(site: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Install the faulty environment for this process, and return its folder for commands."""
    write_package(site)
    put_on_path(site, monkeypatch)
    commands = site / "commands"
    commands.mkdir()
    return commands


def order(commands: Path, place: str, fault: str, count: int = 1) -> None:
    """Order faults: ``place`` is make, reset, task<n> (the n-th reset), step or feedback."""
    for number in range(count):
        (commands / f"{place}.{fault}.{number}").touch()
