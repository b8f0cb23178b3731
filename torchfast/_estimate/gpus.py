"""What is known of each GPU: its memory, what it can run, and what a process holds beside its tensors."""

import json
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from torchfast._bytes import GIB, MIB, format_bytes


@dataclass(frozen=True, slots=True)
class Context:
    """What a process holds on the GPU outside PyTorch's allocator, and how that is known."""

    expected_bytes: int
    spread_bytes: int  # what it may be more; part of the safe bound
    source: str  # in words: measured where, or by which rule


@dataclass(frozen=True, slots=True)
class MeasuredContext:
    """A context measured part by part: the bare one, and what the first call of a library adds."""

    bare_bytes: int
    blas_bytes: int  # the first matrix product
    dnn_bytes: int  # the first convolution or half-precision product on top of it
    spread_bytes: int
    source: str


@dataclass(frozen=True, slots=True)
class GPU:
    """A GPU that an estimate is made for; any GPU can be described by its numbers.

    Example:
        >>> from torchfast._bytes import GIB
        >>> from torchfast._estimate.gpus import GPU, resolve_gpu
        >>> resolve_gpu("RTX 4090").capability
        (8, 9)
        >>> print(GPU("my card", total_bytes=24 * GIB, capability=(8, 6), n_multiprocessors=84))
        my card (24.0 GiB, compute capability 8.6)
    """

    name: str
    total_bytes: int  # as torch.cuda.mem_get_info() gives it, not as the box says
    capability: tuple[int, int]
    n_multiprocessors: int
    measured: MeasuredContext | None = field(default=None, repr=False)

    @property
    def max_threads_per_multiprocessor(self) -> int:
        """How many threads a multiprocessor holds at once (CUDA programming guide, compute capabilities)."""
        if self.capability == (7, 5):
            return 1024
        return 1536 if self.capability[0] == 12 or self.capability in ((8, 6), (8, 7), (8, 9)) else 2048

    def __str__(self) -> str:
        major, minor = self.capability
        return f"{self.name} ({format_bytes(self.total_bytes)}, compute capability {major}.{minor})"

    def context(self, operators: Iterable[str]) -> Context:
        """Return what the process will hold outside the allocator once these operators have run."""
        names = set(operators)
        if self.measured is None:
            expected = _RULE_BASE_BYTES + _RULE_BYTES_PER_MULTIPROCESSOR * self.n_multiprocessors
            return Context(expected, expected * 35 // 100, _RULE_SOURCE)
        expected = self.measured.bare_bytes
        if any(name.startswith(_BLAS) for name in names):
            expected += self.measured.blas_bytes
        if any(name.startswith(_DNN) for name in names):
            expected += self.measured.dnn_bytes
        return Context(expected, self.measured.spread_bytes, self.measured.source)


_BLAS = tuple(f"aten.{name}" for name in ("mm", "addmm", "bmm", "baddbmm", "_cudnn_rnn", "linear", "matmul"))
_DNN = ("aten.convolution", "aten.cudnn", "aten._cudnn", "aten._scaled_dot_product_cudnn")

# Fitted to what the process held beside the allocator in ten public out-of-memory reports on eight GPUs from
# T4 to RTX 5090, torch 2.1 to 2.11: from 26 % below to 19 % above the rule. docs/decisions/0036-context.md.
_RULE_BASE_BYTES = 35 * MIB
_RULE_BYTES_PER_MULTIPROCESSOR = (
    3_512_729  # 3.35 MiB: the context keeps stack memory for every resident thread
)
_RULE_SOURCE = "not measured on this GPU: a rule of 35 MiB and 3.35 MiB for each multiprocessor"

_H200 = MeasuredContext(
    bare_bytes=612 * MIB,
    blas_bytes=130 * MIB,
    dnn_bytes=16 * MIB,
    spread_bytes=16 * MIB,
    source="measured on an H200 with torch 2.11 for CUDA 13.0 and driver 580",
)
_H100 = MeasuredContext(
    _H200.bare_bytes,
    _H200.blas_bytes,
    _H200.dnn_bytes,
    spread_bytes=80 * MIB,
    source="not measured on this GPU: taken over from the H200, which has the same chip",
)

_B200 = MeasuredContext(
    _H200.bare_bytes * 148 // 132,
    _H200.blas_bytes,
    _H200.dnn_bytes,
    spread_bytes=256 * MIB,
    source="not measured on this GPU: the H200's, in proportion to the multiprocessors",
)

# Memory: the smallest total that out-of-memory messages in public reports show for the card (drivers differ
# by up to 1.5 %); where none was found, what is printed on the box less 3.5 %.
_KNOWN = (
    # name, GiB, compute capability, multiprocessors
    ("T4", 14.56, (7, 5), 40),
    ("V100-16", 15.77, (7, 0), 80),
    ("V100-32", 31.73, (7, 0), 80),
    ("A10", 21.99, (8, 6), 72),
    ("A100-40", 39.38, (8, 0), 108),
    ("A100-80", 79.14, (8, 0), 108),
    ("L4", 22.03, (8, 9), 58),
    ("L40S", 44.39, (8, 9), 142),
    ("RTX 3060", 11.63, (8, 6), 28),
    ("RTX 3060 Ti", 7.66, (8, 6), 38),
    ("RTX 3070", 7.66, (8, 6), 46),
    ("RTX 3070 Ti", 7.66, (8, 6), 48),
    ("RTX 3080", 9.65, (8, 6), 68),
    ("RTX 3080-12", 11.63, (8, 6), 70),
    ("RTX 3080 Ti", 11.63, (8, 6), 80),
    ("RTX 3090", 23.55, (8, 6), 82),
    ("RTX 3090 Ti", 23.55, (8, 6), 84),
    ("RTX 4060", 7.63, (8, 9), 24),
    ("RTX 4060 Ti", 7.63, (8, 9), 34),
    ("RTX 4060 Ti-16", 15.57, (8, 9), 34),
    ("RTX 4070", 11.6, (8, 9), 46),
    ("RTX 4070 SUPER", 11.6, (8, 9), 56),
    ("RTX 4070 Ti", 11.6, (8, 9), 60),
    ("RTX 4070 Ti SUPER", 15.57, (8, 9), 66),
    ("RTX 4080", 15.57, (8, 9), 76),
    ("RTX 4080 SUPER", 15.57, (8, 9), 80),
    ("RTX 4090", 23.51, (8, 9), 128),
    ("RTX 5060", 7.53, (12, 0), 30),
    ("RTX 5060 Ti", 7.53, (12, 0), 36),
    ("RTX 5060 Ti-16", 15.47, (12, 0), 36),
    ("RTX 5070", 11.5, (12, 0), 48),
    ("RTX 5070 Ti", 15.47, (12, 0), 70),
    ("RTX 5080", 15.47, (12, 0), 84),
    ("RTX 5090", 31.36, (12, 0), 170),
    ("H100", 79.11, (9, 0), 132),
    ("H200", 150_109_880_320 / GIB, (9, 0), 132),
    ("B200", 178.35, (10, 0), 148),
)
_MEASURED = {"H200": _H200, "H100": _H100, "B200": _B200}
_ALIASES = {"v100": "v10016", "a100": "a10080", "a10g": "a10"}
GPU_NAMES = tuple(row[0] for row in _KNOWN)


def resolve_gpu(gpu: "GPU | str | int | torch.device | None" = None, /) -> GPU:
    """Return the GPU that is meant: a name, bytes of memory, a device of this machine, or None.

    None is this machine's current GPU where it has one, else an H200: the one whose context is measured.
    What `torchfast-calibrate` wrote down for a GPU of that name on this machine is preferred to the table.

    Raises:
        ValueError: a name that is not known, or a number of bytes below 1 GiB.
    """
    if isinstance(gpu, GPU):
        return gpu
    if isinstance(gpu, int):
        return _of_size(gpu)
    if gpu is not None and not isinstance(gpu, (str, torch.device)):
        raise TypeError(
            f"gpu={gpu!r} is neither a GPU's name, nor a GPU, a device of this machine or a whole number of "
            'bytes. Give "RTX 4090", or 24 * 2**30 for 24 GiB.'
        )
    if gpu is None or isinstance(gpu, torch.device) or re.fullmatch(r"cuda(:\d+)?", gpu):
        return _of_this_machine(gpu)
    row = _row(gpu)
    if row is None:
        raise ValueError(
            f"gpu={gpu!r} is not a GPU that torchfast knows. Known are {', '.join(GPU_NAMES)}. Describe any "
            "other by its numbers: GPU(name, total_bytes=..., capability=..., n_multiprocessors=...)."
        )
    return _from_row(row)


def _key(name: str) -> str:
    """Reduce `NVIDIA GeForce RTX 4090`, `rtx4090` and `A100-SXM4-80GB` to what tells GPUs apart."""
    short = re.sub(r"\b(nvidia|geforce|tesla|gpu|sxm\d?|pcie|hbm\d?e?|generation)\b", "", name.lower())
    short = re.sub(r"(\d+)\s*gi?b\b", r"\1", short)
    key = re.sub(r"[^a-z0-9]", "", short)
    return _ALIASES.get(key, key)


def _row(name: str) -> "tuple[str, float, tuple[int, int], int] | None":
    wanted = _key(name)
    for row in _KNOWN:
        # Boxes name the memory of some cards and not of others: "RTX 3090-24", "H100 80GB HBM3".
        if wanted in (
            _key(row[0]),
            f"{_key(row[0])}{-(-row[1] // 1):.0f}",
            f"{_key(row[0])}{_boxed(row[1])}",
        ):
            return row
    return None


def _boxed(gib: float) -> int:
    """Return the size that is printed on the box: the next multiple of 2 GB, of 8 from 24 on."""
    step = 2 if gib < 22 else 8
    return int(-(-gib // step)) * step


def _from_row(row: "tuple[str, float, tuple[int, int], int]") -> GPU:
    name, gib, capability, n_multiprocessors = row
    measured = _calibrated().get(_key(name)) or _MEASURED.get(name)
    return GPU(name, int(gib * GIB), capability, n_multiprocessors, measured)


def _of_size(total_bytes: int) -> GPU:
    if total_bytes < GIB:
        raise ValueError(
            f"gpu={total_bytes} was given, which is {format_bytes(total_bytes)} of memory. "
            "Give the GPU's memory in bytes (24 * 2**30 for 24 GiB), its name, or a GPU."
        )
    # The kernels of the most common generation; as many multiprocessors as GPUs of that size have or more.
    n_multiprocessors = max([row[3] for row in _KNOWN if row[1] * GIB <= total_bytes * 1.1] or [40])
    return GPU(f"a GPU of {format_bytes(total_bytes)}", total_bytes, (8, 9), n_multiprocessors)


def _of_this_machine(device: "torch.device | str | None") -> GPU:
    if not torch.cuda.is_available():
        if device is None:
            return resolve_gpu("H200")
        raise ValueError(
            f"gpu={str(device)!r} was asked for, but this machine has no CUDA GPU. "
            "Name the GPU that the training will run on, for example gpu='RTX 4090'."
        )
    found = torch.cuda.get_device_properties(torch.device("cuda" if device is None else device))
    row = _row(found.name)
    measured = _calibrated().get(_key(found.name)) or (_MEASURED.get(row[0]) if row else None)
    return GPU(
        found.name,
        found.total_memory,
        (found.major, found.minor),
        found.multi_processor_count,
        measured,
    )


# --- calibration -------------------------------------------------------------------------------------------


def calibration_file() -> Path:
    """Return where `torchfast-calibrate` writes what it measured: under the user's cache folder."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "torchfast" / "gpus.json"


def _calibrated() -> dict[str, MeasuredContext]:
    try:
        found: dict[str, dict[str, Any]] = json.loads(calibration_file().read_text())
        return {_key(name): MeasuredContext(**values) for name, values in found.items()}
    except (OSError, ValueError, TypeError):  # none yet, or written by another version
        return {}
