"""A task being drawn: the pools of names, and what has been decided so far.

All draws of a task go through one generator; a :class:`Draft` carries it, collects what is there at the start
and what is wanted in the end, and knows where things may lie on each machine.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, field

from cod_async.envs.terminal.filesystem import Content, Path
from cod_async.envs.terminal.goals import Goal, Side
from cod_async.envs.terminal.machine import LOCAL_USER, Os

FILE_NAMES = (
    "report.txt",
    "data.csv",
    "image.png",
    "config.json",
    "notes.md",
    "script.sh",
    "log.txt",
    "readme.txt",
    "database.db",
    "output.log",
    "results.csv",
    "document.pdf",
    "settings.ini",
    "main.py",
    "index.html",
    "style.css",
    "app.js",
    "server.py",
    "deploy.sh",
    "backup.sql",
    "photo.jpg",
    "diagram.svg",
    "metrics.json",
    "requirements.txt",
    "Makefile",
)
DIRECTORY_NAMES = (
    "projects",
    "documents",
    "downloads",
    "backups",
    "config",
    "data",
    "logs",
    "workspace",
    "reports",
    "media",
    "scripts",
    "output",
    "staging",
    "archive",
    "temp",
    "src",
    "build",
    "dist",
    "assets",
    "uploads",
)
REMOTE_USERS = ("admin", "deploy", "user", "webmaster", "devops", "ops", "ubuntu")
MODES = ("644", "755", "600", "700", "664", "640", "444", "750")
ARCHIVE_SUFFIXES = (".tar", ".tar.gz", ".zip")
FILE_SIZE_BYTES = 1_024
"""Every file of a task is as large as every other."""
NUM_DISTRACTORS = 3


@dataclass(frozen=True)
class Place:
    """Something on a machine: a directory (``content`` is None) or a file."""

    side: Side
    path: Path
    content: Content | None = None
    mode: int = 0o644


@dataclass
class Draft:
    """A task being drawn: the generator, and what has been decided so far.

    Attributes:
        rng: the row's generator.
        seed: the row's seed; it is part of every file's content.
        os: local operating system.
        user: remote user.
    """

    rng: random.Random
    seed: int
    os: Os
    user: str
    places: list[Place] = field(default_factory=list)
    goals: list[Goal] = field(default_factory=list)
    paths: dict[str, Place] = field(default_factory=dict)
    words: dict[str, str] = field(default_factory=dict)

    @property
    def local_home(self) -> Path:
        """Home on the local machine."""
        return ("home" if self.os == "linux" else "Users", LOCAL_USER)

    @property
    def remote_home(self) -> Path:
        """Home on the remote host."""
        return ("home", self.user)

    def file_name(self) -> str:
        """Draw a file name."""
        return self.rng.choice(FILE_NAMES)

    def content(self, name: str, tag: str = "content") -> Content:
        """Return the content of a file of this task; a new one each time."""
        return Content(f"{tag} of {name}, {self.seed}, {FILE_SIZE_BYTES} bytes", FILE_SIZE_BYTES)

    def side(self) -> Side:
        """Draw the machine of a task that can be on either: half and half."""
        return "remote" if self.rng.random() < 0.5 else "local"

    def local_directory(self) -> Path:
        """Draw a directory below the local home."""
        return (*self.local_home, self.rng.choice(DIRECTORY_NAMES))

    def remote_directory(self) -> Path:
        """Draw a directory of the remote host; both names are drawn before the choice."""
        below_home, below_opt = self.rng.choice(DIRECTORY_NAMES), self.rng.choice(DIRECTORY_NAMES)
        return self.rng.choice(
            [(*self.remote_home, below_home), ("var", "www", "html"), ("opt", below_opt), self.remote_home]
        )

    def directory(self, side: Side) -> Path:
        """Draw a directory of a machine."""
        return self.local_directory() if side == "local" else self.remote_directory()

    def two_directories(self, side: Side) -> tuple[Path, Path]:
        """Draw two different directories of a machine: the second again until it differs."""
        first, second = self.directory(side), self.directory(side)
        while second == first:  # each draw differs with probability > 0.6
            second = self.directory(side)
        return first, second

    def archive_suffix(self, packs_on: Side) -> str:
        """Draw the archive format; Windows has no tar, so what is packed there is a zip."""
        suffix = self.rng.choice(ARCHIVE_SUFFIXES)
        return ".zip" if packs_on == "local" and self.os == "windows" else suffix

    def packed_files(self, side: Side, directory: Path) -> list[tuple[str, Content]]:
        """Draw 2 to 4 files and put them into a directory; return their names and contents."""
        names = self.rng.sample(FILE_NAMES, self.rng.randint(2, 4))
        made = [(name, self.content(name)) for name in names]
        for name, content in made:
            self.file(side, (*directory, name), content)
        return made

    def make(self, side: Side, path: Path) -> Place:
        """Have a directory from the start."""
        place = Place(side, path)
        self.places.append(place)
        return place

    def file(self, side: Side, path: Path, content: Content, mode: int = 0o644) -> Place:
        """Have a file from the start."""
        place = Place(side, path, content, mode)
        self.places.append(place)
        return place

    def distract(self, side: Side, directory: Path) -> None:
        """Draw three more files of a directory; names that are there already are skipped."""
        present = {place.path for place in self.places if place.side == side}
        for _ in range(NUM_DISTRACTORS):
            name = self.file_name()
            if (*directory, name) not in present:
                self.file(side, (*directory, name), self.content(name, "other content"))
                present.add((*directory, name))

    def tell(self, **facts: Place | str) -> None:
        """Have the sentence name places and words."""
        for role, fact in facts.items():
            if isinstance(fact, Place):
                self.paths[role] = fact
            else:
                self.words[role] = fact

    def want_file(self, side: Side, path: Path, content: Content) -> None:
        """Want a file with this content."""
        self.goals.append(Goal("file", side, path, content=content))

    def want_absent(self, side: Side, path: Path) -> None:
        """Want nothing at a path."""
        self.goals.append(Goal("absent", side, path))

    def want_directory(self, side: Side, path: Path) -> None:
        """Want a directory."""
        self.goals.append(Goal("directory", side, path))

    def want_mode(self, side: Side, path: Path, mode: str) -> None:
        """Want permission bits, given as three octal digits."""
        self.goals.append(Goal("mode", side, path, mode=int(mode, 8)))

    def want_archive(self, side: Side, path: Path, name: str, files: list[tuple[str, Content]]) -> None:
        """Want an archive that holds these files below ``name``."""
        entries = tuple(((name, file), content) for file, content in files)
        self.goals.append(Goal("archive", side, path, entries=entries))


Recipe = Callable[[Draft], None]
"""How a type of task is drawn."""
