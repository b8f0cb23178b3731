"""Which dimension of a batch is the batch, and what a batch is split into."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence, unpack_sequence

from torchfast._batch import Gathered, batch_size, cut, lengths_of


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
    if batch_size(twin, dim=dim) != n_samples:
        return  # another size is the commoner one
    parts = cut(twin, lengths_of(n_samples, size), dim=dim)
    assert torch.equal(torch.cat([part["x"] for part in parts], dim), batch["x"])
    assert all(part["x"].shape[dim] <= size or size >= n_samples for part in parts)
    assert all(part["table"] is batch["table"] and part["y"] is part["x"] for part in parts)


@given(st.integers(1, 40), st.integers(1, 50))
def test_uneven_parts_have_two_sizes(n_samples: int, size: int) -> None:
    """Parts hold all samples, at most so many each, and with `uneven` not all as many."""
    even, uneven = lengths_of(n_samples, size), lengths_of(n_samples, size, uneven=True)
    assert sum(even) == sum(uneven) == n_samples
    assert max(even) == max(uneven) <= size
    assert size == 1 or len(uneven) == 1 or len(set(uneven)) > 1


@given(st.lists(st.integers(1, 6), min_size=1, max_size=9), st.integers(1, 9), st.booleans())
def test_packed_sequences_are_cut_by_sequence(lengths: list[int], size: int, is_sorted: bool) -> None:  # noqa: FBT001 -- drawn
    """A packed sequence counts by its sequences; parts of it hold these, in their order, each once."""
    lengths = sorted(lengths, reverse=True) if is_sorted else lengths
    sequences = [torch.randn(n, 2) for n in lengths]
    packed = pack_sequence(sequences, enforce_sorted=is_sorted)
    labels = torch.arange(len(lengths))
    assert batch_size((packed, torch.zeros(99))) == len(lengths)
    parts = cut((packed, labels), lengths_of(len(lengths), size))
    found = [sequence for part, _ in parts for sequence in unpack_sequence(part)]
    assert all(map(torch.equal, found, sequences))
    assert torch.equal(torch.cat([part for _, part in parts]), labels)
    assert all((part.unsorted_indices is None) == is_sorted for part, _ in parts)


# --- parts put together again -----------------------------------------------------------------------------


def in_parts(function: Callable[[Any], Any], batch: Any, size: int, dim: int = 0) -> Any:
    """Return what a function returns for a batch, worked on in parts."""
    n_samples = batch_size(batch, dim=dim) or 0
    lengths = lengths_of(n_samples, size, uneven=True)
    gathered = Gathered(n_samples, refusal=ValueError, dim=dim)
    for part, length in zip(cut(batch, lengths, dim=dim), lengths, strict=True):
        gathered.add(function(part), length)
    return gathered.whole()


@given(st.integers(1, 20), st.integers(1, 20), st.integers(0, 2), st.booleans())
def test_parts_put_together_are_the_whole(n_samples: int, size: int, dim: int, grad: bool) -> None:  # noqa: FBT001 -- drawn
    """Rows of samples come in order, with their graph, and what all parts share comes once."""
    shape = [3, 4, 5]
    shape[dim] = n_samples
    x, table = torch.randn(shape, requires_grad=grad), torch.randn(size, 7)

    def function(part: torch.Tensor) -> Any:
        return {"twice": part * 2, "pair": [part.sum((dim + 1) % 3, keepdim=True), None], "name": "n"}

    whole, found = function(x), in_parts(function, x, size, dim)
    torch.testing.assert_close(found["twice"], whole["twice"])
    torch.testing.assert_close(found["pair"][0], whole["pair"][0])
    assert (found["pair"][1], found["name"]) == (None, "n")
    assert found["twice"].requires_grad == grad
    if size > 1 and size < n_samples:
        assert torch.equal(in_parts(lambda _: table, x, size, dim), table)


@pytest.mark.parametrize("n_samples", [7, 8, 12])
@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.mean(0),
        lambda x: x.mean(0, keepdim=True),
        torch.sum,
        lambda x: x @ x.T,
        lambda x: (x, [str(row) for row in range(len(x))]),
        lambda x: (x, len(x)),
        lambda x: (x, object()),
        lambda x: nn.utils.rnn.pack_sequence([x]),
        lambda x: (x, x.numpy().sum(0)),
    ],
)
def test_what_is_no_row_of_a_sample_is_refused(
    function: Callable[[torch.Tensor], Any], n_samples: int
) -> None:
    """What belongs to a part as a whole is not taken for rows, though it be as long as a part."""
    with pytest.raises(ValueError, match=r"samples|part"):
        in_parts(function, torch.arange(n_samples * 4.0).reshape(n_samples, 4), 4)


def test_lists_beside_single_samples_are_refused() -> None:
    """Parts of one sample cannot show whether a list of one value is for the sample or for all of them."""
    x = torch.zeros(3, 2)
    with pytest.raises(ValueError, match="a list of 1 for 1 samples"):
        in_parts(lambda part: (part, ["0"]), x, 1)
    assert in_parts(lambda part: (part, [None], x.shape[:1]), x, 1)[1:] == ([None], x.shape[:1])
