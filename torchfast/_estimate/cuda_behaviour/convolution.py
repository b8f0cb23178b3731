"""Convolutions: the copies that PyTorch makes around cuDNN, and cuDNN's workspaces.

No source tells how much workspace cuDNN takes: it tries to pick the fastest of its kernels, and most of what
they take is the input, the output or the weight in another layout, padded to whole vectors of channels. So
the rule is a sweep (`convolution_sweep.csv`: convolutions of common networks and variations of them, random
batch sizes, types and layouts, measured on an H200 with torch 2.11 and cuDNN 9.19): a convolution takes which
of the three the most alike measured ones took, in its own sizes, and what they took beside. How far that is
off is in docs/decisions/0030-convolution-workspaces.md.
"""

import math
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from torchfast._estimate.cuda_behaviour.layouts import suggests_channels_last
from torchfast._estimate.cuda_behaviour.reductions import scratch_bytes
from torchfast._estimate.recorder import Recorder

_FORWARD, _DATA, _WEIGHT = 0, 1, 2
_N_ALIKE = 5
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

    def operand_bytes(self, vector: int) -> tuple[int, int, int]:
        """Return the bytes of input, output and weight, each group's channels padded to whole vectors."""
        n_in, n_out = (-(-(n // self.groups) // vector) * vector for n in (self.n_in, self.n_out))
        return (
            self.batch * self.groups * n_in * math.prod(self.size_in) * self.itemsize,
            self.batch * self.groups * n_out * math.prod(self.size_out) * self.itemsize,
            self.groups * n_out * n_in * math.prod(self.kernel) * self.itemsize,
        )

    @property
    def kind(self) -> tuple[Any, ...]:
        """What must be the same for two convolutions to be compared at all."""
        return (
            self.itemsize == 2,
            self.channels_last,
            math.prod(self.kernel) == 1,
            "depthwise" if self.is_depthwise else "grouped" if self.groups > 1 else "",
            len(self.kernel) == 3,
            self.n_in // self.groups % self.vector == 0,
            self.n_out // self.groups % self.vector == 0,
        )

    @property
    def features(self) -> list[float]:
        """Numbers whose distance says how alike two convolutions of a kind are, weighted."""
        n_positions = math.prod(self.size_out)
        alignment = next(value for step, value in _ALIGNMENTS if n_positions % step == 0)
        return [
            0.5 * math.log2(self.batch * n_positions),
            0.3 * math.log2(self.batch),
            0.8 * math.log2(self.n_in),
            0.8 * math.log2(self.n_out),
            math.log2(math.prod(self.kernel)),
            3.0 * max(self.stride),
            0.75 * alignment,
            2.0 * (max(self.dilation) > 1),
            1.0 * (self.kernel[-1] != self.kernel[0]),
            1.0 * math.log2(self.groups),
        ]


_ALIGNMENTS = ((8, 2.0), (4, 1.0), (2, 0.5), (1, 0.0))


def workspace_bytes(shape: Shape, direction: int) -> int:
    """Return what cuDNN takes for the forward pass, the gradient of the data or that of the weight."""
    alike = _most_alike(shape)
    operands = sum(shape.operand_bytes(shape.vector))
    if not alike:
        return 0 if shape.channels_last else operands
    parts = [_taken_apart(measured, taken[direction]) for measured, taken in alike]
    common, _ = Counter(copies for copies, _ in parts).most_common(1)[0]
    rest = sorted(rest for copies, rest in parts if copies == common)
    # What a few convolutions of other sizes took beside is no reason to take more than all operands.
    return _copies_bytes(common, shape) + min(rest[(len(rest) - 1) // 2], operands + _SMALL_BYTES)


_SMALL_BYTES = 2**23

# Which of input, output and weight are copied; "partial" is an fp32 gradient of the weight for each sample,
# "tiles" eight of them for each sample and 32 channels of a depthwise convolution.
_COPIES = ("", "iow", "io", "iw", "ow", "i", "o", "w")
Copies = tuple[str, int]
"""What is copied, and to how many channels a group's are padded; 0 for whole vectors."""


def _copies_bytes(copies: Copies, shape: Shape) -> int:
    what, vector = copies
    n_in, n_out, weight = shape.operand_bytes(vector or shape.vector)
    if what == "partial":
        return shape.batch * weight * 4 // shape.itemsize
    if what == "tiles":
        return shape.batch * 8 * -(-shape.n_in // 32) * 32 * math.prod(shape.kernel) * 4
    return n_in * ("i" in what) + n_out * ("o" in what) + weight * ("w" in what)


@cache
def _taken_apart(shape: Shape, taken: int) -> tuple[Copies, int]:
    """Explain measured bytes as copies of operands and a rest."""
    special = [("partial", 0), ("partial", 1), *([("tiles", 0)] if shape.is_depthwise else [])]
    known = [(what, vector) for vector in (0, 4, 1) for what in _COPIES]
    rests = {copies: taken - _copies_bytes(copies, shape) for copies in known + special}
    for copies, rest in rests.items():
        if 0 <= rest <= _SLACK:
            return copies, rest
    return min(((c, rests[c]) for c in known if rests[c] >= 0), key=lambda pair: pair[1])


Options = tuple[Sequence[int], Sequence[int], bool, int]  # stride, dilation, transposed, groups
Measured = tuple[Shape, tuple[int, int, int]]


@cache
def _most_alike(shape: Shape) -> tuple[Measured, ...]:
    measured = _sweep().get(shape.kind)
    if measured is None:
        return ()
    distances = (_features(shape.kind) - torch.tensor(shape.features)).abs().sum(1)
    nearest = distances.topk(min(_N_ALIKE, len(measured)), largest=False).indices.tolist()
    same = tuple(measured[i] for i in nearest if measured[i][0] == shape)
    return same or tuple(measured[i] for i in nearest)


@cache
def _features(kind: tuple[Any, ...]) -> torch.Tensor:
    return torch.tensor([shape.features for shape, _ in _sweep()[kind]])


@cache
def _sweep() -> dict[tuple[Any, ...], Sequence[Measured]]:
    """Read the sweep, by kind."""
    by_kind: dict[tuple[Any, ...], list[Measured]] = defaultdict(list)
    for shape, taken in _rows():
        by_kind[shape.kind].append((shape, taken))
    return dict(by_kind)


def _rows() -> Iterator[Measured]:
    lines = Path(__file__).with_name("convolution_sweep.csv").read_text().splitlines()
    for line in lines[1:]:
        *columns, forward, data, weight = line.split(",")
        yield shape_of(columns), (int(forward), int(data), int(weight))


def shape_of(columns: Sequence[str]) -> Shape:
    """Return the convolution of a row of the table, without its bytes."""
    dtype, last, batch, n_in, n_out, groups, *sizes = columns
    kernel, stride, dilation, size_in, size_out = map(_numbers, sizes)
    return Shape(
        dtype=_DTYPES[dtype],
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


_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@cache
def _numbers(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split("x")))


# --- the operators -----------------------------------------------------------------------------------------


def convolution(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run a convolution: operands are made dense in one layout, the output follows, then the workspace."""
    tensor, weight, bias, stride, _, dilation, transposed, _, groups = args
    memory_format = _memory_format(tensor, weight)
    with recorder.scratch(*_copies(memory_format, tensor, weight)):
        # The meta kernel answers for another backend, which keeps depthwise outputs contiguous.
        like = recorder.run_unrecorded(func, (tensor, weight, None, *args[3:]), kwargs)
        output = _empty_like(recorder, like, memory_format)
        if tensor.dim() > 2 and output.numel():
            shape = _shape(tensor, output, weight, (stride, dilation, transposed, groups))
            size_bytes = _workspace(shape, transposed, _DATA if transposed else _FORWARD)
            with recorder.scratch(size_bytes, optional=True):
                pass
    del bias  # added in place
    return output


def convolution_backward(recorder: Recorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Run its backward pass: each gradient is followed by its workspace; that of the bias is a sum."""
    del func, kwargs
    gradient, tensor, weight, _, stride, _, dilation, transposed, _, groups, wanted = args
    memory_format = _memory_format(tensor, weight)
    shape = _shape(tensor, gradient, weight, (stride, dilation, transposed, groups))
    found: list[torch.Tensor | None] = [None, None, None]
    with recorder.scratch(*_copies(memory_format, gradient, tensor, weight)):
        directions = (_FORWARD if transposed else _DATA, _WEIGHT)
        for i, (like, direction) in enumerate(zip((tensor, weight), directions, strict=True)):
            if wanted[i]:
                found[i] = _empty_like(recorder, like, memory_format)
                with recorder.scratch(_workspace(shape, transposed, direction), optional=True):
                    pass
    if wanted[2]:
        found[2] = recorder.new((gradient.shape[1],), gradient.dtype)
        dims = [d for d in range(gradient.dim()) if d != 1]
        accumulator_bytes = max(4, gradient.dtype.itemsize)
        with recorder.scratch(*scratch_bytes(gradient, dims, accumulator_bytes, recorder.gpu)):
            pass
    return tuple(found)


def _workspace(shape: Shape, transposed: bool, direction: int) -> int:
    is_own = not transposed and runs_own_kernels(shape)
    return 0 if is_own else workspace_bytes(shape, direction)


def runs_own_kernels(shape: Shape) -> bool:
    """Whether PyTorch's own kernels, which take nothing, run a convolution unless it is transposed.

    They run contiguous depthwise ones, of which cuDNN gets those in fp16 that it was found to be faster at
    (ConvParams::use_cudnn_depthwise and check_cudnn_depthwise_workload_with_filter in Convolution.cpp).
    """
    if not shape.is_depthwise or shape.channels_last:
        return False
    if shape.dtype != torch.float16 or len(shape.kernel) == 3 or max(shape.dilation) > 1 or shape.n_in < 32:
        return True
    (rows, width), (filter_rows, filter_size), (row_stride, stride) = shape.size_in, shape.kernel, shape.stride
    if rows == 1 and stride == 1:
        return False
    is_square = filter_rows == filter_size and (row_stride == stride or rows == 1)
    if not is_square or filter_size not in {1, 3, 5} or width < 7 or stride not in {1, 2}:
        return True
    if stride == 1:
        return False
    if filter_size > 1:
        return not (shape.batch == 1 or shape.n_in >= 512 or (shape.n_in >= 256 and width >= 28))
    return width > 28 if shape.batch == 1 else shape.batch > 16 or shape.n_in < 128 or width > 7


def _memory_format(tensor: torch.Tensor, weight: torch.Tensor) -> torch.memory_format:
    """Return the layout in which cuDNN is called (cudnn_conv_suggest_memory_format in ConvUtils.h)."""
    is_last = suggests_channels_last(tensor) or suggests_channels_last(weight)
    if is_last and tensor.dtype != torch.float64:
        return torch.channels_last if tensor.dim() == 4 else torch.channels_last_3d
    return torch.contiguous_format


def _copies(memory_format: torch.memory_format, *tensors: torch.Tensor) -> list[int]:
    """Return the bytes of the copies of those operands that are not dense in the layout."""
    return [t.numel() * t.dtype.itemsize for t in tensors if not t.is_contiguous(memory_format=memory_format)]


def _empty_like(recorder: Recorder, like: torch.Tensor, memory_format: torch.memory_format) -> torch.Tensor:
    stride = torch.empty(like.shape, device="meta", memory_format=memory_format).stride()
    return recorder.new(like.shape, like.dtype, stride)


def _shape(tensor: torch.Tensor, output: torch.Tensor, weight: torch.Tensor, options: Options) -> Shape:
    stride, dilation, transposed, groups = options
    if transposed:
        tensor, output = output, tensor

    def sizes(of: Sequence[int]) -> tuple[int, ...]:
        return (1, *of) if tensor.dim() == 3 else tuple(of)  # one dimension is run as two (Convolution.cpp)

    return Shape(
        dtype=tensor.dtype if tensor.dtype in _DTYPES.values() else torch.float32,
        channels_last=_memory_format(tensor, weight) is not torch.contiguous_format,
        batch=tensor.shape[0],
        n_in=tensor.shape[1],
        n_out=output.shape[1],
        kernel=sizes(weight.shape[2:]),
        stride=sizes(stride),
        dilation=sizes(dilation),
        groups=groups,
        size_in=sizes(tensor.shape[2:]),
        size_out=sizes(output.shape[2:]),
    )
