"""`GPUTeacher` on a GPU: its memory, its synchronisations, and what it does when memory ends."""

import copy
import gc
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.gpu_memory import empty_gpu
from torchfast import GPUTeacher
from torchfast._teacher import plan as planning

pytestmark = pytest.mark.cuda


@pytest.fixture(autouse=True)
def clean_memory() -> Iterator[None]:
    """Begin and end with an empty cache and without a limit on memory."""
    empty_gpu()
    torch.cuda.reset_peak_memory_stats()
    yield
    torch.cuda.set_per_process_memory_fraction(1.0)
    empty_gpu()


def net() -> nn.Sequential:
    """Return a net whose batch norm has seen something."""
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.Conv2d(64, 64, 3, padding=1),
        nn.Flatten(2),
    )
    model(torch.randn(8, 3, 16, 16) * 2)
    return model


def test_it_is_on_the_current_gpu_by_default() -> None:
    """Without a device it takes the current accelerator, and inputs from the host are brought there."""
    teacher = GPUTeacher(net())
    assert teacher.device == torch.device("cuda", torch.cuda.current_device())
    assert all(parameter.is_cuda for parameter in teacher.module.parameters())
    outputs = teacher(torch.randn(2, 3, 16, 16))
    assert outputs.is_cuda
    assert not outputs.requires_grad


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_targets_agree_with_the_module_in_float64(dtype: torch.dtype) -> None:
    """In each type, the outputs are the module's within that type's rounding."""
    module = net()
    images = torch.randn(8, 3, 16, 16)
    expected = copy.deepcopy(module).double().eval()(images.double())
    found = GPUTeacher(module, dtype=dtype)(images).double().cpu()
    tolerance = {torch.float64: 1e-12, torch.float32: 5e-3, torch.bfloat16: 2e-2, torch.float16: 5e-3}[dtype]
    assert (found - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_call_does_not_wait_for_the_gpu() -> None:
    """No synchronisation is hidden in a call: the host goes on while the teacher computes."""
    teacher = GPUTeacher(net(), dtype=torch.bfloat16)
    images = torch.randn(8, 3, 16, 16, device="cuda")
    teacher(images)
    try:
        torch.cuda.set_sync_debug_mode("error")
        outputs = teacher(images)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert outputs.isfinite().all()


def test_autocast_casts_no_weights() -> None:
    """Under autocast the teacher computes in its own type: nothing is cast again in each forward."""
    teacher = GPUTeacher(net(), dtype=torch.float32)
    images = torch.randn(2, 3, 16, 16, device="cuda")
    with torch.autocast("cuda", dtype=torch.bfloat16):
        assert teacher(images).dtype == torch.float32


def big(n_layers: int = 6) -> nn.Sequential:
    """Return layers of 16 MiB each, in float32."""
    return nn.Sequential(*(nn.Linear(2048, 2048, bias=False) for _ in range(n_layers)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_peaks_at_the_teacher_and_one_tensor(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    """On the device, loading needs the teacher's own memory and room for one tensor of the file."""
    state = big().state_dict()
    path = tmp_path / f"teacher{suffix}"
    if suffix == ".pt":
        torch.save(state, path)
    else:
        from safetensors.torch import save_file

        save_file(state, path)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    teacher = GPUTeacher.from_checkpoint(big, path, dtype=dtype)
    final = torch.cuda.memory_allocated() - before
    assert final == 6 * 2048**2 * dtype.itemsize
    assert torch.cuda.max_memory_allocated() - before <= final + 2048**2 * 4
    torch.testing.assert_close(
        teacher.module.get_parameter("3.weight").cpu(), state["3.weight"].to(dtype), rtol=0, atol=0
    )


def test_making_one_of_a_module_peaks_at_the_teacher_and_one_tensor() -> None:
    """From a module on the host it is the same, and the module's memory on the host is untouched."""
    module = big()
    before = torch.cuda.memory_allocated()
    teacher = GPUTeacher(module, dtype=torch.bfloat16)
    final = torch.cuda.memory_allocated() - before
    assert final == sum(p.numel() * 2 for p in teacher.module.parameters())
    assert torch.cuda.max_memory_allocated() - before <= final + 2048**2 * 4
    assert not any(parameter.is_cuda for parameter in module.parameters())


class Wide(nn.Module):
    """A module that needs much scratch memory for each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.full((), 2.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply by two, by way of 256 MiB a sample."""
        wide = x[:, None].expand(len(x), 2**26) * self.scale
        return wide[:, 0] + wide[:, -1] - wide.mean(dim=1)


def limit_memory(limit_bytes: int) -> None:
    """Let this process have so many more bytes than it holds."""
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    assert free > limit_bytes, "this GPU is too full for the test"
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + limit_bytes) / total)


def test_a_real_out_of_memory_runs_in_parts() -> None:
    """Where the allocator fails on the whole batch, the teacher goes on in parts that fit, and remembers."""
    teacher = GPUTeacher(Wide())
    x = torch.arange(8.0, device="cuda")
    limit_memory(2**30)
    with pytest.warns(UserWarning, match="ran out of memory"):
        outputs = teacher(x)
    torch.testing.assert_close(outputs, x * 2)
    assert teacher.chunk_size in (1, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(teacher(x), x * 2)


def test_one_sample_that_does_not_fit_is_the_allocators_error() -> None:
    """When even one sample is too much, the error is PyTorch's own, with what would help."""
    teacher = GPUTeacher(Wide())
    x = torch.arange(4.0, device="cuda")
    limit_memory(2**27)
    with pytest.raises(torch.OutOfMemoryError) as error:
        teacher(x)
    assert "one sample at a time" in error.value.__notes__[0]
    torch.cuda.set_per_process_memory_fraction(1.0)
    torch.testing.assert_close(teacher(x), x * 2)


def test_weights_that_do_not_fit_say_what_would() -> None:
    """A teacher too large for the device names its size, and its size in bfloat16."""
    module = big()
    limit_memory(2**26)
    with pytest.raises(torch.OutOfMemoryError) as error:
        GPUTeacher(module)
    place = torch.device("cuda", torch.cuda.current_device())
    assert error.value.__notes__[0] == (
        f"The teacher's weights take 96.0 MiB on {place}. With dtype=torch.bfloat16 they take 48.0 MiB."
    )
    del error
    GPUTeacher(module, dtype=torch.bfloat16)


# --- the plan --------------------------------------------------------------------------------------------


def planned(plan: str | tuple[str, ...], **options: Any) -> tuple[GPUTeacher, nn.Module, torch.Tensor]:
    """Return a planned teacher in bfloat16, its module in float32, and a batch."""
    module = net()
    teacher = GPUTeacher(module, dtype=torch.bfloat16, plan=plan, **options)
    return teacher, module.cuda().eval(), torch.randn(8, 3, 16, 16, device="cuda")


@pytest.mark.parametrize("plan", ["auto", ("fold",), ("graph",), ("fold", "graph")])
def test_every_plan_gives_the_modules_outputs(plan: str | tuple[str, ...]) -> None:
    """For the planned shape and for others, outputs are the module's within bfloat16's rounding."""
    teacher, module, images = planned(plan)
    for batch in (images, images + 1, images[:3], images):
        found, expected = teacher(batch).float(), module(batch)
        assert (found - expected).abs().max() <= 0.03 * expected.abs().max()
    assert teacher.plan is not None
    assert not teacher.plan.rejected, teacher.plan


def test_outputs_of_a_graph_are_the_callers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs that are kept do not change when the graph runs again, and may be changed in place."""
    monkeypatch.setattr(planning, "MIN_GAIN", -1e9)  # keep whatever was asked for
    teacher, module, images = planned(("graph",))
    kept = [teacher(images * scale) for scale in (1, 2, 3)]
    assert teacher.plan is not None
    assert teacher.plan.parts == ("graph",)
    kept[0].zero_()
    for scale, found in zip((2, 3), kept[1:], strict=True):
        expected = module(images * scale)
        assert (found.float() - expected).abs().max() <= 0.03 * expected.abs().max()
    assert len({output.data_ptr() for output in kept}) == 3


def test_a_graph_is_right_on_other_streams(monkeypatch: pytest.MonkeyPatch) -> None:
    """Calls from two streams, with the GPU lagging behind the host, do not mix their inputs."""
    monkeypatch.setattr(planning, "MIN_GAIN", -1e9)
    teacher, module, images = planned(("graph",))
    teacher(images)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    results = []
    # Kept: what is dropped while another stream is to read it would be written over.
    batches = [images * scale for scale in range(1, 6)]
    for scale, batch in enumerate(batches, start=1):
        ready = torch.cuda.Event()
        ready.record()
        with torch.cuda.stream(side if scale % 2 else torch.cuda.current_stream()):
            torch.cuda.current_stream().wait_event(ready)
            torch.cuda._sleep(20_000_000)
            results.append(teacher(batch))
    torch.cuda.synchronize()
    for scale, found in enumerate(results, start=1):
        expected = module(images * scale)
        assert (found.float() - expected).abs().max() <= 0.03 * expected.abs().max()


def test_a_teacher_that_cannot_be_captured_runs_eagerly() -> None:
    """A forward that asks the GPU for a number is no graph: the plan says so, and the teacher works."""

    class Asks(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * (1 if float(x.sum()) < 1e9 else 2)

    module = Asks(4, 4)
    teacher = GPUTeacher(module, plan=("graph",))
    x = torch.randn(3, 4, device="cuda")
    for _ in range(2):
        torch.testing.assert_close(teacher(x), module.cuda()(x), rtol=1e-3, atol=1e-3)
    assert teacher.plan is not None
    assert "synchronizing" in teacher.plan.rejected["graph"]


def test_a_failed_capture_leaves_nothing_behind() -> None:
    """After a capture that failed half-way, streams, random numbers, memory and graphs are as before."""

    class Waits(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            y = super().forward(x)
            torch.cuda.synchronize()
            return y

    module = Waits(4, 4)
    teacher = GPUTeacher(module, plan=("graph",))
    x = torch.randn(3, 4, device="cuda")
    stream = torch.cuda.current_stream()
    found = teacher(x)
    assert torch.cuda.current_stream() == stream
    torch.testing.assert_close(found, module.cuda()(x), rtol=1e-3, atol=1e-3)
    assert teacher.plan is not None
    assert "graph" in teacher.plan.rejected
    assert torch.randn(4, device="cuda").isfinite().all()
    other, eager, images = planned(("graph",))
    found, expected = other(images), eager(images)
    assert (found.float() - expected).abs().max() <= 0.03 * expected.abs().max()
    # The allocator gives its cache back when memory runs out, which it does not while a capture is under way.
    gc.collect()
    torch.cuda.empty_cache()
    limit_memory(2**28)
    cached = torch.empty(2**27 + 2**20, dtype=torch.uint8, device="cuda")
    del cached
    assert torch.empty(2**27 + 2**23, dtype=torch.uint8, device="cuda").is_cuda


def test_the_students_training_goes_on_beside_a_graph(monkeypatch: pytest.MonkeyPatch) -> None:
    """A planned teacher's targets train a student as an eager teacher's do."""
    monkeypatch.setattr(planning, "MIN_GAIN", -1e9)
    losses = []
    for plan in ("eager", ("fold", "graph")):
        torch.manual_seed(0)
        teacher, _, images = planned(plan)
        student = net().cuda()
        optimizer = torch.optim.SGD(student.parameters(), lr=0.01)
        for _ in range(5):
            targets = teacher(images)
            assert teacher.device.type == targets.device.type == "cuda"
            loss = nn.functional.mse_loss(student(images), targets.float())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[0] == pytest.approx(losses[1], rel=0.02)


@pytest.mark.gpus(2)
def test_it_stays_on_the_gpu_it_was_given() -> None:
    """On a second GPU it computes there, whatever the current device is, and beside a student elsewhere."""
    teacher = GPUTeacher(net(), device="cuda:1")
    outputs = teacher(torch.randn(2, 3, 16, 16, device="cuda:0"))
    assert outputs.device == torch.device("cuda:1")
