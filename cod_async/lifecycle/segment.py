"""The nouns of the system: version, row, segment, and the lifecycle state that a segment carries.

A *lifecycle* is one play-through of a pack of S tasks that share one hidden world: solve 0, update 0, solve
1, …, solve S−1. Each part is an *episode*; a finished episode is *sealed* into a :class:`Segment`, the unit
on the wire, in the run database and of credit assignment. Ordinals count episodes: solve j has ordinal 2j,
update j has 2j+1.

A segment carries everything that is needed to go on from it at another actor (:class:`LifecycleState`), so a
lost actor costs at most the episode it was playing.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from cod_async.lifecycle.arrays import Array

EpisodeKind = Literal["solve", "update"]

Finish = Literal[
    "success",  # solve: the task's goal was reached; update: a well-formed hint was written
    "failure",  # solve: the environment ended the episode without success
    "out_of_steps",  # solve: the step limit was reached
    "format_error",  # solve or update: the text did not parse
    "context_overflow",  # solve or update: the row would not fit the model's context
]


class Version(msgspec.Struct, frozen=True, order=True, forbid_unknown_fields=True):
    """Policy version: optimiser step ``step`` on ``lineage``; a resumed run opens a new lineage."""

    lineage: int
    step: int

    def __str__(self) -> str:
        return f"{self.lineage}.{self.step}"


class VersionSpan(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """``num_tokens`` consecutive action tokens that were generated under ``version``."""

    version: Version
    num_tokens: int


class RowParent(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The token sequence that a delta extends (carry ``transcript``).

    Attributes:
        num_tokens: its length; 0 for the first delta of a lifecycle.
        digest: digest chained over its deltas (see :mod:`.transcript`); empty for the first.
    """

    num_tokens: int
    digest: str


class Row(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One token sequence with its action spans; turns whose prompts extend each other share one row.

    Attributes:
        token_ids: int32 [T], prompt and generated tokens in order; never re-tokenised.
        action_spans: half-open [start, stop) ranges over T, ascending and disjoint; tokens the policy
        generated.
        behavior_logprobs: float32 [A], A = total length of the spans; natural log, at sampling, after
        temperature.
        versions: run-length coded policy versions of the A action tokens, in order.
        planes: optional named per-token byte planes [T] (reserved: MoE router choices, other scores).
        parent: with carry ``transcript``, the sequence that ``token_ids`` goes on from (then all of the above
            count from its end); None for a row that stands for itself.
        teacher_logprobs: float32 [A], of the same action tokens under the teacher of the row's environment,
            after the same temperature; unset, and left out on the wire, in runs that distill nothing.
    """

    token_ids: Array
    action_spans: tuple[tuple[int, int], ...]
    behavior_logprobs: Array
    versions: tuple[VersionSpan, ...]
    planes: dict[str, Array] = {}
    parent: RowParent | None = None
    teacher_logprobs: Array | msgspec.UnsetType = msgspec.UNSET

    @property
    def num_tokens(self) -> int:
        """Number of tokens T in the row."""
        return self.token_ids.length

    @property
    def num_action_tokens(self) -> int:
        """Number of tokens A that the policy generated."""
        return self.behavior_logprobs.length


class PendingUpdate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the next update-context episode must see of the solve episode just finished."""

    trajectory: str
    reward: float
    feedback: str


class Transcript(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The conversation of a lifecycle under carry ``transcript``.

    Attributes:
        mark: its length and digest.
        system_digest: digest of the rules that opened it.
        is_stopped: whether its last response was ended by the policy (else the next turn supplies the end).
        outcome: what the next task's first message says of the last one.
        token_ids: int32, the conversation itself; absent in sealed segments, which are its deltas.
    """

    mark: RowParent
    system_digest: str = ""
    is_stopped: bool = True
    outcome: str = ""
    token_ids: Array | None = None


class LifecycleState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where a lifecycle stands between two episodes; enough to continue it anywhere.

    Attributes:
        next_ordinal: ordinal of the next episode; ``2 * pack_size - 1`` when the lifecycle is over.
        hint: the carried text, exactly as it is injected into the next solve prompt.
        task_rewards: final (penalised) rewards of solve 0 .. so far.
        pending: present when the next episode is an update.
        environment_state: the environment's own snapshot (pack-level state), versioned by the environment.
        transcript: the conversation so far, with carry ``transcript``.
    """

    next_ordinal: int
    hint: str
    task_rewards: tuple[float, ...] = ()
    pending: PendingUpdate | None = None
    environment_state: bytes = b""
    transcript: Transcript | None = None


class SegmentKey(msgspec.Struct, frozen=True, order=True, forbid_unknown_fields=True):
    """Identity inside a run: exactly one winner per key, whatever the number of leases."""

    group: int
    member: int
    ordinal: int

    def __str__(self) -> str:
        return f"g{self.group:06d}.m{self.member:02d}.o{self.ordinal:02d}"


class Segment(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A sealed episode.

    Attributes:
        run: run id; a segment of another run is refused.
        key: (group, member, ordinal).
        lease_epoch: which lease of the lifecycle produced it; older leases are fenced.
        actor: name of the actor that played it.
        environment, preset, pack_seed: the hidden world it was played in.
        kind, position: solve-task or update-context episode, at task index ``position`` (0-based).
        rows: token rows, usually one.
        reward: the final reward the policy is trained on; ``raw_reward`` before penalties.
        finish: why the episode ended.
        is_last: whether the lifecycle ends with this segment.
        state_after: the lifecycle's state after this episode.
        metrics: finite numbers for the run's metrics (steps taken, hint length, …).
        wall_s: seconds from the episode's first request to its sealing.
        adapter: LoRA adapter that generated it (reserved).
    """

    run: str
    key: SegmentKey
    lease_epoch: int
    actor: str
    environment: str
    preset: str
    pack_seed: int
    kind: EpisodeKind
    position: int
    rows: tuple[Row, ...]
    reward: float
    raw_reward: float
    finish: Finish
    is_last: bool
    state_after: LifecycleState
    metrics: dict[str, float] = {}
    wall_s: float = 0.0
    adapter: str | None = None

    @property
    def teacher_gap_nats(self) -> float | None:
        """Mean of behaviour - teacher log-prob over its action tokens; None without a teacher or tokens."""
        gaps = [
            row.behavior_logprobs.numpy().astype("<f8") - row.teacher_logprobs.numpy()
            for row in self.rows
            if row.teacher_logprobs is not msgspec.UNSET
        ]
        num_tokens = sum(gap.size for gap in gaps)
        return float(sum(gap.sum() for gap in gaps)) / num_tokens if num_tokens else None

    @property
    def num_tokens(self) -> int:
        """Total tokens over all rows."""
        return sum(row.num_tokens for row in self.rows)

    @property
    def num_action_tokens(self) -> int:
        """Total generated tokens over all rows."""
        return sum(row.num_action_tokens for row in self.rows)

    @property
    def oldest_version(self) -> Version:
        """The oldest policy version among its action tokens."""
        return min(span.version for row in self.rows for span in row.versions)


def num_episodes(pack_size: int) -> int:
    """Episodes of one lifecycle: ``pack_size`` solves and ``pack_size - 1`` updates."""
    return 2 * pack_size - 1


def kind_and_position(ordinal: int) -> tuple[EpisodeKind, int]:
    """Return the episode kind and task position of an ordinal (solve j = 2j, update j = 2j+1)."""
    return ("solve" if ordinal % 2 == 0 else "update"), ordinal // 2
