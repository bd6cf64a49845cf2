"""The configuration of a run: one frozen struct per component, prose under each field.

TOML in, structs out; an unknown key is an error. A component receives only its own struct. Cross-field rules
live in :mod:`cod_async.config.check`. Loading this module loads neither torch nor zmq.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from cod_async.config.distillation import DistillationConfig as DistillationConfig
from cod_async.config.distillation import TeacherConfig as TeacherConfig
from cod_async.config.fields import Count as Count
from cod_async.config.fields import Fraction as Fraction
from cod_async.config.fields import NonNegative as NonNegative
from cod_async.config.fields import Positive as Positive
from cod_async.config.fields import PositiveFloat as PositiveFloat
from cod_async.config.fields import Seconds as Seconds
from cod_async.config.learner import LearnerConfig as LearnerConfig
from cod_async.config.learner import LoraConfig as LoraConfig
from cod_async.config.loss import LossConfig as LossConfig

PackStrategy = Literal["cod", "ralph_sample", "ralph_full"]
"""``cod``: a pack is S different tasks; the Ralph strategies repeat one task S times."""


OnPublish = Literal["auto", "in_place", "retract", "wait", "at_segment_boundary"]
"""``in_place``: go on with the old KV cache; ``retract``: compute it again under the new weights; ``wait``:
switch when the running completions are done, new ones wait; ``at_segment_boundary``: switch when the running
episodes are done, new ones wait; ``auto``: ``in_place`` embedded, ``retract`` with SGLang."""


class _Section(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all sections: frozen, keyword-only, unknown keys refused."""


class EarlyStop(_Section, frozen=True, kw_only=True):
    """End training before ``num_steps`` once the CoD effect stands."""

    is_enabled: bool = False
    """Whether to stop early at all."""
    window_steps: Positive = 20
    """Average over this many last steps."""
    gap: float = 0.25
    """Stop when mean reward of positions 1.. minus position 0, over the window, is at least this."""
    min_steps: Count = 0
    """Never stop before this many steps."""


class RunSection(_Section, frozen=True, kw_only=True):
    """What the run is called, where it lives, how long it goes on."""

    name: Annotated[str, Meta(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")] = "run"
    """Folder name under ``output_dir``; letters, digits, dot, dash, underscore."""
    output_dir: str = "runs"
    """Where run folders are made; on the coordinator's local disk."""
    seed: Count = 0
    """Seed of everything that is drawn: packs, records, sampling, initial weights."""
    num_steps: Positive = 100
    """Optimiser steps of the whole run."""
    early_stop: EarlyStop = EarlyStop()
    """Optional early end."""
    grace_s: Seconds = 30.0
    """Time between Ctrl-C or SIGTERM and the end of the last process."""


class EnvironmentConfig(_Section, frozen=True, kw_only=True):
    """One environment of the mixture."""

    name: str
    """Registry name, see ``cod env list``."""
    preset: str
    """Preset name, see ``cod env list``."""
    weight: PositiveFloat = 1.0
    """Share of packs, relative to the other environments."""
    options: dict[str, Any] = {}
    """Overrides of the preset's options."""
    isolation: Literal["auto", "inline", "process"] = "auto"
    """Where the environment's code runs: ``inline``, in the actor; ``process``, in worker processes under the
    limits below; ``auto``: as the environment says, which is ``process`` for those of other packages."""
    step_timeout_s: Seconds = 300.0
    """Longest step, and longest end of a task; the episode is then played again (``infrastructure``)."""
    reset_timeout_s: Seconds = 300.0
    """Longest start of a task, and longest making of an environment."""
    memory_bytes: Count = 4 << 30
    """Ceiling of a worker's address space, which its lifecycles share; 0: none. At least 256 MiB."""
    num_workers: Positive = 2
    """Most worker processes of this environment per actor."""


class LifecycleConfig(_Section, frozen=True, kw_only=True):
    """How lifecycles are played and what their episodes are rewarded with."""

    pack_size: Positive = 4
    """Tasks per lifecycle (S)."""
    group_size: Positive = 8
    """Lifecycles per pack (G); the baseline is taken over them."""
    carry: Literal["hint", "transcript", "none"] = "hint"
    """What goes from task to task: the hint block; the whole conversation; nothing."""
    has_transcript_updates: bool = False
    """With carry ``transcript``: also ask for a hint block between two tasks, as a turn of the
    conversation."""
    packs: PackStrategy = "cod"
    """``cod``: S different tasks; ``ralph_sample``: the first task of each such pack, S times;
    ``ralph_full``: every task, S times."""
    has_plain_pack_seeds: bool = False
    """Seed hidden worlds by the rows alone, as the paper's reference does: a second epoch meets the same
    worlds again, and evaluation may meet worlds of training. Off: environment, split, run seed and group are
    mixed in."""
    max_response_tokens: Positive = 512
    """Most generated tokens per solve response."""
    max_hint_tokens: Positive = 512
    """Most generated tokens per update episode."""
    length_notice_tokens: Count = 0
    """Ask the policy in the prompt to stay within this many tokens; 0 asks nothing."""
    hint_penalty: NonNegative = 0.1
    """A hint that does not parse is rewarded with minus this."""
    solve_penalty: Fraction = 0.1
    """A success after T of T_max responses loses ``solve_penalty * T / T_max``; failures lose nothing."""
    solve_length_free_tokens: Count = 0
    """Responses up to this long cost a success nothing; see ``solve_length_full_tokens``."""
    solve_length_full_tokens: Count = 0
    """A success also loses ``solve_penalty`` times the mean over its responses of how far their length lies
    on the way from the free length to this one (0 to 1); 0: length costs nothing."""
    hint_length_free_tokens: Count = 0
    """Well-formed updates up to this many generated tokens cost nothing; see ``hint_length_full_tokens``."""
    hint_length_full_tokens: Count = 0
    """A well-formed update loses up to ``hint_penalty``, in proportion to how far its length lies on the way
    from the free length to this one; 0: length costs nothing."""
    hint_min_tokens: Count = 0
    """A well-formed update with fewer generated tokens loses ``hint_penalty``; needs
    ``hint_length_full_tokens``."""

    @property
    def has_updates(self) -> bool:
        """Whether an update-context episode lies between two tasks."""
        return self.carry == "hint" or (self.carry == "transcript" and self.has_transcript_updates)


class ModelConfig(_Section, frozen=True, kw_only=True):
    """The policy."""

    path: str = ""
    """Hugging Face model directory to start from; empty: the bootstrap makes one inside the run folder."""
    shape: str = ""
    """Folder with the ``config.json`` that the model in ``path`` must have. With it, ``--dry-run`` plans a
    run on a machine without the weights. A relative one in a file counts from that file's folder."""
    renderer: Literal["auto", "terse", "chatml"] = "auto"
    """Template family; ``auto`` reads it from the tokenizer's chat template and refuses what it does not
    know."""
    max_context_tokens: Positive = 4096
    """Longest row."""


class TinyModelConfig(_Section, frozen=True, kw_only=True):
    """Shape of the model that the bootstrap makes."""

    hidden_size: Positive = 64
    """Width of the residual stream."""
    num_layers: Positive = 2
    """Transformer blocks; looking up a fact takes two."""
    num_heads: Positive = 4
    """Query heads; a multiple of ``num_kv_heads``."""
    num_kv_heads: Positive = 2
    """Key and value heads."""
    head_dim: Positive = 16
    """Width of a head; even."""
    intermediate_size: Positive = 192
    """Width of the gated MLP."""


class BootstrapConfig(_Section, frozen=True, kw_only=True):
    """The starting model: format and note-taking only, no use of hints."""

    kind: Literal["auto", "documents", "random"] = "auto"
    """``documents``: train on the environments' bootstrap documents; ``random``: random weights; ``auto``:
    documents if all environments have some, else random."""
    also: tuple[EnvironmentConfig, ...] = ()
    """Environments whose words and documents the starting model learns too, although no pack of them is
    trained on; ``weight`` is their share of the documents. For measuring transfer."""
    num_steps: Positive = 400
    """Optimiser steps."""
    documents_per_step: Positive = 96
    """Documents per step."""
    lr: PositiveFloat = 5e-3
    """Peak learning rate; linear decay to a tenth."""
    warmup_steps: Count = 20
    """Linear warm-up."""
    qa_loss_gate: PositiveFloat = 0.02
    """Go on past ``num_steps`` (at most twice as many) until the fact-reading loss is below this, in nats per
    answer."""
    vocab_size: Positive = 512
    """Tokenizer size for ``kind = random`` (byte-level BPE made on the spot; at least 300)."""
    model: TinyModelConfig = TinyModelConfig()
    """Shape of the model."""


class ServerConfig(_Section, frozen=True, kw_only=True):
    """SGLang servers that the launcher starts, and what actors expect of any server."""

    num_servers: Positive = 1
    """Servers started by the launcher when ``engine.urls`` is empty; at least one per actor process."""
    host: str = "127.0.0.1"
    """Address that started servers listen on."""
    args: tuple[str, ...] = ()
    """More arguments for ``sglang.launch_server``, for example ``["--tp-size", "2"]``."""
    api_key_env: str = ""
    """Environment variable with the api key of attached servers; started ones get a key of their own."""
    admin_key_env: str = ""
    """Environment variable with the admin key of attached servers; empty: the api key."""
    has_streaming: bool = True
    """Read completions as a stream, so that one that stalls is noticed after ``stall_timeout_s``."""
    start_timeout_s: Seconds = 600.0
    """A started server must answer within this time."""
    connect_timeout_s: Seconds = 10.0
    """Longest time to open a connection."""
    stall_timeout_s: Seconds = 120.0
    """Longest silence of a stream; without streaming, of a server that does not answer its probe."""
    request_timeout_s: Seconds = 3600.0
    """Longest completion."""
    control_timeout_s: Seconds = 60.0
    """Longest answer to a control request (pause, flush, abort, information)."""
    update_timeout_s: Seconds = 600.0
    """Longest single step of a weight update (one bucket, one load from disk)."""
    probe_every_s: Seconds = 2.0
    """Interval of health probes."""
    probe_timeout_s: Seconds = 10.0
    """A probe that takes longer has failed."""
    max_failed_probes: Positive = 3
    """So many failed probes in a row mean that a server is dead or wedged: its requests move to others, and
    the launcher restarts it."""
    down_timeout_s: Seconds = 900.0
    """A request waits this long for any server to be usable, then its episode fails as infrastructure."""


class EngineConfig(_Section, frozen=True, kw_only=True):
    """Generation."""

    kind: Literal["embedded", "sglang"] = "embedded"
    """``embedded``: batched torch generation inside the actor; ``sglang``: SGLang servers."""
    urls: tuple[str, ...] = ()
    """SGLang servers to attach to; empty: the launcher starts ``server.num_servers``."""
    python: str = ""
    """Interpreter of an environment with sglang, for started servers; empty: this one. A relative path in a
    file counts from the working folder."""
    max_running: Positive = 128
    """Sequences decoded at once, per server."""
    temperature: PositiveFloat = 1.0
    """Sampling temperature; log-probs are of the tempered distribution."""
    top_p: Annotated[float, Meta(gt=0, le=1)] = 1.0
    """Nucleus cut; values under 1 make the log-probs wrong for training and are refused by ``train``."""
    on_publish: OnPublish = "auto"
    """What happens to running sequences when weights change; see :data:`OnPublish`."""
    hold_timeout_s: Seconds = 600.0
    """Longest time that ``wait`` and ``at_segment_boundary`` hold a switch back; then it is forced, with
    ``retract``."""
    max_reprefill_frac: PositiveFloat = 0.1
    """With ``retract`` and SGLang: a switch is put off while recomputing the running sequences would cost
    more than this share of the tokens generated since the last one."""
    max_versions_behind: Positive = 4
    """A server that is more publications behind than this gets no new requests until it has caught up, and
    no switch is put off for longer."""
    is_batch_invariant: bool = False
    """Embedded: compute in fixed shapes so that a sequence's tokens and log-probs do not depend on what runs
    beside it; slower."""
    num_threads: Positive = 1
    """OpenMP threads of the actor process and of started servers."""
    server: ServerConfig = ServerConfig()
    """SGLang servers."""


class ActorsConfig(_Section, frozen=True, kw_only=True):
    """Actor processes."""

    num_processes: Positive = 1
    """Actor processes started by the launcher."""
    lifecycles_per_process: Positive = 128
    """Lifecycles played at once by each."""
    max_retries: Count = 3
    """An episode that fails as infrastructure is retried this often, then its lifecycle is returned."""
    max_outbox_segments: Positive = 1024
    """Sealed segments waiting for acknowledgement; at the ceiling lifecycles wait, nothing is dropped."""


class TransportConfig(_Section, frozen=True, kw_only=True):
    """The link between the processes."""

    bind: str = "tcp://127.0.0.1:0"
    """Address of the coordinator; port 0 takes a free one. Other than loopback needs keys."""
    max_message_bytes: Annotated[int, Meta(ge=4096, le=1 << 30)] = 64 << 20
    """Larger frames are refused."""
    heartbeat_s: Seconds = 1.0
    """Interval of heartbeats, both ways."""
    session_timeout_s: Seconds = 5.0
    """A client that was silent for this long has lost its leases; at least three heartbeats."""
    resend_s: Seconds = 2.0
    """Unacknowledged messages are sent again after this."""
    credit_segments: Positive = 256
    """Unacknowledged segments per actor."""
    credit_bytes: Positive = 64 << 20
    """Unacknowledged bytes per actor."""
    ack_journal_dir: str = ""
    """Folder where every actor process notes each segment acknowledged to it, at most 64 MiB per process: a
    witness for fault tests, which compare it with the run database. Empty: no such notes."""


class StoreConfig(_Section, frozen=True, kw_only=True):
    """The run database."""

    retention: Literal["all", "until_checkpoint"] = "all"
    """Which segment payloads are kept after they were trained."""
    commit_max_segments: Positive = 128
    """Segments per group commit."""
    commit_interval_s: Seconds = 0.01
    """Longest wait for a group commit to fill."""
    max_database_bytes: Positive = 64 << 30
    """Ceiling; at it no credit is given until there is room."""
    checkpoint_copies: Literal["none", "newest", "all"] = "newest"
    """A consistent copy of the database is put into each checkpoint, for the loss of the disk that it is on:
    into the newest one only (older ones lose theirs), into all, or into none."""


class StalenessConfig(_Section, frozen=True, kw_only=True):
    """How far data may lag behind the weights that train on it."""

    max_lag: Count = 4
    """Bound on (learner step at consumption) - (step of the oldest token); 0 is synchronous."""
    plan_ahead_steps: Annotated[int, Meta(ge=-1)] = -1
    """How many steps' worth of groups may be under way beyond the current step; -1: max(1, max_lag // 2), or
    0 when max_lag is 0. The difference to ``max_lag`` is the slack for slow groups."""
    on_bound: Literal["wait", "expire"] = "wait"
    """``wait``: the learner pauses before a step that would push running work past the bound. ``expire``:
    at the last step that can still use a group, what of it is still running is dropped (``stale``)."""
    admission: Literal["forecast", "capacity"] = "forecast"
    """What decides, beside the bound itself, whether work is started under ``expire``. ``forecast``: how long
    lifecycles take, learned while running: nothing is started that would push running work past the bound,
    nor what cannot finish within it. ``capacity``: ``plan_ahead_steps`` alone."""
    forecast_quantile: Annotated[float, Meta(ge=0.5, lt=1)] = 0.9
    """Share of groups that finish within their forecast."""
    window_groups: Count = 0
    """A step takes closed groups among so many oldest started ones only; 0: no window."""
    max_version_spread: Count | None = None
    """Most steps between the oldest and the newest version inside a segment that is trained; others are
    dropped (``version_spread``). Unset: no cap."""
    mix_window_steps: Positive = 50
    """Trained and generated mix of positions and lengths are compared over this many steps."""
    mix_warning_frac: Fraction = 0.05
    """Event ``mix_parted`` when the two mixes differ by more than this share (total variation)."""


class GroupsConfig(_Section, frozen=True, kw_only=True):
    """When a group's baseline closes."""

    close: Literal["all", "quorum"] = "all"
    """``all``: when every member has ended or was given up; ``quorum``: when ``quorum_members`` have, after
    ``after_s``."""
    quorum_members: Positive = 1
    """Members needed for ``quorum``."""
    after_s: NonNegative = 0.0
    """Seconds from the group's first lease before a quorum may close it."""
    late: Literal["train", "drop"] = "train"
    """Members that still run when a quorum closes their group: ``train`` lets them end and trains them
    against the frozen baseline; ``drop`` ends them (``late_group``)."""
    deadline_s: Seconds = 600.0
    """A lifecycle that has not ended this long after its lease is given up (``deadline``)."""
    overdue_factor: NonNegative = 0.0
    """While the learner waits for running groups, a lifecycle is given up (``overdue``) once it takes this
    many times the ``staleness.forecast_quantile`` of its environment's; 0: never, only ``deadline_s``."""


class CreditAssignmentConfig(_Section, frozen=True, kw_only=True):
    """Returns, baselines and re-weighting."""

    style: Literal["mean", "sliding_window_mean", "discounted"] = "mean"
    """How the rewards from an episode on become its return."""
    window: Positive | None = None
    """Window W of ``sliding_window_mean``."""
    gamma: Fraction | None = None
    """Factor of ``discounted``."""
    baseline: Literal["group_mean", "leave_one_out", "non_causal"] = "group_mean"
    """Per kind and position over the group; ``non_causal``: one reward per lifecycle."""
    std: Literal["none", "group", "batch"] = "none"
    """Divide advantages by a standard deviation."""
    red: Literal["off", "bisection"] = "off"
    """Reward-distribution balancing of negative and positive advantages."""
    red_level: Literal["batch", "pack", "taskset"] = "batch"
    """Sets over which RED balances."""
    parity: bool = False
    """Reproduce the reference's coarse bisection instead of the exact root."""


class ReplayConfig(_Section, frozen=True, kw_only=True):
    """Training on groups again while they are within ``staleness.max_lag``."""

    max_uses: Positive = 1
    """Steps that may use a segment, the first one included; 1: no replay."""
    groups_per_step: Count = 0
    """Most groups that a step uses again, beside ``learner.groups_per_step`` new ones."""
    use_penalty: NonNegative = 2.0
    """Steps of age that every earlier use of a group counts as."""
    sigma: NonNegative = 2.0
    """Standard deviation, in steps, of the noise on a group's priority (the paper's recipe)."""


class AutopilotConfig(_Section, frozen=True, kw_only=True):
    """Lag that follows the learner's health: less when its data became too old to use, else more."""

    is_enabled: bool = False
    """Whether the lag is steered between ``min_lag`` and ``staleness.max_lag`` at all."""
    min_lag: Count = 0
    """Least lag that it may ask for, in steps."""
    window_steps: Positive = 5
    """Steps in a row that must agree before anything changes, and between two changes."""
    min_ess_frac: Fraction = 0.5
    """Brake below this effective sample size, as a share of the tokens (``learner/ess_frac``)."""
    ess_margin_frac: Fraction = 0.1
    """Let out more lag only while the share is at least this far above ``min_ess_frac``."""
    max_masked_frac: Fraction = 0.1
    """Brake above this share of masked tokens of either sign (``learner/masked_positive_frac``,
    ``learner/masked_negative_frac``); let out more lag only at half of it."""
    retry_steps: Positive = 100
    """A lag that had to be braked is tried again after so many steps."""


class WeightsConfig(_Section, frozen=True, kw_only=True):
    """Publication of policy versions."""

    publish_every_steps: Positive = 1
    """Optimiser steps between publications."""
    keep_versions: Annotated[int, Meta(ge=2)] = 4
    """Published versions kept on disk."""
    source: Literal["folder", "pull"] = "folder"
    """How actors get published files: ``folder``, from the run folder, which they share; ``pull``, over the
    network from ``cod weights``, for actors that share no disk."""
    serve: str = "tcp://127.0.0.1:0"
    """With ``pull``: address that the run's weight server listens on, loopback; port 0 takes a free one."""
    pull_from: str = ""
    """With ``pull``: address of a relay on the actor's host; empty: the run's own server."""
    cache_dir: str = ""
    """With ``pull``: local folder for pulled files; empty: a folder of the actor's own."""
    into_engine: Literal["disk", "group", "ipc"] = "disk"
    """How SGLang takes weights up: ``disk``, it reads the files; ``group``, the actor broadcasts them over a
    process group (gloo on a CPU, NCCL on GPUs); ``ipc``, the actor hands over CUDA memory on one host."""
    bucket_bytes: Annotated[int, Meta(ge=1 << 10)] = 512 << 20
    """With ``group`` and ``ipc``: most bytes per message."""
    is_checked: bool = True
    """Compare the server's checksums of all parameters with the published weights after every update."""
    has_deltas: bool = False
    """Also publish what changed since the version before, for ``pull``: changed elements alone when they are
    few, checked against the digest of a declared base."""


class EvaluationConfig(_Section, frozen=True, kw_only=True):
    """Evaluation before, after and beside training."""

    num_packs: Positive = 256
    """Fresh packs per curve."""
    lifecycles_per_pack: Positive = 2
    """Lifecycles per pack."""
    is_enabled: bool = True
    """Whether ``train`` evaluates before and after."""
    every_steps: Count = 0
    """Evaluate the starting weights and every this many optimiser steps, beside training and without holding
    it up; what comes while an evaluation is still running is skipped, but for the newest. 0: never."""
    suite: str = ""
    """Suite file that is played ``every_steps``; empty: this run's environments on held-out worlds. A
    relative one in a file counts from that file's folder."""


class ObserveConfig(_Section, frozen=True, kw_only=True):
    """What is written for people."""

    has_tensorboard: bool = True
    """Write TensorBoard event files."""
    has_plots: bool = True
    """Draw PNG plots at the end and every ``plot_every_s``."""
    plot_every_s: Seconds = 60.0
    """Seconds between redrawn plots."""
    num_transcripts: Count = 4
    """Lifecycles written as readable Markdown at the end."""


class Config(_Section, frozen=True, kw_only=True):
    """The whole configuration of a run."""

    environments: tuple[EnvironmentConfig, ...]
    """At least one."""
    run: RunSection = RunSection()
    lifecycle: LifecycleConfig = LifecycleConfig()
    model: ModelConfig = ModelConfig()
    bootstrap: BootstrapConfig = BootstrapConfig()
    engine: EngineConfig = EngineConfig()
    actors: ActorsConfig = ActorsConfig()
    transport: TransportConfig = TransportConfig()
    store: StoreConfig = StoreConfig()
    staleness: StalenessConfig = StalenessConfig()
    groups: GroupsConfig = GroupsConfig()
    credit_assignment: CreditAssignmentConfig = CreditAssignmentConfig()
    replay: ReplayConfig = ReplayConfig()
    autopilot: AutopilotConfig = AutopilotConfig()
    loss: LossConfig = LossConfig()
    distillation: DistillationConfig = DistillationConfig()
    learner: LearnerConfig = LearnerConfig()
    weights: WeightsConfig = WeightsConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    observe: ObserveConfig = ObserveConfig()
