"""The networks whose convolutions `convolution_sweep.py` measures.

Those of timm, torchvision and transformers are walked on the meta device at two sizes each, one of every
family first, so that a walk cut short has seen most families. What no library brings is written down in
`convolution_shapes.py`.
"""

import random
import signal
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import partial
from itertools import chain, product, zip_longest
from typing import Any

import torch
from convolution_shapes import BY_HAND
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from zoo import SOURCES, Job, let_torchvision_import

from torchfast._estimate.cuda_behaviour.convolution import _shape
from torchfast._estimate.cuda_behaviour.convolution_workspaces import Shape

Parts = Iterator[tuple[Any, Any]]
"""Modules, each with what it is called with."""

LONGEST_WALK_S = 20.0
"""A network that takes longer to build and walk is left there, with what was seen."""

MOST_BY_HAND = 700
"""Of each kind that is written down, which would else outnumber those of the libraries."""


def networks(rng: random.Random) -> Iterator[tuple[str, set[Shape]]]:
    """Yield the name of one network after the other and its convolutions, for one sample in fp32."""
    for family in BY_HAND:
        shapes = list(dict.fromkeys(family()))
        yield f"hand {family.__name__}", set(rng.sample(shapes, min(MOST_BY_HAND, len(shapes))))
    let_torchvision_import()
    timms = map(of_job, timm_jobs(rng))
    others = (detectors(), map(of_job, torchvision_jobs()), map(of_job, transformers_jobs()))
    for works in zip_longest(*others, timms, timms, timms):  # three of the most numerous at a time
        for name, parts in filter(None, works):
            yield name, walked(parts)


def of_job(job: Job) -> tuple[str, Callable[[], Parts]]:
    """Return the name of a job and what builds its model and inputs."""
    return f"{job['source']} {job['model']} {job.get('auto', '')} {job['size']}", partial(built, job)


def built(job: Job) -> Parts:
    """Yield the model of a job and its inputs, without labels."""
    model, inputs, _, _ = SOURCES[job["source"]](job)
    if isinstance(inputs, dict):
        inputs.pop("labels", None)
    yield model.eval(), inputs


# --- walks ---------------------------------------------------------------------------------


class Watch(TorchDispatchMode):
    """Notes the convolutions that run while it is active."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[Shape] = set()
        self.n_calls = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run an operator and note it if it is a convolution."""
        del types
        output = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.convolution.default:
            tensor, weight, _, stride, _, dilation, transposed, _, groups = args
            if tensor.dim() > 2 and output.numel():
                shape = _shape(tensor, output, weight, (stride, dilation, transposed, groups))
                self.seen.add(replace(shape, dtype=torch.float32, channels_last=False))
            self.n_calls += 1
        return output


def walked(walk: Callable[[], Parts]) -> set[Shape]:
    """Run modules on their inputs, both on the meta device, and return the convolutions that ran."""
    watch = Watch()
    signal.signal(signal.SIGALRM, too_long)
    signal.setitimer(signal.ITIMER_REAL, LONGEST_WALK_S)
    # Whatever a network lacks on the meta device, what ran before it counts.
    with suppress(Exception), torch.device("meta"), torch.no_grad():
        for module, inputs in walk():
            n_modules = sum(isinstance(m, nn.modules.conv._ConvNd) for m in module.modules())
            if n_modules <= 2:  # patches only: what follows need not run
                stop_after(module, watch, n_modules)
            with suppress(StopIteration), watch:
                module(**inputs) if isinstance(inputs, Mapping) else module(inputs)
    signal.setitimer(signal.ITIMER_REAL, 0)
    return watch.seen


def too_long(*_: Any) -> None:
    """End a walk."""
    raise TimeoutError


def stop_after(module: nn.Module, watch: Watch, n_calls: int) -> None:
    """Let a module raise once it has run its last convolution."""

    def stop(*_: Any) -> None:
        if watch.n_calls >= n_calls:
            raise StopIteration

    for part in module.modules():
        if isinstance(part, nn.modules.conv._ConvNd):
            part.register_forward_hook(stop)


def timm_jobs(rng: random.Random) -> Iterator[Job]:
    """Yield every model of timm at its own and another size: one of each family, then a second of each."""
    import timm

    families = defaultdict(list)
    for name in timm.list_models():
        families[timm.models.model_entrypoint(name).__module__].append(name)
    for names in families.values():
        rng.shuffle(names)
    for name in chain.from_iterable(zip_longest(*families.values())):
        if name is not None:
            own = (timm.get_pretrained_cfg(name) or timm.models.PretrainedCfg()).input_size[-1]
            for size in dict.fromkeys((own, rng.choice((128, 160, 192, 224, 256, 320, 384, 448, 512)))):
                yield {"source": "timm", "model": name, "size": size, "batch": 1}


def torchvision_jobs() -> Iterator[Job]:
    """Yield classifiers, segmentation and video models at several sizes."""
    import torchvision

    names = torchvision.models.list_models()
    kinds = {name: torchvision.models.get_model_builder(name).__module__.split(".")[2] for name in names}
    sizes = {"segmentation": (520, 512, 256), "video": (112, 224, 128)}
    for i, name in product(range(3), names):
        if kinds[name] not in {"quantization", "detection", "optical_flow"}:
            size = sizes.get(kinds[name], (224, 256, 160))[i]
            yield {"source": "torchvision", "model": name, "size": size, "batch": 1}


def detectors() -> Iterator[tuple[str, Callable[[], Parts]]]:
    """Yield detectors and optical flow."""
    import torchvision

    sizes = ((800, 1088), (640, 640), (320, 320), (800, 1333), (512, 512))
    for size in sizes:
        for name in torchvision.models.list_models(torchvision.models.optical_flow):
            yield f"torchvision {name} {size}", partial(flow, name, size)
        for name in torchvision.models.list_models(torchvision.models.detection):
            yield f"torchvision {name} {size}", partial(detector, name, size)


def flow(name: str, size: tuple[int, int]) -> Parts:
    """Yield a model of optical flow and two images."""
    import torchvision

    images = {f"image{i}": torch.empty(1, 3, size[0] // 8 * 8, size[1] // 8 * 8) for i in (1, 2)}
    yield torchvision.models.get_model(name, weights=None).eval(), {**images, "num_flow_updates": 1}


def detector(name: str, size: tuple[int, int]) -> Parts:
    """Yield backbone and heads of a detector, without the boxes between, which depend on data."""
    import torchvision

    model = torchvision.models.get_model(name, weights=None, weights_backbone=None).eval()
    yield model.backbone, torch.empty(1, 3, *size)
    features = list(model.backbone(torch.empty(1, 3, *size)).values())
    yield model.rpn.head if hasattr(model, "rpn") else model.head, features
    heads = getattr(model, "roi_heads", None)
    for part, side in (("box_head", 7), ("mask_head", 14), ("keypoint_head", 14)):
        if getattr(heads, part, None) is not None:
            yield getattr(heads, part), torch.empty(64, features[0].shape[1], side, side)


TASKS = (
    *("ImageClassification", "SemanticSegmentation", "ObjectDetection", "DepthEstimation", "CTC"),
    *("UniversalSegmentation", "AudioClassification", "VideoClassification", "SpeechSeq2Seq"),
    *("ZeroShotImageClassification", "ZeroShotObjectDetection", "MaskGeneration", "TextToSpectrogram"),
    *("ImageToImage", "AudioTokenization", "AudioXVector", "TextToWaveform", "KeypointDetection"),
    *("PoseEstimation", "ImageMatting", "NormalEstimation", "TextRecognition", "TableRecognition"),
)
"""What models of transformers with convolutions are trained for."""

WIDER: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("ImageClassification", "convnext", {"hidden_sizes": [128, 256, 512, 1024], "depths": [3, 3, 27, 3]}),
    ("ImageClassification", "convnext", {"hidden_sizes": [192, 384, 768, 1536], "depths": [3, 3, 27, 3]}),
    ("ImageClassification", "convnextv2", {"hidden_sizes": [40, 80, 160, 320], "depths": [2, 2, 6, 2]}),
    ("ImageClassification", "convnextv2", {"hidden_sizes": [80, 160, 320, 640], "depths": [2, 2, 8, 2]}),
    ("ImageClassification", "resnet", {"layer_type": "basic", "hidden_sizes": [64, 128, 256, 512]}),
    ("ImageClassification", "regnet", {"hidden_sizes": [48, 96, 192, 432], "groups_width": 24}),
    ("ImageClassification", "regnet", {"hidden_sizes": [224, 448, 896, 2240], "groups_width": 112}),
    ("SemanticSegmentation", "segformer", {"hidden_sizes": [64, 128, 320, 512], "decoder_hidden_size": 768}),
    ("ImageClassification", "poolformer", {"hidden_sizes": [96, 192, 384, 768]}),
    ("CTC", "wav2vec2", {"feat_extract_norm": "layer", "hidden_size": 1024, "num_attention_heads": 16}),
    ("SpeechSeq2Seq", "whisper", {"d_model": 768, "num_mel_bins": 128, "encoder_attention_heads": 12}),
)
"""Other widths of common families."""


def transformers_jobs() -> Iterator[Job]:
    """Yield each model of transformers that takes images, video or sound, by its default configuration."""
    from transformers.models.auto import modeling_auto

    found = [*WIDER]
    for task in TASKS:
        auto = getattr(modeling_auto, f"AutoModelFor{task}")
        found += [(task, name, {}) for name in auto._model_mapping._model_mapping]
    for i, (task, name, config) in product(range(2), found):
        is_sound = any(word in task for word in ("Audio", "CTC", "Speech", "TextTo"))
        size = ((16000, 64000) if is_sound else (224, 512))[i]
        kind = {"model": name, "auto": f"AutoModelFor{task}", "config": config}
        yield {"source": "hf", **kind, "size": size, "batch": 1}
