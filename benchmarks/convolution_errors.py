"""How far off the workspaces of convolutions are that `estimate_vram` never saw.

    python benchmarks/convolution_errors.py [--rows 5000]

predicts rows of `convolution_sweep.csv` from the others: once without every row of the same channels, sizes
and groups, whatever its batch size, type and layout, and once without those of its batch size. Prints for
each direction the error in percent of input, output and weight together (at most all of them), and in bytes.
Needs no GPU.
"""

import argparse
import random
from collections.abc import Callable
from dataclasses import replace

import torch

from torchfast._estimate.cuda_behaviour.convolution_workspaces import (
    N_ALIKE,
    Alike,
    Shape,
    Taken,
    bytes_by,
    most_alike,
    table,
)

PARTS = (50, 90, 95, 99)
N_MOST_OF_A_SHAPE = 100
"""More rows than there are of one convolution: so many are looked at to find those of others."""


def main() -> None:
    """Predict and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rows", type=int, default=5000, help="how many rows, drawn at random")
    rows = list(table())
    rows = random.Random(0).sample(rows, min(parser.parse_args().rows, len(rows)))  # noqa: S311 - a sample
    for title, is_left_out in (("unknown", is_same_at_any_batch), ("unknown at this batch", is_same)):
        print(f"{title}: {len(rows)} convolutions")
        report(rows, is_left_out)


def is_same(one: Shape, other: Shape) -> bool:
    """Whether two differ by the type at most."""
    return replace(one, dtype=other.dtype) == other


def is_same_at_any_batch(one: Shape, other: Shape) -> bool:
    """Whether two differ by batch size, type and layout at most."""
    return replace(one, batch=other.batch, dtype=other.dtype, channels_last=other.channels_last) == other


def report(rows: list[tuple[Shape, Taken]], is_left_out: Callable[[Shape, Shape], bool]) -> None:
    """Print the errors of all rows, one direction after the other."""
    taken = torch.tensor([taken for _, taken in rows], dtype=torch.double)
    found = torch.tensor([predicted(shape, is_left_out) for shape, _ in rows], dtype=torch.double)
    operands = torch.tensor([[sum(shape.operand_bytes(shape.vector))] for shape, _ in rows])
    off = (found - taken).abs()
    shares = 100 * (off / operands).clamp(max=1)
    for i, name in enumerate(("forward", "gradient of the data", "gradient of the weight")):
        parts = [f"{part} %: {shares[:, i].quantile(part / 100):.1f}" for part in PARTS]
        mib = [f"{part} %: {off[:, i].quantile(part / 100) / 2**20:.1f}" for part in PARTS]
        print(f"  {name}: mean {shares[:, i].mean():.1f} % of all operands ({', '.join(parts)}),")
        total = 100 * off[:, i].sum() / taken[:, i].sum()
        print(f"    {total:.1f} % of all bytes that were taken; MiB {', '.join(mib)}")


def predicted(shape: Shape, is_left_out: Callable[[Shape, Shape], bool]) -> list[int]:
    """Return what the rule says of a convolution where the table lacks some."""
    alike: list[Alike] = most_alike(shape, N_ALIKE + N_MOST_OF_A_SHAPE)
    others = [one for one in alike if not is_left_out(one.shape, shape)][:N_ALIKE]
    return [bytes_by(others, shape, direction) for direction in range(3)]


if __name__ == "__main__":
    main()
