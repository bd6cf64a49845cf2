"""Notes of bad values on a device: kept until read, the first of the first call wins."""

from __future__ import annotations

import pytest
import torch
from host_reads import host_reads_of

from cod_kernels import BackendUnavailableError, KernelInputError, raise_faults
from cod_kernels.dispatch import choose_backend, on_device
from cod_kernels.faults import FAULTS, NOT_FINITE, OUTSIDE_VOCABULARY, note_fault

CPU = torch.device("cpu")


def test_the_first_call_and_its_first_row_are_named_once() -> None:
    raise_faults(CPU)
    note_fault(OUTSIDE_VOCABULARY, torch.tensor([False, False, False]))
    note_fault(NOT_FINITE, torch.tensor([False, True, True]))
    note_fault(OUTSIDE_VOCABULARY, torch.tensor([False, False, False, True, True]))
    note_fault(OUTSIDE_VOCABULARY, torch.tensor([True]))
    with pytest.raises(KernelInputError, match=r"targets\[3\] is outside .*call 2 since the last check"):
        raise_faults(CPU)
    raise_faults(CPU)
    note_fault(NOT_FINITE, torch.tensor([False, True]))
    with pytest.raises(KernelInputError, match=r"row 1 is not finite.*call 1 since the last check"):
        raise_faults(CPU)


def test_a_note_waits_for_nothing_and_every_message_has_a_place_for_the_index() -> None:
    raise_faults(CPU)
    assert host_reads_of(lambda: note_fault(NOT_FINITE, torch.zeros(5, dtype=torch.bool))) == []
    raise_faults(CPU)
    assert all(text.count("{}") == 1 for text in FAULTS)


def test_triton_never_runs_in_its_interpreter_on_cuda_unasked(monkeypatch: pytest.MonkeyPatch) -> None:
    cuda = torch.device("cuda")
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    for backend in ("auto", "triton"):
        with pytest.raises(BackendUnavailableError, match="TRITON_INTERPRET is set"):
            choose_backend("op", backend, cuda, has_triton_kernel=True)
    assert choose_backend("op", "torch", cuda, has_triton_kernel=True) == "torch"
    assert choose_backend("op", "triton", CPU, has_triton_kernel=True) == "triton"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert choose_backend("op", "auto", cuda, has_triton_kernel=True) == "triton"


def test_launches_on_a_cpu_need_no_current_device() -> None:
    with on_device(torch.zeros(1)) as entered:
        assert entered is None
