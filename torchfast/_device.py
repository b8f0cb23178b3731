"""The one rule for `device=`."""

import torch


def resolve_device(device: torch.device | str | int | None = None, /) -> torch.device:
    """Return the device that `device` names, with its index where it has one.

    `None` is the current accelerator where there is one, else the CPU. `"cuda"` becomes `cuda:<current>`
    here and now: the current device belongs to a thread, and the caller's is the one that was meant.

    Raises:
        ValueError: no such device on this machine, or a name that PyTorch does not know.
    """
    if device is None:
        accelerator = _accelerator()
        device = "cpu" if accelerator is None else accelerator
    asked = _parse(device)
    if asked.type in ("cpu", "meta"):
        return torch.device(asked.type)
    accelerator = _accelerator()
    if accelerator is None or accelerator.type != asked.type:
        raise _lacking(device, accelerator)
    index = torch.accelerator.current_device_index() if asked.index is None else asked.index
    n_devices = torch.accelerator.device_count()
    if index >= n_devices:
        raise ValueError(
            f"device={device!r} was asked for, but this machine has {n_devices} {asked.type} device(s), "
            f"numbered from 0. Choose {_choices(asked.type, n_devices)}, or leave device=None."
        )
    return torch.device(asked.type, index)


def _parse(device: torch.device | str | int) -> torch.device:
    try:
        return torch.device(device)
    except (RuntimeError, TypeError) as error:
        if isinstance(device, int) and _accelerator() is None:
            raise _lacking(device, None) from error
        shown = repr(device)
        if len(shown) > 60:  # a model, say
            shown = f"<{type(device).__name__}>"
        raise ValueError(
            f"device={shown} is not a device that PyTorch knows. "
            'Give "cpu", "cuda", "cuda:1", a torch.device, or None for the current accelerator.'
        ) from error


def _accelerator() -> torch.device | None:
    return torch.accelerator.current_accelerator(check_available=True)


def _lacking(device: object, accelerator: torch.device | None) -> ValueError:
    found = "no accelerator" if accelerator is None else f"only {accelerator.type!r}"
    build = "" if torch.backends.cuda.is_built() else " (this build of PyTorch is for the CPU only)"
    return ValueError(
        f"device={device!r} was asked for, but PyTorch finds {found} here{build}. "
        'Use device="cpu", or device=None to take whatever the machine has.'
    )


def _choices(kind: str, n_devices: int) -> str:
    return repr(f"{kind}:0") if n_devices == 1 else f"{kind}:0 to {kind}:{n_devices - 1}"
