"""`to_channels_last`: models, their optimizers and their batches, in place, exactly, all or nothing."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, prune

from torchfast import to_channels_last
from torchfast._layout import convolutions, stored_weight

Optimizers = Callable[[Any], torch.optim.Optimizer]
# A large eps: where a gradient is zero but for rounding, dividing by its own size would make noise of it.
OPTIMIZERS: dict[str, Optimizers] = {
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.01, momentum=0.9, fused=True),
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, eps=1e-4, fused=True),
    "adam": lambda parameters: torch.optim.Adam(parameters, lr=0.01, eps=1e-4, amsgrad=True, foreach=True),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.01, eps=1e-4, fused=True),
    "rmsprop": lambda parameters: torch.optim.RMSprop(parameters, lr=0.01, eps=1e-4, momentum=0.9),
}


class Clips(nn.Module):
    """A model that mixes 3-d and 2-d convolutions, with a parameter of rank 4 that feeds neither."""

    def __init__(self) -> None:
        super().__init__()
        self.motion = nn.Conv3d(3, 4, 3, padding=1)
        self.look = nn.Conv2d(4, 6, 3, padding=1)
        self.position = nn.Parameter(torch.randn(1, 6, 6, 6))
        self.head = nn.Linear(6, 2)

    def forward(self, clip: torch.Tensor) -> torch.Tensor:
        """Map clips (N, 3, T, H, W) to scores (N, 2)."""
        frames = torch.relu(self.motion(clip)).mean(dim=2)
        scores: torch.Tensor = self.head((self.look(frames) + self.position).mean(dim=(2, 3)))
        return scores


def small_net() -> nn.Sequential:
    """Return a convolution of each kind with a head, for images of 3 channels."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, groups=8),
        nn.Conv2d(8, 4, 1),
        nn.ConvTranspose2d(4, 6, 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 3),
    )


def train(model: nn.Module, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> torch.Tensor:
    """Take a step on each batch, and return the last outputs."""
    outputs = torch.empty(0)
    for batch in batches:
        optimizer.zero_grad()
        outputs = model(batch)
        outputs.square().mean().backward()
        optimizer.step()
    return outputs


def strides(model: nn.Module) -> list[tuple[int, ...]]:
    """Return the strides of all parameters."""
    return [parameter.stride() for parameter in model.parameters()]


def is_channels_last(model: nn.Module) -> bool:
    """Say whether every stored convolution weight has its channels fastest."""
    weights = [stored_weight(convolution) for _, convolution in convolutions(model)]
    return all(weight.stride(1) == 1 for weight in weights if weight is not None)


# --- models ----------------------------------------------------------------------------------------------


def test_only_convolution_weights_change_by_their_own_rank() -> None:
    """In a model that mixes 2-d and 3-d, each convolution's weight changes and no other parameter does."""
    model = Clips()
    before = dict(zip((name for name, _ in model.named_parameters()), strides(model), strict=True))
    assert to_channels_last(model) is model
    changed = {name for name, parameter in model.named_parameters() if parameter.stride() != before[name]}
    assert changed == {"motion.weight", "look.weight"}
    assert model.motion.weight.is_contiguous(memory_format=torch.channels_last_3d)
    assert model.look.weight.is_contiguous(memory_format=torch.channels_last)


def test_parameters_stay_the_same_objects_with_the_same_values() -> None:
    """References to parameters hold, also in optimizers, and ties stay ties, however they were made."""
    model = small_net()
    twin = nn.Conv2d(3, 8, 3, padding=1)
    first = model[0]
    assert isinstance(first, nn.Conv2d)
    twin.weight.data = first.weight.data
    both = nn.ModuleList([model, first, twin])
    before = list(both.parameters())
    values = [parameter.detach().clone() for parameter in before]
    to_channels_last(both)
    assert all(new is old for new, old in zip(both.parameters(), before, strict=True))
    assert all(torch.equal(new, old) for new, old in zip(both.parameters(), values, strict=True))
    assert is_channels_last(both)
    with torch.no_grad():
        first.weight.zero_()
    assert not twin.weight.any()


def test_gradients_follow_their_weights() -> None:
    """A gradient that is already there is laid out like its weight."""
    model = small_net()
    model(torch.randn(2, 3, 8, 8)).sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    to_channels_last(model)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        assert parameter.grad is not None
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, gradient)


def test_enabled_false_goes_back() -> None:
    """A model that was converted and converted back is as it was, with its optimizer's state."""
    model = small_net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    before = strides(model)
    train(model, optimizer, [torch.randn(2, 3, 8, 8)])
    to_channels_last(model, optimizer=optimizer)
    assert strides(model) != before
    to_channels_last(model, optimizer=optimizer, enabled=False)
    assert strides(model) == before
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()


def test_a_second_call_changes_nothing() -> None:
    """Converting what is converted already moves no memory."""
    model = to_channels_last(small_net())
    before = [parameter.data_ptr() for parameter in model.parameters()]
    to_channels_last(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


@pytest.mark.parametrize(
    "computed", [parametrizations.weight_norm, parametrizations.spectral_norm, prune.identity], ids=str
)
def test_computed_weights_are_left_alone_and_pass_the_layout_on(computed: Callable[..., nn.Module]) -> None:
    """Where the weight is computed in each forward nothing is converted, and the outputs are still so."""
    convolution = nn.Conv2d(3, 8, 3)
    computed(convolution, name="weight")
    before = strides(convolution)
    to_channels_last(convolution)
    assert strides(convolution) == before
    outputs = convolution(to_channels_last(torch.randn(2, 3, 8, 8)))
    assert outputs.is_contiguous(memory_format=torch.channels_last)


def test_models_on_meta_and_without_convolutions() -> None:
    """A model without memory is converted, each tensor by itself; one without convolutions is returned."""
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(3, 8, 3))
    assert is_channels_last(to_channels_last(model))
    assert model[0].weight is not model[1].weight
    text = nn.Linear(2, 2)
    assert to_channels_last(text) is text


class Failing(torch.Tensor):
    """A tensor whose memory cannot be replaced."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Fail where the memory is set."""
        if getattr(func, "__name__", "") == "__set__":
            raise RuntimeError("no")
        return super().__torch_function__(func, types, args, kwargs or {})


def test_a_failure_half_way_leaves_everything_as_it_was() -> None:
    """An error at the last tensor undoes the ones before it: layouts, memory and gradients."""
    model = small_net()
    model[5].weight = nn.Parameter(torch.randn(4, 6, 2, 2).as_subclass(Failing))
    before = [parameter.data_ptr() for parameter in model.parameters()]
    with pytest.raises(RuntimeError, match="no"):
        to_channels_last(model)
    assert [parameter.data_ptr() for parameter in model.parameters()] == before


# --- exactness -------------------------------------------------------------------------------------------


@st.composite
def nets(draw: st.DrawFn) -> nn.Sequential:
    """Draw a small convolutional network in float64."""
    torch.manual_seed(draw(st.integers(0, 99)))
    layers: list[nn.Module] = []
    channels = 3
    for _ in range(draw(st.integers(1, 3))):
        out = draw(st.sampled_from([1, 4, 6]))
        groups = channels if draw(st.booleans()) and out % channels == 0 else 1
        kind = draw(st.sampled_from([nn.Conv2d, nn.ConvTranspose2d]))
        layers += [kind(channels, out, draw(st.sampled_from([1, 3])), groups=groups, padding=0)]
        layers += [draw(st.sampled_from([nn.BatchNorm2d(out), nn.GroupNorm(1, out), nn.InstanceNorm2d(out)]))]
        layers += [draw(st.sampled_from([nn.ReLU(inplace=True), nn.Softmax2d(), nn.AvgPool2d(1)]))]
        channels = out
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(channels * 4, 2)).double()


@settings(max_examples=25)
@given(nets(), st.sampled_from(sorted(OPTIMIZERS)), st.integers(0, 2))
def test_training_agrees_in_float64(model: nn.Sequential, optimizer: str, n_steps_before: int) -> None:
    """Outputs, gradients and optimizer steps agree with the plain layout, whenever the model is converted."""
    plain = copy.deepcopy(model)
    here, there = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](plain.parameters())
    batches = [torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(5)]
    if n_steps_before:
        train(model, here, batches[:n_steps_before])
        train(plain, there, batches[:n_steps_before])
    to_channels_last(model, optimizer=here)
    outputs = train(model, here, to_channels_last(batches))
    torch.testing.assert_close(outputs, train(plain, there, batches), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", sorted(OPTIMIZERS))
def test_training_agrees_where_2d_and_3d_are_mixed(optimizer: str) -> None:
    """The same holds for a model of clips, with 3-d and 2-d convolutions and computed weights."""
    model = Clips().double()
    parametrizations.weight_norm(model.look)
    plain = copy.deepcopy(model)
    here, there = OPTIMIZERS[optimizer](model.parameters()), OPTIMIZERS[optimizer](plain.parameters())
    batches = [torch.randn(2, 3, 4, 6, 6, dtype=torch.float64) for _ in range(4)]
    train(model, here, batches[:2])
    train(plain, there, batches[:2])
    to_channels_last(model, optimizer=here)
    outputs = train(model, here, to_channels_last(batches, rank_5=True))
    torch.testing.assert_close(outputs, train(plain, there, batches), rtol=1e-6, atol=1e-6)
    for ours, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "adagrad"])
def test_fused_steps_are_wrong_without_the_optimizer(optimizer: str) -> None:
    """What `optimizer=` is for: a fused optimizer whose state lies otherwise than its parameters errs.

    Should this fail, PyTorch has repaired its fused CPU kernels.
    """
    plain, alone, together = (small_net().double() for _ in range(3))
    alone.load_state_dict(plain.state_dict())
    together.load_state_dict(plain.state_dict())
    batches = [torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(4)]
    optimizers = [OPTIMIZERS[optimizer](model.parameters()) for model in (plain, alone, together)]
    for model, own in zip((plain, alone, together), optimizers, strict=True):
        train(model, own, batches[:1])
    to_channels_last(alone)
    to_channels_last(together, optimizer=optimizers[2])
    for model, own in zip((plain, alone, together), optimizers, strict=True):
        train(model, own, batches[1:])
    expected, without, given = (
        torch.cat([parameter.detach().flatten() for parameter in model.parameters()])
        for model in (plain, alone, together)
    )
    assert (without - expected).abs().max() > 1e-3
    assert (given - expected).abs().max() < 1e-9


class Wrapper(torch.optim.Optimizer):
    """An optimizer around another, as accelerate has it: it shares its state and forwards the rest."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    @property
    def state(self) -> Any:  # type: ignore[override]  # as accelerate does
        """The state of the optimizer inside."""
        return self.optimizer.state


def test_an_optimizer_in_a_wrapper() -> None:
    """State is laid out in the optimizer that holds it, and follows what that one loads."""
    model = small_net()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    train(model, optimizer, [torch.randn(2, 3, 8, 8)])
    plain = copy.deepcopy(optimizer.state_dict())
    to_channels_last(model, optimizer=Wrapper(optimizer))
    optimizer.load_state_dict(plain)
    for parameter, state in optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()


# --- checkpoints and copies ------------------------------------------------------------------------------


@pytest.mark.parametrize("saved_as_channels_last", [True, False])
@pytest.mark.parametrize("loaded_as_channels_last", [True, False])
def test_resuming_in_any_layout(saved_as_channels_last: bool, loaded_as_channels_last: bool) -> None:  # noqa: FBT001 -- parametrized
    """A checkpoint of either layout resumes in either layout, and training goes on as if uninterrupted."""
    batches = [torch.randn(2, 3, 8, 8, dtype=torch.float64) for _ in range(3)]
    model = small_net().double()
    optimizer = OPTIMIZERS["adamw"](model.parameters())
    to_channels_last(model, optimizer=optimizer, enabled=saved_as_channels_last)
    train(model, optimizer, batches)
    saved = copy.deepcopy({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    resumed = small_net().double()
    resumed_optimizer = OPTIMIZERS["adamw"](resumed.parameters())
    to_channels_last(resumed, optimizer=resumed_optimizer, enabled=loaded_as_channels_last)
    resumed.load_state_dict(saved["model"])
    resumed_optimizer.load_state_dict(saved["optimizer"])
    assert is_channels_last(resumed) is loaded_as_channels_last
    for parameter, state in resumed_optimizer.state.items():
        assert state["exp_avg"].stride() == parameter.stride()
    expected = train(model, optimizer, batches)
    torch.testing.assert_close(train(resumed, resumed_optimizer, batches), expected)


def test_assign_takes_the_checkpoint_s_layout_until_converted_again() -> None:
    """`load_state_dict(assign=True)` puts the checkpoint's own tensors in; a second call converts them."""
    model = to_channels_last(small_net())
    model.load_state_dict(small_net().state_dict(), assign=True)
    assert not is_channels_last(model)
    assert is_channels_last(to_channels_last(model))


def test_safetensors_round_trip(tmp_path: Path) -> None:
    """Safetensors stores contiguous tensors only: `contiguous` on the way out, any layout on the way in."""
    from safetensors.torch import load_file, save_file

    model = to_channels_last(small_net())
    path = tmp_path / "model.safetensors"
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, path)
    loaded = to_channels_last(small_net())
    loaded.load_state_dict(load_file(path))
    assert is_channels_last(loaded)
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_copies_keep_the_layout_and_follow_by_value() -> None:
    """A deepcopy for an exponential average is channels_last too, and so averages the same memory order."""
    model = to_channels_last(small_net())
    same_layout = torch.optim.swa_utils.AveragedModel(model)
    assert is_channels_last(same_layout)
    other_layout = torch.optim.swa_utils.AveragedModel(to_channels_last(model, enabled=False))
    to_channels_last(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(2)
    for average in (same_layout, other_layout):
        average.update_parameters(model)  # the first update copies
        for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
            assert torch.equal(ours, theirs)


@pytest.mark.parametrize("channels_last_batch", [True, False])
def test_ddp_around_a_converted_model(tmp_path: Path, channels_last_batch: bool) -> None:  # noqa: FBT001 -- parametrized
    """Converted first and wrapped then, gradients lie like DDP's buckets: it has nothing to warn of."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = small_net()
        plain = copy.deepcopy(model)
        wrapped = nn.parallel.DistributedDataParallel(to_channels_last(model), gradient_as_bucket_view=True)
        optimizer = OPTIMIZERS["adamw"](wrapped.parameters())
        images = torch.randn(2, 3, 8, 8)
        for _ in range(2):
            train(wrapped, optimizer, [to_channels_last(images, enabled=channels_last_batch)])
        expected = train(plain, OPTIMIZERS["adamw"](plain.parameters()), [images] * 2)
    finally:
        dist.destroy_process_group()
    assert is_channels_last(model)
    torch.testing.assert_close(model(images), plain(images), rtol=1e-3, atol=1e-4)
    assert expected.isfinite().all()


# --- batches ---------------------------------------------------------------------------------------------


class Sample(NamedTuple):
    """A nested batch."""

    images: torch.Tensor
    extra: dict[str, Any]


def test_a_nested_batch_has_its_images_laid_out_and_nothing_else() -> None:
    """Images change their layout and keep their values; all other parts are the very same objects."""
    boxes = torch.randn(4, 5, 4)
    batch = Sample(
        torch.randn(4, 3, 8, 8), {"mask": torch.zeros(4, 1, 8, 8, dtype=torch.bool), "boxes": boxes}
    )
    laid = to_channels_last(batch)
    assert isinstance(laid, Sample)
    assert laid.images.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(laid.images, batch.images)
    assert laid.extra["boxes"] is boxes
    assert laid.extra["mask"] is batch.extra["mask"]
    assert to_channels_last(laid, enabled=False).images.is_contiguous()


def test_volumes_on_request_and_a_rule_of_one_s_own() -> None:
    """Rank 5 counts on request, and `is_image=` replaces the rule."""
    volumes, features = torch.randn(2, 1, 8, 8, 8), torch.randn(2, 64, 8, 8)
    assert to_channels_last(volumes) is volumes
    assert to_channels_last(volumes, rank_5=True).stride(1) == 1
    assert to_channels_last(features) is features
    assert to_channels_last(features, is_image=lambda tensor: tensor.dim() == 4).stride(1) == 1


def test_batches_without_images_pass_through() -> None:
    """An empty batch and one without tensors come back as they are."""
    empty: list[object] = []
    names = {"names": ["a", "b"]}
    assert to_channels_last(empty) is empty
    assert to_channels_last(names) is names
