"""Whether the batch that `max_batch_size` finds runs on this GPU, and 3 % more does not.

    python benchmarks/vram_batch_size.py

Fifteen models under limits of 8, 16 and 24 GiB (`torch.cuda.set_per_process_memory_fraction`). Each batch
size is tried in a process of its own, three training steps: the one found, 3 % more, 3 % less.
"""

import math
import multiprocessing
import time
from multiprocessing.connection import Connection, wait
from typing import Any

import record
import torch
from vram_accuracy import estimate_job
from vram_truth import train
from zoo import AUTOCAST, Job, build, let_torchvision_import

from torchfast._bytes import GIB, MIB
from torchfast._tree import map_tensors

LLAMA = {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 12,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 32000,
}
T5 = {"decoder_start_token_id": 0}
COLUMNS = ("source", "model", "size", "batch", "optimizer", "precision")
ROWS: tuple[tuple[Any, ...], ...] = (  # the columns, the limit in GiB, and what else there is
    ("timm", "resnet50", 224, 32, "adamw", "fp32", 8, {}),
    ("timm", "resnet18", 224, 32, "sgdm", "amp_bf16", 8, {"channels_last": True}),
    ("timm", "vit_small_patch16_224", 224, 32, "adamw", "amp_bf16", 16, {}),
    ("timm", "convnext_tiny", 224, 16, "sgdm", "fp32", 16, {}),
    ("hf", "gpt2", 512, 4, "adamw", "fp32", 16, {}),
    ("hf", "gpt2", 512, 4, "sgd", "bf16", 8, {}),
    ("hf", "llama", 1024, 2, "adamw", "amp_bf16", 24, {"config": LLAMA}),
    ("custom", "unet", 128, 4, "adamw", "amp_bf16", 8, {}),
    ("custom", "encoder", 256, 8, "adamw", "fp32", 16, {}),
    ("custom", "mlp", 2048, 512, "adamw", "fp32", 24, {}),
    ("timm", "densenet121", 224, 16, "adamw", "fp32", 8, {}),
    ("timm", "swin_tiny_patch4_window7_224", 224, 16, "adamw", "amp_bf16", 16, {}),
    ("torchvision", "deeplabv3_resnet50", 256, 4, "sgdm", "amp_bf16", 16, {}),
    ("hf", "t5", 256, 4, "adafactor", "fp32", 8, {"auto": "AutoModelForSeq2SeqLM", "config": T5}),
    ("custom", "language_model", 256, 16, "adamw", "fp32", 24, {}),
)
JOBS: list[tuple[Job, int]] = [
    ({"id": f"{row[1]}-{row[5]}", **dict(zip(COLUMNS, row, strict=False)), **row[7]}, row[6]) for row in ROWS
]
BUDGET_BYTES = 60 * GIB  # of all processes at a time: others may use the GPU too
PROTOCOL = (
    "largest batch found by VRAMEstimate.max_batch_size(limit_bytes=limit) without touching the GPU, then "
    "three training steps in fresh processes under set_per_process_memory_fraction at that batch and at "
    "0.97 and 1.03 times it; a failure is torch.OutOfMemoryError."
)


def main() -> None:
    """Predict, try, print, write."""
    let_torchvision_import()
    import timm  # noqa: F401 - imported before the forks, which then need not
    import transformers  # noqa: F401 - likewise

    found = in_processes([(predict, (task, limit), 0) for task, limit in JOBS])
    tries = [
        (attempt, (task, limit, size), (limit + 1) * GIB)
        for (task, limit), row in zip(JOBS, found, strict=True)
        for size in sizes(row["batch_size"])
    ]
    outcomes = in_processes(tries)
    rows = []
    for (task, limit), row in zip(JOBS, found, strict=True):
        mine = {
            size: outcome
            for (_, (other, _, size), _), outcome in zip(tries, outcomes, strict=True)
            if other["id"] == task["id"]
        }
        rows.append({"id": task["id"], "limit_gib": limit, **row, "tried": mine})
        print(line(rows[-1]), flush=True)
    print("written to", record.write("vram_batch_size", PROTOCOL, rows))


def sizes(found: int) -> list[int]:
    """Return the batch sizes to try: the one found, 3 % more, 3 % less."""
    return [found, max(found + 1, math.ceil(1.03 * found)), int(0.97 * found)]


def predict(task: Job, limit_gib: int) -> dict[str, Any]:
    """Find the largest batch without the GPU."""
    built = build(task)
    estimate = estimate_job(built, task, None)
    began_s = time.perf_counter()
    found = estimate.max_batch_size(limit_bytes=limit_gib * GIB)
    seconds = round(time.perf_counter() - began_s, 2)
    return {"batch_size": found.batch_size, "n_traces": found.n_traces, "seconds": seconds}


def attempt(task: Job, limit_gib: int, batch_size: int) -> dict[str, Any]:
    """Train three steps under the limit and say whether it went."""
    built = build({**task, "batch": batch_size})
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(limit_gib * GIB / total)
    runs = True
    try:
        built.model.cuda()
        batch = map_tensors(torch.Tensor.cuda, (built.inputs, built.target))
        optimizer = built.make_optimizer(built.model.parameters())
        for _ in range(3):
            train(built, batch, optimizer, None, clip=False, autocast=AUTOCAST.get(task["precision"]))
        torch.cuda.synchronize()
    except torch.OutOfMemoryError:
        runs = False
    stats = torch.cuda.memory_stats()
    return {
        "runs": runs,
        "peak_reserved_mib": stats["reserved_bytes.all.peak"] // MIB,
        "retries": stats["num_alloc_retries"],
    }


def in_processes(tasks: list[tuple[Any, tuple[Any, ...], int]]) -> list[Any]:
    """Run functions in forked processes, as many at a time as the budget of GPU memory allows, at most 12."""
    context = multiprocessing.get_context("fork")
    results: list[Any] = [None] * len(tasks)
    running: dict[Connection, tuple[int, Any]] = {}
    waiting = list(range(len(tasks)))
    while waiting or running:
        for i in waiting[:]:
            held = sum(tasks[j][2] for j, _ in running.values())
            if len(running) < 12 and held + tasks[i][2] <= BUDGET_BYTES:
                here, there = context.Pipe(duplex=False)
                process = context.Process(target=_send, args=(there, *tasks[i][:2]))
                process.start()
                there.close()
                running[here] = i, process
                waiting.remove(i)
        for here in [end for end in running if end in wait(list(running))]:
            i, process = running.pop(here)
            results[i] = here.recv()
            process.join()
            print(tasks[i][1][0]["id"], *tasks[i][1][1:], results[i], flush=True)
    return results


def _send(there: Connection, function: Any, arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    there.send(function(*arguments))


def line(row: dict[str, Any]) -> str:
    """Write a row: what was found, and which of the sizes ran."""
    tried = "  ".join(
        f"{size} {'runs' if row['tried'][size]['runs'] else 'OOM'}" for size in sorted(row["tried"])
    )
    found = (
        f"{row['id']:<32}{row['limit_gib']:>3} GiB  found {row['batch_size']:>6} in {row['seconds']:.1f} s"
    )
    return f"{found}:  {tried}"


if __name__ == "__main__":
    main()
