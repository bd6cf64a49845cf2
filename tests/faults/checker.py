"""An independent judge of a finished run: reads the files it left and believes none of its programs.

Nothing here imports the project. The run database is read with plain sqlite3, checkpoints with json and
hashlib, and the history of the weights is walked anew from the lineages: so a wrong idea in the store, the
ledger or the learner cannot excuse itself. The actors' acknowledgement journals are the witness for what was
promised to be durable.

    python -m tests.faults.checker RUN [ACK_FOLDER]
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sqlite3
import struct
import sys
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Key = tuple[int, int, int]
At = tuple[int, int]
"""(lineage, step) of a step or a version."""


@dataclass
class Verdict:
    """What was checked and what was wrong.

    Attributes:
        problems: one sentence for each broken promise; empty for a good run.
        counts: sizes of what was looked at, for the report.
    """

    problems: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)

    def expect(self, is_true: bool, problem: str) -> None:
        """Note a problem unless ``is_true``; at most fifty are kept."""
        if not is_true and len(self.problems) < 50:
            self.problems.append(problem)


class History:
    """The surviving history: which steps lead to the weights that the run ended with."""

    def __init__(self, database: sqlite3.Connection) -> None:
        rows = database.execute("SELECT lineage, parent, branch_step FROM lineages").fetchall()
        self.parents: dict[int, tuple[int | None, int]] = {line: (up, step) for line, up, step in rows}
        self.newest = max(self.parents, default=-1)
        self.digests = {
            (line, step): digest
            for line, step, digest in database.execute("SELECT lineage, step, digest FROM versions")
        }

    def path(self, end: int) -> list[At]:
        """Return (lineage, step) of the steps that lead to step ``end`` of the newest lineage, in order."""
        return [self.step_taken(step) for step in range(end)]

    def step_taken(self, step: int) -> At:
        """Return the step number ``step`` of the surviving history: from which lineage's weights."""
        line: int | None = self.newest
        while line is not None:
            parent, branch = self.parents[line]
            if step >= branch:
                return line, step
            line = parent
        raise ValueError(f"no lineage reaches back to step {step}")

    def version_at(self, line: int, step: int) -> At:
        """Return the version that the history of ``line`` has at ``step``: a branch shares its parent's."""
        while True:
            parent, branch = self.parents[line]
            if parent is None or step >= branch:
                return line, step
            line = parent

    def birth(self, line: int, step: int) -> int:
        """Return the step of the surviving history that a token of version (line, step) counts as.

        The last step at which both histories had the same weights: shared ones, or ones published with equal
        digests.
        """
        birth = 0
        for at in range(step + 1):
            theirs, ours = self.version_at(line, at), self.version_at(self.newest, at)
            same = theirs == ours or (
                theirs in self.digests and self.digests.get(theirs) == self.digests.get(ours)
            )
            if not same and theirs in self.digests:
                break
            birth = at if same else birth
        return birth


def check_run(run: Path, acks: Path | None = None, *, num_steps: int | None = None) -> Verdict:
    """Check a finished run.

    Args:
        run: run folder.
        acks: folder of the actors' acknowledgement journals.
        num_steps: steps that the run must have; None takes its configuration's.
    """
    verdict = Verdict()
    config = json.loads((run / "config.json").read_text())
    wanted = num_steps or int(config["run"]["num_steps"])
    with contextlib.closing(sqlite3.connect(f"file:{run / 'run.sqlite'}?mode=ro", uri=True)) as database:
        damage = database.execute("PRAGMA integrity_check").fetchone()[0]
        verdict.expect(damage == "ok", f"the database is damaged: {damage}")
        history = History(database)
        _check_end(verdict, run, database)
        _check_steps(verdict, database, history, wanted)
        trained = _check_trained_once(verdict, database, history, wanted)
        _check_lag(verdict, database, history, trained, int(config["staleness"]["max_lag"]))
        _check_chain(verdict, run, database, history, wanted)
        _check_winners(verdict, database)
        _check_counts(verdict, database)
        if acks is not None:
            _check_acks(verdict, database, acks)
        _count(verdict, database)
    return verdict


def _check_end(verdict: Verdict, run: Path, database: sqlite3.Connection) -> None:
    summary = json.loads((run / "summary.json").read_text())
    verdict.expect(summary["status"] == "finished", f"summary.json says {summary['status']}")
    reason = database.execute("SELECT value FROM meta WHERE name = 'finished'").fetchone()
    verdict.expect(bool(reason and reason[0]), "the database does not say that the run is over")
    live = database.execute("SELECT count(*) FROM sessions WHERE state = 'live'").fetchone()[0]
    verdict.expect(live == 0, f"{live} sessions are still live")
    held = database.execute("SELECT count(*) FROM leases WHERE state IN ('held', 'free')").fetchone()[0]
    verdict.expect(held == 0, f"{held} lifecycles are neither ended nor given up")


def _check_steps(verdict: Verdict, database: sqlite3.Connection, history: History, wanted: int) -> None:
    """The surviving history has every step exactly once; everything else is rolled back."""
    path = set(history.path(wanted))
    states = {(a, b): state for a, b, state in database.execute("SELECT lineage, step, state FROM steps")}
    for at in sorted(path):
        verdict.expect(states.get(at) == "done", f"step {at} of the surviving history is {states.get(at)}")
    for at, state in sorted(states.items()):
        verdict.expect(at in path or state == "rolled_back", f"step {at} is abandoned but {state}")


def _check_trained_once(
    verdict: Verdict, database: sqlite3.Connection, history: History, wanted: int
) -> dict[Key, At]:
    """No segment twice in the surviving history, and the segments table tells the same story."""
    trained: dict[Key, At] = {}
    rows = database.execute("SELECT lineage, step, grp, member, ordinal FROM step_items").fetchall()
    items: dict[At, list[Key]] = defaultdict(list)
    for line, step, *key in rows:
        items[line, step].append((key[0], key[1], key[2]))
    for at in history.path(wanted):
        verdict.expect(bool(items[at]), f"step {at} trained on nothing")
        for key in items[at]:
            verdict.expect(key not in trained, f"segment {key} is trained in {trained.get(key)} and in {at}")
            trained[key] = at
    told = {
        (g, m, o): (line, step)
        for g, m, o, line, step in database.execute(
            "SELECT grp, member, ordinal, trained_lineage, trained_step FROM segments WHERE state = 'trained'"
        )
    }
    for key in sorted(told.keys() ^ trained.keys())[:5]:
        verdict.expect(False, f"segment {key}: trained {trained.get(key)}, its row says {told.get(key)}")
    for key in sorted(told.keys() & trained.keys()):
        verdict.expect(
            told[key] == trained[key], f"segment {key}: trained {trained[key]}, row says {told[key]}"
        )
    return trained


def _check_lag(
    verdict: Verdict, database: sqlite3.Connection, history: History, trained: dict[Key, At], max_lag: int
) -> None:
    """No trained token is older than the bound, by the checker's own walk along the lineages."""
    births: dict[At, int] = {}
    worst = 0
    for g, m, o, spans in database.execute(
        "SELECT grp, member, ordinal, version_tokens FROM segments WHERE state = 'trained'"
    ).fetchall():
        at = trained.get((g, m, o))
        if at is None:
            continue
        for line, step, num_tokens in json.loads(spans):
            if num_tokens == 0:
                continue
            if (line, step) not in history.digests:
                verdict.expect(False, f"segment {(g, m, o)}: version {(line, step)} was never published")
                continue
            birth = births.setdefault((line, step), history.birth(line, step))
            worst = max(worst, at[1] - birth)
            verdict.expect(
                at[1] - birth <= max_lag, f"segment {(g, m, o)}: lag {at[1] - birth} over {max_lag} in {at}"
            )
    told = database.execute(
        "SELECT coalesce(max(lag_steps), 0) FROM step_items JOIN steps USING (lineage, step) "
        "WHERE steps.state = 'done'"
    ).fetchone()[0]
    verdict.expect(int(told) <= max_lag, f"the database tells of lag {told}, the bound is {max_lag}")
    verdict.counts["max_lag"] = worst


def _check_chain(
    verdict: Verdict, run: Path, database: sqlite3.Connection, history: History, wanted: int
) -> None:
    """The digests of plans, steps and checkpoints are one chain over the surviving history."""
    chain = [""]
    for at in history.path(wanted):
        columns = "grp, member, ordinal, lease_epoch, advantage"
        items = database.execute(
            f"SELECT {columns} FROM step_items WHERE lineage = ?1 AND step = ?2 "  # noqa: S608
            f"UNION ALL SELECT {columns} FROM step_replays WHERE lineage = ?1 AND step = ?2 "
            "ORDER BY grp, member, ordinal",
            at,
        ).fetchall()
        plan = hashlib.sha256(b"".join(struct.pack("<qqqqd", *item) for item in items)).hexdigest()
        chain.append(hashlib.sha256((chain[-1] + plan).encode("ascii")).hexdigest())
        row = database.execute(
            "SELECT plan_digest, trained_digest FROM steps WHERE lineage = ? AND step = ?", at
        ).fetchone()
        if row != (plan, chain[-1]):  # what follows in the chain can only be wrong too
            verdict.expect(False, f"step {at}: recorded digests are not those of its items")
            return
    last: At | None = None
    for folder in sorted((run / "checkpoints").glob("step_*-L*")):
        if folder.suffix in (".tmp", ".partial"):
            continue
        record = json.loads((folder / "trainer.json").read_text())
        line, step = int(record["version"]["lineage"]), int(record["version"]["step"])
        for name, digest in record["files"].items():
            own = hashlib.sha256((folder / name).read_bytes()).hexdigest()
            verdict.expect(own == digest, f"{folder.name}/{name} does not match its digest")
        if history.version_at(history.newest, step) == (line, step) and step <= wanted:
            verdict.expect(
                record["trained_digest"] == chain[step], f"{folder.name}: not the digest of its history"
            )
            last = max(last or (line, step), (line, step), key=lambda version: version[1])
            known = database.execute(
                "SELECT digest FROM checkpoints WHERE lineage = ? AND step = ?", (line, step)
            ).fetchone()
            verdict.expect(
                known is None or known[0] == record["digest"], f"{folder.name}: another digest is recorded"
            )
    verdict.expect(
        last is not None and last[1] == wanted, f"the last checkpoint is {last}, not step {wanted}"
    )


def _check_winners(verdict: Verdict, database: sqlite3.Connection) -> None:
    """Each lifecycle is one unbroken line of episodes, each from the actor that held the lease just then."""
    lives: dict[tuple[int, int], list[tuple[int, int, int, int]]] = defaultdict(list)
    for g, m, o, epoch, session, is_last in database.execute(
        "SELECT grp, member, ordinal, lease_epoch, session, is_last FROM segments ORDER BY 1, 2, 3"
    ):
        lives[g, m].append((o, epoch, session, is_last))
    holders = {
        (g, m, epoch): session
        for g, m, epoch, session in database.execute(
            "SELECT grp, member, lease_epoch, session FROM lease_epochs"
        )
    }
    for life, episodes in lives.items():
        ordinals = [episode[0] for episode in episodes]
        epochs = [episode[1] for episode in episodes]
        verdict.expect(ordinals == list(range(len(ordinals))), f"lifecycle {life} has episodes {ordinals}")
        verdict.expect(epochs == sorted(epochs), f"lifecycle {life}: lease epochs go back: {epochs}")
        verdict.expect(
            not any(episode[3] for episode in episodes[:-1]), f"lifecycle {life} goes on after its end"
        )
        for ordinal, epoch, session, _ in episodes:
            verdict.expect(
                holders.get((*life, epoch)) == session,
                f"lifecycle {life}, episode {ordinal}: from session {session}, epoch {epoch} was granted to "
                f"{holders.get((*life, epoch))}",
            )
    lost = database.execute("SELECT count(*) FROM segments WHERE state = 'trained' AND payload IS NULL")
    verdict.expect(lost.fetchone()[0] == 0, "trained segments have no payload although all are kept")


def _check_counts(verdict: Verdict, database: sqlite3.Connection) -> None:
    """Nothing is left between the states; of actors that said goodbye every segment is accounted for."""
    left = database.execute(
        "SELECT count(*) FROM segments WHERE state IN ('waiting', 'ready', 'planned')"
    ).fetchone()[0]
    verdict.expect(left == 0, f"{left} segments of a finished run are neither trained nor dropped")
    received: Counter[tuple[str, int]] = Counter()
    for table in ("segments", "refused_segments"):
        for name, instance, count in database.execute(
            "SELECT name, instance, count(*) FROM "  # noqa: S608  (the names are written above)
            f"{table} JOIN sessions USING (session) GROUP BY 1, 2"
        ):
            received[name, instance] += count
    newest: dict[tuple[str, int], tuple[str, dict[str, float]]] = {}
    for name, instance, state, text in database.execute(
        "SELECT name, instance, state, counters FROM sessions WHERE role = 'actor' ORDER BY session"
    ):
        newest[name, instance] = state, json.loads(text)
    for client, (state, counters) in newest.items():
        if state != "ended":
            continue  # killed: what it did after its last heartbeat nobody knows
        discarded = sum(n for reason, n in counters.items() if reason.startswith("discarded_segments_"))
        sealed, outbox = counters.get("sealed_segments", 0), counters.get("outbox_segments", 0)
        verdict.expect(
            sealed == received[client] + discarded + outbox,
            f"{client[0]} sealed {sealed:g} segments, {received[client]} are in the database, "
            f"{discarded:g} discarded, {outbox:g} undelivered",
        )


def _check_acks(verdict: Verdict, database: sqlite3.Connection, acks: Path) -> None:
    """Whatever an actor was told is in the database is there, and what it was told was refused is not.

    Segments of a lifecycle that started anew were committed once, and are known by that reason.
    """
    committed = {
        (g, m, o): epoch
        for g, m, o, epoch in database.execute("SELECT grp, member, ordinal, lease_epoch FROM segments")
    }
    refused = {
        (g, m, o, epoch)
        for g, m, o, epoch in database.execute(
            "SELECT grp, member, ordinal, lease_epoch FROM refused_segments"
        )
    }
    restarted = set(
        database.execute(
            "SELECT grp, member, ordinal, lease_epoch FROM refused_segments WHERE reason = 'restarted'"
        )
    )
    num_acked = num_refused = 0
    for path in sorted(acks.glob("*.jsonl")):
        for text in path.read_text().splitlines():
            line: dict[str, Any] = json.loads(text)
            if line.get("is_full"):
                continue
            key, epoch = (line["group"], line["member"], line["ordinal"]), line["lease_epoch"]
            if line["reason"] is None:
                num_acked += 1
                verdict.expect(
                    committed.get(key) == epoch or (*key, epoch) in restarted,
                    f"{path.name}: {key} of epoch {epoch} was acknowledged, the database has "
                    f"{committed.get(key)}",
                )
            elif line["reason"] != "fenced_before_send":
                num_refused += 1
                verdict.expect(
                    (*key, epoch) in refused and committed.get(key) != epoch,
                    f"{path.name}: {key} of epoch {epoch} was settled as {line['reason']}, which is unknown",
                )
    verdict.expect(num_acked > 0, "the journals hold no acknowledgement at all")
    verdict.counts["acked"], verdict.counts["refused"] = num_acked, num_refused


def _count(verdict: Verdict, database: sqlite3.Connection) -> None:
    for name, query in {
        "segments": "SELECT count(*) FROM segments",
        "trained": "SELECT count(*) FROM segments WHERE state = 'trained'",
        "lineages": "SELECT count(*) FROM lineages",
        "rolled_back_steps": "SELECT count(*) FROM steps WHERE state = 'rolled_back' AND done_at IS NOT NULL",
        "sessions": "SELECT count(*) FROM sessions",
        "takeovers": "SELECT coalesce(sum(num_takeovers), 0) FROM leases",
    }.items():
        verdict.counts[name] = int(database.execute(query).fetchone()[0])


def main() -> int:
    """Check the run named on the command line, print what was found."""
    run, *rest = (Path(argument) for argument in sys.argv[1:])
    verdict = check_run(run, *rest)
    print(json.dumps({"problems": verdict.problems, "counts": verdict.counts}, indent=1))
    return 1 if verdict.problems else 0


if __name__ == "__main__":
    sys.exit(main())
