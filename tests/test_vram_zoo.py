"""The builder of benchmark jobs: any model of any kind, also one that no list of ours names."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
JOB = {"id": "any", "batch": 2, "size": 16, "optimizer": "adamw", "precision": "fp32"}
TINY = {"num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32}
SPEECH = {"conv_dim": [16] * 7, "num_conv_pos_embedding_groups": 2, "mask_time_prob": 0.0}


@pytest.fixture
def zoo(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Import the builder as the benchmarks do: with their folder on the path."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return importlib.import_module("zoo")


@pytest.mark.parametrize(
    ("model", "task", "size", "config"),
    [
        ("roberta", "MaskedLM", 16, {}),
        ("roberta", "TokenClassification", 16, {}),
        ("roberta", "QuestionAnswering", 16, {}),
        ("roberta", "MultipleChoice", 16, {}),
        ("qwen3", "CausalLM", 16, {"num_key_value_heads": 1, "head_dim": 8}),
        ("dinov2", "ImageClassification", 28, {"image_size": 28}),
        ("vit", "MaskedImageModeling", 32, {"image_size": 32, "encoder_stride": 16}),
        ("videomae", "VideoClassification", 32, {"image_size": 32, "num_frames": 4}),
        ("wav2vec2", "CTC", 16000, SPEECH),
        ("wav2vec2", "AudioClassification", 8000, SPEECH),
        ("audio-spectrogram-transformer", "AudioClassification", 64, {"max_length": 64}),
    ],
)
def test_a_model_is_called_with_what_its_task_takes(
    zoo: Any, model: str, task: str, size: int, config: dict[str, Any]
) -> None:
    """A model of any task gets inputs and labels that it computes a loss of, whatever its name is."""
    pytest.importorskip("transformers")
    job = {**JOB, "source": "hf", "model": model, "size": size, "config": TINY | config}
    built = zoo.build({**job, "auto": f"AutoModelFor{task}"})
    assert built.model(**built.inputs).loss.isfinite()


@pytest.mark.parametrize(
    ("name", "size", "config"),
    [
        ("lstm_tagger", 8, {}),
        ("language_model", 8, {"kind": "GRU", "width": 16}),
        ("mlp", 16, {}),
        ("encoder", 8, {"layers": 1}),
        ("translator", 8, {"width": 16, "layers": 1}),
        ("experts", 8, {"width": 16, "layers": 1}),
        ("wavenet", 64, {"width": 4, "layers": 2}),
        ("unet", 16, {"width": 8}),
        ("segmenter", 32, {"width": 4}),
        ("segmenter", 32, {"width": 4, "dims": 3}),
    ],
)
def test_our_own_models_have_a_loss_on_their_target(
    zoo: Any, name: str, size: int, config: dict[str, Any]
) -> None:
    """Inputs, target and loss of each model of our own go together."""
    built = zoo.build({**JOB, "source": "custom", "model": name, "size": size, "config": config})
    assert built.loss(built.model(built.inputs), built.target).isfinite()


@pytest.mark.parametrize("name", ["adamw", "adamw_single", "rmsprop", "nadam", "radam_single", "sgd_fused"])
def test_optimizers_go_by_their_names(zoo: Any, name: str) -> None:
    """A job's optimizer may be any of PyTorch's, in lower case, fused or as a loop."""
    weight = torch.nn.Parameter(torch.zeros(1))
    optimizer = zoo.optimizer_maker(name)([weight])
    assert type(optimizer).__name__.lower() == name.partition("_")[0]
    assert bool(optimizer.param_groups[0].get("fused")) == name.endswith("fused")
    assert (optimizer.param_groups[0].get("foreach") is False) == name.endswith("single")


def test_an_unknown_optimizer_is_named(zoo: Any) -> None:
    """A name that is no optimizer's is refused with those that are."""
    with pytest.raises(ValueError, match="optimizer 'adamx' is none of sgd, sgdm"):
        zoo.optimizer_maker("adamx")
