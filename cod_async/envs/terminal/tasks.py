"""Tasks from row seeds: machines, files, goal and the facts that the sentence tells.

Everything is drawn by one Mersenne generator seeded with the row seed, in a fixed order: local OS, last octet
of the remote address, remote user, single or composite, type, then what the type needs (:mod:`.recipes`).
Tests freeze the result, because a changed order changes every task of the data set.
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from dataclasses import dataclass

from cod_async.envs.terminal.commands import COMMANDS
from cod_async.envs.terminal.draft import REMOTE_USERS, Draft, Place
from cod_async.envs.terminal.filesystem import File
from cod_async.envs.terminal.goals import Goal
from cod_async.envs.terminal.machine import OS_NAMES, Os
from cod_async.envs.terminal.recipes import COMPOSITE, SINGLE
from cod_async.envs.terminal.terminal import Terminal


@dataclass(frozen=True)
class Task:
    """One task.

    Attributes:
        type: one of :data:`~.recipes.SINGLE` or :data:`~.recipes.COMPOSITE`.
        is_composite: which of them.
        local_os, remote_host, remote_user: the machines.
        places: what is there at the start, in the order of making.
        goals: what must hold in the end.
        paths: the places that the sentence names, by role.
        words: other facts of the sentence, by role.
    """

    type: str
    is_composite: bool
    local_os: Os
    remote_host: str
    remote_user: str
    places: tuple[Place, ...]
    goals: tuple[Goal, ...]
    paths: Mapping[str, Place]
    words: Mapping[str, str]

    def world(self, is_parity: bool) -> Terminal:
        """Build the machines of the task at its start."""
        terminal = Terminal(self.local_os, self.remote_user, self.remote_host, COMMANDS, is_parity)
        for place in self.places:
            files = (terminal.local if place.side == "local" else terminal.remote).files
            parent = place.path if place.content is None else place.path[:-1]
            files.make_directory(parent, has_parents=True)
            if place.content is not None and files.find(place.path) is None:
                files.put(place.path, File("", place.content, place.mode))
        return terminal


def make_task(seed: int, composite_frac: float) -> Task:
    """Return the task of a row seed.

    Args:
        seed: 0 .. 2^64-1.
        composite_frac: probability of a composite type, 0 .. 1.
    """
    rng = random.Random(seed)
    os = rng.choice(OS_NAMES)
    host = f"192.168.1.{rng.randint(10, 99)}"
    user = rng.choice(REMOTE_USERS)
    is_composite = rng.random() < composite_frac
    recipes = COMPOSITE if is_composite else SINGLE
    name = rng.choice(list(recipes))
    draft = Draft(rng=rng, seed=seed, os=os, user=user)
    recipes[name](draft)
    return Task(
        type=name,
        is_composite=is_composite,
        local_os=os,
        remote_host=host,
        remote_user=user,
        places=tuple(draft.places),
        goals=tuple(draft.goals),
        paths=draft.paths,
        words=draft.words,
    )
