"""How every benchmark times, and what it writes down beside its raw samples.

A result file is `benchmarks/results/<subject>_<gpu>_<yyyymm>.json`. Ratios and medians are quoted from it;
the raw samples stay in it.
"""

import datetime as dt
import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"
PACKAGES = ("torch", "timm", "torchvision", "transformers", "accelerate", "torchtnt", "spdl", "numpy")


def environment() -> dict[str, Any]:
    """Return what a reader needs to know to repeat a measurement."""
    return {
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
        "machine": {
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "n_gpus": torch.cuda.device_count(),
            "gpu_memory_bytes": torch.cuda.mem_get_info()[1] if torch.cuda.is_available() else None,
            "driver": _driver(),
            "cpu_cores": os.cpu_count(),
            "system": f"{platform.system()} {platform.machine()}",
        },
        "versions": {
            "python": platform.python_version(),
            "cuda": torch.version.cuda,
            "cudnn": torch.backends.cudnn.version(),
            **{name: version for name in PACKAGES if (version := _version(name))},
        },
        "commit": _commit(),
    }


def source(result: dict[str, Any]) -> str:
    """Say, below a table, where its result comes from."""
    machine, versions = result["machine"], result["versions"]
    note = f" {result['note']}" if "note" in result else ""
    return (
        f"Medians on one {machine['gpu']}, torch {versions['torch']}, {result['date']}: "
        f"{result['protocol']}{note}"
    )


def times_ms(step: Callable[[], object], *, n_samples: int, n_steps: int, n_warmup: int) -> list[float]:
    """Return `n_samples` times of one step, each the mean of `n_steps`, the GPU drained around them."""
    for _ in range(n_warmup):
        step()
    samples = []
    for _ in range(n_samples):
        _drain()
        start_s = time.perf_counter()
        for _ in range(n_steps):
            step()
        _drain()
        samples.append((time.perf_counter() - start_s) / n_steps * 1e3)
    return samples


def taken_bytes(call: Callable[[], Any]) -> tuple[int, Any]:
    """Return what a call was given by the GPU's allocator at the peak beyond what it returned, and that."""
    torch.cuda.reset_peak_memory_stats()
    kept = call()
    stats = torch.cuda.memory_stats()
    return stats["requested_bytes.all.peak"] - stats["requested_bytes.all.current"], kept


def median(samples: list[float]) -> float:
    """Return the median to four digits, as the tables quote it."""
    return float(f"{statistics.median(samples):.4g}")


def write(subject: str, protocol: str, rows: list[dict[str, Any]], **more: Any) -> Path:
    """Write a result file and return its path."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    name = re.sub(r"nvidia[-_ ]*|[^a-z0-9]+", "", gpu.lower())
    month = dt.datetime.now(tz=dt.UTC).strftime("%Y%m")
    folder = Path(os.environ.get("TORCHFAST_RESULTS", RESULTS))
    path = folder / f"{subject}_{name}_{month}.json"
    record = {"subject": subject, **environment(), "protocol": protocol, "rows": rows, **more}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def _drain() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver() -> str | None:
    path = Path("/proc/driver/nvidia/version")
    found = re.search(r"Kernel Module.*?\s(\d+\.[\d.]+)", path.read_text()) if path.exists() else None
    return found.group(1) if found else _nvml_driver()


def _nvml_driver() -> str | None:
    try:
        import pynvml
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    pynvml.nvmlInit()
    return str(pynvml.nvmlSystemGetDriverVersion())


def _commit() -> str:
    """Return the commit that was measured; a copy without history takes it from the environment."""
    if "TORCHFAST_COMMIT" in os.environ:
        return os.environ["TORCHFAST_COMMIT"]
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "--verify", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
