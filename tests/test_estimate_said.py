"""What an estimate says that it took for granted, and what it left out."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from torchfast import VRAMEstimate, estimate_vram

BATCH = torch.randn(4, 8)
LABELS = torch.randint(0, 8, (4,))


def estimate(model: nn.Module, batch: Any = BATCH, **options: Any) -> VRAMEstimate:
    """Estimate two steps for a GPU that is named."""
    defaults: dict[str, Any] = {"gpu": "H200", "n_steps": 2}
    return estimate_vram(model, batch, **(defaults | options))


class Returns(nn.Linear):
    """A layer that returns whatever a function makes of its output."""

    def __init__(self, make: Any) -> None:
        super().__init__(8, 8)
        self.make = make

    def forward(self, x: torch.Tensor) -> Any:
        """Return what the function makes of the layer's output."""
        return self.make(super().forward(x))


class WithAttribute:
    """An output as old code returns it."""

    def __init__(self, loss: torch.Tensor) -> None:
        self.loss = loss


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda y: {"loss": y.mean(), "logits": y}, "the output's own `loss` was taken"),
        (lambda y: WithAttribute(y.mean()), "the output's own `loss` was taken"),
        (lambda y: y, "the sum of the output's floating-point tensor was taken"),
        (lambda y: [y, y * 2, 3], "the sum of the output's 2 floating-point tensors was taken"),
        (lambda y: y * 1j, "the sum of the output's floating-point tensor was taken"),
    ],
    ids=["entry", "attribute", "tensor", "list", "complex"],
)
def test_which_loss_was_taken(make: Any, said: str) -> None:
    """Without loss= the estimate says whether it found the output's own or summed its tensors."""
    assert f"no loss= was given: {said}" in estimate(Returns(make)).assumptions


def test_what_is_given_is_not_assumed() -> None:
    """With loss, optimizer and GPU given, nothing but the versions remains to be said."""
    found = estimate(nn.Linear(8, 8), (BATCH, LABELS), loss=F.cross_entropy, optimizer=torch.optim.AdamW)
    assert [said.split()[0] for said in found.assumptions] == ["operators"]


def test_the_versions_that_it_speaks_for() -> None:
    """The running torch, and the one whose kernels were measured, are both named."""
    said = estimate(nn.Linear(8, 8)).assumptions[-1]
    assert f"torch {torch.__version__}" in said
    assert "torch 2.11 for CUDA 13.0 with cuDNN 9.19" in said


def test_a_missing_optimizer_is_said() -> None:
    """Forward and backward alone are named as such, with the way to the common optimizers."""
    said = " ".join(estimate(nn.Linear(8, 8)).assumptions)
    assert "no optimizer= was given" in said
    assert "what_if()" in said
    assert "optimizer" not in " ".join(estimate(nn.Linear(8, 8), training=False).assumptions)


@pytest.mark.skipif(torch.cuda.is_available(), reason="speaks of a machine without a GPU")
def test_the_gpu_that_it_speaks_for() -> None:
    """Without gpu= on a machine without one, the GPU in its place is named; of bytes, what they stand for."""
    nothing, size = (estimate(nn.Linear(8, 8), gpu=gpu).assumptions for gpu in (None, 24 * 2**30))
    assert any("the estimate is for H200 (140 GiB, compute capability 9.0)" in said for said in nothing)
    assert any("taken to be of compute capability 8.9 with 128 multiprocessors" in said for said in size)


def test_a_scaler_that_comes_with_half_precision_is_said() -> None:
    """fp16 autocast brings a gradient scaler, unless that is decided by hand."""
    options: dict[str, Any] = {"autocast": torch.float16, "optimizer": torch.optim.AdamW}
    said, decided = (
        estimate(nn.Linear(8, 8), **options),
        estimate(nn.Linear(8, 8), **options, grad_scaler=True),
    )
    assert any("GradScaler" in each for each in said.assumptions)
    assert not any("GradScaler" in each for each in decided.assumptions)


# --- wrappers ----------------------------------------------------------------------------------------------


@pytest.fixture
def one_process() -> Iterator[None]:
    """Have a process group of one."""
    store = dist.HashStore()  # type: ignore[attr-defined]  # torch does not list it
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model: nn.Module) -> Any:
    """Compile a module."""
    return torch.compile(model, backend="eager")


def compiled_in_place(model: nn.Module) -> nn.Module:
    """Compile a module in place."""
    model.compile(backend="eager")
    return model


@pytest.mark.parametrize(
    ("wrap", "said"),
    [
        (compiled, "torch.compile was left out"),
        (compiled_in_place, "torch.compile was left out"),
        (lambda model: nn.Sequential(compiled(model)), "torch.compile of '0'"),
        (nn.DataParallel, "DataParallel was run as the module inside, on one GPU"),
        (nn.parallel.DistributedDataParallel, "its gradient buckets, 288 B, and NCCL's buffers not counted"),
    ],
    ids=["compile", "in place", "part", "DataParallel", "DDP"],
)
@pytest.mark.usefixtures("one_process")
def test_wrappers_are_run_as_what_they_hold(wrap: Any, said: str) -> None:
    """A wrapped or compiled model is estimated as the plain one, says so, and works afterwards."""
    torch.manual_seed(0)
    plain = nn.Linear(8, 8)
    expected = estimate(plain, optimizer=torch.optim.AdamW)
    wrapped = wrap(plain)
    found = estimate(wrapped, optimizer=torch.optim.AdamW)
    assert any(said in each for each in found.unmodelled)
    assert found.peak_allocated_bytes == expected.peak_allocated_bytes
    if torch.cuda.is_available() and isinstance(wrapped, nn.DataParallel):
        return  # on such a machine it refuses a module of the host
    for _ in range(2):
        wrapped(BATCH).sum().backward()
    assert plain.weight.grad is not None
    torch.testing.assert_close(plain.weight.grad, 2 * BATCH.sum(0).expand(8, 8))


@pytest.mark.usefixtures("one_process")
def test_buckets_that_are_the_gradients_are_not_counted_twice() -> None:
    """With gradient_as_bucket_view the note says that gradients lie in the buckets."""
    wrapped = nn.parallel.DistributedDataParallel(nn.Linear(8, 8), gradient_as_bucket_view=True)
    assert "gradients lie in its buckets" in estimate(wrapped).unmodelled[0]


def test_wrappers_do_not_name_the_model() -> None:
    """The headline and the module at the peak are the inner model's."""
    found = estimate(compiled(nn.Sequential(nn.Linear(8, 8), nn.ReLU())))
    assert found.subject.model == "Sequential"
    assert {note.module for note in found._trace.notes} <= {"", "0", "1"}


def test_a_custom_operator_without_shapes_is_said() -> None:
    """An operator that registered no shapes runs on zeros, and the estimate names it."""

    @torch.library.custom_op("torchfast_tests::double", mutates_args=())
    def double(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    double.register_autograd(lambda _, gradient: gradient * 2)
    found = estimate(Returns(torch.ops.torchfast_tests.double))
    assert found.unmodelled == (
        "torchfast_tests.double tells no shapes: run on zeros on the CPU, scratch not known",
    )
