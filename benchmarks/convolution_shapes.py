"""Convolutions of networks that no library brings, by their sizes, for one sample in fp32.

What people write by hand and what papers describe, for images, volumes, sequences and sound; those of the
libraries are walked in `convolution_networks.py`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import pairwise, product

import torch

from torchfast._estimate.cuda_behaviour.convolution_workspaces import Shape

Sizes = tuple[int, ...]


def conv(  # noqa: PLR0913 - what nn.Conv2d takes
    n_in: int,
    n_out: int,
    kernel: int | Sizes,
    size: Sizes,
    *,
    stride: int | Sizes = 1,
    dilation: int | Sizes = 1,
    groups: int = 1,
    padding: int | Sizes | None = None,
) -> Shape:
    """Return a convolution, padded so that stride 1 keeps the size where nothing else is said."""

    def each(value: int | Sizes) -> Sizes:
        return (value,) * len(size) if isinstance(value, int) else value

    kernels, strides, dilations = each(kernel), each(stride), each(dilation)
    if padding is None:
        paddings = tuple(d * (k - 1) // 2 for k, d in zip(kernels, dilations, strict=True))
    else:
        paddings = each(padding)
    parts = zip(size, kernels, strides, dilations, paddings, strict=True)
    out = tuple((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in parts)
    flat = (1,) * (len(size) == 1)  # one dimension is an image one row high
    return Shape(
        dtype=torch.float32,
        channels_last=False,
        batch=1,
        n_in=n_in,
        n_out=n_out,
        kernel=flat + kernels,
        stride=flat + strides,
        dilation=flat + dilations,
        groups=groups,
        size_in=flat + size,
        size_out=flat + out,
    )


def square(side: int, dims: int = 2) -> Sizes:
    """Return the size of an image or a volume of equal sides."""
    return (side,) * dims


def small_cnns() -> Iterator[Shape]:
    """Yield what people write first: a few convolutions, each of which may halve the size."""
    widths = (16, 32, 64, 128, 256, 512)
    for side, kernel in product((28, 32, 48, 64, 96, 128, 160, 192, 224, 256, 384, 512), (3, 5, 7)):
        for width in widths[:3]:
            for n_in, stride in product((1, 3), (1, 2)):
                yield conv(n_in, width, kernel, square(side), stride=stride)
        for level, (narrow, wide) in enumerate(pairwise(widths)):
            for at in {side >> level, side >> max(level - 1, 0)}:
                if 3 <= at <= 256:
                    yield conv(narrow, wide, kernel, square(at))
                    yield conv(wide, wide, kernel, square(at))
                    yield conv(narrow, wide, kernel, square(at), stride=2)
                    yield (
                        conv(narrow, wide, kernel, square(at), padding=0)
                        if at > kernel
                        else conv(narrow, wide, 1, square(at))
                    )


def resnets() -> Iterator[Shape]:
    """Yield residual networks: those of CIFAR and wide ones, and the usual ones at unusual sizes."""
    for width, side in product((16, 32, 64, 80, 96, 128, 160), (32, 40, 48, 64, 72, 80, 112)):
        for level in range(4):
            n, at = width << level, side >> level
            yield conv(n, n, 3, square(at))
            yield conv(n, 2 * n, 3, square(at), stride=2)
            yield conv(n, 2 * n, 1, square(at), stride=2)
            yield conv(4 * n, n, 1, square(at))
            yield conv(n, 4 * n, 1, square(at))
            yield conv(n, n, 3, square(at), dilation=2)
            if n % 32 == 0:
                yield conv(n, n, 3, square(at), groups=32)


def unets() -> Iterator[Shape]:
    """Yield U-Nets in two dimensions, square and not, with two kinds of upsampling."""
    sizes = (
        square(128),
        square(192),
        square(240),
        square(256),
        square(320),
        square(512),
        square(572),
        (192, 640),
    )
    for width, size, n_in in product((16, 24, 32, 48, 64), sizes, (1, 3)):
        yield from unet(width, size, n_in, 5)


def volumes() -> Iterator[Shape]:
    """Yield residual U-Nets of volumes."""
    sizes = (square(32, 3), square(64, 3), square(96, 3), square(128, 3), (64, 128, 128), (16, 112, 112))
    for width, size, n_in in product((8, 16, 24, 32, 48), (*sizes, (20, 256, 256), (40, 160, 160)), (1, 4)):
        yield from unet(width, size, n_in, 4)


def unet(width: int, size: Sizes, n_in: int, depth: int) -> Iterator[Shape]:
    """Yield one U-Net: two convolutions a level, transposed ones upwards, residuals by 1 x 1."""
    yield conv(n_in, width, 3, size)
    yield conv(width, 2, 1, size)
    yield conv(width, 4, 3, size)
    for level in range(depth):
        n, at = width << level, tuple(s >> level for s in size)
        yield from (conv(n, n, 3, at), conv(2 * n, n, 3, at), conv(2 * n, n, 1, at), conv(3 * n, n, 3, at))
        if level < depth - 1:
            below = tuple(s >> level + 1 for s in size)
            even = tuple(2 * s for s in below)
            yield from (conv(n, 2 * n, 3, below), conv(n, 2 * n, 1, below), conv(n, 2 * n, 3, at, stride=2))
            yield conv(n, 2 * n, 2, even, stride=2)  # transposed, described by what it reverses
            yield conv(n, 2 * n, 4, even, stride=2, padding=1)


def video() -> Iterator[Shape]:
    """Yield R(2+1)D, X3D and SlowFast at several lengths and sizes."""
    for frames, side in product((4, 8, 13, 16, 32), (56, 80, 112, 128, 160)):
        for level, width in enumerate((64, 128, 256, 512)):
            at = (max(frames >> max(level - 1, 0), 1), max(side // 2 >> level, 4), max(side // 2 >> level, 4))
            between = width * width * 27 // (9 * width + 3 * width)
            yield from (conv(width, between, (1, 3, 3), at), conv(between, width, (3, 1, 1), at))
            yield conv(width, 2 * between, (1, 3, 3), at, stride=(1, 2, 2))
            yield from (conv(width, width, 3, at), conv(width, 2 * width, 1, at, stride=2))
            yield from (conv(width, 4 * width, 1, at), conv(4 * width, width, (3, 1, 1), at))
            yield conv(width // 8, width // 4, (5, 1, 1), (4 * at[0], *at[1:]), stride=(4, 1, 1))
            thin = 24 << level
            yield from (conv(thin, 9 * thin // 4, 1, at), conv(9 * thin // 4, thin, 1, at))
            yield conv(9 * thin // 4, 9 * thin // 4, 3, at, groups=9 * thin // 4)
        whole = (frames, 2 * side, 2 * side)
        yield conv(3, 24, (1, 3, 3), whole, stride=(1, 2, 2))
        yield conv(3, 8, (5, 7, 7), whole, stride=(1, 2, 2))
        yield conv(3, 64, (3, 7, 7), whole, stride=(1, 2, 2))


def gans() -> Iterator[Shape]:
    """Yield generators and discriminators: DCGAN, pix2pix, CycleGAN, StyleGAN."""
    for width, side, n_image in product((32, 48, 64, 96, 128), (32, 64, 128, 256), (1, 3)):
        yield conv(n_image, width, 4, square(side), stride=2, padding=1)
        yield conv(n_image, width, 7, square(side + 6), padding=0)
        n, at = width, side // 2
        while at > 4:
            n_next = min(2 * n, 8 * width)
            yield conv(n, n_next, 4, square(at), stride=2, padding=1)
            yield conv(2 * n, n_next, 4, square(at), stride=2, padding=1)
            yield conv(n, n_next, 4, square(at), padding=1)
            yield conv(n, n_next, 3, square(at), stride=2)
            yield conv(n, n, 3, square(at + 2), padding=0)  # padded by reflection
            yield conv(n, n_next, 3, square(at))
            n, at = n_next, at // 2
        for latent in (64, 100, 128, 512):
            yield conv(n, latent, 4, square(4), padding=0)
        yield conv(n, 1, 4, square(4), padding=0)


def upsampling() -> Iterator[Shape]:
    """Yield transposed depthwise convolutions, bilinear and learned, by what they reverse."""
    for n, side, factor in product(
        (16, 21, 32, 64, 96, 128, 256, 512), (7, 14, 16, 28, 40, 56, 64), (2, 4, 8)
    ):
        if side * factor <= 256:
            at = square(side * factor)
            yield conv(n, n, 2 * factor, at, stride=factor, groups=n, padding=factor // 2)
            yield conv(n, n, factor, at, stride=factor, groups=n, padding=0)
            yield conv(n, n, 3, at, stride=2, groups=n)
            yield conv(n, n, 5, at, stride=2, groups=n)
    for n, length, factor in product((16, 64, 256, 512), (50, 100, 400, 1000), (2, 4, 5)):
        yield conv(n, n, 2 * factor, (length * factor,), stride=factor, groups=n, padding=-(-factor // 2))
        yield conv(n, n, factor, (length * factor,), stride=factor, groups=n, padding=0)
    for n, side in product((16, 32, 64, 128), (4, 8, 16)):
        yield conv(n, n, 2, square(2 * side, 3), stride=2, groups=n, padding=0)
        yield conv(n, n, 4, square(2 * side, 3), stride=2, groups=n, padding=1)


def diffusion() -> Iterator[Shape]:
    """Yield U-Nets of diffusion, in pixels and in latents, and the autoencoders of the latter."""
    latents = (square(32), square(64), square(96), square(128), (64, 96), (48, 80), square(40))
    for width, size in product((64, 96, 128, 160, 192, 224, 256, 320, 384), latents):
        yield from (conv(4, width, 3, size), conv(width, 4, 3, size), conv(3, width, 3, size))
        for level, (factor, lower) in enumerate(((1, 1), (2, 1), (3, 2), (4, 2), (4, 4))):
            n, m, at = width * factor, width * lower, tuple(s >> level for s in size)
            if min(at) >= 4 and n <= 1536:
                yield from (conv(n, n, 3, at), conv(m, n, 3, at), conv(n, n, 1, at), conv(m, n, 1, at))
                yield from (conv(n + m, n, 3, at), conv(2 * n, n, 3, at), conv(2 * n, n, 1, at))
                yield from (conv(n, n, 3, at, stride=2), conv(n, 3 * n, 1, at), conv(n + m, n, 1, at))
    for side, width in product((128, 192, 256, 384, 512), (64, 96, 128)):
        yield conv(3, width, 3, square(side))
        for level, factor in enumerate((1, 2, 4, 4)):
            n, at = width * factor, square(side >> level)
            yield from (conv(n, n, 3, at), conv(n, 2 * n, 3, at), conv(n, n, 3, square(at[0] + 1), stride=2))
            yield from (conv(2 * n, n, 1, at), conv(n, 8, 3, at), conv(n, 3, 3, at))


def super_resolution() -> Iterator[Shape]:
    """Yield EDSR, ESRGAN, RCAN, SRCNN, ESPCN and denoisers on patches."""
    for side, width in product((24, 32, 48, 64, 96, 128, 192), (32, 48, 64, 96, 128, 180, 256)):
        at = square(side)
        yield from (conv(width, width, 3, at), conv(width, 4 * width, 3, at), conv(width, 9 * width, 3, at))
        yield from (conv(width, width, 3, square(2 * side)), conv(width, 3, 3, square(4 * side)))
        yield from (
            conv(3, width, 3, at),
            conv(3, width, 9, at),
            conv(width, 3, 9, at),
            conv(width, 12, 3, at),
        )
        yield conv(1, width, 5, at)
        yield from (conv(width, width // 2, 1, at), conv(width, width // 2, 5, at))
        for i in range(1, 5):
            yield conv(width + i * (width // 2), width // 2, 3, at)
        yield conv(width + 4 * (width // 2), width, 3, at)
        yield conv(3, width, 9, square(2 * side), stride=2)


def detection() -> Iterator[Shape]:
    """Yield pyramids, heads, YOLO's stages, dilated pyramids and hourglasses, square and not."""
    sizes = (
        (320, 320),
        (416, 416),
        (512, 512),
        (640, 640),
        (800, 1088),
        (800, 1344),
        (512, 1024),
        (384, 1280),
    )
    for size, width in product(sizes, (16, 24, 32, 48, 64, 80)):
        yield from (conv(3, width, 3, size, stride=2), conv(3, width, 6, size, stride=2, padding=2))
        for level in range(1, 6):
            n, at = width << level - 1, tuple(s >> level for s in size)
            yield from (conv(n, 2 * n, 3, at, stride=2), conv(n, n, 1, at), conv(n, n, 3, at))
            yield from (conv(2 * n, n, 1, at), conv(n // 2, n // 2, 3, at), conv(3 * n // 2, n, 1, at))
            if level >= 3:
                yield from (
                    conv(n, 64, 3, at),
                    conv(64, 64, 1, at),
                    conv(n, 80, 1, at),
                    conv(4 * n, n, 1, at),
                )
    for size, level in product(sizes, range(2, 8)):
        at = tuple(-(-s // 2**level) for s in size)
        yield from (conv(256, 256, 3, at), conv(256, 720, 3, at), conv(256, 36, 3, at), conv(256, 12, 1, at))
        yield from (conv(64 << level - 1, 256, 1, at) for _ in range(level < 6))
        yield from (conv(256, 3, 1, at), conv(256, 80, 3, at), conv(2048, 256, 3, at, stride=2))
    for side, n in product((28, 32, 33, 40, 60, 64, 65, 97), (320, 512, 960, 1024, 1280, 2048)):
        yield from (conv(n, 256, 3, square(side), dilation=d) for d in (6, 12, 18, 24, 36) if d < side)
        yield from (
            conv(n, 256, 1, square(side)),
            conv(n, 512, 3, square(side)),
            conv(n, n // 4, 1, square(side)),
        )
        yield from (conv(1280, 256, 1, square(side)), conv(304, 256, 3, square(4 * side)))
    for rois, side in product((100, 256, 512, 1000), (7, 14, 28)):
        yield from (
            replace(conv(256, n, k, square(side), stride=s, padding=p), batch=rois)
            for n, k, s, p in ((256, 3, 1, 1), (256, 2, 2, 0), (1024, 7, 1, 0), (80, 1, 1, 0), (512, 3, 1, 1))
            if k <= side
        )


def sequences() -> Iterator[Shape]:
    """Yield temporal networks: dilated, of texts, of heartbeats, of state spaces."""
    for n, length in product(
        (16, 25, 32, 64, 100, 128, 192, 256, 512), (50, 128, 256, 400, 1000, 2048, 5000, 8192)
    ):
        for kernel, level in product((2, 3, 5, 7), (0, 1, 3, 5, 8)):
            d = 2**level
            if d * (kernel - 1) < length:  # causal: padded on both sides and cut, or on one side before
                yield conv(n, n, kernel, (length,), dilation=d, padding=d * (kernel - 1))
                if kernel < 5:
                    yield conv(n, 2 * n, kernel, (length + d * (kernel - 1),), dilation=d, padding=0)
        yield from (
            conv(n, 2 * n, k, (length,), stride=s) for k, s in ((1, 1), (3, 2), (7, 2), (15, 2), (16, 4))
        )
        yield from (conv(n, n, k, (length,)) for k in (1, 9, 15, 17, 31) if k < length)
        yield from (conv(c, n, 7, (length,)) for c in (1, 2, 12))
        yield conv(n, n, 3, (length,), groups=4) if n % 4 == 0 else conv(n, 1, 1, (length,))
    for n, length in product((100, 128, 200, 300, 512, 768, 1024), (50, 64, 128, 200, 256, 512)):
        yield from (conv(n, m, k, (length,), padding=0) for m in (100, 128, 256) for k in (2, 3, 4, 5))
        yield from (conv(n, 4 * n, k, (length,)) for k in (1, 3, 9))
    for n, length in product((256, 512, 768, 1536, 2048, 3072, 4096), (128, 256, 512, 1024, 2048)):
        yield conv(n, n, 4, (length,), groups=n, padding=3)
        yield conv(n, n, 31, (length,), groups=n)


def sound() -> Iterator[Shape]:
    """Yield vocoders, separators, codecs and spectrograms."""
    for width, frames in product((128, 256, 512), (32, 50, 128, 400)):
        yield from (conv(n, width, 7, (frames,)) for n in (80, 100, 128))
        n, length = width, frames
        for up in (8, 8, 2, 2, 5, 4):
            if length * up > 80000 or n < 16:
                break
            longer = (length * up,)
            yield conv(n // 2, n, 2 * up, longer, stride=up, padding=-(-up // 2))
            n, length = n // 2, length * up
            for k, d in product((3, 7, 11), (1, 3, 5)):
                yield conv(n, n, k, (length,), dilation=d)
            yield from (conv(n, 1, 7, (length,)), conv(1, n, 7, (length,)), conv(n, n, 1, (length,)))
    for width, seconds in product((32, 48, 64), (1, 4, 8)):
        for level in range(5):
            n, length = width << level, seconds * 44100 >> 2 * level
            yield conv(2 if level == 0 else n // 2, n, 8, (length,), stride=4, padding=2)
            yield from (conv(n, 2 * n, 1, (length // 4,)), conv(n, n // 4, 3, (length // 4,), dilation=2))
    for n, length in product((128, 256, 512), (500, 1999, 3999, 7999)):
        yield from (conv(1, n, 16, (8 * length + 8,), stride=8, padding=0), conv(n, 2 * n, 1, (length,)))
        yield from (conv(2 * n, 2 * n, 3, (length,), groups=2 * n, dilation=d) for d in (1, 16, 128))
    for size, n in product(
        ((80, 400), (80, 1000), (128, 998), (64, 501), (40, 101), (257, 256)), (32, 64, 144, 256)
    ):
        half = tuple(-(-s // 2) for s in size)
        yield from (conv(1, n, 3, size, stride=2, padding=p) for p in (0, 1))
        yield from (conv(n, n, 3, half, stride=2, padding=p) for p in (0, 1))
        yield from (conv(1, n, 7, size), conv(n, n, 3, half), conv(1, n, (size[0], 9), size, padding=(0, 4)))
        yield from (conv(n, 2 * n, (5, 5), half, stride=(2, 1)), conv(n, n, (3, 9), half, stride=(1, 2)))


BY_HAND: Sequence[Callable[[], Iterator[Shape]]] = (
    *(
        small_cnns,
        resnets,
        unets,
        diffusion,
        gans,
        super_resolution,
        upsampling,
        detection,
        volumes,
        video,
        sequences,
        sound,
    ),
)
