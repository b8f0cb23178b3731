"""Trying again on a GPU: what a retry must neither disturb nor wait for."""

import gc
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, Dataset

from tests.gpu_memory import limited_gpu
from torchfast import DeviceLoader, OutOfMemoryError, inject_oom, oom_guard
from torchfast._bytes import GIB, MIB

pytestmark = pytest.mark.cuda
LIMIT_BYTES = 2 * GIB
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB."


@pytest.fixture(autouse=True)
def small_gpu() -> Iterator[torch.device]:
    """Give a GPU of which this process may use 2 GiB, with kernels that always round alike."""
    torch.backends.cudnn.deterministic = True
    with limited_gpu(LIMIT_BYTES) as device:
        yield device
    torch.backends.cudnn.deterministic = False


class Training:
    """Mixed precision with a scaler, dropout, batch norm and AdamW: all that a step on a GPU changes."""

    def __init__(self, device: torch.device) -> None:
        torch.manual_seed(0)
        self.model = nn.Sequential(
            *(nn.Linear(64, 64), nn.BatchNorm1d(64), nn.GELU(), nn.Dropout(0.2), nn.Linear(64, 10))
        ).to(device)
        self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=0.01)
        self.scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, growth_interval=1)
        self.batches = [
            (torch.randn(32, 64, device=device), torch.randint(10, (32,), device=device)) for _ in range(3)
        ]

    def step(self, parts: Any) -> None:
        """Take a step."""
        for (samples, labels), weight in parts:
            with torch.autocast("cuda", torch.float16):
                loss = F.cross_entropy(self.model(samples), labels) * weight
            self.scaler.scale(loss).backward()
        self.scaler.unscale_(self.optimizer)
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def state(self) -> list[Any]:
        """Return everything that a fault could have changed."""
        moments = [v for state in self.optimizer.state_dict()["state"].values() for v in state.values()]
        tensors = [*self.model.state_dict().values(), *moments, torch.cuda.get_rng_state()]
        return [*(t.cpu() for t in tensors), self.scaler.state_dict()]


def run(device: torch.device, injection: inject_oom, *, copy: bool) -> list[Any]:
    """Train three steps with a fault in the second, and return the state."""
    training = Training(device)
    retry = oom_guard().retry(
        model=training.model, optimizer=training.optimizer, scaler=training.scaler, copy=copy
    )
    for index, batch in enumerate(training.batches):
        for attempt in retry.attempts(batch):
            with attempt:
                if index == 1:
                    with injection:
                        training.step(attempt)
                else:
                    training.step(attempt)
    return training.state()


@pytest.mark.parametrize(("phase", "copy"), [("forward", False), ("backward", False), (None, True)])
def test_fault_at_any_operator_leaves_no_trace(small_gpu: torch.device, phase: Any, *, copy: bool) -> None:
    """Mixed precision on a GPU, tried again whole, is bit for bit what it is without a fault."""
    counting = inject_oom(times=0, phase=phase)
    expected = run(small_gpu, counting, copy=copy)
    for at in range(0, counting.n_operators, 7):
        injection = inject_oom(at, phase=phase)
        found = run(small_gpu, injection, copy=copy)
        assert injection.n_failures == 1
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other, (at, phase)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_nothing_waits_for_the_gpu(small_gpu: torch.device) -> None:
    """While nothing fails, neither a retry, nor the guard, nor its steps synchronise with the GPU."""
    model = nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64)).to(small_gpu)
    optimizer = torch.optim.AdamW(model.parameters())
    batch = torch.randn(32, 64, device=small_gpu)
    guard = oom_guard()
    retries = [guard.retry(model=model, optimizer=optimizer, copy=copy) for copy in (False, True)]

    def steps() -> None:
        with guard:
            for samples in guard.steps([batch] * 2):
                for retry in retries:
                    for attempt in retry.attempts(samples):
                        with attempt:
                            for part, weight in attempt:
                                (model(part).mean() * weight).backward()
                            optimizer.step()
                            optimizer.zero_grad()

    steps()
    try:
        torch.cuda.set_sync_debug_mode("error")
        steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert guard.report is None


class Wide(nn.Module):
    """A net whose hidden layers take 4 MiB a sample each, with and without activation checkpointing."""

    def __init__(self, *, checkpointed: bool) -> None:
        super().__init__()
        self.checkpointed = checkpointed
        self.first, self.last = nn.Linear(16, 4096), nn.Linear(4096, 4)

    def forward(self, sequences: torch.Tensor, mask: torch.Tensor) -> dict[str, Any]:
        """Return logits of sequences (N, T, 16) under a mask (1, T), and the mask."""
        hidden = sequences
        for _ in range(2):
            wide = self._checkpointed if self.checkpointed else self._wide
            hidden = wide(hidden)
        logits = self.last(F.relu(self.first(hidden))).mean(1)
        return {"logits": logits, "rest": (mask, {"n": 2})}

    def _checkpointed(self, hidden: torch.Tensor) -> torch.Tensor:
        narrow: torch.Tensor = checkpoint(self._wide, hidden, use_reentrant=False)
        return narrow

    def _wide(self, hidden: torch.Tensor) -> torch.Tensor:
        narrow: torch.Tensor = F.relu(self.first(hidden))[..., :16]
        return narrow


@pytest.mark.parametrize("checkpointed", [False, True])
def test_parts_of_sequences_with_one_mask_for_all(small_gpu: torch.device, *, checkpointed: bool) -> None:
    """A real lack of memory: (N, T, F) is split, a mask (1, T) is not, and the gradient is the whole's."""
    net = Wide(checkpointed=checkpointed).double().to(small_gpu)
    sequences = torch.randn(48, 256, 16, device=small_gpu, dtype=torch.float64)
    mask = torch.ones(1, 256, device=small_gpu)
    seen = []

    def gradients(limit_bytes: int) -> list[torch.Tensor]:
        total = torch.cuda.get_device_properties(small_gpu).total_memory
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(limit_bytes / total, small_gpu)
        net.zero_grad()
        for attempt in oom_guard().retry(model=net).attempts({"sequences": sequences, "mask": mask}):
            with attempt:
                for part, weight in attempt:
                    outputs = net(**part)
                    seen.append((tuple(part["mask"].shape), len(part["sequences"])))
                    (outputs["logits"].square().mean() * weight).backward()
        return [p.grad.clone() for p in net.parameters() if p.grad is not None]

    whole = gradients(64 * GIB)
    assert seen == [((1, 256), 48)]
    for one, other in zip(gradients(768 * MIB), whole, strict=True):
        torch.testing.assert_close(one, other)
    assert seen[-1][0] == (1, 256)
    assert seen[-1][1] < 48


def test_nested_outputs_in_chunks(small_gpu: torch.device) -> None:
    """A real lack of memory in inference: nested outputs are put together, what is no row stays one."""
    net = Wide(checkpointed=False).to(small_gpu).eval()
    sequences = torch.randn(512, 256, 16, device=small_gpu)  # 2 GiB for a hidden layer
    mask = torch.ones(1, 256, device=small_gpu)
    guard = oom_guard()
    with torch.no_grad():
        found = guard.chunked(net)(sequences, mask)
        expected = torch.cat([net(part, mask)["logits"] for part in sequences.split(64)])
    assert guard.report is not None
    torch.testing.assert_close(found["logits"], expected, rtol=1e-3, atol=1e-4)
    assert found["rest"][0] is mask
    assert found["rest"][1] == {"n": 2}


def test_batch_along_another_dimension(small_gpu: torch.device) -> None:
    """A real lack of memory with sequences of shape (T, N, F), split along dimension 1."""
    net = nn.LSTM(16, 256, num_layers=2).to(small_gpu)
    sequences = torch.randn(64, 4096, 16, device=small_gpu)
    seen = []
    retry = oom_guard(batch_dim=1).retry(model=net)
    for attempt in retry.attempts(sequences):
        with attempt:
            for part, weight in attempt:
                (net(part)[0].mean() * weight).backward()
                seen.append(tuple(part.shape))
    assert retry.micro_batch_size is not None
    assert {shape[0] for shape in seen} == {64}
    assert sum(shape[1] for shape in seen[-(4096 // retry.micro_batch_size) :]) == 4096


@pytest.mark.parametrize("quiet", [False, True])
def test_no_room_for_the_copy(small_gpu: torch.device, *, quiet: bool) -> None:
    """Where parameters do not fit twice, nothing is changed, nothing is left allocated, and it is said."""
    model = nn.Linear(8192, 16384, bias=False, device=small_gpu)  # 512 MiB
    ballast = torch.empty(LIMIT_BYTES * 6 // 10, dtype=torch.uint8, device=small_gpu)
    guard = oom_guard(reraise=not quiet)
    retry = guard.retry(model=model, copy=True)
    before = torch.cuda.memory_allocated(small_gpu)
    batch = torch.ones(8, 8192, device=small_gpu)

    def attempts() -> int:
        n_attempts = 0
        for attempt in retry.attempts(batch):
            n_attempts += 1
            with attempt:
                for part, _ in attempt:
                    model(part)
        return n_attempts

    if quiet:
        assert attempts() == 0
    else:
        with pytest.raises(OutOfMemoryError):
            attempts()
    assert guard.report is not None
    assert torch.cuda.memory_allocated(small_gpu) - before == batch.nbytes
    del ballast
    assert attempts() == 1


def growing(device: torch.device, index: int) -> None:
    """Take ever more memory than is cached, so that the cache must be given back first."""
    torch.empty(LIMIT_BYTES * 6 // 10 + index * 64 * MIB, dtype=torch.uint8, device=device)


def test_real_thrash_is_answered(small_gpu: torch.device) -> None:
    """When PyTorch must give its cache back in two steps running, a retry says so and splits."""
    retry = oom_guard().retry(model=nn.Linear(1, 1))
    sizes: list[int] = []

    @retry
    def step(attempt: Any) -> None:
        for _ in attempt:
            growing(small_gpu, len(sizes))
        sizes.append(attempt.size)

    with pytest.warns(UserWarning, match="in 2 steps running"):
        _ = [step(torch.zeros(8, device=small_gpu)) for _ in range(4)]
    assert sizes == [8, 8, 8, 4]


def test_real_thrash_is_told(small_gpu: torch.device) -> None:
    """Without a retry, the guard's steps say so."""

    def train() -> None:
        for index in oom_guard().steps(range(4)):
            growing(small_gpu, index)

    with pytest.warns(UserWarning, match="in 2 steps running"):
        train()


class Drawn(Dataset[torch.Tensor]):
    """A dataset that draws a random number for each sample, and waits at the ninth."""

    def __init__(self) -> None:
        self.numbers: list[float] = []
        self.may_go_on, self.has_gone_on = threading.Event(), threading.Event()

    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 8:
            assert self.may_go_on.wait(60)
        number = torch.rand(())
        self.numbers.append(number.item())
        if index == 11:
            self.has_gone_on.set()
        return number


def test_loader_draws_no_number_twice(small_gpu: torch.device) -> None:
    """A step that is tried again does not give the loader's thread numbers that it has had already."""
    dataset = Drawn()
    loader = DeviceLoader(DataLoader(dataset, batch_size=4), small_gpu)
    retry = oom_guard().retry(model=nn.Linear(1, 1))
    for index, batch in enumerate(loader):
        for attempt in retry.attempts(batch):
            with attempt:
                for _ in attempt:
                    if (index, attempt.number) == (0, 1):
                        dataset.may_go_on.set()
                        assert dataset.has_gone_on.wait(60)
                        raise torch.OutOfMemoryError(CUDA)
    assert len(dataset.numbers) == len(set(dataset.numbers)) == 32


def test_frames_of_failed_kernels_hold_nothing(small_gpu: torch.device) -> None:
    """After a failed attempt, whose hooks and checkpoints hold tensors too, as much is free as before."""
    net = Wide(checkpointed=True).to(small_gpu)
    net.first.register_forward_hook(lambda *_: None)
    sequences = torch.randn(1024, 256, 16, device=small_gpu)
    mask = torch.ones(1, 256, device=small_gpu)
    run_one: Callable[[], object] = lambda: net(sequences, mask)["logits"].mean().backward()  # noqa: E731
    before = torch.cuda.memory_allocated(small_gpu)
    for _ in range(3):
        with oom_guard(reraise=False) as guard:
            run_one()
        assert guard.report is not None
        assert torch.cuda.memory_allocated(small_gpu) == before
