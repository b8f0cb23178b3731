"""`GPUTeacher`: frozen, outside the student, exact, and in parts where a batch does not fit."""

import copy
import io
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils._python_dispatch import TorchDispatchMode

from torchfast import GPUTeacher
from torchfast._tree import map_tensors


class Net(nn.Module):
    """A small net with all that behaves differently in training: batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.head = nn.Linear(8, 4)

    def forward(self, images: torch.Tensor, *, scale: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
        """Map images (N, 3, H, W) to logits (N, 4) and features."""
        features = torch.relu(self.norm(self.conv(images)))
        pooled = nn.functional.dropout(features.mean(dim=(2, 3)), 0.5, self.training)
        logits = self.head(pooled)
        return {"logits": logits if scale is None else logits * scale, "features": features}


def test_a_student_that_is_compiled_asks_its_teacher_as_ever() -> None:
    """Its graph breaks at the teacher, which runs as it is: in parts where there is no room for the batch."""
    student, sizes = nn.Linear(8, 3), list[int]()

    class Large(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            sizes.append(len(x))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().forward(x)

    teacher = GPUTeacher(Large(8, 3), "cpu")
    step = torch.compile(lambda x: (student(x) - teacher(x)).square().mean(), backend="eager")
    batch = torch.ones(4, 8)
    with pytest.warns(UserWarning, match="samples at a time"):
        step(batch).backward()
    assert (max(sizes), teacher.chunk_size) == (4, 2)
    assert student.weight.grad is not None
    assert torch.equal(step(batch), (student(batch) - teacher(batch)).square().mean())


class Sharing(nn.Module):
    """Returns memory of its own and of its batch, in ways that hide it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor, sequences: PackedSequence) -> Any:
        """Return what a caller must not be able to write through."""
        return self.weight.detach(), x.detach(), x.data[0], sequences


def test_outputs_are_nobody_elses_memory() -> None:
    """Also where the module detached them, and in sequences."""
    teacher, x = GPUTeacher(Sharing(), "cpu"), torch.ones(2, 4)
    sequences = pack_sequence([torch.ones(3), torch.ones(2)])
    *outputs, found = teacher(x, sequences)
    for output in (*outputs, found.data):
        output.add_(100)
    assert set(torch.cat([x.flatten(), sequences.data, teacher(x, sequences)[0]]).tolist()) == {1.0}


def test_sequences_are_cast_as_tensors_are() -> None:
    """To the teacher's type, on their way to it."""
    sequences = pack_sequence([torch.ones(3, 5), torch.ones(2, 5)])
    found, _ = GPUTeacher(nn.LSTM(5, 6), "cpu", dtype=torch.bfloat16)(sequences)
    assert found.data.dtype is torch.bfloat16


def test_features_belong_to_the_call_that_caught_them() -> None:
    """Two threads may ask the same teacher; and its module may be run by itself."""
    layer = nn.Linear(4, 4, bias=False)
    teacher = GPUTeacher(nn.Sequential(layer, nn.Tanh()), "cpu", features=["0", "0"], outputs=False)

    def is_right(number: int) -> bool:
        x = torch.full((64, 4), float(number))
        expected = nn.functional.linear(x, layer.weight)
        return all(torch.equal(teacher(x)[1]["0"], expected) for _ in range(30))

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(is_right, range(8)))
    assert teacher.module(torch.ones(1, 4)).shape == (1, 4)


class Student(nn.Module):
    """A student that has its teacher as an attribute."""

    def __init__(self, teacher: GPUTeacher) -> None:
        super().__init__()
        self.net = Net()
        self.teacher = teacher

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return how far the student is from the teacher."""
        logits: torch.Tensor = self.net(images)["logits"]
        return nn.functional.mse_loss(logits, self.teacher(images)["logits"].float())


def images(n_samples: int = 4) -> torch.Tensor:
    """Return random images."""
    return torch.randn(n_samples, 3, 8, 8)


def trained_net() -> Net:
    """Return a net whose batch norm has seen something."""
    net = Net()
    for _ in range(3):
        net(images(16) * 2 + 1)
    return net


# --- what a call gives -----------------------------------------------------------------------------------


def test_outputs_are_those_of_the_module_in_eval_mode() -> None:
    """In the module's own type and layout the outputs are bit for bit the module's, and need no gradient."""
    net = trained_net()
    teacher = GPUTeacher(net, "cpu", channels_last=False)
    batch = images()
    outputs = teacher(batch, scale=torch.tensor(2.0))
    expected = net.eval()(batch, scale=torch.tensor(2.0))
    assert torch.equal(outputs["logits"], expected["logits"])
    assert not outputs["logits"].requires_grad
    assert outputs["logits"].grad_fn is None


@given(st.sampled_from([torch.float64, torch.float32]), st.booleans(), st.integers(1, 5))
def test_type_and_layout_change_no_more_than_rounding(
    dtype: torch.dtype,
    channels_last: bool,  # noqa: FBT001 -- drawn
    n_samples: int,
) -> None:
    """Whatever the type and the layout, the outputs agree with the module's."""
    net = trained_net()
    batch = images(n_samples)
    expected = net.eval()(batch)["logits"]
    found = GPUTeacher(net, "cpu", dtype=dtype, channels_last=channels_last)(batch)["logits"]
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-5)


def test_inputs_are_cast_where_they_are_floating_point() -> None:
    """Nested inputs are cast to the teacher's type; integers, masks and other objects stay as they are."""
    seen: list[Any] = []

    class Spy(nn.Linear):
        def forward(self, batch: dict[str, Any]) -> torch.Tensor:  # type: ignore[override]  # a spy
            seen.append(batch)
            return super().forward(batch["x"])

    x, ids = torch.zeros(2, 3), torch.zeros(2, dtype=torch.int64)
    batch = {"x": x, "ids": ids, "name": "a", "none": None}
    outputs = GPUTeacher(Spy(3, 2), "cpu", dtype=torch.bfloat16)(batch)
    assert seen[0]["x"].dtype == outputs.dtype == torch.bfloat16
    assert torch.equal(seen[0]["ids"], ids)
    assert seen[0]["name"] == "a"
    assert seen[0]["none"] is None
    assert batch["x"] is x


def test_batch_norms_keep_their_type_in_half_precision() -> None:
    """Where weights are halved, the statistics and scales of batch norms stay in float32."""
    teacher = GPUTeacher(trained_net(), "cpu", dtype=torch.bfloat16)
    types = {name: tensor.dtype for name, tensor in teacher.module.state_dict().items()}
    assert types["conv.weight"] == types["head.bias"] == torch.bfloat16
    assert types["norm.weight"] == types["norm.running_var"] == torch.float32
    assert teacher(images())["logits"].dtype == torch.bfloat16


def test_autocast_around_the_call_is_without_effect() -> None:
    """The teacher computes in its own type, not in autocast's."""
    teacher = GPUTeacher(trained_net(), "cpu")
    batch = images()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = teacher(batch)["logits"]
    assert torch.equal(inside, teacher(batch)["logits"])


def test_images_and_weights_are_channels_last_unless_switched_off() -> None:
    """Convolutions get channels_last weights and images; other modules get inputs as they are."""
    features = GPUTeacher(Net(), "cpu")(images())["features"]
    assert features.is_contiguous(memory_format=torch.channels_last)
    assert GPUTeacher(Net(), "cpu", channels_last=False)(images())["features"].is_contiguous()


class Leaky(nn.Module):
    """A module that hands out its own memory, and the caller's."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(2, 2))
        self.plain = torch.ones(2)

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Return the table, a view of it, a plain attribute, the input and a view of the input."""
        return self.table, self.table[0], self.plain, x, x[:1]


def test_outputs_are_the_callers_own() -> None:
    """Changing an output in place changes neither the teacher nor the batch, and none needs gradients."""
    teacher = GPUTeacher(Leaky(), "cpu")
    x = torch.zeros(2, 2, requires_grad=True)
    outputs = teacher(x)
    for output in outputs:
        assert not output.requires_grad
        output.fill_(7)
    assert isinstance(teacher.module, Leaky)
    assert torch.equal(teacher.module.table, torch.ones(2, 2))
    assert torch.equal(teacher.module.plain, torch.ones(2))
    assert not x.any()


@pytest.mark.parametrize("mode", [True, False])
def test_inference_mode_around_the_call_is_without_effect(*, mode: bool) -> None:
    """Batches made in inference mode are taught as others, in it and outside; outputs are plain tensors."""
    net = trained_net()
    teacher, twin = GPUTeacher(net, "cpu"), GPUTeacher(net, "cpu", features=["conv"])
    with torch.inference_mode():
        batch = images()
    with torch.inference_mode(mode=mode):
        outputs, (_, features) = teacher(batch), twin(batch)
    assert torch.equal(outputs["logits"], teacher(batch.clone())["logits"])
    assert not outputs["logits"].is_inference()
    assert not features["conv"].is_inference()


def test_empty_batches_give_empty_outputs() -> None:
    """A batch of no samples is a batch."""
    assert GPUTeacher(Net(), "cpu")(images(0))["logits"].shape == (0, 4)


# --- the module that was given ---------------------------------------------------------------------------


def test_the_given_module_stays_as_it_is() -> None:
    """Its mode, gradients, types, memory and values are what they were; later training does not reach in."""
    net = trained_net()
    before = {name: (tensor.data_ptr(), tensor.clone()) for name, tensor in net.state_dict().items()}
    teacher = GPUTeacher(net, "cpu", dtype=torch.float64)
    assert net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    for name, tensor in net.state_dict().items():
        assert tensor.data_ptr() == before[name][0]
        assert torch.equal(tensor, before[name][1])
    batch = images()
    targets = teacher(batch)["logits"]
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.zero_()
    assert torch.equal(teacher(batch)["logits"], targets)


def test_a_frozen_copy_shares_no_memory_even_where_nothing_changes() -> None:
    """With the same device, type and layout, the teacher still has memory of its own."""
    net = nn.Linear(3, 3)
    teacher = GPUTeacher(net, "cpu")
    assert {p.data_ptr() for p in net.parameters()}.isdisjoint(
        p.data_ptr() for p in teacher.module.parameters()
    )
    assert not any(parameter.requires_grad for parameter in teacher.module.parameters())


def test_tied_weights_stay_tied() -> None:
    """A parameter with two names is one parameter in the teacher."""
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    module = GPUTeacher(net, "cpu").module
    assert isinstance(module, nn.Sequential)
    assert module[0].weight is module[1].weight


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize(
    "build",
    [
        lambda: nn.LSTM(3, 4, batch_first=True),
        lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 4)),
        lambda: nn.utils.weight_norm(nn.Linear(3, 4)),
        lambda: nn.TransformerEncoderLayer(3, 1, 8, batch_first=True),
        lambda: nn.DataParallel(nn.Linear(3, 4)),
        lambda: torch.compile(nn.Linear(3, 4), backend="eager"),
    ],
    ids=["lstm", "parametrized", "weight_norm", "transformer", "wrapped", "compiled"],
)
def test_modules_of_many_kinds(build: Callable[[], nn.Module]) -> None:
    """Recurrent, parametrized, wrapped and compiled modules teach what they compute."""
    module = build()
    x = torch.randn(2, 5, 3)
    module(x)  # leaves what a first forward leaves
    module.eval()
    found = GPUTeacher(module, "cpu")(x)
    expected = map_tensors(torch.Tensor.cpu, module(x))  # where there is a GPU, DataParallel moves to it
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- beside the student ----------------------------------------------------------------------------------


def test_a_student_does_not_own_its_teacher() -> None:
    """Parameters, state, modes, moves and optimizers of the student do not reach the teacher."""
    teacher = GPUTeacher(trained_net(), "cpu")
    student = Student(teacher)
    alone = Net()
    assert set(student.state_dict()) == {f"net.{name}" for name in alone.state_dict()}
    assert len(list(student.parameters())) == len(list(alone.parameters()))
    batch = images()
    targets = teacher(batch)["logits"]
    student.train()
    student.double()
    student.float().requires_grad_(True)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    for _ in range(2):
        optimizer.zero_grad()
        student(batch).backward()
        optimizer.step()
    assert torch.equal(teacher(batch)["logits"], targets)


def test_copies_of_the_student_share_the_teacher() -> None:
    """`deepcopy`, `copy` and averaged models have the same teacher, not another."""
    teacher = GPUTeacher(Net(), "cpu")
    student = Student(teacher)
    assert copy.deepcopy(student).teacher is teacher
    assert copy.copy(teacher) is teacher
    averaged = torch.optim.swa_utils.AveragedModel(student)
    assert isinstance(averaged.module, Student)
    assert averaged.module.teacher is teacher


def test_a_pickle_of_the_student_leaves_the_teachers_weights_out() -> None:
    """A whole student that is saved does not carry its teacher; the copy says so when it is called."""
    teacher = GPUTeacher(nn.Linear(300, 300), "cpu", dtype=torch.float64)
    buffer = io.BytesIO()
    torch.save(teacher, buffer)
    assert buffer.tell() < 5000
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=False)
    assert (loaded.device, loaded.dtype) == (teacher.device, torch.float64)
    with pytest.raises(RuntimeError, match="pickle"):
        loaded(torch.zeros(1, 300))


def test_attributes_say_where_and_how() -> None:
    """Device and type are attributes, and the repr says all there is to know."""
    teacher = GPUTeacher(Net(), "cpu", dtype=torch.bfloat16, chunk_size=2)
    assert teacher.device == torch.device("cpu")
    assert teacher.dtype == torch.bfloat16
    assert repr(teacher) == "GPUTeacher(Net, cpu, torch.bfloat16, channels_last, 2 samples at a time)"
    assert repr(GPUTeacher(nn.Linear(2, 2).double(), "cpu")) == "GPUTeacher(Linear, cpu, torch.float64)"


# --- features --------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """A net that changes activations in place, by a module and by an operator."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 4)
        self.act = nn.ReLU(inplace=True)
        self.second = nn.Linear(4, 4)
        self.last = nn.Linear(4, 2)
        self.n_last = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Count how often the end is reached."""
        x = self.act(self.first(x))
        x = self.second(x)
        x += 1
        self.n_last += 1
        result: torch.Tensor = self.last(x)
        return result


def test_features_come_with_the_outputs() -> None:
    """Features are what the named modules returned, even where the forward overwrites them later."""
    net = InPlace()
    x = torch.randn(3, 4)
    teacher = GPUTeacher(net, "cpu", features=["second", "first", "act"])
    for _ in range(2):
        outputs, features = teacher(x)
        torch.testing.assert_close(outputs, net(x))
        assert list(features) == ["second", "first", "act"]
        torch.testing.assert_close(features["first"], net.first(x))
        torch.testing.assert_close(features["act"], net.first(x).relu())
        torch.testing.assert_close(features["second"], net.second(net.first(x).relu()))
        assert not any(feature.requires_grad for feature in features.values())


def test_without_outputs_the_forward_stops_after_the_last_feature() -> None:
    """With outputs=False, what comes after the last feature does not run."""
    teacher = GPUTeacher(InPlace(), "cpu", features=["first", "second"], outputs=False)
    result = teacher(torch.randn(3, 4))
    assert result.outputs is None
    assert set(result.features) == {"first", "second"}
    assert isinstance(teacher.module, InPlace)
    assert teacher.module.n_last == 0


def test_one_feature_may_be_given_by_its_name_alone() -> None:
    """A single name is a name, not a sequence of letters."""
    features = GPUTeacher(InPlace(), "cpu", features="act")(torch.randn(3, 4)).features
    assert list(features) == ["act"]


def test_features_of_a_batch_in_parts_are_those_of_the_whole() -> None:
    """Features are put together from parts like outputs."""
    net = Hungry(2, trained_net())
    batch = images(5)
    assert isinstance(net.inner, Net)
    expected = net.inner.conv(batch)
    for outputs in (True, False):
        teacher = GPUTeacher(net, "cpu", chunk_size=2, features=["inner.conv"], outputs=outputs)
        torch.testing.assert_close(teacher(batch).features["inner.conv"], expected, rtol=1e-4, atol=1e-5)


# --- out of memory ---------------------------------------------------------------------------------------


class Hungry(nn.Module):
    """A module that runs out of memory with more than so many samples, and notes what it was asked."""

    def __init__(self, limit: int, module: nn.Module | None = None) -> None:
        super().__init__()
        self.limit = limit
        self.inner = module or Net()
        self.asked: list[int] = []

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        """Fail on large batches, as an allocator does."""
        self.asked.append(len(x))
        if len(x) > self.limit:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return self.inner(x, **kwargs)


@given(st.integers(1, 9), st.integers(1, 9))
def test_a_batch_that_does_not_fit_runs_in_parts(n_samples: int, limit: int) -> None:
    """The outputs are those of the whole batch, nested ones too, and small batches run whole afterwards."""
    net = Hungry(limit, trained_net())
    teacher = GPUTeacher(net, "cpu")
    batch = images(n_samples)
    expected = net.inner.eval()(batch)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        outputs = teacher(batch)
    assert bool(caught) == (n_samples > limit)
    torch.testing.assert_close(outputs["logits"], expected["logits"])
    torch.testing.assert_close(outputs["features"], expected["features"])
    assert isinstance(teacher.module, Hungry)
    teacher.module.asked.clear()
    teacher(batch)
    assert max(teacher.module.asked) <= limit


def test_the_size_that_fits_is_remembered_and_said_once() -> None:
    """It halves until it fits, warns where the teacher was called, and begins there the next time."""
    teacher = GPUTeacher(Hungry(3), "cpu")
    with pytest.warns(UserWarning, match="2 samples at a time") as caught:
        teacher(images(8))
    assert caught[0].filename == __file__
    assert teacher.chunk_size == 2
    teacher(images(8))  # warnings are errors here
    assert isinstance(teacher.module, Hungry)
    assert max(teacher.module.asked[-4:]) == 2


def test_a_limit_of_the_callers_own() -> None:
    """`chunk_size=` bounds the samples of a pass from the start, without a warning."""
    teacher = GPUTeacher(Hungry(3), "cpu", chunk_size=3)
    teacher(images(8))
    assert isinstance(teacher.module, Hungry)
    assert teacher.module.asked == [3, 3, 2]


def test_what_does_not_fit_at_all_raises_the_allocators_error() -> None:
    """With one sample that does not fit, the original error comes through, with what would help."""
    teacher = GPUTeacher(Hungry(0), "cpu")
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as error:
        teacher(images(4))
    assert "does not fit even with one sample" in error.value.__notes__[0]


def test_other_errors_come_through() -> None:
    """An error that is not about memory is raised as it is, at once."""
    net = Hungry(3, nn.Linear(5, 5))
    teacher = GPUTeacher(net, "cpu")
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        teacher(torch.zeros(2, 3))


class LateHungry(nn.Module):
    """A module that runs out of memory after a first layer has made its output."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(3, 3)
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.alive: list[int] = []

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Fail on more than two samples, and note which earlier outputs are still there."""
        self.alive.append(sum(ref() is not None for ref in self.made))
        y: torch.Tensor = self.first(x)
        self.made = [weakref.ref(y)]
        if len(x) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return y + 1


def test_features_of_a_failed_pass_are_let_go() -> None:
    """A feature that was caught before memory ran out is gone when the smaller pass begins."""
    teacher = GPUTeacher(LateHungry(), "cpu", features=["first"])
    x = torch.randn(8, 3)
    with pytest.warns(UserWarning, match="ran out of memory"):
        outputs, features = teacher(x)
    torch.testing.assert_close(outputs, features["first"] + 1)
    assert isinstance(teacher.module, LateHungry)
    assert teacher.module.alive[:3] == [0, 0, 0]


def test_packed_sequences_go_in_and_are_not_put_together() -> None:
    """An object that moves itself is an input like any other; as an output it cannot come in parts."""
    packed = nn.utils.rnn.pack_sequence([torch.randn(3, 2), torch.randn(2, 2)])
    module = nn.LSTM(2, 4).eval()
    found, expected = GPUTeacher(module, "cpu")(packed)[0], module(packed)[0]
    torch.testing.assert_close(found.data, expected.data)

    class Packs(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            return nn.utils.rnn.pack_sequence([super().forward(x)])

    with pytest.raises(RuntimeError, match="returns PackedSequence"):
        GPUTeacher(Packs(2, 2), "cpu", chunk_size=1)(torch.zeros(2, 2))


class SeesTheBatch(nn.Module):
    """A module whose output for a sample depends on the others."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise over the batch."""
        return (x - x.mean(dim=0)) * self.weight


def test_a_teacher_that_sees_the_whole_batch_is_not_split() -> None:
    """Where samples depend on one another, parts would give other targets: that is an error, not a guess."""
    teacher = GPUTeacher(Hungry(4, SeesTheBatch()), "cpu")
    with pytest.raises(RuntimeError, match="samples beside it change"):
        teacher(torch.randn(8, 3))


class Caching(nn.Module):
    """A module that returns an object with tensors of the batch inside, as language models do."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2)

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        """Return the outputs, a name, and an object that cannot be taken apart."""
        return {"y": self.linear(x), "name": "linear", "cache": object()}


def test_objects_with_parts_of_the_batch_are_not_split() -> None:
    """What differs from part to part and is no tensor cannot be put together: that is an error."""
    with pytest.raises(RuntimeError, match="differ from part to part"):
        GPUTeacher(Caching(), "cpu", chunk_size=2)(torch.zeros(4, 3))
    assert GPUTeacher(Caching(), "cpu")(torch.zeros(4, 3))["y"].shape == (4, 2)


class Tabled(nn.Module):
    """A module that returns a table of its own beside its outputs, or the mean over the batch if asked."""

    def __init__(self, n_rows: int) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(n_rows, 4))

    def forward(self, x: torch.Tensor, *, mean: bool = False) -> Any:
        """Return outputs (N, 4), and the table or the mean."""
        y = self.linear(x)
        return y, y.mean(dim=0) if mean else self.table


@pytest.mark.parametrize("n_samples", [4, 8, 10])
def test_rows_are_told_from_what_is_as_long_as_a_part(n_samples: int) -> None:
    """A table with as many rows as a part has samples stays itself; a mean over the batch is refused."""
    module, x = Tabled(n_rows=4), torch.randn(n_samples, 4)
    teacher = GPUTeacher(module, "cpu", chunk_size=4)
    outputs, table = teacher(x)
    torch.testing.assert_close(outputs, module(x)[0])
    assert torch.equal(table, module.table)
    if n_samples > 4:
        with pytest.raises(RuntimeError, match=r"shape \(4,\) for 2 samples"):
            teacher(x, mean=True)


def test_a_table_among_the_inputs_is_not_split_with_the_batch() -> None:
    """Looking whether samples are independent, a table as long as a part goes whole to every part."""

    class Bilinear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor, *, table: torch.Tensor) -> Any:
            return self.linear(x) + table.sum()

    module, x, table = Bilinear(), torch.randn(8, 3), torch.randn(4, 2)
    with pytest.warns(UserWarning, match="4 samples at a time"):
        found = GPUTeacher(Hungry(4, module), "cpu")(x, table=table)
    torch.testing.assert_close(found, module(x, table=table))


class Greedy(Hungry):
    """A module that changes its input before it runs out of memory."""

    def forward(self, x: torch.Tensor, **kwargs: Any) -> Any:
        """Normalise in place."""
        x -= 1
        return super().forward(x, **kwargs)


def test_a_pass_that_changed_its_inputs_is_not_repeated() -> None:
    """What the failed pass did to the inputs would be done twice: the error comes through."""
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as error:
        GPUTeacher(Greedy(2), "cpu", channels_last=False)(images(4))
    assert "changed its inputs in place" in error.value.__notes__[0]


def test_nothing_of_a_failed_pass_is_kept() -> None:
    """When the smaller pass runs, the tensors of the failed one are gone."""
    alive: list[weakref.ref[torch.Tensor]] = []
    at_retry: list[int] = []

    class Keeping(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            at_retry.append(sum(ref() is not None for ref in alive))
            scratch = x * 2
            alive.append(weakref.ref(scratch))
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            return super().forward(scratch)

    with pytest.warns(UserWarning, match="ran out of memory"):
        GPUTeacher(Keeping(3, 2), "cpu")(torch.zeros(8, 3))
    assert at_retry[:3] == [0, 0, 0]


class Copies(TorchDispatchMode):
    """Notes of each conversion whether it may return before it is done."""

    def __init__(self) -> None:
        super().__init__()
        self.non_blocking: list[bool] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Note, and do as told."""
        if func is torch.ops.aten._to_copy.default:
            self.non_blocking.append(bool((kwargs or {}).get("non_blocking")))
        return func(*args, **(kwargs or {}))


def test_inputs_on_their_way_to_the_host_are_waited_for() -> None:
    """A teacher on the CPU reads its inputs at once: what comes from a GPU must have arrived by then."""
    teacher = GPUTeacher(nn.Linear(3, 2), device="cpu")
    with Copies() as copies:
        teacher(torch.zeros(4, 3, dtype=torch.float64))
    assert copies.non_blocking == [False]
