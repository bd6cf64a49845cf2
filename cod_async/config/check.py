"""Cross-field rules of a configuration, and what it says about the world outside: models, folders, ports.

Each rule is a small function that yields sentences ``path: problem, value; what to do``. :func:`check` runs
them all, so that a user sees every problem at once and before any process starts. Loads no torch.
"""

from __future__ import annotations

import errno
import os
import re
import socket
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cod_async.config.check_distillation import distillation_problems
from cod_async.config.check_engine import engine_problems
from cod_async.config.check_learner import learner_problems
from cod_async.config.check_loss import loss_problems
from cod_async.config.check_model import model_problems
from cod_async.config.check_staleness import staleness_problems
from cod_async.config.check_weights import weights_problems
from cod_async.config.schema import Config, EnvironmentConfig
from cod_async.errors import ConfigError, EnvironmentInputError, InputError, StoreError

if TYPE_CHECKING:
    from cod_async.envs.base import EnvironmentSpec

_BIND = re.compile(r"^tcp://(?P<host>.+):(?P<port>[0-9]{1,5})$")
LOOPBACK_HOSTS = ("127.0.0.1", "localhost", "[::1]")
NO_ENVIRONMENTS = "environments: empty"
MIN_HEARTBEATS = 3
"""A session must survive this many lost heartbeats."""
BYTES_PER_TOKEN = 8
"""An int32 id and a float32 log-prob per token on the wire."""
MIN_WORKER_BYTES = 256 << 20
"""Python, numpy and this package take about half of it."""
MIN_BYTE_VOCAB = 300
"""256 bytes and the special tokens of the byte-level tokenizer."""

Problems = Iterator[str]


def check(config: Config, *, for_train: bool = True, needs_weights: bool | None = None) -> list[str]:
    """List every cross-field problem of a configuration.

    Args:
        config: a configuration that already passed :func:`cod_async.config.load.load_config`.
        for_train: also apply the rules that only training needs (log-probs must be those of the trained
            policy, folder and port must be usable).
        needs_weights: the model in ``model.path`` must be there, and one that this version trains, even if
            ``model.shape`` says what it is; None: as ``for_train``.

    Returns:
        One sentence per problem, in the order of the sections; empty if nothing is wrong.
    """
    needs_weights = for_train if needs_weights is None else needs_weights
    model = partial(model_problems, needs_weights=needs_weights)
    teachers = partial(distillation_problems, for_train=for_train, needs_weights=needs_weights)
    rules: list[Callable[[Config], Problems]] = [
        _environments, _lifecycle, model, _bootstrap, partial(engine_problems, for_train=for_train),
        _transport, _staleness, staleness_problems, _groups, _credit_assignment, loss_problems,
        teachers, learner_problems, weights_problems, _early_stop,
    ]  # fmt: skip
    if for_train:
        rules += [_train_only, _evaluation, _port, _output_dir]
    return [problem for rule in rules for problem in rule(config)]


def require(config: Config, *, for_train: bool = True) -> None:
    """Raise :class:`ConfigError` with all problems that :func:`check` finds, if any."""
    problems = check(config, for_train=for_train)
    if problems:
        raise ConfigError(problems)


def check_run_dir(run_dir: Path, *, is_resume: bool) -> list[str]:
    """List what forbids starting (or resuming) a run in ``run_dir``."""
    if is_resume:
        if not (run_dir / "config.json").is_file():
            return [f"--resume {run_dir}: no config.json in it; give the folder of an earlier run"]
        if not os.access(run_dir, os.W_OK):
            return [f"--resume {run_dir}: not writable; correct its owner or permissions"]
        return []
    try:
        is_taken = run_dir.exists() and (not run_dir.is_dir() or any(run_dir.iterdir()))
    except OSError as error:
        return [f"{run_dir}: cannot be read, {error.strerror or error}; choose another --name"]
    if is_taken:
        return [f"{run_dir}: exists already; choose another --name, or go on with it by --resume {run_dir}"]
    return []


def run_dir_of(config: Config) -> Path:
    """Return the folder of a run, ``output_dir/name``."""
    return Path(config.run.output_dir) / config.run.name


def _environments(config: Config) -> Problems:
    if not config.environments:
        yield NO_ENVIRONMENTS + "; add at least one [[environments]] table with a name and a preset"
        return
    for index, environment in enumerate(config.environments):
        yield from _environment(f"environments.{index}", environment, config)


def _environment(path: str, environment: EnvironmentConfig, config: Config) -> Problems:
    from cod_async.envs import registry

    if 0 < environment.memory_bytes < MIN_WORKER_BYTES:
        yield (
            f"{path}.memory_bytes: {environment.memory_bytes} is too little for a worker process; use at "
            f"least {MIN_WORKER_BYTES}, or 0 for no limit"
        )
    try:
        spec = registry.get(environment.name)
    except EnvironmentInputError as error:
        yield from (f"{path}.name: {problem}" for problem in error.problems)
        return
    try:
        options = spec.options(environment.preset, environment.options)
        spec.make(options)
        sizes = _data_sizes(spec, options)
    except EnvironmentInputError as error:
        yield from (f"{path}: {problem}" for problem in error.problems)
        return
    num_needed = config.lifecycle.pack_size if config.lifecycle.packs == "cod" else 1
    for split, num_records in sizes.items():
        if num_records < num_needed:
            yield (
                f"{path}: its {split} data has {num_records} records, a pack needs {num_needed}; give it "
                "more, or lower lifecycle.pack_size"
            )


def _data_sizes(spec: EnvironmentSpec, options: dict[str, Any]) -> dict[str, int]:
    """Return the number of records of each split, which reads a user's data set; endless ones are left out.

    Raises:
        EnvironmentInputError: the data set is wrong.
    """
    if spec.num_records is None:
        return {}
    return {split: spec.num_records(options, split) for split in ("train", "held_out")}


def _lifecycle(config: Config) -> Problems:
    lifecycle, context = config.lifecycle, config.model.max_context_tokens
    if lifecycle.carry == "transcript" and config.engine.on_publish == "at_segment_boundary":
        yield (
            'engine.on_publish: "at_segment_boundary" has no boundary to wait for with lifecycle.carry = '
            '"transcript", whose conversation spans the lifecycle; use "in_place" or "retract"'
        )
    if lifecycle.has_transcript_updates and lifecycle.carry != "transcript":
        yield (
            "lifecycle.has_transcript_updates: has no effect with lifecycle.carry = "
            f'"{lifecycle.carry}"; set it to false'
        )
    if lifecycle.max_response_tokens >= context:
        yield (
            f"lifecycle.max_response_tokens: {lifecycle.max_response_tokens} leaves no room for a prompt in "
            f"model.max_context_tokens = {context}; lower the first or raise the second"
        )
    if lifecycle.carry == "hint" and lifecycle.max_hint_tokens >= context:
        yield (
            f"lifecycle.max_hint_tokens: {lifecycle.max_hint_tokens} leaves no room for a prompt in "
            f"model.max_context_tokens = {context}; lower the first or raise the second"
        )
    for free, full, value in (
        ("solve_length_free_tokens", "solve_length_full_tokens", lifecycle.solve_length_full_tokens),
        ("hint_length_free_tokens", "hint_length_full_tokens", lifecycle.hint_length_full_tokens),
    ):
        if getattr(lifecycle, free) >= value and (value or getattr(lifecycle, free)):
            yield (
                f"lifecycle.{full}: {value} is not above lifecycle.{free} = {getattr(lifecycle, free)}; "
                "raise it, or set both to 0 for no price on length"
            )
    if lifecycle.hint_min_tokens and not lifecycle.hint_length_full_tokens:
        yield (
            f"lifecycle.hint_min_tokens: {lifecycle.hint_min_tokens} has no effect without "
            "lifecycle.hint_length_full_tokens; set that too, or this to 0"
        )
    if lifecycle.group_size < 2 and not config.loss.is_distilled:  # a teacher needs no equals
        yield (
            f"lifecycle.group_size: {lifecycle.group_size} makes every group a singleton, whose advantages "
            "are all 0 "
            f'(baseline "{config.credit_assignment.baseline}"); use at least 2'
        )


def _bootstrap(config: Config) -> Problems:
    if config.model.path:
        return
    shape, bootstrap = config.bootstrap.model, config.bootstrap
    kind = _bootstrap_kind(config)
    if shape.num_heads % shape.num_kv_heads:
        yield (
            f"bootstrap.model.num_kv_heads: {shape.num_kv_heads} does not divide num_heads = "
            f"{shape.num_heads}; "
            "choose a divisor"
        )
    if shape.head_dim % 2:
        yield f"bootstrap.model.head_dim: {shape.head_dim} is odd; rotary embeddings need an even number"
    if kind == "random" and bootstrap.vocab_size < MIN_BYTE_VOCAB:
        yield (
            f"bootstrap.vocab_size: {bootstrap.vocab_size} is too small for a byte-level tokenizer; "
            f"use at least {MIN_BYTE_VOCAB}"
        )
    fitting = {"random": "chatml", "documents": "terse"}[kind]
    if config.model.renderer not in ("auto", fitting):
        yield (
            f'model.renderer: "{config.model.renderer}" does not fit the bootstrap (kind "{kind}"); use '
            f'"{fitting}" or "auto"'
        )
    yield from _documents(config)
    if bootstrap.warmup_steps >= bootstrap.num_steps:
        yield (
            f"bootstrap.warmup_steps: {bootstrap.warmup_steps} is not less than bootstrap.num_steps = "
            f"{bootstrap.num_steps}; lower it"
        )


def _without_documents(config: Config) -> list[str]:
    """Return the environments, those of ``bootstrap.also`` included, that have no bootstrap documents."""
    from cod_async.envs import registry

    names = {environment.name for environment in (*config.environments, *config.bootstrap.also)}
    without = []
    for name in sorted(names & set(registry.names())):
        try:
            if not registry.get(name).bootstrap_module:
                without.append(name)
        except EnvironmentInputError:  # reported by the rule on environments
            continue
    return without


def _bootstrap_kind(config: Config) -> Literal["documents", "random"]:
    """Return the kind of starting model that ``bootstrap.kind`` comes to."""
    if config.bootstrap.kind != "auto":
        return config.bootstrap.kind
    return "random" if _without_documents(config) or not config.environments else "documents"


def _documents(config: Config) -> Problems:
    bootstrap, without = config.bootstrap, _without_documents(config)
    for index, environment in enumerate(bootstrap.also):
        yield from _environment(f"bootstrap.also.{index}", environment, config)
    if without and bootstrap.kind == "documents":
        yield (
            f'bootstrap.kind: "documents" needs environments with bootstrap documents, but '
            f'{", ".join(without)} has none; use "random", or give model.path'
        )
    elif bootstrap.also and _bootstrap_kind(config) == "random":
        reason = f"{', '.join(without)} has none" if without else 'kind = "random" reads none'
        yield f"bootstrap.also: gives bootstrap documents, but {reason}; remove it, or change that"


def _transport(config: Config) -> Problems:
    transport = config.transport
    needed = MIN_HEARTBEATS * transport.heartbeat_s
    if transport.session_timeout_s < needed:
        yield (
            f"transport.session_timeout_s: {transport.session_timeout_s:g} is less than {MIN_HEARTBEATS} "
            "heartbeats of "
            f"{transport.heartbeat_s:g} s; use at least {needed:g}"
        )
    parsed = parse_bind(transport.bind)
    if parsed is None:
        yield f'transport.bind: not an address, found "{transport.bind}"; write tcp://127.0.0.1:0'
    elif parsed[0] not in LOOPBACK_HOSTS:
        yield (
            f'transport.bind: "{transport.bind}" is not loopback, and this version has no keys to protect '
            "it; "
            "use tcp://127.0.0.1:0"
        )
    if transport.credit_bytes < transport.max_message_bytes:
        yield (
            f"transport.credit_bytes: {transport.credit_bytes} is less than max_message_bytes = "
            f"{transport.max_message_bytes}, so the longest message could never be sent; raise it"
        )
    row_bytes = BYTES_PER_TOKEN * config.model.max_context_tokens
    if transport.max_message_bytes < 2 * row_bytes:
        yield (
            f"transport.max_message_bytes: {transport.max_message_bytes} cannot hold a row of "
            f"model.max_context_tokens = {config.model.max_context_tokens}; use at least {2 * row_bytes}"
        )


def parse_bind(bind: str) -> tuple[str, int] | None:
    """Split ``tcp://host:port``; None if it is not of that form (port 0 .. 65535)."""
    match = _BIND.match(bind)
    if match is None or int(match["port"]) > 65535:
        return None
    return match["host"], int(match["port"])


def _staleness(config: Config) -> Problems:
    staleness = config.staleness
    if staleness.plan_ahead_steps > staleness.max_lag:
        yield (
            f"staleness.plan_ahead_steps: {staleness.plan_ahead_steps} is beyond staleness.max_lag = "
            f"{staleness.max_lag}, so work would be planned that may not be trained; use at most max_lag, or "
            "-1"
        )
    if config.weights.publish_every_steps > staleness.max_lag + 1:
        yield (
            f"weights.publish_every_steps: {config.weights.publish_every_steps} makes data older than "
            f"staleness.max_lag = {staleness.max_lag}; use at most {staleness.max_lag + 1}"
        )


def _groups(config: Config) -> Problems:
    groups, size = config.groups, config.lifecycle.group_size
    if groups.close == "quorum":
        if not 2 <= groups.quorum_members <= size:
            yield (
                f"groups.quorum_members: {groups.quorum_members} must be between 2 (a baseline needs two) "
                "and "
                f"lifecycle.group_size = {size}"
            )
        if groups.after_s > groups.deadline_s:
            yield (
                f"groups.after_s: {groups.after_s:g} is later than groups.deadline_s = "
                f"{groups.deadline_s:g}; lower it"
            )
    elif groups.after_s > 0 or groups.quorum_members > 1:
        yield (
            'groups.close: "all" contradicts groups.quorum_members or groups.after_s, which only "quorum" '
            "reads; "
            'set groups.close = "quorum" or remove them'
        )


def _credit_assignment(config: Config) -> Problems:
    credit = config.credit_assignment
    for name, style in (("window", "sliding_window_mean"), ("gamma", "discounted")):
        is_given = getattr(credit, name) is not None
        if is_given and credit.style != style:
            yield (
                f'credit_assignment.{name}: only style "{style}" reads it, found style "{credit.style}"; '
                "remove it"
            )
        if not is_given and credit.style == style:
            yield f'credit_assignment.{name}: missing; style "{style}" needs it'
    if credit.parity and credit.red == "off":
        yield 'credit_assignment.parity: only red = "bisection" reads it, found red = "off"; remove it'


def _early_stop(config: Config) -> Problems:
    stop = config.run.early_stop
    if not stop.is_enabled:
        return
    if config.lifecycle.pack_size < 2:
        yield (
            "run.early_stop: needs a gap between positions, found lifecycle.pack_size = 1; use at least 2, "
            "or disable it"
        )
    for name in ("window_steps", "min_steps"):
        value = getattr(stop, name)
        if value > config.run.num_steps:
            yield (
                f"run.early_stop.{name}: {value} is more than run.num_steps = {config.run.num_steps}; lower "
                "it"
            )


def _train_only(config: Config) -> Problems:
    if config.engine.top_p < 1:
        yield (
            f"engine.top_p: {config.engine.top_p:g} makes log-probs that are not those of the trained "
            "policy; use 1.0"
        )


def _evaluation(config: Config) -> Problems:
    evaluation = config.evaluation
    if not evaluation.every_steps:
        if evaluation.suite:
            yield (
                f'evaluation.suite: "{evaluation.suite}" is played only with evaluation.every_steps, found '
                "0; set that too, or remove this"
            )
        return
    if evaluation.every_steps > config.run.num_steps:
        yield (
            f"evaluation.every_steps: {evaluation.every_steps} is more than run.num_steps = "
            f"{config.run.num_steps}; lower it, or set 0"
        )
    if evaluation.suite:
        from cod_async.evaluate.suite import load_suite

        try:
            load_suite(Path(evaluation.suite), config)
        except InputError as error:
            yield from (f"evaluation.suite: {problem}" for problem in error.problems)


def _port(config: Config) -> Problems:
    parsed = parse_bind(config.transport.bind)
    if parsed is None or parsed[1] == 0 or parsed[0] not in LOOPBACK_HOSTS:
        return
    host, port = parsed
    family = socket.AF_INET6 if host.startswith("[") else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host.strip("[]"), port))
        except OSError as error:
            reason = "is in use" if error.errno == errno.EADDRINUSE else f"cannot be bound, {error.strerror}"
            yield f"transport.bind: port {port} {reason}; choose another, or 0 for a free one"


def _nearest(folder: Path) -> Path:
    """Return the folder, or the closest one above it that exists."""
    folder = folder.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return folder


def why_not_writable(folder: Path) -> str | None:
    """Say why nothing can be made in a folder (which need not exist yet), or None if something can."""
    folder = _nearest(folder)
    if not folder.is_dir():
        return f'"{folder}" is not a folder; choose another'
    try:  # permission bits do not tell the truth to root, on read-only mounts or under quotas: try it
        with tempfile.TemporaryDirectory(prefix=".cod-", dir=folder):
            pass
    except OSError as error:
        return f'"{folder}" is not writable, {error.strerror or error}; choose another or correct permissions'
    return None


def check_new_folder(label: str, folder: Path) -> list[str]:
    """List what forbids making ``folder``: it exists and is not empty, or it cannot be written."""
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            return [f"{label} {folder}: exists already; choose a new folder"]
    except OSError as error:
        return [f"{label} {folder}: cannot be read, {error.strerror or error}; choose another folder"]
    reason = why_not_writable(folder)
    return [] if reason is None else [f"{label} {folder}: {reason}"]


def _output_dir(config: Config) -> Problems:
    folder = Path(config.run.output_dir)
    reason = why_not_writable(folder)
    if reason is None:
        yield from _filesystem(_nearest(folder))
    else:
        yield f"run.output_dir: {reason}"


def _filesystem(folder: Path) -> Problems:
    from cod_async.store.schema import refuse_network_filesystem

    try:
        refuse_network_filesystem(folder)
    except StoreError as error:
        yield f"run.output_dir: {error}"
