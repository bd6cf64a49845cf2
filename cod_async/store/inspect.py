"""Looking into a run database: its lifecycles, segments, versions and lags as JSON-able values.

Token ids are returned as numbers; turning them into text needs the model's tokenizer and is the caller's
business.
"""

from __future__ import annotations

import contextlib
import re
import sqlite3
from pathlib import Path
from typing import Any

import msgspec

from cod_async.errors import InputError
from cod_async.lifecycle.segment import Row, Segment, SegmentKey
from cod_async.store.history import HistoryTable
from cod_async.store.lineage import LineageTree
from cod_async.store.schema import connect_reader
from cod_async.store.segments import SegmentRow, SegmentTable, select_rows

_KEY = re.compile(r"g(\d{1,18})\.m(\d{1,18})\.o(\d{1,18})")
DEFAULT_LIMIT = 200


def inspect_run(path: Path, segment: str | None = None, limit: int = DEFAULT_LIMIT) -> dict[str, Any]:
    """Return what a run holds, or everything about one segment.

    Args:
        path: run folder, or its database file.
        segment: a segment id such as ``g000012.m03.o04``; None for the overview.
        limit: most lifecycles and segments listed, newest groups first.

    Returns:
        Overview: ``{lineages, versions, checkpoints, steps, lifecycles, segments, lags}``. One segment: its
            columns, its rows with token ids, spans, log-probs and versions, its state, and the steps that it
            was planned in.

    Raises:
        StoreError: there is no run database at ``path``.
        InputError: the segment id is malformed or unknown.
    """
    with contextlib.closing(connect_reader(path)) as connection:
        if segment is not None:
            return _one_segment(connection, _parse(segment))
        connection.execute("BEGIN")
        answer = _overview(connection, limit)
        connection.execute("COMMIT")
        return answer


def lifecycle_segments(path: Path, group: int, member: int) -> list[Segment]:
    """Return the kept segments of one lifecycle in order, for transcripts.

    Raises:
        StoreError: there is no run database at ``path``.
    """
    with contextlib.closing(connect_reader(path)) as connection:
        rows = connection.execute(
            "SELECT body FROM segments JOIN payloads USING (payload) WHERE grp = ? AND member = ? ORDER BY "
            "ordinal",
            (group, member),
        )
        return [msgspec.msgpack.decode(body, type=Segment) for (body,) in rows]


def _parse(text: str) -> SegmentKey:
    match = _KEY.fullmatch(text)
    if match is None:
        raise InputError(f"segment {text!r}: not a segment id; it looks like g000012.m03.o04")
    return SegmentKey(*(int(number) for number in match.groups()))


def _overview(connection: sqlite3.Connection, limit: int) -> dict[str, Any]:
    lineages = connection.execute(
        "SELECT lineage, parent, branch_step, num_rolled_back FROM lineages ORDER BY lineage"
    ).fetchall()
    versions = connection.execute(
        "SELECT lineage, step, digest FROM versions ORDER BY lineage, step"
    ).fetchall()
    checkpoints = connection.execute(
        "SELECT lineage, step, path FROM checkpoints ORDER BY lineage, step"
    ).fetchall()
    steps = connection.execute("SELECT state, count(*) FROM steps GROUP BY state").fetchall()
    tree = HistoryTable(connection).tree()
    return {
        "lineages": [
            {"lineage": a, "parent": b, "branch_step": c, "num_rolled_back": d} for a, b, c, d in lineages
        ],
        "versions": [{"version": f"{a}.{b}", "digest": digest} for a, b, digest in versions],
        "checkpoints": [{"version": f"{a}.{b}", "path": path} for a, b, path in checkpoints],
        "steps": dict(steps),
        "groups": dict(connection.execute("SELECT state, count(*) FROM groups GROUP BY state").fetchall()),
        "lifecycles": _lifecycles(connection, limit),
        "segments": [_summary(row, tree) for row in _newest_rows(connection, limit)],
        "num_segments": connection.execute("SELECT count(*) FROM segments").fetchone()[0],
        "lags": _lags(connection),
    }


def _lifecycles(connection: sqlite3.Connection, limit: int) -> list[dict[str, Any]]:
    rows = connection.execute(
        "SELECT leases.grp, leases.member, environment, preset, leases.state, leases.reason, lease_epoch, "
        "next_ordinal, "
        "pack_size, (SELECT json_group_array(reward) FROM (SELECT reward FROM segments WHERE "
        "segments.grp = leases.grp AND segments.member = leases.member AND kind = 'solve' ORDER BY ordinal)) "
        "FROM leases JOIN groups USING (grp) ORDER BY leases.grp DESC, leases.member LIMIT ?",
        (limit,),
    )
    names = (
        "group",
        "member",
        "environment",
        "preset",
        "state",
        "reason",
        "lease_epoch",
        "next_ordinal",
        "pack_size",
    )
    return [
        {**dict(zip(names, values[:-1], strict=True)), "task_rewards": msgspec.json.decode(values[-1])}
        for values in rows
    ]


def _newest_rows(connection: sqlite3.Connection, limit: int) -> list[SegmentRow]:
    return select_rows(connection, "ORDER BY grp DESC, member, ordinal LIMIT ?", (limit,))


def _summary(row: SegmentRow, tree: LineageTree | None) -> dict[str, Any]:
    return {
        "segment": str(row.key),
        "lease_epoch": row.lease_epoch,
        "kind": row.kind,
        "position": row.position,
        "reward": row.reward,
        "finish": row.finish,
        "num_tokens": row.num_tokens,
        "num_action_tokens": row.num_action_tokens,
        "oldest_version": str(row.oldest),
        "newest_version": str(row.newest),
        "counts_as_step": None if tree is None else tree.birth(row.oldest).step,
        "return": row.return_value,
        "advantage": row.advantage,
        "state": row.state,
        "drop_reason": row.drop_reason,
    }


def _lags(connection: sqlite3.Connection) -> dict[str, Any]:
    """Return the histogram of the lag of the oldest token over all trained segments, in steps."""
    rows = connection.execute(
        "SELECT lag_steps, count(*) FROM step_items JOIN segments USING (grp, member, ordinal) "
        "WHERE segments.trained_lineage = lineage AND segments.trained_step = step GROUP BY lag_steps "
        "ORDER BY lag_steps"
    ).fetchall()
    total = sum(count for _, count in rows)
    return {
        "num_segments": total,
        "mean": sum(lag * count for lag, count in rows) / total if total else None,
        "max": max((lag for lag, _ in rows), default=None),
        "histogram": {str(lag): count for lag, count in rows},
    }


def _one_segment(connection: sqlite3.Connection, key: SegmentKey) -> dict[str, Any]:
    at = (key.group, key.member, key.ordinal)
    found = select_rows(connection, "WHERE grp = ? AND member = ? AND ordinal = ?", at)
    if not found:
        raise InputError(f"segment {key}: not in this run; cod inspect without --segment lists what is")
    steps = connection.execute(
        "SELECT lineage, step, advantage, lag_steps, state FROM step_items JOIN steps USING (lineage, step) "
        "WHERE grp = ? AND member = ? AND ordinal = ? ORDER BY lineage, step",
        at,
    )
    answer = _summary(found[0], HistoryTable(connection).tree())
    answer["steps"] = [
        {"version": f"{a}.{b}", "advantage": advantage, "lag_steps": lag, "state": state}
        for a, b, advantage, lag, state in steps
    ]
    has_payload = connection.execute(
        "SELECT payload IS NOT NULL FROM segments WHERE grp = ? AND member = ? AND ordinal = ?", at
    ).fetchone()[0]
    answer["has_payload"] = bool(has_payload)
    if has_payload:
        segment = SegmentTable(connection).payload(key)
        answer |= {
            "actor": segment.actor,
            "environment": segment.environment,
            "preset": segment.preset,
            "pack_seed": segment.pack_seed,
            "raw_reward": segment.raw_reward,
            "is_last": segment.is_last,
            "wall_s": segment.wall_s,
            "metrics": segment.metrics,
            "state_after": {
                "next_ordinal": segment.state_after.next_ordinal,
                "hint": segment.state_after.hint,
                "task_rewards": list(segment.state_after.task_rewards),
                "num_environment_bytes": len(segment.state_after.environment_state),
            },
            "rows": [_token_row(row) for row in segment.rows],
        }
    return answer


def _token_row(row: Row) -> dict[str, Any]:
    return {
        "token_ids": row.token_ids.numpy().tolist(),
        "action_spans": [list(span) for span in row.action_spans],
        "behavior_logprobs": row.behavior_logprobs.numpy().tolist(),
        "versions": [[str(span.version), span.num_tokens] for span in row.versions],
    } | (
        {}
        if row.teacher_logprobs is msgspec.UNSET
        else {"teacher_logprobs": row.teacher_logprobs.numpy().tolist()}
    )
