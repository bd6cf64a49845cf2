"""Sizes of files and functions, docstrings and annotations, and what the repository must not mention."""

from __future__ import annotations

import ast
import statistics
import subprocess
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[3]
MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 100
MAX_KERNEL_FUNCTION_LINES = 150
P90_FILE_LINES = 350


def sources() -> list[Path]:
    return sorted([*(ROOT / "cod_async").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


def test_files_are_small() -> None:
    everything = [*sources(), *(ROOT / "tests").rglob("*.py"), *(ROOT / "bench").rglob("*.py")]
    lengths = {path: len(path.read_text().splitlines()) for path in everything}
    assert {str(path): length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}
    own = [lengths[path] for path in sources()]
    assert statistics.quantiles(own, n=10)[-1] <= P90_FILE_LINES


def test_functions_are_small() -> None:
    wrong = []
    for path in sources():
        ceiling = MAX_KERNEL_FUNCTION_LINES if path.name == "kernel.py" else MAX_FUNCTION_LINES
        for function in functions(path):
            length = (function.end_lineno or function.lineno) - function.lineno + 1
            if length > ceiling:
                wrong.append(f"{path}:{function.lineno} {function.name} has {length} lines")
    assert wrong == []


def test_everything_is_annotated() -> None:
    wrong = []
    for path in sources():
        if path.name == "kernel.py":  # Triton kernels take pointers and constexprs
            continue
        for function in functions(path):
            arguments = [*function.args.posonlyargs, *function.args.args, *function.args.kwonlyargs]
            named = [a for a in arguments if a.arg not in ("self", "cls")]
            if function.returns is None or any(a.annotation is None for a in named):
                wrong.append(f"{path}:{function.lineno} {function.name}")
    assert wrong == []


def test_every_module_says_what_it_is_for() -> None:
    wrong = []
    for path in sources():
        text = ast.get_docstring(ast.parse(path.read_text()))
        if path.name != "kernel.py" and (not text or len(text.split()) < 5):
            wrong.append(str(path))
    assert wrong == []


def test_public_names_have_docstrings() -> None:
    wrong = []
    for path in sources():
        tree = ast.parse(path.read_text())
        for node in tree.body:
            if not isinstance(
                node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
            ) or node.name.startswith("_"):
                continue
            if not ast.get_docstring(node):
                wrong.append(f"{path}:{node.lineno} {node.name}")
            members = node.body if isinstance(node, ast.ClassDef) else []
            for member in members:
                is_function = isinstance(member, ast.FunctionDef | ast.AsyncFunctionDef)
                if not is_function or any("overload" in ast.unparse(d) for d in member.decorator_list):
                    continue
                if not member.name.startswith("_") and not ast.get_docstring(member):
                    wrong.append(f"{path}:{member.lineno} {node.name}.{member.name}")
    assert wrong == []


def test_the_repository_stands_alone() -> None:
    # Spelled in parts, so that this file does not find itself.
    banned = ["/wo" + "rk/", ".." + "/shared", "py" + "pi.org", "pythonh" + "osted.org"]
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    names = listed.stdout.split("\n") if listed.returncode == 0 else [str(path) for path in sources()]
    wrong = []
    for name in filter(None, names):
        path = ROOT / name
        if not path.is_file() or path.suffix in (".png", ".sqlite", ".safetensors"):
            continue
        text = path.read_text(errors="replace")
        wrong += [f"{name} mentions {word}" for word in banned if word in text]
    assert wrong == []
