"""What a run needs of its servers, and looking at them before it starts, which the launcher does too: torch
is loaded only where weights are read.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import SafetensorError, safe_open

from cod_async.config.schema import Config
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.protocol import ServerInfo
from cod_async.engines.sglang.records import ServerRecord
from cod_async.errors import EngineDownError, EngineError, EngineMismatchError, InputError, WeightsError
from cod_async.lifecycle.segment import Version
from cod_async.weights.folders import file_sha256
from cod_async.weights.manifest import Manifest

if TYPE_CHECKING:
    from cod_async.weights.source import PublishedWeights

_log = logging.getLogger(__name__)

TESTED_RELEASES = ("0.5.23",)
"""Releases of SGLang that this project was tested with; others that it can drive are named in the log."""

TOKENIZER_FILE = "tokenizer.json"
_HEAD = "lm_head.weight"
_SHAPE = ("vocab_size", "hidden_size", "num_hidden_layers")


@dataclass(frozen=True)
class Needs:
    """What makes a server usable: the model and the longest row of the run, and its mode of updates.

    Attributes:
        model: contents of the model directory's ``config.json``.
        tokenizer: SHA-256 of its ``tokenizer.json``; empty if there is none.
        vocab_size: token ids are 0 .. vocab_size-1.
        config: the run's configuration.
    """

    model: dict[str, Any]
    tokenizer: str
    vocab_size: int
    config: Config

    @classmethod
    def of(cls, model_dir: Path, config: Config) -> Needs:
        """Read the model directory.

        Raises:
            InputError: it has no usable ``config.json``.
        """
        model = _read_config(model_dir)
        size = model.get("vocab_size")
        if not isinstance(size, int) or size < 1:
            raise InputError(f"{model_dir / 'config.json'}: vocab_size is {size!r}, not a positive number")
        return cls(model, _tokenizer_digest(model_dir), size, config)

    def client(self, record: ServerRecord) -> ServerClient:
        """Make a client for a server."""
        return ServerClient(
            record.url,
            settings=self.config.engine.server,
            vocab_size=self.vocab_size,
            api_key=record.api_key,
            admin_key=record.admin_key,
        )

    def problems(self, url: str, client: ServerClient, info: ServerInfo) -> list[str]:
        """Name all that makes a server unusable, one sentence each."""
        found = []
        architecture = next(iter(self.model.get("architectures") or ()), "")
        if info.architecture and architecture and info.architecture != architecture:
            found.append(f"{url} serves {info.architecture}, the run's model is {architecture}")
        with suppress(InputError):  # on another host, its files cannot be read here; checksums will tell
            other = _read_config(Path(info.model_path))
            found += [
                f"{url} serves a model with {name} {other.get(name)}, the run's has {self.model.get(name)}"
                for name in _SHAPE
                if other.get(name) != self.model.get(name)
            ]
            tokenizer = _tokenizer_digest(Path(info.model_path))
            if tokenizer and self.tokenizer and tokenizer != self.tokenizer:
                found.append(
                    f"{url} serves a model with another tokenizer ({TOKENIZER_FILE} hashes to "
                    f"{tokenizer[:12]}, the run's to {self.tokenizer[:12]})"
                )
        context = self.config.model.max_context_tokens
        if info.max_request_tokens < context:
            found.append(
                f"{url} takes rows of {info.max_request_tokens} tokens, model.max_context_tokens is "
                f"{context}; start it with a larger --context-length and --max-total-tokens"
            )
        mode = self.config.engine.on_publish
        if not client.has_version_spans and mode not in ("wait", "at_segment_boundary"):
            found.append(
                f"{url} runs SGLang {info.release}, which does not tell the versions of tokens (0.5.19 and "
                f'newer do), so engine.on_publish = "{mode}" is not possible; use "wait" or '
                '"at_segment_boundary"'
            )
        if not found and info.release not in TESTED_RELEASES:
            _log.warning("%s runs SGLang %s; tested: %s", url, info.release, ", ".join(TESTED_RELEASES))
        return found


async def look_at_servers(records: Callable[[], list[ServerRecord]], needs: Needs) -> None:
    """See that attached servers all fit, or that started ones do, waiting for the first of them.

    Raises:
        InputError: servers do not answer, refuse the key, or do not fit; all problems are listed.
        EngineError: no started server answered in time.
    """
    settings = needs.config.engine.server
    is_attached = bool(needs.config.engine.urls)
    loop = asyncio.get_running_loop()
    until_s = loop.time() + settings.start_timeout_s
    while True:
        ready = [record for record in records() if record.state == "ready"]
        looks = await asyncio.gather(*(_look_at(record, needs) for record in ready))
        problems = [problem for look in looks for problem in look.problems]
        missing = [look.missing for look in looks if look.missing]
        if problems or (is_attached and missing):
            raise InputError([*problems, *(missing if is_attached else ())])
        if len(missing) < len(ready):
            return
        if loop.time() >= until_s:
            raise EngineError(
                f"no server answered within engine.server.start_timeout_s = {settings.start_timeout_s:g}: "
                + ("; ".join(missing) or "none was started; see the log of the run's engines")
            )
        await asyncio.sleep(min(settings.probe_every_s, max(0.0, until_s - loop.time())))


@dataclass(frozen=True)
class _Look:
    problems: list[str]
    missing: str = ""


async def _look_at(record: ServerRecord, needs: Needs) -> _Look:
    client: ServerClient | None = None
    try:
        client = needs.client(record)
        return _Look(needs.problems(record.url, client, await client.info()))
    except EngineDownError as error:
        return _Look([], str(error))
    except EngineError as error:
        advice = "" if isinstance(error, EngineMismatchError) else "; correct engine.urls"
        return _Look([f"{error}{advice}"])
    finally:
        if client is not None:
            await client.aclose()


def starting_weights(model_dir: Path, run: str) -> PublishedWeights:
    """Return the weights that a run starts from, as version 0.0. Reads and hashes them: call it in a thread.

    Raises:
        WeightsError: the directory has no readable safetensors.
    """
    from cod_async.weights.digest import tensors_digest
    from cod_async.weights.source import PublishedWeights

    try:
        config = _read_config(model_dir)
        tensors = {}
        for path in sorted(model_dir.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, InputError) as error:
        raise WeightsError(f"{model_dir} cannot be read: {error}") from None
    if not tensors:
        raise WeightsError(f"{model_dir} has no safetensors")
    if config.get("tie_word_embeddings"):
        tensors.pop(_HEAD, None)
    return PublishedWeights(
        Manifest(run, Version(0, 0), tensors_digest(tensors), ()), model_dir.resolve(), config, tensors
    )


def _tokenizer_digest(model_dir: Path) -> str:
    try:
        return file_sha256(model_dir / TOKENIZER_FILE)
    except OSError:
        return ""


def _read_config(model_dir: Path) -> dict[str, Any]:
    path = model_dir / "config.json"
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read ({error}); give a complete model directory") from None
    if not isinstance(value, dict):
        raise InputError(f"{path} holds no JSON object; give a complete model directory")
    return value
