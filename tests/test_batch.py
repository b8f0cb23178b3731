"""Which dimension of a batch is the batch, and what a batch is split into."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchfast._batch import batch_size, split


def test_size_is_what_most_tensors_share() -> None:
    """The leading dimension that most tensors share counts; on a tie the first one met; scalars never."""
    images, labels, table = torch.zeros(8, 3), torch.zeros(8), torch.zeros(5, 2)
    assert batch_size({"table": table, "images": images, "labels": labels}) == 8
    assert batch_size((table, images)) == 5
    assert batch_size([torch.tensor(1.0), images]) == 8
    assert batch_size({"name": "x", "n": 3}) is None
    assert batch_size(torch.zeros(7, 4, 3), dim=1) == 4


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("layout", [torch.strided, torch.jagged])
def test_nested_tensors_have_samples_too(layout: torch.layout) -> None:
    """A nested tensor counts by its number of tensors; its ragged dimensions have no size."""
    nested = torch.nested.nested_tensor([torch.zeros(n, 2) for n in (3, 1, 2)], layout=layout)
    assert batch_size((nested, torch.zeros(3))) == 3
    assert batch_size(nested, dim=1) is None


@given(st.integers(1, 40), st.integers(1, 50), st.integers(0, 2))
def test_splitting_keeps_every_sample(n_samples: int, size: int, dim: int) -> None:
    """The parts of a batch hold its samples in order, each once; what has no samples is in every part."""
    shape = [3, 4, 5]
    shape[dim] = n_samples
    batch: dict[str, Any] = {"x": torch.randn(shape), "table": torch.ones(100, 100, 100), "name": "n"}
    twin: dict[str, Any] = {**batch, "y": batch["x"]}
    parts = split(twin, size, dim=dim)
    if batch_size(twin, dim=dim) != n_samples:
        return  # another size is the commoner one
    assert torch.equal(torch.cat([part["x"] for part in parts], dim), batch["x"])
    assert all(part["x"].shape[dim] <= size or size >= n_samples for part in parts)
    assert all(part["table"] is batch["table"] and part["y"] is part["x"] for part in parts)


def test_what_has_no_samples_is_not_split() -> None:
    """A batch of one part, and one without tensors, are the very objects that were given."""
    batch = {"x": torch.zeros(4)}
    assert split(batch, 4)[0] is batch
    assert split("text", 2) == ["text"]
