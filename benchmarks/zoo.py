"""Builds the training jobs whose memory is estimated and measured.

A job is a mapping, for example

    {"id": "resnet50-b32-adamw", "source": "timm", "model": "resnet50", "batch": 32, "size": 224,
     "optimizer": "adamw", "precision": "fp32"}

with the sources `timm`, `torchvision`, `hf` (transformers) and `custom` (`zoo_models.py`), the optimizers
below or any other class of `torch.optim` by its name in lower case, the precisions `fp32`, `bf16` and `fp16`
(weights and inputs), `amp_bf16` and `amp_fp16` (with a gradient scaler), and on request `channels_last`,
`checkpointing`, `clip`, `teacher` (a model of the same source), `config`, `auto`, `attention`, `mask`,
`frames`. What a model is given follows from its kind, not its name.
Weights are random, batches are noise: only sizes matter here. Nothing in this file touches a GPU.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from zoo_inputs import transformers_inputs
from zoo_models import custom

Job = dict[str, Any]
Parts = tuple[nn.Module, Any, Any, Callable[..., torch.Tensor] | None]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "sgdm": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "adamw_single": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=False),
}
AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}  # by dimensions
WEIGHTS = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Built:
    """One job, ready to be estimated or run."""

    model: nn.Module
    inputs: Any  # a tensor, or keyword arguments
    target: Any  # None where the model computes its own loss
    loss: Callable[..., torch.Tensor] | None
    make_optimizer: Callable[[Any], torch.optim.Optimizer]
    teacher: nn.Module | None = None

    @property
    def n_convolutions(self) -> int:
        """How many convolution modules the model has."""
        return sum(isinstance(module, nn.modules.conv._ConvNd) for module in self.model.modules())


def build(job: Job) -> Built:
    """Build a job on the CPU, in its precision and layout."""
    model, inputs, target, loss = SOURCES[job["source"]](job)
    model.train()
    teacher = None
    if "teacher" in job:
        teacher = SOURCES[job["source"]]({**job, "model": job["teacher"], "checkpointing": False})[0]
        teacher.eval().requires_grad_(requires_grad=False)
        loss = distillation
    for module in (model, teacher):
        if module is not None and job["precision"] in WEIGHTS:
            module.to(WEIGHTS[job["precision"]])
        if module is not None and job.get("channels_last"):
            n_dims = max(p.dim() for p in module.parameters())
            # Without a cast first: PyTorch's own stubs know memory_format only together with a dtype.
            module.to(memory_format=CHANNELS_LAST.get(n_dims, torch.channels_last))  # type: ignore[call-overload]
    return Built(model, lay_out(inputs, job), target, loss, optimizer_maker(job["optimizer"]), teacher)


def lay_out(inputs: Any, job: Job) -> Any:
    """Bring inputs into the precision and layout of a job."""
    if isinstance(inputs, dict):
        return {name: lay_out(value, job) for name, value in inputs.items()}
    if not isinstance(inputs, torch.Tensor):
        return inputs
    if job["precision"] in WEIGHTS and inputs.is_floating_point():
        inputs = inputs.to(WEIGHTS[job["precision"]])
    if job.get("channels_last") and inputs.ndim in CHANNELS_LAST:
        inputs = inputs.contiguous(memory_format=CHANNELS_LAST[inputs.ndim])
    return inputs


def optimizer_maker(name: str) -> Callable[[Any], torch.optim.Optimizer]:
    """Return what makes an optimizer: one of ours, or any of `torch.optim` by its name in lower case."""
    if name in OPTIMIZERS:
        return OPTIMIZERS[name]
    plain, _, way = name.partition("_")
    options: dict[str, bool] | None = {"": {}, "fused": {"fused": True}, "single": {"foreach": False}}.get(
        way
    )
    classes: dict[str, Callable[..., torch.optim.Optimizer]] = {
        key.lower(): value
        for key, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    if plain not in classes or options is None:
        raise ValueError(f"optimizer {name!r} is none of {', '.join((*OPTIMIZERS, *classes))}.")
    return lambda p: classes[plain](p, lr=1e-4, **options)


# --- losses ------------------------------------------------------------------------------------------------


def prediction(output: Any) -> torch.Tensor:
    """Return what a loss is taken of: the output itself, or the first part of several."""
    if isinstance(output, Mapping):
        output = output[next((name for name in ("out", "logits") if name in output), next(iter(output)))]
    first: torch.Tensor = output[0] if isinstance(output, (tuple, list)) else output
    return first


def distillation(output: Any, labels: torch.Tensor, taught: Any) -> torch.Tensor:
    """Cross entropy to the labels and, at temperature 4, to the teacher."""
    logits = prediction(output)
    student = F.log_softmax(logits.float() / 4, dim=-1)
    soft = F.kl_div(student, F.softmax(prediction(taught).float() / 4, dim=-1), reduction="batchmean")
    return F.cross_entropy(logits, labels) + soft * 16


def cross_entropy(output: Any, target: torch.Tensor) -> torch.Tensor:
    """Cross entropy over the classes in dimension 1."""
    return F.cross_entropy(prediction(output), target)


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in fp32."""
    return F.mse_loss(output.float(), target)


# --- sources -----------------------------------------------------------------------------------------------


def from_timm(job: Job) -> Parts:
    """Image classifiers."""
    let_torchvision_import()  # timm imports it
    import timm

    config = job.get("config", {})
    model = timm.create_model(job["model"], pretrained=False, **config)
    if job.get("checkpointing"):
        model.set_grad_checkpointing(enable=True)
    images = torch.randn(job["batch"], config.get("in_chans", 3), job["size"], job["size"])
    return model, images, torch.randint(0, config.get("num_classes", 1000), (job["batch"],)), cross_entropy


def from_torchvision(job: Job) -> Parts:
    """Classifiers, segmentation and video models."""
    let_torchvision_import()
    import torchvision

    name, n, size, config = job["model"], job["batch"], job["size"], job.get("config", {})
    kind = torchvision.models.get_model_builder(name).__module__
    if ".segmentation." in kind:
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None, **config)
        labels = torch.randint(0, config.get("num_classes", 21), (n, size, size))
        return model, torch.randn(n, 3, size, size), labels, cross_entropy
    model = torchvision.models.get_model(name, weights=None, **config)
    shape = (n, 3, job.get("frames", 16), size, size) if ".video." in kind else (n, 3, size, size)
    n_classes = config.get("num_classes", 400 if ".video." in kind else 1000)
    return model, torch.randn(shape), torch.randint(0, n_classes, (n,)), cross_entropy


_TORCHVISION_OPERATORS: list[torch.library.Library] = []  # a registration lives as long as its library


def let_torchvision_import() -> None:
    """Declare the operators that torchvision's wheel brings only for the torch it was built for."""
    try:
        import torchvision  # noqa: F401  # whether it imports is the question
    except RuntimeError:
        library = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _TORCHVISION_OPERATORS.append(library)


def from_transformers(job: Job) -> Parts:
    """Models of any task that compute their own loss; those without a head are trained on their outputs."""
    let_torchvision_import()  # transformers imports it where it is installed
    import transformers

    config = transformers.AutoConfig.for_model(job["model"], **job.get("config", {}))
    config.architectures = config.architectures or []  # some families have several models for a task
    options = {"attn_implementation": job["attention"]} if "attention" in job else {}
    factory = getattr(transformers, job.get("auto", "AutoModelForCausalLM"))
    model = factory.from_config(config, **options)
    if job.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    inputs = transformers_inputs(job, model)
    if "teacher" in job:
        return model, inputs, inputs.pop("labels"), None
    return model, inputs, None, None


def from_here(job: Job) -> Parts:
    """Models that no library brings in this form."""
    model, inputs, target, is_classes = custom(
        job["model"], job["batch"], job["size"], dict(job.get("config", {}))
    )
    return model, inputs, target, cross_entropy if is_classes else squared_error


SOURCES: dict[str, Callable[[Job], Parts]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "hf": from_transformers,
    "custom": from_here,
}
