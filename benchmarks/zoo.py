"""Builds the training jobs whose memory is estimated and measured.

A job is a mapping, for example

    {"id": "resnet50-b32-adamw", "source": "timm", "model": "resnet50", "batch": 32, "size": 224,
     "optimizer": "adamw", "precision": "fp32"}

with the sources `timm`, `torchvision`, `hf` (transformers) and `custom` (below), the precisions `fp32`,
`bf16` (weights and inputs), `amp_bf16` and `amp_fp16` (with a gradient scaler), and on request
`channels_last`, `checkpointing`, `clip`, `teacher` (a model of the same source), `config`, `auto`,
`attention`, `mask`, `frames`.
Weights are random, batches are noise: only sizes matter here. Nothing in this file touches a GPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

Job = dict[str, Any]
OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=1e-3),
    "sgdm": lambda p: torch.optim.SGD(p, lr=1e-3, momentum=0.9),
    "adam": lambda p: torch.optim.Adam(p, lr=1e-4),
    "adamw": lambda p: torch.optim.AdamW(p, lr=1e-4),
    "adamw_fused": lambda p: torch.optim.AdamW(p, lr=1e-4, fused=True),
    "adamw_single": lambda p: torch.optim.AdamW(p, lr=1e-4, foreach=False),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=1e-4),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-4),
    "adafactor": lambda p: torch.optim.Adafactor(p, lr=1e-4),
    "nadam": lambda p: torch.optim.NAdam(p, lr=1e-4),
}
AUTOCAST = {"amp_bf16": torch.bfloat16, "amp_fp16": torch.float16}


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
        if module is not None and job["precision"] == "bf16":
            module.to(torch.bfloat16)
        if module is not None and job.get("channels_last"):
            # Without a cast first: PyTorch's own stubs know memory_format only together with a dtype.
            module.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Built(model, lay_out(inputs, job), target, loss, OPTIMIZERS[job["optimizer"]], teacher)


def lay_out(inputs: Any, job: Job) -> Any:
    """Bring inputs into the precision and layout of a job."""
    if isinstance(inputs, dict):
        return {name: lay_out(value, job) for name, value in inputs.items()}
    if job["precision"] == "bf16" and inputs.is_floating_point():
        inputs = inputs.to(torch.bfloat16)
    if job.get("channels_last") and inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return inputs


# --- losses ------------------------------------------------------------------------------------------------


def distillation(logits: torch.Tensor, labels: torch.Tensor, taught: torch.Tensor) -> torch.Tensor:
    """Cross entropy to the labels and, at temperature 4, to the teacher."""
    student = F.log_softmax(logits.float() / 4, dim=-1)
    soft = F.kl_div(student, F.softmax(taught.float() / 4, dim=-1), reduction="batchmean")
    return F.cross_entropy(logits, labels) + soft * 16


def pixel_cross_entropy(output: dict[str, torch.Tensor], target: torch.Tensor) -> torch.Tensor:
    """Cross entropy of a segmentation model of torchvision."""
    return F.cross_entropy(output["out"], target)


def squared_error(output: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Mean squared error in fp32."""
    return F.mse_loss(output.float(), target)


# --- sources -----------------------------------------------------------------------------------------------


def from_timm(job: Job) -> tuple[nn.Module, Any, Any, Any]:
    """Image classifiers."""
    let_torchvision_import()  # timm imports it
    import timm

    model = timm.create_model(job["model"], pretrained=False, **job.get("config", {}))
    if job.get("checkpointing"):
        model.set_grad_checkpointing(enable=True)
    images = torch.randn(job["batch"], 3, job["size"], job["size"])
    return model, images, torch.randint(0, 1000, (job["batch"],)), F.cross_entropy


def from_torchvision(job: Job) -> tuple[nn.Module, Any, Any, Any]:
    """Classifiers, segmentation and video models."""
    let_torchvision_import()
    import torchvision

    name, n, size = job["model"], job["batch"], job["size"]
    if name.startswith(("fcn", "deeplab", "lraspp")):
        model = torchvision.models.get_model(name, weights=None, weights_backbone=None)
        labels = torch.randint(0, 21, (n, size, size))
        return model, torch.randn(n, 3, size, size), labels, pixel_cross_entropy
    model = torchvision.models.get_model(name, weights=None)
    if name.startswith(("r3d", "mc3", "r2plus1d", "s3d", "mvit", "swin3d")):
        clips = torch.randn(n, 3, job.get("frames", 16), size, size)
        return model, clips, torch.randint(0, 400, (n,)), F.cross_entropy
    return model, torch.randn(n, 3, size, size), torch.randint(0, 1000, (n,)), F.cross_entropy


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


def from_transformers(job: Job) -> tuple[nn.Module, Any, Any, Any]:
    """Language, speech and vision models that compute their own loss."""
    let_torchvision_import()  # transformers imports it where it is installed
    import transformers

    config = transformers.AutoConfig.for_model(job["model"], **job.get("config", {}))
    options = {"attn_implementation": job["attention"]} if "attention" in job else {}
    factory = getattr(transformers, job.get("auto", "AutoModelForCausalLM"))
    model = factory.from_config(config, **options)
    if job.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.config.use_cache = False
    return model, transformers_inputs(job, config), None, None


def transformers_inputs(job: Job, config: Any) -> dict[str, torch.Tensor]:
    """Return what the task of a model takes."""
    n, size, auto = job["batch"], job["size"], job.get("auto", "")
    tokens = torch.randint(0, getattr(config, "vocab_size", 1000), (n, size))
    if job["model"] == "whisper":
        return {"input_features": torch.randn(n, config.num_mel_bins, 3000), "labels": tokens}
    if auto.endswith("ForImageClassification"):
        return {"pixel_values": torch.randn(n, 3, size, size), "labels": torch.randint(0, 2, (n,))}
    if auto.endswith("ForSequenceClassification"):
        inputs = {"input_ids": tokens, "labels": torch.randint(0, 2, (n,))}
    else:
        inputs = {"input_ids": tokens, "labels": tokens.clone()}
    if job.get("mask", auto.endswith("ForSequenceClassification")):
        inputs["attention_mask"] = torch.ones(n, size, dtype=torch.long)
    return inputs


# --- models of our own -------------------------------------------------------------------------------------


class Tagger(nn.Module):
    """Embedding, bidirectional LSTM, a linear layer for each token: `(N, T)` to `(N, tags, T)`."""

    def __init__(self, vocabulary: int = 20000, width: int = 512, layers: int = 2, tags: int = 50) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        self.rnn = nn.LSTM(width, width, layers, batch_first=True, bidirectional=True, dropout=0.1)
        self.head = nn.Linear(2 * width, tags)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the logits of every token."""
        states, _ = self.rnn(self.embed(tokens))
        logits: torch.Tensor = self.head(states)
        return logits.transpose(1, 2)


class Perceptron(nn.Module):
    """Linear layers and GELUs: `(N, width)` to `(N, 1000)`."""

    def __init__(self, width: int = 4096, depth: int = 8) -> None:
        super().__init__()
        layers = [nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(width, 1000)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits."""
        logits: torch.Tensor = self.head(self.body(x))
        return logits


class SmallUNet(nn.Module):
    """A U-Net as diffusion uses it, attention at the bottom: `(N, 3, H, W)` to the same."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.inp = nn.Conv2d(3, width, 3, padding=1)
        self.d1, self.d2 = self._block(width, 2 * width), self._block(2 * width, 4 * width)
        self.mid = self._block(4 * width, 4 * width)
        self.attention = nn.MultiheadAttention(4 * width, 4, batch_first=True)
        self.u2, self.u1 = self._block(8 * width, 2 * width), self._block(4 * width, width)
        self.out = nn.Conv2d(width, 3, 3, padding=1)

    @staticmethod
    def _block(n_in: int, n_out: int) -> nn.Sequential:
        first = (nn.Conv2d(n_in, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.SiLU())
        second = (nn.Conv2d(n_out, n_out, 3, padding=1), nn.GroupNorm(8, n_out), nn.SiLU())
        return nn.Sequential(*first, *second)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the predicted noise."""
        x = self.inp(x)
        a = self.d1(x)
        b = self.d2(F.avg_pool2d(a, 2))
        m = self.mid(F.avg_pool2d(b, 2))
        n, c, h, w = m.shape
        t = m.flatten(2).transpose(1, 2)
        m = m + self.attention(t, t, t, need_weights=False)[0].transpose(1, 2).reshape(n, c, h, w)
        m = self.u2(torch.cat([F.interpolate(m, scale_factor=2), b], 1))
        m = self.u1(torch.cat([F.interpolate(m, scale_factor=2), a], 1))
        noise: torch.Tensor = self.out(m)
        return noise


def from_here(job: Job) -> tuple[nn.Module, Any, Any, Any]:
    """Models that no library brings in this form."""
    name, n, size, config = job["model"], job["batch"], job["size"], job.get("config", {})
    if name == "lstm_tagger":
        tokens, tags = torch.randint(0, 20000, (n, size)), torch.randint(0, 50, (n, size))
        return Tagger(**config), tokens, tags, F.cross_entropy
    if name == "mlp":
        labels = torch.randint(0, 1000, (n,))
        return Perceptron(width=size, **config), torch.randn(n, size), labels, F.cross_entropy
    if name == "unet":
        shape = (n, 3, size, size)
        return SmallUNet(**config), torch.randn(shape), torch.randn(shape), squared_error
    if name == "encoder":
        layer = nn.TransformerEncoderLayer(512, 8, 2048, batch_first=True)
        model = nn.TransformerEncoder(layer, config.get("layers", 6), enable_nested_tensor=False)
        return model, torch.randn(n, size, 512), torch.randn(n, size, 512), squared_error
    raise ValueError(f"model {name!r} of source 'custom' is none of lstm_tagger, mlp, unet, encoder.")


SOURCES: dict[str, Callable[[Job], tuple[nn.Module, Any, Any, Any]]] = {
    "timm": from_timm,
    "torchvision": from_torchvision,
    "hf": from_transformers,
    "custom": from_here,
}
