from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from coordinator_world import MEMORY_FOLDER, World, make_config


@pytest.fixture
def make_world() -> Iterator[Callable[..., World]]:
    """Make a coordinator with a configuration; sections are keyword arguments."""
    worlds: list[World] = []
    with tempfile.TemporaryDirectory(dir=MEMORY_FOLDER) as folder:

        def make(**sections: Any) -> World:
            worlds.append(World(Path(folder), make_config(**sections)))
            return worlds[-1]

        yield make
        for world in worlds:
            world.store.close()
