"""Loading a teacher from a file: whole, exact, and never more than one tensor beside it."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from torchfast import GPUTeacher
from torchfast._teacher.placing import Placing


class Tied(nn.Module):
    """A net with what loaders get wrong: tied weights, computed buffers, numbers read while it is built."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10, 6)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.mix = nn.LSTM(6, 6, batch_first=True)
        self.head = nn.Linear(6, 10, bias=False)
        self.head.weight = self.embed.weight
        self.scale = float(torch.linspace(1, 2, 3)[1].item())
        self.register_buffer("positions", torch.arange(6.0).sin(), persistent=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token numbers (N, T) to logits (N, T, 10)."""
        x = self.embed(ids) + self.get_buffer("positions") * self.scale
        x = x + self.norm(self.conv(x[:, None])).mean(dim=1)
        logits: torch.Tensor = self.head(self.mix(x)[0])
        return logits


class TiedBefore(nn.Module):
    """Ties its weights before either layer has them."""

    def __init__(self) -> None:
        super().__init__()
        weight = nn.Parameter(torch.randn(16, 8))
        self.embed, self.head = nn.Embedding(16, 8), nn.Linear(8, 16, bias=False)
        self.embed.weight = weight
        self.head.weight = weight

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        """Map token numbers to logits."""
        logits: torch.Tensor = self.head(self.embed(ids))
        return logits


def test_weights_tied_before_they_are_registered_stay_tied(tmp_path: Path) -> None:
    """One parameter that two modules are given is one in the teacher, too."""
    net = TiedBefore()
    torch.save(net.state_dict(), tmp_path / "net.pt")
    teacher = GPUTeacher.from_checkpoint(TiedBefore, tmp_path / "net.pt", "cpu")
    module: Any = teacher.module
    assert module.head.weight is module.embed.weight
    assert torch.equal(teacher(torch.arange(4)), net(torch.arange(4)))


IDS = torch.arange(12).reshape(2, 6) % 10


def saved(folder: Path, suffix: str, *, channels_last: bool = False) -> tuple[Tied, Path]:
    """Save a trained net, and return it with the file."""
    net = Tied()
    net(IDS)
    if channels_last:
        net.conv.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # keyword alone is fine
    path = folder / f"teacher{suffix}"
    state = net.state_dict()
    if suffix == ".safetensors":
        del state["head.weight"]  # as transformers saves tied weights
        save_file({name: tensor.contiguous() for name, tensor in state.items()}, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=suffix == ".pt")
    return net, path


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".old.pth"])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_a_loaded_teacher_computes_what_was_saved(
    tmp_path: Path, suffix: str, dtype: torch.dtype | None
) -> None:
    """From safetensors, from today's and from old pickles, in any type, outputs are the saved module's."""
    net, path = saved(tmp_path, suffix, channels_last=suffix == ".pt")
    teacher = GPUTeacher.from_checkpoint(Tied, path, "cpu", dtype=dtype)
    expected = net.eval().to(dtype or torch.float32)(IDS)
    torch.testing.assert_close(teacher(IDS), expected)
    assert teacher.dtype == (dtype or torch.float32)
    module = teacher.module
    assert isinstance(module, Tied)
    assert module.head.weight is module.embed.weight
    assert not any(tensor.is_meta for tensor in (*module.parameters(), *module.buffers()))
    assert not module.training
    assert not any(parameter.requires_grad for parameter in module.parameters())


def test_a_teacher_loads_without_recording_gradients(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While it is built and while it is filled, autograd is off; and the caller's mode is as before."""
    _, path = saved(tmp_path, ".safetensors")
    modes: list[bool] = []
    place = Placing.place

    def watched(self: Any, target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        modes.append(torch.is_grad_enabled())
        return place(self, target, values)

    def factory() -> Tied:
        modes.append(torch.is_grad_enabled())
        return Tied()

    monkeypatch.setattr(Placing, "place", watched)
    GPUTeacher.from_checkpoint(factory, path, "cpu")
    assert len(modes) > 5
    assert not any(modes)
    assert torch.is_grad_enabled()


def test_loading_leaves_random_numbers_as_they_were(tmp_path: Path) -> None:
    """The run's random numbers go on as if no teacher had been built."""
    _, path = saved(tmp_path, ".pt")
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    GPUTeacher.from_checkpoint(Tied, path, "cpu")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_one_tensor_at_a_time_is_on_the_host(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each tensor that was read from the file is gone before the next one is read."""
    _, path = saved(tmp_path, suffix)
    alive: list[weakref.ref[torch.Tensor]] = []
    most = [0]
    place = Placing.place

    def watched(self: Any, target: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
        if values is not target:
            most[0] = max(most[0], sum(ref() is not None for ref in alive) + 1)
            alive.append(weakref.ref(values))
        return place(self, target, values)

    monkeypatch.setattr(Placing, "place", watched)
    GPUTeacher.from_checkpoint(Tied, path, "cpu", dtype=torch.bfloat16)
    assert len(alive) > 5
    # torch.load makes all its tensors at once, over mapped memory that is read page by page.
    assert most[0] == 1 or suffix == ".pt"


def test_parameters_are_never_real_before_they_are_read(tmp_path: Path) -> None:
    """The factory's parameters take no memory, while what it computes is real."""
    net, path = saved(tmp_path, ".safetensors")
    built: list[Tied] = []

    def factory() -> Tied:
        built.append(Tied())
        return built[0]

    GPUTeacher.from_checkpoint(factory, path, "cpu")
    assert all(parameter.is_meta for parameter in built[0].parameters())
    assert torch.equal(built[0].get_buffer("positions"), net.get_buffer("positions"))
    assert not any(parameter.is_meta for parameter in Tied().parameters())


def test_several_files_together_hold_the_weights(tmp_path: Path) -> None:
    """A checkpoint in shards is given as a list."""
    net = Tied()
    names = list(net.state_dict())
    paths = []
    for number, part in enumerate((names[:3], names[3:])):
        paths.append(tmp_path / f"part{number}.safetensors")
        save_file({name: net.state_dict()[name].clone() for name in part}, paths[-1])
    teacher = GPUTeacher.from_checkpoint(Tied, paths, "cpu")
    torch.testing.assert_close(teacher(IDS), net.eval()(IDS))


def test_layout_and_type_of_the_file_do_not_matter(tmp_path: Path) -> None:
    """Convolution weights are laid out channels last, and the file may be in another type than the module."""
    net = Tied().to(torch.float16)
    path = tmp_path / "half.safetensors"
    state = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    save_file(state, path)
    teacher = GPUTeacher.from_checkpoint(lambda: nn.Sequential(Tied()), _renamed(path), "cpu")
    assert teacher.dtype == torch.float32
    (tied,) = teacher.module.children()
    assert isinstance(tied, Tied)
    assert tied.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(tied.conv.weight, net.conv.weight.float())


def _renamed(path: Path) -> Path:
    from safetensors.torch import load_file

    new = path.with_name("renamed.safetensors")
    save_file({f"0.{name}": tensor for name, tensor in load_file(path).items()}, new)
    return new


def test_the_files_memory_is_not_the_teachers(tmp_path: Path) -> None:
    """The file may be overwritten or deleted: nothing of the teacher is mapped to it."""
    net, path = saved(tmp_path, ".pt")
    teacher = GPUTeacher.from_checkpoint(Tied, path, "cpu")
    expected = net.eval()(IDS)
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.write(b"\xff" * size)
    torch.testing.assert_close(teacher(IDS), expected)


@pytest.mark.parametrize(
    "change",
    [
        lambda state: state.pop("conv.bias"),
        lambda state: state.update(other=torch.zeros(1)),
        lambda state: state.update({"conv.bias": torch.zeros(5)}),
    ],
    ids=["missing", "unexpected", "shape"],
)
def test_nothing_is_read_from_a_file_that_does_not_fit(
    tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing, an unexpected or a differently shaped tensor is found before anything is placed."""
    state = Tied().state_dict()
    change(state)
    path = tmp_path / "teacher.pt"
    torch.save(state, path)
    monkeypatch.setattr(Placing, "place", lambda *_: pytest.fail("a tensor was placed"))
    with pytest.raises(ValueError, match="does not fit the module"):
        GPUTeacher.from_checkpoint(Tied, path, "cpu")


def test_files_of_before_batch_norms_counted_are_fine(tmp_path: Path) -> None:
    """Old files lack `num_batches_tracked`, which eval mode does not read."""
    state = Tied().state_dict()
    del state["norm.num_batches_tracked"]
    path = tmp_path / "teacher.pt"
    torch.save(state, path)
    assert GPUTeacher.from_checkpoint(Tied, path, "cpu")(IDS).shape == (2, 6, 10)
