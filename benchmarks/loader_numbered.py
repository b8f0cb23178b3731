"""Numbered batches under a GPU that lags behind: the count of wrong ones in `device_loader_reliability.py`.

Batch k of a pass holds k in every element. The GPU sleeps before it reads a batch, so that the host is ahead
of it; the comparison is made on the GPU; the loop drops its batch at once and does not wait for the GPU.
"""

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import loader_peers as peers
import torch
from torch.utils.data import DataLoader, Dataset

from torchfast import DeviceLoader
from torchfast._loader.turns import Turns

N_PASSES_PER_REPORT = 5
SLEEP_CYCLES = {"pinned": 40_000, "fresh": 80_000, "pageable": 120_000, "reused": 120_000}
"""20 to 60 us before each batch, as much as keeps the GPU behind such a source most of the time."""

LONG_SLEEP_CYCLES = 2_000_000
"""1 ms before each hundredth, in which the host gets far ahead."""


class Shape(NamedTuple):
    """What a batch consists of, and how many there are in a pass."""

    n_leaves: int
    size: tuple[int, ...]
    n_per_pass: int = 1000
    sleep_cycles: int = 0
    """Before each batch at least, where making one takes the host longer than the usual sleep."""


SHAPES = {
    "small": Shape(3, (5_000,)),
    "packed": Shape(5, (5_000,)),
    "rows": Shape(16, (5_120,)),
    "many": Shape(40, (40_000,)),
    "large": Shape(1, (300_000,)),
    "images": Shape(1, (2, 3, 224, 224)),
    "huge": Shape(2, (10_000_000,), n_per_pass=50, sleep_cycles=160_000_000),
}
"""3 tensors of 20 KB, here always copied as they are handed out, as in a loop that is bound by Python; 5 of
them, which travel as one; 16 of 20 KiB, without gaps, which may be sent by the loop; 40 of
160 KB, with which helpers help if they are pageable; 1 of 1.2 MB; images, 1.2 MB too; 2 of 40 MB, staged in
two pieces if they are pageable.
"""

KINDS = [
    *itertools.product(("packed", "large"), ("pinned", "fresh", "pageable", "reused")),
    *itertools.product(("small", "rows"), ("pinned", "fresh", "reused")),
    ("many", "pageable"),
    ("huge", "pageable"),
]
"""Sources: a list of pinned batches, a `DataLoader` that pins each anew and drops it, a generator of pageable
ones, and one that fills the same pinned memory again and again.
"""

Peer = Callable[[Any], Iterable[Sequence[torch.Tensor]]]
Report = Callable[[dict[str, Any]], None]


def count_ours(report: Report, *, shape: str, source: str, n_left: Any, limit_s: float) -> None:
    """Count DeviceLoader's wrong batches, on one loader for all its passes."""
    if shape == "small":
        Turns.is_here = _always  # type: ignore[method-assign]  # in a process of its own
    _count("torchfast", _wrapped, report, shape, source, n_left, limit_s)


def _always(*_: object) -> bool:
    return True


def _wrapped(batches: Any) -> DeviceLoader[list[torch.Tensor]]:
    return DeviceLoader(batches, "cuda")


def count_peer(report: Report, *, peer: str, n_left: Any, limit_s: float) -> None:
    """Count a peer's wrong batches, on the same batches by the same loop."""
    shape = "images" if peer.startswith("timm") else "large"
    _count(peer, PEERS[peer], report, shape, "pinned", n_left, limit_s)


def _count(  # noqa: PLR0913, PLR0917 - what a row says
    name: str, peer: Peer, report: Report, shape: str, source: str, n_left: Any, limit_s: float
) -> None:
    # Many processes share the cores; but helpers come only to a loop that computes with several threads.
    torch.set_num_threads(4 if shape in {"many", "huge"} else 1)
    batches = peer(_source(SHAPES[shape], source))
    sleep_cycles = max(SLEEP_CYCLES[source], SHAPES[shape].sleep_cycles)
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    lag = Lag()
    began_s, n_seen = time.perf_counter(), 0
    while n_left.value > 0 and time.perf_counter() - began_s < limit_s:
        n_now = sum(compare(batches, wrong, lag, sleep_cycles) for _ in range(N_PASSES_PER_REPORT))
        n_seen += n_now
        with n_left.get_lock():
            n_left.value -= n_now
        report(
            {
                "peer": name,
                "shape": shape,
                "source": source,
                "n_batches": n_seen,
                "n_wrong": int(wrong),
                "gpu_was_behind": lag.share,
                "seconds": round(time.perf_counter() - began_s, 1),
            }
        )


class Lag:
    """How often the GPU had not finished a batch when the loop came with the next one."""

    def __init__(self) -> None:
        self.n_asked = self.n_behind = 0
        self._event: torch.cuda.Event | None = None

    def mark(self) -> None:
        """Note where a step ends on the GPU's timeline."""
        self._event = torch.cuda.Event()
        self._event.record()

    def ask(self) -> None:
        """Count whether the GPU has got to the mark, if there is one."""
        if self._event is not None:
            self.n_asked += 1
            self.n_behind += not self._event.query()
            self._event = None

    @property
    def share(self) -> float:
        """The share of the questions to which the answer was no."""
        return round(self.n_behind / max(1, self.n_asked), 3)


def compare(
    batches: Iterable[Sequence[torch.Tensor]], wrong: torch.Tensor, lag: Lag, sleep_cycles: int
) -> int:
    """Add the wrong batches of one pass to `wrong`, on the GPU; return how many batches there were."""
    numbers = itertools.count()  # enumerate would hold on to each batch
    for batch in batches:
        number = next(numbers)
        lag.ask()
        torch.cuda._sleep(sleep_cycles if number % 100 else max(sleep_cycles, LONG_SLEEP_CYCLES))
        wrong += (torch.cat([leaf.view(-1) for leaf in batch]) != number).any()
        del batch
        if number % 16 == 15:
            lag.mark()
    return next(numbers)


def _source(shape: Shape, source: str) -> Any:
    """Return a source of the batches of a pass."""
    if source == "fresh":
        return DataLoader(Filled(shape), batch_size=None, pin_memory=True)
    made = Made(shape, is_pinned=source != "pageable", is_reused=source == "reused")
    return list(made) if source == "pinned" else made


class Made:
    """Batches that hold their own number, the same in every pass, made one by one."""

    def __init__(self, shape: Shape, *, is_pinned: bool, is_reused: bool) -> None:
        self._shape = shape
        self._is_pinned, self._is_reused = is_pinned, is_reused

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Make them, in new memory each, or all in the same."""
        buffers = self._empty()
        for number in range(self._shape.n_per_pass):
            leaves = buffers if self._is_reused else self._empty()
            yield [leaf.fill_(float(number)) for leaf in leaves]

    def _empty(self) -> list[torch.Tensor]:
        n_leaves, size = self._shape[:2]
        return [torch.empty(size, pin_memory=self._is_pinned) for _ in range(n_leaves)]


class Filled(Dataset[list[torch.Tensor]]):
    """The same batches, for a `DataLoader`."""

    def __init__(self, shape: Shape) -> None:
        self._shape = shape

    def __len__(self) -> int:
        """Return how many there are in a pass."""
        return self._shape.n_per_pass

    def __getitem__(self, index: int) -> list[torch.Tensor]:
        """Make one."""
        return [torch.full(self._shape.size, float(index)) for _ in range(self._shape.n_leaves)]


class Again:
    """A peer's generator function, called anew for each pass."""

    def __init__(self, make: Peer, batches: Any) -> None:
        self._make, self._batches = make, batches

    def __iter__(self) -> Iterator[Sequence[torch.Tensor]]:
        """Begin a pass."""
        return iter(self._make(self._batches))


def apex_unrecorded(batches: Iterable[peers.Batch]) -> Iterator[peers.Batch]:
    """Copy one batch ahead on a side stream: apex's data_prefetcher as it is often copied, unrecorded."""
    side = torch.cuda.Stream()
    source = iter(batches)

    def preload() -> peers.Batch | None:
        batch = next(source, None)
        if batch is None:
            return None
        with torch.cuda.stream(side):
            return [leaf.to("cuda", non_blocking=True) for leaf in batch]

    ahead = preload()
    while ahead is not None:
        torch.cuda.current_stream().wait_stream(side)
        batch = ahead
        ahead = preload()
        yield batch
        del batch


class Timm:
    """timm's own PrefetchLoader, the same one for every pass; what it computes is undone."""

    def __init__(self, batches: Sequence[peers.Batch]) -> None:
        self._loader = peers.timm(batches)
        numbers = [[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]
        self._mean, self._std = (255 * torch.tensor(n, device="cuda").view(1, 3, 1, 1) for n in numbers)

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Begin a pass. The GPU sleeps before its first look at a batch, as before ours."""
        for images, _ in self._loader:
            torch.cuda._sleep(SLEEP_CYCLES["pinned"])
            yield [images.mul(self._std).add_(self._mean).round_()]


PEERS: dict[str, Peer] = {
    "apex without record_stream": lambda batches: Again(apex_unrecorded, batches),
    "side stream, no edge back": lambda batches: Again(peers.unsafe, batches),
    "apex, record_stream": lambda batches: Again(peers.apex, batches),
    "timm PrefetchLoader": Timm,
}
