"""Terminal's Linux machine against a real bash with GNU tools, in a temporary folder.

Random commands of a fixed list (written here, nothing of a policy) are typed into both. After each one the
exit statuses must agree on success, and in the end both trees must hold the same names, contents and modes.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from pathlib import Path

import pytest

from cod_async.envs.terminal.commands import COMMANDS
from cod_async.envs.terminal.filesystem import Content, Directory, File, walk
from cod_async.envs.terminal.terminal import Terminal

TOOLS = ("bash", "cp", "tar", "gzip", "zip", "unzip")
NAMES = ("a", "b", "n", "d", "e", "d/a", "d/n", "d/s", "d/s/f", "e/d", "e/x", "d/", "n/", "./a", "d/../b")
TOP = ("a", "d", "e", "n")
COMMANDS_TRIED = (
    "cp {x} {y}",
    "cp -r {x} {y}",
    "cp {x} {y} d",
    "mv {x} {y}",
    "mv {x} {y} e",
    "rm {x}",
    "rm -f {x}",
    "rm -r {x}",
    "rm -rf {x} {y}",
    "mkdir {x}",
    "mkdir -p {x} {y}",
    "touch {x}",
    "chmod 700 d/a",
    "chmod -R 750 {x}",
    "cat {x}",
    "ls {x} {y}",
    "tar cf t.tar {t}",
    "tar -czf t.tgz {t} {u}",
    "tar -cf t.tar -C d a",
    "tar xf t.tar",
    "tar -xzf t.tgz -C e",
    "tar --extract --file=t.tar d/a",
    "tar tzf t.tar",
    "gzip {x}",
    "gunzip -k {x}.gz",
    "gunzip -f a.gz",
    "zip -rq z.zip {t}",
    "zip -q z {t}",
    "unzip -oq z.zip",
    "unzip -oq z -d e/u",
)


def gnu_tools_exist() -> bool:
    if any(shutil.which(tool) is None for tool in TOOLS):
        return False
    versions = [subprocess.run([tool, "--version"], capture_output=True, text=True) for tool in ("cp", "tar")]
    return all("GNU" in version.stdout for version in versions)


def is_same_by_design(line: str) -> bool:
    """Return False for what the simulator does in its own way on purpose.

    A directory copied into itself is refused as a whole (cp leaves the first level behind), ``mkdir -p
    x/../y`` doesn't make x, and of two sources with one name the second may replace the first.
    """
    words = [os.path.normpath(word) for word in line.split()[1:] if not word.startswith("-")]
    if len(words) == 3 and os.path.basename(words[0]) == os.path.basename(words[1]):
        return False
    if line.startswith("cp -r"):
        return not f"{words[-1]}/".startswith(f"{words[0]}/")
    return not (line.startswith("mkdir -p") and ".." in line)


def made_up_lines(rng: random.Random) -> list[str]:
    lines = [
        rng.choice(COMMANDS_TRIED).format(
            x=rng.choice(NAMES), y=rng.choice(NAMES), t=rng.choice(TOP), u=rng.choice(TOP)
        )
        for _ in range(20)
    ]
    return [line for line in lines if is_same_by_design(line)]


def start_files() -> list[tuple[str, ...]]:
    return [("a",), ("b",), ("d", "a"), ("d", "s", "f"), ("e", "x")]


def simulate(lines: list[str]) -> tuple[list[bool], dict[str, tuple[str, int]]]:
    terminal = Terminal("linux", "ops", "192.168.1.20", COMMANDS)
    machine = terminal.local
    for path in start_files():
        full = (*machine.home, *path)
        machine.files.make_directory(full[:-1], has_parents=True)
        machine.files.put(full, File("", Content("/".join(path), 3)))
    statuses = [not terminal.run(line).is_error for line in lines]
    found: dict[str, tuple[str, int]] = {}
    for below, node in walk(machine.files.directory(machine.home)):
        if below:
            is_file = isinstance(node, File) and node.content.kind == "data"
            text = "/" if isinstance(node, Directory) else node.content.text if is_file else "archive"
            found["/".join(below)] = (text, node.mode)
    return statuses, found


def run_for_real(lines: list[str], folder: Path) -> tuple[list[bool], dict[str, tuple[str, int]]]:
    folder.mkdir()
    for path in start_files():
        folder.joinpath(*path).parent.mkdir(exist_ok=True, parents=True)
        folder.joinpath(*path).write_text("/".join(path))
        folder.joinpath(*path).chmod(0o644)
    for directory in (path for path in folder.rglob("*") if path.is_dir()):
        directory.chmod(0o755)
    script = "umask 022\n" + "".join(f"{line} >/dev/null 2>&1 </dev/null; echo $?\n" for line in lines)
    done = subprocess.run(["bash", "-c", script], cwd=folder, capture_output=True, text=True, check=True)
    found: dict[str, tuple[str, int]] = {}
    for path in folder.rglob("*"):
        raw = b"" if path.is_dir() else path.read_bytes()
        is_text = raw.isascii() and b"\0" not in raw
        text = "/" if path.is_dir() else raw.decode() if is_text else "archive"
        found[str(path.relative_to(folder))] = (text, path.stat().st_mode & 0o777)
    return [int(status) == 0 for status in done.stdout.split()], found


@pytest.mark.skipif(not gnu_tools_exist(), reason="needs bash, GNU coreutils, GNU tar, gzip, zip and unzip")
@pytest.mark.parametrize("seed", range(30))
def test_same_statuses_and_trees(seed: int, tmp_path: Path) -> None:
    lines = made_up_lines(random.Random(seed))
    ours, theirs = simulate(lines), run_for_real(lines, tmp_path / "home")
    assert list(zip(lines, ours[0], strict=True)) == list(zip(lines, theirs[0], strict=True))
    assert ours[1] == theirs[1]
