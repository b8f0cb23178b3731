"""The memory of workers: read through a second mapping, and given back to the kernel by a thread."""

import gc
import re
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.loader_transport import open_feed, until
from torchfast._loader import shared_memory
from torchfast._loader.plan import bytes_of
from torchfast._loader.shared_memory import SharedMemoryReader, second_mapping
from torchfast._loader.thread import HelperThread

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux maps memory twice")

MIB = 2**20


@pytest.fixture(params=["file_descriptor", "file_system"])
def _strategy(request: pytest.FixtureRequest) -> Iterator[None]:
    """Share memory in each of PyTorch's ways."""
    usual = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy(request.param)
    yield
    torch.multiprocessing.set_sharing_strategy(usual)


def mapped(address: int) -> str:
    """Return the kernel's flags of the shared memory of PyTorch's at an address, or nothing."""
    for entry in re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path("/proc/self/smaps").read_text()):
        first, last = (int(number, 16) for number in entry.split(maxsplit=1)[0].split("-"))
        if first <= address < last and "torch_" in entry.partition("\n")[0]:
            return entry.rsplit("VmFlags:", 1)[1]
    return ""


def unmapping_threads() -> int:
    """Count the threads that give memory back."""
    return sum(thread.name == "torchfast-unmap" for thread in threading.enumerate())


@pytest.mark.usefixtures("_strategy")
@pytest.mark.parametrize("first", [0, 1, 5000])
def test_a_second_mapping_is_the_same_memory_and_outlives_the_tensor(first: int) -> None:
    """It shows what is written through the first, also behind an offset, and stays when that is gone."""
    whole = torch.arange(MIB, dtype=torch.int32).share_memory_()
    tensor = whole[first : first + 100_000].view(100, 1000).t()
    mapping = second_mapping(tensor)
    assert mapping is not None
    assert mapping.memory.data_ptr() != tensor.data_ptr()
    tensor.neg_()
    expected = bytes_of(tensor).clone()
    del tensor, whole
    gc.collect()
    assert torch.equal(mapping.memory, expected)
    mapping.unmap()


@given(data=st.data())
def test_any_part_of_shared_memory_is_read_whole(data: st.DataObject) -> None:
    """Whatever tensor lies in shared memory, its bytes are lent, no more and no fewer."""
    n = data.draw(st.integers(1, 20_000))
    first = data.draw(st.integers(0, n - 1))
    stop = data.draw(st.integers(first + 1, n))
    dtype = data.draw(st.sampled_from([torch.uint8, torch.int16, torch.float64]))
    tensor = torch.randint(0, 100, (n,)).to(dtype).share_memory_()[first:stop]
    reader = SharedMemoryReader()
    with reader.reading(tensor) as memory:
        assert torch.equal(memory.view(dtype), tensor)
    reader.close()


def test_memory_of_this_process_alone_is_read_where_it_is() -> None:
    """What is not shared has no second mapping, and is read all the same."""
    tensor = torch.arange(1000)
    assert second_mapping(tensor) is None
    with SharedMemoryReader().reading(tensor) as memory:
        assert memory.data_ptr() == tensor.data_ptr()
        assert torch.equal(memory.view(torch.int64), tensor)


def test_a_private_mapping_of_a_file_is_not_mapped_again(tmp_path: Path) -> None:
    """PyTorch calls such memory shared too; the kernel says that it is not, and it is read where it is."""
    path = tmp_path / "numbers"
    path.write_bytes(bytes(range(100)))
    tensor = torch.from_file(str(path), shared=False, size=100, dtype=torch.uint8)
    tensor.add_(1)
    assert second_mapping(tensor) is None
    with SharedMemoryReader().reading(tensor) as memory:
        assert memory.tolist() == list(range(1, 101))


def test_no_mapping_is_left_and_no_thread() -> None:
    """Once the reader is closed, all that was read is given back, and its thread has ended."""
    tensor = torch.zeros(4 * MIB, dtype=torch.uint8).share_memory_()
    reader, addresses = SharedMemoryReader(), []
    for _ in range(20):
        with reader.reading(tensor) as memory:
            addresses.append(memory.data_ptr())
            assert mapped(addresses[-1])
    assert unmapping_threads() == 1
    reader.close()
    assert unmapping_threads() == 0
    assert not any(mapped(address) for address in addresses if address != tensor.data_ptr())
    with reader.reading(tensor) as memory:
        assert int(memory.sum()) == 0
    reader.close()
    assert unmapping_threads() == 0


def test_a_process_forked_meanwhile_does_not_inherit_the_mapping() -> None:
    """The kernel is told to keep it from children, which would hold the memory as long as they live."""
    mapping = second_mapping(torch.zeros(MIB, dtype=torch.uint8).share_memory_())
    assert mapping is not None
    assert "dc" in mapped(mapping.memory.data_ptr()).split()
    mapping.unmap()


def test_at_most_one_mapping_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the thread does not keep up, whoever has read gives the memory back: shared memory is scarce."""
    may_go_on, given_back = threading.Event(), []
    unmap = shared_memory.SecondMapping.unmap

    def slow(mapping: shared_memory.SecondMapping) -> None:
        if isinstance(threading.current_thread(), HelperThread):
            may_go_on.wait()
        given_back.append(threading.current_thread())
        unmap(mapping)

    monkeypatch.setattr(shared_memory.SecondMapping, "unmap", slow)
    tensor = torch.zeros(MIB, dtype=torch.uint8).share_memory_()
    reader = SharedMemoryReader()
    with reader.reading(tensor):
        pass
    until(reader._read.empty)
    for _ in range(5):
        with reader.reading(tensor):
            pass
    assert given_back == [threading.current_thread()] * 4
    may_go_on.set()
    reader.close()
    assert len(given_back) == 6


def test_an_error_while_reading_gives_the_memory_back() -> None:
    """The error comes through, and nothing stays mapped."""
    tensor = torch.zeros(MIB, dtype=torch.uint8).share_memory_()
    reader = SharedMemoryReader()
    addresses = []

    def fail() -> None:
        with reader.reading(tensor) as memory:
            addresses.append(memory.data_ptr())
            raise MemoryError

    with pytest.raises(MemoryError):
        fail()
    reader.close()
    assert [mapped(address) for address in addresses] == [""]


def test_where_no_thread_can_be_started_the_reader_does_it_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the interpreter threads are refused: memory is given back all the same."""

    def refused(_: threading.Thread) -> None:
        raise RuntimeError("can't create new thread at interpreter shutdown")

    monkeypatch.setattr(threading.Thread, "start", refused)
    reader = SharedMemoryReader()
    with reader.reading(torch.zeros(MIB, dtype=torch.uint8).share_memory_()) as memory:
        address = memory.data_ptr()
    assert not mapped(address)
    reader.close()


def test_the_collector_may_end_a_pass_in_the_thread_that_it_waits_for() -> None:
    """Where the helper of a pass ends that pass it waits for nobody, or the two would wait for each other."""
    is_over = threading.Event()

    def source() -> Iterator[int]:
        yield 0
        is_over.wait()
        yield 1

    epoch, _, feed = open_feed(source())
    assert next(epoch) == 0
    helper = HelperThread(target=feed.close)
    helper.start()
    helper.join()
    is_over.set()
    feed._thread.join()
