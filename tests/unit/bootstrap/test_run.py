"""The starting model directory: what is in it, what it was taught, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from cod_async.bootstrap.run import CATEGORIES, encode_document, run_bootstrap
from cod_async.bootstrap.trainer import TokenDocument
from cod_async.config.schema import (
    BootstrapConfig,
    Config,
    EnvironmentConfig,
    LifecycleConfig,
    ModelConfig,
    RunSection,
)
from cod_async.envs import registry
from cod_async.envs.hidden_buttons.documents import bootstrap_documents
from cod_async.errors import InputError
from cod_async.lifecycle.documents import Document
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.models.directory import load_model


def config_for(*environments: tuple[str, str], seed: int = 0, **bootstrap: Any) -> Config:
    settings = {"num_steps": 3, "documents_per_step": 8, "qa_loss_gate": 100.0} | bootstrap
    return Config(
        environments=tuple(EnvironmentConfig(name=name, preset=preset) for name, preset in environments),
        run=RunSection(seed=seed),
        lifecycle=LifecycleConfig(pack_size=3),
        model=ModelConfig(max_context_tokens=64),
        bootstrap=BootstrapConfig(**settings),
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value.detach() for name, value in load_model(folder).named_parameters()}


def test_directory_and_report(tmp_path: Path) -> None:
    told: list[dict[str, Any]] = []
    report = run_bootstrap(
        config_for(("hidden_buttons", "cross"), num_steps=10), tmp_path / "model", told.append
    )
    folder = tmp_path / "model"
    assert {
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "bootstrap.json",
    } <= {file.name for file in folder.iterdir()}
    assert json.loads((folder / "bootstrap.json").read_text()) == report
    assert report["kind"] == "documents"
    assert report["num_steps"] == 10
    assert set(report["losses"]) == set(CATEGORIES)
    assert report["gate"]["is_met"] and report["gate"]["category"] == "qa"
    taught = {entry["skill"]: entry["is_taught"] for entry in report["taught"]}
    assert taught["faithful note-taking"] and taught["looking up a fact"]
    assert not taught["using a hint when acting"] and not taught["using earlier feedback when acting"]
    assert told and told[-1]["step"] == 10
    assert list(tmp_path.iterdir()) == [folder], "nothing temporary is left"
    loaded = load_model(folder)
    assert loaded.config.vocab_size == report["vocab_size"] == load_renderer(folder).tokenizer.vocab_size
    assert loaded.config.max_position_embeddings == 64


def test_equal_seeds_give_equal_weights_and_others_do_not(tmp_path: Path) -> None:
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        run_bootstrap(config_for(("hidden_buttons", "door"), seed=seed), tmp_path / name)
    a, b, c = (weights(tmp_path / name) for name in "abc")
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_door_has_no_reading_and_therefore_no_gate(tmp_path: Path) -> None:
    report = run_bootstrap(config_for(("hidden_buttons", "door"), qa_loss_gate=1e-9), tmp_path / "model")
    assert report["gate"] is None
    assert report["num_steps"] == 3
    assert {entry["skill"]: entry["is_taught"] for entry in report["taught"]}["looking up a fact"] is False


def test_two_presets_share_one_vocabulary(tmp_path: Path) -> None:
    config = config_for(("hidden_buttons", "door"), ("hidden_buttons", "cross"))
    report = run_bootstrap(config, tmp_path / "model")
    tokenizer = load_renderer(tmp_path / "model").tokenizer
    assert report["vocab_size"] == tokenizer.vocab_size
    for text in ("5=In", "4=Right", "Task goal In"):
        assert tokenizer.find_id("<unk>") not in tokenizer.encode(text)


def test_a_mixture_and_what_is_only_read_about_share_one_vocabulary(tmp_path: Path) -> None:
    config = config_for(
        ("hidden_buttons", "cross"),
        ("hidden_matches", "rooms"),
        also=(EnvironmentConfig(name="hidden_matches", preset="machines"),),
    )
    report = run_bootstrap(config, tmp_path / "model")
    assert report["kind"] == "documents"
    assert [entry["preset"] for entry in report["environments"]] == ["cross", "rooms"]
    assert [entry["preset"] for entry in report["also"]] == ["machines"]
    tokenizer = load_renderer(tmp_path / "model").tokenizer
    assert report["vocab_size"] == tokenizer.vocab_size
    for text in ("Task goal Up", "5=In", "Task room Hall", "red=Attic", "Task machine Pump", "saw=Loom"):
        assert tokenizer.find_id("<unk>") not in tokenizer.encode(text)
    taught = {entry["skill"]: entry["is_taught"] for entry in report["taught"]}
    assert taught["faithful note-taking"] and taught["looking up a fact"], "common rows name no environment"
    both = "hidden_matches rooms, hidden_matches machines: "
    assert taught[both + "output format"] and not taught[both + "using a hint when acting"]
    assert not taught["hidden_buttons cross: using a hint when acting"]
    assert taught["hidden_matches machines: training packs"] is False


def test_documents_are_shared_out_by_weight(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from cod_async.bootstrap import run

    seen: list[str] = []

    def watch(document: Document, renderer: Renderer) -> TokenDocument:
        seen.extend(piece.text for piece in document.pieces if document.category == "qa")
        return encode_document(document, renderer)

    monkeypatch.setattr(run, "encode_document", watch)
    config = config_for(
        ("hidden_buttons", "cross"),
        also=(EnvironmentConfig(name="hidden_matches", preset="machines", weight=3.0),),
        num_steps=1,
        documents_per_step=64,
    )
    run_bootstrap(config, tmp_path / "model")
    questions = [text for text in seen if text.startswith("map")]
    # a quarter of 16 and of 48 documents are questions
    assert len(questions) == 16
    assert (
        sum(any(f"={place}" in q for place in ("Up", "Down", "Left", "Right", "In")) for q in questions) == 4
    )


def test_an_environment_that_is_only_read_about_needs_documents(tmp_path: Path) -> None:
    lake = (EnvironmentConfig(name="frozen_lake_obscure", preset="easy"),)
    with pytest.raises(InputError, match="frozen_lake_obscure has none"):
        run_bootstrap(config_for(("hidden_buttons", "door"), also=lake), tmp_path / "model")
    door = (EnvironmentConfig(name="hidden_buttons", preset="door"),)
    with pytest.raises(InputError, match=r"bootstrap\.also"):
        run_bootstrap(config_for(("hidden_buttons", "door"), kind="random", also=door), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_random_kind_speaks_chatml(tmp_path: Path) -> None:
    report = run_bootstrap(config_for(("frozen_lake_obscure", "easy"), vocab_size=400), tmp_path / "model")
    assert report["kind"] == "random"
    assert report["gate"] is None
    assert 300 <= report["vocab_size"] <= 400
    renderer = load_renderer(tmp_path / "model")
    assert renderer.family == "chatml"
    text = "A frozen lake."
    assert renderer.tokenizer.decode(renderer.tokenizer.encode(text)) == text


def test_random_can_be_asked_for(tmp_path: Path) -> None:
    report = run_bootstrap(config_for(("hidden_buttons", "door"), kind="random"), tmp_path / "model")
    assert report["kind"] == "random"
    assert [entry["is_taught"] for entry in report["taught"]] == [False]


def test_documents_are_refused_where_there_are_none(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="frozen_lake_obscure has none"):
        run_bootstrap(config_for(("frozen_lake_obscure", "easy"), kind="documents"), tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_a_folder_in_use_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("keep me")
    with pytest.raises(InputError, match="not empty"):
        run_bootstrap(config_for(("hidden_buttons", "door")), tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == ["mine.txt"]


def test_impossible_shape_is_the_users_error(tmp_path: Path) -> None:
    from cod_async.config.schema import TinyModelConfig

    config = config_for(("hidden_buttons", "door"), model=TinyModelConfig(num_heads=4, num_kv_heads=3))
    with pytest.raises(InputError, match=r"bootstrap\.model"):
        run_bootstrap(config, tmp_path / "model")
    assert not list(tmp_path.iterdir()), "a failed bootstrap leaves nothing"


def test_categories_cover_exactly_the_learned_tokens(tmp_path: Path) -> None:
    run_bootstrap(config_for(("hidden_buttons", "cross")), tmp_path / "model")
    renderer = load_renderer(tmp_path / "model")
    options = registry.get("hidden_buttons").options("cross")
    seen = set()
    for document in bootstrap_documents(options, 1, 60):
        ids, mask = document.encode(renderer)
        encoded = encode_document(document, renderer)
        assert list(encoded.token_ids) == ids
        assert [code > 0 for code in encoded.categories] == mask
        words = [
            (CATEGORIES[c - 1], renderer.tokenizer.decode([i]))
            for i, c in zip(ids, encoded.categories, strict=True)
            if c
        ]
        seen |= {category for category, _ in words}
        if document.category == "solve":
            assert all(("=" in word) == (category == "feedback") for category, word in words)
        else:
            assert {category for category, _ in words} == {document.category}
    assert seen == set(CATEGORIES)
