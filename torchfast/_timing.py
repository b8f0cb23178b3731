"""The one way to time work on a device, for those who choose by measuring."""

import time
from collections.abc import Callable

import torch

MIN_ROUND_S = 0.03
N_ROUNDS = 3


def time_ms(run: Callable[[], object], device: torch.device, /) -> float:
    """Return the time of one call on the device, after a first one.

    It is the mean of as many calls as take 30 ms, in the fastest of three rounds: what else runs on a machine
    only ever adds time. The device is drained around a round, so that both the host's and its own part count.
    """
    run()  # chooses kernels and takes memory

    def of_calls(n_calls: int) -> float:
        _drain(device)
        start_s = time.perf_counter()
        for _ in range(n_calls):
            run()
        _drain(device)
        return time.perf_counter() - start_s

    once_s = of_calls(1)
    n_calls = max(1, min(100, int(MIN_ROUND_S / max(once_s, 1e-6))))
    return min(of_calls(n_calls) / n_calls for _ in range(N_ROUNDS)) * 1e3


def _drain(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
