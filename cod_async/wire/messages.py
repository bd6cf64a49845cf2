"""Every message, grouped by who receives it.

Messages are msgspec structs, encoded as MessagePack maps with a ``type`` tag; unknown fields are refused.
What changes state is idempotent: segments carry a sequence number and a key, requests carry an id, and a
repeated request gets the same answer. Nothing here touches a socket.
"""

from __future__ import annotations

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from cod_async.lifecycle.segment import (
    EpisodeKind,
    LifecycleState,
    Row,
    Segment,
    SegmentKey,
    Version,
)
from cod_async.weights.manifest import Manifest

PROTOCOL_VERSION = 2

Name = Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,127}\Z")]
Count = Annotated[int, Meta(ge=0, le=1 << 62)]
Text = Annotated[str, Meta(max_length=4096)]
Numbers = Annotated[dict[Annotated[str, Meta(max_length=128)], float], Meta(max_length=1024)]
"""Counters and metrics by name. Bounded, because the coordinator writes them down."""
Witness = Annotated[
    dict[Annotated[str, Meta(max_length=64)], Annotated[str, Meta(max_length=256)]], Meta(max_length=32)
]
"""Digests and conditions of a step by name; see :mod:`cod_async.learner.witness`."""
Role = Literal["actor", "learner", "observer"]


class _Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag_field="type"):
    """Base of all messages."""


class LeaseRef(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Names one lease: lifecycle (group, member) and its lease epoch."""

    group: Count
    member: Count
    lease_epoch: Count


# -------------------------------------------------------------------------------- received by the coordinator


class Hello(_Message, frozen=True, tag="hello"):
    """First message of every connection; the coordinator answers Welcome or Refused.

    ``session`` is 0 for a new client, or the session epoch it had before a lost connection. ``instance`` is
    drawn at random by each client process, so that a repeated Hello and a restarted process with the same
    pid are told apart. The last three let a restarted coordinator go on with a session: the highest sequence
    number used in it, those not yet acknowledged, and the total bytes of those that are.
    """

    role: Role
    name: Name
    protocol: Count
    pid: Count
    host: Text
    session: Count = 0
    instance: Count = 0
    last_seq: Count = 0
    unacked: list[Count] = []
    settled_bytes: Count = 0


class Heartbeat(_Message, frozen=True, tag="heartbeat"):
    """I live. ``counters`` are monotonic within the session; ``held`` are the leases the client believes it
    holds.
    """

    counters: Numbers = {}
    engine_version: Version | None = None
    held: list[LeaseRef] = []


class LeaseRequest(_Message, frozen=True, tag="lease_request"):
    """Give me up to ``num_lifecycles`` lifecycles; answered by Leases with the same ``request``, maybe
    empty.
    """

    request: Count
    num_lifecycles: Count


class SegmentData(_Message, frozen=True, tag="segment"):
    """One sealed segment; acknowledged by ``seq`` after commit, resent until then."""

    seq: Count
    segment: Segment


class LeaseReturn(_Message, frozen=True, tag="lease_return"):
    """The actor gives a lifecycle back unfinished (``infrastructure``, ``draining``)."""

    lease: LeaseRef
    reason: Literal["infrastructure", "draining"]
    detail: Text = ""


class OpenLineage(_Message, frozen=True, tag="open_lineage"):
    """The learner starts or restarts from a checkpoint at ``branch``; answered by LineageOpened.

    ``trained_digest`` is the digest of the trained-set that the checkpoint holds; ``nonce`` makes it
    idempotent.
    """

    branch: Version | None
    trained_digest: Text
    nonce: Text


class StepRequest(_Message, frozen=True, tag="step_request"):
    """Give me the batch of optimiser step ``version.step`` (the step that turns version s into s+1)."""

    version: Version


class StepDone(_Message, frozen=True, tag="step_done"):
    """The optimiser step from ``version`` was taken on the plan with ``plan_digest``; answered by
    StepRecorded.

    With ``dropped_as`` it was not taken and never will be: the plan's segments are dropped by this name, the
    version stays what it is, and the next StepRequest gets another plan. ``witness`` is what a replay of the
    step is compared with. Both are left out where they are not needed.
    """

    version: Version
    plan_digest: str
    metrics: Numbers
    dropped_as: Literal["nonfinite"] | msgspec.UnsetType = msgspec.UNSET
    witness: Witness | msgspec.UnsetType = msgspec.UNSET


class Published(_Message, frozen=True, tag="published"):
    """A policy version is durable and may be used; answered by PublishRecorded."""

    manifest: Manifest


class Checkpointed(_Message, frozen=True, tag="checkpointed"):
    """A checkpoint of ``version`` is durable at ``path`` (relative to the run folder)."""

    version: Version
    path: Text
    digest: Text
    trained_digest: Text


class Finished(_Message, frozen=True, tag="finished"):
    """The learner has taken its last step; the run is over."""

    version: Version
    reason: Text


class Bye(_Message, frozen=True, tag="bye"):
    """Clean end of a session with final counters; nothing follows."""

    counters: Numbers = {}


ToCoordinator = (
    Hello
    | Heartbeat
    | LeaseRequest
    | SegmentData
    | LeaseReturn
    | OpenLineage
    | StepRequest
    | StepDone
    | Published
    | Checkpointed
    | Finished
    | Bye
)


# ----------------------------------------------------------------------------------- received by every client


class Welcome(_Message, frozen=True, tag="welcome"):
    """Accepted; ``session`` is this client's session epoch, unique within the run.

    ``is_continued`` says that the previous session still stands: leases are kept, unacknowledged segments
    are resent.
    """

    session: Count
    is_continued: bool
    heartbeat_s: float
    session_timeout_s: float
    credit_segments: Count
    credit_bytes: Count
    manifest: Manifest | None


class Refused(_Message, frozen=True, tag="refused"):
    """A message was refused. With ``is_fatal`` the client must stop; otherwise ``code`` says what to do.

    ``session_expired``: say Hello again with session 0. ``hello_first``: say Hello again with the session
    you have. ``session_replaced`` (fatal): another process has your name. ``protocol`` (fatal): wrong
    protocol version, both named in detail. All codes are listed in :mod:`cod_async.wire.codec`.
    """

    code: Name
    detail: Text
    is_fatal: bool = False


class Pong(_Message, frozen=True, tag="pong"):
    """Answer to a heartbeat."""


class Stop(_Message, frozen=True, tag="stop"):
    """The run ends: seal what is finished, deliver it, say Bye and exit."""

    reason: Text


# --------------------------------------------------------------------------------------- received by an actor


class Lease(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One lifecycle to play.

    Attributes:
        ref: identity and lease epoch.
        environment, preset, options_json: the world; options as canonical JSON.
        records_json: one data record per task, as canonical JSON.
        pack_seed: seed of the hidden world.
        sampling_seed: the seed of episode o is derived from this and o.
        min_version: the engine must be at this version or newer before an episode starts.
        state: present when the lifecycle continues after its last acknowledged segment.
    """

    ref: LeaseRef
    environment: Name
    preset: Name
    options_json: str
    records_json: tuple[str, ...]
    pack_seed: Annotated[int, Meta(ge=0)]
    sampling_seed: Count
    min_version: Version
    state: LifecycleState | None = None


class Leases(_Message, frozen=True, tag="leases"):
    """Answer to LeaseRequest; an empty list means: ask again later."""

    request: Count
    leases: list[Lease]


class Ack(_Message, frozen=True, tag="ack"):
    """These sequence numbers are settled: committed, or dropped for good with the reason in ``dropped``.

    Credit is cumulative over the session: the actor may have sent up to ``credit_segments`` segments and
    ``credit_bytes`` bytes in all, so repeated or reordered acks do no harm.
    """

    seqs: list[Count]
    credit_segments: Count
    credit_bytes: Count
    dropped: dict[str, str] = {}


class Fence(_Message, frozen=True, tag="fence"):
    """These leases are no longer yours: stop playing them, drop what is not sent."""

    leases: list[LeaseRef]
    reason: Name


class NewVersion(_Message, frozen=True, tag="new_version"):
    """A policy version was published; load it when your mode says so."""

    manifest: Manifest


ToActor = Welcome | Refused | Pong | Stop | Leases | Ack | Fence | NewVersion


# -------------------------------------------------------------------------------------- received by a learner


class TrainItem(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One selected segment as the learner needs it.

    Attributes:
        key: identity.
        kind, position: for metrics.
        rows: token rows.
        advantage: after baseline and RED.
        lag_steps: learner step minus the step of its oldest token.
        is_context: not selected, and sent only because selected segments of the same transcript go on from
            it; its tokens carry no loss.
        environment: NAME.PRESET, whose teacher scored it; unset, and left out, in runs that distill nothing.
    """

    key: SegmentKey
    kind: EpisodeKind
    position: Count
    rows: tuple[Row, ...]
    advantage: float
    lag_steps: float
    is_context: bool = False
    environment: Text | msgspec.UnsetType = msgspec.UNSET


class StepBatch(_Message, frozen=True, tag="step_batch"):
    """Part ``part`` of ``num_parts`` of the batch of a step; items are sorted by key over all parts.

    ``plan_digest`` is SHA-256 over the sorted keys, lease epochs and advantages: the same plan, the same
    digest.
    """

    version: Version
    plan_digest: str
    part: Count
    num_parts: Count
    items: list[TrainItem]


class LineageOpened(_Message, frozen=True, tag="lineage_opened"):
    """The learner works on ``lineage`` from now on, starting at step ``step``."""

    nonce: str
    lineage: Count
    step: Count
    num_rolled_back: Count


class StepRecorded(_Message, frozen=True, tag="step_recorded"):
    """The step's segments are marked trained; ``should_stop`` asks the learner to checkpoint and finish.

    ``dropped_plan`` is the digest of the plan that was dropped, in answers to a StepDone with ``dropped_as``.
    """

    version: Version
    should_stop: bool = False
    dropped_plan: str | msgspec.UnsetType = msgspec.UNSET


class PublishRecorded(_Message, frozen=True, tag="publish_recorded"):
    """Answer to Published and Checkpointed."""

    version: Version


ToLearner = Welcome | Refused | Pong | Stop | StepBatch | LineageOpened | StepRecorded | PublishRecorded

ToClient = (
    Welcome
    | Refused
    | Pong
    | Stop
    | Leases
    | Ack
    | Fence
    | NewVersion
    | StepBatch
    | LineageOpened
    | StepRecorded
    | PublishRecorded
)
