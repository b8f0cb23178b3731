"""Inference in chunks: the whole batch's outputs from less memory."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from torchfast import inject_oom, oom_guard

pytestmark = pytest.mark.usefixtures("quick_collections")


class TwoHeads(nn.Module):
    """A net with a nested output."""

    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(4, 6)

    def forward(self, samples: torch.Tensor, scale: torch.Tensor | None = None) -> dict[str, Any]:
        """Return features and their norms."""
        features = self.trunk(samples) * (1 if scale is None else scale)
        return {"features": features, "norms": (features.norm(dim=-1), None), "name": "two"}


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("above", [5, 4, 1])
def test_chunks_give_the_whole_output(above: int, grad: bool) -> None:  # noqa: FBT001 -- a parameter of the test
    """Chunked outputs, nested ones too, are those of the whole batch, in order, with their graph."""
    model = TwoHeads()
    samples, scale = torch.randn(11, 4), torch.rand(1, 6)
    with torch.set_grad_enabled(grad):
        whole = model(samples, scale=scale)
        predict = oom_guard().chunked(model)
        with inject_oom(at=1, above=above, times=None):
            chunks = predict(samples, scale=scale)
    torch.testing.assert_close(chunks["features"], whole["features"])
    torch.testing.assert_close(chunks["norms"][0], whole["norms"][0])
    assert (chunks["norms"][1], chunks["name"]) == (None, "two")
    assert chunks["features"].requires_grad == grad


def test_chunks_of_rows_that_are_no_samples_are_refused() -> None:
    """An output without one row a sample cannot be put together."""

    def total(samples: torch.Tensor) -> torch.Tensor:
        return samples.sum()

    predict = oom_guard().chunked(total)
    assert predict(torch.ones(8)).item() == 8
    with pytest.raises(ValueError, match="one row for each"), inject_oom(above=4, times=None):
        predict(torch.ones(8))


@pytest.mark.parametrize("of", [torch.Tensor.tolist, lambda rows: {"rows": rows, "names": rows.tolist()}])
def test_chunks_of_other_things_than_tensors_are_refused(of: Callable[[torch.Tensor], Any]) -> None:
    """Values for each sample that are no tensors cannot be put together, and are not lost without a word."""
    predict = oom_guard().chunked(lambda samples: of(samples * 2))
    with pytest.raises(ValueError, match="one row for each"), inject_oom(above=4, times=None, operator="mul"):
        predict(torch.arange(8.0))


def test_chunks_as_long_as_what_is_no_row() -> None:
    """A mean over the chunk with as many features as the chunk has samples is refused; a table is kept."""
    table, samples = torch.randn(4, 2), torch.randn(8, 4)
    with inject_oom(above=4, times=None):
        found = oom_guard().chunked(lambda x: (x * 2, table))(samples)
    assert torch.equal(found[0], samples * 2)
    assert torch.equal(found[1], table)
    wrong: list[Callable[[torch.Tensor], Any]] = [
        lambda x: x.mean(0),
        lambda x: (x + 1, [str(row) for row in range(len(x))]),
    ]
    for function in wrong:
        with pytest.raises(ValueError, match="one row for each"), inject_oom(above=4, times=None):
            oom_guard().chunked(function)(samples)


def test_fits_whole_then_untouched() -> None:
    """Where the whole batch fits, the function's own output is returned."""
    output = torch.zeros(3)
    assert oom_guard().chunked(lambda _: output)(torch.zeros(8)) is output
