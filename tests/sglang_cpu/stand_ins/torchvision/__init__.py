"""Import-only stand-in: serving text never calls into torchvision."""

import importlib.machinery
import sys
import types

__version__ = "0.0.0"


class _Anything:
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, *args, **kwargs):
        raise RuntimeError("torchvision is a stand-in without code")

    def __getattr__(self, name):
        return _Anything()


class InterpolationMode:
    """Only its members' names are read."""

    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


class _Module(types.ModuleType):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        if name[:1].isupper():
            return type(name, (_Anything,), {})
        return _Anything()


def _submodule(name):
    full = f"torchvision.{name}"
    module = _Module(full)
    module.__path__ = []
    module.__spec__ = importlib.machinery.ModuleSpec(full, None, is_package=True)
    module.InterpolationMode = InterpolationMode
    sys.modules[full] = module
    return module


for _name in (
    "transforms",
    "transforms.functional",
    "transforms.v2",
    "transforms.v2.functional",
    "io",
    "ops",
    "utils",
    "models",
):
    _module = _submodule(_name)
    _parent, _, _leaf = _name.rpartition(".")
    setattr(sys.modules["torchvision." + _parent] if _parent else sys.modules["torchvision"], _leaf, _module)
