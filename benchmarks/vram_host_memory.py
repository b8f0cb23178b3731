"""How much host memory an estimate takes beyond the model: the peak of the process less what it held before.

    python benchmarks/vram_host_memory.py --jobs benchmarks/vram_jobs.json

Each job runs in a process of its own, forked after the imports and before any estimate, so that what the
first estimate loads counts. Linux only: the peak is `VmHWM` of /proc, set back after the model is built.
"""

import argparse
import ctypes
import gc
import json
import multiprocessing
import random
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record
import torch
from vram_accuracy import estimate_job, percentile
from zoo import Job, build, let_torchvision_import

from torchfast._bytes import KIB

PROTOCOL = (
    "growth of the peak resident set of a forked process over one estimate_vram on the CPU, the model built "
    "before, packages imported, no estimate made before; mebibytes."
)


def main() -> None:
    """Measure the jobs, print, write."""
    options = parse()
    jobs = [job for job in json.loads(options.jobs.read_text()) if options.only in job["id"]]
    if options.sample and options.sample < len(jobs):
        jobs = random.Random(0).sample(jobs, options.sample)  # noqa: S311 -- not a secret
    let_torchvision_import()
    import timm  # noqa: F401 - imported before the forks, which then need not
    import transformers  # noqa: F401 - likewise

    rows = []
    for job in jobs:
        rows.append(in_own_process(job))
        print(f"{job['id']:<64}{rows[-1]['grown_mib']:>8.1f} MiB", flush=True)
    grown = [row["grown_mib"] for row in rows]
    result = {"n": len(rows), "grown_median_mib": percentile(grown, 50), "grown_max_mib": max(grown)}
    if options.record:
        record.write("vram_host_memory", PROTOCOL, rows, summary=result)
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=Path, required=True, help="jobs in the schema of zoo.py")
    parser.add_argument("--sample", type=int, default=0, help="only so many jobs, always the same ones")
    parser.add_argument("--only", default="", help="only jobs with this text in their id")
    parser.add_argument("--record", action="store_true", help="write benchmarks/results/")
    return parser.parse_args()


def in_own_process(job: Job) -> dict[str, Any]:
    """Estimate a job in a forked process, and return by how much that grew."""
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=report, args=(job, there))
    process.start()
    there.close()
    row: dict[str, Any] = here.recv()
    process.join()
    return row


def report(job: Job, there: Connection) -> None:
    """Send what an estimate of the job took, from the process that made it."""
    torch.set_num_threads(1)
    built = build(job)
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # memory that was freed and is used again would not be seen
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM is now what is resident
    before = resident_bytes("VmHWM")
    estimate = estimate_job(built, job, None)
    grown = resident_bytes("VmHWM") - before
    there.send({"id": job["id"], "grown_mib": grown / 2**20, "n_events": len(estimate.timeline)})


def resident_bytes(name: str) -> int:
    """Return a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * KIB for line in lines if line.startswith(name))


if __name__ == "__main__":
    main()
