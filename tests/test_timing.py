"""The one way to time work on a device."""

import pytest
import torch

from torchfast._timing import time_ms


def test_time_of_one_call_is_the_fastest_round(monkeypatch: pytest.MonkeyPatch) -> None:
    """A round has as many calls as take 30 ms, and of three rounds the fastest counts."""
    now = [0.0]
    n_calls = [0]

    def run() -> None:
        n_calls[0] += 1
        now[0] += 0.002 if n_calls[0] < 20 else 0.001

    monkeypatch.setattr("torchfast._timing.time.perf_counter", lambda: now[0])
    assert time_ms(run, torch.device("cpu")) == pytest.approx(1.0)
    assert n_calls[0] == 1 + 1 + 3 * 15


def test_a_long_call_is_not_repeated_more_than_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A call that takes longer than a round runs once a round."""
    now = [0.0]

    def run() -> None:
        now[0] += 1.0

    monkeypatch.setattr("torchfast._timing.time.perf_counter", lambda: now[0])
    assert time_ms(run, torch.device("cpu")) == pytest.approx(1000)
    assert now[0] == 5
