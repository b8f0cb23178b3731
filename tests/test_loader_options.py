"""What DeviceLoader does to batches and tells about passes: normalisation, static buffers, stats."""

import itertools
import threading
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from tests.loader_transport import computing_with, threaded
from torchfast import DeviceLoader
from torchfast._loader import normalize
from torchfast._loader.cpus import chosen_threads
from torchfast._loader.events import Gate
from torchfast._loader.late import copied, pinned, record_use
from torchfast._loader.plan import empty, separated
from torchfast._loader.plans import Plans
from torchfast._loader.staging import team_size
from torchfast._loader.stats import LoaderStats, Moment, Tally

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def plain_formula(images: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Normalise as written: (x - 255 * mean) / (255 * std)."""
    mean, std = (
        255 * torch.tensor(numbers, device=images.device).view(1, 3, 1, 1) for numbers in (MEAN, STD)
    )
    return ((images.float() - mean) / std).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("channels_last", [False, True])
def test_normalisation_is_the_plain_formula_bit_for_bit(dtype: torch.dtype, *, channels_last: bool) -> None:
    """All 256 values of each channel come out as by the formula, in the layout asked for."""
    images = torch.arange(256, dtype=torch.uint8).repeat(2 * 3).view(2, 3, 16, 16)
    loader = DeviceLoader(
        [(images, 7)], "cpu", normalize=(MEAN, STD), image_dtype=dtype, channels_last=channels_last
    )
    ((normalised, label),) = loader
    assert torch.equal(normalised, plain_formula(images, dtype))
    assert normalised.is_contiguous(memory_format=torch.channels_last) is channels_last
    assert label == 7


def test_normalisation_does_not_depend_on_the_default_dtype() -> None:
    """Means and stds are float32, whatever type new tensors have."""
    images = torch.arange(256, dtype=torch.uint8).repeat(3).view(1, 3, 16, 16)
    try:
        torch.set_default_dtype(torch.bfloat16)
        loader = DeviceLoader([images], "cpu", normalize=(MEAN, STD))
    finally:
        torch.set_default_dtype(torch.float32)
    (normalised,) = loader
    assert torch.equal(normalised, plain_formula(images, torch.float32))


def test_images_of_many_channels_and_expanded_ones_are_normalised_too() -> None:
    """As many channels as there are means make an image, in whatever memory."""
    images = torch.arange(17, dtype=torch.uint8).view(1, 17, 1, 1).repeat(2, 1, 32, 32)
    numbers = [0.5] * 17
    (normalised,) = DeviceLoader([images], "cpu", normalize=(numbers, numbers))
    assert torch.equal(normalised, (images.float() - 127.5) / 127.5)
    gray = torch.arange(16, dtype=torch.uint8).view(1, 1, 4, 4).expand(2, 3, 4, 4)
    (normalised,) = DeviceLoader([gray], "cpu", normalize=(MEAN, STD))
    assert torch.equal(normalised, plain_formula(gray, torch.float32))


def test_only_uint8_images_of_as_many_channels_are_normalised() -> None:
    """Masks, float images and images with other channels are left alone."""
    others = [
        torch.zeros(2, 1, 8, 8, dtype=torch.uint8),
        torch.zeros(2, 3, 8, 8),
        torch.zeros(2, 3, dtype=torch.uint8),
    ]
    images = torch.zeros(2, 3, 8, 8, dtype=torch.uint8)
    ((normalised, *arrived),) = DeviceLoader([[images, *others]], "cpu", normalize=(MEAN, STD))
    assert normalised.dtype is torch.float32
    assert all(there is other for there, other in zip(arrived, others, strict=True))


def test_batches_are_copied_into_static_tensors() -> None:
    """Every batch is yielded in the same tensors, around its own metadata."""
    static = {"image": torch.zeros(2, 3), "label": torch.zeros(2, dtype=torch.long)}
    batches = [
        {"image": torch.full((2, 3), float(k)), "label": torch.tensor([k, k]), "name": str(k)}
        for k in range(3)
    ]
    for k, batch in enumerate(DeviceLoader([*batches], "cpu", into=static)):
        assert batch["image"] is static["image"]
        assert batch["label"] is static["label"]
        assert static["image"].tolist() == [[k] * 3] * 2
        assert batch["name"] == str(k)


def test_static_tensors_join_no_graph() -> None:
    """A batch that a transform computed by parameters leaves its values there, and not its graph."""
    weight, static = torch.full((2,), 3.0, requires_grad=True), torch.zeros(2)
    loader = DeviceLoader([torch.ones(2)] * 2, "cpu", transform=lambda batch: batch * weight, into=static)
    for batch in loader:
        assert batch is static
        assert (static.tolist(), static.requires_grad) == ([3, 3], False)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_are_named_where_they_do_not_fit(layout: torch.layout) -> None:
    """They have no shape to tell, which is no reason for an error of another kind."""
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)], layout=layout)
    for option in ({"normalize": (MEAN, STD)}, {"into": torch.zeros(3)}):
        with pytest.raises(ValueError, match=r"nested torch\.float32"):
            next(iter(DeviceLoader([nested], "cpu", **option)))
    with pytest.raises(ValueError, match=r"nested torch\.float32, not each of which"):
        DeviceLoader([nested], "cpu", into=nested)


def test_what_moves_by_itself_is_kept_in_a_copy_of_its_own() -> None:
    """A sequence, an object with a clone and one without: none changes when the loader writes on."""

    class Plain:
        def __init__(self, numbers: torch.Tensor) -> None:
            self.numbers = numbers

        def to(self, _: torch.device) -> "Plain":
            return self

    class Clonable(Plain):
        def clone(self) -> "Clonable":
            return Clonable(self.numbers.clone())

    numbers = torch.zeros(3)
    sequence = pack_sequence([numbers])
    sequence = PackedSequence(numbers, sequence.batch_sizes)
    leaves: list[Any] = [numbers, sequence, Clonable(numbers), Plain(numbers)]
    kept = [copied(leaf) for leaf in leaves]
    numbers.fill_(7)
    assert kept[0].tolist() == kept[1].data.tolist() == [0] * 3
    assert isinstance(kept[1], PackedSequence)
    assert kept[2].numbers.tolist() == kept[3].numbers.tolist() == [0] * 3


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors", "ignore:Sparse CSR")
def test_all_that_a_tensor_consists_of_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The allocator is told of each part of nested and sparse tensors, and of plain ones in a sequence."""
    recorded: list[int] = []
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda part, _: recorded.append(part.data_ptr()))
    stream: Any = None
    rows, offsets, lengths = torch.ones(6), torch.tensor([0, 2, 6]), torch.tensor([1, 4])
    nested = torch.nested.nested_tensor([torch.ones(2), torch.ones(3)])
    jagged = torch.nested.nested_tensor_from_jagged(rows, offsets)
    holey = torch.nested.nested_tensor_from_jagged(rows, offsets, lengths)
    pairs, csr = torch.eye(3).to_sparse(), torch.eye(3).to_sparse_csr()
    packed = pack_sequence([torch.ones(2), torch.ones(1)])
    for leaf, parts in (
        (rows, [rows]),
        (nested, [nested.values()]),
        (jagged, [rows, offsets]),
        (holey, [rows, offsets, lengths]),
        (pairs, [pairs._indices(), pairs._values()]),
        (csr, [csr.crow_indices(), csr.col_indices(), csr.values()]),
        (packed, [packed.data, packed.batch_sizes]),
    ):
        recorded.clear()
        record_use(leaf, stream)
        assert recorded == [part.data_ptr() for part in parts]


class Pinnable:
    """An object that can be pinned, and says whether it was."""

    def __init__(self, *, is_pinned: bool = False) -> None:
        self.is_pinned = is_pinned

    def pin_memory(self) -> "Pinnable":
        """Return it in pinned memory."""
        return Pinnable(is_pinned=True)


def test_what_can_be_pinned_is_pinned() -> None:
    """An object that knows how is asked to pin itself; one that does not stays the same, as on a device."""
    plain, on_device = object(), torch.zeros(3, device="meta")
    assert pinned(Pinnable()).is_pinned
    assert pinned(plain) is plain
    assert pinned(on_device) is on_device


def test_a_batch_that_found_no_room_on_the_device_is_not_lost() -> None:
    """Out of memory in a transform leaves the batch first in line, as it does in the transfer."""
    errors = [torch.OutOfMemoryError("full")]

    def transform(batch: int) -> int:
        if errors:
            raise errors.pop()
        return batch

    batches = iter(DeviceLoader([1, 2, 3], "cpu", transform=transform))
    with pytest.raises(torch.OutOfMemoryError):
        next(batches)
    assert list(batches) == [1, 2, 3]


# --- statistics ------------------------------------------------------------------------------------------


def stats(**changed: Any) -> LoaderStats:
    """Return the record of a pass of 11 batches that took a second."""
    times = {"elapsed_s": 1.0, "load_s": 0.1, "stage_s": 0.1, "copy_s": 0.2, "stall_s": 0.0, "wait_s": 0.0}
    times["stall_copy_s"] = 0.0
    return LoaderStats(n_batches=11, n_bytes=10**9, **{**times, **changed})


@pytest.mark.parametrize(
    ("changed", "verdict"),
    [
        ({}, "compute-bound"),
        ({"stall_s": 0.5, "copy_s": 0.9}, "transfer-bound"),
        ({"stall_s": 0.5, "load_s": 0.9}, "host-bound"),
        ({"elapsed_s": 0.0}, "unknown"),
    ],
)
def test_the_verdict_names_what_bounds_the_pass(changed: dict[str, float], verdict: str) -> None:
    """A device that never waits is bound by its work; one that waits, by copying or by loading."""
    assert stats(**changed).verdict == verdict
    assert (verdict in repr(stats(**changed))) is (verdict != "unknown")
    assert ("overlap" in repr(stats(**changed))) is (verdict != "unknown")


@given(st.tuples(*[st.floats(0.01, 10)] * 3))
def test_overlap_efficiency_runs_from_the_sum_to_the_longest(parts: tuple[float, float, float]) -> None:
    """Hiding nothing is 0, hiding all that can be hidden is 1, and it never leaves that range."""
    work_s, copy_s, load_s = parts
    for elapsed_s, efficiency in ((sum(parts), 0.0), (max(parts), 1.0)):
        found = stats(
            elapsed_s=elapsed_s, stall_s=elapsed_s - work_s, copy_s=copy_s, load_s=load_s, stage_s=0.0
        ).overlap_efficiency
        is_nothing_to_hide = sum(parts) - max(parts) <= 0.01 * sum(parts)
        assert found == pytest.approx(1.0 if is_nothing_to_hide else efficiency, abs=1e-6)


class At:
    """An event that the device passed at a certain time."""

    def __init__(self, ms: float) -> None:
        self.ms = ms

    def query(self) -> bool:
        """Say that it was passed."""
        return True

    def elapsed_time(self, other: "At") -> float:
        """Return the time from this event to another."""
        return other.ms - self.ms


def moment(asked: At, there: At, spans: Any, n_bytes: int, *, is_needed: bool = True) -> Moment:
    """Return what is noted of a batch, of events of the imagination."""
    events: Any = (asked, there)
    return Moment(Gate(events[0], is_needed=is_needed), events[1], spans, n_bytes)


@pytest.mark.parametrize(
    ("spans", "stall_copy_ms"),
    [
        ([], 0),
        ([(1, 3)], 0),  # over before it was asked for
        ([(8, 14)], 4),
        ([(12, 14), (17, 21)], 5),  # staged in pieces; the end of the last is what was waited for
        ([(4, 30)], 10),
    ],
)
def test_waiting_for_a_copy_is_told_from_waiting_for_the_host(
    spans: list[tuple[float, float]], stall_copy_ms: float
) -> None:
    """The device stood from 10 to 20 ms: for the copy as long as that was under way, else for the host."""
    tally: Any = Tally()
    tally.moments.append(moment(At(0), At(1), [], 0))
    copies: Any = [(At(began), At(ended)) for began, ended in spans]
    tally.moments.append(moment(At(10), At(20), copies, 1))
    found = tally.stats()
    assert (found.stall_s, found.stall_copy_s) == (pytest.approx(0.01), pytest.approx(stall_copy_ms / 1e3))
    assert found.copy_s == pytest.approx(sum(ended - began for began, ended in spans) / 1e3)


@pytest.mark.parametrize("is_there_at_once", [True, False])
@pytest.mark.parametrize("is_needed", [True, False])
def test_events_are_recorded_again_that_nobody_needs(*, is_needed: bool, is_there_at_once: bool) -> None:
    """Each once: not where a copy still has to wait for it, nor where its batch is not known to be there."""
    tally: Any = Tally()
    first, asked, began, ended = At(0), At(10), At(5), At(9)
    there = asked if is_there_at_once else At(20)
    tally.moments.append(moment(first, first, [], 0))
    tally.moments.append(moment(asked, there, [(began, ended)], 1, is_needed=is_needed))
    found = tally.stats()
    (counted,) = tally.take_counted()
    idle = {began, ended, *[asked] * (not is_needed), *[there] * (not is_there_at_once)}
    assert counted.reusable() == idle
    assert found.elapsed_s == pytest.approx(0.01 if is_there_at_once else 0.02)
    vars(there).clear()
    assert tally.stats() == found  # which asks no event again: the driver may be gone
    assert not tally.take_counted()
    assert found.stall_s == (0.0 if is_there_at_once else pytest.approx(0.01))


def test_a_pass_on_the_cpu_is_counted_too() -> None:
    """Without a device clock, what the loop waits for is what the loader takes."""
    loader = DeviceLoader(range(5), "cpu")
    assert loader.stats.verdict == "unknown"
    assert "5 batches" not in repr(loader)
    list(loader)
    assert loader.stats.n_batches == 5
    assert loader.stats.stall_s == loader.stats.wait_s <= loader.stats.elapsed_s
    assert "LoaderStats" in repr(loader)
    assert "overlap" not in repr(loader)


# --- packing ---------------------------------------------------------------------------------------------


@given(st.data())
def test_packed_leaves_arrive_whole(data: st.DataObject) -> None:
    """Leaves of any type, shape and stride laid into one buffer stay equal, aligned and apart."""
    shapes = st.lists(st.integers(0, 5), max_size=4)
    types = st.sampled_from(
        [torch.float32, torch.bfloat16, torch.int64, torch.uint8, torch.bool, torch.complex64]
    )
    kinds = st.lists(st.tuples(shapes, types), min_size=1, max_size=8)
    all_alike = st.integers(1, 8).map(lambda n: [([2, 4, 16, 4], torch.float32)] * n)  # 512 bytes: no gaps
    leaves = []
    for shape, dtype in data.draw(kinds | all_alike):
        leaf = (torch.rand(shape) * 100).to(dtype)
        leaves.append(
            leaf.transpose(0, -1)[..., ::2] if len(shape) > 1 and data.draw(st.booleans()) else leaf
        )
    plan = Plans().plan(leaves)
    copies = list(itertools.chain(*plan.packed_on(empty(plan.buffer_layouts[0], torch.device("cpu")))))
    places = [index for group in plan.groups for index in group.indexes]
    assert sorted(places) == list(range(len(leaves)))
    for index, copy in zip(places, copies, strict=True):
        copy.copy_(leaves[index])
    for index, copy in zip(places, copies, strict=True):
        assert copy.dtype == leaves[index].dtype
        assert torch.equal(copy, leaves[index])
        assert copy.storage_offset() * copy.element_size() % 512 == 0
        version = copy._version
        copies[0].zero_() if copy is not copies[0] else None
        assert copy._version == version


def test_packed_tensors_are_no_views(monkeypatch: pytest.MonkeyPatch) -> None:
    """Changing one in place counts as no change of another, with PyTorch's private guard and without it."""
    assert hasattr(torch._C, "_AutoDispatchBelowADInplaceOrView"), "gone: `.data` takes twice as long"
    for _ in range(2):
        first, second = separated(torch.zeros(2, 3))
        first.add_(1)
        assert (first._version, second._version) == (1, 0)
        assert first._base is None
        assert not first.requires_grad
        assert (torch.ones(3, requires_grad=True) * second).requires_grad
        monkeypatch.delattr(torch._C, "_AutoDispatchBelowADInplaceOrView", raising=False)


def test_staging_leaves_cores_to_workers_and_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    """The team of a host copy is what workers, the loop and other processes of the machine leave over."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    assert [team_size(n_workers) for n_workers in (0, 1, 8, 32)] == [14, 13, 6, 1]
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert team_size(0) == 2


def test_the_thread_that_pins_does_not_choose_for_the_loop() -> None:
    """PyTorch's own sets its number of threads to 1, which is also that of all that never asked."""

    def number_in_the_loop() -> int:
        DeviceLoader([], "cpu")
        pinning = threading.Thread(target=torch.set_num_threads, args=(1,))
        pinning.start()
        pinning.join()
        return torch.get_num_threads()

    with computing_with(3), ThreadPoolExecutor(1) as other:
        assert other.submit(number_in_the_loop).result() == 3


def test_torchruns_one_thread_is_nobodys_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    """A number of threads that somebody set is kept; the 1 of torchrun stands for the CPUs of this rank."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: range(16))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert chosen_threads() == 1
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert chosen_threads() == 1
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert chosen_threads() == 8
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "100")
    assert chosen_threads() == 1
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert chosen_threads() == 3


def test_a_transform_may_take_further_batches() -> None:
    """One that mixes two batches takes the second itself, and each comes once."""

    def pair(number: int) -> Any:
        return (number, next(batches)) if number % 2 == 0 else number

    batches = iter(threaded(range(6), transform=pair))
    assert list(batches) == [(0, 1), (2, 3), (4, 5)]


@pytest.mark.parametrize("fails_at", [0, 1, 2, 3])
@pytest.mark.parametrize("is_late", [False, True], ids=["before it takes more", "after it took more"])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_transform_that_takes_further_batches_loses_none(
    error: type[BaseException], fails_at: int, *, is_late: bool
) -> None:
    """Where one that was called inside another, or the outer one, cannot finish, all come again, in order."""
    to_fail = [fails_at]

    def group(number: int) -> Any:
        if [number] == to_fail and not is_late:
            raise error(to_fail.pop())
        taken = (number, next(batches), next(batches)) if number % 3 == 0 else number
        if [number] == to_fail:
            raise error(to_fail.pop())
        return taken

    batches = iter(threaded(range(9), transform=group))
    groups = list[Any]()
    while len(groups) < 3:
        try:
            groups.append(next(batches))
        except error:
            assert to_fail == []
    assert groups == [(0, 1, 2), (3, 4, 5), (6, 7, 8)]
    with pytest.raises(StopIteration):
        next(batches)


def test_streams_and_numbers_may_come_from_anywhere() -> None:
    """Options that are read once are kept: a generator, a number of numpy's."""
    numpy = pytest.importorskip("numpy")
    options: dict[str, Any] = {"normalize": ((0.5,) for _ in range(2)), "streams": iter(())}
    loader = DeviceLoader([], "cpu", depth=numpy.int64(3), **options)
    assert repr(loader) == (
        "DeviceLoader(list, device='cpu', depth=3, normalize=((0.5,), (0.5,)), image_dtype=torch.float32)"
    )


@pytest.mark.usefixtures("_no_compiler")
def test_a_kernel_that_cannot_be_built_holds_nothing() -> None:
    """That it failed is remembered for the life of the process: not with the batch, nor the loop's frame."""
    images = torch.zeros(1, 3, 4, 4, dtype=torch.uint8)
    alive = weakref.ref(images)
    with pytest.warns(RuntimeWarning, match="Triton"):
        assert not normalize._in_one_kernel(images, torch.empty(1, 3, 4, 4), torch.empty(3, 256))
    assert not normalize._launches()
    del images
    assert alive() is None


def test_an_error_of_a_transform_that_closed_its_pass_is_its_own() -> None:
    """Whatever a transform does to its pass, its error is not hidden by one of ours."""

    def close_and_fail(batch: int) -> int:
        loader.close()
        raise LookupError(f"batch {batch}")

    loader = threaded(range(6), transform=close_and_fail)
    with pytest.raises(LookupError, match="batch 0"):
        next(iter(loader))
