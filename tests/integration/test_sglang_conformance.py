"""One contract, two engines: the suite that the embedded engine passes, on the SGLang engine and a server.

The engine's own checks run through :class:`SGLangEngine`, with other weights published and taken up while
requests run, in each mode. ``cod doctor --engine`` is run as a user would.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from msgspec.structs import replace
from safetensors.torch import load_file
from sglang_world import CONTEXT_TOKENS, SGLangServer, tiny_model

from cod_async.config.schema import Config, EngineConfig, EnvironmentConfig, ModelConfig
from cod_async.engines.conformance import ENGINE_CHECKS, engine_checks
from cod_async.engines.conformance.asking import Subject
from cod_async.engines.conformance.findings import Finding, find_all
from cod_async.engines.conformance.reference import TransformersReference
from cod_async.engines.conformance.updating import SwitchMode
from cod_async.engines.sglang.engine import SGLangEngine
from cod_async.engines.sglang.records import ServerRecord
from cod_async.lifecycle.segment import Version
from cod_async.weights.publish import publish

ROOT = Path(__file__).resolve().parents[2]

pytestmark = [pytest.mark.sglang, pytest.mark.timeout(600)]


class PublishedUpdates:
    """Publishes other weights and the first ones again, and lets the engine take them up."""

    has_other_weights = True
    goes_back = False

    def __init__(self, engine: SGLangEngine, run_dir: Path, models: list[Path], mode: SwitchMode) -> None:
        self.mode: SwitchMode = mode
        self._engine, self._run_dir, self._models = engine, run_dir, models

    async def _take_up(self, version: Version, model_dir: Path) -> None:
        tensors = load_file(model_dir / "model.safetensors")
        config_file = model_dir / "config.json"
        manifest = publish(self._run_dir, "run", version, tensors, 64, config_file=config_file)
        await self._engine.update_weights(manifest)

    async def prepare(self) -> None:
        """Name the first weights by a publication, so that there is something to go back to."""
        await self._take_up(Version(0, 1), self._models[0])

    async def switch(self) -> tuple[Version, TransformersReference]:
        """Switch to the other weights."""
        await self._take_up(Version(0, 2), self._models[1])
        return self._engine.version, TransformersReference(self._models[1])

    async def restore(self) -> Version:
        """Publish the first weights once more."""
        await self._take_up(Version(0, 3), self._models[0])
        return self._engine.version


async def _examine(server: SGLangServer, folder: Path, mode: SwitchMode, names: list[str]) -> list[Finding]:
    config = Config(
        environments=(EnvironmentConfig(name="hidden_buttons", preset="door"),),
        model=ModelConfig(max_context_tokens=CONTEXT_TOKENS - 8),
        engine=EngineConfig(kind="sglang", on_publish=mode, max_reprefill_frac=1e6),
    )
    config = replace(config, run=replace(config.run, name="run"))
    record = ServerRecord(
        name="engine-0", url=server.url, api_key=server.api_key, admin_key=server.admin_key, instance="1"
    )
    other = tiny_model(folder / "other", seed=1)
    engine = await SGLangEngine.open(
        lambda: [record], config, run_dir=folder, model_dir=server.model_dir, root=folder
    )
    try:
        reference = TransformersReference(server.model_dir)
        subject = Subject(
            engine=engine,
            vocab_size=reference.vocab_size,
            reference=reference,
            eos_ids=frozenset([256]),
            updater=PublishedUpdates(engine, folder, [server.model_dir, other], mode),
        )
        checks = [check for check in engine_checks(subject) if not names or check.name in names]
        return await find_all(checks)
    finally:
        await engine.aclose()


@pytest.mark.parametrize(
    ("mode", "names"),
    [
        ("retract", []),
        ("in_place", ["versions_are_true", "live_update"]),
        ("wait", ["versions_are_true", "live_update"]),
        ("at_segment_boundary", ["versions_are_true", "live_update"]),
    ],
)
def test_the_engine_passes(
    sglang_server: SGLangServer, tmp_path: Path, mode: SwitchMode, names: list[str]
) -> None:
    findings = asyncio.run(_examine(sglang_server, tmp_path, mode, names))
    if os.environ.get("SHOW_NUMBERS"):
        print(*(f"\n{mode} {f.check}: {f.status}, {f.detail}" for f in findings))
    assert [f for f in findings if f.status == "failed"] == []
    assert {f.check for f in findings} == set(names or ENGINE_CHECKS)
    passed = {f.check for f in findings if f.status == "ok"}
    assert {"versions_are_true", "live_update"} <= passed


def test_doctor_finds_nothing_wrong(sglang_server: SGLangServer) -> None:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}",
        "COD_TEST_API_KEY": sglang_server.api_key,
        "COD_TEST_ADMIN_KEY": sglang_server.admin_key,
    }
    done = subprocess.run(
        [sys.executable, "-m", "cod_async", "doctor", "--engine", sglang_server.url,
         "--model", str(sglang_server.model_dir), "--api-key-env", "COD_TEST_API_KEY",
         "--admin-key-env", "COD_TEST_ADMIN_KEY", "--allow-updates", "--json"],
        capture_output=True, text=True, env=environment, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    findings = json.loads(done.stdout)
    assert len(findings) >= 20 and {finding["status"] for finding in findings} == {"ok"}


def test_doctor_names_a_wrong_key(sglang_server: SGLangServer) -> None:
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "WRONG": "not-it"}
    done = subprocess.run(
        [sys.executable, "-m", "cod_async", "doctor", "--engine", sglang_server.url,
         "--api-key-env", "WRONG"],
        capture_output=True, text=True, env=environment, timeout=200,
    )  # fmt: skip
    assert done.returncode == 2 and "key" in done.stderr and "not-it" not in done.stderr + done.stdout
    assert "Traceback" not in done.stderr
