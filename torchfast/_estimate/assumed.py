"""What an estimate takes for granted, and leaves out, before the step has run: said in words."""

from collections.abc import Iterator

import torch
from torch import nn

from torchfast._bytes import format_bytes
from torchfast._estimate.gpus import GPU
from torchfast._estimate.step import Plan

MEASURED_WITH = "torch 2.11 for CUDA 13.0 with cuDNN 9.19"
"""What the rules for kernels, workspaces and the context were measured with."""


def assumed(plan: Plan, gpu: GPU, *, given_gpu: object, given_scaler: object) -> Iterator[str]:
    """Yield what was not said about the step and the GPU, and what was taken in its place."""
    if plan.step is None and plan.training and plan.optimizer is None:
        yield (
            "no optimizer= was given: the step is forward and backward, and what_if() adds each common "
            "optimizer"
        )
    if plan.step is None and plan.grad_scaler and given_scaler is None:
        yield "autocast=torch.float16 was taken to come with a GradScaler; grad_scaler=False is without"
    if given_gpu is None and not torch.cuda.is_available():
        yield f"no gpu= was given and this machine has none: the estimate is for {gpu}"
    elif isinstance(given_gpu, int):
        major, minor = gpu.capability
        yield (
            f"of gpu= only the memory is known: taken to be of compute capability {major}.{minor} with "
            f"{gpu.n_multiprocessors} multiprocessors"
        )
    yield (
        f"operators are those of torch {torch.__version__}, which ran the step; kernels, workspaces and the "
        f"context are those of {MEASURED_WITH}"
    )


def left_out(model: nn.Module) -> Iterator[str]:
    """Yield what wrappers around the model, or around parts of it, will need beside what was run."""
    hooked = [name for name, p in model.named_parameters() if p._post_accumulate_grad_hooks]
    if hooked:
        yield (
            f"post-accumulate-grad hooks of {len(hooked)} parameters, such as {hooked[0]!r}, were not run: "
            "an optimizer that steps in them has state that is not counted, and frees gradients that are"
        )
    for name, module in model.named_modules():
        kind = type(module).__name__
        place = f" of {name!r}" if name else ""
        if isinstance(module, nn.parallel.DistributedDataParallel):
            yield f"{kind}{place} was run as the module inside: {_buckets(module)} NCCL's buffers not counted"
        elif isinstance(module, nn.DataParallel):
            yield f"{kind}{place} was run as the module inside, on one GPU: replicas are not counted"
        elif hasattr(module, "_orig_mod") or module._compiled_call_impl is not None:
            yield (
                f"torch.compile{place} was left out: compiled code fuses operators and saves other tensors, "
                "and its CUDA graphs keep memory of their own"
            )


def lbfgs_history(optimizer: torch.optim.LBFGS) -> str:
    """Return what LBFGS may need beside what ran on paper, where no number ever changes."""
    (group,) = optimizer.param_groups
    n_bytes = 2 * group["history_size"] * sum(p.numel() * p.element_size() for p in group["params"])
    return f"LBFGS keeps steps as numbers tell it to: its history takes up to another {format_bytes(n_bytes)}"


def _buckets(wrapped: nn.parallel.DistributedDataParallel) -> str:
    if wrapped.gradient_as_bucket_view:
        return "gradients lie in its buckets,"
    n_bytes = sum(p.numel() * p.element_size() for p in wrapped.module.parameters() if p.requires_grad)
    return f"its gradient buckets, {format_bytes(n_bytes)}, and"
