"""How reliable a DeviceLoader is, counted: `python benchmarks/device_loader_reliability.py [PART...]`.

- `batches`   a million numbered batches under a GPU that lags behind: none is wrong (`loader_numbered.py`)
- `peers`     the same count of prefetchers that race, so that it is seen to be able to count
- `memory`    reserved and pinned memory over 50 epochs (`loader_leftovers.py`)
- `breaks`    a thousand early breaks with persistent workers, each followed by a whole pass
- `faults`    errors in dataset, collate, worker, transfer, transform; killed workers (`loader_faults.py`)
- `exits`     ends of the interpreter in the middle of a pass

Every job is a process of its own, all at the same time; the result file is written as they report.
"""

import argparse
import multiprocessing as mp
import time
from collections.abc import Iterator
from multiprocessing.connection import wait
from typing import Any

import loader_faults
import loader_leftovers
import loader_numbered
import record
import torch

PROTOCOL = (
    "batch k holds k in every element; the GPU sleeps, 20 to 60 us or now and then 1 ms, then compares the "
    "batch with k, and counts; the loop drops its batch at once and does not wait for the GPU; all jobs at "
    "the same time, each in a process of its own"
)
CONTEXT = mp.get_context("spawn")
Job = tuple[str, Any, dict[str, Any]]
NEEDS_GPU = ("batches", "peers", "memory")
PARTS = (*NEEDS_GPU, "breaks", "faults", "exits")
WORKERS: list[dict[str, Any]] = [{}, {"pin_memory": True}, {"in_order": False}, {"across_epochs": True}]


def main() -> None:
    """Run the parts asked for, all by default, and write the result file as they go."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    has_gpu = torch.cuda.is_available()
    parser.add_argument(
        "parts", nargs="*", default=[part for part in PARTS if has_gpu or part not in NEEDS_GPU]
    )
    parser.add_argument("--n-batches", type=int, default=1_000_000)
    parser.add_argument("--n-peer-batches", type=int, default=10_000)
    parser.add_argument("--n-epochs", type=int, default=50)
    parser.add_argument("--n-breaks", type=int, default=1000)
    parser.add_argument("--n-faults", type=int, default=120, help="in each place")
    parser.add_argument("--n-kills", type=int, default=40)
    parser.add_argument("--n-exits", type=int, default=35)
    parser.add_argument("--limit-s", type=float, default=3600, help="begin nothing new after this")
    options = parser.parse_args()
    jobs = [job for part in options.parts for job in jobs_of(part, options)]
    results = Results(jobs)
    run(jobs, results)
    print(f"written: {results.write()}")


def jobs_of(part: str, options: argparse.Namespace) -> Iterator[Job]:
    """Return what a part consists of: for each job its part, a function and its arguments."""
    limited = {"limit_s": options.limit_s}
    n_left = CONTEXT.Value("q", options.n_batches)
    n_breaks = -(-options.n_breaks // len(WORKERS))
    jobs: dict[str, list[tuple[Any, dict[str, Any]]]] = {
        "batches": [
            (
                loader_numbered.count_ours,
                {"shape": shape, "source": source, "n_left": n_left, **limited},
            )
            for shape, source in loader_numbered.KINDS
        ],
        "peers": [
            (
                loader_numbered.count_peer,
                {"peer": peer, "n_left": CONTEXT.Value("q", options.n_peer_batches), **limited},
            )
            for peer in loader_numbered.PEERS
        ],
        "memory": [
            (loader_leftovers.count_memory, {"source": source, "depth": depth, "n_epochs": options.n_epochs})
            for source, depth in loader_leftovers.MEMORY_KINDS
        ],
        "breaks": [
            (loader_leftovers.count_breaks, {"options": workers, "n_breaks": n_breaks, **limited})
            for workers in WORKERS
        ],
        "faults": [
            (loader_faults.count_kills, {"n_kills": options.n_kills, **limited}),
            *[
                (loader_faults.count_faults, {"place": place, "n_faults": options.n_faults, **limited})
                for place in loader_faults.PLACES
            ],
        ],
        "exits": [(loader_leftovers.count_exits, {"n_exits": options.n_exits})],
    }
    return iter([(part, *job) for job in jobs[part]])


class Results:
    """The rows of all jobs, and the file in which they are."""

    def __init__(self, jobs: list[Job]) -> None:
        self._parts = [job[0] for job in jobs]
        self._rows: list[dict[str, Any]] = [{} for _ in jobs]
        self._written_s = 0.0

    def put(self, index: int, row: dict[str, Any]) -> None:
        """Replace a job's row; write the file, at most once a second."""
        self._rows[index] = {"part": self._parts[index], **row}
        print(self._rows[index], flush=True)
        if time.monotonic() - self._written_s > 1:
            self.write()

    def fail(self, index: int, status: int | None) -> None:
        """Note that a job's process ended badly."""
        self.put(index, {**self._rows[index], "ended_with_status": status, "n_wrong": 1})

    def write(self) -> Any:
        """Write the file."""
        self._written_s = time.monotonic()
        return record.write("loader_reliability", PROTOCOL, [row for row in self._rows if row])


def run(jobs: list[Job], results: Results) -> None:
    """Run each job in a process of its own, and collect what they report."""
    pending = dict[Any, int]()
    processes = []
    for index, (_, function, kind) in enumerate(jobs):
        reader, writer = CONTEXT.Pipe(duplex=False)
        processes.append(CONTEXT.Process(target=work, args=(writer, mp.get_start_method(), function, kind)))
        processes[-1].start()
        writer.close()  # the job's own end is then the last, and closes with it
        pending[reader] = index
    while pending:
        for reader in list[Any](wait(list(pending))):
            try:
                results.put(pending[reader], reader.recv())
            except EOFError:
                del pending[reader]
    for index, process in enumerate(processes):
        process.join()
        if process.exitcode:
            results.fail(index, process.exitcode)


def work(writer: Any, start_method: str, function: Any, kind: dict[str, Any]) -> None:
    """Do one job, in its process; its workers are started as elsewhere, not as it was itself."""
    mp.set_start_method(start_method, force=True)
    function(writer.send, **kind)


if __name__ == "__main__":
    main()
