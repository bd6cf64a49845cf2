"""How one SGLang server is started: its interpreter, its command line, its environment.

SGLang lives in an environment of its own, whose pins and ours do not go together, so it is only ever spoken
to through ``python -m sglang.launch_server`` under the interpreter that ``engine.python`` names. That
interpreter is asked once what it has; without CUDA the server gets the flags of SGLang's CPU path. Keys never
stand on a command line, which every user of the machine can read: they come from a file that only its owner
can read (``--config``). Other settings follow from the run's configuration, and ``engine.server.args`` comes
last, so that it wins.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from cod_async.config.check_engine import find_python
from cod_async.config.schema import Config
from cod_async.durable import write_atomic
from cod_async.engines.sglang.protocol import OLDEST_RELEASE, parse_release, version_label
from cod_async.errors import InputError
from cod_async.lifecycle.segment import Version
from cod_async.models.shape import CONFIG_FILE, read_shape

START_LABEL = version_label(Version(0, 0))
"""What the weights in ``RUN/model`` are called: every lineage begins with them."""
EXTRA_CONTEXT_TOKENS = 8
"""SGLang keeps some of its context length for itself: a row of N tokens needs a length of N + 2, and a prompt
must end 6 tokens before it."""
CPU_CACHE_BYTES = 2 << 30
"""Most memory for the KV cache of a server on a CPU, where SGLang would take a share of the whole machine."""
KEEP_ALIVE_S = 600
"""An idle connection is kept this long by the server; its own 5 s break pooled connections between turns."""
_INSPECT_TIMEOUT_S = 120.0
_DTYPES = ("bfloat16", "float16", "float32")
_INSPECT = """
import importlib.metadata, json
found = {"release": "", "torch": "", "has_cuda": False, "error": ""}
try:
    found["release"] = importlib.metadata.version("sglang")
    import torch
    found["torch"], found["has_cuda"] = torch.__version__, torch.cuda.is_available()
except Exception as error:
    found["error"] = f"{type(error).__name__}: {error}"
print(json.dumps(found))
"""


class Interpreter(msgspec.Struct, frozen=True, kw_only=True):
    """A Python that can start servers.

    Attributes:
        python: absolute path of the executable.
        release: SGLang's version there.
        torch: torch's version there.
        has_cuda: whether torch finds a CUDA device; without, servers run on the CPU.
    """

    python: str
    release: str
    torch: str
    has_cuda: bool


class ServerKeys(msgspec.Struct, frozen=True):
    """The bearer keys of one server, drawn anew for each start."""

    api_key: str
    admin_key: str


def inspect_interpreter(python: str, environment: Mapping[str, str]) -> Interpreter:
    """Ask the interpreter that ``engine.python`` names what it has.

    Args:
        python: value of ``engine.python``.
        environment: environment variables, see :func:`server_environment`.

    Raises:
        InputError: it is missing, has no SGLang or no torch, or an SGLang that this project does not know.
    """
    path = find_python(python)
    if path is None:
        raise InputError(
            f'engine.python: "{python}" cannot be executed; give the interpreter of one with sglang'
        )
    label = f'engine.python: "{python}"' if python else f"engine.python: empty, and {path}"
    try:
        done = subprocess.run(
            [path, "-c", _INSPECT],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            timeout=_INSPECT_TIMEOUT_S,
            check=False,
        )
        found = json.loads(done.stdout.decode(errors="replace").strip().splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as error:
        raise InputError(f"{label} does not answer as a Python should ({error}); correct it") from error
    if found["error"] or not found["release"]:
        reason = found["error"] or "no sglang"
        raise InputError(
            f"{label} cannot start SGLang ({reason}); give the interpreter of an environment with it"
        )
    release = parse_release(found["release"])
    if release is None or release < OLDEST_RELEASE:
        oldest = ".".join(map(str, OLDEST_RELEASE))
        raise InputError(f"{label} has sglang {found['release']}; use {oldest} or newer")
    return Interpreter(
        python=path, release=found["release"], torch=found["torch"], has_cuda=bool(found["has_cuda"])
    )


def server_environment(base: Mapping[str, str], own_roots: Sequence[str]) -> dict[str, str]:
    """Return a server's environment variables.

    Args:
        base: those of this project's processes, thread counts included.
        own_roots: folders that make this project importable. They are taken off ``PYTHONPATH``: one of them
            may be a site-packages folder, whose packages must not get among SGLang's.
    """
    roots = {os.path.realpath(root) for root in own_roots}
    known = [path for path in base.get("PYTHONPATH", "").split(os.pathsep) if path]
    kept = [path for path in known if os.path.realpath(path) not in roots]
    environment = {name: value for name, value in base.items() if name != "PYTHONPATH"}
    if kept:
        environment["PYTHONPATH"] = os.pathsep.join(kept)
    return environment | {
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_OFFLINE": "1",
        "SGLANG_ALLOW_OVERWRITE_LONGER_CONTEXT_LEN": "1",  # for EXTRA_CONTEXT_TOKENS, which no row reaches
        "SGLANG_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
    }


def write_keys(path: Path, keys: ServerKeys) -> None:
    """Write the file that ``--config`` reads, for its owner's eyes only from the first moment."""
    values = {"api-key": keys.api_key, "admin-api-key": keys.admin_key}
    # JSON is YAML, and its quotes keep a key of digits a text.
    write_atomic(path, msgspec.json.encode(values) + b"\n", mode=0o600)


def server_command(
    config: Config,
    model_dir: Path,
    *,
    interpreter: Interpreter,
    port: int,
    keys_path: Path,
    index: int = 0,
) -> list[str]:
    """Return the command line of one server.

    Args:
        config: the run's configuration.
        model_dir: Hugging Face model directory to start from, ``RUN/model``.
        interpreter: what to start it with.
        port: TCP port to listen on, at ``engine.server.host``.
        keys_path: a file made by :func:`write_keys`, ending in ``.yaml``.
        index: of this server in the run; on GPUs it takes the devices after those of the servers before it.

    Raises:
        InputError: the model's ``config.json`` cannot be read.
    """
    engine, server = config.engine, config.engine.server
    command = [
        interpreter.python, "-m", "sglang.launch_server",
        "--config", str(keys_path),
        "--model-path", str(model_dir),
        "--host", server.host.strip("[]"),
        "--port", str(port),
        "--weight-version", START_LABEL,
        "--max-running-requests", str(engine.max_running),
        "--context-length", str(config.model.max_context_tokens + EXTRA_CONTEXT_TOKENS),
        "--sampling-defaults", "openai",
        "--skip-server-warmup",
        "--log-level", "warning",
    ]  # fmt: skip
    if interpreter.has_cuda:
        command += ["--device", "cuda", "--dtype", _dtype(model_dir)]
        first = index * _num_devices(server.args)
        if first:
            command += ["--base-gpu-id", str(first)]
    else:
        command += [
            "--device", "cpu", "--dtype", "float32",
            "--attention-backend", "torch_native",
            "--sampling-backend", "pytorch",
            "--grammar-backend", "none",
            "--disable-cuda-graph",
            "--sleep-on-idle",
            "--max-total-tokens", str(_cpu_cache_tokens(config, model_dir)),
        ]  # fmt: skip
    return [*command, *server.args]


def device_environment(interpreter: Interpreter) -> dict[str, str]:
    """Return the environment variables that the interpreter's device asks for."""
    return {} if interpreter.has_cuda else {"SGLANG_USE_CPU_ENGINE": "1"}


def _dtype(model_dir: Path) -> str:
    """Return the dtype of a model directory by name; SGLang's ``auto`` would serve float32 as float16."""
    try:
        values = json.loads((model_dir / CONFIG_FILE).read_text())
    except (OSError, ValueError) as error:
        raise InputError(f"{model_dir / CONFIG_FILE}: cannot be read, {error}; correct it") from error
    found = values.get("dtype") or values.get("torch_dtype")
    return found if found in _DTYPES else "bfloat16"


def _cpu_cache_tokens(config: Config, model_dir: Path) -> int:
    """Return the size of the KV cache on a CPU: room for every running row and as much again for finished
    prefixes, within :data:`CPU_CACHE_BYTES`, but never less than two rows.
    """
    sizes = read_shape(model_dir).sizes
    per_token = 2 * 4 * sizes["num_hidden_layers"] * sizes["num_key_value_heads"] * sizes["head_dim"]
    row = config.model.max_context_tokens + EXTRA_CONTEXT_TOKENS
    return max(2 * row, min(2 * config.engine.max_running * row, CPU_CACHE_BYTES // per_token))


def _num_devices(args: Sequence[str]) -> int:
    """Return how many GPUs one server takes: tensor-parallel times pipeline-parallel ranks."""
    sizes = {"tp": 1, "pp": 1}
    names = {
        "--tp": "tp", "--tp-size": "tp", "--tensor-parallel-size": "tp",
        "--pp": "pp", "--pp-size": "pp", "--pipeline-parallel-size": "pp",
    }  # fmt: skip
    words = [word for argument in args for word in argument.split("=", 1)]
    for name, value in itertools.pairwise(words):
        if name in names and value.isascii() and value.isdigit():
            sizes[names[name]] = max(1, int(value))
    return sizes["tp"] * sizes["pp"]
