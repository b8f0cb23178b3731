"""DeviceLoader on a GPU where a loader is unusual: its own CUDA tensors, objects that move, errors, forks."""

import gc
import itertools
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.nn.utils.rnn import PackedSequence
from torch.utils.data import DataLoader, Dataset

from tests.loader_sources import MS
from torchfast import DeviceLoader

pytestmark = pytest.mark.cuda

N_BATCHES, N_ROWS = 60, 2**18


def as_sequence(rows: torch.Tensor) -> PackedSequence:
    """Return a packed sequence of two steps that lies on these rows."""
    return PackedSequence(rows, torch.tensor([N_ROWS // 2, N_ROWS // 2], device="cpu"))


def as_sparse(rows: torch.Tensor) -> torch.Tensor:
    """Return a sparse tensor with these values."""
    indices = torch.arange(N_ROWS, device=rows.device)[None]
    return torch.sparse_coo_tensor(indices, rows, (N_ROWS,), is_coalesced=True)


def as_jagged(rows: torch.Tensor) -> torch.Tensor:
    """Return a nested tensor whose offsets tell the number."""
    return torch.nested.nested_tensor_from_jagged(torch.zeros(1, device=rows.device), offsets=rows.long())


KINDS: dict[str, tuple[Callable[[torch.Tensor], Any], Callable[[Any], torch.Tensor]]] = {
    "tensor": (lambda rows: rows, lambda batch: batch),
    "sequence": (as_sequence, lambda batch: batch.data),
    "sparse": (as_sparse, lambda batch: batch._values()),
    "jagged": (as_jagged, lambda batch: batch.offsets()),
}


def made_on_the_gpu(make: Callable[[torch.Tensor], Any]) -> Iterator[Any]:
    """Make numbered batches on the GPU, in the loader."""
    for number in range(N_BATCHES):
        yield make(torch.full((N_ROWS,), float(number), device="cuda"))


def wrong_on_another_stream(kind: str, *, is_named: bool) -> int:
    """Count wrong batches on a stream on which the pass did not begin: the consumer's own, or a named one."""
    make, rows_of = KINDS[kind]
    other = torch.cuda.Stream()
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    numbers = itertools.count()
    torch.cuda.synchronize()
    loader = DeviceLoader(made_on_the_gpu(make), "cuda", streams=[other] if is_named else [])
    batches = iter(loader)
    while True:
        with torch.cuda.stream(torch.cuda.current_stream() if is_named else other):
            batch = next(batches, None)
        if batch is None:
            break
        if is_named:
            other.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(other):
            torch.cuda._sleep(4 * MS)
            wrong += (rows_of(batch) != next(numbers)).any()
        del batch
    torch.cuda.synchronize()
    assert next(numbers) == N_BATCHES
    return int(wrong)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks are implicitly disabled")
@pytest.mark.parametrize("is_named", [False, True], ids=["the consumer's stream", "a named stream"])
@pytest.mark.parametrize("kind", KINDS)
def test_what_the_loader_makes_on_the_gpu_is_safe_on_other_streams(kind: str, *, is_named: bool) -> None:
    """CUDA tensors that the loader makes are whole where the consumer changed streams, and on named ones."""
    assert wrong_on_another_stream(kind, is_named=is_named) == 0


def test_the_count_on_another_stream_can_see_a_race(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without telling the allocator of the other stream, the same count finds wrong batches."""
    monkeypatch.setattr("torchfast._loader.transport.record_use", lambda *_: None)
    assert wrong_on_another_stream("tensor", is_named=False) > 0


def test_a_sequence_in_a_buffer_that_is_used_again_arrives_whole() -> None:
    """A loader that writes each sequence into the same memory loses none of them, with the GPU behind."""
    buffer = torch.empty(N_ROWS, pin_memory=True)
    source = (as_sequence(buffer.fill_(float(number))) for number in range(N_BATCHES))
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    numbers = itertools.count()
    for batch in DeviceLoader(source, "cuda", depth=4):
        torch.cuda._sleep(2 * MS)
        wrong += (batch.data != next(numbers)).any()
        del batch
    assert int(wrong) == 0
    assert next(numbers) == N_BATCHES


def test_a_batch_without_room_is_counted_once() -> None:
    """A batch that found no room when it was to be handed out, twice, is one batch in the statistics."""
    torch.cuda.empty_cache()
    large = torch.full((64 * 2**20,), 7.0)  # 256 MiB
    loader = DeviceLoader([torch.zeros(3), torch.zeros(3), large, torch.ones(3)], "cuda")
    batches = iter(loader)
    total_bytes = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + 64 * 2**20) / total_bytes)
    try:
        next(batches), next(batches)
        for _ in range(2):
            with pytest.raises(torch.OutOfMemoryError):
                next(batches)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert len(list(batches)) == 2
    torch.cuda.synchronize()
    assert loader.stats.n_batches == 4


@pytest.mark.usefixtures("deterministic")
def test_deterministic_mode_fills_no_memory_twice() -> None:
    """Memory that a copy fills is not filled before, also where PyTorch fills what `empty` returns."""
    host = [torch.full((N_ROWS,), float(number)) for number in range(8)]
    batches = iter(DeviceLoader(host, "cuda"))
    next(batches), next(batches)
    on_host = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=on_host, record_shapes=True, acc_events=True) as trace:
        torch.empty(7, device="cuda")
        arrived = list(batches)
    filled = [event.input_shapes[0] for event in trace.events() if event.name == "aten::fill_"]
    assert [shape for shape in filled if shape != [0]] == [[7]]
    assert [batch[0].item() for batch in arrived] == [2, 3, 4, 5, 6, 7]


def test_static_tensors_elsewhere_are_refused_at_once() -> None:
    """Static tensors on the host are refused when the loader is made, before any batch is taken."""
    with pytest.raises(ValueError, match="into= holds tensors on cpu"):
        DeviceLoader([torch.zeros(3)], "cuda", into=torch.zeros(3))


def test_a_loader_that_computes_does_so_under_the_loops_autocast() -> None:
    """What a loader computes on the GPU has the type that it would have in the bare loop."""

    def products() -> Iterator[torch.Tensor]:
        for _ in range(3):
            yield torch.ones(4, 4) @ torch.ones(4, 4)

    with torch.autocast("cuda", torch.bfloat16), torch.device("cuda"):
        ours, bare = list(DeviceLoader(products())), list(products())
    assert [(batch.dtype, batch.device) for batch in ours] == [(batch.dtype, batch.device) for batch in bare]
    assert ours[0].dtype == torch.bfloat16


class Collecting(Dataset[int]):
    """Collects garbage in its worker."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        gc.collect()
        return index


def test_workers_survive_the_events_in_this_process_s_garbage() -> None:
    """CUDA events in garbage that workers are forked with do not end them."""

    class Knot:
        def __init__(self) -> None:
            self.itself = self
            self.event = torch.cuda.Event()
            self.event.record()

    gc.collect()
    gc.disable()
    try:
        Knot()
        assert [int(batch) for batch in DeviceLoader(DataLoader(Collecting(), num_workers=2), "cuda")] == [
            0,
            1,
            2,
            3,
        ]
    finally:
        gc.enable()


def test_one_stream_for_life(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loader makes one stream of its own, however many passes are made, left early or begun anew."""
    made: list[torch.cuda.Stream] = []
    make = torch.cuda.Stream

    def counting(*arguments: Any, **options: Any) -> torch.cuda.Stream:
        made.append(make(*arguments, **options))
        return made[-1]

    monkeypatch.setattr(torch.cuda, "Stream", counting)
    loader = DeviceLoader([torch.zeros(3)] * 5, "cuda")
    for _ in range(4):
        next(iter(loader))
        assert len(list(loader)) == 5
    own = {stream.cuda_stream for stream in made} - {torch.cuda.current_stream().cuda_stream}
    assert len(own) == 1


def test_a_pass_that_only_copies_is_bound_by_the_transfer() -> None:
    """Large pinned batches and a step that does next to nothing: the link is what to save."""
    host = [torch.zeros(16 * 2**20, pin_memory=True)] * 30
    loader = DeviceLoader(host, "cuda")
    for batch in loader:
        batch.add_(1)
    torch.cuda.synchronize()
    assert loader.stats.verdict == "transfer-bound"
    assert loader.stats.n_bytes == 29 * 64 * 2**20
    assert "fewer bytes" in repr(loader)
