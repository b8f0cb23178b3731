"""What DeviceLoader does to batches on a GPU and tells about passes: normalisation, graphs, poison, stats."""

import functools
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from tests.loader_sources import MS
from torchfast import DeviceLoader
from torchfast._loader import normalize

pytestmark = pytest.mark.cuda

SMALL, LARGE = (64, 1024), (64, 8192)


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("comes_channels_last", [False, True])
def test_normalisation_in_one_kernel_is_exact(
    dtype: torch.dtype, *, channels_last: bool, comes_channels_last: bool
) -> None:
    """The kernel gives, bit for bit, what the plain formula gives on the device, in either layout."""
    torch.manual_seed(2)
    images = torch.randint(0, 256, (5, 3, 37, 41), dtype=torch.uint8)
    if comes_channels_last:
        images = images.to(memory_format=torch.channels_last)
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    options: dict[str, Any] = {"image_dtype": dtype, "channels_last": channels_last}
    (normalised,) = DeviceLoader([images], "cuda", normalize=(mean, std), **options)
    assert normalize._launches()  # by Triton's kernel, and not without a word by several
    means, stds = (255 * torch.tensor(numbers, device="cuda").view(1, 3, 1, 1) for numbers in (mean, std))
    assert torch.equal(normalised, ((images.cuda().float() - means) / stds).to(dtype))
    assert normalised.is_contiguous(memory_format=torch.channels_last) is channels_last


def test_images_are_normalised_without_a_compiler_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where Triton cannot build its kernel the values are the same, after one warning."""

    def launch(*_: object) -> None:
        raise RuntimeError("Failed to find C compiler")

    monkeypatch.setattr(normalize, "_launches", functools.cache(lambda: [launch]))
    images = torch.randint(0, 256, (5, 1, 8, 8), dtype=torch.uint8)
    loader = DeviceLoader([images, images], "cuda", normalize=((0.5,), (0.25,)))
    with pytest.warns(RuntimeWarning, match="could not build") as warned:
        first, second = loader
    assert len(warned) == 1
    # By a tensor: a number would be turned into a product with its rounded reciprocal.
    assert torch.equal(first, (images.cuda().float() - 127.5) / torch.tensor(63.75, device="cuda"))
    assert torch.equal(first, second)


def test_a_cuda_graph_reads_each_batch_in_place() -> None:
    """With into= a graph captured once sees every batch in its static input, with the GPU behind."""
    static, total = torch.zeros(LARGE, device="cuda"), torch.zeros((), device="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        total += static.mean()
    total.zero_()
    for batch in DeviceLoader(
        [torch.full(LARGE, float(number)) for number in range(50)], "cuda", into=static
    ):
        assert batch is static
        torch.cuda._sleep(MS)
        graph.replay()
    assert total.item() == sum(range(50))


def test_a_batch_cannot_be_taken_inside_a_capture() -> None:
    """Asking for a batch while a graph is captured is refused, with the way to do it; the pass goes on."""
    batches = iter(DeviceLoader([torch.full(SMALL, float(number)) for number in range(5)], "cuda"))
    graph, static = torch.cuda.CUDAGraph(), torch.zeros(1, device="cuda")
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        static.add_(1)
        with pytest.raises(RuntimeError, match="into=static_batch"):
            next(batches)
    assert [batch.mean().item() for batch in batches] == [0, 1, 2, 3, 4]


def test_poison_shows_a_late_read() -> None:
    """A late read on a stream that was not named finds NaN with poison=True; on a named one, the batch."""
    host = [torch.zeros(LARGE) for _ in range(12)]
    for is_named in (False, True):
        other = torch.cuda.Stream()
        results = []
        loader = DeviceLoader(host, "cuda", poison=True, streams=[other] if is_named else [])
        for batch in loader:
            other.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(other):
                torch.cuda._sleep(40 * MS)
                results.append(batch.isnan().any())
            del batch
        torch.cuda.synchronize()
        assert any(bool(result) for result in results) is not is_named


def test_poison_stays_in_memory_that_it_was_meant_for() -> None:
    """Memory that was to be reused and does not fit is given back only once the poison lies in it."""
    host = [torch.zeros(2**18 * (1 + number % 3)) for number in range(30)]
    loader, kept = DeviceLoader(host, "cuda", poison=True), []
    for batch in loader:
        torch.cuda._sleep(4 * MS)
        kept += [torch.zeros(2**18 * size, device="cuda") for size in (1, 2, 3)]
        del batch
    assert not any(bool(tensor.isnan().any()) for tensor in kept)


def test_statistics_see_a_slow_host() -> None:
    """A loader that is slow to make its batches is found to bound the pass; else the device's work."""

    def slow() -> Iterator[torch.Tensor]:
        for _ in range(12):
            torch.cuda._sleep(0)
            threading.Event().wait(0.02)
            yield torch.zeros(1000)

    loader = DeviceLoader(slow(), "cuda")
    for _ in loader:
        torch.cuda._sleep(MS)
    torch.cuda.synchronize()
    assert loader.stats.verdict == "host-bound"
    loader = DeviceLoader([torch.zeros(1000)] * 30, "cuda")
    for _ in loader:
        torch.cuda._sleep(4 * MS)
    torch.cuda.synchronize()
    # Not the verdict: other processes on this GPU may make a copy late.
    assert loader.stats.stall_s < loader.stats.elapsed_s / 2
    assert loader.stats.n_batches == 30


@pytest.mark.parametrize("device_placement", [True, False])
def test_accelerate_knows_the_last_batch(*, device_placement: bool) -> None:
    """Through a loader that accelerate prepared, the last batch is known as the last."""
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(device_placement=device_placement)
    dataset = TensorDataset(torch.arange(10))
    loader = DeviceLoader(accelerator.prepare(DataLoader(dataset, batch_size=4)), "cuda")
    for _ in range(2):
        ends = []
        for (batch,) in loader:
            assert batch.device.type == "cuda"
            ends.append(accelerator.gradient_state.end_of_dataloader)
        assert ends == [False, False, True]
