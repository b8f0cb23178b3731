"""How close `estimate_vram` comes to the memory of training runs that were measured on a GPU.

    python benchmarks/vram_accuracy.py --jobs jobs.json --truth truth.json

prints a row a job (signed errors in percent) and, last, one line of JSON. Runs on a machine without a GPU:
the estimate speaks for the GPU that the truth was measured on.
"""

import argparse
import json
import random
import time
from pathlib import Path
from typing import Any

import record
from zoo import AUTOCAST, Built, Job, build

from torchfast import estimate_vram

COLUMNS = ("allocated", "reserved", "process")
PROTOCOL = (
    "estimate_vram on the CPU against the peaks of three training steps measured on the GPU that the truth "
    "names, one fresh process a job; signed errors in percent of what was measured."
)


def main() -> None:
    """Estimate the jobs, compare, print."""
    options = parse()
    jobs = json.loads(options.jobs.read_text())
    truth = json.loads(options.truth.read_text())
    measured = {run["id"]: run for run in truth["jobs"]}
    jobs = [job for job in jobs if job["id"] in measured and options.only in job["id"]]
    if options.sample and options.sample < len(jobs):
        chosen = set(random.Random(0).sample(range(len(jobs)), options.sample))  # noqa: S311 -- not a secret
        jobs = [job for i, job in enumerate(jobs) if i in chosen]
    rows = []
    print(f"{'job':<64}" + "".join(f"{name + ' %':>13}" for name in COLUMNS) + f"{'safe %':>9}{'s':>7}")
    for job in jobs:
        row = compare(job, measured[job["id"]], truth.get("gpu"))
        rows.append(row)
        print(line(row), flush=True)
    result = summary(rows)
    if options.record:
        record.write(
            f"vram_accuracy_{options.record}", PROTOCOL, rows, truth_gpu=truth.get("gpu"), summary=result
        )
    if options.json:
        options.json.write_text(json.dumps({"summary": result, "rows": rows}, indent=1) + "\n")
    print(json.dumps(result))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "--jobs", type=Path, required=True, help="the jobs, in the schema of benchmarks/zoo.py"
    )
    parser.add_argument("--truth", type=Path, required=True, help="what was measured for them")
    parser.add_argument("--sample", type=int, default=0, help="only so many jobs, always the same ones")
    parser.add_argument("--only", default="", help="only jobs with this text in their id")
    parser.add_argument("--json", type=Path, help="write summary and rows to this file")
    parser.add_argument("--record", metavar="NAME", help="write them to benchmarks/results/ as well")
    return parser.parse_args()


def compare(job: Job, run: dict[str, Any], gpu: str | None) -> dict[str, Any]:
    """Estimate one job and return its row; an exception becomes the row's `error`."""
    row: dict[str, Any] = {"id": job["id"]}
    try:
        built = build(job)
        row["family"] = "conv" if built.n_convolutions >= 5 else "dense"
        start_s = time.perf_counter()
        estimate = estimate_job(built, job, gpu)
        row["seconds"] = time.perf_counter() - start_s
    except Exception as error:  # noqa: BLE001 -- every failure is a result here
        row["error"] = f"{type(error).__name__}: {error}"
        return row
    truth = (run["peak_allocated"], run["peak_reserved"], run["process_used"])
    found = (estimate.peak_allocated_bytes, estimate.peak_reserved_bytes, estimate.peak_process_bytes)
    for name, estimated_bytes, measured_bytes in zip(COLUMNS, found, truth, strict=True):
        row[f"{name}_pct"] = 100 * (estimated_bytes / measured_bytes - 1)
    row["safe_pct"] = 100 * (estimate.safe_bytes / run["process_used"] - 1)
    return row


def estimate_job(built: Built, job: Job, gpu: str | None) -> Any:
    """Call `estimate_vram` the way a user of this job would."""
    return estimate_vram(
        built.model,
        built.inputs if built.target is None else (built.inputs, built.target),
        loss=built.loss,
        optimizer=built.make_optimizer,
        autocast=AUTOCAST.get(job["precision"]),
        grad_scaler=job["precision"] == "amp_fp16",
        clip_grad_norm=1.0 if job.get("clip") else None,
        teacher=built.teacher,
        gpu=gpu,
    )


def line(row: dict[str, Any]) -> str:
    """Write a row."""
    if "error" in row:
        return f"{row['id']:<64}  failed: {row['error'][:200]}"
    errors = "".join(f"{row[name + '_pct']:>+13.2f}" for name in COLUMNS)
    return f"{row['id']:<64}{errors}{row['safe_pct']:>+9.1f}{row['seconds']:>7.2f}"


def percentile(values: list[float], percent: float) -> float | None:
    """Return a percentile, linear between the values around it; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return round(ordered[below] + (ordered[above] - ordered[below]) * (place - below), 4)


def summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Sum up: absolute errors by family, the safe bound, the time, the failures."""
    good = [row for row in rows if "error" not in row]
    over = [row["safe_pct"] for row in good]
    seconds = [row["seconds"] for row in good]
    families = {}
    for family in ("dense", "conv"):
        mine = [row for row in good if row["family"] == family]
        families[family] = {"n": len(mine)} | {
            f"{name}_{label}_pct": percentile([abs(row[f"{name}_pct"]) for row in mine], percent)
            for name in COLUMNS
            for label, percent in (("median", 50), ("p95", 95))
        }
    return {
        "n": len(rows),
        "failed": len(rows) - len(good),
        "safe_bound_under_pct": round(100 * sum(value < 0 for value in over) / len(over), 4)
        if over
        else None,
        "safe_bound_over_median_pct": percentile(over, 50),
        "seconds_median": percentile(seconds, 50),
        "seconds_p95": percentile(seconds, 95),
        "families": families,
    }


if __name__ == "__main__":
    main()
