"""Batches of workers whose small tensors travel in one piece: the same batches, and fewer handles."""

import pickle
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import DataLoader, Dataset, IterableDataset

from tests.loader_transport import threaded
from tests.strategies import Sample, batches
from tests.test_tree import same
from torchfast._loader import bundle
from torchfast._loader.bundle import COPY_BELOW_BYTES, COPY_SHARED_BELOW_BYTES, INLINE_BYTES, Bundle
from torchfast._loader.shared_memory import mapped_again
from torchfast._loader.wrapped import begun_for_gpu
from torchfast._tree import flatten, tensors


def sent(batch: Any) -> Any:
    """Return a batch as it comes out of the pipe of a worker."""
    return ForkingPickler.loads(ForkingPickler.dumps(Bundle(batch)))


def is_equal(left: Any, right: Any) -> bool:
    """Whether two batches have the same types and contents, and tensors that are equal."""
    numbers = range(len(tensors(left)))
    return (
        len(tensors(left)) == len(tensors(right))
        and all(map(torch.equal, tensors(left), tensors(right)))
        and same(flatten(left)[1].rebuild(numbers), flatten(right)[1].rebuild(numbers))
    )


@given(batch=batches())
def test_any_batch_arrives_as_it_was_sent(batch: Any) -> None:
    """Whatever it consists of, and however nested."""
    assert is_equal(sent(batch), batch)


@given(data=st.data())
def test_tensors_arrive_with_their_layout(data: st.DataObject) -> None:
    """Each of several, whatever its type, shape and dense strides, inline or in shared memory."""
    dtypes = [torch.bool, torch.int16, torch.bfloat16, torch.float64, torch.complex64, torch.float8_e4m3fn]
    batch = []
    for _ in range(data.draw(st.integers(1, 6))):
        shape = data.draw(st.lists(st.integers(0, 12), max_size=4))
        order = data.draw(st.permutations(range(len(shape))))
        whole = torch.randint(0, 2, shape).to(data.draw(st.sampled_from(dtypes)))
        batch.append(whole.permute(order) if order else whole)
    for found, expected in zip(sent(batch), batch, strict=True):
        assert (found.dtype, found.shape, found.stride()) == (
            expected.dtype,
            expected.shape,
            expected.stride() if expected.numel() else found.stride(),
        )
        assert torch.equal(found.to(torch.complex128), expected.to(torch.complex128))


DTYPES = {dtype for name, dtype in vars(torch).items() if isinstance(dtype, torch.dtype) and name[0] != "q"}


@pytest.mark.parametrize("dtype", sorted(DTYPES, key=str), ids=str)
@pytest.mark.filterwarnings("ignore:B?Complex(Half|32) support is experimental")
def test_every_type_of_tensor_travels(dtype: torch.dtype) -> None:
    """Also those that PyTorch can hardly do anything with; quantized ones are about to go."""
    whole = torch.zeros(16, dtype=torch.uint8)
    (found,) = sent([torch.empty(0, dtype=dtype).set_(whole.untyped_storage(), 0, (1,), (1,))])
    assert (found.dtype, found.shape) == (dtype, (1,))


def test_a_part_of_a_tensor_travels_without_the_rest() -> None:
    """Of a view only what it shows is sent, dense as a `.to` to the device would make it."""
    whole = torch.arange(1_000_000).share_memory_()
    part, row = sent((whole[10:40:3], torch.ones(3, 1).expand(3, 4)))
    assert part.tolist() == list(range(10, 40, 3))
    assert part.untyped_storage().nbytes() < INLINE_BYTES
    assert row.tolist() == [[1.0] * 4] * 3
    assert row.is_contiguous()


def test_large_memory_that_may_be_moved_is_not_read() -> None:
    """A small view of it goes as PyTorch sends it, until it is shared: another thread may just be at that."""
    whole = torch.arange(1_000_000)
    assert copied([whole, whole[:3]]) == [False, False]
    found = sent([whole, whole[:3]])
    assert found[1].untyped_storage().data_ptr() == found[0].untyped_storage().data_ptr()
    assert whole.is_shared()
    assert copied([whole, whole[:3]]) == [False, True]


def test_small_memory_is_never_moved_later() -> None:
    """Where a large tensor shows it, it is shared at once: the next batch may be read from it meanwhile."""
    mask = torch.full((100_000,), 7.0)
    (found,) = sent([mask.expand(50, -1)])
    assert mask.is_shared()
    assert found.shape == (50, 100_000)
    assert found.untyped_storage().nbytes() == mask.nbytes


@pytest.mark.parametrize("n_bytes", [COPY_SHARED_BELOW_BYTES - 1, COPY_SHARED_BELOW_BYTES])
def test_what_is_shared_already_is_copied_below_a_lower_limit(n_bytes: int) -> None:
    """Copying it spares a handle and nothing else; what is not shared would be copied in any case."""
    alone = torch.ones(n_bytes, dtype=torch.uint8)
    assert copied([alone, alone.clone().share_memory_()]) == [True, n_bytes < COPY_SHARED_BELOW_BYTES]


def copied(batch: list[torch.Tensor]) -> list[bool]:
    """Return which tensors of a batch are copied into its bundle."""
    return [tensor is None for tensor in Bundle(batch)._parts[-1]]


def test_aliases_stay_and_neighbours_do_not_count_as_one() -> None:
    """A tensor that occurs twice is one; changing one in place is no change of another."""
    one, other = torch.ones(3, requires_grad=False), torch.ones(3)
    first, second, again = sent([one, other, one])
    assert first is again
    weight = torch.ones(3, requires_grad=True)
    loss = (weight * second).sum()
    first.add_(1)
    assert first.tolist() == [2.0] * 3
    assert torch.equal(torch.autograd.grad(loss, weight)[0], torch.ones(3))


def test_large_tensors_and_unusual_ones_travel_as_by_pytorch() -> None:
    """Large memory is shared and not copied; what is not plain knows itself how it is sent."""
    large = torch.arange(COPY_BELOW_BYTES // 8)
    found = sent({"large": large, "parameter": torch.nn.Parameter(torch.ones(2)), "name": "x"})
    assert torch.equal(found["large"], large)
    large[0] = 7  # the memory was handed over, and is that of the sender still
    assert found["large"][0] == 7
    assert mapped_again(found["large"]) is not None
    assert isinstance(found["parameter"], torch.nn.Parameter)


def test_tensors_inside_of_objects_are_gathered_too() -> None:
    """However deep: in sequences that move themselves, in objects that only pickle knows."""
    sequences = pack_sequence([torch.ones(3), torch.ones(2)])
    found_sequences, found = sent((sequences, Opaque(torch.arange(5))))
    assert isinstance(found_sequences, PackedSequence)
    assert torch.equal(found_sequences.data, sequences.data)
    assert found.hidden.tolist() == [0, 1, 2, 3, 4]
    assert found.hidden.untyped_storage().data_ptr() == found_sequences.data.untyped_storage().data_ptr()


class Opaque:
    """An object whose tensors no walk over batches would find."""

    def __init__(self, hidden: torch.Tensor) -> None:
        self.hidden = hidden


@pytest.mark.parametrize("n_elements", [1, INLINE_BYTES])
def test_small_tensors_take_one_handle_or_none(n_elements: int) -> None:
    """A few bytes go through the pipe; more lie in one piece of shared memory."""
    found = sent([torch.full((n_elements,), number, dtype=torch.int16) for number in range(8)])
    assert len({leaf.untyped_storage().data_ptr() for leaf in found}) == 1
    assert [leaf.is_shared() for leaf in found] == [n_elements > 1] * 8
    assert [int(leaf[-1]) for leaf in found] == list(range(8))


def test_shared_memory_is_made_by_pytorch_or_by_sending(monkeypatch: pytest.MonkeyPatch) -> None:
    """With PyTorch's private call, and without it."""
    batch = [torch.arange(INLINE_BYTES), torch.arange(3)]
    assert hasattr(torch.UntypedStorage, "_new_shared"), "gone: bundles are copied once more"
    assert bundle._shared(5).is_shared()
    assert is_equal(sent(batch), batch)
    monkeypatch.delattr(torch.storage._StorageBase, "_new_shared")
    assert not bundle._shared(5).is_shared()
    assert is_equal(sent(batch), batch)


@pytest.mark.parametrize("n_elements", [3, COPY_BELOW_BYTES])
def test_the_pickle_of_a_bundle_can_be_read_in_no_other_way(n_elements: int) -> None:
    """Its tensors lie beside it, which is said."""
    skeleton, *_ = Bundle([torch.ones(n_elements)])._parts
    with pytest.raises(pickle.UnpicklingError, match="tensor 0 of a batch lies beside its pickle"):
        pickle.loads(skeleton)  # noqa: S301 - our own


class Reusing(Dataset[Any]):
    """Hands out the same tensors each time, with another number in them."""

    def __init__(self) -> None:
        self.tensors = [torch.empty(40), torch.empty(5000)]

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> Any:
        return Sample([tensor.fill_(float(index)) for tensor in self.tensors], name=str(index))


class Streaming(IterableDataset[Any]):
    """Yields the same as `Reusing`."""

    def __iter__(self) -> Iterator[Any]:
        source = Reusing()
        return (source[index] for index in range(len(source)))


WAYS: dict[str, Callable[[], DataLoader[Any]]] = {
    "fork": lambda: DataLoader(Reusing(), None, num_workers=2, multiprocessing_context="fork"),
    "spawn": lambda: DataLoader(Reusing(), None, num_workers=1, multiprocessing_context="spawn"),
    "iterable": lambda: DataLoader(Streaming(), None, num_workers=1),
    "persistent": lambda: DataLoader(Reusing(), None, num_workers=2, persistent_workers=True),
    "out of order": lambda: DataLoader(Reusing(), None, num_workers=1, in_order=False),
}


@pytest.mark.parametrize("way", WAYS)
def test_workers_send_bundles_of_the_same_batches(way: str) -> None:
    """Also of a dataset that writes over what it handed out, and for who asks the loader without us."""
    loader = WAYS[way]()
    collate = loader.collate_fn
    passes = [begun_for_gpu(loader, is_pinned_by_us=False)]
    if way == "persistent":
        passes.append(iter(loader))  # the workers stay as they were begun
    for batches_of_pass in passes:
        for number, batch in enumerate(batches_of_pass):
            first, second = tensors(batch)
            assert set(first.tolist() + second.tolist()) == {number}
            assert batch.name == str(number)
            assert first.untyped_storage().data_ptr() == second.untyped_storage().data_ptr()
    assert number == 39
    assert loader.collate_fn is collate


@pytest.mark.parametrize("strategy", ["file_descriptor", "file_system"])
def test_many_tensors_need_few_handles(strategy: str) -> None:
    """Twenty batches of 500 tensors are held at a handle each, however PyTorch shares memory."""
    usual = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(strategy)
    try:
        loader = DataLoader(Many(), None, num_workers=1, multiprocessing_context="fork")
        n_before = len([*Path("/dev/fd").iterdir()])
        held = list(begun_for_gpu(loader, is_pinned_by_us=False))
        assert len([*Path("/dev/fd").iterdir()]) - n_before < 60
    finally:
        torch.multiprocessing.set_sharing_strategy(usual)
    assert [[int(leaf[0]) for leaf in batch] for batch in held] == [[number] * 500 for number in range(20)]


class Many(Dataset[Any]):
    """Batches of many tensors."""

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> Any:
        return [torch.full((30,), index) for _ in range(500)]


class Unsendable(Dataset[Any]):
    """One of its batches cannot be pickled."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Any:
        return (torch.ones(2), (lambda: None) if index == 1 else index)


def test_a_batch_that_cannot_be_sent_is_an_error_in_its_place() -> None:
    """With the reason, where PyTorch's own loop would wait for it for ever; the others come."""
    epoch = iter(threaded(DataLoader(Unsendable(), None, num_workers=1)))
    assert next(epoch)[1] == 0
    with pytest.raises((AttributeError, pickle.PicklingError), match="lambda"):
        next(epoch)
    assert next(epoch)[1] == 2


class Odd(DataLoader[Any]):
    """Iterates in a way of its own."""

    def __iter__(self) -> Any:
        return super().__iter__()


@pytest.mark.parametrize("loader", [DataLoader(Reusing(), None), Odd(Reusing(), None, num_workers=1)])
def test_other_loaders_are_left_as_they_are(loader: DataLoader[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without workers nothing is sent; and what iterates in a way of its own may do so with what it sends."""
    told = list[None]()
    monkeypatch.setattr(bundle.Bundling, "__init__", lambda *_: told.append(None))
    batches_of_pass = begun_for_gpu(loader, is_pinned_by_us=False)
    assert sorted(int(batch.name) for batch in batches_of_pass) == list(range(40))
    assert told == []
