"""Feeding a GPU at the hardware's limit: `python benchmarks/device_loader.py [PART...]`.

Checked first: every peer hands out the right batches in the right order (races are the business of
`device_loader_reliability.py`). Then timed on the device's own clock, from the eighth batch of a pass to its
last, without draining the pipeline in between. Nothing is left out: a pass is iterated as a training loop
would, and each step reads the batch.
"""

import argparse
import functools
import itertools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import loader_peers as peers
import record
import torch
from torch.utils.data import DataLoader, Dataset

from torchfast import DeviceLoader

MIB = 2**20
N_WARMUP = 8
REST_S = 0.03
"""Before each pass. Products alone warm an H200 so that a step of 1.39 ms takes 1.50, and who comes behind a
peer that lets the GPU idle found it cool: 7 % faster than the resident batch."""
PROTOCOL = (
    "CUDA events from the 8th batch of a pass to its last, nothing drained in between; a sample is one pass, "
    "after a rest of 30 ms; "
    "ideal = the longest of the step with a resident batch, one pinned copy of the batch's bytes, and, with "
    "workers, a batch of the loader by itself."
)
Step = Callable[[peers.Batch], None]


def main() -> None:
    """Run the parts asked for, all by default, and write a result file for each."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parts: dict[str, Callable[[int], Iterator[dict[str, Any]]]] = {
        "workloads": workloads,
        "resnet50": resnet50,
        "workers": workers,
        "host_time": host_time,
        "sweep": sweep,
    }
    parser.add_argument("parts", nargs="*", default=list(parts), help=f"of {', '.join(parts)}")
    parser.add_argument("--n-samples", type=int, default=5, help="passes timed for each number")
    arguments = parser.parse_args()
    check()
    for name in arguments.parts:
        subject = "device_loader" if name == "workloads" else f"loader_{name}"
        rows = []
        for row in parts[name](arguments.n_samples):
            print({key: value for key, value in row.items() if not key.startswith("samples")}, flush=True)
            rows.append(row)
            record.write(subject, PROTOCOL, rows)  # each time: what is cut off keeps what it has


def check() -> None:
    """Hold every peer to the bare loop's batches, before any is timed."""
    batches = [[torch.full((50, 50), float(k)).pin_memory(), torch.arange(k + 1)] for k in range(10)]
    for name, peer in peers.PEERS.items():
        for k, (first, second) in enumerate(peer(batches)):
            if not (bool((first == k).all()) and second.tolist() == list(range(k + 1))):
                raise SystemExit(f"{name} hands out a wrong batch {k}: nothing is timed")


# --- steps -----------------------------------------------------------------------------------------------


@functools.cache
def operands() -> tuple[torch.Tensor, torch.Tensor]:
    """Return the matrix that compute steps multiply, and the sum into which every step reads its batch."""
    return torch.randn(2048, 2048, device="cuda", dtype=torch.bfloat16), torch.zeros((), device="cuda")


def light(batch: peers.Batch) -> None:
    """Read every tensor once."""
    _, total = operands()
    for leaf in batch:
        total.add_(leaf.sum())


def products(milliseconds: float) -> Step:
    """Return a step of matrix products that take so long, and that reads a little of the batch."""
    matrix, total = operands()
    n_products = max(1, round(milliseconds / product_ms()))

    def step(batch: peers.Batch) -> None:
        total.add_(batch[-1].view(-1)[0])
        for _ in range(n_products):
            torch.mm(matrix, matrix)

    return step


@functools.cache
def product_ms() -> float:
    """Return the time of one product, of many in a row."""
    matrix, _ = operands()

    def step() -> None:
        for _ in range(100):
            torch.mm(matrix, matrix)

    samples: list[float] = record.times_ms(step, n_samples=5, n_steps=4, n_warmup=4)
    return min(samples) / 100


def with_item(step: Step) -> Step:
    """Return the step followed by `.item()`: the host then never runs ahead."""

    def stepped(batch: peers.Batch) -> None:
        step(batch)
        operands()[1].item()

    return stepped


# --- timing ----------------------------------------------------------------------------------------------


def pass_ms(batches: Iterable[peers.Batch], step: Step) -> float:
    """Return the time of a step in one pass."""
    torch.cuda.synchronize()
    time.sleep(REST_S)
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    n_steps = 0
    for batch in batches:
        step(batch)
        n_steps += 1
        if n_steps == N_WARMUP:
            began.record()
    ended.record()
    ended.synchronize()
    return float(began.elapsed_time(ended)) / (n_steps - N_WARMUP)


def passes_ms(make: Callable[[], Iterable[peers.Batch]], step: Step, n_samples: int) -> list[float]:
    """Return the time of a step in each of several passes, after one that is not counted."""
    return [pass_ms(make(), step) for _ in range(n_samples + 1)][1:]


@functools.cache
def copy_ms(n_bytes: int) -> float:
    """Return the time of one pinned copy of so many bytes, of many in a row: the card's limit."""
    host = torch.empty(n_bytes, dtype=torch.uint8, pin_memory=True)
    device = torch.empty(n_bytes, dtype=torch.uint8, device="cuda")
    samples = record.times_ms(
        lambda: device.copy_(host, non_blocking=True), n_samples=5, n_steps=20, n_warmup=3
    )
    return float(record.median(samples))


def compared(  # noqa: PLR0913 - what is compared with what, most of it by name
    made: Mapping[str, Callable[[], Iterable[peers.Batch]]],
    resident: Iterable[peers.Batch],
    step: Step,
    *,
    n_samples: int,
    limits_ms: Sequence[float],
    budget_s: float = math.inf,
    **what: Any,
) -> Iterator[dict[str, Any]]:
    """Time every peer in turn, round after round, and a resident batch as the floor.

    `limits_ms` are the other parts of a step: of them and of the work the longest is the ideal. After
    `budget_s` no further round is begun, but for two that count.
    """
    ways: dict[str, Callable[[], Iterable[peers.Batch]]] = {"resident": lambda: resident, **made}
    timed: dict[str, list[float]] = {name: [] for name in ways}
    until_s = time.perf_counter() + budget_s
    for n_rounds in range(n_samples + 1):
        if n_rounds > 2 and time.perf_counter() > until_s:
            break
        names = [*ways][n_rounds % len(ways) :] + [*ways][: n_rounds % len(ways)]
        for name in names:
            timed[name].append(pass_ms(ways[name](), step))
    parts_ms = [record.median(timed["resident"][1:]), *limits_ms]
    serial_ms, ideal_ms = sum(parts_ms), max(parts_ms)
    for name, samples in timed.items():
        step_ms = record.median(samples[1:])
        yield {
            **what,
            "peer": name,
            "step_ms": step_ms,
            "ideal_ms": ideal_ms,
            "ideal_share": round(ideal_ms / step_ms, 3),
            "overlap_efficiency": round(min(1.0, (serial_ms - step_ms) / (serial_ms - ideal_ms)), 3),
            "samples_ms": [round(sample, 4) for sample in samples[1:]],
        }


def compared_on(
    batches: Sequence[peers.Batch], step: Step, names: Sequence[str], n_samples: int, **what: Any
) -> Iterator[dict[str, Any]]:
    """Compare peers on a list of host batches."""
    torch.cuda.empty_cache()
    resident = [[leaf.cuda() for leaf in batches[0]]] * len(batches)
    limit_ms = copy_ms(sum(leaf.nbytes for leaf in batches[0]))
    made = {name: functools.partial(PEERS[name], batches) for name in names}
    yield from compared(made, resident, step, n_samples=n_samples, limits_ms=[limit_ms], **what)


PEERS = {**peers.PEERS, "timm PrefetchLoader": peers.timm}


# --- what is timed ---------------------------------------------------------------------------------------


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


RATIOS = (0.25, 0.5, 1, 2, 4, 16)
SWEPT = [
    name for name in ("pinned, non_blocking", "apex, record_stream", "torchtnt", "torchfast") if name in PEERS
]


def sweep(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time batches of 38.5 MB at many ratios of compute to transfer; with workers, of compute to loading."""
    for n_leaves in (1, 8):
        yield from sweep_lists("pinned", n_leaves, n_samples)
    yield from sweep_workers(n_samples)
    for source, n_leaves in (("pageable", 1), ("pageable", 8), ("pinned", 512), ("pageable", 512)):
        yield from sweep_lists(source, n_leaves, n_samples)


CELL_S = 1.0
"""There are many cells: after so long, none begins another round."""
LOADING_CELL_S = 3.0
"""Loading by processes scatters by a fifth from pass to pass."""


def sweep_lists(source: str, n_leaves: int, n_samples: int) -> Iterator[dict[str, Any]]:
    """Time lists of batches."""
    n_elements = 64 * 3 * 224 * 224
    limit_ms = copy_ms(n_elements * 4)
    batches = host_batches(n_leaves, n_elements // n_leaves, source, 24)
    for ratio, consumer in itertools.product(RATIOS, CONSUMERS):
        step = CONSUMERS[consumer](products(ratio * limit_ms))
        what = {"ratio": ratio, "n_leaves": n_leaves, "source": source, "consumer": consumer}
        some = batches[: 24 if ratio < 16 else 16]
        yield from compared_on(some, step, SWEPT, n_samples, budget_s=CELL_S, **what)


def sweep_workers(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time a DataLoader with workers, which is what most steps wait for."""
    for pin_memory, consumer in itertools.product((True, False), CONSUMERS):
        loader = workers_loader(48, make_s=0.01, is_jittered=False, pin_memory=pin_memory)
        load_ms = record.median(passes_ms(functools.partial(fed, iter, loader), lambda _: None, 1))
        for ratio in (0.25, 1, 2, 4):
            step = CONSUMERS[consumer](products(ratio * load_ms))
            source = f"8 workers, {'pinned' if pin_memory else 'pageable'}"
            what = {"ratio": ratio, "n_leaves": 1, "source": source, "consumer": consumer}
            yield from compared_with_workers(
                loader, step, n_samples, load_ms, budget_s=LOADING_CELL_S, **what
            )


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


class Made(Dataset[torch.Tensor]):
    """Batches of 64 uint8 images that take so long to make; one in ten five times as long, if jittered."""

    def __init__(self, n_batches: int, make_s: float, *, is_jittered: bool) -> None:
        self._n_batches = n_batches
        self._make_s = make_s
        self._is_jittered = is_jittered

    def __len__(self) -> int:
        """Return the number of batches."""
        return self._n_batches

    def __getitem__(self, index: int) -> torch.Tensor:
        """Make a batch."""
        time.sleep(self._make_s * (5 if self._is_jittered and index % 10 == 7 else 1))
        return torch.full((64, 3, 224, 224), index % 256, dtype=torch.uint8)


def workers(n_samples: int) -> Iterator[dict[str, Any]]:
    """Time a DataLoader with eight workers, one batch in ten five times late."""
    for pin_memory in (False, True):
        loader = workers_loader(80, make_s=0.03, is_jittered=True, pin_memory=pin_memory)
        load_ms = record.median(passes_ms(functools.partial(fed, iter, loader), lambda _: None, n_samples))
        what = {"loader": "8 workers, one in ten 5 x late", "pin_memory": pin_memory, "load_ms": load_ms}
        yield from compared_with_workers(loader, products(8.0), n_samples, load_ms, **what)


def workers_loader(
    n_batches: int, *, make_s: float, is_jittered: bool, pin_memory: bool
) -> DataLoader[torch.Tensor]:
    """Return a DataLoader whose eight workers take so long to make a batch of 9.6 MB."""
    return DataLoader(
        Made(n_batches, make_s, is_jittered=is_jittered),
        batch_size=None,
        num_workers=8,
        persistent_workers=True,
        pin_memory=pin_memory,
        prefetch_factor=4,
    )


def compared_with_workers(
    loader: DataLoader[torch.Tensor], step: Step, n_samples: int, load_ms: float, /, **what: Any
) -> Iterator[dict[str, Any]]:
    """Compare peers on a DataLoader with workers."""
    made = {name: functools.partial(fed, PEERS[name], loader) for name in SWEPT if name != "torchfast"}
    made["torchfast"] = functools.partial(fed, iter, DeviceLoader(loader, "cuda"))
    resident = [[torch.zeros(1, device="cuda")]] * len(loader)
    limits_ms = [copy_ms(64 * 3 * 224 * 224), load_ms]
    yield from compared(made, resident, step, n_samples=n_samples, limits_ms=limits_ms, **what)


def fed(peer: Callable[[Any], Any], loader: Iterable[torch.Tensor]) -> Any:
    """Return a pass of a peer over a loader whose batches are bare tensors."""
    return peer([batch] for batch in loader)


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
