"""The ledger: everything generated is trained, dropped, lost or in flight, each by name, and it must add up.

What was *generated* is counted by the actors and their engines and travels with heartbeats, independently of
the segments table; what became of it is counted from the database. For an actor that lives or that said
goodbye the two must agree exactly; of one that was killed only the difference is known, and it is named
``actor_lost``.

Counters of an actor process (role ``actor``), cumulative over the life of the process, also across sessions:

``sealed_segments``               episodes sealed into segments.
``sampled_tokens``                every token its engine ever sampled.
``aborted_tokens``                sampled for requests that were cancelled; returned to nobody.
``open_tokens``                   now: sampled in episodes that are not sealed yet.
``outbox_segments``, ``outbox_tokens``   now: sealed and not settled by the coordinator.
``discarded_segments_<reason>``   sealed and thrown away by the actor itself, before anybody settled them.
``discarded_tokens_<reason>``     the tokens of those, and of unsealed episodes that were thrown away.

So for each process ``sealed = received + outbox + discarded`` and ``sampled = received + outbox + open +
aborted + discarded``, where *received* is what the coordinator settled. Tokens are generated tokens
throughout.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections import Counter, defaultdict
from pathlib import Path
from typing import Any, Literal, NamedTuple

import msgspec

from cod_async.store.schema import connect_reader

Unit = Literal["segments", "tokens"]
ACTOR_LOST = "actor_lost"
UNDELIVERED = "undelivered"
_GENERATED = {"segments": "sealed_segments", "tokens": "sampled_tokens"}


class _Process(NamedTuple):
    """One actor process: its latest counters, how its last session stands, and what was received of it."""

    name: str
    state: str
    counters: dict[str, float]
    received: Counter[str]


class _Account(NamedTuple):
    """One process's part of the ledger in one unit."""

    generated: int
    lost: Counter[str]
    in_flight: int
    problem: str


def ledger(path: Path) -> dict[str, Any]:
    """Return the ledger of a run.

    Args:
        path: run folder, or its database file.

    Returns:
        ``{segments: {generated, trained, dropped: {reason: n}, lost: {reason: n}, in_flight}, tokens: {the
        same}, balanced}``, and ``replayed: {segments, tokens}`` when trained segments were used again: those
        are counted as trained once, and their further uses only there. ``balanced`` is true when generated =
        trained + dropped + lost + in flight in both units and every process adds up by itself.

    Raises:
        StoreError: there is no run database at ``path``.
    """
    answer, _ = ledger_with_problems(path)
    return answer


def ledger_with_problems(path: Path) -> tuple[dict[str, Any], list[str]]:
    """Return the ledger and one sentence for everything in it that does not add up."""
    with contextlib.closing(connect_reader(path)) as connection:
        connection.execute("BEGIN")  # one snapshot for all counts
        fates = _fates(connection)
        processes = _processes(connection)
        replayed = _replayed(connection)
        connection.execute("COMMIT")
    answer: dict[str, Any] = {}
    problems: list[str] = []
    units: tuple[Unit, Unit] = ("segments", "tokens")
    for unit in units:
        accounts = [_account(process, unit) for process in processes]
        problems += [account.problem for account in accounts if account.problem]
        lost: Counter[str] = sum((account.lost for account in accounts), Counter())
        dropped = {
            fate[1]: count for fate, count in sorted(fates[unit].items()) if fate[0] == "dropped" and count
        }
        stored = sum(fates[unit][state, ""] for state in ("waiting", "ready", "planned"))
        part: dict[str, Any] = {
            "generated": sum(account.generated for account in accounts),
            "trained": fates[unit]["trained", ""],
            "dropped": dropped,
            "lost": {reason: count for reason, count in sorted(lost.items()) if count},
            "in_flight": stored + sum(account.in_flight for account in accounts),
        }
        accounted = part["trained"] + sum(dropped.values()) + sum(lost.values()) + part["in_flight"]
        if accounted != part["generated"]:
            problems.append(f"{unit}: {part['generated']} were generated, {accounted} are accounted for")
        answer[unit] = part
    answer["balanced"] = not problems
    if replayed["segments"]:
        answer["replayed"] = replayed
    return answer, problems


def _fates(connection: sqlite3.Connection) -> dict[str, Counter[tuple[str, str]]]:
    """Return the number of segments and of tokens by (state, reason)."""
    fates: dict[str, Counter[tuple[str, str]]] = {"segments": Counter(), "tokens": Counter()}
    rows = connection.execute(
        "SELECT state, drop_reason, count(*), sum(num_action_tokens) FROM segments GROUP BY state, "
        "drop_reason "
        "UNION ALL SELECT 'dropped', reason, count(*), sum(num_action_tokens) FROM refused_segments GROUP "
        "BY reason"
    )
    for state, reason, num_segments, num_tokens in rows:
        fates["segments"][state, reason] += num_segments
        fates["tokens"][state, reason] += num_tokens
    return fates


def _replayed(connection: sqlite3.Connection) -> dict[str, int]:
    """Return how many segments and action tokens the surviving steps used again, counted per use."""
    found = connection.execute(
        "SELECT count(*), coalesce(sum(num_action_tokens), 0) FROM step_replays "
        "JOIN steps USING (lineage, step) JOIN segments USING (grp, member, ordinal) "
        "WHERE steps.state = 'done'"
    ).fetchone()
    return {"segments": int(found[0]), "tokens": int(found[1])}


def _processes(connection: sqlite3.Connection) -> list[_Process]:
    """Return the actor processes, each with the sum over its sessions of what was received."""
    received: dict[int, Counter[str]] = defaultdict(Counter)
    for table in ("segments", "refused_segments"):
        rows = connection.execute(
            f"SELECT session, count(*), sum(num_action_tokens) FROM {table} GROUP BY session"  # noqa: S608
        )
        for session, num_segments, num_tokens in rows:
            received[session].update(segments=num_segments, tokens=num_tokens)
    found: dict[tuple[str, int], _Process] = {}
    sessions = connection.execute(
        "SELECT session, name, instance, state, counters FROM sessions WHERE role = 'actor' ORDER BY session"
    )
    for session, name, instance, state, text in sessions:
        # A client that draws no instance cannot be recognized again: each session is a process of its own.
        key = (name, instance or -session)
        before = found.get(key)
        counters = msgspec.json.decode(text, type=dict[str, float])
        if before is not None:
            counters = counters or before.counters
            received[session].update(before.received)
        found[key] = _Process(name, state, counters, received[session])
    return list(found.values())


def _account(process: _Process, unit: Unit) -> _Account:
    """Balance one process in one unit."""
    counters = process.counters
    prefix = f"discarded_{unit}_"
    lost: Counter[str] = Counter(
        {name.removeprefix(prefix): int(value) for name, value in counters.items() if name.startswith(prefix)}
    )
    lost["aborted"] += int(counters.get("aborted_tokens", 0)) if unit == "tokens" else 0
    open_now = int(counters.get("open_tokens", 0)) if unit == "tokens" else 0
    outbox = int(counters.get(f"outbox_{unit}", 0))
    reported = int(counters.get(_GENERATED[unit], 0))
    received = process.received[unit]
    rest = reported - received - lost.total()
    if process.state == "lost":
        lost[ACTOR_LOST] += max(0, rest)
        return _Account(received + lost.total(), lost, 0, "")
    if process.state == "live":
        # What was settled when the report was made is in the database, or an acknowledgement was a lie.
        settled = reported - lost.total() - outbox - open_now
        is_lie = unit == "segments" and settled > received
        problem = f"{process.name}: {settled} {unit} were acknowledged, {received} are here" if is_lie else ""
        return _Account(received + lost.total() + max(0, rest), lost, max(0, rest), problem)
    if rest < 0 and lost[UNDELIVERED] >= -rest:
        lost[UNDELIVERED] += rest  # they had arrived after all; only the acknowledgement was late
        rest = 0
    lost[UNDELIVERED] += max(0, min(rest, outbox + open_now))
    missing = reported - received - lost.total()
    problem = (
        f"{process.name} said goodbye with {reported} {unit}, {reported - missing} are known"
        if missing
        else ""
    )
    return _Account(reported, lost, 0, problem)
