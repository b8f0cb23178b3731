"""Measure oom_guard: what it recognises, and what a fault leaves behind.

PYTHONPATH=. python benchmarks/oom_guard.py [recognition] [faults]

`recognition` runs 28 texts of out-of-memory errors, and texts that only look like one, through the detectors
of the peers that are installed (pip install accelerate pytorch-lightning stormlog toma torch-max-mem
torchtnt). `faults` injects an error at every operator of a step, one at a time, and compares bit for bit
with a run without. What it costs is measured by `oom_guard_overhead.py`; `oom_guard_side_by_side.py` and
`oom_guard_ranks.py` train until memory runs out.
"""

import builtins
import gc
import importlib
import importlib.util
import json
import multiprocessing
import operator
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, cast

import record
import torch
import torch.distributed

from tests import oom_faults
from torchfast import inject_oom
from torchfast._oom_errors import classify

TEXTS = Path(__file__).parents[1] / "tests" / "oom_texts.json"
# Where each peer keeps its detector: package, file, function.
PEERS = {
    "accelerate": ("accelerate", "utils/memory.py", "should_reduce_batch_size"),
    "lightning": ("pytorch_lightning", "utilities/memory.py", "is_oom_error"),
    "stormlog": ("stormlog", "oom_flight_recorder.py", "classify_oom_exception"),
    "timm": ("timm", "utils/decay_batch.py", "check_batch_size_retry"),
    "toma": ("toma", "__init__.py", "should_reduce_batch_size"),
    "torch-max-mem": ("torch_max_mem", "api.py", "is_oom_error"),
    "torchtnt": ("torchtnt", "utils/oom.py", "is_out_of_memory_error"),
}


def recognition() -> list[dict[str, Any]]:
    """Return, for each detector, which of the texts it takes for an out-of-memory error."""
    texts = json.loads(TEXTS.read_text())
    catalogue = [case for case in texts["errors"] if case["in_catalogue"]]
    rows = []
    for name, detect in detectors().items():
        found = [case["case"] for case in catalogue if detect(error_of(case), True)]
        wrong = [case["case"] for case in texts["look_alikes"] if detect(error_of(case), False)]
        rows.append(
            {
                "part": "recognition",
                "detector": name,
                "n_recognised": len(found),
                "n_texts": len(catalogue),
                "n_look_alikes_taken": len(wrong),
                "n_look_alikes": len(texts["look_alikes"]),
                "missed": [case["case"] for case in catalogue if case["case"] not in found],
                "look_alikes_taken": wrong,
            }
        )
        print(f"{name:28} {len(found):2} of {len(catalogue)}, {len(wrong)} look-alikes taken for one")
    return rows


def detectors() -> dict[str, Callable[[BaseException, bool], bool]]:
    """Return ours, the bare type, and those of the peers that are installed."""
    found: dict[str, Callable[[BaseException, bool], bool]] = {
        # Only ours looks at the device's memory where a text has two meanings.
        "torchfast": lambda error, is_full: classify(error, memory_is_short=lambda: is_full) is not None,
        "except OutOfMemoryError": lambda error, _: isinstance(error, torch.OutOfMemoryError),
    }
    for name, (package, path, function) in PEERS.items():
        try:
            detect = getattr(_load(package, path), function)
        except (ImportError, RuntimeError) as error:
            print(f"{name:28} left out: {error}")
            continue
        found[name] = _answer(name, detect)
    return found


def _load(package: str, path: str) -> ModuleType:
    """Import a file of a package, by itself where it can do without the rest."""
    found = importlib.util.find_spec(package)
    if found is None or found.origin is None:
        raise ImportError("not installed")
    spec = importlib.util.spec_from_file_location(f"_{package}_alone", Path(found.origin).parent / path)
    if spec is None or spec.loader is None:
        raise ImportError(f"no {path} in {package}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except ImportError:
        dotted = f"{package}.{path.removesuffix('.py').replace('/', '.')}".removesuffix(".__init__")
        module = importlib.import_module(dotted)
    return module


def _answer(name: str, detect: Callable[[Any], Any]) -> Callable[[BaseException, bool], bool]:
    if name == "timm":
        return lambda error, _: isinstance(error, RuntimeError) and bool(detect(str(error)))
    if name == "stormlog":
        return lambda error, _: bool(detect(error).is_oom)
    return lambda error, _: bool(detect(error))


def error_of(case: dict[str, Any]) -> BaseException:
    """Return the error of a case."""
    name: str = case["type"]
    if name.startswith("torch."):
        kind = operator.attrgetter(name.removeprefix("torch."))(torch)
    else:
        kind = getattr(builtins, name)
    error: BaseException = kind(case["text"])
    return error


# --- faults -----------------------------------------------------------------------------------------------


class Shard(NamedTuple):
    """Some of the faults of one training: every `stride`-th operator of a step, from `first`."""

    training: str
    what: str
    step: int
    first: int
    stride: int


WHOLE, SPLIT = "whole step, with a copy", "parts above 4 samples"
PHASES = {"forward, without a copy": "forward", "backward, without a copy": "backward"}


def faults() -> list[dict[str, Any]]:
    """Inject a fault at every operator of every step of six trainings, and count those that leave a trace."""
    stride = 8
    steps = range(oom_faults.N_STEPS)
    shards = [
        Shard(name, what, step, first, stride)
        for name in oom_faults.TRAININGS
        for what in (WHOLE, *PHASES, SPLIT)
        if what != SPLIT or name in oom_faults.SPLITTABLE
        for step in (steps if what != SPLIT else [0])
        for first in range(stride)
    ]
    counts: dict[tuple[str, str], list[int]] = {}
    with ProcessPoolExecutor(mp_context=multiprocessing.get_context("spawn"), initializer=_alone) as pool:
        for shard, (n_faults, n_wrong) in zip(shards, pool.map(faults_of, shards), strict=True):
            count = counts.setdefault((shard.training, shard.what), [0, 0])
            count[0] += n_faults
            count[1] += n_wrong
    rows: list[dict[str, Any]] = [
        {"training": name, "what": what, "n_faults": n_faults, "n_wrong": n_wrong}
        for (name, what), (n_faults, n_wrong) in counts.items()
    ]
    for row in rows:
        print(
            f"{row['training']:14} {row['what']:24} {row['n_faults']:5} faults, {row['n_wrong']} left a trace"
        )
    print(
        f"{sum(row['n_faults'] for row in rows)} faults, {sum(row['n_wrong'] for row in rows)} left a trace"
    )
    return rows


def _alone() -> None:
    torch.set_num_threads(1)
    gc.freeze()  # what exists by now is not walked after each fault


def faults_of(shard: Shard) -> tuple[int, int]:
    """Return how many faults of a shard there were, and how many left a trace."""
    if shard.what == SPLIT:
        return _splits_of(shard)
    name, phase, copy = shard.training, cast(Any, PHASES.get(shard.what)), shard.what == WHOLE
    expected = oom_faults.run_bare(name)
    n_operators = oom_faults.n_operators(name, step=shard.step, phase=phase)
    n_faults = n_wrong = 0
    for at in range(shard.first, n_operators, shard.stride):
        injection = inject_oom(at, phase=phase)
        state = oom_faults.run_guarded(name, injection, copy=copy, step=shard.step)
        n_faults += 1
        n_wrong += oom_faults.differences(state, expected) > 0 or injection.n_failures != 1
    return n_faults, n_wrong


def _splits_of(shard: Shard) -> tuple[int, int]:
    """Let parts of more than 4 samples fail at each operator; compare with a run that fits, in float64."""
    counting = inject_oom(times=0, above=4)
    expected = oom_faults.run_split(shard.training, counting)
    n_faults = n_wrong = 0
    for at in range(shard.first, counting.n_operators // oom_faults.N_STEPS, shard.stride):
        injection = inject_oom(at, above=4, times=None)
        state = oom_faults.run_split(shard.training, injection)
        is_close = all(
            torch.allclose(one, other, rtol=1e-7, atol=1e-9)
            for one, other in zip(state, expected, strict=True)
        )
        n_faults += 1
        n_wrong += not is_close or injection.n_failures != 2
    return n_faults, n_wrong


PARTS: dict[str, Callable[[], list[dict[str, Any]]]] = {
    "recognition": recognition,
    "faults": faults,
}
PROTOCOLS = {
    "recognition": "Each detector's own answer to each text.",
    "faults": (
        "Every operator of each of three steps, one at a time, on a CPU in float32, the state "
        "afterwards compared bit for bit; parts in float64, within 1e-7."
    ),
}


def main() -> None:
    """Run the parts that were asked for, or all, and write the result files."""
    for part in sys.argv[1:] or PARTS:
        print(record.write(f"oom_guard_{part}", PROTOCOLS[part], PARTS[part]()))


if __name__ == "__main__":
    main()
