"""What the integration tests share: one real SGLang server, which ends with the last of them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sglang_world


@pytest.fixture(scope="package")
def sglang_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[sglang_world.SGLangServer]:
    """Yield a server with a tiny random model; tests leave it with the weights that it started with."""
    sglang_world.require_environment()
    folder = tmp_path_factory.mktemp("sglang")
    model_dir = sglang_world.tiny_model(folder / "model", seed=0)
    with sglang_world.serving(model_dir, folder / "server.log") as server:
        yield server
