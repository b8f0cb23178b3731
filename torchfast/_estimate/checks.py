"""What a training step cannot be made of, refused before anything is put on paper."""

from typing import Any

import torch
from torch import nn

from torchfast._modules import what


def check_options(model: nn.Module, /, *, autocast: Any, n_steps: Any, **callables: Any) -> None:
    """Refuse options that could only fail, or mislead, once the step runs."""
    for name, value in callables.items():
        if not (value is None or callable(value) or isinstance(value, torch.optim.Optimizer)):
            raise TypeError(
                f"{name}= of estimate_vram was given {what(value)}, which cannot be called. "
                f"Give {_WANTED[name]}."
            )
    if autocast is not None and autocast not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f'autocast={autocast!r} was given to estimate_vram; torch.autocast("cuda") casts to a half '
            "precision. Give torch.bfloat16 or torch.float16, or None for none."
        )
    if not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(
            f"n_steps={n_steps!r} was given to estimate_vram; at least 1 step has to run, and the peak is "
            "there from the second on. Leave it at 3."
        )
    _check_optimizer(model, callables["optimizer"], has_step=callables["step"] is not None)


def _check_optimizer(model: nn.Module, optimizer: Any, *, has_step: bool) -> None:
    if has_step or not isinstance(optimizer, torch.optim.Optimizer):
        return
    own = {id(parameter) for parameter in model.parameters()}
    if not any(id(p) in own for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            f"none of the parameters of the {type(optimizer).__name__} given as optimizer= belongs to this "
            "model, so no step of it would be estimated. Give the optimizer that was made from this "
            "model's parameters, or its class."
        )


_WANTED = {
    "loss": "a function called as loss(output, target), such as torch.nn.functional.cross_entropy",
    "optimizer": "an optimizer, or its class, such as torch.optim.AdamW",
    "teacher": "a module, or a GPUTeacher",
    "step": "a function that runs one step of the loop, called as step(batch)",
}
