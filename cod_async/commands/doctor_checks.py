"""What ``cod doctor CONFIG`` looks at besides the configuration itself: machine, environments, model, engine.

Nothing is started and nothing is written but a temporary file where the run folder will be.
"""

from __future__ import annotations

import asyncio
import importlib.metadata
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from cod_async.config.check import parse_bind
from cod_async.config.schema import Config, EnvironmentConfig
from cod_async.engines.conformance.findings import Check, CheckFailedError, CheckSkippedError, find, find_all
from cod_async.errors import EngineError, InputError

if TYPE_CHECKING:
    from cod_async.commands.doctor import Reporter

MIN_FREE_BYTES = 1 << 30
"""A run folder with less room than this is of no use."""
NETWORK_FILE_SYSTEMS = frozenset(
    ("nfs", "nfs4", "cifs", "smb3", "smbfs", "9p", "afs", "lustre", "beegfs", "gpfs", "ceph", "glusterfs",
     "fuse.sshfs", "fuse.glusterfs", "fuse.ceph", "fuse.s3fs", "fuse.gcsfuse")
)  # fmt: skip
"""Locks and memory maps of the run database do not hold on these."""
MAX_EXAMINED_BYTES = 1 << 30
"""Models with larger float32 weights are not put through the embedded engine's checks here."""
CONNECT_TIMEOUT_S = 5.0
PROBE_TEXTS = ("Hints : 1=Up 2=In .", "A line.\n\n- ünïcode 🎲\n- <b>tags</b>  x", " 3.14159 {} [] ")


def examine_config(
    config: Config, reporter: Reporter, *, has_servers: bool, model_dir: Path | None = None
) -> None:
    """Look at everything that a configuration needs; findings go to the reporter.

    Args:
        config: a configuration of valid values, which may have other problems.
        reporter: takes the findings.
        has_servers: SGLang servers are examined elsewhere.
        model_dir: the model, instead of the one that the configuration names.
    """
    path = model_dir or (Path(config.model.path) if config.model.path else None)
    checks: list[tuple[str, Callable[[], str], bool]] = [
        ("packages", packages, False),
        ("disk", partial(disk, config), True),
        ("ports", partial(ports, config), True),
    ]
    for index, environment in enumerate(config.environments):
        checks.append((f"environment {index} {environment.name}", partial(play_reset, config, index), False))
        for name, url in _endpoints(environment):
            checks.append((f"endpoint {environment.name}.{name}", partial(endpoint, url), True))
    checks.append(("model", partial(model, config, path), True))
    if config.engine.kind == "sglang" and not has_servers:
        checks.append(("sglang_python", partial(sglang_python, config), True))
    for name, run, is_input in checks:
        if is_input:
            reporter.input_checks.add(name)
        reporter(asyncio.run(find(Check(name, partial(_in_thread, run)))))
    if config.engine.kind == "embedded" and not has_servers:
        asyncio.run(_embedded(config, path, reporter))


async def _in_thread(run: Callable[[], str]) -> str:
    return await asyncio.to_thread(run)


def packages() -> str:
    """Python and the packages that do the work are there, in which versions."""
    found = [f"python {platform.python_version()}"]
    if not (3, 11) <= sys.version_info[:2] < (3, 13):
        raise CheckFailedError(f"python {platform.python_version()}; this version needs 3.11 or 3.12")
    for name in ("cod-async", "torch", "transformers", "tokenizers", "pyzmq", "aiohttp", "triton"):
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            if name != "triton":
                raise CheckFailedError(
                    f"{name} is not installed; install cod-async with its dependencies"
                ) from None
            found.append("no triton (kernels need it on GPUs)")
    return ", ".join(found)


def disk(config: Config) -> str:
    """The run folder is on a local file system with room."""
    import psutil

    folder = Path(config.run.output_dir).resolve()
    while not folder.exists():
        folder = folder.parent
    mounts = [part for part in psutil.disk_partitions(all=True) if folder.is_relative_to(part.mountpoint)]
    kind = max(mounts, key=lambda part: len(part.mountpoint)).fstype if mounts else "unknown"
    free = shutil.disk_usage(folder).free
    text = f"{folder}: {kind}, {free / 2**30:.1f} GiB free"
    if kind in NETWORK_FILE_SYSTEMS:
        raise CheckFailedError(f"{text}; the run database needs a local file system, set run.output_dir")
    if free < MIN_FREE_BYTES:
        raise CheckFailedError(
            f"{text}; a run needs at least {MIN_FREE_BYTES / 2**30:g} GiB, set run.output_dir"
        )
    return text


def ports(config: Config) -> str:
    """Addresses that the run listens on are free."""
    wanted = {"transport.bind": config.transport.bind}
    if config.weights.source == "pull":
        wanted["weights.serve"] = config.weights.serve
    parts = []
    for name, address in wanted.items():
        parsed = parse_bind(address)
        if parsed is None:
            raise CheckFailedError(f'{name}: not an address, found "{address}"; write tcp://127.0.0.1:0')
        host, port = parsed[0].strip("[]"), parsed[1]
        if port == 0:
            parts.append(f"{name} takes a free port")
            continue
        try:
            family = socket.AF_INET6 if ":" in host else socket.AF_INET
            with closing(socket.socket(family)) as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                probe.bind(("" if host == "*" else host, port))
        except OSError as error:
            raise CheckFailedError(
                f"{name}: {address} cannot be listened on, {error.strerror or error}; choose another port"
            ) from None
        parts.append(f"{name} {address} is free")
    return ", ".join(parts)


def play_reset(config: Config, index: int) -> str:
    """An environment can be made, its data is there, and its first task starts."""
    from cod_async.envs import registry
    from cod_async.lifecycle.packs import plan_pack

    chosen = config.environments[index]
    spec = registry.get(chosen.name)
    options = spec.options(chosen.preset, chosen.options)
    sizes = ""
    if spec.num_records is not None:
        sizes = ", ".join(f"{spec.num_records(options, split)} {split}" for split in ("train", "held_out"))
    pack = plan_pack((chosen,), config.lifecycle.pack_size, config.run.seed, 0)
    observation = spec.make(options).reset(pack.tasks()[0])
    if not observation:
        raise CheckFailedError(f"{chosen.preset}: its first observation is empty")
    return f"{chosen.preset}: first task starts with {len(observation)} characters" + (
        f", records: {sizes}" if sizes else ""
    )


def _endpoints(environment: EnvironmentConfig) -> Iterator[tuple[str, str]]:
    """Yield the addresses that an environment's options name."""
    for name, value in environment.options.items():
        if name.endswith("_url") and isinstance(value, str) and value:
            yield name, value


def endpoint(url: str) -> str:
    """Somebody listens at an address that an environment needs; nothing is asked there."""
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    try:
        with closing(socket.create_connection((parts.hostname or "", port), CONNECT_TIMEOUT_S)):
            return f"{parts.hostname}:{port} listens"
    except OSError as error:
        raise CheckFailedError(
            f"{parts.hostname}:{port} cannot be reached, {error}; start it first"
        ) from None


def model(config: Config, path: Path | None) -> str:
    """The model is one that is trained here; its tokenizer and its template family are usable."""
    if path is None:
        raise CheckSkippedError("the bootstrap makes the model")
    from cod_async.lifecycle.rendering import load_renderer
    from cod_async.models.shape import read_config
    from cod_async.models.supported import text_values, unsupported

    renderer = load_renderer(path, config.model.renderer)
    raw = read_config(path)
    obstacles = unsupported(raw)
    if obstacles:
        raise CheckFailedError(f"{path}: cannot be trained, {'; '.join(obstacles)}")
    sizes = text_values(raw)
    vocab_size = sizes.get("vocab_size")
    if not isinstance(vocab_size, int):
        raise CheckFailedError(f"{path}: config.json names no vocab_size")
    tokenizer = renderer.tokenizer
    if tokenizer.vocab_size > vocab_size:
        raise CheckFailedError(f"{path}: {tokenizer.vocab_size} tokenizer ids, {vocab_size} embeddings")
    num_stable = 0
    for text in PROBE_TEXTS:
        ids = tokenizer.encode(text)
        if not all(0 <= token < vocab_size for token in ids):
            raise CheckFailedError(f"{path}: {text!r} encodes to ids outside the vocabulary")
        num_stable += tokenizer.encode(tokenizer.decode(ids)) == ids
    opening = renderer.open("You are the system.", "The user speaks.")
    ends = ", ".join(map(str, sorted(renderer.stop_ids)))
    return (
        f"{path}: {raw.get('model_type')}, {sizes.get('num_hidden_layers')} layers of "
        f"{sizes.get('hidden_size')}, vocabulary {vocab_size}, "
        f"family {renderer.family}, stop ids {ends}, a first prompt of {len(opening)} ids; "
        f"{num_stable} of {len(PROBE_TEXTS)} texts keep their ids when decoded and encoded again"
    )


def sglang_python(config: Config) -> str:
    """The interpreter for started servers has sglang, of a release that can be driven."""
    from cod_async.launch.engines import inspect_engine

    try:
        found = inspect_engine(config)
    except InputError as error:
        raise CheckFailedError(str(error)) from None
    device = "CUDA" if found.has_cuda else "no CUDA"
    return f"{found.python}: SGLang {found.release}, torch {found.torch}, {device}"


async def _embedded(config: Config, path: Path | None, reporter: Reporter) -> None:
    """Put the embedded engine through its contract, with the run's model."""
    from cod_async.engines.conformance.findings import Finding

    if path is None:
        reporter(Finding("engine", "skipped", "the bootstrap makes the model"))
        return
    try:
        import torch

        from cod_async.engines.conformance.embedded import embedded_checks

        torch.set_num_threads(config.engine.num_threads)  # as the actor does
        checks, engine = await asyncio.to_thread(embedded_checks, config, path, MAX_EXAMINED_BYTES)
    except InputError as error:
        reporter(Finding("engine", "failed", str(error)))
        reporter.input_checks.add("engine")
        return
    except CheckSkippedError as error:
        reporter(Finding("engine", "skipped", str(error)))
        return
    except EngineError as error:  # this machine cannot keep what the configuration asks of it
        reporter(Finding("engine", "failed", str(error)))
        return
    await find_all(checks, reporter)
    await engine.aclose()
