"""`oom_guard` with a GPU that really runs out of memory."""

import gc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests import oom_ranks
from tests.gpu_memory import limited_gpu
from torchfast import OutOfMemoryError, _holders, inject_oom, oom_guard
from torchfast._bytes import GIB, MIB

pytestmark = pytest.mark.cuda
LIMIT_BYTES = 2 * GIB


@pytest.fixture
def small_gpu() -> Iterator[torch.device]:
    """Give a GPU of which this process may use 2 GiB."""
    with limited_gpu(LIMIT_BYTES) as device:
        yield device


def small_net(device: torch.device) -> nn.Sequential:
    """Return a net whose activations, not its weights, take the memory."""
    layers: list[nn.Module] = []
    for _ in range(4):
        layers += [nn.LazyConv2d(32, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.LazyLinear(10)).to(device)
    net(torch.zeros(1, 3, 64, 64, device=device))
    return net


def train_step(net: nn.Module, optimizer: torch.optim.Optimizer, images: torch.Tensor) -> torch.Tensor:
    """Take one step, and return the loss."""
    labels = torch.arange(len(images), device=images.device) % 10
    loss = F.cross_entropy(net(images), labels)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    return loss.detach()


def test_real_failure_is_explained(small_gpu: torch.device) -> None:
    """The allocator's own numbers are in the report, and the suggestion is less than what failed."""
    net = small_net(small_gpu)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    with pytest.raises(OutOfMemoryError) as caught, oom_guard():
        train_step(net, optimizer, torch.zeros(4096, 3, 64, 64, device=small_gpu))
    report = caught.value.report
    assert report is not None
    assert report.record.kind == "device"
    assert report.record.device == small_gpu
    assert report.record.requested_bytes is not None
    assert report.record.requested_bytes >= 512 * MIB
    assert report.record.allowed_bytes is not None
    assert abs(report.record.allowed_bytes - LIMIT_BYTES) < 64 * MIB
    assert (report.phase, report.batch_size) == ("forward", 4096)
    assert report.suggested_batch_size is not None
    assert 1 <= report.suggested_batch_size < 4096


def test_size_suggested_from_steps_that_worked_fits(small_gpu: torch.device) -> None:
    """The batch size computed from two smaller steps works, and twice as many do not."""
    net = small_net(small_gpu)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    sizes = [16, 32, 32, 4096]
    guard = oom_guard(reraise=False)
    with guard:
        for images in guard.steps(torch.zeros(n, 3, 64, 64, device=small_gpu) for n in sizes):
            train_step(net, optimizer, images)
    assert guard.report is not None
    suggested = guard.report.suggested_batch_size
    assert guard.report.batch_size_source == "steps"
    assert suggested is not None
    assert "the steps that worked needed" in guard.report.message
    train_step(net, optimizer, torch.zeros(suggested, 3, 64, 64, device=small_gpu))
    with pytest.raises(torch.OutOfMemoryError):
        train_step(net, optimizer, torch.zeros(2 * suggested, 3, 64, 64, device=small_gpu))


def test_a_thousand_failures_leave_no_byte(small_gpu: torch.device) -> None:
    """After each of 1,000 failures as many bytes are allocated as before, though every error is kept."""
    net = small_net(small_gpu)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    small = torch.randn(16, 3, 64, 64, device=small_gpu)
    train_step(net, optimizer, small)
    gc.collect()
    before = torch.cuda.memory_allocated(small_gpu)
    kept: list[BaseException] = []
    gc.freeze()  # what exists is not walked a thousand times
    try:
        for _ in range(1000):
            try:
                with oom_guard() as guard:
                    for images in guard.steps([torch.zeros(2048, 3, 64, 64, device=small_gpu)]):
                        hidden = net[0](images)
                        train_step(net, optimizer, images)
            except OutOfMemoryError as error:
                kept.append(error)
            assert torch.cuda.memory_allocated(small_gpu) == before
    finally:
        gc.unfreeze()
    assert hidden is None
    assert len(kept) == 1000


@pytest.mark.parametrize("fails_at", [0, 3])
def test_training_goes_on_to_the_same_loss(small_gpu: torch.device, fails_at: int) -> None:
    """A guarded failure between two steps does not change what the steps compute."""

    def train(*, with_failure: bool) -> list[float]:
        torch.manual_seed(0)
        net = small_net(small_gpu)
        optimizer = torch.optim.AdamW(net.parameters())
        losses = []
        for step in range(8):
            if with_failure and step == fails_at:
                with oom_guard(reraise=False) as guard:
                    net(torch.zeros(4096, 3, 64, 64, device=small_gpu))
                assert guard.report is not None
            generator = torch.Generator(device=small_gpu).manual_seed(step)
            images = torch.randn(16, 3, 64, 64, device=small_gpu, generator=generator)
            losses.append(train_step(net, optimizer, images).item())
        return losses

    torch.backends.cudnn.deterministic = True
    try:
        assert train(with_failure=True) == train(with_failure=False)
    finally:
        torch.backends.cudnn.deterministic = False


def test_failure_does_not_disturb_later_kernels(small_gpu: torch.device) -> None:
    """What is computed after an impossible request is right."""
    ones = torch.ones(1000, device=small_gpu)
    with oom_guard(reraise=False) as guard:
        torch.empty(800_000_000, 2**30, dtype=torch.uint8, device=small_gpu)
    assert guard.report is not None
    assert guard.report.record.kind in ("impossible", "device")
    assert (ones * 3).sum().item() == 3000


# --- trying again -----------------------------------------------------------------------------------------


def losses_of(device: torch.device, *, n_steps: int = 6, **options: Any) -> tuple[list[float], int | None]:
    """Train at an effective batch of 64; return the loss of each step, and the size that it was cut to."""
    torch.manual_seed(0)
    net = small_net(device).double()  # so that other kernels for smaller parts round alike
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    retry = oom_guard().retry(model=net, optimizer=optimizer, **options)
    losses = []
    for step in range(n_steps):
        generator = torch.Generator(device=device).manual_seed(step)
        images = torch.randn(64, 3, 64, 64, device=device, generator=generator, dtype=torch.float64)
        labels = torch.arange(64, device=device) % 10
        for attempt in retry.attempts((images, labels)):
            with attempt:
                loss_sum = 0.0
                for (part, targets), weight in attempt:
                    loss = F.cross_entropy(net(part), targets) * weight
                    loss.backward()
                    loss_sum += loss.item()
                optimizer.step()
                optimizer.zero_grad()
        losses.append(loss_sum)
    return losses, retry.micro_batch_size


@pytest.mark.parametrize("copy", [False, True])
def test_too_large_a_batch_trains_with_the_same_loss(copy: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    """A batch of 64 that does not fit is trained in parts, with the losses of a card where it fits."""
    free, uncut = losses_of(torch.device("cuda", 0))
    with limited_gpu(320 * MIB) as device:
        limited, micro_batch_size = losses_of(device, copy=copy)
    assert uncut is None
    assert micro_batch_size is not None
    assert micro_batch_size < 64
    assert limited == pytest.approx(free, rel=1e-6)


def test_same_size_succeeds_once_memory_is_back(small_gpu: torch.device) -> None:
    """A step that failed because something else held memory runs at its full size once that is let go."""
    net = small_net(small_gpu)

    class Hoarder:
        held: torch.Tensor | None = None

        def release_memory(self) -> None:
            self.held = None

    hoarder = Hoarder()
    hoarder.held = torch.empty(LIMIT_BYTES * 9 // 10, dtype=torch.uint8, device=small_gpu)
    _holders.register(hoarder)
    retry = oom_guard().retry(model=net)
    for attempt in retry.attempts(torch.randn(256, 3, 64, 64, device=small_gpu)):
        with attempt:
            for images, weight in attempt:
                (net(images).mean() * weight).backward()
    assert (attempt.number, attempt.size, retry.micro_batch_size) == (2, 256, None)


def test_optimizer_is_tried_before_it_begins(small_gpu: torch.device) -> None:
    """Where AdamW's state does not fit, the step fails before it has changed a parameter."""
    model = nn.Linear(8192, 8192, bias=False, device=small_gpu)  # 256 MiB; with its gradient 512
    optimizer = torch.optim.AdamW(model.parameters())
    before = model.weight.detach().clone().cpu()
    ballast = torch.empty(LIMIT_BYTES // 2, dtype=torch.uint8, device=small_gpu)
    retry = oom_guard().retry(model=model, optimizer=optimizer)

    def step() -> None:
        for attempt in retry.attempts(torch.ones(1, 8192, device=small_gpu)):
            with attempt:
                for part, weight in attempt:
                    (model(part).sum() * weight).backward()
                optimizer.step()

    with pytest.raises(OutOfMemoryError) as caught:
        step()
    assert caught.value.report is not None
    assert "had begun to change" not in str(caught.value)
    assert torch.equal(model.weight.detach().cpu(), before)
    assert len(optimizer.state) == 0
    assert model.weight.grad is None
    del ballast, caught
    gc.collect()
    step()
    assert not torch.equal(model.weight.detach().cpu(), before)


def test_inference_in_chunks(small_gpu: torch.device) -> None:
    """A batch that does not fit is answered in chunks, with the whole batch's outputs."""
    net = small_net(small_gpu).eval()
    images = torch.randn(3072, 3, 64, 64, device=small_gpu)
    guard = oom_guard()
    predict = guard.chunked(net)
    with torch.no_grad():
        answers = predict(images)
        expected = torch.cat([net(chunk) for chunk in images.split(256)])
    assert guard.report is not None
    torch.testing.assert_close(answers, expected, rtol=1e-3, atol=1e-4)


def test_random_state_of_the_gpu_comes_back(small_gpu: torch.device) -> None:
    """Dropout on the GPU draws the same mask when the step is tried again."""
    masks = []
    dropout = nn.Dropout(0.5)
    for attempt in oom_guard().retry(model=dropout).attempts(torch.ones(1000, device=small_gpu)):
        with attempt:
            for part, _ in attempt:
                masks.append(dropout(part).cpu())
            if attempt.number == 1:
                torch.empty(4 * LIMIT_BYTES, dtype=torch.uint8, device=small_gpu)
    assert len(masks) == 2
    assert torch.equal(masks[0], masks[1])


def test_faults_in_the_gpus_backward_thread(small_gpu: torch.device) -> None:
    """Injected into the backward pass, which runs in another thread there, a fault leaves no trace."""

    def gradients(injection: inject_oom) -> list[torch.Tensor]:
        torch.manual_seed(0)
        net = small_net(small_gpu)
        images = torch.randn(8, 3, 64, 64, device=small_gpu)
        for attempt in oom_guard().retry(model=net).attempts(images):
            with attempt, injection:
                for part, weight in attempt:
                    (net(part).square().mean() * weight).backward()
        return [p.grad for p in net.parameters() if p.grad is not None]

    torch.backends.cudnn.deterministic = True
    try:
        counting = inject_oom(times=0, phase="backward")
        expected = gradients(counting)
        for at in range(0, counting.n_operators, 9):
            injection = inject_oom(at, phase="backward")
            assert all(map(torch.equal, gradients(injection), expected))
            assert injection.n_failures == 1
    finally:
        torch.backends.cudnn.deterministic = False


def test_ranks_agree_over_nccl(tmp_path: Path) -> None:
    """Over NCCL, faults on one rank at random operators leave both with the weights of no fault."""
    names = ["faulty", "clean", "static", "views", "large", "guarded", "split", "bare_first", "kept_apart"]
    first, second = oom_ranks.run_ranks(tmp_path, names, backend="nccl")
    assert oom_ranks.same(first["faulty"], second["faulty"])
    for faulty, clean in (
        ("faulty", "clean"),
        ("static", "guarded"),
        ("views", "guarded"),
        ("large", "guarded"),
    ):
        for one, other in zip(first[faulty], first[clean], strict=True):
            torch.testing.assert_close(one, other)
    assert [result["split"] for result in (first, second)] == [(4, 2), (4, 2)]
    assert [result["bare_first"] for result in (first, second)] == [2, 2]
    assert not any(map(torch.equal, first["kept_apart"], second["kept_apart"]))
