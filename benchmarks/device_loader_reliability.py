"""A million numbered batches under a GPU that lags behind: `python benchmarks/device_loader_reliability.py`.

Every batch holds its own number; the GPU sleeps before it reads it, so that the host is always ahead; the
comparison is made on the GPU and drops the batch at once. Small packed batches and large ones alternate, from
pageable, pinned and reused memory. The same count is made of prefetchers that are known to race, so that it
is seen to be able to count.
"""

import argparse
import itertools
import multiprocessing
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import loader_peers as peers
import record
import torch

from torchfast import DeviceLoader

PROTOCOL = (
    "batch k holds k in every element; the GPU sleeps, then compares the batch with k, and counts; the loop "
    "drops its batch at once and never waits for the GPU within a pass"
)
N_PER_PASS = 1000
SLEEP_CYCLES = 40_000
"""About 20 us: with six processes on one GPU, each finds it behind all the time."""

SHAPES = {"packed": (3, 5_000), "large": (1, 300_000)}
"""Tensors of a batch, elements of each: 3 of 20 KB, or one of 1.2 MB."""


def main() -> None:
    """Count, print and write the result file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--n-batches", type=int, default=1_000_000)
    parser.add_argument("--limit-s", type=float, default=3600, help="count no longer than this")
    arguments = parser.parse_args()
    rows = list(itertools.chain(races(), campaign(arguments.n_batches, arguments.limit_s)))
    path = record.write("loader_reliability", PROTOCOL, rows)
    print(f"written: {path}")


def campaign(n_batches: int, limit_s: float) -> Iterator[dict[str, Any]]:
    """Count DeviceLoader's wrong batches: six kinds of source at a time, a process for each.

    The processes take turns on the GPU, which makes each of them wait for it, now and then for milliseconds.
    """
    kinds = list(itertools.product(SHAPES, ["pageable", "pinned", "reused"]))
    shares = [-(-n_batches // len(kinds))] * len(kinds)
    with ProcessPoolExecutor(len(kinds), mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from map(shown, pool.map(counted, kinds, shares, [limit_s] * len(kinds)))


def counted(kind: tuple[str, str], n_batches: int, limit_s: float) -> dict[str, Any]:
    """Count one kind, on one loader for all its passes."""
    loader = DeviceLoader(Numbered(N_PER_PASS, *kind), "cuda")
    began_s, wrong, n_seen = time.perf_counter(), 0, 0
    while n_seen < n_batches and time.perf_counter() - began_s < limit_s:
        wrong += n_wrong(loader, sleep_cycles=SLEEP_CYCLES)
        n_seen += N_PER_PASS
    return row("torchfast", kind, n_seen, wrong, began_s)


def races() -> Iterator[dict[str, Any]]:
    """Count the wrong batches of prefetchers without an edge back from the consumer."""
    for shape in SHAPES:
        batches = list(Numbered(300, shape, "pinned"))
        began_s = time.perf_counter()
        wrong = n_wrong(peers.unsafe(batches), sleep_cycles=5_000_000)
        yield shown(row("side stream, no edge back", (shape, "pinned"), 300, wrong, began_s))
    images = [[torch.full((8, 3, 224, 224), float(number)).pin_memory()] for number in range(300)]
    began_s = time.perf_counter()
    wrong = n_wrong(unnormalised(peers.timm(images)), sleep_cycles=5_000_000)
    yield shown(row("timm PrefetchLoader, ordinary loop", ("images", "pinned"), 300, wrong, began_s))


def unnormalised(batches: Iterable[Sequence[torch.Tensor]]) -> Iterator[list[torch.Tensor]]:
    """Undo what timm's loader computes, as far as the number of a batch goes."""
    mean = torch.tensor([0.485, 0.456, 0.406], device="cuda").view(1, 3, 1, 1) * 255
    std = torch.tensor([0.229, 0.224, 0.225], device="cuda").view(1, 3, 1, 1) * 255
    for images, _ in batches:
        torch.cuda._sleep(5_000_000)
        yield [images.mul(std).add_(mean).round_()]


class Numbered:
    """Batches that hold their own number, the same in every pass."""

    def __init__(self, n_batches: int, shape: str, kind: str) -> None:
        n_leaves, n_elements = SHAPES[shape]
        self._n_batches, self._n_leaves, self._n_elements = n_batches, n_leaves, n_elements
        self._kind = kind

    def __iter__(self) -> Iterator[list[torch.Tensor]]:
        """Make the batches, one by one; "reused" ones in one and the same pinned memory."""
        buffers = self._empty()
        for number in range(self._n_batches):
            leaves = buffers if self._kind == "reused" else self._empty()
            yield [leaf.fill_(float(number)) for leaf in leaves]

    def _empty(self) -> list[torch.Tensor]:
        is_pinned = self._kind != "pageable"
        return [torch.empty(self._n_elements, pin_memory=is_pinned) for _ in range(self._n_leaves)]


def n_wrong(batches: Iterable[list[torch.Tensor]], *, sleep_cycles: int) -> int:
    """Count, on the GPU, the batches that do not hold their number when the GPU comes to them."""
    wrong = torch.zeros((), dtype=torch.long, device="cuda")
    numbers = itertools.count()  # enumerate would hold on to each batch
    for batch in batches:
        torch.cuda._sleep(sleep_cycles)
        number = next(numbers)
        wrong += (torch.cat([leaf.view(-1) for leaf in batch]) != number).any()
        del batch
    return int(wrong)


def row(peer: str, kind: tuple[str, str], n_batches: int, wrong: int, began_s: float) -> dict[str, Any]:
    """Return a row of the result."""
    what = {"peer": peer, "shape": kind[0], "source": kind[1]}
    return {
        **what,
        "n_batches": n_batches,
        "n_wrong": wrong,
        "seconds": round(time.perf_counter() - began_s, 1),
    }


def shown(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row and return it."""
    print(row, flush=True)
    return row


if __name__ == "__main__":
    main()
