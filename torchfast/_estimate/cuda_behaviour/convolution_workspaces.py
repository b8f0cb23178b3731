"""What cuDNN takes beside the output of a convolution.

No source tells how much that is: cuDNN tries to pick the fastest of its kernels, and most of what they take
is the input, the output or the weight in another layout, its channels padded. So the rule is a sweep
(`convolution_sweep.csv`: convolutions of common networks and variations of them, random batch sizes, types
and layouts, measured on an H200 with torch 2.11 and cuDNN 9.19 by benchmarks/convolution_sweep.py). Each of
the most alike measured ones says what this one takes: which of the three it copied, in this one's sizes, and
what it took beside. Of what they say it is the median, by how alike they are. How far that is off is in
docs/decisions/0030-convolution-workspaces.md.
"""

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache, reduce
from itertools import accumulate
from pathlib import Path
from typing import NamedTuple

import torch

N_ALIKE = 7
_SLACK = 1200  # kernels take up to so many bytes beside their copies


@dataclass(frozen=True, slots=True)
class Shape:
    """What of a convolution decides its workspace; a transposed one is described by what it reverses."""

    dtype: torch.dtype
    channels_last: bool
    batch: int
    n_in: int
    n_out: int
    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    size_in: tuple[int, ...]
    size_out: tuple[int, ...]

    @property
    def itemsize(self) -> int:
        """Bytes of an element."""
        return self.dtype.itemsize

    @property
    def is_depthwise(self) -> bool:
        """Whether each channel is convolved for itself."""
        return self.groups == self.n_in > 1

    @property
    def vector(self) -> int:
        """How many channels the fastest kernels load at once."""
        return 8 if self.itemsize == 2 else 4

    @property
    def square(self) -> int:
        """To how many channels grouped kernels pad a group's inputs and outputs: a power of two."""
        most: int = max(self.n_in // self.groups, self.n_out // self.groups, self.vector)
        return 1 << (most - 1).bit_length()

    @property
    def line(self) -> str:
        """The row of the table, without the bytes."""
        numbers = (int(self.channels_last), self.batch, self.n_in, self.n_out, self.groups)
        sizes = (self.kernel, self.stride, self.dilation, self.size_in, self.size_out)
        return ",".join([_name(self.dtype), *map(str, numbers), *("x".join(map(str, n)) for n in sizes)])

    def operand_bytes(self, step: int) -> tuple[int, int, int]:
        """Return the bytes of input, output and weight, each group's channels padded to whole steps."""
        n_in, n_out = (-(-(n // self.groups) // step) * step for n in (self.n_in, self.n_out))
        return (
            self.batch * self.groups * n_in * math.prod(self.size_in) * self.itemsize,
            self.batch * self.groups * n_out * math.prod(self.size_out) * self.itemsize,
            self.groups * n_out * n_in * math.prod(self.kernel) * self.itemsize,
        )


def workspace_bytes(shape: Shape, direction: int) -> int:
    """Return what cuDNN takes for the forward pass (0), the gradient of the data (1) or of the weight (2)."""
    alike = most_alike(shape, N_ALIKE)
    itself = [one for one in alike if one.shape == shape]
    return bytes_by(itself or alike, shape, direction)


def bytes_by(alike: Sequence["Alike"], shape: Shape, direction: int) -> int:
    """Return what a convolution takes by measured ones: the median of what each says, by their likeness."""
    if not alike:
        return 0 if shape.channels_last else sum(shape.operand_bytes(shape.vector))
    copied, said = _copied_bytes(shape), []
    for one in alike:
        copies, rest = _taken_apart(one.shape, one.taken[direction])
        said.append((copied[copies] + rest, one.likeness))
    said.sort()
    half = sum(likeness for _, likeness in said) / 2
    return next(
        n for (n, _), below in zip(said, accumulate(w for _, w in said), strict=True) if below >= half
    )


# --- what kernels copy -------------------------------------------------------------------------------------

Copies = tuple[str, str]
"""What is copied, and to what a group's channels are padded."""

# Which of input, output and weight are copied; "partial" is an fp32 gradient of the weight for each sample,
# "tiles" eight of them for each sample and 32 channels of a depthwise convolution.
_COPIES = ("", "iow", "io", "iw", "ow", "i", "o", "w")


@cache
def _copied_bytes(shape: Shape) -> dict[Copies, int]:
    """Return the bytes of everything that kernels were found to copy."""
    steps = {"vectors": shape.vector, "four": 4, "nothing": 1}
    if shape.groups > 1 and not shape.is_depthwise:
        steps["square"] = shape.square
    found: dict[Copies, int] = {}
    for name, step in steps.items():
        parts = dict(zip("iow", shape.operand_bytes(step), strict=True))
        found |= {(copies, name): sum(parts[operand] for operand in copies) for copies in _COPIES}
    for name in ("vectors", "nothing"):
        found["partial", name] = shape.batch * found["w", name] * 4 // shape.itemsize
    if shape.is_depthwise:
        channels = -(-shape.n_in // 32) * 32
        found["tiles", "nothing"] = shape.batch * 8 * channels * math.prod(shape.kernel) * 4
    return found


@cache
def _taken_apart(shape: Shape, taken: int) -> tuple[Copies, int]:
    """Explain measured bytes as copies of operands and a rest."""
    rests = {copies: taken - size for copies, size in _copied_bytes(shape).items()}
    for copies, rest in rests.items():
        if 0 <= rest <= _SLACK:
            return copies, rest
    of_operands = ((c, rest) for c, rest in rests.items() if c[0] in _COPIES and rest >= 0)
    return min(of_operands, key=lambda pair: pair[1])


# --- which are alike ---------------------------------------------------------------------------------------

Taken = tuple[int, int, int]
"""Bytes of the forward pass, of the gradient of the data and of that of the weight."""


class Alike(NamedTuple):
    """A measured convolution, what it took, and how alike it is to the one that was asked for."""

    shape: Shape
    taken: Taken
    likeness: float


@cache
def most_alike(shape: Shape, n: int) -> list[Alike]:
    """Return the most alike of the measured convolutions."""
    numbers = _numbers([shape.line])
    kinds = _table(shape.itemsize, shape.channels_last, len(shape.kernel))
    lines, features = kinds.get(int(_kinds(numbers)), ([], []))
    distances = torch.zeros(len(lines))
    for column, value in zip(features, _features(numbers), strict=False):
        distances += (column - value).abs()  # of all at once PyTorch would start threads, which cost more
    nearest = distances.topk(min(n, len(lines)), largest=False).indices.tolist()
    return [Alike(*row_of(lines[i]), likeness=1 / (float(distances[i]) + 0.3) ** 2) for i in nearest]


def _kinds(numbers: torch.Tensor) -> torch.Tensor:
    """Return what must be the same for two convolutions to be compared, beside size of type and layout."""
    _, _, _, n_in, _, groups = numbers[:6]
    kernel, *_ = numbers[6:].view(5, -1, numbers.shape[1])
    kinds: torch.Tensor = 4 * (groups > 1) + 2 * ((groups > 1) & (groups == n_in)) + (kernel.amax(0) == 1)
    return kinds


def _features(numbers: torch.Tensor) -> list[torch.Tensor]:
    """Return numbers whose distance says how alike two convolutions of a kind are, weighted.

    Kernels load and store several channels or positions at once, so the powers of two that divide their
    numbers count too.
    """
    dtype, _, batch, n_in, n_out, groups = numbers[:6]
    kernel, stride, dilation, size_in, size_out = numbers[6:].view(5, -1, numbers.shape[1])
    n_in, n_out = n_in // groups, n_out // groups
    n_kernel, n_positions = _product(kernel), _product(size_out)
    return [
        0.5 * _log2(batch * n_positions),
        0.25 * _log2(batch),
        0.75 * _log2(n_out),
        0.75 * _log2(n_in * n_kernel),
        1.5 * _log2(n_kernel),
        1.5 * _log2(stride.amax(0)),
        0.75 * _log2(dilation.amax(0)),
        1.0 * _log2(groups),
        0.5 * _log2((n_in & -n_in).clamp(max=64)),
        0.5 * _log2((n_out & -n_out).clamp(max=64)),
        0.25 * _log2((n_positions & -n_positions).clamp(max=8)),
        0.35 * _log2(size_out[-1]),
        0.75 * (n_positions != _product(size_in)),
        0.5 * (dtype == DTYPES.index(torch.float16)),
    ]


def _product(sizes: torch.Tensor) -> torch.Tensor:
    product: torch.Tensor = reduce(torch.mul, sizes)  # `prod` would start threads, which takes longer
    return product


def _log2(numbers: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(array("f", map(math.log2, numbers.tolist())), dtype=torch.float32)  # as above


# --- the table ---------------------------------------------------------------------------------------------

TABLE = Path(__file__).with_name("convolution_sweep.csv")
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def table() -> Iterator[tuple[Shape, Taken]]:
    """Yield every convolution of the table with what it took."""
    return map(row_of, _lines())


@cache
def _table(itemsize: int, channels_last: int, n_dims: int) -> dict[int, tuple[list[str], list[torch.Tensor]]]:
    """Return the rows of types of a size and of a layout, with their features, by kind.

    A model seldom needs more than one such part of the table, and to read all of it takes half a second.
    """
    starts = tuple(f"{_name(d)},{int(channels_last)}," for d in DTYPES if d.itemsize == itemsize)
    lines = [n for n in _lines() if n.startswith(starts) and n.count("x") == 5 * (n_dims - 1)]
    numbers = _numbers(lines)[:-3]
    kinds = _kinds(numbers)
    found = {}
    for kind in kinds.unique().tolist():
        of_kind = (kinds == kind).nonzero().flatten()
        found[kind] = [lines[i] for i in of_kind.tolist()], _features(numbers[:, of_kind])
    return found


@cache
def _lines() -> list[str]:
    return TABLE.read_text().splitlines()[1:]


def _numbers(lines: Sequence[str]) -> torch.Tensor:
    """Return the numbers of rows of the table, (columns, rows), a type as its index."""
    text = ",".join(lines).replace("x", ",")
    for code, dtype in enumerate(DTYPES):
        text = text.replace(_name(dtype), str(code))
    numbers = array("q", map(int, text.split(",")))  # of a list PyTorch makes a tensor more slowly
    return torch.frombuffer(numbers, dtype=torch.long).view(len(lines), -1).T.contiguous()


def row_of(line: str) -> tuple[Shape, Taken]:
    """Return the convolution of a row of the table and what it took."""
    *columns, forward, data, weight = line.split(",")
    return shape_of(columns), (int(forward), int(data), int(weight))


def shape_of(columns: Sequence[str]) -> Shape:
    """Return the convolution of a row of the table, without its bytes."""
    dtype, last, batch, n_in, n_out, groups, *sizes = columns
    kernel, stride, dilation, size_in, size_out = (tuple(map(int, size.split("x"))) for size in sizes)
    return Shape(
        dtype=getattr(torch, dtype),
        channels_last=last == "1",
        batch=int(batch),
        n_in=int(n_in),
        n_out=int(n_out),
        kernel=kernel,
        stride=stride,
        dilation=dilation,
        groups=int(groups),
        size_in=size_in,
        size_out=size_out,
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
