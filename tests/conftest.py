"""What every test shares: seeds, the markers for GPUs, and a hypothesis profile."""

import functools
import gc
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import settings

from torchfast._loader import normalize

settings.register_profile("torchfast", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("torchfast")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, visibly, what this machine has no GPU for."""
    n_gpus = torch.cuda.device_count()
    for item in items:
        gpus = item.get_closest_marker("gpus")
        needed = gpus.args[0] if gpus else int(item.get_closest_marker("cuda") is not None)
        if needed > n_gpus:
            item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), this machine has {n_gpus}"))


@pytest.fixture(autouse=True)
def seeded() -> None:
    """Start every test from the same random numbers."""
    torch.manual_seed(0)


@pytest.fixture
def quick_collections() -> Iterator[None]:
    """Spare the garbage collector, which a guard runs after each failure, all that exists by now."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Ask for deterministic algorithms, which fill memory that is not initialised."""
    torch.use_deterministic_algorithms(mode=True)
    yield
    torch.use_deterministic_algorithms(mode=False)


@pytest.fixture
def _no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let Triton find no compiler for the kernel that normalises images."""

    def fail(*_: Any) -> None:
        raise RuntimeError("Failed to find C compiler.")

    monkeypatch.setattr(normalize, "_launches", functools.cache(lambda: [fail]))
