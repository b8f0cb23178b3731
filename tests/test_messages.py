"""The exact text of every error and warning: what was asked, what was found, why it matters, what to do.

Each part of the library has its section, in the order of the files.
"""

import copy
import dataclasses
import functools
import gc
import importlib
import math
import pickle
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, distribute_tensor
from torch.nn.utils.rnn import pack_sequence
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.testing._internal.two_tensor import TwoTensor
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from tests.fake_gpu import FakeGPU
from torchfast import (
    DeviceLoader,
    GPUTeacher,
    OutOfMemoryError,
    VRAMMonitor,
    estimate_vram,
    inject_oom,
    oom_guard,
    to_channels_last,
)
from torchfast._device import resolve_device
from torchfast._estimate import calibrate
from torchfast._estimate.gpus import GPU_NAMES, resolve_gpu
from torchfast._estimate.settings import AllocatorSettings
from torchfast._loader import normalize
from torchfast._loader.late import copied
from torchfast._oom.ranks import Outcome
from torchfast._oom.thrash import Thrash
from torchfast._tree import flatten
from torchfast.integrations._repeat import repeating


def text_of(error: pytest.ExceptionInfo[BaseException]) -> str:
    """Return the message as a user reads it."""
    return str(error.value)


# --- devices ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(torch.accelerator.is_available(), reason="speaks of a machine without an accelerator")
@pytest.mark.parametrize("asked", ["cuda:3", 0])
def test_device_that_the_machine_lacks(asked: str | int) -> None:
    """Asking for a GPU where there is none says so, and names the two ways on."""
    with pytest.raises(ValueError, match="asked for") as error:
        resolve_device(asked)
    build = "" if torch.backends.cuda.is_built() else " (this build of PyTorch is for the CPU only)"
    assert text_of(error) == (
        f"device={asked!r} was asked for, but PyTorch finds no accelerator here{build}. "
        'Use device="cpu", or device=None to take whatever the machine has.'
    )


def test_device_that_nobody_has() -> None:
    """A name that PyTorch does not know is answered with the names it knows."""
    with pytest.raises(ValueError, match="knows") as error:
        resolve_device("gpu")
    assert text_of(error) == (
        "device='gpu' is not a device that PyTorch knows. "
        'Give "cpu", "cuda", "cuda:1", a torch.device, or None for the current accelerator.'
    )


def test_device_that_is_a_model() -> None:
    """What is no device at all is named by its type: its own text may be pages long."""
    with pytest.raises(ValueError, match="<Sequential> is not a device"):
        resolve_device(nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)))  # type: ignore[arg-type]  # the mistake


def test_device_number_that_the_machine_does_not_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """An index beyond the last device is answered with the devices that are there."""
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 2)
    with pytest.raises(ValueError, match="numbered") as error:
        resolve_device("cuda:2")
    assert text_of(error) == (
        "device='cuda:2' was asked for, but this machine has 2 cuda device(s), numbered from 0. "
        "Choose cuda:0 to cuda:1, or leave device=None."
    )


# --- batches ---------------------------------------------------------------------------------------------


def test_a_batch_that_contains_itself() -> None:
    """A cycle cannot be walked."""
    batch: list[Any] = [torch.zeros(1)]
    batch.append(batch)
    with pytest.raises(ValueError, match="tree") as error:
        flatten(batch)
    assert text_of(error) == (
        "a batch must be a tree, but this list contains itself. Walking it would never end: break the cycle."
    )


def test_rebuilding_a_batch_of_other_leaves() -> None:
    """A structure takes as many leaves as it gave."""
    _, structure = flatten([torch.zeros(1), torch.ones(1)])
    with pytest.raises(ValueError, match="leaves") as error:
        structure.rebuild([torch.zeros(1)])
    assert text_of(error) == "this structure has 2 leaves, 1 were given"


# --- to_channels_last ------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    """Have a process group of this process alone."""
    dist.init_process_group("gloo", store=torch._C._distributed_c10d.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_converting_neither_a_module_nor_a_batch() -> None:
    """A number, a class or a loader is none of the two; a loader's batches have their own switch."""
    with pytest.raises(TypeError, match="module") as error:
        to_channels_last(nn.Conv2d)
    assert text_of(error) == (
        "to_channels_last takes a module or a batch (tensors, or dicts, lists, tuples and dataclasses of "
        "them), but was given the class Conv2d. "
        "For the batches of a loader, use DeviceLoader(loader, channels_last=True)."
    )
    with pytest.raises(TypeError, match="was given an object of type DataLoader"):
        to_channels_last(torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.zeros(1))))


@pytest.mark.parametrize("kind", ["list", "dict"])
def test_converting_several_modules_at_once(kind: str) -> None:
    """A list or dict of modules is no batch: it is not passed through as if all were done."""
    conv = nn.Conv2d(3, 4, 3)
    with pytest.raises(TypeError, match="modules") as error:
        to_channels_last([conv, conv] if kind == "list" else {"a": conv})
    assert text_of(error) == (
        f"to_channels_last was given a {kind} with modules in it, which is no batch, and would leave them as "
        "they are. Convert each: for model in models: to_channels_last(model)."
    )


def test_options_of_a_conversion_that_make_no_sense() -> None:
    """Wrong options are refused before anything changes."""
    model = nn.Conv2d(3, 4, 3)
    wrong: list[dict[str, Any]] = [{"report": 5}, {"is_image": 5}, {"enabled": "no"}]
    texts = []
    for options in wrong:
        with pytest.raises(TypeError, match="Give one") as error:
            to_channels_last(model, **options)
        texts.append(text_of(error))
    assert model.weight.is_contiguous()
    assert texts == [
        (
            "report= takes a function, but was given an object of type int. Give one that is called with a "
            "LayoutReport, such as print, or leave it out."
        ),
        (
            "is_image= takes a function, but was given an object of type int. Give one that is called with a "
            "tensor and says yes or no, or leave it out."
        ),
        (
            "enabled='no' was given to to_channels_last, which is neither True (channels last) nor False "
            "(the plain layout). Give one of the two."
        ),
    ]


def test_an_optimizer_for_a_batch() -> None:
    """A batch has no optimizer."""
    with pytest.raises(TypeError, match="batch") as error:
        to_channels_last([torch.zeros(2)], optimizer=torch.optim.SGD([torch.zeros(2)]))
    assert text_of(error) == (
        "optimizer= was given together with a batch, and only a model has a use for it. "
        "Give it where the model is converted: to_channels_last(model, optimizer=optimizer)."
    )


def test_an_optimizer_that_is_none() -> None:
    """Parameters, or a scheduler, are not an optimizer."""
    with pytest.raises(TypeError, match="optimizer") as error:
        to_channels_last(nn.Conv2d(1, 1, 1), optimizer=3)  # type: ignore[arg-type]  # wrong on purpose
    assert text_of(error) == (
        "optimizer= takes a torch.optim.Optimizer, or several, but was given an object of type int. "
        "Its state has to be laid out like the parameters, and only an Optimizer says where it is."
    )


def test_an_optimizer_of_another_model() -> None:
    """The state of a stranger's optimizer cannot follow this model's layout."""
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters())
    with pytest.raises(ValueError, match="belongs") as error:
        to_channels_last(nn.Conv2d(3, 4, 3), optimizer=optimizer)
    assert text_of(error) == (
        "none of the parameters of the SGD given as optimizer= belongs to this model, so its state cannot "
        "follow the model's layout. Give the optimizer that was made from this model's parameters."
    )


def test_an_optimizer_that_needs_contiguous_parameters() -> None:
    """LBFGS would fail at its first step: the conversion says so, and leaves the model as it is."""
    model = nn.Conv2d(3, 4, 3)
    with pytest.raises(ValueError, match="LBFGS") as error:
        to_channels_last(model, optimizer=torch.optim.LBFGS(model.parameters()))
    assert model.weight.is_contiguous()
    assert text_of(error) == (
        "LBFGS flattens parameters with .view(-1), which fails for channels_last weights. "
        "Leave the model as it is and convert its batches, or choose another optimizer."
    )


def test_optimizer_state_in_blocks() -> None:
    """Quantised state has a scale for each block of memory, so it cannot be laid out again."""
    model = nn.Conv2d(3, 4, 3)
    optimizer = torch.optim.SGD(model.parameters())
    optimizer.state[model.weight] = {"state1": torch.zeros(4, 3, 3, 3, dtype=torch.uint8)}
    with pytest.raises(ValueError, match="blocks") as error:
        to_channels_last(model, optimizer=optimizer)
    assert model.weight.is_contiguous()
    assert text_of(error) == (
        "SGD keeps state as Tensor of torch.uint8, whose scales belong to blocks of memory: laid out again, "
        "its values would be others. Convert the model before the optimizer's first step."
    )


def test_a_convolution_without_a_weight_yet() -> None:
    """A lazy convolution is converted after its first batch."""
    with pytest.raises(ValueError, match="no weight") as error:
        to_channels_last(nn.Sequential(nn.LazyConv2d(8, 3)))
    assert text_of(error) == (
        "the convolution '0' has no weight yet: it takes its shape from the first batch. "
        "Run one batch through the model, then convert it."
    )


@pytest.mark.usefixtures("one_process")
def test_converting_inside_ddp() -> None:
    """The layout is chosen before wrapping; a model that was converted before may be passed again."""
    wrapped = nn.parallel.DistributedDataParallel(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="Distributed") as error:
        to_channels_last(wrapped)
    assert text_of(error) == (
        "the model is wrapped in DistributedDataParallel, whose gradient buckets are laid out like the "
        "weights at the time of wrapping. Convert first, on every rank, and wrap then: "
        "DistributedDataParallel(to_channels_last(model))."
    )
    early = nn.parallel.DistributedDataParallel(to_channels_last(nn.Conv2d(3, 4, 3)))
    assert to_channels_last(early) is early


@pytest.mark.usefixtures("one_process")
def test_converting_sharded_weights() -> None:
    """FSDP keeps weights contiguous: its models stay as they are, and their batches are converted."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="DTensor") as error:
        to_channels_last(model)
    assert text_of(error) == (
        "the weight of '0' is a DTensor, spread over several processes by fully_shard or tensor parallelism, "
        "which keep weights contiguous. Leave the model as it is and convert its batches: convolutions pass "
        "on the layout of their input."
    )


def test_converting_a_model_in_one_flat_tensor() -> None:
    """The first FSDP keeps all weights in one tensor, in which no weight has a layout of its own."""
    home = {"__module__": "torch.distributed.fsdp.fully_sharded_data_parallel"}
    wrapped = type("FullyShardedDataParallel", (nn.Sequential,), home)(nn.Conv2d(3, 4, 3))
    with pytest.raises(ValueError, match="flat") as error:
        to_channels_last(wrapped)
    assert text_of(error) == (
        "'the model' is wrapped in FullyShardedDataParallel, which keeps its weights as pieces of one flat "
        "tensor. Leave the model as it is and convert its batches: convolutions pass on the layout of their "
        "input."
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_converting_torchscript() -> None:
    """In TorchScript a convolution cannot be told from other code."""
    with pytest.raises(ValueError, match="TorchScript") as error:
        to_channels_last(torch.jit.script(nn.Conv2d(3, 4, 3)))
    assert text_of(error) == (
        "'the model' is a TorchScript module, in which convolutions cannot be told from other code. "
        "Convert the model before torch.jit.script or torch.jit.trace."
    )


def test_converting_shared_memory() -> None:
    """Other processes would keep reading the old memory."""
    with pytest.raises(ValueError, match="shared") as error:
        to_channels_last(nn.Conv2d(3, 4, 3).share_memory())
    assert text_of(error) == (
        "'weight' lies in memory shared with other processes, which would keep the old one. "
        "Convert the model before model.share_memory()."
    )


def test_converting_a_weight_that_others_look_into() -> None:
    """A view of another shape cannot follow its base into the new layout."""
    model = nn.Module()
    model.conv = nn.Conv2d(3, 4, 2)
    model.flat = nn.Parameter(model.conv.weight.data.view(4, 12))
    with pytest.raises(ValueError, match="view") as error:
        to_channels_last(model)
    assert text_of(error) == (
        "'flat' is a view into the memory of a convolution's weight: laying the weight out again would untie "
        "them. Tie them after the conversion, or give each its own memory."
    )


# --- DeviceLoader ----------------------------------------------------------------------------------------


def test_loader_that_is_no_iterable() -> None:
    """Something that cannot be iterated over is answered with what can, and the way for a dataset."""
    with pytest.raises(TypeError, match="wraps an iterable") as error:
        DeviceLoader(7)  # type: ignore[call-overload]  # the mistake under test
    assert text_of(error) == (
        "DeviceLoader wraps an iterable of batches, such as a DataLoader; int cannot be iterated over. "
        "For a dataset, use DeviceLoader.from_dataset(dataset, batch_size=...)."
    )


def test_loader_that_is_a_function() -> None:
    """A generator's function is answered with the call of it."""

    def batches() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="the function") as error:
        DeviceLoader(batches)  # type: ignore[call-overload]  # the mistake under test
    assert text_of(error) == (
        "DeviceLoader wraps an iterable of batches, and was given the function batches. If it yields "
        "batches, call it: DeviceLoader(batches()). What it returns then serves one epoch."
    )


@pytest.mark.parametrize(
    ("loader", "kind", "yielded"),
    [
        ("train", "str", "characters"),
        ({"train": []}, "dict", "keys"),
        (torch.zeros(3), "Tensor", "rows"),
        (nn.Sequential(nn.Linear(2, 2)), "Sequential", "parts"),
    ],
)
def test_loader_of_what_are_no_batches(loader: Any, kind: str, yielded: str) -> None:
    """What can be iterated over, but surely not over batches, is answered with what it would yield."""
    with pytest.raises(TypeError, match="one by one") as error:
        DeviceLoader(loader)
    assert text_of(error) == (
        f"DeviceLoader wraps an iterable of batches, and {kind} would yield its {yielded} one by one. "
        "Give a DataLoader, or a list or generator of batches."
    )


def test_loader_that_is_an_array() -> None:
    """An array would yield its rows, like a tensor."""
    numpy = pytest.importorskip("numpy")
    with pytest.raises(TypeError, match="ndarray would yield its rows one by one"):
        DeviceLoader(numpy.zeros((2, 2)))


def test_loader_that_is_a_class() -> None:
    """A class is answered with how to make a loader of it."""
    with pytest.raises(TypeError, match="the class") as error:
        DeviceLoader(DataLoader)  # type: ignore[call-overload]  # the mistake under test
    assert text_of(error) == (
        "DeviceLoader wraps an iterable of batches, and was given the class DataLoader. Make one first: "
        "DeviceLoader(DataLoader(...))."
    )


@pytest.mark.parametrize("name", ["channels_last", "across_epochs", "poison"])
@pytest.mark.parametrize("value", ["no", 1, torch.channels_last])
def test_loader_switch_that_is_neither_on_nor_off(name: str, value: object) -> None:
    """A word is refused, "no" among them."""
    options: dict[str, Any] = {name: value}
    with pytest.raises(TypeError, match="neither") as error:
        DeviceLoader([], "cpu", **options)
    assert text_of(error) == (
        f"{name}={value!r} is neither True nor False, and would count as one of them. Give True or False."
    )


@pytest.mark.parametrize("name", ["batch_size", "depth", "device", "loader"])
def test_loader_attribute_that_would_change_nothing(name: str) -> None:
    """What was settled when the loader was built cannot be set on what wraps it."""
    loader = DeviceLoader(DataLoader(TensorDataset(torch.zeros(4))), "cpu")
    with pytest.raises(AttributeError, match="cannot be set") as error:
        setattr(loader, name, 4)
    assert text_of(error) == (
        f"{name!r} of a DeviceLoader cannot be set: it was read when that was made. Build the loader, and a "
        "DeviceLoader around it, with what you want."
    )


def test_loader_option_that_is_asked_for() -> None:
    """An option is not an attribute of the loader: where to see it is said."""
    with pytest.raises(AttributeError, match="option") as error:
        _ = DeviceLoader([], "cpu").depth
    assert text_of(error) == "'depth' is an option of DeviceLoader, which its repr shows."


def test_loader_that_is_a_dataset() -> None:
    """A dataset of samples could be iterated over, some of them for ever: the ways to batches are named."""
    with pytest.raises(TypeError, match="is a dataset") as error:
        DeviceLoader(TensorDataset(torch.zeros(4)))  # type: ignore[call-overload]  # the mistake under test
    assert text_of(error) == (
        "DeviceLoader wraps an iterable of batches, and TensorDataset is a dataset, of samples: each would "
        "be yielded by itself, without end if it raises no IndexError. Use "
        "DeviceLoader.from_dataset(dataset, batch_size=...), or DataLoader(dataset, batch_size=None) if "
        "its items are batches."
    )


def test_loader_of_a_dataset_that_is_none() -> None:
    """A generator is no dataset; there is a way for one of batches and one for one of samples."""
    with pytest.raises(TypeError, match="from_dataset") as error:
        DeviceLoader.from_dataset((n for n in [1]), batch_size=1)  # type: ignore[arg-type]  # the mistake
    assert text_of(error) == (
        "from_dataset takes samples by their index, or an IterableDataset of them; generator is neither. An "
        "iterable of batches goes to DeviceLoader(batches) as it is; one of samples becomes a dataset as a "
        "subclass of torch.utils.data.IterableDataset."
    )


def test_loader_of_the_class_of_a_dataset() -> None:
    """A class is to be called first."""
    with pytest.raises(TypeError, match="from_dataset") as error:
        DeviceLoader.from_dataset(TensorDataset, batch_size=1)  # type: ignore[arg-type]  # the mistake
    assert text_of(error) == (
        "from_dataset takes a dataset, and was given the class TensorDataset. Make one first: "
        "from_dataset(TensorDataset(...), ...)."
    )


@pytest.mark.parametrize("num_workers", ["2", 1.5, True])
def test_loader_with_no_number_of_workers(num_workers: Any) -> None:
    """A word, a fraction and a switch are no number of processes."""
    with pytest.raises(TypeError, match="num_workers") as error:
        DeviceLoader.from_dataset(TensorDataset(torch.ones(2)), batch_size=1, num_workers=num_workers)
    assert text_of(error) == (
        f"num_workers={num_workers!r}: the number of worker processes, a whole number; 0 loads in the "
        "process itself, and None chooses."
    )


@pytest.mark.parametrize("depth", [0, -1, 1.5, True, "2"])
def test_loader_depth_below_one(depth: object) -> None:
    """A depth that is no positive whole number is answered with what depth means."""
    with pytest.raises(ValueError, match="depth=") as error:
        DeviceLoader([], "cpu", depth=depth)  # type: ignore[call-overload]  # the mistake under test
    assert text_of(error) == (
        f"depth={depth!r} must be a whole number of at least 1: how many batches are brought to the device "
        "ahead of use. 2 hides most jitter; each one more costs the device memory of a batch."
    )


def test_loader_transform_that_cannot_be_called() -> None:
    """A transform that is no function is answered with what one is."""
    with pytest.raises(TypeError, match="transform=") as error:
        DeviceLoader([], "cpu", transform=3)  # type: ignore[call-overload]  # the mistake under test
    assert text_of(error) == (
        "transform=3 cannot be called. Give a function that takes a batch, on the device, and returns what "
        "is to be yielded in its place."
    )


def test_loader_that_cannot_load_across_epochs() -> None:
    """Loading ahead of a set_epoch is refused, with what would happen."""
    dataset = TensorDataset(torch.zeros(4))
    loader = DataLoader(dataset, sampler=DistributedSampler(dataset, 1, 0))
    with pytest.raises(ValueError, match="across_epochs") as error:
        DeviceLoader(loader, "cpu", across_epochs=True)
    assert text_of(error) == (
        "across_epochs=True, but DistributedSampler has a set_epoch: the next epoch would be loaded "
        "before it is told its number, and repeat the order of this one. Leave across_epochs off."
    )


def test_loader_attribute_that_is_not_forwarded() -> None:
    """An attribute of the wrapped loader that is not forwarded is refused, with the way to it."""
    with pytest.raises(AttributeError, match="no attribute") as error:
        _ = DeviceLoader([], "cpu").append
    assert text_of(error) == (
        "DeviceLoader has no attribute 'append', and does not take it from the loader it wraps. "
        "Use .loader.append if you mean that loader's own."
    )


def test_loader_pass_that_was_closed() -> None:
    """A pass that another one closed says why, and what to do; so does the warning of closing it."""
    loader = DeviceLoader([1, 2], "cpu")
    first = iter(loader)
    next(first)
    with pytest.warns(RuntimeWarning) as warned:
        iter(loader)
    assert str(warned[0].message) == (
        "a new pass over this DeviceLoader, or over the workers of its loader, was begun before the last one "
        "was finished or dropped, so the last one was closed: two passes at a time would share workers and "
        "steal each other's batches. Call close() on the first, or use one DeviceLoader, around a loader of "
        "its own, for each loop that runs at the same time."
    )
    with pytest.raises(RuntimeError, match="closed") as error:
        next(first)
    assert text_of(error) == (
        "this pass over a DeviceLoader was closed, by close() or because another pass over the same loader "
        "was begun: two at a time would share workers and steal each other's batches. "
        "Use one DeviceLoader, around a loader of its own, for each loop that runs at the same time."
    )


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded")  # of Python 3.12, of any fork
def test_loader_that_throws_its_workers_away() -> None:
    """A second epoch with new workers is warned of, with their number and the remedy."""
    loader = DeviceLoader(DataLoader([1, 2], num_workers=1), "cpu")  # type: ignore[arg-type]  # a list is a dataset
    list(loader)
    with pytest.warns(UserWarning, match="ends its") as warned:
        list(loader)
    assert str(warned[0].message) == (
        "this loader ends its 1 worker(s) after each epoch and starts new ones, which takes seconds an epoch "
        "and loses what their datasets have cached. "
        "Build it with DataLoader(..., persistent_workers=True), or with DeviceLoader.from_dataset."
    )


@pytest.mark.parametrize(
    "normalize",
    [
        0.5,
        ((0.5,), (0.0,)),
        ((0.5,), (2.0,)),
        ((0.5,), (0.5, 0.5)),
        ((123.0,), (58.0,)),
        ((0.5,), (-0.5,)),
        ((math.nan,), (0.5,)),
        ((0.5,), (math.nan,)),
    ],
)
def test_loader_normalisation_that_cannot_be(normalize: object) -> None:
    """Means and stds that do not match, divide by zero or are of 0 to 255 are answered with what they are."""
    with pytest.raises(ValueError, match="normalize=") as error:
        DeviceLoader([], "cpu", normalize=normalize)  # type: ignore[call-overload]  # the mistake under test
    assert text_of(error) == (
        f"normalize={normalize!r} with image_dtype=torch.float32: give (mean, std), as many numbers in each "
        "as images have channels, for images in [0, 1] (so those for 0 to 255 divided by 255): each mean "
        "from -1 to 1, each std above 0 and at most 1, and a floating-point dtype, as in normalize=((0.485, "
        "0.456, 0.406), (0.229, 0.224, 0.225)), image_dtype=torch.bfloat16."
    )


@pytest.mark.parametrize("image_dtype", ["bf16", torch.uint8])
def test_loader_image_dtype_that_cannot_be(image_dtype: Any) -> None:
    """A type that is none, or not of floating point, is named in the same answer."""
    with pytest.raises(ValueError, match=f"with image_dtype={image_dtype!r}: give "):
        DeviceLoader([], "cpu", normalize=((0.5,), (0.5,)), image_dtype=image_dtype)


@pytest.mark.parametrize(
    ("shape", "dtype"),
    [
        ((4, 8, 8, 3), torch.uint8),
        ((4, 1, 8, 8), torch.uint8),
        ((4, 3, 8, 8), torch.float32),
        ((4, 3, 8, 2), torch.uint8),
    ],
)
def test_loader_batch_with_nothing_to_normalise(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Images of another layout, number of channels or type would come through raw: that is said instead."""
    loader = DeviceLoader([torch.zeros(shape, dtype=dtype)], "cpu", normalize=((0.5,) * 3, (0.5,) * 3))
    with pytest.raises(ValueError, match="normalize=") as error:
        next(iter(loader))
    assert text_of(error) == (
        "normalize= has numbers for 3 channels, but this batch has no uint8 images (N, 3, H, W), each side "
        f"at least 3, and would come through as it is. It holds {shape} {dtype}. Let the loader yield uint8 "
        "images, channels first, or normalise in transform=."
    )


@pytest.mark.parametrize("streams", [[3], 3, None])
def test_loader_streams_that_are_none(streams: Any) -> None:
    """What is no stream, or no list of them, is refused at once, on the CPU too."""
    with pytest.raises(TypeError, match="streams=") as error:
        DeviceLoader([], "cpu", streams=streams)
    assert text_of(error) == (
        f"streams={streams!r}: give a list of the torch.cuda.Stream objects, other than the one that the "
        "loop runs on, on which batches are used."
    )


def test_loader_image_dtype_without_normalisation() -> None:
    """A type for images that nothing makes is refused, with what makes them."""
    with pytest.raises(ValueError, match="image_dtype=") as error:
        DeviceLoader([], "cpu", image_dtype=torch.bfloat16)
    assert text_of(error) == (
        "image_dtype=torch.bfloat16 without normalize=: it is the type of the images that normalize= makes, "
        "and would change nothing. Give normalize=(mean, std), or convert in transform=."
    )


def test_loader_batch_that_does_not_fit_its_static_tensors() -> None:
    """A batch of another shape than the static tensors is answered with both, and the usual remedy."""
    loader = DeviceLoader([torch.zeros(3), torch.zeros(2)], "cpu", into=torch.zeros(3))
    batches = iter(loader)
    next(batches)
    with pytest.raises(ValueError, match="into=") as error:
        next(batches)
    assert text_of(error) == (
        "into= holds tensors of (3,) torch.float32, but this batch has (2,) torch.float32. A CUDA graph "
        "reads the same memory each time, so every batch must fill it exactly. "
        "drop_last=True leaves out a smaller last batch."
    )


@pytest.mark.parametrize(
    ("batch", "found"),
    [
        (
            {"b": torch.zeros(3), "a": torch.zeros(3)},
            "(3,) torch.float32, (3,) torch.float32, in other places of the batch or in another order",
        ),
        ({"a": torch.zeros(3)}, "(3,) torch.float32"),
        ({"a": torch.zeros(3), "b": pack_sequence([torch.zeros(3)])}, "(3,) torch.float32, no tensor"),
    ],
    ids=["order", "number", "kind"],
)
def test_loader_batch_with_other_places_than_its_static_tensors(batch: object, found: str) -> None:
    """A batch whose tensors lie elsewhere would fill the wrong ones: it is refused, and nothing is filled."""
    static = {"a": torch.ones(3), "b": torch.ones(3)}
    with pytest.raises(ValueError, match="into=") as error:
        next(iter(DeviceLoader([batch], "cpu", into=static)))
    assert text_of(error).startswith(
        f"into= holds tensors of (3,) torch.float32, (3,) torch.float32, but this batch has {found}. A CUDA"
    )
    assert torch.cat([static["a"], static["b"]]).tolist() == [1] * 6


@pytest.mark.parametrize(
    ("into", "found"),
    [([], "nothing"), ([torch.zeros(3), pack_sequence([torch.zeros(3)])], "(3,) torch.float32, no tensor")],
)
def test_loader_static_batch_that_is_none(into: object, found: str) -> None:
    """Without tensors, or with what is none, there is nothing that a graph could read."""
    with pytest.raises(ValueError, match="into=") as error:
        DeviceLoader([], "cpu", into=into)
    assert text_of(error) == (
        f"into= holds {found}: give a batch of tensors, as many and in the same places as each batch will "
        "have, which a CUDA graph then reads."
    )


def test_loader_static_batch_elsewhere() -> None:
    """Static tensors on another device, or in an autograd graph, are refused before any batch is taken."""
    into = [torch.zeros(3, device="meta"), torch.zeros(3, requires_grad=True)]
    with pytest.raises(ValueError, match="into=") as error:
        DeviceLoader([], "cpu", into=into)
    assert text_of(error) == (
        "into= holds tensors on meta, cpu with requires_grad, but batches are brought to cpu and copied "
        "there, outside of any autograd graph. Make them with device='cpu', requires_grad=False."
    )


@pytest.mark.parametrize("into", [torch.zeros(1).expand(3), torch.zeros(3).to_sparse()])
def test_loader_static_batch_without_places(into: torch.Tensor) -> None:
    """What is expanded or sparse cannot be filled in place."""
    with pytest.raises(ValueError, match="into=") as error:
        DeviceLoader([], "cpu", into=into)
    assert text_of(error) == (
        "into= holds tensors of (3,) torch.float32, not each of which has a place of its own for every "
        "element: nested, sparse and expanded ones have not. Give dense tensors, as torch.empty makes them."
    )


def test_loader_whose_batch_cannot_be_kept() -> None:
    """An object that moves itself and cannot be copied is refused, with the two ways on."""

    class Handle:
        def to(self, _: torch.device) -> "Handle":
            return self

        def __reduce_ex__(self, _: object) -> str:
            raise TypeError("it is an open file")

    with pytest.raises(TypeError, match="Handle") as error:
        copied(Handle())
    assert text_of(error) == (
        "a batch holds a Handle, which moves by its own .to when the batch is handed out. The loader may "
        "have written its next batch there by then, so a copy is kept, but it has no clone(), and "
        "copy.deepcopy failed: it is an open file. Give it a clone(), or load by a DataLoader with "
        "workers, whose batches are its own."
    )


@pytest.mark.parametrize("duplicate", [copy.copy, copy.deepcopy, pickle.dumps])
def test_loader_that_is_copied(duplicate: Callable[[object], object]) -> None:
    """Neither a loader nor a pass can be copied or pickled, and what can is named."""
    loader = DeviceLoader([1], "cpu")
    with pytest.raises(TypeError) as error:
        duplicate(loader)
    assert text_of(error) == (
        "DeviceLoader cannot be copied or pickled: it has a thread, streams and batches under way. Copy or "
        "send the loader it wraps, .loader, and wrap that where it is used."
    )
    with pytest.raises(TypeError) as error:
        duplicate(iter(loader))
    assert text_of(error) == (
        "a pass over a DeviceLoader cannot be copied or pickled: its batches can be taken once only."
    )


@pytest.mark.cuda
def test_loader_inside_a_graph_capture() -> None:
    """Taking a batch while a graph is captured is answered with what would go wrong, and the way to do it."""
    batches = iter(DeviceLoader([torch.zeros(1)], "cuda"))
    static = torch.zeros(1, device="cuda")
    with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode="thread_local"):
        static.add_(1)
        with pytest.raises(RuntimeError) as error:
            next(batches)
    assert text_of(error) == (
        "a DeviceLoader was asked for a batch while a CUDA graph was being captured: the graph would read "
        "that batch's memory at each replay. Take batches outside, into the tensors that the graph reads: "
        "DeviceLoader(..., into=static_batch)."
    )


@pytest.mark.usefixtures("_no_compiler")
def test_loader_normalisation_without_a_compiler() -> None:
    """Where Triton cannot build its kernel, images are normalised all the same, and it is said why slower."""
    images = torch.zeros(1, 3, 2, 2, dtype=torch.uint8)
    with pytest.warns(RuntimeWarning, match="Triton") as warned:
        assert not normalize._in_one_kernel(images, torch.empty(1, 3, 2, 2), torch.empty(3, 256))
    assert str(warned[0].message) == (
        "Triton could not build the kernel that normalises images (Failed to find C compiler.). They are "
        "normalised by several kernels instead: the same values, more slowly. Installing a C compiler "
        "usually helps."
    )


def test_loader_transform_that_stops_the_iteration() -> None:
    """A StopIteration out of a transform is named as what it would have done."""
    with pytest.raises(RuntimeError, match="transform=") as error:
        list(DeviceLoader([1], "cpu", transform=lambda _: next(iter([]))))
    assert text_of(error) == (
        "transform= raised StopIteration, which would have ended the epoch without a word. "
        "Raise another error, or end the loop from its body."
    )


def test_loader_batch_that_stops_the_iteration() -> None:
    """So is one out of a batch that is moved."""
    batch = SimpleNamespace(to=lambda _: next(iter([])))
    with pytest.raises(RuntimeError, match="moving") as error:
        list(DeviceLoader([batch], "cpu"))
    assert text_of(error) == (
        "moving a batch raised StopIteration, which would have ended the epoch without a word. "
        "Raise another error, or end the loop from its body."
    )


# --- GPUTeacher ------------------------------------------------------------------------------------------


def test_a_teacher_that_is_no_module() -> None:
    """A class, a function or a path is no module; for a path there is another way."""
    with pytest.raises(TypeError, match="takes") as error:
        GPUTeacher(nn.Linear)  # type: ignore[arg-type]  # wrong on purpose
    assert text_of(error) == (
        "GPUTeacher takes a torch.nn.Module, but was given the class Linear. "
        "Give an instance of the module that computes the targets."
    )
    with pytest.raises(TypeError, match="takes") as error:
        GPUTeacher("teacher.safetensors")  # type: ignore[arg-type]  # wrong on purpose
    assert text_of(error) == (
        "GPUTeacher takes a torch.nn.Module, but was given an object of type str. "
        "To load one from a file, use GPUTeacher.from_checkpoint(factory, path)."
    )


def test_a_teacher_without_parameters() -> None:
    """A module that has learnt nothing is most likely the wrong one."""
    with pytest.raises(ValueError, match="parameters") as error:
        GPUTeacher(nn.ReLU(), "cpu")
    assert text_of(error) == (
        "the teacher, ReLU, has no parameters, so it has learnt nothing to teach. "
        "Give the trained module itself; what needs no weights can be called as it is."
    )


def test_a_teacher_without_values() -> None:
    """Parameters on meta, or lazy ones, have no values to copy."""
    with pytest.raises(ValueError, match="meta") as error:
        GPUTeacher(nn.Linear(2, 2, device="meta"), "cpu")
    assert text_of(error) == (
        "'weight' of the teacher lies on the meta device and has no values. "
        "Load them with GPUTeacher.from_checkpoint(factory, path)."
    )
    with pytest.raises(ValueError, match="first batch") as error:
        GPUTeacher(nn.LazyLinear(2), "cpu")
    assert text_of(error) == (
        "'weight' of the teacher has no shape yet: it takes it from the first batch. "
        "Run one batch through the module, then make it a teacher."
    )


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_a_teacher_in_torchscript() -> None:
    """TorchScript's weights cannot be placed one by one."""
    with pytest.raises(TypeError, match="TorchScript") as error:
        GPUTeacher(torch.jit.script(nn.Linear(2, 2)), "cpu")
    assert text_of(error) == (
        "the teacher is a TorchScript module, whose weights cannot be placed one by one. "
        "Give the Python module that it was made from."
    )


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_a_teacher_that_is_quantised() -> None:
    """Packed weights are no parameters: neither placed nor loaded, so they are refused by name."""
    quantised = nn.Sequential(nn.Conv2d(1, 1, 1), nn.Linear(2, 2))
    torch.ao.quantization.quantize_dynamic(quantised, {nn.Linear}, inplace=True)
    with pytest.raises(ValueError, match="quantised") as error:
        GPUTeacher(quantised, "cpu")
    assert text_of(error) == (
        "'1' of the teacher is quantised for the CPU: its weights are packed and no parameters, so they "
        "cannot be placed on a device or read from a file. "
        "Give the module as it was before, with dtype=torch.bfloat16 to save memory."
    )


def test_a_teacher_that_cannot_be_copied() -> None:
    """A lock belongs to one process, and a teacher is a copy."""
    module = nn.Linear(2, 2)
    module.lock = threading.Lock()  # type: ignore[assignment]  # any attribute will do
    with pytest.raises(TypeError, match="copied") as error:
        GPUTeacher(module, "cpu")
    assert text_of(error) == (
        "the teacher cannot be copied: cannot pickle '_thread.lock' object. It holds something that belongs "
        "to one process, such as a lock or an open file. Take it out of the module, or leave it out in its "
        "__deepcopy__."
    )


@pytest.mark.usefixtures("one_process")
def test_a_teacher_in_pieces() -> None:
    """A teacher is whole on each device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = nn.Linear(2, 2)
    fully_shard(model, mesh=init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match="DTensor") as error:
        GPUTeacher(model, "cpu")
    assert text_of(error) == (
        "'weight' of the teacher is a DTensor, spread over several processes, and a teacher is whole on each "
        "device. Make it before fully_shard, or load it with GPUTeacher.from_checkpoint."
    )


def test_options_of_a_teacher_that_make_no_sense() -> None:
    """A type without fractions, no samples at a time, and a device without memory."""
    module = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="dtype") as error:
        GPUTeacher(module, "cpu", dtype=torch.int8)
    assert text_of(error) == (
        "dtype=torch.int8 was asked for, but a teacher computes in floating point. "
        "Choose torch.bfloat16, torch.float16 or torch.float32, or leave dtype=None to keep the module's."
    )
    with pytest.raises(TypeError, match=r"dtype='bf16' was asked for, but a teacher computes"):
        GPUTeacher(module, "cpu", dtype="bf16")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="chunk_size") as error:
        GPUTeacher(module, "cpu", chunk_size=0)
    assert text_of(error) == (
        "chunk_size=0 was asked for, but at least one sample has to run at a time. "
        "Give a positive number, or None for no limit."
    )
    with pytest.raises(TypeError, match=r"chunk_size='4' was asked for, but at least one"):
        GPUTeacher(module, "cpu", chunk_size="4")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="device") as error:
        GPUTeacher(module, "meta")
    assert text_of(error) == (
        "device='meta' was asked for, where tensors have no values: a teacher could not compute targets. "
        "Choose a device with memory, or None for the current one."
    )


def test_a_factory_that_is_none() -> None:
    """A module is not a function that builds one, and a function has to return one."""
    with pytest.raises(TypeError, match="function") as error:
        GPUTeacher.from_checkpoint(nn.Linear(2, 2), "teacher.pt", "cpu")
    assert text_of(error) == (
        "GPUTeacher.from_checkpoint takes a function that builds the module, but was given an object of type "
        "Linear. Give it a way to build one without memory: lambda: Linear(...)."
    )
    with pytest.raises(TypeError, match="returned") as error:
        GPUTeacher.from_checkpoint(lambda: None, "a.pt", "cpu")  # type: ignore[arg-type,return-value]  # wrong
    assert text_of(error) == (
        "the factory given to GPUTeacher.from_checkpoint returned an object of type NoneType, not a "
        "torch.nn.Module. It has to build and return the teacher's module."
    )


def test_a_checkpoint_that_does_not_fit(tmp_path: Path) -> None:
    """Names and shapes that differ are listed, and a wrapper's prefix is recognised."""
    path = tmp_path / "teacher.pt"
    torch.save({"weight": torch.zeros(3, 2), "extra": torch.zeros(1)}, path)
    with pytest.raises(ValueError, match="fit") as error:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), path, "cpu")
    assert text_of(error) == (
        "the checkpoint does not fit the module that the factory built: it lacks bias; has besides extra; "
        "has in another shape weight (3, 2) instead of (2, 2). Nothing was loaded."
    )
    torch.save({f"module.{name}": t for name, t in nn.Linear(2, 2).state_dict().items()}, path)
    with pytest.raises(ValueError, match="fit") as error:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), path, "cpu")
    assert text_of(error) == (
        "the checkpoint does not fit the module that the factory built: it lacks weight, bias; has besides "
        "module.weight, module.bias. All its names begin with 'module.': it was saved from a wrapper. "
        "Save the wrapped module's own state dict. Nothing was loaded."
    )


def test_a_checkpoint_of_something_else(tmp_path: Path) -> None:
    """A file with more than tensors by name, or with no names at all."""
    path = tmp_path / "teacher.pt"
    torch.save({"epoch": 3, "model": {}}, path)
    with pytest.raises(TypeError, match="more than") as error:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), path, "cpu")
    assert text_of(error) == (
        f"{str(path)!r} holds more than tensors by name: epoch, model. "
        "Save the state dict alone: torch.save(checkpoint[<its key>], path)."
    )
    torch.save([torch.zeros(1)], path)
    with pytest.raises(TypeError, match="state dict") as error:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), path, "cpu")
    assert text_of(error) == (
        f"{str(path)!r} holds list, not a state dict: tensors by name. "
        "Save the teacher with torch.save(teacher.state_dict(), path)."
    )


@pytest.mark.parametrize("name", ["broken.safetensors", "broken.pt", "empty.pt"])
def test_a_checkpoint_that_is_broken(tmp_path: Path, name: str) -> None:
    """The file is named, whatever its reader says."""
    path = tmp_path / name
    path.write_bytes(b"" if name == "empty.pt" else b"\x80\x02" + bytes(range(64)))
    with pytest.raises(ValueError, match="could not be read") as error:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), path, "cpu")
    cause = error.value.__cause__
    reason = str(cause).partition("\n")[0].rstrip(".")
    assert text_of(error) == (
        f"{str(path)!r} could not be read as a checkpoint: {type(cause).__name__}: {reason}. "
        "Give a whole .safetensors file, or a state dict that torch.save wrote; "
        "one that is broken or empty has to be copied or saved again."
    )


def test_a_checkpoint_of_a_whole_module(tmp_path: Path) -> None:
    """A module that was saved as it is, is told from a file that is broken."""
    path = tmp_path / "whole.pt"
    torch.save(nn.Linear(2, 2), path)
    with pytest.raises(TypeError, match="Linear") as error:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), path, "cpu")
    assert text_of(error) == (
        f"{str(path)!r} holds an object of torch.nn.modules.linear.Linear, and to read one is to run code of "
        "the file. Save the state dict alone: torch.save(module.state_dict(), path)."
    )


def test_a_checkpoint_of_no_file() -> None:
    """No file, or a number, is said before anything is built."""
    with pytest.raises(ValueError, match="no file") as error:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), [], "cpu")
    assert text_of(error) == (
        "GPUTeacher.from_checkpoint was given no file: its list of paths is empty. "
        "Give the files that together hold the weights."
    )
    with pytest.raises(TypeError, match="path of a file") as wrong:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), 5, "cpu")  # type: ignore[arg-type]  # wrong
    assert text_of(wrong) == (
        "GPUTeacher.from_checkpoint takes the path of a file, or of several, but was given 5. "
        "Give a .safetensors file, or one that torch.save wrote."
    )


def test_a_factory_that_computes_buffers_from_parameters(tmp_path: Path) -> None:
    """A buffer that the file lacks and the factory cannot compute is named; the teacher never has holes."""

    class Net(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.register_buffer("norm", self.weight.detach().norm(), persistent=False)

    path = tmp_path / "teacher.pt"
    torch.save(Net().state_dict(), path)
    with pytest.raises(ValueError, match="norm") as error:
        GPUTeacher.from_checkpoint(Net, path, "cpu")
    assert text_of(error) == (
        "'norm' is not in the checkpoint, and the factory gave it no values: it lies on the meta device. "
        "Have the factory compute it from numbers instead of from parameters."
    )


def test_a_safetensors_file_without_safetensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing package is named; nobody is sent to the unrelated torchfast of PyPI."""
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(ImportError, match="safetensors") as error:
        GPUTeacher.from_checkpoint(lambda: nn.Linear(2, 2), "teacher.safetensors", "cpu")
    assert text_of(error) == (
        "reading 'teacher.safetensors' needs the safetensors package, which is not installed. "
        "Install it with: pip install safetensors"
    )


def test_a_teacher_whose_weights_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator's own error comes with the size of the teacher, and the size that it could have."""

    def place(*_args: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr("torchfast._teacher.placing.Placing.place", place)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as error:
        GPUTeacher(nn.Linear(512, 512, bias=False), "cpu")
    assert error.value.__notes__[0] == (
        "The teacher's weights take 1.00 MiB on cpu. With dtype=torch.bfloat16 they take 512 KiB."
    )


def test_features_that_are_not_there() -> None:
    """A name that is no module is answered with names close to it; and nothing at all is not an answer."""
    model = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer2": nn.Linear(2, 2), "head": nn.Linear(2, 2)})
    with pytest.raises(ValueError, match="features") as error:
        GPUTeacher(model, "cpu", features=["layer3"])
    assert text_of(error) == (
        "features='layer3' was asked for, but ModuleDict has no module of that name. "
        "It has, among others: layer2, layer1."
    )
    with pytest.raises(ValueError, match="outputs") as error:
        GPUTeacher(model, "cpu", outputs=False)
    assert text_of(error) == (
        "outputs=False was asked for without features=, so the teacher would return nothing. "
        'Name modules inside it, as in features=("layer3",), or leave outputs=True.'
    )


def test_features_that_are_no_names() -> None:
    """A number names no module."""
    with pytest.raises(TypeError, match="features") as error:
        GPUTeacher(nn.Linear(2, 2), "cpu", features=5)  # type: ignore[arg-type]  # wrong on purpose
    assert text_of(error) == (
        "features=5 was asked for, which are no names. Name modules inside the teacher as named_modules() "
        'does, as in features=("layer3",).'
    )


def test_features_that_the_forward_does_not_pass() -> None:
    """A module that takes no part in the forward has no output to give."""
    model = nn.Linear(2, 2)
    model.spare = nn.Linear(2, 2)
    with pytest.raises(RuntimeError, match="did not call") as error:
        GPUTeacher(model, "cpu", features=["spare"])(torch.zeros(1, 2))
    assert text_of(error) == (
        "the teacher's forward did not call 'spare', which features= asks for, on these inputs. "
        "Ask for a module that takes part in every forward."
    )


def test_a_plan_that_nobody_knows() -> None:
    """The ways to run a teacher are named."""
    with pytest.raises(ValueError, match="plan") as error:
        GPUTeacher(nn.Linear(2, 2), "cpu", plan="fast")
    assert text_of(error) == (
        "plan='fast' was asked for, which is no way to run a teacher. "
        "Choose \"eager\", \"auto\", or some of 'plain', 'fold', 'compile', 'graph', "
        'as in plan=("fold", "graph").'
    )
    with pytest.raises(ValueError, match=r"plan=\('fold', 'fast'\) was asked for, which is no way"):
        GPUTeacher(nn.Linear(2, 2), "cpu", plan=("fold", "fast"))
    with pytest.raises(TypeError, match="plan=None was asked for, which is no way"):
        GPUTeacher(nn.Linear(2, 2), "cpu", plan=None)  # type: ignore[arg-type]  # wrong on purpose


def test_a_teacher_out_of_a_pickle() -> None:
    """A pickle leaves the weights out, and the teacher in it says so."""
    teacher = pickle.loads(pickle.dumps(GPUTeacher(nn.Linear(2, 2), "cpu")))  # noqa: S301 -- our own bytes
    with pytest.raises(RuntimeError, match="pickle") as error:
        teacher(torch.zeros(1, 2))
    assert text_of(error) == (
        "this GPUTeacher came through a pickle (torch.save of a whole student, or a spawned process), which "
        "leaves a teacher's weights out. "
        "Build it again with GPUTeacher(...) or GPUTeacher.from_checkpoint(...)."
    )


class OutOfMemory(nn.Linear):
    """A teacher that takes one sample at most, or as many as it is given."""

    def __init__(self, most: int) -> None:
        super().__init__(1, 1)
        self.most = most

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fail as an allocator does."""
        if len(x) > self.most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return x


def test_a_teacher_that_runs_in_parts() -> None:
    """The warning says how it goes on, and how to begin so."""
    with pytest.warns(UserWarning, match="samples at a time") as caught:
        GPUTeacher(OutOfMemory(2), "cpu")(torch.zeros(4, 1))
    assert str(caught[0].message) == (
        "the teacher ran out of memory on this batch and runs 2 samples at a time from now on: the same "
        "outputs up to rounding, more slowly. "
        "Give GPUTeacher(..., chunk_size=2) to begin so, or use a smaller batch."
    )


def test_a_teacher_that_does_not_fit_at_all() -> None:
    """The allocator's own error comes with a note on what would help."""
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as error:
        GPUTeacher(OutOfMemory(0), "cpu")(torch.zeros(4, 1))
    assert error.value.__notes__[0] == (
        "The teacher does not fit even with one sample at a time. Smaller inputs, dtype=torch.bfloat16 or a "
        "smaller student beside it would help."
    )


def test_a_teacher_that_changed_its_inputs() -> None:
    """A pass that changed its inputs cannot be repeated on them."""

    class Changing(OutOfMemory):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            x += 1
            return super().forward(x)

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as error:
        GPUTeacher(Changing(1), "cpu")(torch.zeros(4, 1))
    assert error.value.__notes__[0] == (
        "The teacher had already changed its inputs in place, so it cannot be run on them again. "
        "Change its forward to leave them as they are: x = x - mean instead of x -= mean."
    )


def test_a_teacher_without_a_batch_to_split() -> None:
    """Without a tensor there is no batch to take a part of."""
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as error:
        GPUTeacher(OutOfMemory(-1), "cpu")("abc")
    assert error.value.__notes__ == [
        "The teacher was given no tensor with a batch dimension, so its work cannot be split."
    ]


def test_a_teacher_that_cannot_be_split() -> None:
    """Outputs that belong to the batch as a whole cannot be put together from parts."""

    class Total(OutOfMemory):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).sum()

    with pytest.raises(RuntimeError, match="cannot run in parts") as error:
        GPUTeacher(Total(1), "cpu")(torch.arange(4.0)[:, None])
    assert text_of(error) == (
        "the teacher cannot run in parts of the batch, as a lack of memory or chunk_size= asks for: it "
        "returns a tensor of shape () for 1 samples. "
        "Give it a smaller batch, or a smaller type such as dtype=torch.bfloat16."
    )


@pytest.mark.parametrize(
    ("forward", "reason"),
    [
        (lambda x: x - x.mean(0), "gives a sample other outputs when the samples beside it change"),
        (lambda x: (x, x.tolist()), "returns things other than tensors, which differ from part to part"),
        (
            lambda x: nn.utils.rnn.pack_sequence([x]),
            "returns PackedSequence, which cannot be put together from parts",
        ),
    ],
)
def test_why_a_teacher_cannot_be_split(forward: Callable[[torch.Tensor], Any], reason: str) -> None:
    """The reason is told: samples that depend on one another, or outputs that are no rows of tensors."""

    class Teacher(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            return forward(x)

    with pytest.raises(RuntimeError, match="cannot run in parts") as error:
        GPUTeacher(Teacher(1, 1), "cpu")(torch.arange(4.0)[:, None])
    assert text_of(error) == (
        "the teacher cannot run in parts of the batch, as a lack of memory or chunk_size= asks for: it "
        f"{reason}. Give it a smaller batch, or a smaller type such as dtype=torch.bfloat16."
    )


# --- estimate_vram ---------------------------------------------------------------------------------------


def test_estimating_something_that_is_no_module() -> None:
    """A class or a function has no parameters to put on paper."""
    with pytest.raises(TypeError, match="Module") as error:
        estimate_vram(nn.Linear, torch.zeros(1))  # type: ignore[arg-type]  # what is tested
    assert text_of(error) == (
        "estimate_vram takes a torch.nn.Module, but was given the class Linear. The step is run with the "
        "module's parameters on paper: give the module itself, not its class, its name or a function."
    )


def test_estimating_the_training_of_nothing() -> None:
    """A model without parameters, or with frozen ones only, cannot be trained."""
    with pytest.raises(ValueError, match="train") as error:
        estimate_vram(nn.ReLU(), torch.zeros(1))
    assert text_of(error) == (
        "ReLU has no parameters, so there is nothing to train. Give training=False to estimate inference."
    )
    with pytest.raises(ValueError, match="Linear is frozen, so there is nothing to train"):
        estimate_vram(nn.Linear(1, 1).requires_grad_(requires_grad=False), torch.zeros(1))


@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
def test_estimating_a_model_that_cannot_be_put_on_paper() -> None:
    """A scripted module hides its parameters, and a lazy one has none yet."""
    with pytest.raises(TypeError, match="TorchScript") as scripted:
        estimate_vram(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), torch.zeros(1, 1))
    assert text_of(scripted) == (
        "the model is a TorchScript module, whose parameters cannot be put on paper. Give the "
        "Python module that it was made from."
    )
    with pytest.raises(ValueError, match="no shape") as error:
        estimate_vram(nn.LazyLinear(1), torch.zeros(1, 1))
    assert text_of(error) == (
        "'weight' of the model has no shape yet: it takes it from the first batch. Run one batch through "
        "it, then estimate."
    )


def test_estimating_tensors_that_paper_cannot_be() -> None:
    """Nested and sparse tensors, and those with operators of their own, are told what to do instead."""
    rows = torch.nested.nested_tensor([torch.zeros(2, 1), torch.zeros(3, 1)], layout=torch.jagged)
    with pytest.raises(ValueError, match="nested") as error:
        estimate_vram(nn.Linear(1, 1), rows)
    assert text_of(error) == (
        "the batch is a nested tensor, whose rows are of different lengths, and paper has one shape. "
        "Estimate with the padded tensor, torch.nested.to_padded_tensor(t, 0.0): it needs no less."
    )
    sparse = nn.Linear(2, 2)
    sparse.register_buffer("adjacent", torch.eye(2).to_sparse())
    with pytest.raises(ValueError, match="sparse") as error:
        estimate_vram(sparse, torch.zeros(4, 2))
    assert text_of(error) == (
        "'adjacent' of the model is a tensor of layout sparse_coo, of which only the non-zero numbers take "
        "memory, and operators on it tell no shapes. Estimate the part of the step that works on plain "
        "tensors, or give t.to_dense() where that is affordable."
    )
    with pytest.raises(ValueError, match="sparse=True") as error:
        estimate_vram(nn.Embedding(2, 2, sparse=True), torch.zeros(4, dtype=torch.int64))
    assert text_of(error) == (
        "'Embedding' of the model has sparse=True, and sparse gradients cannot be put on paper. Estimate "
        "with sparse=False: dense gradients and dense optimizer state need no less."
    )
    own = nn.Linear(2, 2)
    own.weight = nn.Parameter(TwoTensor(torch.zeros(2, 2), torch.zeros(2, 2)))
    with pytest.raises(ValueError, match="TwoTensor") as error:
        estimate_vram(own, torch.zeros(4, 2))
    assert text_of(error) == (
        "'weight' of the model is a TwoTensor, a kind of tensor with operators of its own, whose memory "
        "cannot be told from its shape. Estimate with plain tensors in its place."
    )


def test_estimating_modules_that_are_spread_over_processes() -> None:
    """Sharded modules are estimated before they are sharded."""
    advice = (
        "weights are spread over several processes, and an estimate knows one GPU. Estimate the module "
        "before it is sharded: one GPU will need no more than that."
    )
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (2,))
        with pytest.raises(ValueError, match="FSDP") as error:
            estimate_vram(cast(nn.Module, fully_shard(nn.Linear(2, 2), mesh=mesh)), torch.zeros(4, 2))
        assert text_of(error) == f"the model is wrapped by FSDP: {advice}"
        spread = nn.Linear(2, 2)
        spread.weight = nn.Parameter(distribute_tensor(torch.zeros(2, 2), mesh, [Replicate()]))
        with pytest.raises(ValueError, match="DTensor") as error:
            estimate_vram(spread, torch.zeros(4, 2))
        assert text_of(error) == f"'weight' of the model is a DTensor: {advice}"
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")
def test_estimating_what_no_gpu_runs() -> None:
    """Layers that PyTorch packed for the CPU are estimated as they were before."""
    packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(2, 2)), {nn.Linear})
    with pytest.raises(ValueError, match="quantised") as error:
        estimate_vram(packed, torch.zeros(4, 2), training=False)
    assert text_of(error) == (
        "'0' of the model is quantised for the CPU: its weights are packed, and no GPU runs it. Estimate the "
        "module as it was before."
    )


def test_estimating_a_loader() -> None:
    """What yields batches is none."""
    loader: DataLoader[Any] = DataLoader(TensorDataset(torch.zeros(4, 1)))
    with pytest.raises(TypeError, match="batch") as error:
        estimate_vram(nn.Linear(1, 1), loader)
    assert text_of(error) == (
        "estimate_vram takes one batch, but was given an object of type DataLoader, which yields them. Give "
        "one of its batches, such as next(iter(loader)): only shapes and types count."
    )


def test_estimating_with_a_loss_of_no_number() -> None:
    """A loss that returns parts, or a number for each sample, is told what a backward pass starts from."""
    model, batch = nn.Linear(2, 2), (torch.zeros(4, 2), torch.zeros(4, 2))
    losses = {
        "an object of type tuple": lambda output, target: ((output - target).sum(), {}),
        "a tensor of shape (4, 2)": lambda output, target: output - target,
    }
    for found, loss in losses.items():
        with pytest.raises(ValueError, match="could not run") as error:
            estimate_vram(model, batch, loss=loss)
        assert str(error.value.__cause__) == (
            f"loss= returned {found}, and a backward pass starts from a tensor of one number. Give a "
            "function that returns that alone: lambda output, target: loss(output, target).mean(), or [0], "
            "or ['loss']."
        )


def test_estimating_with_numbers_that_are_none() -> None:
    """Norms that nothing can be clipped at, and sizes of GPUs that are no bytes."""
    model, batch, half = nn.Linear(2, 2), torch.zeros(4, 2), cast("Any", 24.5)
    with pytest.raises(ValueError, match="clip") as error:
        estimate_vram(model, batch, clip_grad_norm=0.0)
    assert text_of(error) == (
        "clip_grad_norm=0.0 was given to estimate_vram, which is no norm that gradients can be clipped at. "
        "Give the number that the loop gives to clip_grad_norm_, or None for no clipping."
    )
    with pytest.raises(ValueError, match="batch_dim") as error:
        estimate_vram(model, batch, batch_dim=-1)
    assert text_of(error) == (
        "batch_dim=-1 was given to estimate_vram; the tensors of a batch differ in rank, so the dimension "
        "must be counted from the front: 0, 1, ..."
    )
    with pytest.raises(TypeError, match="gpu") as no_size:
        estimate_vram(model, batch, gpu=half)
    assert text_of(no_size) == (
        "gpu=24.5 is neither a GPU's name, nor a GPU, a device of this machine or a whole number of bytes. "
        'Give "RTX 4090", or 24 * 2**30 for 24 GiB.'
    )


def test_estimating_lbfgs_without_a_step() -> None:
    """An optimizer that runs the model itself needs the whole step."""
    model = nn.Linear(1, 1)
    for optimizer in (torch.optim.LBFGS, torch.optim.LBFGS(model.parameters())):
        with pytest.raises(ValueError, match="LBFGS") as error:
            estimate_vram(model, torch.zeros(4, 1), optimizer=optimizer)
        assert text_of(error) == (
            "optimizer= is LBFGS, which runs the model as often as its line search wants, by a closure. Give "
            "the whole step as step=, a function that calls optimizer.step(closure), and the instance."
        )


def test_using_a_tensor_of_an_estimate_afterwards() -> None:
    """What was kept outside of the model says where it comes from."""
    kept: list[torch.Tensor] = []

    class Keeps(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            kept.append(super().forward(x))
            return kept[-1]

    estimate_vram(Keeps(1, 1), torch.zeros(4, 1), n_steps=1)
    with pytest.raises(RuntimeError, match="estimate") as error:
        kept[0].sum()
    assert text_of(error) == (
        "A tensor of an estimate was used after estimate_vram had returned. It has no numbers: something "
        "outside of the model kept it, such as a functools.lru_cache or a list that the step appends to. "
        "Clear that after the estimate."
    )


def test_asking_an_estimate_whose_step_is_gone() -> None:
    """A step that was only passed in is gone with the call."""
    model = nn.Linear(1, 1)
    found = estimate_vram(model, torch.zeros(4, 1), step=lambda x: model(x).sum().backward(), n_steps=1)
    gc.collect()
    with pytest.raises(ValueError, match="gone") as error:
        found.max_batch_size("T4")
    assert text_of(error) == (
        "The step of this estimate is gone, and what was asked for needs it to be run on paper again. An "
        "estimate holds the function weakly: define it under a name, and keep that while you ask."
    )


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("loss", "a function called as loss(output, target), such as torch.nn.functional.cross_entropy"),
        ("optimizer", "an optimizer, or its class, such as torch.optim.AdamW"),
        ("teacher", "a module, or a GPUTeacher"),
        ("step", "a function that runs one step of the loop, called as step(batch)"),
    ],
)
def test_estimating_with_what_cannot_be_called(name: str, wanted: str) -> None:
    """Parts of a step that could only fail when it runs are refused before."""
    options: dict[str, Any] = {name: "AdamW"}
    with pytest.raises(TypeError, match=name) as error:
        estimate_vram(nn.Linear(1, 1), torch.zeros(4, 1), **options)
    assert text_of(error) == (
        f"{name}= of estimate_vram was given an object of type str, which cannot be called. Give {wanted}."
    )


@pytest.mark.parametrize("name", ["loss", "teacher"])
def test_estimating_with_the_class_of_a_module(name: str) -> None:
    """A loss or a teacher that was not made yet would be made by the call that is meant to run it."""
    options: dict[str, Any] = {name: nn.MSELoss}
    with pytest.raises(TypeError, match=name) as error:
        estimate_vram(nn.Linear(1, 1), torch.zeros(4, 1), **options)
    assert text_of(error) == (
        f"{name}= of estimate_vram was given the class MSELoss, and to call a class is to make a module. "
        "Give the module itself, such as MSELoss(...)."
    )


@pytest.mark.parametrize("limit_bytes", [0, -1, "8GB"])
def test_asking_under_a_limit_of_nothing(limit_bytes: Any) -> None:
    """A limit that is no number of bytes is refused before anything is traced again."""
    estimate = estimate_vram(nn.Linear(1, 1), torch.zeros(4, 1), gpu="T4", n_steps=1)
    for ask in (estimate.fits, estimate.max_batch_size):
        with pytest.raises(ValueError, match="limit_bytes") as error:
            ask(limit_bytes=limit_bytes)
        assert text_of(error) == (
            f"limit_bytes={limit_bytes!r} was given, which is no amount of memory. Give what PyTorch may "
            "reserve in bytes (8 * 2**30 for 8 GiB), or leave it out for all that the GPU has."
        )


def test_estimating_with_options_that_make_no_step() -> None:
    """Autocast to no half type, no steps at all, another model's optimizer, settings that are no text."""
    model, batch, anything = nn.Linear(1, 1), torch.zeros(4, 1), cast("Any", "bf16")
    with pytest.raises(ValueError, match="autocast") as error:
        estimate_vram(model, batch, autocast=anything)
    assert text_of(error) == (
        "autocast='bf16' was given to estimate_vram; torch.autocast(\"cuda\") casts to a half precision. "
        "Give torch.bfloat16 or torch.float16, or None for none."
    )
    assert not torch.is_autocast_enabled("cuda")
    with pytest.raises(ValueError, match="n_steps") as error:
        estimate_vram(model, batch, n_steps=0)
    assert text_of(error) == (
        "n_steps=0 was given to estimate_vram; at least 1 step has to run, and the peak is there from the "
        "second on. Leave it at 3."
    )
    with pytest.raises(ValueError, match="belongs") as error:
        estimate_vram(model, batch, optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters()))
    assert text_of(error) == (
        "none of the parameters of the SGD given as optimizer= belongs to this model, so no step of it would "
        "be estimated. Give the optimizer that was made from this model's parameters, or its class."
    )
    with pytest.raises(TypeError, match="allocator") as no_text:
        estimate_vram(model, batch, allocator=cast("Any", 3))
    assert text_of(no_text) == (
        "allocator=3 was given to estimate_vram, which takes text as in PYTORCH_CUDA_ALLOC_CONF, such as "
        '"expandable_segments:True", or None for PyTorch\'s own settings.'
    )
    with pytest.raises(ValueError, match="would not take"):
        estimate_vram(model, batch, allocator="expandable_segments:Maybe")


def test_estimating_on_a_batch_that_does_not_fit_the_model() -> None:
    """The model's own error is told, with the batch that caused it and how batches are passed."""
    with pytest.raises(ValueError, match="could not run") as error:
        estimate_vram(nn.Linear(8, 8), torch.zeros(4, 9))
    assert text_of(error) == (
        "estimate_vram could not run Linear on this batch: RuntimeError: a and b must have same reduction "
        "dim, but got [4, 9] X [8, 8].\n"
        "The batch holds (4, 9) float32. A tensor is passed as model(x), a mapping as model(**batch), a "
        "tuple as model(*batch); with loss= a pair is (inputs, target). If the same call works outside of "
        "estimate_vram, please report it."
    )


def test_estimating_a_model_whose_output_gives_no_loss() -> None:
    """Without loss= there must be something to run a backward pass from."""

    class Counts(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).argmax(1)

    with pytest.raises(ValueError, match="backward") as error:
        estimate_vram(Counts(2, 2), torch.zeros(4, 2))
    assert text_of(error) == (
        "estimate_vram could not run Counts on this batch: ValueError: the model's output has no "
        "floating-point tensor that depends on its parameters, so there is nothing to run a backward pass "
        "from. Give loss=, or training=False to estimate inference.\n"
        "The batch holds (4, 2) float32. A tensor is passed as model(x), a mapping as model(**batch), a "
        "tuple as model(*batch); with loss= a pair is (inputs, target). If the same call works outside of "
        "estimate_vram, please report it."
    )


def test_asking_an_estimate_whose_model_is_gone() -> None:
    """What needs another trace needs the model."""
    found = estimate_vram(nn.Linear(2, 2), torch.zeros(4, 2), n_steps=1)
    gc.collect()  # what PyTorch imports in a first step may leave a traceback behind
    with pytest.raises(ValueError, match="gone") as error:
        found.max_batch_size("T4")
    assert text_of(error) == (
        "The model of this estimate is gone, and what was asked for needs it to be run on paper again. "
        "An estimate holds its model weakly: keep the model while you ask, or estimate anew."
    )


def test_estimating_for_a_gpu_that_nobody_knows() -> None:
    """An unknown GPU is answered with the known ones and the way to describe any other."""
    with pytest.raises(ValueError, match="knows") as error:
        resolve_gpu("RTX 9090")
    assert text_of(error) == (
        f"gpu='RTX 9090' is not a GPU that torchfast knows. Known are {', '.join(GPU_NAMES)}. Describe any "
        "other by its numbers: GPU(name, total_bytes=..., capability=..., n_multiprocessors=...)."
    )


def test_estimating_for_a_gpu_of_a_few_bytes() -> None:
    """A number of gigabytes given as bytes is caught."""
    with pytest.raises(ValueError, match="of memory") as error:
        resolve_gpu(24)
    assert text_of(error) == (
        "gpu=24 was given, which is 24 B of memory. "
        "Give the GPU's memory in bytes (24 * 2**30 for 24 GiB), its name, or a GPU."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_estimating_for_this_machines_gpu_where_there_is_none() -> None:
    """Asking for the local GPU on a machine without one says what to name instead."""
    with pytest.raises(ValueError, match="no CUDA GPU") as error:
        resolve_gpu("cuda:0")
    assert text_of(error) == (
        "gpu='cuda:0' was asked for, but this machine has no CUDA GPU. "
        "Name the GPU that the training will run on, for example gpu='RTX 4090'."
    )


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_calibrating_without_a_gpu() -> None:
    """The command says where to run it."""
    with pytest.raises(SystemExit) as error:
        calibrate.main()
    assert text_of(error) == (
        "torchfast-calibrate measures the GPU of the machine it runs on, but PyTorch finds no CUDA GPU "
        "here. Run it on the machine that will train; estimates made there use the result by themselves."
    )


def test_allocator_settings_that_do_not_read() -> None:
    """A setting that PyTorch would not read either is refused."""
    wrong = ("expandable_segments", "max_split_size_mb:many", "roundup_power2_divisions:[a:1]")
    refused = ("expandable:True", "backend:cudaMallocAsync", "max_split_size_mb:20")
    for text in (*wrong, *refused, "garbage_collection_threshold:1.5", "roundup_power2_divisions:3"):
        with pytest.raises(ValueError, match="allocator") as error:
            AllocatorSettings.parse(text)
        assert text_of(error) == (
            f"The allocator's settings were given as {text!r}, which PyTorch's own allocator would not take. "
            'Write them as in PYTORCH_CUDA_ALLOC_CONF: "expandable_segments:True,max_split_size_mb:128".'
        )


def test_the_largest_batch_of_a_step_without_a_batch() -> None:
    """Without a dimension that counts samples there is no other batch to try."""
    found = estimate_vram(nn.Linear(1, 1), torch.zeros(4, 1), n_steps=1)
    nameless = dataclasses.replace(found, subject=dataclasses.replace(found.subject, batch_size=None))
    with pytest.raises(ValueError, match="dimension") as error:
        nameless.max_batch_size("T4")
    assert text_of(error) == (
        "max_batch_size() was asked for, but this estimate does not know which dimension of the batch "
        "counts samples, so no other batch size can be traced. Give a batch whose tensors share their "
        "first dimension."
    )


def test_asking_a_pickled_estimate_for_another_trace() -> None:
    """A copy has no way back to the model."""
    model = nn.Linear(1, 1)
    found = estimate_vram(model, torch.zeros(4, 1), n_steps=1, gpu="H200")
    with pytest.raises(ValueError, match="pickled") as error:
        pickle.loads(pickle.dumps(found)).fits("T4")  # noqa: S301  # written in the same line
    assert text_of(error) == (
        "This estimate was pickled or copied, and what was asked for needs the step to be traced again, "
        "with the model. Ask the estimate that estimate_vram returned, in the process that has the model."
    )


def test_plotting_an_estimate_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    """The missing package is named, with the way to do without it."""
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    found = estimate_vram(nn.Linear(1, 1), torch.zeros(4, 1), n_steps=1)
    with pytest.raises(ImportError, match="matplotlib") as error:
        found.plot()
    assert text_of(error) == (
        "VRAMEstimate.plot() was called, but matplotlib is not installed, and it draws the figure. "
        "Install it (pip install matplotlib), or print the estimate instead."
    )


def test_an_estimate_within_an_estimate() -> None:
    """A step that is itself on paper is told where the other estimate belongs."""
    model, batch = torch.nn.Linear(4, 4), torch.randn(2, 4)
    with pytest.raises(ValueError, match="could not run the given step") as error:
        estimate_vram(model, batch, step=lambda images: estimate_vram(model, images))
    assert str(error.value.__cause__) == (
        "estimate_vram was called within a step that is being estimated, and PyTorch can only be put on "
        "paper once at a time. Call it outside of step=."
    )


# --- VRAMMonitor -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("interval_s", [0, float("nan"), float("inf"), "0.1"])
def test_monitor_with_an_interval_that_is_none(interval_s: Any) -> None:
    """A time between samples that is no positive number is answered with what to give."""
    with pytest.raises(ValueError, match="interval_s") as error:
        VRAMMonitor("cpu", interval_s=interval_s)
    assert text_of(error) == (
        f"interval_s={interval_s!r} is not a time between two samples. "
        "Give seconds above zero, such as 0.1, or None to sample only when you ask."
    )


def test_monitor_without_room_for_a_history() -> None:
    """A history of one span could not be merged, and one of 2.5 would have no end."""
    for n_spans in (1, 2.5, float("nan")):
        with pytest.raises(ValueError, match="max_history") as error:
            VRAMMonitor("cpu", max_history=n_spans)  # type: ignore[arg-type]  # that is the point
        assert text_of(error) == (
            f"max_history={n_spans} is no length of a history. Give a whole number of spans, 2 or more."
        )


def test_monitor_entered_twice() -> None:
    """A monitor that runs says that it does, and what to use instead."""
    vram = VRAMMonitor("cpu", interval_s=None)
    with vram, pytest.raises(RuntimeError, match="already") as error:
        vram.__enter__()
    assert text_of(error) == (
        "this VRAMMonitor of cpu is running already, and has one run at a time. "
        "Use phase() for a part of the run, or a second VRAMMonitor: their peaks stay exact."
    )


def test_monitor_phase_without_a_name() -> None:
    """Phases are listed by name."""
    with VRAMMonitor("cpu", interval_s=None) as vram, pytest.raises(TypeError) as error:
        vram.phase(cast(Any, None))
    assert text_of(error) == (
        "phase(None) was asked of a VRAMMonitor: the name under which a phase is listed must be a string, "
        'such as phase("forward").'
    )


def test_phase_of_a_monitor_that_is_not_running() -> None:
    """A phase outside of the monitor's block would measure nothing."""
    with pytest.raises(RuntimeError, match="not running") as error:
        VRAMMonitor("cpu").phase("forward")
    assert text_of(error) == (
        "phase('forward') was asked of a VRAMMonitor that is not running: it has nothing to measure. "
        "Open it inside `with monitor:`."
    )


def test_monitor_that_could_not_read_everything() -> None:
    """Errors while sampling come out at the end, as one warning with the last of them."""
    gpu = FakeGPU()
    gpu.driver_error = OSError("driver gone")
    vram = gpu.monitor().__enter__()
    with pytest.warns(RuntimeWarning, match="could not") as warned:
        vram.__exit__(None, None, None)
    assert str(warned[0].message) == (
        "VRAMMonitor of cuda:0 could not read everything: 2 error(s) while sampling, the last one "
        "'driver: OSError: driver gone'. Its samples lack what those sources would have told; peaks are not "
        "affected. All kept errors are in .errors."
    )


def test_ranks_without_a_cpu_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """Peaks are not gathered over NCCL: it would take the memory that is being measured."""
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setattr("torch.distributed.get_backend_config", lambda _: "cuda:nccl")
    with pytest.raises(ValueError, match="across_ranks") as error:
        VRAMMonitor("cpu").across_ranks()
    assert text_of(error) == (
        "across_ranks was asked to gather through a group whose backends are 'cuda:nccl', none of them for "
        "the CPU: gathering on the GPU would take the memory that is being measured. "
        'Give group=torch.distributed.new_group(backend="gloo").'
    )


# --- oom_guard -------------------------------------------------------------------------------------------


def message_for(text: str, *, kind: type[Exception] = torch.OutOfMemoryError, size: int | None = 64) -> str:
    """Return what a guard makes of an error with this text."""
    with oom_guard(reraise=False, batch_size=size) as guard:
        raise kind(text)
    assert guard.report is not None
    return guard.report.message


ALLOCATOR = (
    "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 1 has a total capacity of 79.33 GiB of "
    "which 1.20 GiB is "
    "free. Process 7 has 10.50 GiB memory in use. Including non-PyTorch memory, this process has "
    "67.60 GiB memory "
    "in use. Of the allocated memory 60.00 GiB is allocated by PyTorch, with 5.00 GiB allocated in "
    "private pools (e.g., CUDA Graphs), and 6.50 GiB is reserved by PyTorch but unallocated."
)


def test_out_of_gpu_memory() -> None:
    """First the batch size, then who else holds the memory and how to get at it."""
    assert message_for(ALLOCATOR) == (
        "Out of memory on cuda:1. Try batch_size=32 instead of 64: half of 64, since what a sample "
        "needs was not measured.\n"
        "2.00 GiB were asked for, 1.20 GiB of 79.3 GiB were free; PyTorch holds 66.5 GiB in this process.\n"
        "Other processes hold 10.5 GiB of the 79.3 GiB: nvidia-smi lists them, and ending those that "
        "are not needed helps at once.\n"
        "6.50 GiB are held in pieces that do not fit: start with "
        "PYTORCH_ALLOC_CONF=expandable_segments:True.\n"
        "CUDA graphs keep 5.00 GiB to themselves: capture fewer shapes."
    )


def test_out_of_gpu_memory_and_nothing_else_known() -> None:
    """Where nothing stands out, the message names what lowers the need of any step."""
    assert message_for("CUDA out of memory. Tried to allocate 2.00 GiB.", size=None) == (
        "Out of memory on the device. Try a smaller batch.\n"
        "2.00 GiB were asked for.\n"
        "Without a smaller batch: bfloat16 autocast or activation checkpointing need less for a step."
    )


def test_out_of_memory_with_a_guessed_batch_size() -> None:
    """A guess is called one, with how to do without."""
    images = torch.zeros(48, 3)
    with oom_guard(reraise=False) as guard:
        fail_with(images)
    assert guard.report is not None
    assert guard.report.message.splitlines()[0] == (
        "Out of memory on the device. Try batch_size=24 instead of 48: half of 48, since what a "
        "sample needs was not "
        "measured. (That it was 48 is a guess: the leading dimension most common among the tensors "
        "of the code that failed. Give batch_size=, or loop over guard.steps(loader).)"
    )


def fail_with(batch: torch.Tensor) -> None:
    """Fail with a batch in a variable."""
    raise torch.OutOfMemoryError("CUDA out of memory." if len(batch) else "")


@pytest.mark.parametrize(
    ("kind", "text", "message"),
    [
        (
            RuntimeError,
            "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
            (
                "Out of memory on the device, outside PyTorch's allocator. Try batch_size=32 instead "
                "of 64: half of 64, since what a sample needs was not measured.\n"
                "Leave room for libraries: torch.cuda.set_per_process_memory_fraction(0.9)."
            ),
        ),
        (
            MemoryError,
            "Unable to allocate 7.28 TiB for an array",
            (
                "Out of host memory. Try batch_size=32 instead of 64: half of 64, since what a "
                "sample needs was not measured.\n"
                "7.28 TiB were asked for.\n"
                "A DataLoader's workers hold batches too: fewer num_workers or a lower prefetch_factor help."
            ),
        ),
        (
            RuntimeError,
            "unable to allocate shared memory(shm) for file </torch_1>",
            (
                "The DataLoader's workers ran out of shared memory (/dev/shm). Give the container "
                "more (docker run --shm-size=8g, or --ipc=host), or lower num_workers or prefetch_factor."
            ),
        ),
        (
            RuntimeError,
            "NCCL error: unhandled cuda error: Cuda failure 2 'out of memory'",
            (
                "NCCL ran out of memory on the device. Its process group cannot be used any more: "
                "restart the job and leave NCCL room with torch.cuda.set_per_process_memory_fraction(0.95)."
            ),
        ),
        (
            torch.OutOfMemoryError,
            "CUDA out of memory. This allocation exceeds the expandable-segment reserve of 256.00 GiB",
            (
                "Out of virtual addresses for expandable segments on the device. A smaller batch "
                "does not help: try PYTORCH_ALLOC_CONF=expandable_segments:False."
            ),
        ),
        (
            torch.OutOfMemoryError,
            "CUDA out of memory. Tried to allocate more than 1EB memory.",
            (
                "A tensor larger than any machine was asked for. That is a mistake in a shape or an "
                "index, not a lack of memory: see the line that failed."
            ),
        ),
        (
            RuntimeError,
            "Invalid buffer size: 20.00 GB",
            (
                "One tensor is larger than the device can hold in one piece. Try batch_size=32 "
                "instead of 64: half of 64, since what a sample needs was not measured.\n"
                "20.0 GiB were asked for."
            ),
        ),
    ],
)
@pytest.mark.skipif(torch.accelerator.is_available(), reason="speaks of a machine without an accelerator")
def test_other_memory_that_ran_out(kind: type[Exception], text: str, message: str) -> None:
    """Each kind of memory has its own first remedy."""
    assert message_for(text, kind=kind) == message


def test_oom_guard_with_an_impossible_batch_size() -> None:
    """A batch of no samples is refused."""
    with pytest.raises(ValueError, match="batch_size") as error:
        oom_guard(batch_size=0)
    assert text_of(error) == (
        "batch_size=0 was given to oom_guard; it must be the number of samples in a batch, at least "
        "1. Leave it out if it is not known."
    )


def test_oom_guard_with_a_negative_batch_dim() -> None:
    """Dimensions are counted from the front."""
    with pytest.raises(ValueError, match="batch_dim") as error:
        oom_guard(batch_dim=-1)
    assert text_of(error) == (
        "batch_dim=-1 was given to oom_guard; the tensors of a batch differ in rank, so the "
        "dimension must be counted from the front: 0, 1, ..."
    )


def test_oom_guard_with_something_else_as_monitor() -> None:
    """What cannot tell phases and status is no monitor."""
    with pytest.raises(TypeError, match="monitor") as error:
        oom_guard(monitor=cast(Any, 3))
    assert text_of(error) == (
        "monitor must have phase(name) and status(), as a VRAMMonitor has; int has not. Give a "
        "VRAMMonitor, or leave it out."
    )


def test_oom_guard_with_a_device_that_does_not_exist() -> None:
    """A wrong device is told of at once, and not in place of the error that is to be explained."""
    with pytest.raises(ValueError, match="device") as error:
        oom_guard(device="disk")
    assert text_of(error) == (
        'device=\'disk\' is not a device that PyTorch knows. Give "cpu", "cuda", "cuda:1", a torch.device, '
        "or None for the current accelerator."
    )


@pytest.mark.parametrize(("thing", "name"), [(nn.Linear, "the class Linear"), (3, "3")])
def test_oom_guard_on_what_is_no_function(thing: Any, name: str) -> None:
    """A class would be replaced by a function, and a value cannot be called."""
    with pytest.raises(TypeError, match="functions") as error:
        oom_guard()(thing)
    assert text_of(error) == (
        f"oom_guard was put on {name}, and guards functions: put it on the function or the method that runs "
        "out of memory, as @oom_guard(), or use `with oom_guard():` around the code."
    )


def test_oom_guard_on_a_generator() -> None:
    """A generator function cannot be guarded from outside."""

    def batches() -> Iterator[int]:
        yield 1

    with pytest.raises(TypeError, match="generator") as error:
        oom_guard()(batches)
    assert text_of(error) == (
        "oom_guard was put on batches, which is a generator: its body runs in pieces, between which "
        "other code runs. Use `with oom_guard():` inside it."
    )

    class Batches:
        def __call__(self) -> Iterator[int]:
            yield 1

    with pytest.raises(TypeError, match="put on Batches, which is a generator"):
        oom_guard()(Batches())
    with pytest.raises(TypeError, match="put on partial, which is a generator"):
        oom_guard()(functools.partial(batches))


def reason_for_no_further_try(model: nn.Module, n_samples: int = 8, **options: Any) -> str:
    """Return the last line of the error of a step that cannot be saved."""
    retry = oom_guard().retry(model=model, **options)
    batch = torch.zeros(n_samples, 4)
    with pytest.raises(OutOfMemoryError) as error, inject_oom(above=0, times=None):
        retry(lambda attempt: [part + 1 for part, _ in attempt])(batch)
    return text_of(error).splitlines()[-1]


def test_reasons_for_no_further_try() -> None:
    """A step that is given up says why there was no further try."""
    assert reason_for_no_further_try(nn.Linear(1, 1), 1) == "Even one sample at a time does not fit."
    assert reason_for_no_further_try(nn.Linear(1, 1), split="never") == (
        'Working in parts was switched off (split="never").'
    )
    assert reason_for_no_further_try(nn.BatchNorm1d(4)) == (
        "The batch was not worked on in parts: BatchNorm1d sees the whole batch in training, so "
        "parts would give "
        'another gradient. guard.retry(split="always") allows that; eval() or group norm avoids it.'
    )


def test_failure_in_an_optimizer_without_a_copy() -> None:
    """A step of the optimizer that failed half-way says what would have saved it."""
    model = nn.Linear(4, 4)
    optimizer = torch.optim.SGD(model.parameters(), momentum=0.9)
    retry = oom_guard().retry(model=model, optimizer=optimizer)

    @retry
    def step(attempt: Any) -> None:
        for part, _ in attempt:
            model(part).sum().backward()
        optimizer.step()

    with pytest.raises(OutOfMemoryError) as error, inject_oom(3, phase="optimizer"):
        step(torch.zeros(8, 4))
    assert text_of(error) == (
        "Out of memory on cuda:0 in the optimizer's step. What the step needs there does not depend "
        "on the batch.\n"
        "2.00 MiB were asked for, 0 B of 15.8 GiB were free; PyTorch holds 15.1 GiB in this process.\n"
        "An optimizer with fused=True or foreach=False needs less at its peak than the default.\n"
        "It was not tried again: the optimizer had begun to change parameters. "
        "guard.retry(copy=True) keeps a copy of parameters and optimizer state, with which that can "
        "be undone."
    )


def test_warning_of_layers_that_parts_change() -> None:
    """Working in parts names the layers for which that makes a difference, once."""
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.1))
    retry = oom_guard().retry(model=model, split="always")
    with pytest.warns(UserWarning, match="works in parts") as warned, inject_oom(above=4, times=None):
        retry(lambda attempt: [part + 1 for part, _ in attempt])(torch.zeros(8, 4))
    assert str(warned[0].message) == (
        "oom_guard works in parts of at most 4 samples, and the gradient is not exactly that of the "
        "whole batch: "
        "1 (BatchNorm1d) sees 4 samples at a time instead of all; 2 (Dropout) draws other random "
        "numbers than for the whole batch."
    )


def test_warning_of_a_device_that_is_nearly_full() -> None:
    """A device on which the allocator flushes its cache step after step is warned of."""
    thrash = Thrash()
    with pytest.warns(UserWarning, match="so full") as warned:
        assert [thrash.has_risen(n, torch.device("cuda", 1)) for n in (0, 1, 2)][-1]
    assert str(warned[0].message) == (
        "cuda:1 is so full that PyTorch gave its whole cache back and asked for memory anew in 2 "
        "steps running, which is slow. A batch smaller by a tenth would run faster."
    )


def test_attempt_that_was_not_entered() -> None:
    """Forgetting the context around a step is told."""
    with pytest.raises(RuntimeError, match="not entered") as error:
        list(oom_guard().retry(model=nn.Linear(1, 1)).attempts(torch.zeros(2)))
    assert text_of(error) == (
        "an attempt of retry.attempts(...) was not entered: write `with attempt:` around the step, "
        "or the same step would be offered for ever."
    )


def test_chunks_of_what_cannot_be_called() -> None:
    """What is no function is refused at once, not when the first batch comes."""
    with pytest.raises(TypeError, match="chunked") as error:
        oom_guard().chunked(cast("Any", 5))
    assert text_of(error) == (
        "guard.chunked takes a function or a module, but was given an object of type int. Give what is to be "
        "called with the batch."
    )


@pytest.mark.parametrize("grow_after", [0, "3"])
def test_retry_that_grows_after_no_steps(grow_after: Any) -> None:
    """A number of quiet steps below one is refused, for retries and for chunks."""
    model, guard = nn.Linear(1, 1), oom_guard()
    for make in (functools.partial(guard.retry, model=model), functools.partial(guard.chunked, model)):
        with pytest.raises(ValueError, match="grow_after") as error:
            make(grow_after=grow_after)
        assert text_of(error) == (
            f"grow_after={grow_after!r} was given to oom_guard; it is how many steps without a failure go by "
            "before a larger size is tried, at least 1."
        )


def test_retry_with_an_unknown_split() -> None:
    """What may be worked on in parts is one of three words."""
    with pytest.raises(ValueError, match="split") as error:
        oom_guard().retry(model=nn.Linear(1, 1), split=cast(Any, "auto"))
    assert text_of(error) == (
        "split='auto' was given to oom_guard; it says when a batch may be worked on in parts: \"safe\", "
        '"always" or "never".'
    )


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (
            {"model": 5},
            (
                "model= of guard.retry takes a torch.nn.Module, or several, but was given an object of "
                "type int. What a retry does not know, it cannot put back."
            ),
        ),
        (
            {"model": nn.LazyLinear(2)},
            (
                "guard.retry was given a LazyLinear whose 'weight' has no shape yet, so there is nothing "
                "that could be put back. Run a batch through it first."
            ),
        ),
        (
            {"model": []},
            (
                "guard.retry was given no module: model= is empty, so no gradient and no buffer would be "
                "put back before a step is tried again. Give what the step trains."
            ),
        ),
        (
            {"optimizer": 5},
            (
                "optimizer= of guard.retry takes a torch.optim.Optimizer, several, or None, but was given"
                " an object of type int. What a retry does not know, it cannot put back."
            ),
        ),
        (
            {"generators": [5]},
            (
                "generators= of guard.retry takes torch.Generators, but was given an object of type int. "
                "What a retry does not know, it cannot put back."
            ),
        ),
        (
            {"scaler": 5},
            (
                "scaler= of guard.retry takes a torch.amp.GradScaler, but was given an object of type "
                "int, which has no state to put back. Leave it out if there is none."
            ),
        ),
        (
            {"tokens": 5},
            (
                "tokens= of guard.retry takes a function, but was given an object of type int. Give one "
                "from a part of the batch to its number of valid tokens, or leave it out."
            ),
        ),
        (
            {"timeout_s": -1},
            (
                "timeout_s=-1 was given to guard.retry; it is how long a rank waits for the others, a "
                "positive number of seconds."
            ),
        ),
    ],
)
def test_retry_with_options_that_make_no_sense(options: dict[str, Any], text: str) -> None:
    """What would fail, or protect nothing, in a later step is refused when the retry is made."""
    with pytest.raises((TypeError, ValueError), match=r"guard\.retry") as error:
        oom_guard().retry(**{"model": nn.Linear(1, 1), **options})
    assert text_of(error) == text


def test_injection_into_an_unknown_phase() -> None:
    """A step has three phases."""
    with pytest.raises(ValueError, match="phase") as error:
        inject_oom(phase=cast(Any, "loss"))
    assert text_of(error) == (
        'phase=\'loss\' was given to inject_oom; a step has the phases "forward", "backward" and '
        '"optimizer". Leave it out to count operators of all three.'
    )


def test_injection_at_a_negative_number() -> None:
    """Operators and failures are counted from 0."""
    with pytest.raises(ValueError, match="at=-1") as error:
        inject_oom(-1)
    assert text_of(error) == (
        "at=-1 was given to inject_oom; it counts from 0. Leave it out for one failure at the first operator."
    )


def test_chunks_whose_rows_are_no_samples() -> None:
    """Outputs that cannot be put together are refused with their shape."""
    predict = oom_guard().chunked(torch.sum)
    with pytest.raises(ValueError, match="one row") as error, inject_oom(above=4, times=None):
        predict(torch.ones(8))
    assert text_of(error) == (
        "a chunked function must return tensors with one row for each sample, so that the rows of several "
        "chunks can be put together, or what is the same for every chunk; it returned a tensor of shape () "
        "for 2 samples. Return values for each sample, and reduce them outside."
    )


class FSDPModule(nn.Linear):
    """Has the name by which a sharded module is known."""


def test_retry_of_a_sharded_model() -> None:
    """Where the forward pass is made of collectives, a retry is refused."""
    with pytest.raises(ValueError, match="FSDPModule") as error:
        oom_guard().retry(model=FSDPModule(1, 1))
    assert text_of(error) == (
        "guard.retry cannot be used with FSDPModule: its forward pass is made of collectives, and a "
        "rank that ran "
        "out of memory would leave the others waiting for ever. Use oom_guard without retry: it "
        "explains the error and names a batch size to restart with."
    )


def ddp(model: nn.Module) -> nn.parallel.DistributedDataParallel:
    """Return the model as it is trained on several ranks."""
    return nn.parallel.DistributedDataParallel(model)


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize(
    ("make", "text"),
    [
        (
            lambda: nn.Sequential(ddp(nn.Linear(2, 2)), nn.SyncBatchNorm(2)),
            (
                "guard.retry cannot be used with SyncBatchNorm: its forward pass waits for all ranks, and "
                "one that ran out of memory would leave the others waiting for ever. Use BatchNorm or "
                "GroupNorm, or oom_guard without retry."
            ),
        ),
        (
            lambda: [ddp(nn.Linear(2, 2)), ddp(nn.Linear(2, 2))],
            (
                "guard.retry was given 2 DistributedDataParallel models; it reduces the gradients of one. "
                "Wrap what is trained together in one module."
            ),
        ),
        (
            lambda: ddp(nn.Embedding(3, 2, sparse=True)),
            (
                "guard.retry cannot average the sparse gradients of Embedding(sparse=True) over the ranks. "
                "Use sparse=False, or oom_guard without retry."
            ),
        ),
    ],
)
def test_retry_over_ranks_that_cannot_be(make: Callable[[], Any], text: str) -> None:
    """What ranks cannot do together is refused when the retry is made."""
    with pytest.raises(ValueError, match="retry") as error:
        oom_guard().retry(model=make())
    assert text_of(error) == text


@pytest.mark.usefixtures("one_process")
def test_retry_with_a_communication_hook() -> None:
    """A hook that averages gradients in its own way is not called, which is said."""
    model = ddp(nn.Linear(2, 2))
    model._comm_hooks.append((len, None))  # what registering one leaves
    with pytest.warns(UserWarning, match="hook") as warned:
        oom_guard().retry(model=model)
    assert [str(warning.message) for warning in warned] == [
        (
            "guard.retry averages gradients by itself, as they are: the communication hook that was "
            "registered with DistributedDataParallel is not called."
        )
    ]


@pytest.mark.usefixtures("one_process")
def test_attempt_that_averaged_no_gradients() -> None:
    """On several ranks, an attempt whose loop was left early has averaged nothing."""
    step = oom_guard().retry(model=ddp(nn.Linear(2, 2)))(lambda attempt: next(iter(attempt)))
    with pytest.raises(RuntimeError, match="averaged") as error:
        step(torch.zeros(2, 2))
    assert text_of(error) == (
        "an attempt ended before the loop over its parts did, so the gradients were never averaged over the "
        "ranks. Loop over the attempt to its end before optimizer.step()."
    )


@pytest.mark.usefixtures("one_process")
def test_ranks_that_do_not_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank that does not vote in time is missed by the others, who say what that may mean."""

    def time_out(*_: Any, **__: Any) -> None:
        raise RuntimeError("Timed out waiting 5000ms for recv operation to complete")

    step = oom_guard().retry(model=ddp(nn.Linear(2, 2)), timeout_s=5)(list)
    monkeypatch.setattr(dist.ProcessGroupGloo, "allreduce", time_out)
    with pytest.raises(RuntimeError, match="could not agree") as error:
        step(torch.zeros(2, 2))
    assert text_of(error) == (
        "the ranks could not agree on a step: one has ended, or did not take part in this attempt within 5 "
        "s. Every rank must go through retry.attempts(...) the same number of times; a longer timeout_s= "
        "helps where ranks are merely slow."
    )


@pytest.mark.usefixtures("one_process")
def test_retry_within_join() -> None:
    """Join asks the other ranks in the forward pass, where none must be waited for."""
    model = ddp(nn.Linear(2, 2))
    step = oom_guard().retry(model=model)(list)
    with pytest.raises(RuntimeError, match="Join") as error, model.join():
        step(torch.zeros(2, 2))
    assert text_of(error) == (
        "guard.retry cannot be used within Join: its forward pass asks the other ranks whether they go on, "
        "and one that ran out of memory would leave them waiting. Give all ranks as many batches."
    )


@pytest.mark.parametrize(
    ("outcome", "text"),
    [
        (
            Outcome.ERROR,
            (
                "another rank failed in this step with an error that is not about memory: see its output. "
                "This rank stops here, as it would wait for the other for ever."
            ),
        ),
        (
            Outcome.GIVE_UP,
            "another rank ran out of memory in this step and it could not be tried again: see its output.",
        ),
    ],
)
def test_what_became_of_another_rank(monkeypatch: pytest.MonkeyPatch, outcome: Outcome, text: str) -> None:
    """A rank that got through is told why it cannot go on."""
    retry = oom_guard().retry(model=nn.Linear(2, 2))
    monkeypatch.setattr(retry._ranks, "agree", lambda *_, **__: (outcome, False))
    with pytest.raises(RuntimeError, match="another rank") as error:
        retry(list)(torch.zeros(2, 2))
    assert text_of(error) == text


# --- integrations ----------------------------------------------------------------------------------------


MISSING = {
    ("gradio", "gradio"): "builds on Gradio, which is not installed. Install it: pip install gradio",
    ("notebook", "IPython.display"): (
        "shows a monitor through IPython, which is not installed. Install it: pip install ipython"
    ),
    ("prometheus", "prometheus_client.core"): (
        "exports through prometheus_client, which is not installed. Install it: pip install prometheus-client"
    ),
    ("tensorboard", "torch.utils.tensorboard"): (
        "writes through torch.utils.tensorboard, which needs a package that is not installed. "
        "Install it: pip install tensorboard"
    ),
}


@pytest.mark.parametrize(("integration", "package"), MISSING)
def test_missing_extras(integration: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A framework that is not installed is named with the package to install, which is never torchfast."""
    name = f"torchfast.integrations.{integration}"
    monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match="not installed") as error:
        importlib.import_module(name)
    assert text_of(error) == f"{name} {MISSING[integration, package]}"


def test_a_live_view_that_broke() -> None:
    """A display that fails says so once and leaves the training alone."""

    def fail() -> None:
        raise OSError("no terminal")

    with pytest.warns(RuntimeWarning, match="stopped") as warned, repeating(fail, 60.0):
        pass
    assert [str(warning.message) for warning in warned] == [
        "the live view stopped: OSError: no terminal. Nothing else is affected."
    ]
