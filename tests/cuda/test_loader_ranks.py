"""One DeviceLoader a rank, under torchrun: two ranks on one GPU, and on two."""

from pathlib import Path

import pytest
import torch

from tests import loader_ranks

pytestmark = pytest.mark.cuda


@pytest.mark.parametrize(
    ("device", "backend"),
    [("cuda:0", "gloo"), pytest.param("cuda", "nccl", marks=pytest.mark.gpus(2))],
    ids=["two ranks on one GPU", "a GPU each"],
)
def test_ranks_train_as_with_the_bare_loader(tmp_path: Path, device: str, backend: str) -> None:
    """Ranks share each epoch, in the order that set_epoch gives, and train the bare loop's weights."""
    first, second = loader_ranks.run_ranks(tmp_path, device, backend)
    assert {first["device"], second["device"]} == ({"cuda:0"} if backend == "gloo" else {"cuda:0", "cuda:1"})
    for orders in zip(first["ours"]["orders"], second["ours"]["orders"], strict=True):
        assert sorted(orders[0] + orders[1]) == list(range(loader_ranks.N_SAMPLES))
    for result in (first, second):
        assert result["ours"]["orders"] == result["bare"]["orders"]
        assert result["after_a_break"] == result["ours"]["orders"][0]
        assert all(map(torch.equal, result["ours"]["weights"], result["bare"]["weights"]))
        assert all(map(torch.equal, result["ours"]["weights"], first["ours"]["weights"]))
