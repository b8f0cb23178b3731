"""Measures what cuDNN's recurrent kernels take while they run, for tests/data/recurrent_sweep.csv.

    python benchmarks/recurrent_sweep.py --out rows.csv [--rows 4000] [--at-once 14] [--limit-s 120]

Random networks, and those that the table has; the formulas of the estimate were read off them. The bytes are
what the caching allocator was asked for at the peak of one operator, beyond what it held before and what the
operator returned: in the forward pass, and in the gradient of data and states (which makes zeros of the
gradients of the last states, as nobody gives them). Values matter to nothing here.
"""

import argparse
import multiprocessing
import random
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import record
import torch

from torchfast._estimate.cuda_behaviour.recurrent_workspaces import GRU, LSTM, RELU, TANH, Network

TABLE = Path(__file__).parent.parent / "tests" / "data" / "recurrent_sweep.csv"
DESCRIBED = ("mode", "batch", "steps", "n_in", "hidden", "projection", "layers", "directions")
COLUMNS = ("dtype", *DESCRIBED, "n_weights", "forward_bytes", "backward_bytes")
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
WIDTHS = (20, 32, 48, 64, 80, 96, 100, 128, 150, 160, 192, 200, 250, 256, 300, 320, 384, 400, 450, 500, 512)
WIDE = (600, 640, 650, 700, 768, 800, 896, 1000, 1024, 1150, 1280, 1500, 1536, 2048)
BATCHES = (1, 2, 3, 4, 6, 8, 10, 12, 16, 20, 24, 32, 40, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512)
STEPS = (1, 5, 10, 16, 20, 28, 32, 35, 40, 50, 64, 70, 80, 100, 128, 150, 192, 200, 256, 300, 384, 512, 800)


def main() -> None:
    """Measure, in several processes that share the GPU, and put their rows together."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--rows", type=int, default=4000, help="random networks beside those of the table")
    parser.add_argument("--at-once", type=int, default=14, help="how many processes share the GPU")
    parser.add_argument("--limit-s", type=float, default=120, help="begin no further network after that")
    parser.add_argument("--modes", type=int, nargs="*", default=[RELU, TANH, LSTM, GRU], help="only these")
    options = parser.parse_args()
    networks = [network for network in drawn(options.rows) if network.mode in options.modes]
    context = multiprocessing.get_context("spawn")
    parts = [options.out.with_suffix(f".{index}") for index in range(options.at_once)]
    processes = [
        context.Process(target=measure, args=(networks[index :: len(parts)], part, options.limit_s))
        for index, part in enumerate(parts)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(options.limit_s + 60)
        process.kill()
    rows = [row for part in parts if part.exists() for row in part.read_text().splitlines()]
    for part in parts:
        part.unlink(missing_ok=True)
    options.out.write_text("".join(f"{row}\n" for row in (",".join(COLUMNS), *sorted(rows))))
    print(f"{len(rows)} of {len(networks)} networks measured")


def drawn(n_random: int) -> list[Network]:
    """Return the table's networks, and random ones, in random order."""
    rng = random.Random(0)  # noqa: S311 - a sample, no secret
    names, *lines = TABLE.read_text().splitlines()
    known = [dict(zip(names.split(","), line.split(","), strict=True)) for line in lines]
    found = {
        described(getattr(torch, row["dtype"]), **{name: int(row[name]) for name in DESCRIBED})
        for row in known
    }
    n_rows = len(found) + n_random
    while len(found) < n_rows:
        network = one(rng)
        if is_moderate(network):
            found.add(network)
    networks = sorted(found, key=str)
    rng.shuffle(networks)
    return networks


def one(rng: random.Random) -> Network:
    """Draw a network."""
    mode = rng.choices((RELU, TANH, LSTM, GRU), (1, 3, 8, 6))[0]
    hidden = rng.choice(WIDTHS + WIDE)
    projection = rng.choice((hidden // 2, hidden // 4)) if mode == LSTM and rng.random() < 0.12 else 0
    return described(
        rng.choice(DTYPES),
        mode=mode,
        batch=rng.choice(BATCHES),
        steps=rng.choice(STEPS),
        n_in=hidden if rng.random() < 0.4 else rng.choice(WIDTHS + WIDE),
        hidden=hidden,
        projection=projection,
        layers=rng.choices((1, 2, 3, 4, 5), (8, 8, 4, 2, 1))[0],
        directions=rng.choices((1, 2), (3, 2))[0],
    )


def described(dtype: torch.dtype, /, **sizes: Any) -> Network:
    """Return a network and the full batch that it runs on."""
    return Network(dtype=dtype, n_rows=sizes["batch"] * sizes["steps"], **sizes)


def is_moderate(network: Network) -> bool:
    """Whether it runs in some ten milliseconds and some gigabytes."""
    n_layers = network.layers * network.directions
    n_states = network.n_rows * network.hidden * n_layers
    is_quick = network.steps * n_layers <= 2500 and n_states * network.hidden <= 5e10
    return is_quick and n_states + network.n_rows * network.n_in <= 1e8


# --- in a process of its own -------------------------------------------------------------------------------


def measure(networks: list[Network], out: Path, limit_s: float) -> None:
    """Write the rows of these networks, as they come; leave out what cannot be run."""
    torch.set_num_threads(1)
    until_s = time.monotonic() + limit_s
    with out.open("w") as file:
        for network in networks:
            if time.monotonic() > until_s:
                return
            try:
                taken = workspaces(network)
            except (torch.OutOfMemoryError, RuntimeError) as error:
                print(network, str(error).splitlines()[0], flush=True)
                continue
            dtype = str(network.dtype).removeprefix("torch.")
            n_weights = network.n_matrix_elements + network.n_biases
            sizes = [getattr(network, name) for name in DESCRIBED]
            print(dtype, *sizes, n_weights, *taken, sep=",", file=file, flush=True)
            torch.cuda.empty_cache()


def weight_shapes(network: Network) -> Iterator[tuple[int, ...]]:
    """Yield the weights, layer by layer and direction by direction, as PyTorch orders them."""
    gates = network.n_gates * network.hidden
    for layer in range(network.layers):
        n_in = network.n_out * network.directions if layer else network.n_in
        for _ in range(network.directions):
            yield from ((gates, n_in), (gates, network.n_out), (gates,), (gates,))
            if network.projection:
                yield (network.projection, network.hidden)


def workspaces(network: Network) -> tuple[int, int]:
    """Return what the forward pass took, and the gradient of data and states."""

    def new(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, dtype=network.dtype, device="cuda")

    n_states = network.layers * network.directions
    weights = [new(*shape) for shape in weight_shapes(network)]
    tensor = new(network.steps, network.batch, network.n_in)
    hx = new(n_states, network.batch, network.n_out)
    cx = new(n_states, network.batch, network.hidden) if network.mode == LSTM else None
    told: tuple[Any, ...] = (network.mode, network.hidden, network.projection, network.layers)
    told = (*told, False, 0.0, True, network.directions == 2, [], None)
    n_each = 5 if network.projection else 4
    forward, (output, _, _, reserve, flat) = record.taken_bytes(
        partial(torch.ops.aten._cudnn_rnn, tensor, weights, n_each, None, hx, cx, *told)
    )
    gradient = torch.zeros_like(output)
    of_data = [True, True, cx is not None, False]
    backward, _ = record.taken_bytes(
        partial(
            torch.ops.aten._cudnn_rnn_backward,
            *(tensor, weights, n_each, flat, hx, cx, output, gradient, None, None),
            *(*told, reserve, of_data),
        )
    )
    torch.cuda.synchronize()  # an error of a kernel is this network's
    return forward, backward


if __name__ == "__main__":
    main()
