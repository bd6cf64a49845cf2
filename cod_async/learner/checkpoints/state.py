"""What a checkpoint holds, as tensors by kind and name, and how it is put back.

``weights`` by the names that a model directory has (a policy with adapters: the adapters alone, because
everything else is frozen and lies in the run's ``model/``); ``optimizer`` as ``exp_avg/NAME``,
``exp_avg_sq/NAME`` and ``step/NAME`` of every trained parameter, whatever optimizer keeps them and in
whatever form; ``generators`` as ``RANK/cpu`` and ``RANK/cuda``. Of a sharded policy tensors are sharded, and
the files know each part's place, so any number of ranks can read what any other wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from cod_async.errors import CheckpointError
from cod_async.learner.checkpoints.files import StoredTensors
from cod_async.learner.checkpoints.record import GENERATORS_KIND, OPTIMIZER_KIND, WEIGHTS_KIND
from cod_async.learner.parallel.optimizers import load_optimizer_state, optimizer_state
from cod_async.learner.parallel.world import World
from cod_async.models.loading import stored_names

_MAX_LISTED = 5

State = dict[str, dict[str, Tensor]]
"""Tensors by kind and name."""


def host_mesh_of(world: World) -> Any:
    """Return a mesh of all ranks for tensors in host memory; None where the policy's own mesh does. All ranks
    must ask.
    """
    if world.size == 1 or world.device.type == "cpu":
        return None
    from torch.distributed.device_mesh import init_device_mesh

    return init_device_mesh("cpu", (world.size,))


def trained_weights(model: nn.Module) -> dict[str, Tensor]:
    """Return what training changes, by stored name: detached, sharing memory, sharded as the parameters are.

    A tied head is left out; of a policy with adapters only these are given, by the policy's own names.
    """
    if getattr(model, "adapter_id", ""):
        return {name: value.detach() for name, value in model.named_parameters() if value.requires_grad}
    tensors = model.state_dict()
    return {stored: tensors[name].detach() for name, stored in stored_names(model).items()}


def named_state(model: nn.Module, optimizer: Any, *, host_mesh: Any = None) -> State:
    """Return weights and optimizer state by kind and name.

    Most of it shares memory with the model and the optimizer, so the next step changes it. Moments that do
    not exist yet are made of zeros.

    Args:
        model: a policy, whole or sharded.
        optimizer: of its parameters.
        host_mesh: from :func:`host_mesh_of`, for moments in host memory.
    """
    return {
        WEIGHTS_KIND: trained_weights(model),
        OPTIMIZER_KIND: optimizer_state(model, optimizer, host_mesh),
    }


def load_named_state(model: nn.Module, optimizer: Any, folder: Path, *, host_mesh: Any = None) -> None:
    """Put weights and optimizer state of a verified checkpoint back, whatever ranks wrote it.

    Args:
        model: a policy, whole or sharded, changed in place.
        optimizer: of its parameters, changed in place.
        folder: the checkpoint.
        host_mesh: as of :func:`named_state`.

    Raises:
        CheckpointError: tensors are missing, unknown, or of another shape or type.
    """
    state = named_state(model, optimizer, host_mesh=host_mesh)
    for kind, tensors in state.items():
        stored = StoredTensors(folder / kind)
        _check(folder / kind, stored, tensors)
        stored.read(tensors)
    load_optimizer_state(model, optimizer, state[OPTIMIZER_KIND])


def load_weights(model: nn.Module, folder: Path) -> None:
    """Put the weights of a verified checkpoint into a policy, and nothing else.

    Raises:
        CheckpointError: as :func:`load_named_state`.
    """
    tensors = trained_weights(model)
    stored = StoredTensors(folder / WEIGHTS_KIND)
    _check(folder / WEIGHTS_KIND, stored, tensors)
    stored.read(tensors)


def _check(folder: Path, stored: StoredTensors, wanted: Mapping[str, Tensor]) -> None:
    """Compare what is stored with what is wanted."""
    problems = [f"{name} is missing" for name in wanted if name not in stored.shapes]
    problems += [f"{name} is unknown" for name in stored.shapes if name not in wanted]
    for name in wanted.keys() & stored.shapes.keys():
        (shape, dtype), tensor = stored.shapes[name], wanted[name]
        if shape != tuple(tensor.shape):
            problems.append(f"{name} has shape {list(shape)}, needs {list(tensor.shape)}")
        elif dtype != tensor.dtype:
            problems.append(f"{name} has dtype {dtype}, needs {tensor.dtype}")
    if problems:
        more = f" and {len(problems) - _MAX_LISTED} more" if len(problems) > _MAX_LISTED else ""
        listed = "; ".join(sorted(problems)[:_MAX_LISTED])
        raise CheckpointError(
            f"{folder} does not fit this run's model and optimizer: {listed}{more}; use a checkpoint of this "
            "run"
        )


def generator_state(rank: int, device: torch.device) -> dict[str, Tensor]:
    """Return the states of torch's generators in this process, uint8, by ``RANK/cpu`` and ``RANK/cuda``.

    The learner draws from no other: numbers for 8-bit rounding follow from the step, those of self-tests from
    constants.
    """
    found = {f"{rank:05d}/cpu": torch.get_rng_state()}
    if device.type == "cuda":
        found[f"{rank:05d}/cuda"] = torch.cuda.get_rng_state(device)
    return found


def load_generator_state(rank: int, device: torch.device, folder: Path) -> bool:
    """Put this rank's generators back; return False if the checkpoint has none for it and nothing was done,
    as when there were fewer ranks or another kind of device.
    """
    stored = StoredTensors(folder / GENERATORS_KIND)
    wanted = generator_state(rank, device)
    if any(stored.shapes.get(name, ((), None))[0] != tuple(value.shape) for name, value in wanted.items()):
        return False
    stored.read(wanted)
    torch.set_rng_state(wanted[f"{rank:05d}/cpu"])
    if device.type == "cuda":
        torch.cuda.set_rng_state(wanted[f"{rank:05d}/cuda"], device)
    return True
