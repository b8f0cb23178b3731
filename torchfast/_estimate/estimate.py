"""How much GPU memory a training step will need: traced on paper, replayed through the caching allocator."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from torchfast._estimate.assumed import assumed, left_out
from torchfast._estimate.checks import check_plan
from torchfast._estimate.gpus import GPU, resolve_gpu
from torchfast._estimate.report import Subject, VRAMEstimate, estimate_of
from torchfast._estimate.retrace import Again, size_of
from torchfast._estimate.settings import AllocatorSettings, settings_of
from torchfast._estimate.step import Plan
from torchfast._estimate.tracing import trace, turn
from torchfast._estimate.variants import sample_of
from torchfast._modules import unwrapped


def estimate_vram(  # noqa: PLR0913 - each is a part of a training step
    model: nn.Module,
    batch: Any,
    /,
    *,
    loss: Callable[..., Any] | None = None,
    optimizer: Any = None,
    autocast: torch.dtype | None = None,
    grad_scaler: bool | None = None,
    clip_grad_norm: float | None = None,
    teacher: Any = None,
    step: Callable[..., Any] | None = None,
    training: bool = True,
    gpu: GPU | str | int | torch.device | None = None,
    allocator: AllocatorSettings | str | None = None,
    batch_dim: int = 0,
    n_steps: int = 3,
) -> VRAMEstimate:
    """Say how much GPU memory a training step of this model on this batch will need, before any is taken.

    Three steps run on paper: every operator with its shapes, kernels as PyTorch would choose them on the GPU,
    and no memory behind the tensors. What they take and give back is replayed through PyTorch's caching
    allocator. Neither a GPU nor a CUDA build of PyTorch is needed, and the model may be on the CPU, on a GPU
    or on `meta`; model, optimizer, their state, random state and global flags come out as they went in.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from torchfast import estimate_vram
        >>> model = nn.Sequential(nn.Linear(512, 2048), nn.ReLU(), nn.Linear(2048, 10))
        >>> images, labels = torch.randn(64, 512), torch.randint(0, 10, (64,))
        >>> estimate = estimate_vram(
        ...     model,
        ...     (images, labels),
        ...     loss=nn.functional.cross_entropy,
        ...     optimizer=torch.optim.AdamW,
        ...     gpu="H200",
        ... )
        >>> estimate.breakdown["weights"] == 4 * sum(p.numel() for p in model.parameters())
        True
        >>> estimate.peak_allocated_bytes < estimate.peak_reserved_bytes < estimate.peak_process_bytes
        True

    Args:
        model: the module to be trained.
        batch: what it is called with: a tensor as `model(x)`, a mapping as `model(**batch)`, a tuple or list
            as `model(*batch)`. With `loss=` a pair is `(inputs, target)`. Only shapes and types count.
        loss: called as `loss(output, target)`, and with the teacher's output as a third argument where it
            takes three. By default the output's `loss`, else the sum of its floating-point tensors.
        optimizer: an instance, whose state counts, or something that makes one from a list of parameters: a
            class, a `functools.partial`, a lambda. By default none.
        autocast: the type for `torch.autocast("cuda")` around forward and loss; by default there is none.
        grad_scaler: whether a `GradScaler` is used. By default it is with `autocast=torch.float16`.
        clip_grad_norm: the norm for `clip_grad_norm_` between backward and step; by default no clipping.
        teacher: a module, or a `GPUTeacher`, that runs on the same inputs without gradients before the model
            does.
        step: a whole step of your own, for loops that fit none of this: called as `step(batch)`, or `step()`
            if it takes nothing. Model, optimizer and teacher are on paper while it runs.
        training: False estimates inference: a forward pass under `no_grad`, in `eval` mode.
        gpu: a name ("A100-80", "RTX 4090"), a `GPU`, a device of this machine, or bytes of memory. By default
            this machine's GPU, else an H200.
        allocator: settings as in `PYTORCH_CUDA_ALLOC_CONF`; by default PyTorch's own.
        batch_dim: the dimension that counts samples, for the batch's size and for `max_batch_size`. The size
            is the one that most tensors of the batch share along it; those are its samples.
        n_steps: how many steps are run; optimizer state appears in the first, the peak from the second on.

    Raises:
        TypeError: the model is no `nn.Module`, or a scripted one, or an option is of a wrong type.
        ValueError: a model without parameters to train, one whose parameters have no shapes yet, tensors that
            are not one block of numbers (nested, sparse, sharded), a model that cannot run a step on this
            batch, or an optimizer of another model.

    It does not model `torch.compile`, CUDA graphs, and several GPUs: a compiled or wrapped model is
    estimated as the plain module inside, and `unmodelled` says so. What was taken for granted where nothing
    was given (a loss, a GPU, values that only a run would tell) is in `assumptions`.
    While it runs, a second or two, parts of PyTorch's Python side are stand-ins: estimates of several threads
    take turns, and other threads should leave `torch.cuda` and the model alone meanwhile.
    """
    inputs, target = _split(batch, loss)
    scaler = autocast is torch.float16 if grad_scaler is None else grad_scaler
    plan = Plan(
        model=model,
        inputs=inputs,
        target=target,
        loss=loss,
        teacher=teacher,
        optimizer=optimizer,
        autocast=autocast,
        grad_scaler=scaler and training,
        clip_grad_norm=clip_grad_norm,
        training=training,
        step=step,
        n_steps=n_steps,
        batch_dim=batch_dim,
    )
    with turn():  # of another thread's estimate the model may be on paper
        check_plan(plan, batch)
    imagined = resolve_gpu(gpu)
    settings = None if allocator is None else settings_of(allocator)
    found = trace(plan, imagined)
    said = assumed(plan, imagined, given_gpu=gpu, given_scaler=grad_scaler)
    return estimate_of(
        replace(
            found,
            assumptions=(*found.assumptions, *said),
            unmodelled=(*found.unmodelled, *left_out(model)),
        ),
        gpu=imagined,
        subject=_subject(plan),
        settings=settings,
        retrace=Again(plan, imagined),
    )


def _split(batch: Any, loss: Callable[..., Any] | None) -> tuple[Any, Any]:
    """Return inputs and target: with a loss of the user's own, a pair is both."""
    if loss is not None and isinstance(batch, (tuple, list)) and len(batch) == 2:
        return batch[0], batch[1]
    return batch, None


def _subject(plan: Plan) -> Subject:
    weights = [p.dtype for p in plan.model.parameters()]
    names = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}
    precision = names.get(max(weights, key=weights.count), "mixed") if weights else "fp32"
    if plan.autocast is not None:
        precision = f"autocast {names.get(plan.autocast, str(plan.autocast))}"
    return Subject(
        model=type(unwrapped(plan.model)).__name__,
        optimizer=_optimizer_name(plan.optimizer) or _other_work(plan),
        precision=precision,
        batch_size=size_of(plan),
        teacher=None if plan.teacher is None else type(plan.teacher).__name__,
    )


def _other_work(plan: Plan) -> str | None:
    """Name a step without an optimizer that has none for a reason."""
    return "a step of its own" if plan.step is not None else None if plan.training else "inference"


def _optimizer_name(optimizer: Any) -> str | None:
    """Name the optimizer, also one that a lambda makes."""
    if optimizer is None:
        return None
    try:
        sample = sample_of(optimizer)
    except Exception:  # noqa: BLE001  a maker may insist on the model's own parameters
        return getattr(optimizer, "__name__", type(optimizer).__name__)
    is_fused = any(group.get("fused") for group in sample.param_groups)
    return f"{'fused ' if is_fused else ''}{type(sample).__name__}"
