"""Is a killed and resumed run the same run? Play it both ways with the real ``cod train``, compare digests.

Run A takes 2N steps in one go. Run B takes N steps and a few more, is killed with SIGKILL, all processes at
the same moment, and goes on with ``--resume`` to 2N. With ``staleness.max_lag = 0``, one actor, one thread
and a batch invariant engine both must hold the same parameters and optimizer state after N and 2N steps, and
must have trained on the same batches in between: the same keys with the same advantages, the same token ids
with the same behaviour log-probs.

From the repository root: ``python -m tests.integration.resume_report`` prints the digests side by side and
writes ``docs/reports/resume.json``.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sqlite3
import struct
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil
from safetensors.numpy import load_file

from cod_async.errors import StoreError
from cod_async.lifecycle.segment import Segment, Version
from cod_async.store.history import HistoryTable
from cod_async.store.schema import DATABASE_NAME, connect_reader
from cod_async.store.segments import SegmentTable

ROOT = Path(__file__).resolve().parents[2]
REPORT = Path("docs/reports/resume.json")
TIMEOUT_S = 600.0

KillMoment = Literal["random", "mid_generation"]

CONFIG = """
[[environments]]
name = "hidden_buttons"
preset = "door"

[run]
output_dir = "{output_dir}"
num_steps = {num_steps}
grace_s = 10.0

[lifecycle]
pack_size = 3
group_size = 4
max_response_tokens = 6
max_hint_tokens = 12
hint_penalty = 1.0
solve_penalty = 0.0

[model]
path = "{model}"
renderer = "terse"
max_context_tokens = 96

[bootstrap]
kind = "documents"
num_steps = 30
documents_per_step = 32
qa_loss_gate = 100.0
[bootstrap.model]
hidden_size = 32
num_layers = 1
num_heads = 2
num_kv_heads = 1
head_dim = 16
intermediate_size = 64

[engine]
max_running = 32
is_batch_invariant = true

[actors]
lifecycles_per_process = 32

[staleness]
max_lag = 0

[credit_assignment]
red = "bisection"

[learner]
groups_per_step = 4
lr = 2e-3
warmup_steps = 4
betas = [0.9, 0.95]
weight_decay = 0.01
checkpoint_every_steps = {checkpoint_every_steps}
keep_checkpoints = 8

[loss]
kl_coef = 0.001

[evaluation]
is_enabled = false

[observe]
has_plots = false
has_tensorboard = false
num_transcripts = 0
"""


@dataclass
class RunDigests:
    """SHA-256 digests (hex) of what a run came to.

    Attributes:
        parameters, optimizer: by step, of the checkpoints that both runs have.
        weights: of every version of the surviving history, as published.
        batches: per step, of the sorted (key, advantage) pairs.
        samples: per step, of token ids, action spans, behaviour log-probs and rewards of its segments.
    """

    parameters: dict[int, str] = field(default_factory=dict)
    optimizer: dict[int, str] = field(default_factory=dict)
    weights: list[str] = field(default_factory=list)
    batches: list[str] = field(default_factory=list)
    samples: list[str] = field(default_factory=list)


@dataclass
class Kill:
    """What was going on when everything was killed, and what the resumed run made of it.

    Attributes:
        moment: how the moment was chosen.
        step: step that the learner was at.
        num_held: lifecycles being played.
        num_half_played: of those, the ones that had committed segments already.
        num_rolled_back: steps beyond the checkpoint, to be taken again.
        num_continued: trained segments of lifecycles that were handed out a second time.
        max_lag: highest lag of any trained segment, in steps.
        is_balanced: whether the ledger balances in the end.
    """

    moment: KillMoment
    step: int
    num_held: int
    num_half_played: int
    num_rolled_back: int = 0
    num_continued: int = 0
    max_lag: int = 0
    is_balanced: bool = False


def digest_tensors(folder: Path) -> str:
    """Return the SHA-256 over names, dtypes, shapes and bytes of the tensors that one rank wrote."""
    hasher = hashlib.sha256()
    arrays = {name: array for path in folder.iterdir() for name, array in load_file(path).items()}
    for name, array in sorted(arrays.items()):
        hasher.update(f"{name} {array.dtype.str} {array.shape}\n".encode())
        hasher.update(array.tobytes())
    return hasher.hexdigest()


def digest_samples(segments: list[Segment]) -> str:
    """Return the SHA-256 over what the policy generated and what it was rewarded with, sorted by key."""
    hasher = hashlib.sha256()
    for segment in sorted(segments, key=lambda one: one.key):
        hasher.update(f"{segment.key} {segment.kind} {len(segment.rows)}".encode())
        hasher.update(struct.pack("<d", segment.reward))
        for row in segment.rows:
            hasher.update(json.dumps(row.action_spans).encode())
            hasher.update(row.token_ids.data)
            hasher.update(row.behavior_logprobs.data)
    return hasher.hexdigest()


@contextlib.contextmanager
def reading(run_dir: Path) -> Iterator[sqlite3.Connection]:
    """Read the run database of ``run_dir`` in one short transaction."""
    with contextlib.closing(connect_reader(run_dir)) as connection:
        connection.execute("BEGIN")
        yield connection
        connection.execute("COMMIT")


def collect(run_dir: Path, num_steps: int) -> RunDigests:
    """Return the digests of a finished run of ``num_steps`` steps, along its surviving history."""
    digests = RunDigests()
    with reading(run_dir) as connection:
        history, segments = HistoryTable(connection), SegmentTable(connection)
        tree = history.tree()
        assert tree is not None
        versions = [tree.at(step) for step in range(num_steps + 1)]
        digests.weights = [tree.digest(version) or "unpublished" for version in versions]
        for version in versions[:-1]:
            items = history.items(version)
            hasher = hashlib.sha256()
            for item in items:
                key = item.key
                hasher.update(struct.pack("<qqqd", key.group, key.member, key.ordinal, item.advantage))
            digests.batches.append(hasher.hexdigest())
            digests.samples.append(digest_samples([segments.payload(item.key) for item in items]))
        saved = [version for version in history.checkpoints() if tree.is_surviving(version)]
    for version in saved:
        folder = checkpoint_of(run_dir, version)
        if version.step % (num_steps // 2) == 0 and folder.is_dir():
            digests.parameters[version.step] = digest_tensors(folder / "weights")
            digests.optimizer[version.step] = digest_tensors(folder / "optimizer")
    return digests


def checkpoint_of(run_dir: Path, version: Version) -> Path:
    """Return the folder of a checkpoint."""
    return run_dir / "checkpoints" / f"step_{version.step:08d}-L{version.lineage}"


def differences(ours: RunDigests, theirs: RunDigests) -> list[str]:
    """Return the names of all digests that differ, in the order of a run; empty when all are equal."""
    found = []
    for name, left in asdict(ours).items():
        right = getattr(theirs, name)
        if len(left) != len(right):
            found.append(f"{name}: {len(left)} and {len(right)} digests")
        pairs = ((key, left[key], right.get(key)) for key in left) if isinstance(left, dict) else (
            (step, one, other) for step, (one, other) in enumerate(zip(left, right, strict=False))
        )  # fmt: skip
        found += [f"{name}[{key}]" for key, one, other in pairs if one != other]
    return found


class Scene:
    """A folder with one starting model and the runs that begin from it.

    Args:
        root: where everything goes.
        half: N; the runs take 2N steps.
        seed: of the runs, and of the moments of the kills.
    """

    def __init__(self, root: Path, half: int, seed: int = 0) -> None:
        self.root, self.half, self.seed = root, half, seed
        self.random = random.Random(seed)
        self.model: Path | None = None

    def straight(self, name: str) -> RunDigests:
        """Take 2N steps in one go; the first run also makes the starting model for all others."""
        self._cod("train", str(self._config(name)), "--name", name, "--set", f"run.seed={self.seed}")
        if self.model is None:
            self.model = self.root / name / "model"
        return collect(self.root / name, 2 * self.half)

    def interrupted(self, name: str, moment: KillMoment) -> tuple[RunDigests, Kill]:
        """Take a few more than N steps, kill everything, resume to 2N steps."""
        run_dir = self.root / name
        arguments = ("train", str(self._config(name)), "--name", name, "--set", f"run.seed={self.seed}")
        log = self.root / f"{name}.log"
        with log.open("wb") as output:
            launcher = subprocess.Popen(
                _command(*arguments), stdout=output, stderr=output, env=_environment(), cwd=self.root
            )
            try:
                kill = self._kill_at(run_dir, launcher, moment, log)
            finally:
                _signal_all(launcher, signal.SIGKILL)
                launcher.wait()
        assert checkpoint_of(run_dir, Version(0, self.half)).is_dir()
        assert not checkpoint_of(run_dir, Version(0, 2 * self.half)).exists()
        self._cod("train", "--resume", str(run_dir))
        _complete(kill, run_dir)
        return collect(run_dir, 2 * self.half), kill

    def _kill_at(
        self, run_dir: Path, launcher: subprocess.Popen[bytes], moment: KillMoment, log: Path
    ) -> Kill:
        """Stop all processes at the wanted moment, so that what is seen is what is killed; describe it."""
        target = self.random.randint(self.half, 2 * self.half - max(2, self.half // 2))
        delay_s = self.random.uniform(0.0, 0.3) if moment == "random" else 0.0
        deadline = time.monotonic() + TIMEOUT_S
        while time.monotonic() < deadline:
            assert launcher.poll() is None, log.read_text(errors="replace")[-4000:]
            if _look(run_dir, self.half, moment).step >= target:
                time.sleep(delay_s)
                _signal_all(launcher, signal.SIGSTOP)
                kill = _look(run_dir, self.half, moment)
                if moment == "random" or kill.num_half_played > 0:
                    return kill
                _signal_all(launcher, signal.SIGCONT)
            time.sleep(0.005)
        raise TimeoutError(f"no moment to kill came; see {log}")

    def _config(self, name: str) -> Path:
        path = self.root / f"{name}.toml"
        path.write_text(
            CONFIG.format(
                output_dir=self.root,
                num_steps=2 * self.half,
                checkpoint_every_steps=self.half,
                model=self.model or "",
            )
        )
        return path

    def _cod(self, *arguments: str) -> None:
        done = subprocess.run(
            _command(*arguments),
            capture_output=True,
            text=True,
            env=_environment(),
            cwd=self.root,
            timeout=TIMEOUT_S,
        )
        if done.returncode:
            tail = f"{done.stdout[-4000:]}{done.stderr[-4000:]}"
            raise RuntimeError(f"cod {' '.join(arguments)} ended with {done.returncode}:\n{tail}")


def _command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "cod_async", *arguments]


def _environment() -> dict[str, str]:
    paths = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    return {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}


def _signal_all(launcher: subprocess.Popen[bytes], number: signal.Signals) -> None:
    """Send a signal to the launcher first, so that it starts nothing new, then to all that it has started."""
    if launcher.poll() is not None:
        return
    parent = psutil.Process(launcher.pid)
    if number == signal.SIGKILL:
        parent.suspend()
    children = parent.children(recursive=True)
    if number == signal.SIGSTOP:
        parent.suspend()
        children = parent.children(recursive=True)
    for child in children:
        with contextlib.suppress(psutil.NoSuchProcess):
            child.send_signal(number)
    parent.send_signal(number)


def _look(run_dir: Path, half: int, moment: KillMoment) -> Kill:
    """Return where a run stands; step -1 before the checkpoint of step ``half`` is recorded."""
    nowhere = Kill(moment, -1, 0, 0)
    if not (run_dir / DATABASE_NAME).is_file():
        return nowhere
    try:
        with reading(run_dir) as connection:
            history = HistoryTable(connection)
            if Version(0, half) not in history.checkpoints():
                return nowhere
            held, half_played = connection.execute(
                "SELECT count(*), coalesce(sum(next_ordinal > 0), 0) FROM leases WHERE state = 'held'"
            ).fetchone()
            return Kill(moment, history.current_step(0), int(held), int(half_played))
    except (sqlite3.Error, StoreError):  # it is being made
        return nowhere


def _complete(kill: Kill, run_dir: Path) -> None:
    """Add what the resumed run's database says."""
    with reading(run_dir) as connection:
        (kill.num_rolled_back,) = connection.execute(
            "SELECT coalesce(sum(num_rolled_back), 0) FROM lineages"
        ).fetchone()
        kill.num_continued, kill.max_lag = connection.execute(
            "SELECT sum(lease_epoch > 0), max(lag_steps) FROM step_items JOIN steps USING (lineage, step) "
            "WHERE state = 'done'"
        ).fetchone()
    summary = json.loads((run_dir / "summary.json").read_text())
    kill.is_balanced = bool(summary["ledger"]["balanced"])


def table(half: int, straight: RunDigests, others: dict[str, RunDigests]) -> str:
    """Return the digests side by side, shortened to 16 digits."""
    columns = {"straight": straight, **others}
    lines = ["  ".join(["what".ljust(22), *(name.ljust(18) for name in columns), "equal"])]

    def add(what: str, values: list[str]) -> None:
        equal = "yes" if len(set(values)) == 1 else "NO"
        lines.append("  ".join([what.ljust(22), *(value[:16].ljust(18) for value in values), equal]))

    for name in ("parameters", "optimizer"):
        for step in (half, 2 * half):
            add(f"{name} at {step}", [getattr(one, name).get(step, "missing") for one in columns.values()])
    for name in ("weights", "batches", "samples"):
        chains = [
            hashlib.sha256("".join(getattr(one, name)).encode()).hexdigest() for one in columns.values()
        ]
        add(f"{name} of all {len(getattr(straight, name))}", chains)
    return "\n".join(lines)


def main() -> int:
    """Run the comparison and write the report; return 0 if all digests are equal."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--half", type=int, default=20, help="N: 2N steps against N, kill, N (default 20)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kills", type=int, default=2, help="runs killed for each kind of moment")
    parser.add_argument("--out", type=Path, default=REPORT)
    parser.add_argument("--keep", type=Path, help="work in this new folder and keep it")
    options = parser.parse_args()
    root = options.keep or Path(tempfile.mkdtemp(prefix="cod-resume-"))
    root.mkdir(parents=True, exist_ok=True)
    try:
        report = compare(Scene(root.resolve(), options.half, options.seed), options.kills)
    finally:
        if options.keep is None:
            shutil.rmtree(root, ignore_errors=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    options.out.write_text(json.dumps(report, indent=2) + "\n")
    print(f"written: {options.out}")
    return 0 if report["is_bit_exact"] else 1


def compare(scene: Scene, num_kills: int) -> dict[str, Any]:
    """Run A once and B ``num_kills`` times for each kind of moment; print and return the report."""
    straight = scene.straight("straight")
    others: dict[str, RunDigests] = {}
    kills: dict[str, Kill] = {}
    for moment in ("random", "mid_generation"):
        for number in range(num_kills):
            name = f"{moment}-{number}"
            others[name], kills[name] = scene.interrupted(name, moment)
            print(name, asdict(kills[name]), differences(straight, others[name]) or "equal", flush=True)
    print(table(scene.half, straight, others))
    found = {name: differences(straight, one) for name, one in others.items()}
    return {
        "half_steps": scene.half,
        "seed": scene.seed,
        "is_bit_exact": not any(found.values()),
        "differences": found,
        "kills": {name: asdict(kill) for name, kill in kills.items()},
        "digests": {"straight": asdict(straight), **{name: asdict(one) for name, one in others.items()}},
    }


if __name__ == "__main__":
    sys.exit(main())
