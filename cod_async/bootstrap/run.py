"""Making the starting model directory.

There are two kinds. ``documents``: environments that were made for tiny models bring their own vocabulary and
training documents, which teach the language of the rollout and note-taking but no use of notes; the table of
what they teach is written into the report, because a result can only be judged beside what its starting
point already knew. A mixture shares one vocabulary; environments of ``bootstrap.also`` give words and
documents too, although nobody trains on them. ``random``: a byte-level ChatML tokenizer made from the
environments' own prompts and weights that nobody trained, for pipelines that only have to run. The directory
appears whole or not at all.
"""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from msgspec.structs import replace

from cod_async.bootstrap.trainer import TokenDocument, TrainingResult, train
from cod_async.config.schema import Config, EnvironmentConfig
from cod_async.durable import commit_folder, write_atomic
from cod_async.envs import registry
from cod_async.errors import InputError
from cod_async.lifecycle.documents import Document
from cod_async.lifecycle.hint import prompts_for
from cod_async.lifecycle.packs import plan_pack
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.lifecycle.seeds import stable_seed
from cod_async.models.directory import save_model
from cod_async.models.qwen3 import Qwen3, Qwen3Config
from cod_async.models.tokenizers import write_chatml_tokenizer, write_word_tokenizer

REPORT_NAME = "bootstrap.json"
"""Name of the report inside the model directory."""

CATEGORIES = ("qa", "solve", "feedback", "hint")
"""Token categories of the documents kind: reading answers, actions, the world's answers, notes."""

_ROPE_THETA = 10_000.0  # rows are short: with a million, half of a tiny head's frequencies never turn
_NUM_TEXT_PACKS = 8

Progress = Callable[[dict[str, Any]], None]


def run_bootstrap(config: Config, out_dir: Path, on_progress: Progress | None = None) -> dict[str, Any]:
    """Make the starting model.

    Args:
        config: environments, bootstrap, model, lifecycle and run.seed are read; equal ones give equal
            weights.
        out_dir: model directory to make: config.json, model.safetensors, tokenizer.json,
            tokenizer_config.json and the report, ``bootstrap.json``.
        on_progress: called every tenth step with ``{step, num_steps, loss, losses}``.

    Returns:
        The report: ``{kind, environments, also, seed, num_parameters, vocab_size, num_steps,
        documents_per_step, losses, gate: {category, bar, loss, is_met} | null,
        taught: [{skill, is_taught, note}], wall_s, cpu_s, history}``; losses in nats per token. A gate that
        was not met is reported, not raised: training may still work, later.

    Raises:
        InputError: the directory exists and is not empty, or the kind does not fit the environments.
        NumericsError: the loss is not finite.
    """
    if out_dir.exists() and (not out_dir.is_dir() or any(out_dir.iterdir())):
        raise InputError(f"{out_dir} exists and is not empty; remove it or choose another folder")
    start_s, start_cpu_s = time.perf_counter(), time.process_time()
    kind = _kind(config)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    torch.set_num_threads(config.learner.num_threads)
    try:
        make = _from_documents if kind == "documents" else _random
        report = {
            "kind": kind,
            "environments": [{"name": e.name, "preset": e.preset} for e in config.environments],
            "also": [{"name": e.name, "preset": e.preset} for e in config.bootstrap.also],
            "seed": config.run.seed,
            **make(config, temporary, on_progress),
            "wall_s": round(time.perf_counter() - start_s, 2),
            "cpu_s": round(time.process_time() - start_cpu_s, 2),
        }
        write_atomic(temporary / REPORT_NAME, (json.dumps(report, indent=2) + "\n").encode())
        temporary.chmod(0o755)  # mkdtemp makes it private; a model is none
        commit_folder(temporary, out_dir)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return report


def _kind(config: Config) -> str:
    """Choose between ``documents`` and ``random``."""
    wanted, names = config.bootstrap.kind, {e.name for e in (*config.environments, *config.bootstrap.also)}
    without = sorted(name for name in names if not registry.get(name).bootstrap_module)
    if without and (wanted == "documents" or config.bootstrap.also):
        raise InputError(
            f"bootstrap documents are asked for, but {', '.join(without)} has none; "
            "use bootstrap.kind = 'random' and no bootstrap.also, or give model.path"
        )
    if wanted == "random" and config.bootstrap.also:
        raise InputError(
            "bootstrap.also: random weights are made from no documents; remove it, or use kind = 'documents'"
        )
    return "random" if wanted == "random" or without else "documents"


class _Taught(NamedTuple):
    """An environment that documents are made for: its module, merged options, and entry in the config."""

    module: Any
    options: dict[str, Any]
    entry: EnvironmentConfig


def _from_documents(config: Config, folder: Path, on_progress: Progress | None) -> dict[str, Any]:
    """Write tokenizer and trained weights; return the report's part."""
    entries = (*config.environments, *config.bootstrap.also)
    taught = []
    for entry in entries:
        spec = registry.get(entry.name)
        module = importlib.import_module(spec.bootstrap_module)
        taught.append(_Taught(module, spec.options(entry.preset, entry.options), entry))
    words = list(dict.fromkeys(word for part in taught for word in part.module.vocabulary(part.options)))
    vocab_size = write_word_tokenizer(folder, words, config.model.max_context_tokens)
    renderer = load_renderer(folder, config.model.renderer)
    model = _new_model(config, vocab_size, renderer)

    def next_documents(step: int, number: int) -> list[TokenDocument]:
        documents: list[Document] = []
        for index, share in enumerate(_shares(entries, number)):
            seed = stable_seed("bootstrap", config.run.seed, step, index)
            documents += taught[index].module.bootstrap_documents(
                taught[index].options, seed, share, pack_size=config.lifecycle.pack_size
            )
        return [encode_document(document, renderer) for document in documents]

    result = train(model, next_documents, CATEGORIES, config.bootstrap, on_progress=on_progress)
    save_model(folder, model)
    return {
        **_size(model),
        "num_steps": result.num_steps,
        "documents_per_step": config.bootstrap.documents_per_step,
        "losses": result.losses,
        "gate": _gate(config, result),
        "taught": _skills(taught, len(config.environments)),
        "history": [{"step": step, **losses} for step, losses in result.history],
    }


def _skills(taught: Sequence[_Taught], num_trained: int) -> list[dict[str, Any]]:
    """Return what the documents teach; a row that does not hold for all environments names those it does."""
    holders: dict[tuple[str, bool, str], list[str]] = {}
    names = [f"{part.entry.name} {part.entry.preset}" for part in taught]
    for name, part in zip(names, taught, strict=True):
        for row in part.module.skills(part.options):
            holders.setdefault(row, []).append(name)
    rows = []
    for (skill, is_taught, note), of in holders.items():
        prefix = "" if of == names else f"{', '.join(of)}: "
        rows.append({"skill": prefix + skill, "is_taught": is_taught, "note": note})
    for name in names[num_trained:]:
        rows.append(
            {"skill": f"{name}: training packs", "is_taught": False, "note": "words and formats only"}
        )
    return rows


def _random(config: Config, folder: Path, on_progress: Progress | None) -> dict[str, Any]:
    """Write a byte-level tokenizer and untrained weights; return the report's part."""
    vocab_size = write_chatml_tokenizer(
        folder, _texts(config), config.bootstrap.vocab_size, config.model.max_context_tokens
    )
    model = _new_model(config, vocab_size, load_renderer(folder, config.model.renderer))
    save_model(folder, model)
    return {
        **_size(model),
        "num_steps": 0,
        "documents_per_step": 0,
        "losses": {},
        "gate": None,
        "taught": [{"skill": "anything", "is_taught": False, "note": "random weights"}],
        "history": [],
    }


def _new_model(config: Config, vocab_size: int, renderer: Renderer) -> Qwen3:
    shape = config.bootstrap.model
    pad_id = renderer.tokenizer.find_id("<pad>")
    try:
        model_config = Qwen3Config(
            vocab_size=vocab_size,
            hidden_size=shape.hidden_size,
            intermediate_size=shape.intermediate_size,
            num_hidden_layers=shape.num_layers,
            num_attention_heads=shape.num_heads,
            num_key_value_heads=shape.num_kv_heads,
            head_dim=shape.head_dim,
            rope_theta=_ROPE_THETA,
            max_position_embeddings=config.model.max_context_tokens,
            bos_token_id=renderer.tokenizer.find_id("<bos>"),
            eos_token_id=renderer.end_of_turn_id,
            pad_token_id=renderer.tokenizer.find_id("<|endoftext|>") if pad_id is None else pad_id,
        )
    except ValueError as error:
        raise InputError(f"bootstrap.model: {error}") from error
    return Qwen3(model_config, torch.Generator().manual_seed(stable_seed("weights", config.run.seed) >> 1))


def encode_document(document: Document, renderer: Renderer) -> TokenDocument:
    """Encode a document with a category code per token (index into :data:`CATEGORIES` plus 1; 0: no loss).

    The words of a ``turn`` are the category ``feedback``; everything else that is learned is of the
    document's own.
    """
    token_ids, mask = document.encode(renderer)
    code = CATEGORIES.index(document.category) + 1
    codes = [code if is_target else 0 for is_target in mask]
    if any(piece.kind == "turn" and piece.has_loss for piece in document.pieces):
        feedback = CATEGORIES.index("feedback") + 1
        for index, is_feedback in enumerate(_turns_only(document).encode(renderer)[1]):
            if is_feedback:
                codes[index] = feedback
    return TokenDocument(token_ids, codes)


def _turns_only(document: Document) -> Document:
    """Return the same tokens with loss on the turns alone."""
    pieces = tuple(replace(p, has_loss=p.has_loss and p.kind == "turn") for p in document.pieces)
    return replace(document, pieces=pieces)


def _shares(environments: Sequence[EnvironmentConfig], number: int) -> list[int]:
    """Split ``number`` documents by the environments' weights; the parts add up."""
    total = math.fsum(environment.weight for environment in environments)
    edges, reached = [0], 0.0
    for environment in environments:
        reached += environment.weight
        edges.append(round(number * reached / total))
    return [after - before for before, after in itertools.pairwise(edges)]


def _texts(config: Config) -> Iterator[str]:
    """Yield prompts of some packs of every environment, to learn a tokenizer's merges from."""
    for chosen in config.environments:
        spec = registry.get(chosen.name)
        environment = spec.make(spec.options(chosen.preset, chosen.options))
        prompts = prompts_for(environment.prompt_style)
        for group in range(_NUM_TEXT_PACKS):
            plan = plan_pack((chosen,), config.lifecycle.pack_size, config.run.seed, group)
            for task in plan.tasks():
                user = environment.reset(task)
                system = environment.system_prompt()
                yield prompts.solve_system(system, prompts.initial, config.lifecycle.length_notice_tokens)
                yield user
                record = prompts.trajectory(system, [("user", user)])
                yield from prompts.update_messages(prompts.initial, record, 0.0, environment.feedback())


def _size(model: Qwen3) -> dict[str, int]:
    return {
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocab_size": model.config.vocab_size,
    }


def _gate(config: Config, result: TrainingResult) -> dict[str, Any] | None:
    if result.gate_loss is None:
        return None
    bar = config.bootstrap.qa_loss_gate
    return {"category": "qa", "bar": bar, "loss": round(result.gate_loss, 5), "is_met": result.is_gate_met}
