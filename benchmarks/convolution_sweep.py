"""Measures what cuDNN takes beside the output of convolutions, for `convolution_sweep.csv` of the estimate.

    python benchmarks/convolution_sweep.py shapes --out shapes.csv [--rows 35000] [--limit-s 1200]
    python benchmarks/convolution_sweep.py measure --shapes shapes.csv --out rows.csv --at-once 12
    python benchmarks/convolution_sweep.py merge rows.csv

`shapes` needs no GPU: it walks the networks of `convolution_networks.py` and gives each of their
convolutions one to three times a batch size, a type and a layout, none that the table has. Its columns
are those of the table without the bytes. `measure` writes the columns of the table, row by row and in random
order, and goes on where an earlier run of the same output was cut off (`--limit-s`). Rows of the table are
measured too, as a control: their agreement is printed.

The bytes are what the caching allocator was asked for while one operator ran, at the peak, beyond what it
held before and what the operator returned: the forward pass, the gradient of the data, that of the weight.
They are figures of a process, so several share a GPU. A process that a kernel takes down is replaced, its row
left out. Values matter to nothing here, so no tensor is filled.
"""

import argparse
import math
import multiprocessing
import queue
import random
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from multiprocessing.connection import Connection
from operator import attrgetter
from pathlib import Path
from typing import Any, TextIO

import record
import torch

from torchfast._estimate.cuda_behaviour.convolution import _memory_format, runs_own_kernels
from torchfast._estimate.cuda_behaviour.convolution_workspaces import (
    TABLE,
    Shape,
    Taken,
    row_of,
    shape_of,
    table,
)

aten = torch.ops.aten
SHAPE_COLUMNS = "dtype,channels_last,batch,n_in,n_out,groups,kernel,stride,dilation,size_in,size_out"
COLUMNS = f"{SHAPE_COLUMNS},forward_bytes,data_bytes,weight_bytes"


def main() -> None:
    """List convolutions, or measure listed ones."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    commands = parser.add_subparsers(required=True)
    shapes = commands.add_parser("shapes", help="list convolutions of many networks; needs no GPU")
    shapes.add_argument("--out", type=Path, required=True)
    shapes.add_argument("--rows", type=int, default=35_000, help="more are thinned at random")
    shapes.add_argument("--limit-s", type=float, default=1200, help="walk no further network after that")
    shapes.set_defaults(run=list_shapes)
    measure = commands.add_parser("measure", help="measure listed convolutions on a GPU")
    measure.add_argument("--shapes", type=Path, required=True)
    measure.add_argument("--out", type=Path, required=True)
    measure.add_argument("--at-once", type=int, default=12, help="how many processes share the GPU")
    measure.add_argument("--limit-s", type=float, default=math.inf, help="measure no further row after that")
    measure.add_argument("--controls", type=int, default=150, help="how many rows of the table to measure")
    measure.set_defaults(run=measure_shapes)
    merge = commands.add_parser("merge", help="add measured rows to the table of the estimate")
    merge.add_argument("rows", type=Path, nargs="+", help="later ones replace earlier ones and the table's")
    merge.set_defaults(run=merge_rows)
    options = parser.parse_args()
    options.run(options)


# --- rows --------------------------------------------------------------------------------------------------


def read(path: Path) -> Iterator[Shape]:
    """Yield the convolutions of a file, whether or not their bytes follow."""
    for text in path.read_text().splitlines()[1:]:
        yield shape_of(text.split(",")[: SHAPE_COLUMNS.count(",") + 1])


def merge_rows(options: argparse.Namespace) -> None:
    """Write the table anew, with the rows of files."""
    rows = dict(table())
    for path in options.rows:
        lines = path.read_text().splitlines()[1:]
        rows |= dict(map(row_of, lines))
    text = "".join(",".join([shape.line, *map(str, rows[shape])]) + "\n" for shape in sorted(rows, key=place))
    TABLE.write_text(f"{COLUMNS}\n{text}")
    print(f"{len(rows)} rows")


def place(shape: Shape) -> tuple[Any, ...]:
    """Return what rows of the table are sorted by: what differs at last is the batch size."""
    sizes = (shape.kernel, shape.stride, shape.dilation, shape.size_in, shape.size_out)
    channels = (shape.n_in, shape.n_out, shape.groups)
    return list(DTYPES).index(shape.dtype), shape.channels_last, *channels, *sizes, shape.batch


# --- the list ----------------------------------------------------------------------------------------------

DTYPES = {torch.float32: 9, torch.bfloat16: 8, torch.float16: 4}  # and how often each is drawn
BATCHES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 128, 192, 256)
USUAL_BYTES, MOST_BYTES = 2**30, 2**32  # of all operands
MOST_OPERATIONS = {True: 2e12, False: 1e11}  # by whether channels are in one group: others run slowly


def list_shapes(options: argparse.Namespace) -> None:
    """Write the list network by network; at the end draw more of what was found, or thin it."""
    from convolution_networks import networks  # it needs the libraries

    rng = random.Random(0)  # noqa: S311 - a sample, no secret
    until_s = time.monotonic() + options.limit_s
    listed = Listed({shape for shape, _ in table()})
    sources: dict[Shape, str] = {}  # of the convolutions of one sample
    with options.out.open("w") as file:
        print(SHAPE_COLUMNS, file=file)
        for name, shapes in networks(rng):
            new = sorted(shapes - sources.keys(), key=attrgetter("line"))
            sources |= dict.fromkeys(new, name.split()[0])
            for shape in new:
                for _ in range(rng.choices((1, 2, 3), (5, 3, 2))[0]):
                    listed.draw(shape, sources[shape], rng, file)
            print(f"{name:<70} {len(new):>5} new, {len(listed.rows):>6} rows", flush=True)
            if time.monotonic() > until_s:
                break
        for shape in rng.sample(list(sources), len(sources)):
            if len(listed.rows) < options.rows:
                listed.draw(shape, sources[shape], rng, file)
    rows = rng.sample(sorted(listed.rows, key=attrgetter("line")), min(options.rows, len(listed.rows)))
    options.out.write_text("".join(f"{text}\n" for text in (SHAPE_COLUMNS, *(row.line for row in rows))))
    print(f"{len(rows)} rows:", dict(Counter(listed.rows[row] for row in rows)))


@dataclass
class Listed:
    """The rows of the list, with the source of each."""

    known: set[Shape]  # of the table
    rows: dict[Shape, str] = field(default_factory=dict)

    def draw(self, shape: Shape, source: str, rng: random.Random, file: TextIO) -> None:
        """Write a convolution of one sample as it might be met, unless it is known or nothing fits."""
        for _ in range(10):
            drawn = given(shape, rng)
            most_bytes = MOST_BYTES if rng.random() < 0.1 else USUAL_BYTES
            fits = sum(drawn.operand_bytes(1)) <= most_bytes and is_moderate(drawn) and not is_seldom(drawn)
            if fits and drawn not in self.known and drawn not in self.rows and runs(drawn):
                self.rows[drawn] = source
                print(drawn.line, file=file, flush=True)
                break


def given(shape: Shape, rng: random.Random) -> Shape:
    """Return a convolution of one sample with a batch size, a type and a layout."""
    is_sequence = len(shape.kernel) == 2 and shape.size_in[0] == 1 < shape.size_in[1]
    return replace(
        shape,
        batch=shape.batch * rng.choice(BATCHES),
        dtype=rng.choices(list(DTYPES), list(DTYPES.values()))[0],
        channels_last=not is_sequence and rng.random() < 0.4,
    )


def is_moderate(shape: Shape) -> bool:
    """Whether a convolution is done in some ten milliseconds."""
    n_products = shape.n_in // shape.groups * math.prod(shape.kernel)
    n_operations = 2 * shape.batch * shape.n_out * math.prod(shape.size_out) * n_products
    return n_operations <= MOST_OPERATIONS[shape.groups == 1]


def is_seldom(shape: Shape) -> bool:
    """Whether cuDNN runs it as a transposed convolution only, which few are that keep the size."""
    return runs_own_kernels(shape) and max(shape.stride) == 1


def runs(shape: Shape) -> bool:
    """Whether a convolution gives the sizes and has the layout that it says."""
    tensor, weight, gradient = tensors = operands(shape, "meta")
    found = [call().shape for call in passes(shape, tensors)]
    layout = _memory_format(tensor, weight)
    is_last = layout is not torch.contiguous_format
    is_dense = all(t.is_contiguous(memory_format=layout) for t in tensors)
    return (
        found == [t.shape for t in (gradient, tensor, weight)] and is_last == shape.channels_last and is_dense
    )


# --- one convolution ---------------------------------------------------------------------------------------


def operands(shape: Shape, device: str) -> tuple[torch.Tensor, ...]:
    """Return input, weight and the gradient of the output, as they come from the allocator."""
    last = torch.channels_last if len(shape.kernel) == 2 else torch.channels_last_3d
    layout = last if shape.channels_last else torch.contiguous_format
    sizes = (
        (shape.batch, shape.n_in, *shape.size_in),
        (shape.n_out, shape.n_in // shape.groups, *shape.kernel),
        (shape.batch, shape.n_out, *shape.size_out),
    )
    return tuple(torch.empty(size, dtype=shape.dtype, device=device, memory_format=layout) for size in sizes)


def passes(shape: Shape, tensors: Sequence[torch.Tensor]) -> tuple[Callable[[], torch.Tensor], ...]:
    """Return the forward pass and both gradients of a convolution, ready to be called.

    What PyTorch's own kernels would run is run as the transposed convolution that it reverses, by cuDNN.
    """
    tensor, weight, gradient = tensors
    is_reversed = runs_own_kernels(shape)
    if is_reversed:
        tensor, gradient = gradient, tensor
    padding, over = paddings(shape)
    options = (shape.stride, padding, shape.dilation, is_reversed, over if is_reversed else [0] * len(over))

    def forward() -> torch.Tensor:
        return aten.convolution(tensor, weight, None, *options, shape.groups)  # type: ignore[no-any-return]

    def backward(i: int) -> torch.Tensor:
        wanted = [i == 0, i == 1, False]
        found = aten.convolution_backward(gradient, tensor, weight, None, *options, shape.groups, wanted)
        return found[i]  # type: ignore[no-any-return]

    data, of_weight = partial(backward, 0), partial(backward, 1)
    return (data, forward, of_weight) if is_reversed else (forward, data, of_weight)


def paddings(shape: Shape) -> tuple[list[int], list[int]]:
    """Return the padding that gives the output's size, which the table does not say, and what is left over.

    Of several, it is half an odd kernel where the strides overlap, else the least.
    """
    found, over = [], []
    parts = zip(shape.kernel, shape.stride, shape.dilation, shape.size_in, shape.size_out, strict=True)
    for kernel, stride, dilation, n_in, n_out in parts:
        extent = dilation * (kernel - 1) + 1
        least = max(0, -(-((n_out - 1) * stride + extent - n_in) // 2))
        half = extent // 2
        is_half = extent % 2 and stride < extent and (n_in + 2 * half - extent) // stride + 1 == n_out
        found.append(half if is_half else least)
        over.append(n_in + 2 * found[-1] - extent - (n_out - 1) * stride)
    return found, over


# --- the processes that measure ----------------------------------------------------------------------------

MOST_MEASURED_BYTES = 2**33
MOST_KEPT_BYTES = 2**31  # of free blocks, in each process
LONGEST_S = 60.0


def answer(here: Connection) -> None:
    """Measure what is asked for until nothing is, in a process of its own."""
    torch.backends.cudnn.benchmark = False
    torch.set_num_threads(1)
    while (shape := here.recv()) is not None:
        try:
            reply: Taken | str = measured(shape)
        except torch.OutOfMemoryError:
            reply = "out of memory"
        except RuntimeError as error:
            reply = str(error).partition("\n")[0]
            torch.cuda.synchronize()  # raises, and ends the process, where a kernel took the context down
        here.send(reply)
        if torch.cuda.memory_reserved() > MOST_KEPT_BYTES:
            torch.cuda.empty_cache()


def measured(shape: Shape) -> Taken | str:
    """Return what the three directions took, or why that was not to be found out."""
    if sum(shape.operand_bytes(1)) > MOST_MEASURED_BYTES:
        return "too large"
    tensors = operands(shape, "cuda")
    torch.cuda.reset_accumulated_memory_stats()
    forward, data, weight = (record.taken_bytes(call)[0] for call in passes(shape, tensors))
    torch.cuda.synchronize()  # an error of a kernel is this row's
    was_refused = torch.cuda.memory_stats()["num_ooms"] > 0  # cuDNN then takes another kernel
    return "short of memory" if was_refused else (forward, data, weight)


@dataclass
class Worker:
    """A process that measures, replaced when it dies."""

    context: Any
    process: Any = None
    here: Connection = field(init=False)

    def measured(self, shape: Shape) -> Taken | str:
        """Have a convolution measured."""
        if self.process is None:
            self.here, there = multiprocessing.Pipe()
            self.process = self.context.Process(target=answer, args=(there,), daemon=True)
            self.process.start()
            there.close()
        try:
            self.here.send(shape)
            if self.here.poll(LONGEST_S):
                reply: Taken | str = self.here.recv()
                return reply
            reason = "took too long"
        except (EOFError, OSError):
            reason = "took its process down"
        self.end()
        return reason

    def end(self) -> None:
        """End the process, whatever it is doing."""
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None


# --- all of them -------------------------------------------------------------------------------------------


@dataclass
class Sweep:
    """What is to be measured and what has been."""

    tasks: "queue.SimpleQueue[Shape]"
    listed: set[Shape]
    controls: dict[Shape, Taken]
    file: TextIO
    until_s: float
    found: dict[Shape, Taken] = field(default_factory=dict)  # of the controls
    reasons: Counter[str] = field(default_factory=Counter)
    n_written: int = 0
    began_s: float = field(default_factory=time.monotonic)
    lock: threading.Lock = field(default_factory=threading.Lock)
    large: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(3))

    def take(self, shape: Shape, taken: Taken | str) -> None:
        """Keep what was measured."""
        with self.lock:
            if isinstance(taken, str):
                self.reasons[taken] += 1
                if self.reasons[taken] <= 3:
                    print(f"left out, {taken}: {shape.line}", flush=True)
                return
            if shape in self.controls:
                self.found[shape] = taken
            if shape in self.listed:
                print(shape.line, *taken, sep=",", file=self.file, flush=True)
                self.n_written += 1
                if self.n_written % 1000 == 0:
                    elapsed_s = time.monotonic() - self.began_s
                    print(f"{self.n_written} rows, {self.n_written / elapsed_s:.0f}/s", flush=True)


def measure_shapes(options: argparse.Namespace) -> None:
    """Measure the list and write the rows as they come."""
    print(torch.__version__, "cuDNN", torch.backends.cudnn.version(), flush=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch"])  # a fork each, which need not import it
    before = options.out.read_text() if options.out.exists() else f"{COLUMNS}\n"
    options.out.write_text(before[: before.rindex("\n") + 1])  # a line that was cut off is measured again
    done = set(read(options.out))
    rng = random.Random(0)  # noqa: S311 - a sample, no secret
    controls = dict(rng.sample(list(table()), options.controls))
    todo = [shape for shape in read(options.shapes) if shape not in done]
    rng.shuffle(todo)
    tasks: queue.SimpleQueue[Shape] = queue.SimpleQueue()
    for shape in dict.fromkeys((*controls, *todo)):
        tasks.put(shape)
    with options.out.open("a") as file:
        sweep = Sweep(tasks, set(todo), controls, file, time.monotonic() + options.limit_s)
        with ThreadPoolExecutor(options.at_once) as pool:
            list(pool.map(work, [sweep] * options.at_once, [context] * options.at_once))
    elapsed_s = time.monotonic() - sweep.began_s
    print(f"{sweep.n_written} rows in {elapsed_s:.0f} s, {tasks.qsize()} not reached")
    print("left out:", dict(sweep.reasons))
    compare(controls, sweep.found)


def work(sweep: Sweep, context: Any) -> None:
    """Have one process measure tasks until none are left or the time is over."""
    worker = Worker(context)
    while time.monotonic() < sweep.until_s:
        try:
            shape = sweep.tasks.get_nowait()
        except queue.Empty:
            break
        is_large = sum(shape.operand_bytes(1)) > USUAL_BYTES
        with sweep.large if is_large else nullcontext():
            taken = worker.measured(shape)
        sweep.take(shape, taken)
    worker.end()


def compare(controls: dict[Shape, Taken], found: dict[Shape, Taken]) -> None:
    """Print how many rows of the table were found again, to the byte, and what the others took."""
    agree: dict[torch.dtype, list[bool]] = defaultdict(list)
    for shape, taken in found.items():
        is_same = taken == controls[shape]
        agree[shape.dtype].append(is_same)
        if not is_same:
            print(f"differs: {shape.line} was {controls[shape]} is {taken}")
    for dtype, same in agree.items():
        print(f"control, {dtype}: {sum(same)} of {len(same)} rows agree to the byte")


if __name__ == "__main__":
    main()
