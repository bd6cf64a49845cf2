"""Import-only stand-in for sglang's compiled kernels; calling one names it and fails.

``sgl_kernel.scalar_type`` is left out on purpose: sglang has its own fallback for that import.
"""

import importlib.machinery
import sys
import types

__version__ = "0.4.10"
_SUBMODULES = ("kvcacheio", "flash_attn", "mamba", "allreduce", "speculative", "quantization", "utils")


def _missing(name):
    def kernel(*args, **kwargs):
        raise NotImplementedError(f"{name} has no CPU stand-in")

    kernel.__name__ = name.rpartition(".")[2]
    return kernel


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _missing(f"sgl_kernel.{name}")


class _Submodule(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return _missing(f"{self.__name__}.{name}")


for _name in _SUBMODULES:
    _module = _Submodule(f"sgl_kernel.{_name}")
    _module.__path__ = []
    _module.__spec__ = importlib.machinery.ModuleSpec(_module.__name__, None, is_package=True)
    sys.modules[_module.__name__] = _module
