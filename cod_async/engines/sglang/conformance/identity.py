"""Is it the right server: does it answer, take the keys, serve the model, with its tokenizer and weights?

What is wrong here is wrong input: the user gave another url, key or model than the run needs.
"""

from __future__ import annotations

import asyncio
import json
import secrets
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec

from cod_async.engines.conformance.findings import CheckFailedError, CheckSkippedError
from cod_async.engines.sglang.client import ServerClient
from cod_async.engines.sglang.conformance.target import UNNAMED, ServerTarget
from cod_async.engines.sglang.protocol import VERSION_SPANS_RELEASE, ServerInfo, parse_release
from cod_async.errors import EngineMismatchError, EngineRefusedError, InputError, WeightsError
from cod_async.weights.manifest import Manifest

MAX_DETOKENIZED = 2048


async def reachable(target: ServerTarget) -> tuple[ServerInfo, str]:
    """The server answers, takes the key, and is of a release that can be driven."""
    client = target.client()
    try:
        info = await client.info()
    finally:
        await client.aclose()
    release = parse_release(info.release) or (0, 0, 0)
    note = (
        "" if release >= VERSION_SPANS_RELEASE else "; versions of tokens only by waiting for requests to end"
    )
    return info, (
        f"SGLang {info.release} serves {info.architecture} from {info.model_path}, weights "
        f'"{info.label}", {info.tensor_parallel_size} rank(s){note}'
    )


async def keys(target: ServerTarget) -> str:
    """Wrong keys are refused, and control requests need the admin key where there is one."""
    wrong = f"wrong-{secrets.token_hex(8)}"
    probe = {"rid": f"doctor-{secrets.token_hex(8)}"}
    await target.call("/abort_request", probe, is_admin=True)
    is_open = await _is_let_in(target, "/model_info", None, is_admin=False, api_key=wrong, admin_key=wrong)
    if is_open:
        if target.api_key:
            raise CheckFailedError("the server takes any api key; start it with --api-key")
        if not _is_loopback(target.url):
            raise CheckFailedError(
                "the server has no api key, so whoever reaches it can replace its weights; start it with "
                "--api-key and --admin-api-key"
            )
        raise CheckSkippedError("the server has no keys; it is on this machine")
    if await _is_let_in(target, "/abort_request", probe, is_admin=True, admin_key=wrong):
        raise CheckFailedError("control requests are taken with a wrong key")
    if not target.admin_key or target.admin_key == target.api_key:
        return "a wrong key is refused; api and admin key are the same"
    if await _is_let_in(target, "/abort_request", probe, is_admin=True, admin_key=target.api_key):
        raise CheckFailedError("the api key alone may pause the server and replace weights; start it with "
                               "--admin-api-key")  # fmt: skip
    return "a wrong key is refused, and so is the api key for control requests"


async def _is_let_in(target: ServerTarget, path: str, body: Any, *, is_admin: bool, **keys: str) -> bool:
    try:
        await target.call(path, body, is_admin=is_admin, **keys)
    except EngineMismatchError:
        return False
    except EngineRefusedError:
        return True
    return True


def _is_loopback(url: str) -> bool:
    return (urlsplit(url).hostname or "") in ("127.0.0.1", "localhost", "::1")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        InputError: it cannot be read or is something else.
    """
    try:
        value = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read, {error}; give a complete model directory") from None
    if not isinstance(value, dict):
        raise InputError(f"{path}: no JSON object; give a complete model directory")
    return value


async def model(target: ServerTarget, info: ServerInfo, model_dir: Path) -> str:
    """The server serves the model that it should: architecture, vocabulary, room for the longest row."""
    mine = read_json(model_dir / "config.json")
    problems = []
    architecture = next(iter(mine.get("architectures") or []), "")
    if info.architecture and architecture != info.architecture:
        problems.append(f"it serves {info.architecture}, the model is {architecture}")
    theirs = Path(info.model_path) / "config.json"
    compared = [f"architecture {info.architecture}"]
    if theirs.is_file():
        other = read_json(theirs)
        for name in ("vocab_size", "hidden_size", "num_hidden_layers"):
            if mine.get(name) != other.get(name):
                problems.append(f"{name} {other.get(name)}, the model has {mine.get(name)}")
        compared.append(f"vocabulary {mine.get('vocab_size')}")
    else:
        compared.append("its files cannot be read here, vocabulary by log-probs below")
    wanted = target.max_context_tokens
    if wanted is not None and info.max_request_tokens < wanted:
        problems.append(f"it takes rows of {info.max_request_tokens} tokens, the run needs {wanted}")
    compared.append(f"rows of up to {info.max_request_tokens} tokens")
    if problems:
        raise CheckFailedError(f"{'; '.join(problems)} ({model_dir})")
    return f"{', '.join(compared)} ({model_dir})"


async def tokenizer(target: ServerTarget, model_dir: Path) -> str:
    """Ids mean the same to the server: it decodes them, one by one, and so does the model's tokenizer."""
    from transformers import AutoTokenizer

    try:
        mine: Any = AutoTokenizer.from_pretrained(str(model_dir), local_files_only=True)
    except Exception as error:  # whatever a damaged directory makes the library raise
        raise CheckSkippedError(f"{model_dir}: no tokenizer to compare with, {error}") from None
    size = len(mine)
    ids = sorted({size * i // MAX_DETOKENIZED for i in range(MAX_DETOKENIZED)} | set(mine.all_special_ids))
    try:
        blob = await target.call(
            "/detokenize", {"tokens": [[i] for i in ids], "skip_special_tokens": False}, is_admin=False
        )
        texts = msgspec.json.decode(blob, type=dict[str, Any])["text"]
    except (EngineRefusedError, msgspec.MsgspecError, KeyError) as error:
        raise CheckSkippedError(f"the server does not decode ids for others ({error})") from None
    expected = [mine.decode([i], skip_special_tokens=False) for i in ids]
    if not isinstance(texts, list) or len(texts) != len(ids):
        raise CheckSkippedError("the server decodes ids in a way that cannot be compared")
    wrong = [i for i, one, other in zip(ids, expected, texts, strict=True) if one != other]
    if wrong:
        place = ids.index(wrong[0])
        raise CheckFailedError(
            f"{len(wrong)} of {len(ids)} ids decode to other texts, the first is {wrong[0]}: "
            f"{texts[place]!r} at the server, {expected[place]!r} in {model_dir}"
        )
    return f"{len(ids)} of {size} ids decode to the same texts at the server and in {model_dir}"


async def weights(target: ServerTarget, client: ServerClient, model_dir: Path) -> str:
    """The server's checksums of all parameters are those of the model directory."""
    from cod_async.engines.sglang.pushes.checksums import Checker

    source = await asyncio.to_thread(_as_published, model_dir)
    checker = await Checker.prepare(client, source)
    try:
        is_checked = await checker.check()
    except WeightsError as error:
        raise CheckFailedError(str(error)) from None
    except EngineRefusedError as error:
        raise CheckSkippedError(f"the server gives no checksums ({error})") from None
    if not is_checked:
        raise CheckSkippedError("the layout of this server's parameters is not known; see the log")
    return f"checksums of {len(source.tensors())} tensors of {model_dir} equal the server's"


def _as_published(model_dir: Path) -> Any:
    """Return a model directory as if it was a published version, which it need not be."""
    from safetensors import SafetensorError, safe_open

    from cod_async.weights.source import PublishedWeights

    config = read_json(model_dir / "config.json")
    tensors = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        try:
            with safe_open(path, framework="pt") as file:
                tensors.update({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise InputError(f"{path}: not a readable safetensors file, {error}") from error
    if config.get("tie_word_embeddings"):
        tensors.pop("lm_head.weight", None)
    return PublishedWeights(Manifest("doctor", UNNAMED, "", ()), model_dir, config, tensors)
