"""What `import torchfast` adds to `import torch`: `python benchmarks/import_time.py`. The bound is 20 ms."""

import subprocess
import sys

import record

PROBE = """
import time, torch
start = time.perf_counter()
import torchfast
print(1e3 * (time.perf_counter() - start))
start = time.perf_counter()
from torchfast import {name}
print(1e3 * (time.perf_counter() - start))
"""
SIX = ("to_channels_last", "DeviceLoader", "GPUTeacher", "estimate_vram", "VRAMMonitor", "oom_guard")


def main() -> None:
    """Time fresh interpreters, the package and each primitive, and write the result file."""
    rows = []
    for name in SIX:
        runs = [probe(name) for _ in range(5)]
        package, primitive = ([run[k] for run in runs] for k in (0, 1))
        row = {"name": name, "package_ms": record.median(package), "primitive_ms": record.median(primitive)}
        rows.append({**row, "samples_ms": runs})
        print(row)
    print(record.write("import_time", "fresh interpreters, after `import torch`; medians of 5.", rows))


def probe(name: str) -> list[float]:
    """Return the milliseconds that the package and one of its names take in a fresh interpreter."""
    command = [sys.executable, "-c", PROBE.format(name=name)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return [float(line) for line in printed.split()]


if __name__ == "__main__":
    main()
