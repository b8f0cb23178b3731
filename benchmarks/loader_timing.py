"""How a way to feed a GPU is timed: steps of known length, passes, and ways compared in turn.

On the device's own clock, from the eighth batch of a pass to its last, without draining the pipeline in
between. Nothing is left out: a pass is iterated as a training loop would, and each step reads the batch.
"""

import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import loader_peers as peers
import record
import torch

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
PEERS = {**peers.PEERS, "timm PrefetchLoader": peers.timm}


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
    batches: Sequence[peers.Batch],
    step: Step,
    names: Sequence[str],
    n_samples: int,
    *,
    loader: Iterable[peers.Batch] | None = None,
    **what: Any,
) -> Iterator[dict[str, Any]]:
    """Compare peers on a list of host batches, or on a loader that hands out the same."""
    torch.cuda.empty_cache()
    resident = [[leaf.cuda() for leaf in batches[0]]] * len(batches)
    limit_ms = copy_ms(sum(leaf.nbytes for leaf in batches[0]))
    made = {name: functools.partial(PEERS[name], batches if loader is None else loader) for name in names}
    yield from compared(made, resident, step, n_samples=n_samples, limits_ms=[limit_ms], **what)
