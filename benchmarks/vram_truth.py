"""Measures what training runs really need on this machine's GPU, for `vram_accuracy.py` to score against.

    python benchmarks/vram_truth.py --jobs benchmarks/vram_jobs.json --truth truth.json [--at-once 4]

Each job runs in a process of its own: model, batch, optimizer, then three steps, as `estimate_vram` takes
them. The packages are imported once, before CUDA is initialised, and each job is forked from there.
"""

import argparse
import functools
import json
import math
import multiprocessing
import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import record
import torch
from torch import nn
from zoo import AUTOCAST, Built, Job, build, let_torchvision_import

from torchfast._estimate.step import own_loss
from torchfast._modules import call
from torchfast._tree import map_tensors

ONE_FORK = threading.Lock()  # file locks of other packages refuse two forks at a time


def main() -> None:
    """Measure the jobs and write the truth."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--jobs", type=Path, required=True)
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--at-once", type=int, default=1, help="how many jobs share the GPU")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="begin no further job after that")
    options = parser.parse_args()
    let_torchvision_import()
    import timm  # noqa: F401 - imported before the forks, which then need not
    import transformers  # noqa: F401 - likewise

    until_s = time.monotonic() + options.limit_s
    with ThreadPoolExecutor(options.at_once) as pool:
        run = functools.partial(in_own_process, until_s=until_s)
        runs = list(pool.map(run, json.loads(options.jobs.read_text())))
    environment = record.environment()
    truth = {"gpu": environment["machine"]["gpu"], **environment, "jobs": [run for run in runs if run]}
    options.truth.write_text(json.dumps(truth, indent=1) + "\n")


def in_own_process(job: Job, until_s: float) -> dict[str, Any] | None:
    """Run a job in a forked process and return what it needed; None, with a line, if it failed."""
    if time.monotonic() > until_s:
        return None
    began_s = time.perf_counter()
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=report, args=(job, there))
    with ONE_FORK:
        process.start()
    there.close()
    try:
        run: dict[str, Any] | None = here.recv()
    except EOFError:
        run = None
    process.join()
    print(f"{job['id']:<60} {time.perf_counter() - began_s:5.1f} s {'' if run else 'failed'}", flush=True)
    return run


def report(job: Job, there: Connection) -> None:
    """Send what a job needed, from the process that ran it."""
    torch.set_num_threads(2)
    there.send({"id": job["id"], **measured(job)})


def measured(job: Job) -> dict[str, Any]:
    """Train three steps and return the peaks and what the process holds afterwards."""
    torch.manual_seed(0)
    built = build(job)
    built.model.cuda()
    if built.teacher is not None:
        built.teacher.cuda()
    inputs, target = map_tensors(torch.Tensor.cuda, (built.inputs, built.target))
    optimizer = built.make_optimizer(built.model.parameters())
    scaler = torch.amp.GradScaler("cuda") if job["precision"] == "amp_fp16" else None
    for _ in range(3):
        train(
            built,
            (inputs, target),
            optimizer,
            scaler,
            clip=job.get("clip", False),
            autocast=AUTOCAST.get(job["precision"]),
        )
    torch.cuda.synchronize()
    stats = torch.cuda.memory_stats()
    return {
        "peak_requested": stats["requested_bytes.all.peak"],
        "peak_allocated": stats["allocated_bytes.all.peak"],
        "peak_reserved": stats["reserved_bytes.all.peak"],
        "process_used": process_bytes(),
        "retries": stats["num_alloc_retries"],
    }


def train(  # noqa: PLR0913 - the parts of a step
    built: Built,
    batch: tuple[Any, Any],
    optimizer: torch.optim.Optimizer,
    scaler: torch.amp.GradScaler | None,
    *,
    clip: bool,
    autocast: torch.dtype | None,
) -> None:
    """Take one step."""
    inputs, target = batch
    optimizer.zero_grad()
    with torch.autocast("cuda", dtype=autocast, enabled=autocast is not None):
        wanted = [] if target is None else [target]
        if built.teacher is not None:
            with torch.no_grad():
                wanted.append(call(built.teacher, inputs))
        output = call(built.model, inputs)
        loss = own_loss(output)[0] if built.loss is None else built.loss(output, *wanted)
    del output
    (loss if scaler is None else scaler.scale(loss)).backward()
    if clip:
        if scaler is not None:
            scaler.unscale_(optimizer)
        nn.utils.clip_grad_norm_(built.model.parameters(), 1.0)
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def process_bytes() -> int | None:
    """Return what the driver says that this process holds; None where it does not say."""
    import pynvml

    pynvml.nvmlInit()
    handle = pynvml.nvmlDeviceGetHandleByIndex(0)
    own = [p for p in pynvml.nvmlDeviceGetComputeRunningProcesses(handle) if p.pid == os.getpid()]
    return own[0].usedGpuMemory if own else None


if __name__ == "__main__":
    main()
