"""One example of every message of the protocol, and a segment that passes every check."""

from __future__ import annotations

from typing import Any

import numpy as np
from msgspec.structs import replace

from cod_async.lifecycle.arrays import Array
from cod_async.lifecycle.segment import (
    LifecycleState,
    PendingUpdate,
    Row,
    RowParent,
    Segment,
    SegmentKey,
    Transcript,
    Version,
    VersionSpan,
)
from cod_async.lifecycle.transcript import mark_after
from cod_async.weights.manifest import Manifest, Shard
from cod_async.wire import messages as m

RUN = "run-1"


def make_row(
    num_tokens: int = 12, spans: tuple[tuple[int, int], ...] = ((4, 7), (9, 12)), step: int = 3
) -> Row:
    num_actions = sum(stop - start for start, stop in spans)
    return Row(
        token_ids=Array.of(np.arange(num_tokens) % 97, "<i4"),
        action_spans=spans,
        behavior_logprobs=Array.of(-0.25 * np.arange(num_actions), "<f4"),
        versions=(VersionSpan(Version(0, step), num_actions),) if num_actions else (),
    )


def make_segment(
    group: int = 1, member: int = 0, ordinal: int = 0, pack_size: int = 4, **changes: Any
) -> Segment:
    position, is_solve = ordinal // 2, ordinal % 2 == 0
    is_last = ordinal == 2 * pack_size - 2
    state = LifecycleState(
        next_ordinal=ordinal + 1,
        hint="red goes up",
        task_rewards=(0.5,) * (position + 1),
        pending=PendingUpdate("I pressed red.", 0.5, "You did it.") if is_solve and not is_last else None,
        environment_state=b"\x00\x01",
    )
    segment = Segment(
        run=RUN,
        key=SegmentKey(group, member, ordinal),
        lease_epoch=2,
        actor="actor-0",
        environment="hidden_buttons",
        preset="cross",
        pack_seed=(1 << 64) - 1,
        kind="solve" if is_solve else "update",
        position=position,
        rows=(make_row(),),
        reward=0.5,
        raw_reward=0.6,
        finish="success",
        is_last=is_last,
        state_after=state,
        metrics={"num_steps": 2.0},
        wall_s=0.125,
    )
    return replace(segment, **changes)


def make_delta(**changes: Any) -> Segment:
    """A segment of a transcript: its row goes on from 20 tokens, its state says so."""
    row = replace(make_row(), parent=RowParent(20, "a" * 64))
    segment = make_segment(rows=(row,))
    transcript = Transcript(
        mark=mark_after(row), system_digest="b" * 16, is_stopped=False, outcome="It rained."
    )
    return replace(segment, state_after=replace(segment.state_after, transcript=transcript), **changes)


DELTA = make_delta()
MANIFEST = Manifest(
    RUN, Version(0, 4), "ab" * 32, (Shard("weights/L0-S4/model.safetensors", "cd" * 32, 1234),)
)
LEASE = m.Lease(
    ref=m.LeaseRef(1, 2, 3),
    environment="hidden_buttons",
    preset="cross",
    options_json="{}",
    records_json=('{"seed":1}', '{"seed":2}'),
    pack_seed=(1 << 64) - 1,
    sampling_seed=5,
    min_version=Version(0, 3),
    state=replace(
        make_segment().state_after,
        transcript=Transcript(mark=RowParent(3, "c" * 64), token_ids=Array.of([5, 6, 7], "<i4")),
    ),
)

TO_COORDINATOR: dict[str, m.ToCoordinator] = {
    "hello": m.Hello(
        role="actor", name="actor-0", protocol=2, pid=77, host="node-1", session=4, instance=9, last_seq=12,
        unacked=[11, 12], settled_bytes=160000,
    ),
    "heartbeat": m.Heartbeat(
        counters={"sealed_segments": 3.0}, engine_version=Version(0, 3), held=[m.LeaseRef(1, 2, 3)]
    ),
    "lease_request": m.LeaseRequest(request=6, num_lifecycles=8),
    "segment": m.SegmentData(seq=12, segment=make_segment()),
    "lease_return": m.LeaseReturn(lease=m.LeaseRef(1, 2, 3), reason="infrastructure", detail="engine closed"),
    "open_lineage": m.OpenLineage(branch=Version(0, 20), trained_digest="ef" * 32, nonce="n-1"),
    "step_request": m.StepRequest(version=Version(1, 21)),
    "step_done": m.StepDone(version=Version(1, 21), plan_digest="01" * 32, metrics={"loss": -0.5}),
    "published": m.Published(manifest=MANIFEST),
    "checkpointed": m.Checkpointed(
        version=Version(1, 40), path="checkpoints/step_000040-L1", digest="23" * 32, trained_digest="45" * 32
    ),
    "finished": m.Finished(version=Version(1, 100), reason="num_steps"),
    "bye": m.Bye(counters={"sealed_segments": 30.0}),
}  # fmt: skip

TO_CLIENT: dict[str, m.ToClient] = {
    "welcome": m.Welcome(
        session=5, is_continued=True, heartbeat_s=1.0, session_timeout_s=5.0, credit_segments=256,
        credit_bytes=67108864, manifest=MANIFEST,
    ),
    "refused": m.Refused(code="session_expired", detail="session 4 is over", is_fatal=False),
    "pong": m.Pong(),
    "stop": m.Stop(reason="finished"),
    "leases": m.Leases(request=6, leases=[LEASE]),
    "ack": m.Ack(seqs=[11, 12], credit_segments=268, credit_bytes=67308864, dropped={"12": "fenced"}),
    "fence": m.Fence(leases=[m.LeaseRef(1, 2, 3)], reason="deadline"),
    "new_version": m.NewVersion(manifest=MANIFEST),
    "step_batch": m.StepBatch(
        version=Version(1, 21), plan_digest="01" * 32, part=0, num_parts=1,
        items=[
            m.TrainItem(
                key=make_segment().key, kind="solve", position=0, rows=(make_row(),), advantage=-0.5,
                lag_steps=2.0
            ),
            m.TrainItem(
                key=DELTA.key, kind="solve", position=0, rows=DELTA.rows, advantage=0.0, lag_steps=0.0,
                is_context=True
            ),
        ],
    ),
    "lineage_opened": m.LineageOpened(nonce="n-1", lineage=1, step=20, num_rolled_back=7),
    "step_recorded": m.StepRecorded(version=Version(1, 21), should_stop=True),
    "publish_recorded": m.PublishRecorded(version=Version(1, 22)),
}  # fmt: skip
