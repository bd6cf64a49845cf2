"""``cod doctor --engine``: one SGLang server put through everything that a run relies on.

First who it is (:mod:`.identity`), then the contract of every engine (:mod:`cod_async.engines.conformance`,
through :class:`.target.ServerEngine`), then what is special to servers (:mod:`.behavior`). Nothing is changed
at the server unless it is allowed; then the weights it has are loaded again under another label, which is
given back.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil

from cod_async.engines.conformance import Check, Finding, engine_checks, find
from cod_async.engines.conformance.asking import BFLOAT16, FLOAT32, Subject, Tolerance
from cod_async.engines.conformance.reference import Reference, TransformersReference, bytes_needed
from cod_async.engines.sglang.conformance import behavior, identity
from cod_async.engines.sglang.conformance.target import SameWeights, ServerEngine, ServerTarget
from cod_async.engines.sglang.protocol import ServerInfo
from cod_async.errors import CodError, InputError

__all__ = ["INPUT_CHECKS", "ServerTarget", "examine_server"]

INPUT_CHECKS = ("server_answers", "server_keys", "server_model", "server_tokenizer")
"""When one of these fails, the url, a key or the model is not the right one."""
MAX_REFERENCE_FRAC = 0.7
"""Share of the free memory that the reference may take."""

Report = Callable[[Finding], None]


async def examine_server(target: ServerTarget, report: Report, deadline_s: float = 300.0) -> list[Finding]:
    """Examine a server.

    Args:
        target: the server and what it should be.
        report: hears of every finding at once.
        deadline_s: longest time of each check, in seconds.

    Returns:
        All findings, in order; after a server that cannot be used, only those up to there.
    """
    findings: list[Finding] = []

    async def carry_out(name: str, run: Callable[[], Any]) -> bool:
        finding = await find(Check(name, run, deadline_s))
        findings.append(finding)
        report(finding)
        return finding.status != "failed"

    infos: list[ServerInfo] = []

    async def answers() -> str:
        info, text = await identity.reachable(target)
        infos.append(info)
        return text

    if not await carry_out("server_answers", answers):
        return findings
    (info,) = infos
    is_right = await carry_out("server_keys", partial(identity.keys, target))
    model_dir = _model_dir(target, info)
    if model_dir is None:
        finding = Finding(
            "server_model", "failed", f"{info.model_path} cannot be read here; give --model DIR"
        )
        report(finding)
        return [*findings, finding]
    is_right &= await carry_out("server_model", partial(identity.model, target, info, model_dir))
    is_right &= await carry_out("server_tokenizer", partial(identity.tokenizer, target, model_dir))
    if not is_right:
        return findings
    try:
        vocab_size = int(identity.read_json(model_dir / "config.json")["vocab_size"])
        reference = await asyncio.to_thread(_reference, model_dir)
    except (CodError, KeyError, TypeError, ValueError) as error:
        finding = Finding("reference", "failed", f"{model_dir}: {error}")
        report(finding)
        return [*findings, finding]
    client = target.client(vocab_size)
    try:
        await client.info()  # tells the client what this release can do
        checks = await _checks(target, ServerEngine(client, info), info, (model_dir, vocab_size, reference))
        for check in checks:
            await carry_out(check.name, check.run)
    finally:
        await client.aclose()
    return findings


async def _checks(
    target: ServerTarget, engine: ServerEngine, info: ServerInfo, facts: tuple[Path, int, Reference | None]
) -> list[Check]:
    """Return the checks of a server that is the right one, in order."""
    model_dir, vocab_size, reference = facts
    settings: dict[str, Any] = {
        "engine": engine,
        "vocab_size": vocab_size,
        "reference": reference,
        "tolerance": await _tolerance(target, model_dir),
        "eos_ids": _eos_ids(model_dir),
        "counts_aborted": target.settings.has_streaming,
    }
    subject = Subject(**settings)
    if target.allow_updates and reference is not None:
        updater = SameWeights(engine, model_dir, reference, subject)
        subject = Subject(**settings, updater=updater)
    return [
        Check("server_weights", partial(identity.weights, target, engine.client, model_dir)),
        *engine_checks(subject),
        Check("server_prefix_cache", partial(behavior.prefix_cache, subject, engine, info)),
        Check("server_abort", partial(behavior.abort_at_server, subject, engine)),
        Check("server_probe_while_paused", partial(behavior.probe_while_paused, target, subject, engine)),
        Check("server_lost_client", partial(behavior.survives_lost_client, target, subject, engine)),
    ]


def _model_dir(target: ServerTarget, info: ServerInfo) -> Path | None:
    """Return the model directory to compare with, if there is one."""
    if target.model_dir is not None:
        return target.model_dir
    path = Path(info.model_path)
    return path if (path / "config.json").is_file() else None


def _reference(model_dir: Path) -> Reference | None:
    """Load the reference, if it fits into memory; None without."""
    needed = bytes_needed(model_dir)
    if needed > MAX_REFERENCE_FRAC * psutil.virtual_memory().available:
        return None
    return TransformersReference(model_dir)


def _eos_ids(model_dir: Path) -> frozenset[int]:
    """Return the ids after which a server would end a completion by itself."""
    found: set[int] = set()
    for name in ("config.json", "generation_config.json"):
        try:
            value = identity.read_json(model_dir / name).get("eos_token_id")
        except InputError:  # a model need not have both
            continue
        found |= {
            token for token in (value if isinstance(value, list) else [value]) if isinstance(token, int)
        }
    return frozenset(found)


async def _tolerance(target: ServerTarget, model_dir: Path) -> Tolerance:
    """Return how closely a server's arithmetic must agree with the reference, by its dtype."""
    import msgspec

    said = msgspec.json.decode(await target.call("/server_info", None, is_admin=False)).get("dtype")
    if said in (None, "auto"):
        config = identity.read_json(model_dir / "config.json")
        said = config.get("dtype") or config.get("torch_dtype")
    return FLOAT32 if str(said) in ("float32", "float") else BFLOAT16
