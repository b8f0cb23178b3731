"""What a training step cannot be made of, refused before anything is put on paper."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from typing import Any

import torch
from torch import nn

from torchfast import _tree
from torchfast._estimate.step import Plan, teacher_module
from torchfast._modules import comes_from, quantised_for_cpu, what, without_shape


def check_plan(plan: Plan, batch: Any, /) -> None:
    """Refuse a step that could only fail, or mislead, before anything of it is touched."""
    _check_model(plan.model, trains=plan.training and plan.step is None)
    _check_options(plan)
    teacher = teacher_module(plan.teacher)
    if teacher is not None:
        _check_paper(teacher, "the teacher")
    _check_batch(batch)
    _check_numbers(plan)


def _check_model(model: Any, /, *, trains: bool) -> None:
    """Refuse what is no module, or cannot be put on paper, or not be trained where it is to be."""
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"estimate_vram takes a torch.nn.Module, but was given {what(model)}. The step is run with the "
            "module's parameters on paper: give the module itself, not its class, its name or a function."
        )
    _check_paper(model, "the model")
    if not trains:
        return
    if not any(p.requires_grad for p in model.parameters()):
        found = "is frozen" if any(True for _ in model.parameters()) else "has no parameters"
        raise ValueError(
            f"{type(model).__name__} {found}, so there is nothing to train. "
            "Give training=False to estimate inference."
        )
    for name, module in model.named_modules():
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag)) and module.sparse:
            raise ValueError(
                f"{name or type(module).__name__!r} of the model has sparse=True, and sparse gradients "
                "cannot be put on paper. Estimate with sparse=False: dense gradients and dense optimizer "
                "state need no less."
            )


def _check_paper(module: nn.Module, owner: str, /) -> None:
    """Refuse a module whose weights are not there as plain tensors."""
    for name, part in module.named_modules():
        place = owner if not name else f"{name!r} of {owner}"
        if isinstance(part, torch.jit.ScriptModule):
            raise TypeError(
                f"{place} is a TorchScript module, whose parameters cannot be put on paper. "
                "Give the Python module that it was made from."
            )
        if comes_from(part, "torch.distributed.fsdp"):
            raise ValueError(f"{place} is wrapped by FSDP: {_ONE_GPU}")
    shapeless, packed = without_shape(module), quantised_for_cpu(module)
    if shapeless is not None:
        raise ValueError(
            f"{shapeless!r} of {owner} has no shape yet: it takes it from the first batch. "
            "Run one batch through it, then estimate."
        )
    if packed is not None:
        raise ValueError(
            f"{packed!r} of {owner} is quantised for the CPU: its weights are packed, and no GPU runs it. "
            "Estimate the module as it was before."
        )
    for name, tensor in chain(module.named_parameters(), module.named_buffers()):
        _check_tensor(tensor, f"{name!r} of {owner}")


_ONE_GPU = (
    "weights are spread over several processes, and an estimate knows one GPU. "
    "Estimate the module before it is sharded: one GPU will need no more than that."
)


def _check_batch(batch: Any, /) -> None:
    """Refuse what yields batches and is none, and tensors that are something else than one block."""
    is_container = isinstance(batch, (Mapping, Sequence)) or hasattr(batch, "__array__")
    if isinstance(batch, Iterable) and not is_container and not _tree.flatten(batch)[0]:
        raise TypeError(
            f"estimate_vram takes one batch, but was given {what(batch)}, which yields them. "
            "Give one of its batches, such as next(iter(loader)): only shapes and types count."
        )
    for tensor in _tree.tensors(batch):
        _check_tensor(tensor, "the batch")


def _check_tensor(tensor: torch.Tensor, owner: str) -> None:
    if comes_from(tensor, "torch.distributed.tensor"):
        raise ValueError(f"{owner} is a DTensor: {_ONE_GPU}")
    if tensor.is_nested:
        raise ValueError(
            f"{owner} is a nested tensor, whose rows are of different lengths, and paper has one shape. "
            "Estimate with the padded tensor, torch.nested.to_padded_tensor(t, 0.0): it needs no less."
        )
    if tensor.layout != torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        raise ValueError(
            f"{owner} is a tensor of layout {layout}, of which only the non-zero numbers take memory, and "
            "operators on it tell no shapes. Estimate the part of the step that works on plain tensors, or "
            "give t.to_dense() where that is affordable."
        )
    if type(tensor).__torch_dispatch__ is not torch.Tensor.__torch_dispatch__ and not comes_from(
        tensor, "torch._subclasses"
    ):
        raise ValueError(
            f"{owner} is a {type(tensor).__name__}, a kind of tensor with operators of its own, whose memory "
            "cannot be told from its shape. Estimate with plain tensors in its place."
        )


def _check_options(plan: Plan) -> None:
    """Refuse parts of a step that cannot be what they were given as."""
    for name, wanted in _WANTED.items():
        value = getattr(plan, name)
        if not (value is None or callable(value) or isinstance(value, torch.optim.Optimizer)):
            raise TypeError(
                f"{name}= of estimate_vram was given {what(value)}, which cannot be called. Give {wanted}."
            )
        if name != "optimizer" and isinstance(value, type) and issubclass(value, nn.Module):
            raise TypeError(
                f"{name}= of estimate_vram was given {what(value)}, and to call a class is to make a module. "
                f"Give the module itself, such as {value.__name__}(...)."
            )
    if plan.autocast is not None and plan.autocast not in (torch.float16, torch.bfloat16):
        raise ValueError(
            f'autocast={plan.autocast!r} was given to estimate_vram; torch.autocast("cuda") casts to a half '
            "precision. Give torch.bfloat16 or torch.float16, or None for none."
        )
    _check_optimizer(plan.model, plan.optimizer, has_step=plan.step is not None)


def _check_numbers(plan: Plan) -> None:
    """Refuse no steps, a norm that nothing can be clipped at, and what counts no dimension from the front."""
    n_steps, clip_grad_norm, batch_dim = plan.n_steps, plan.clip_grad_norm, plan.batch_dim
    if not isinstance(n_steps, int) or n_steps < 1:
        raise ValueError(
            f"n_steps={n_steps!r} was given to estimate_vram; at least 1 step has to run, and the peak is "
            "there from the second on. Leave it at 3."
        )
    if clip_grad_norm is not None and not (isinstance(clip_grad_norm, (int, float)) and clip_grad_norm > 0):
        raise ValueError(
            f"clip_grad_norm={clip_grad_norm!r} was given to estimate_vram, which is no norm that gradients "
            "can be clipped at. Give the number that the loop gives to clip_grad_norm_, or None for no "
            "clipping."
        )
    if not isinstance(batch_dim, int) or isinstance(batch_dim, bool) or batch_dim < 0:
        raise ValueError(
            f"batch_dim={batch_dim!r} was given to estimate_vram; the tensors of a batch differ in rank, so "
            "the dimension must be counted from the front: 0, 1, ..."
        )


def _check_optimizer(model: nn.Module, optimizer: Any, *, has_step: bool) -> None:
    if has_step:
        return
    kind = getattr(optimizer, "func", optimizer)
    if isinstance(optimizer, torch.optim.LBFGS) or kind is torch.optim.LBFGS:
        raise ValueError(
            "optimizer= is LBFGS, which runs the model as often as its line search wants, by a closure. "
            "Give the whole step as step=, a function that calls optimizer.step(closure), and the instance."
        )
    if not isinstance(optimizer, torch.optim.Optimizer):
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
