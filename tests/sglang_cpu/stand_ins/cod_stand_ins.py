"""Let ``import triton`` find the mock that sglang itself ships for machines without Triton.

Imported by a ``.pth`` file of the server's environment, so that its spawned children see it too. It does not
have the name ``sitecustomize``, of which a system's Python may have one already.
"""

import importlib.abc
import importlib.util
import sys
from pathlib import Path


class _TritonMock(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Finds ``triton`` and everything below it."""

    _mock_class = None

    def find_spec(self, name, path=None, target=None):
        if name == "triton" or name.startswith("triton."):
            return importlib.util.spec_from_loader(name, self, is_package=True)
        return None

    def create_module(self, spec):
        module = self._load_mock_class()(spec.name)
        if spec.name == "triton":
            module.__version__ = "3.0.0"
        return module

    def exec_module(self, module):
        if module.__name__ == "triton":
            module.Config = _Config

    def _load_mock_class(self):
        cls = type(self)
        if cls._mock_class is None:
            found = (Path(entry) / "sglang" / "_platform_stubs.py" for entry in sys.path)
            path = next(candidate for candidate in found if candidate.exists())
            spec = importlib.util.spec_from_file_location("_sglang_platform_stubs", path)
            module = importlib.util.module_from_spec(spec)
            sys.modules[spec.name] = module
            spec.loader.exec_module(module)
            cls._mock_class = module._MockModule
        return cls._mock_class


class _Config:
    """What autotuning decorators are given; nothing is ever tuned."""

    def __init__(self, kwargs=None, **_):
        self.kwargs = kwargs or {}


sys.meta_path.insert(0, _TritonMock())
