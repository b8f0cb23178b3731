"""What a model of transformers is called with: by what its class says that it takes and is trained for."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

Tensors = dict[str, torch.Tensor]


def transformers_inputs(job: dict[str, Any], model: Any) -> Tensors:
    """Return inputs and labels for a model; `size` is its number of tokens, pixels, samples or frames."""
    takes = set(inspect.signature(model.forward).parameters)
    task = job.get("auto", "AutoModelForCausalLM").partition("For")[2]
    kind = _KINDS.get(model.main_input_name, _tokens)
    inputs = kind(job, model, task)
    if "return_loss" in takes and {"input_ids", "pixel_values"} <= takes:  # two towers and a contrastive loss
        text = _vocabulary(model.config)
        length = _nested(model.config, "max_position_embeddings", 64)
        inputs |= {"input_ids": torch.randint(0, text, (job["batch"], length))}
        inputs |= {"pixel_values": _pixels(job, model, task)["pixel_values"]}
        return {**inputs, "return_loss": True}  # type: ignore[dict-item]  # a flag among tensors
    labels = _labels(job, model, task, takes)
    if task in _PREDICT_TOKENS and "input_ids" in inputs:
        labels = {name: inputs["input_ids"].clone() for name in labels}
    return inputs | labels


_PREDICT_TOKENS = ("CausalLM", "MaskedLM", "Seq2SeqLM", "PreTraining")


# --- inputs ------------------------------------------------------------------------------------------------


def _tokens(job: dict[str, Any], model: Any, task: str) -> Tensors:
    shape = (job["batch"], job["size"]) if task != "MultipleChoice" else (job["batch"], 2, job["size"])
    inputs = {"input_ids": torch.randint(0, _vocabulary(model.config), shape)}
    if job.get("mask", task == "SequenceClassification"):
        inputs["attention_mask"] = torch.ones(shape, dtype=torch.long)
    return inputs


def _pixels(job: dict[str, Any], model: Any, task: str) -> Tensors:
    n, size = job["batch"], job["size"]
    channels = _nested(model.config, "num_channels", 3)
    if task == "VideoClassification":
        frames = job.get("frames", _nested(model.config, "num_frames", 16))
        return {"pixel_values": torch.randn(n, frames, channels, size, size)}
    inputs = {"pixel_values": torch.randn(n, channels, size, size)}
    if task == "MaskedImageModeling":
        n_patches = (size // _nested(model.config, "patch_size", 16)) ** 2
        inputs["bool_masked_pos"] = torch.rand(n, n_patches) < 0.4
    return inputs


def _features(job: dict[str, Any], model: Any, _: str) -> Tensors:
    """Return spectrograms: bins first as Whisper takes them, with its 3,000 frames, else frames first."""
    config, n = model.config, job["batch"]
    if hasattr(config, "max_source_positions") and hasattr(config, "num_mel_bins"):
        return {"input_features": torch.randn(n, config.num_mel_bins, 2 * config.max_source_positions)}
    names = (
        "input_feat_per_channel",
        "feature_projection_input_dim",
        "num_mel_bins",
        "input_dim",
        "hidden_size",
    )
    n_bins = next((getattr(config, name) for name in names if hasattr(config, name)), 80)
    return {"input_features": torch.randn(n, job.get("frames", job["size"]), n_bins)}


def _audio(job: dict[str, Any], model: Any, _: str) -> Tensors:
    """Return samples, or a spectrogram of fixed size where the model takes one under that name."""
    if hasattr(model.config, "num_mel_bins") and hasattr(model.config, "max_length"):
        shape = (job["batch"], model.config.max_length, model.config.num_mel_bins)
        if hasattr(model.config, "frequency_stride"):
            return {"input_values": torch.randn(shape)}
    return {"input_values": torch.randn(job["batch"], job["size"])}


_KINDS: dict[str, Callable[[dict[str, Any], Any, str], Tensors]] = {
    "pixel_values": _pixels,
    "pixel_values_videos": lambda job, model, _: {
        "pixel_values_videos": _pixels(job, model, "VideoClassification")["pixel_values"]
    },
    "input_features": _features,
    "input_values": _audio,
}


# --- labels ------------------------------------------------------------------------------------------------


def _labels(job: dict[str, Any], model: Any, task: str, takes: set[str]) -> Tensors:
    n, size, config = job["batch"], job["size"], model.config
    if task == "QuestionAnswering":
        return {name: torch.randint(0, size, (n,)) for name in ("start_positions", "end_positions")}
    if "labels" not in takes or task == "MaskedImageModeling":
        return {}
    n_classes = _nested(config, "num_labels", 2)
    of_task = {
        "MultipleChoice": (2, (n,)),
        "TokenClassification": (n_classes, (n, size)),
        "AudioFrameClassification": (n_classes, (n, size)),
        "CTC": (_vocabulary(config), (n, 24)),
    }
    if task.endswith("Segmentation"):
        top, shape = n_classes, (n, size, size)
    elif task.endswith("Classification"):
        top, shape = of_task.get(task, (n_classes, (n,)))
    else:
        top, shape = of_task.get(task, (_vocabulary(config), (n, size)))
    return {"labels": torch.randint(0, top, shape)}


def _vocabulary(config: Any) -> int:
    return int(_nested(config, "vocab_size", 1000))


def _nested(config: Any, name: str, default: Any) -> Any:
    """Return a value of a configuration, or of the first part of it that has one."""
    parts = (
        config,
        *(getattr(config, part, None) for part in ("text_config", "vision_config", "decoder", "encoder")),
    )
    found = (getattr(part, name) for part in parts if getattr(part, name, None) is not None)
    value = next(found, default)
    return value[0] if isinstance(value, (tuple, list)) else value
