"""The Triton kernel that looks normalised values up; imported only when it is first used."""

import torch
import triton
import triton.language as tl

BLOCK = 1024


@triton.jit  # type: ignore[untyped-decorator, unused-ignore]  # Triton ships no types, or is not there
def _look_up(  # type: ignore[no-untyped-def]  # noqa: ANN202, PLR0913, PLR0917 - Triton reads annotations itself
    images,  # noqa: ANN001 - as above
    normalised,  # noqa: ANN001 - as above
    table,  # noqa: ANN001 - as above
    n_pixels,  # noqa: ANN001 - as above
    from_image,  # noqa: ANN001 - as above
    from_channel,  # noqa: ANN001 - as above
    from_pixel,  # noqa: ANN001 - as above
    to_image,  # noqa: ANN001 - as above
    to_channel,  # noqa: ANN001 - as above
    to_pixel,  # noqa: ANN001 - as above
    n_channels: tl.constexpr,
    block: tl.constexpr,
):
    image = tl.program_id(0).to(tl.int64)
    pixels = tl.program_id(1) * block + tl.arange(0, block)
    is_inside = pixels < n_pixels
    for channel in tl.static_range(n_channels):
        source = images + image * from_image + channel * from_channel + pixels * from_pixel
        value = tl.load(source, mask=is_inside, other=0).to(tl.int32)
        result = tl.load(table + channel * 256 + value, mask=is_inside)
        tl.store(
            normalised + image * to_image + channel * to_channel + pixels * to_pixel, result, mask=is_inside
        )


def launch(images: torch.Tensor, normalised: torch.Tensor, table: torch.Tensor) -> None:
    """Fill `normalised` from `images`, both (N, C, H, W) with evenly spaced pixels, by `table`, (C, 256)."""
    n_images, n_channels, height, width = images.shape
    if not images.numel():
        return  # there is no grid of no programs
    grid = (n_images, triton.cdiv(height * width, BLOCK))
    with torch.cuda.device(images.device):
        _look_up[grid](
            images,
            normalised,
            table,
            height * width,
            *(images.stride(axis) for axis in (0, 1, 3)),
            *(normalised.stride(axis) for axis in (0, 1, 3)),
            n_channels=n_channels,
            block=BLOCK,
        )
