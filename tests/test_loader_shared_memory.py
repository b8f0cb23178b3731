"""The memory of workers: read through a second mapping, and given back to the kernel by a thread."""

import _thread
import gc
import os
import re
import subprocess
import sys
import threading
import traceback
import weakref
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from tests.loader_transport import until
from torchfast._loader import shared_memory
from torchfast._loader.plan import bytes_of
from torchfast._loader.shared_memory import MAX_DROPPERS, Dropper, mapped_again

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps memory twice")

MIB = 2**20


@pytest.fixture(params=["file_descriptor", "file_system"])
def _strategy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Share memory in each of PyTorch's ways."""
    usual = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(request.param)
    yield
    torch.multiprocessing.set_sharing_strategy(usual)


def again(tensor: torch.Tensor) -> torch.Tensor:
    """Return the tensor's bytes through another mapping, which there must be."""
    memory = torch.frombuffer(view_of(tensor), dtype=torch.uint8)
    assert memory.data_ptr() != tensor.data_ptr()
    return memory


def view_of(tensor: torch.Tensor) -> memoryview:
    """Return the view that holds such a mapping."""
    view = mapped_again(tensor)
    assert view is not None
    return view


def address_of(view: memoryview) -> int:
    """Return where its memory begins."""
    return torch.frombuffer(view, dtype=torch.uint8).data_ptr()


def shared() -> torch.Tensor:
    """Return a MiB of shared memory."""
    memory: torch.Tensor = torch.zeros(MIB, dtype=torch.uint8).share_memory_()
    return memory


def flags(address: int) -> str:
    """Return the kernel's flags of the shared memory of PyTorch's at an address, or nothing."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(number, 16) for number in entry.split(maxsplit=1)[0].split("-"))
        if first <= address < last and "/torch_" in entry.partition("\n")[0]:
            return entry.rsplit("VmFlags:", 1)[1]
    return ""


@pytest.mark.usefixtures("_strategy")
@pytest.mark.parametrize("first", [0, 1, 5000])
def test_a_second_mapping_is_the_same_memory_and_outlives_the_tensor(first: int) -> None:
    """It shows what is written through the first, also behind an offset, and stays when that is gone."""
    whole = torch.arange(MIB, dtype=torch.int32).share_memory_()
    tensor = whole[first : first + 100_000].view(100, 1000).t()
    memory = again(tensor)
    tensor.neg_()
    expected = bytes_of(tensor).clone()
    del tensor, whole
    assert torch.equal(memory, expected)


@pytest.mark.usefixtures("_strategy")
def test_batches_of_workers_can_be_mapped_again() -> None:
    """What a worker sends is shared memory, however PyTorch shares it, and reads the same."""
    numbers = torch.arange(6.0)[:, None].expand(-1, MIB).contiguous()
    for index, (batch,) in enumerate(DataLoader(TensorDataset(numbers), 2, num_workers=1)):
        assert torch.equal(again(batch).view(torch.float32), numbers[2 * index : 2 * index + 2].flatten())


@given(data=st.data())
def test_any_part_of_shared_memory_is_read_whole(data: st.DataObject) -> None:
    """Whatever tensor lies in shared memory, its bytes are there again, no more and no fewer."""
    n = data.draw(st.integers(1, 20_000))
    first = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(first + 1, n))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.float64]))
    tensor = torch.randint(0, 100, (n,)).to(dtype).share_memory_()[first:stop]
    assert torch.equal(again(tensor).view(dtype), tensor)


def test_memory_of_this_process_alone_has_no_second_mapping(tmp_path: Path) -> None:
    """Neither ordinary memory nor a private mapping of a file, though PyTorch calls that shared."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(100)))
    private = torch.from_file(str(path), shared=False, size=100, dtype=torch.uint8)
    private.add_(1)
    assert private.is_shared()
    assert mapped_again(private) is None
    assert private.tolist() == list(range(1, 101))
    assert mapped_again(torch.arange(1000)) is None


def test_a_mapping_goes_with_its_last_tensor() -> None:
    """As long as a part of it is held it can be read, also from a traceback; then nothing is mapped."""

    def fail(piece: torch.Tensor) -> None:
        raise MemoryError(piece.numel())

    def looked_at_in_a_traceback() -> int:
        memory = again(shared())
        address, piece = memory.data_ptr(), memory[10:20]
        del memory
        try:
            fail(piece)
        except MemoryError as error:
            told = traceback.TracebackException.from_exception(error, capture_locals=True)
        assert "dtype=torch.uint8" in "".join(told.format())
        assert flags(address)
        return address

    address = looked_at_in_a_traceback()
    gc.collect()
    assert not flags(address)


def test_a_process_forked_meanwhile_does_not_inherit_a_mapping() -> None:
    """The kernel is told to keep it from children, which would hold the memory as long as they live."""
    memory = again(shared())
    assert "dc" in flags(memory.data_ptr()).split()


def test_a_tensor_that_goes_in_a_child_unmaps_nothing_there(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the memory was, the child may have its own by then."""
    memory = again(shared())
    address, process = memory.data_ptr(), os.getpid()
    monkeypatch.setattr(os, "getpid", lambda: process + 1)
    del memory
    assert flags(address)
    monkeypatch.undo()
    shared_memory._unmap(address, MIB, process)
    assert not flags(address)


@pytest.fixture
def _quiet() -> Iterator[None]:
    """Let threads of earlier tests end first, and those of this one before the next."""
    until(lambda: _thread._count() == threading.active_count() - 1)
    yield
    until(lambda: _thread._count() == threading.active_count() - 1)


@pytest.mark.usefixtures("_quiet")
def test_threads_drop_what_was_read_and_end() -> None:
    """All that a dropper took is unmapped soon, and its threads have ended; the next one has its own."""
    n_threads = _thread._count()
    dropper = Dropper()
    for _ in range(2):
        tensor, addresses = shared(), list[int]()
        for _ in range(20):
            views = [view_of(tensor), view_of(tensor)]
            addresses += map(address_of, views)
            dropper.take(views)
            del views
            dropper.drop()
        until(lambda: n_threads < _thread._count() <= n_threads + MAX_DROPPERS)
        dropper.close()
        until(lambda: _thread._count() == n_threads)
        assert [flags(address) for address in addresses] == [""] * 40


def test_so_many_threads_as_are_needed_drop_and_no_more_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where all lag behind they take no more: whoever has read drops the memory, since it is scarce."""
    monkeypatch.setattr(shared_memory, "start_unwaited", lambda *_: True)  # threads that never come
    dropper, addresses = Dropper(), []
    for n_taken in range(1, 6):
        view = view_of(shared())
        addresses.append(address_of(view))
        dropper.take([view])
        del view
        dropper.drop()
        assert dropper._n_running == dropper._to_drop.qsize() == min(n_taken, MAX_DROPPERS)
    assert all(map(flags, addresses[:MAX_DROPPERS]))
    del dropper
    assert not any(map(flags, addresses[:MAX_DROPPERS]))


def test_one_thread_is_enough_that_keeps_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another is started only if what was taken last still waits."""
    monkeypatch.setattr(shared_memory, "start_unwaited", lambda *_: True)
    dropper = Dropper()
    for _ in range(5):
        dropper.take([view_of(shared())])
        dropper.drop()
        dropper._to_drop.get()
    assert dropper._n_running == 1


@pytest.mark.parametrize("n_bytes", [1, 5000, 2 * MIB, 5 * MIB + 1])
def test_all_of_a_mapping_goes_however_many_calls_it_takes(n_bytes: int) -> None:
    """Its first page and its last."""
    view = view_of(torch.zeros(n_bytes, dtype=torch.uint8).share_memory_())
    ends = (address_of(view), address_of(view) + n_bytes - 1)
    assert all(map(flags, ends))
    del view
    assert not any(map(flags, ends))


def test_the_exit_of_the_interpreter_knows_nothing_of_mappings() -> None:
    """As it walks over all `weakref.finalize`, the user's among them, threads still drop memory."""
    n_finalized = len(weakref.finalize._registry)  # type: ignore[attr-defined]
    view = view_of(shared())
    assert len(weakref.finalize._registry) == n_finalized  # type: ignore[attr-defined]
    address = address_of(view)
    del view
    assert not flags(address)


def test_where_no_thread_can_be_started_nothing_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the interpreter threads are refused: memory goes when its reader has dropped it."""

    def refused(*_: object) -> None:
        raise RuntimeError("can't start new thread at interpreter shutdown")

    monkeypatch.setattr(_thread, "start_new_thread", refused)
    dropper, view = Dropper(), view_of(shared())
    address = address_of(view)
    dropper.take([view])
    del view
    dropper.drop()
    assert not flags(address)
    dropper.close()


def test_memory_stays_until_it_is_to_be_dropped() -> None:
    """Before that PyTorch has its own mapping, which would go last, and free the memory with the GIL held."""
    dropper, view = Dropper(), view_of(shared())
    address = address_of(view)
    dropper.take([view])
    del view
    assert flags(address)
    dropper.drop()
    until(lambda: not flags(address))
    dropper.close()


@pytest.mark.usefixtures("_quiet")
def test_the_thread_is_not_one_that_is_waited_for() -> None:
    """The collector may end a pass in it, which waits for the copying thread: that must not wait for it."""
    dropper, n_threads = Dropper(), threading.active_count()
    dropper.take([view_of(shared())])
    dropper.drop()
    until(lambda: _thread._count() == n_threads)
    assert threading.active_count() == n_threads
    dropper.close()


def test_the_interpreter_may_end_while_memory_goes_back() -> None:
    """An exit in the midst of an unmapping that takes some 100 ms is clean, again and again."""
    code = """
import torch
from torchfast._loader.shared_memory import Dropper, mapped_again
tensor = torch.ones(400 * 2**20, dtype=torch.uint8).share_memory_()
view = mapped_again(tensor)
torch.frombuffer(view, dtype=torch.uint8).sum()
dropper = Dropper()
views = [view]
del view
dropper.take(views)
del views, tensor
dropper.drop()
"""
    ends = [subprocess.run([sys.executable, "-c", code], check=False).returncode for _ in range(3)]
    assert ends == [0, 0, 0]
