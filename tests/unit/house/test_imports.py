"""The rules of the house on who may import whom, checked on the source and in fresh interpreters."""

from __future__ import annotations

import ast
import importlib.util
import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]
PACKAGES = {"cod_async": ROOT / "cod_async", "cod_kernels": ROOT / "kernels" / "cod_kernels"}

NO_TORCH_NO_ZMQ = ("lifecycle", "wire", "config", "store", "envs", "errors")
NO_TORCH = ("transport", "coordinator", "observe.metrics", "launch", "cli", "commands")
MAY_OBSERVE = ("observe", "cli", "launch", "commands")


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in PACKAGES.items():
        for path in sorted(folder.rglob("*.py")):
            parts = [package, *path.relative_to(folder).with_suffix("").parts]
            yield ".".join(part for part in parts if part != "__init__"), path


def imports_of(name: str, path: Path) -> set[str]:
    """Every module that a file imports, at the top or inside a function, but not only for type checkers."""
    found: set[str] = set()
    tree = ast.parse(path.read_text())
    typing_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test)
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in typing_only:
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name}: relative import"
            found.add(node.module or "")
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def is_in(module: str, *rooms: str) -> bool:
    return any(module == f"cod_async.{room}" or module.startswith(f"cod_async.{room}.") for room in rooms)


def uses(imports: set[str], room: str) -> bool:
    return any(item == room or item.startswith(f"{room}.") for item in imports)


GRAPH = {name: imports_of(name, path) for name, path in modules()}


def test_kernels_know_nothing_of_the_system() -> None:
    assert [
        name for name, found in GRAPH.items() if name.startswith("cod_kernels") and uses(found, "cod_async")
    ] == []


def test_actor_and_learner_never_import_each_other() -> None:
    wrong = [
        name for name, found in GRAPH.items() if is_in(name, "actor") and uses(found, "cod_async.learner")
    ]
    wrong += [
        name for name, found in GRAPH.items() if is_in(name, "learner") and uses(found, "cod_async.actor")
    ]
    assert wrong == []


def test_nothing_upstream_imports_observe() -> None:
    wrong = [
        name
        for name, found in GRAPH.items()
        if name.startswith("cod_async") and not is_in(name, *MAY_OBSERVE) and uses(found, "cod_async.observe")
    ]
    assert wrong == []


def test_only_the_cluster_launcher_imports_ray_and_only_one_engine_speaks_sglang() -> None:
    assert [
        name for name, found in GRAPH.items() if uses(found, "ray") and name != "cod_async.launch.ray"
    ] == []
    assert [name for name, found in GRAPH.items() if uses(found, "sglang")] == []  # it runs elsewhere
    paths = re.compile(r"[\"']/(generate|model_info|pause_generation|update_weights_\w+|flush_cache)[\"']")
    speaking = {name for name, path in modules() if paths.search(path.read_text())}
    assert all(is_in(name, "engines.sglang") for name in speaking), speaking


def test_nobody_pickles_or_evaluates() -> None:
    banned = ("pickle", "cloudpickle", "dill", "marshal", "shelve", "joblib")
    assert [name for name, found in GRAPH.items() if any(uses(found, module) for module in banned)] == []
    for name, path in modules():
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec"), f"{name}:{node.lineno} calls {called}"
            if called == "torch.load":
                keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
                assert keywords.get("weights_only") == "True", f"{name}:{node.lineno}"
            assert not called.endswith((".send_pyobj", ".recv_pyobj")), f"{name}:{node.lineno} pickles"


def test_kernels_folder_is_a_source_root_not_a_package() -> None:
    # An importable `kernels` would shadow the package of that name which transformers probes for.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    spec = importlib.util.find_spec("kernels")
    assert spec is None or spec.origin is None or ROOT not in Path(spec.origin).parents


def loaded_after_importing(names: list[str]) -> set[str]:
    code = (
        "import importlib, json, sys\n"
        f"for name in {names!r}: importlib.import_module(name)\n"
        "print(json.dumps(sorted(name for name in sys.modules if '.' not in name)))"
    )
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in paths if path)}
    answer = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert answer.returncode == 0, answer.stderr
    return set(json.loads(answer.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("rooms", "banned"),
    [
        (NO_TORCH_NO_ZMQ, {"torch", "zmq", "transformers", "ray", "sglang"}),
        (NO_TORCH, {"torch", "transformers", "ray", "sglang"}),
        (("algo.returns", "algo.advantages", "algo.red"), {"torch", "transformers", "zmq"}),
    ],
    ids=["pure", "no-torch", "algo"],
)
def test_rooms_stay_light(rooms: tuple[str, ...], banned: set[str]) -> None:
    names = [name for name in GRAPH if is_in(name, *rooms) and not name.endswith("__main__")]
    assert names
    assert loaded_after_importing(names) & banned == set()


def test_config_alone_loads_almost_nothing() -> None:
    loaded = loaded_after_importing(["cod_async.config"])
    assert (
        loaded & {"torch", "zmq", "numpy", "transformers", "tokenizers", "typer", "rich", "matplotlib"}
        == set()
    )


def test_commands_are_imported_lazily() -> None:
    loaded = loaded_after_importing(["cod_async.cli"])
    assert loaded & {"torch", "zmq", "numpy", "matplotlib", "tensorboardX", "tokenizers"} == set()


@pytest.mark.parametrize(
    "name", ["cod_async", *(f"cod_async.{room}" for room in ("algo", "learner", "engines", "actor"))]
)
def test_importing_a_package_itself_loads_no_torch(name: str) -> None:
    assert "torch" not in loaded_after_importing([name])
