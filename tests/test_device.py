"""The one rule for `device=`."""

import pytest
import torch

from torchfast._device import resolve_device


@pytest.mark.parametrize("asked", ["cpu", "cpu:0", torch.device("cpu")])
def test_cpu_has_no_index(asked: torch.device | str) -> None:
    """However the CPU is named, it is one device."""
    assert resolve_device(asked) == torch.device("cpu")


def test_the_cpu_is_found_without_asking_for_accelerators(monkeypatch: pytest.MonkeyPatch) -> None:
    """Asking may start a driver, which does not survive a fork: who wants the CPU is spared it."""
    monkeypatch.delattr(torch.accelerator, "current_accelerator")
    assert resolve_device("cpu") == torch.device("cpu")


def test_none_is_what_the_machine_has() -> None:
    """None is the current accelerator where there is one, else the CPU."""
    expected = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    assert resolve_device().type == expected.type


@pytest.mark.parametrize("asked", ["gpu", "cuda:-2", "", 1.5])
def test_unknown_names_are_refused(asked: str) -> None:
    """What PyTorch does not know as a device is a ValueError."""
    with pytest.raises(ValueError, match=r"asked for|not a device that PyTorch knows"):
        resolve_device(asked)


@pytest.mark.cuda
def test_cuda_gets_the_callers_index() -> None:
    """`"cuda"` is resolved to the device that is current where it is asked."""
    assert resolve_device("cuda") == torch.device("cuda", torch.cuda.current_device())
    assert resolve_device(None) == torch.device("cuda", torch.cuda.current_device())


@pytest.mark.cuda
def test_an_index_past_the_last_gpu_is_refused() -> None:
    """An index that the machine lacks is answered with those that it has."""
    n_gpus = torch.cuda.device_count()
    with pytest.raises(ValueError, match=f"this machine has {n_gpus} cuda device"):
        resolve_device(f"cuda:{n_gpus}")
