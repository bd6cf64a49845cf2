from __future__ import annotations

from pathlib import Path

import pytest

from cod_async.envs.hidden_buttons import SPEC
from cod_async.envs.hidden_buttons.documents import vocabulary
from cod_async.lifecycle.rendering import Renderer, load_renderer
from cod_async.models.tokenizers import write_chatml_tokenizer, write_word_tokenizer


@pytest.fixture(scope="session")
def terse_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("terse")
    write_word_tokenizer(path, vocabulary(SPEC.options("cross")), 64)
    return path


@pytest.fixture(scope="session")
def chatml_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("chatml")
    texts = ["You are the system. The user and the assistant take turns.\n\n- one\n- two\n\n\n"] * 3
    write_chatml_tokenizer(path, texts, 340, 512)
    return path


@pytest.fixture(scope="session")
def terse(terse_dir: Path) -> Renderer:
    return load_renderer(terse_dir)


@pytest.fixture(scope="session")
def chatml(chatml_dir: Path) -> Renderer:
    return load_renderer(chatml_dir)
