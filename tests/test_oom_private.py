"""What oom_guard uses of PyTorch and CPython that is private: each test says when it is gone."""

import ctypes
import sys

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from torchfast._oom import transaction
from torchfast._oom.injection import _in_backward


def test_backward_pass_is_known_by_its_task() -> None:
    """While the backward pass runs, its task has a number."""
    seen = []
    doubled = torch.ones(1, requires_grad=True) * 2
    doubled.register_hook(lambda _: seen.append(_in_backward()))
    doubled.backward()
    assert seen == [True]
    assert not _in_backward()


def test_foreach_copy_is_there() -> None:
    """Several tensors are copied by one call, which is a loop where that is gone."""
    targets, sources = [torch.zeros(2), torch.zeros(3)], [torch.ones(2), torch.ones(3)]
    assert hasattr(torch, "_foreach_copy_")
    transaction.copy_all(targets, sources)
    transaction._copy_one_by_one(targets, [2 * source for source in sources])
    assert [t.tolist() for t in targets] == [[2, 2], [2, 2, 2]]


def test_scaler_comes_back() -> None:
    """The scaler's scale is restored from its private attributes."""
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    scaler.scale(torch.ones(1))
    state = transaction._scaler_state(scaler)
    assert state is not None
    assert "public" not in state
    scaler.update(32.0)
    transaction._restore_scaler(scaler, state)
    assert scaler.get_scale() == 8.0


def test_scaler_of_another_make_comes_back() -> None:
    """A scaler without these attributes is restored by its state dict."""

    class OtherScaler:
        scale = 8.0

        def state_dict(self) -> dict[str, float]:
            return {"scale": self.scale}

        def load_state_dict(self, state: dict[str, float]) -> None:
            self.scale = state["scale"]

    scaler = OtherScaler()
    state = transaction._scaler_state(scaler)
    scaler.scale = 32.0
    transaction._restore_scaler(scaler, state)
    assert scaler.scale == 8.0


@pytest.mark.skipif(sys.version_info >= (3, 13), reason="f_locals writes through since Python 3.13")
def test_running_frames_can_be_written() -> None:
    """CPython can write a frame's variables back."""
    assert hasattr(ctypes.pythonapi, "PyFrame_LocalsToFast")


def test_wrapper_has_the_switch_for_its_buffers() -> None:
    """DistributedDataParallel decides by this attribute whether its forward pass broadcasts buffers."""
    assert "require_forward_param_sync" in DistributedDataParallel.will_sync_module_buffers.__code__.co_names


def test_wrapper_has_the_parts_in_which_its_collectives_hide() -> None:
    """What a retry switches off or does beforehand is still there, by these names."""
    before, after = (
        DistributedDataParallel._pre_forward.__code__,
        DistributedDataParallel._post_forward.__code__,
    )
    assert {"_rebuild_buckets", "_join_config"} <= set(before.co_names)
    assert "_static_graph_delay_allreduce_enqueued" in after.co_names
    assert "parameters_to_ignore" in DistributedDataParallel.__init__.__code__.co_names


def test_layers_are_known_by_their_base() -> None:
    """Batch norms and dropouts of all dimensions share a base class each."""
    assert issubclass(nn.BatchNorm3d, nn.modules.batchnorm._BatchNorm)
    assert issubclass(nn.Dropout2d, nn.modules.dropout._DropoutNd)
