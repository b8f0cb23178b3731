"""Feeding a GPU at the hardware's limit: `python benchmarks/device_loader.py [PART...]`.

Checked first: every peer hands out the right batches in the right order (races are the business of
`device_loader_reliability.py`). Then timed, as `loader_timing.py` does it.

- `workloads`       large batches and many tensors, under a light and a heavy step
- `small`           batches of a few KB, which a copy in the loop brings too
- `resnet50`        a training step, on float images and on bytes to normalise
- `workers`         a DataLoader with eight workers, some of whose batches are late
- `loading`         the same without work: how fast batches of workers get to the GPU at all
- `host_time`       what one `next` takes of the loop's own time
- `sweep`           ratios of compute to transfer, numbers of tensors, pinned memory and pageable
- `worker_sweep`    ratios of compute to loading by eight workers, one tensor and eight
- `many_by_workers` the same of 512 tensors
"""

import argparse
import functools
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import loader_peers as peers
import record
import torch
from loader_timing import (
    PEERS,
    PROTOCOL,
    Step,
    compared,
    compared_on,
    copy_ms,
    light,
    passes_ms,
    products,
    with_item,
)
from torch.utils.data import DataLoader, Dataset

from torchfast import DeviceLoader


def main() -> None:
    """Run the parts asked for, all by default, and write a result file for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
        "workloads": workloads,
        "small": small,
        "resnet50": resnet50,
        "workers": workers,
        "loading": loading,
        "host_time": host_time,
        "sweep": sweep,
        "worker_sweep": worker_sweep,
        "many_by_workers": many_by_workers,
    }
    parser.add_argument("parts", nargs="*", default=list(parts), help=f"of {', '.join(parts)}")
    parser.add_argument("--n-samples", type=int, default=5, help="passes timed for each number")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("What is timed here is copying to a CUDA GPU, and this machine has none.")
    check()
    for name in arguments.parts:
        subject = "device_loader" if name == "workloads" else f"loader_{name}"
        rows = []
        for row in parts[name](arguments.n_samples):
            print({key: value for key, value in row.items() if not key.startswith("samples")}, flush=True)
            rows.append(row)
            # Each time: what is cut off keeps what it has.
            record.write(subject, LOADING_PROTOCOL if name == "loading" else PROTOCOL, rows)


def check() -> None:
    """Hold every peer to the bare loop's batches, before any is timed."""
    batches = [[torch.full((50, 50), float(k)).pin_memory(), torch.arange(k + 1)] for k in range(10)]
    for name, peer in peers.PEERS.items():
        for k, (first, second) in enumerate(peer(batches)):
            if not (bool((first == k).all()) and second.tolist() == list(range(k + 1))):
                raise SystemExit(f"{name} hands out a wrong batch {k}: nothing is timed")


def host_batches(n_leaves: int, leaf_elements: int, source: str, n_batches: int) -> list[peers.Batch]:
    """Return float32 batches of random numbers; six different ones, again and again."""
    different = []
    for _ in range(min(6, n_batches)):
        batch = [torch.randn(leaf_elements) for _ in range(n_leaves)]
        different.append([leaf.pin_memory() for leaf in batch] if source == "pinned" else batch)
    return list(itertools.islice(itertools.cycle(different), n_batches))


def workloads(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time the workloads that have a bar, from pinned and from pageable memory."""
    steps: list[tuple[str, int, int, Callable[[], Step]]] = [
        ("154 MB, light step", 1, 256 * 3 * 224 * 224, lambda: light),
        ("154 MB, 3.9 ms of products", 1, 256 * 3 * 224 * 224, lambda: products(3.85)),
        ("64 x 256 KB, 2.9 ms of products", 64, 65536, lambda: products(2.9)),
        ("64 x 256 KB, light step", 64, 65536, lambda: light),
    ]
    for (what, n_leaves, n_elements, step), source in itertools.product(steps, ["pinned", "pageable"]):
        batches = host_batches(n_leaves, n_elements, source, 32 if source == "pinned" else 16)
        names = [name for name in PEERS if n_leaves == 1 or name != "timm PrefetchLoader"]
        if n_leaves == 1:
            batches = [[batch[0].view(256, 3, 224, 224)] for batch in batches]
        yield from compared_on(batches, step(), names, n_samples, workload=what, source=source)


SMALL = ((1, 4 * 2**10), (3, 16 * 2**10), (4, 64 * 2**10), (8, 32 * 2**10))
"""Tensors of a batch, and bytes of each: three that may be copied late, and one of too many tensors."""


def small(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time batches that take so little that bringing them ahead may not pay."""
    loops = {
        "light": (light, 200),
        "0.3 ms, item": (with_item(products(0.3)), 200),
        "2 ms, item": (with_item(products(2.0)), 60),
    }
    for (n_leaves, n_bytes), source in itertools.product(SMALL, ("pinned", "pageable", "DataLoader")):
        for loop, (step, n_batches) in loops.items():
            batches = host_batches(n_leaves, n_bytes // 4, source, n_batches)
            loader = DataLoader(peers.Listed(batches), batch_size=None) if source == "DataLoader" else None
            what = {"n_leaves": n_leaves, "leaf_bytes": n_bytes, "source": source, "loop": loop}
            yield from compared_on(
                batches, step, SWEPT, n_samples, loader=loader, budget_s=SMALL_CELL_S, **what
            )


RATIOS = (0.25, 0.5, 1, 2, 4, 16)
PASSES = {0.25: 48, 0.5: 48, 1: 48, 2: 48, 4: 24}
"""Batches of a pass over workers, by the ratio of compute to loading, which takes longer than copying: 16
times that is 20 ms, under which all hides."""
SWEPT = [
    name
    for name in ("pinned, non_blocking", "apex, record_stream", "torchtnt", "SPDL", "torchfast")
    if name in PEERS
]


def sweep(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time lists of batches of 38.5 MB at many ratios of compute to transfer."""
    n_elements = 64 * 3 * 224 * 224
    limit_ms = copy_ms(n_elements * 4)
    for n_leaves, source in itertools.product((1, 8, 512), ("pinned", "pageable")):
        batches = host_batches(n_leaves, n_elements // n_leaves, source, 24)
        for ratio, consumer in itertools.product(RATIOS, CONSUMERS):
            step = CONSUMERS[consumer](products(ratio * limit_ms))
            what = {"ratio": ratio, "n_leaves": n_leaves, "source": source, "consumer": consumer}
            some = batches[: 24 if ratio < 16 else 16]
            yield from compared_on(some, step, SWEPT, n_samples, budget_s=CELL_S, **what)


CELL_S = 2.0
"""There are many cells: after so long, none begins another round."""
SMALL_CELL_S = 1.0
LOADING_CELL_S = 2.0
"""Loading by processes scatters by a fifth from pass to pass."""


def worker_sweep(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time a DataLoader with workers, which is what most steps wait for, at ratios of compute to loading."""
    for n_leaves in (1, 8):
        yield from swept_by_workers(n_leaves, PASSES, n_samples)


def many_by_workers(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time the same with 512 tensors in a batch, each of which takes the peers 0.15 s."""
    yield from swept_by_workers(512, {0.25: 12, 1: 12}, n_samples)


def swept_by_workers(n_leaves: int, passes: dict[float, int], n_samples: int) -> Iterator[dict[str, Any]]:
    """Time passes of so many batches, by the ratio of compute to loading."""
    for pin_memory in (True, False):
        of_batches = {
            n_batches: ByWorkers(Made(n_batches, 0.01, n_leaves=n_leaves), pin_memory=pin_memory)
            for n_batches in set(passes.values())
        }
        load_ms = of_batches[max(of_batches)].load_ms(1)
        for consumer, (ratio, n_batches) in itertools.product(CONSUMERS, passes.items()):
            by = of_batches[n_batches]
            step = CONSUMERS[consumer](products(ratio * load_ms))
            source = f"8 workers, {'pinned' if pin_memory else 'pageable'}"
            what = {"ratio": ratio, "n_leaves": n_leaves, "source": source, "consumer": consumer}
            yield from by.compared(step, n_samples, load_ms, budget_s=LOADING_CELL_S, **what)


CONSUMERS: dict[str, Callable[[Step], Step]] = {"free-running": lambda step: step, "item": with_item}


def resnet50(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time a training step of ResNet-50 in bfloat16 on 256 images: as float32, and as uint8 to normalise."""
    import timm

    model = timm.create_model("resnet50").cuda().to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    labels = torch.randint(0, 1000, (256,), device="cuda")

    def step(batch: peers.Batch) -> None:
        images = batch[0].to(memory_format=torch.channels_last)
        with torch.autocast("cuda", torch.bfloat16):
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    floats = [[torch.randn(256, 3, 224, 224).pin_memory()] for _ in range(3)] * 6
    integers = [
        [torch.randint(0, 256, (256, 3, 224, 224), dtype=torch.uint8).pin_memory()] for _ in range(3)
    ] * 6
    names = ["pinned, non_blocking", "apex, record_stream", "torchfast"]
    yield from compared_on(
        floats, step, names, n_samples, workload="ResNet-50, bfloat16, batch 256", source="float32"
    )
    means, stds = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    loader = DeviceLoader(
        integers, "cuda", normalize=(means, stds), image_dtype=torch.bfloat16, channels_last=True
    )
    samples = passes_ms(lambda: loader, step, n_samples)
    what = {"workload": "ResNet-50, bfloat16, batch 256", "source": "uint8, normalised on the device"}
    yield {**what, "peer": "torchfast", "step_ms": record.median(samples), "samples_ms": samples}


@dataclass
class Made(Dataset[peers.Batch]):
    """Batches of images that take so long to make; one in ten five times as long, if jittered."""

    n_batches: int
    make_s: float
    n_leaves: int = 1
    n_images: int = 64
    dtype: torch.dtype = torch.uint8
    is_jittered: bool = False

    def __len__(self) -> int:
        """Return the number of batches."""
        return self.n_batches

    def __getitem__(self, index: int) -> peers.Batch:
        """Make a batch, with as many images, or numbers of them, in each tensor."""
        time.sleep(self.make_s * (5 if self.is_jittered and index % 10 == 7 else 1))
        shape: tuple[int, ...] = (self.n_images // self.n_leaves, 3, 224, 224)
        if self.n_leaves > self.n_images:
            shape = (self.n_images * 3 * 224 * 224 // self.n_leaves,)
        return [torch.full(shape, index % 256, dtype=self.dtype) for _ in range(self.n_leaves)]


class ByWorkers:
    """Every way to take the batches of a DataLoader with eight workers."""

    def __init__(self, made: Made, *, pin_memory: bool) -> None:
        def loader() -> DataLoader[peers.Batch]:
            return DataLoader(
                made,
                batch_size=None,
                num_workers=8,
                persistent_workers=True,
                pin_memory=pin_memory,
                prefetch_factor=4,
            )

        # Two, since workers that stay go on as they were begun: pinned by PyTorch's thread, or by us.
        self._bare = loader()
        self.ways: dict[str, Callable[[], Any]] = {
            name: functools.partial(fed, PEERS[name], self._bare) for name in SWEPT if name != "torchfast"
        }
        ours = DeviceLoader(loader(), "cuda")
        self.ways["torchfast"] = lambda: ours

    def load_ms(self, n_samples: int) -> float:
        """Return the time of a batch that nothing is done with, not even copied."""
        return float(record.median(passes_ms(lambda: self._bare, lambda _: None, n_samples)))

    def compared(
        self, step: Step, n_samples: int, load_ms: float, /, **what: Any
    ) -> Iterator[dict[str, Any]]:
        """Compare the ways with each other, for batches of 64 images in bytes."""
        resident = [[torch.zeros(1, device="cuda")]] * len(self._bare)
        limits_ms = [copy_ms(IMAGES_BYTES), load_ms]
        yield from compared(self.ways, resident, step, n_samples=n_samples, limits_ms=limits_ms, **what)


def workers(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time a DataLoader with eight workers, one batch in ten five times late."""
    for pin_memory in (False, True):
        by = ByWorkers(Made(80, 0.03, is_jittered=True), pin_memory=pin_memory)
        load_ms = by.load_ms(n_samples)
        what = {"loader": "8 workers, one in ten 5 x late", "pin_memory": pin_memory, "load_ms": load_ms}
        yield from by.compared(products(8.0), n_samples, load_ms, **what)


LOADING_PROTOCOL = (
    "CUDA events from the 8th batch of a pass to its last, with nothing done to a batch; a sample is one "
    "pass, after a rest of 30 ms in which the workers run ahead."
)


def loading(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time batches of eight workers that make them faster than they can be taken, in a loop without work."""
    for n_batches, n_images, dtype in (
        (64, 64, torch.uint8),
        (48, 256, torch.uint8),
        (48, 256, torch.float32),
    ):
        by = ByWorkers(Made(n_batches, 0.005, n_images=n_images, dtype=dtype), pin_memory=True)
        n_bytes = n_images * IMAGES_BYTES // 64 * dtype.itemsize
        what = {"batches": f"{n_images} images, {str(dtype).removeprefix('torch.')}", "n_bytes": n_bytes}
        for peer, make in by.ways.items():
            samples = passes_ms(make, lambda _: None, n_samples)
            yield {**what, "peer": peer, "step_ms": record.median(samples), "samples_ms": samples}


IMAGES_BYTES = 64 * 3 * 224 * 224
"""64 images in bytes."""


def fed(peer: Callable[[Any], Any], loader: Iterable[peers.Batch]) -> Any:
    """Return a pass of a peer over a generator: of a loader torchtnt's makes two iterators for each pass."""
    return peer(batch for batch in loader)


def host_time(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time `next` on the host, for batches that are ready, in a loop that is busy launching kernels."""
    total = torch.zeros((), device="cuda")
    for n_leaves, n_elements in ((1, 65536), (8, 65536), (64, 65536), (8, 1 << 20)):
        batches = host_batches(n_leaves, n_elements, "pinned", 300)
        loader = DeviceLoader(batches, "cuda")
        times_us: list[float] = []
        for _ in range(n_samples + 1):
            iterator = iter(loader)
            feed: Any = iterator._feed
            times_us += [ready_next_us(iterator, feed, total) for _ in batches]
            iterator.close()
        times_us = sorted(times_us[len(batches) :])  # less the first pass
        yield {
            "n_leaves": n_leaves,
            "leaf_bytes": n_elements * 4,
            "median_us": round(times_us[len(times_us) // 2], 1),
            "p99_us": round(times_us[int(0.99 * len(times_us))], 1),
            "samples_us": [round(t, 1) for t in times_us],
        }


def ready_next_us(iterator: Iterator[Any], feed: Any, total: torch.Tensor) -> float:
    """Return how long `next` takes after many launches, and more of them until a batch is ready."""
    for _ in range(200):
        total.add_(1)
    while not feed._work.ready:
        total.add_(1)
    began_s = time.perf_counter()
    next(iterator)
    return (time.perf_counter() - began_s) * 1e6


if __name__ == "__main__":
    main()
