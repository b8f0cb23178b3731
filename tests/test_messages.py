"""The exact text of every error and warning: what was asked, what was found, why it matters, what to do.

Each part of the library has its section, in the order of the files.
"""

import pytest
import torch

from torchfast._device import resolve_device


def text_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    """Return the message as a user reads it."""
    return str(error.value)


# --- devices ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.accelerator.is_available(), reason="speaks of a machine without an accelerator")
def test_device_that_the_machine_lacks() -> None:
    """Asking for a GPU where there is none says so, and names the two ways on."""
    with pytest.raises(ValueError, match="asked for") as error:
        resolve_device("cuda:3")
    build = "" if torch.backends.cuda.is_built() else " (this build of PyTorch is for the CPU only)"
    assert text_of(error) == (
        f"device='cuda:3' was asked for, but PyTorch finds no accelerator here{build}. "
        'Use device="cpu", or device=None to take whatever the machine has.'
    )


def test_device_that_nobody_has() -> None:
    """A name that PyTorch does not know is answered with the names it knows."""
    with pytest.raises(ValueError, match="knows") as error:
        resolve_device("gpu")
    assert text_of(error) == (
        "device='gpu' is not a device that PyTorch knows. "
        'Give "cpu", "cuda", "cuda:1", a torch.device, or None for the current accelerator.'
    )


# --- to_channels_last ------------------------------------------------------------------------------------

# --- DeviceLoader ----------------------------------------------------------------------------------------

# --- GPUTeacher ------------------------------------------------------------------------------------------

# --- estimate_vram ---------------------------------------------------------------------------------------

# --- VRAMMonitor -----------------------------------------------------------------------------------------

# --- oom_guard -------------------------------------------------------------------------------------------

# --- integrations ----------------------------------------------------------------------------------------
