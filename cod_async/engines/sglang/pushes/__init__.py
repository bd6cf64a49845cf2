"""How a published version enters one server: it reads the files (:mod:`.disk`), the actor broadcasts the
tensors over a process group (:mod:`.group`), or hands over CUDA memory on the same host (:mod:`.ipc`).

A push belongs to one server; what it keeps open to it (a process group) is its own. Whether the weights
arrived is another question, which :mod:`.checksums` answers.
"""

from cod_async.engines.sglang.pushes.base import Push, making_label, push_for
from cod_async.engines.sglang.pushes.checksums import Checker, expected_checksums, verify
from cod_async.engines.sglang.pushes.disk import DiskPush
from cod_async.engines.sglang.pushes.group import GroupPush
from cod_async.engines.sglang.pushes.ipc import IpcPush

__all__ = [
    "Checker",
    "DiskPush",
    "GroupPush",
    "IpcPush",
    "Push",
    "expected_checksums",
    "making_label",
    "push_for",
    "verify",
]
