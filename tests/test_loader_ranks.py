"""One DeviceLoader a rank, under torchrun."""

from typing import Any

import pytest
import torch

from tests import loader_ranks

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return what two ranks on the CPU found."""
    return loader_ranks.run_ranks(tmp_path_factory.mktemp("ranks"), "cpu")


def test_ranks_share_each_epoch(results: Results) -> None:
    """Between them the ranks see every sample once in each epoch."""
    first, second = results
    for orders in zip(first["ours"]["orders"], second["ours"]["orders"], strict=True):
        assert sorted(orders[0] + orders[1]) == list(range(loader_ranks.N_SAMPLES))


def test_set_epoch_gives_the_order_of_the_bare_loader(results: Results) -> None:
    """Told through the loader, each epoch has an order of its own: the one that the bare sampler gives it."""
    for result in results:
        assert result["ours"]["orders"] == result["bare"]["orders"]
        assert len({tuple(order) for order in result["ours"]["orders"]}) == loader_ranks.N_EPOCHS


def test_ranks_train_the_weights_of_the_bare_loader(results: Results) -> None:
    """DDP over a DeviceLoader ends with the same weights on each rank, bit for bit those of the bare loop."""
    for result in results:
        for ours, bare, first in zip(
            result["ours"]["weights"], result["bare"]["weights"], results[0]["ours"]["weights"], strict=True
        ):
            assert torch.equal(ours, bare)
            assert torch.equal(ours, first)


def test_a_break_on_each_rank_loses_nothing(results: Results) -> None:
    """After an early break the next epoch is whole on each rank, with workers that persist."""
    for result in results:
        assert result["after_a_break"] == result["ours"]["orders"][0]
