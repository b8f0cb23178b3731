"""Two ranks at one step: whatever fails on one of them, none hangs, and both end with the same weights."""

import inspect
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from tests import oom_ranks
from torchfast import OutOfMemoryError, inject_oom, oom_guard
from torchfast._oom.ranks import _BUCKET_BYTES, _buckets, _goes_alone, _staging_for

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Return what each rank got from all the work, done by two processes with a gloo group."""
    return oom_ranks.run_ranks(tmp_path_factory.mktemp("ranks"), list(oom_ranks.WORK))


def test_reduction_is_that_of_ddp(results: Results) -> None:
    """Without faults, reducing once after the vote gives the weights that DDP's own reduction gives."""
    first, second = results
    assert oom_ranks.same(first["guarded"], second["guarded"])
    for one, other in zip(
        oom_ranks.parameters_of(first["bare"]), oom_ranks.parameters_of(first["guarded"]), strict=True
    ):
        torch.testing.assert_close(one, other)


def test_fault_on_one_rank_leaves_no_trace(results: Results) -> None:
    """With faults at random operators of one rank at a time, both end with the weights of no fault."""
    first, second = results
    assert oom_ranks.same(first["faulty"], second["faulty"])
    assert oom_ranks.same(first["faulty"], first["clean"])


@pytest.mark.parametrize("option", ["static", "views", "large"])
def test_wrappers_own_options_change_nothing(results: Results, option: str) -> None:
    """With a static graph, gradients that are views, or tensors larger than a bucket, it is the same."""
    assert all(oom_ranks.same(result[option], result["guarded"]) for result in results)


def test_wrapper_that_has_averaged_by_itself(results: Results) -> None:
    """After a step without the retry, a fault before the forward pass leaves no rank waiting inside it."""
    assert [result["bare_first"] for result in results] == [2, 2]


def test_parameters_that_the_wrapper_ignores(results: Results) -> None:
    """What DistributedDataParallel was told to leave alone stays each rank's own."""
    first, second = (result["kept_apart"] for result in results)
    assert not any(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_half_precision_does_not_overflow(results: Results) -> None:
    """Gradients are divided before they are added up, as DistributedDataParallel does."""
    assert [result["large_halves"][0].item() for result in results] == [4e4, 4e4]


def test_group_of_some_ranks(results: Results) -> None:
    """A retry concerns the ranks of its model's group and no others."""
    assert [result["alone"] for result in results] == ["done", "took no part"]


def test_a_retry_of_some_ranks_leaves_later_groups_as_they_were(results: list[dict[str, Any]]) -> None:
    """All make one after it, which the ranks that took no part must find by the same name."""
    assert [result["groups_after"] for result in results] == [2, 2]


def test_collectives_are_run_when_the_retry_is_made(results: Results) -> None:
    """Each kind is run at full size while there is memory, as NCCL allocates at the first use."""
    step, making = results[0]["warm_up"]
    assert {"all_reduce of torch.float32", "broadcast of torch.int64"} <= set(step)
    assert all(making.get(kind, 0) >= n_elements for kind, n_elements in step.items())


def test_what_cannot_be_averaged_is_refused(results: Results) -> None:
    """Uneven batches within Join and sparse gradients are refused, with the reason, on both ranks."""
    within_join = (
        "guard.retry cannot be used within Join: its forward pass asks the other ranks whether they go "
        "on, and one that ran out of memory would leave them waiting. Give all ranks as many batches."
    )
    sparse = (
        "guard.retry cannot average the sparse gradients of EmbeddingBag(sparse=True) over the ranks. "
        "Use sparse=False, or oom_guard without retry."
    )
    assert [result["refused"] for result in results] == [[within_join, sparse]] * 2


def test_communication_hook_is_said_not_to_be_called(results: Results) -> None:
    """Whoever registered one is told that gradients are averaged without it."""
    said = (
        "guard.retry averages gradients by itself, as they are: the communication hook that was registered "
        "with DistributedDataParallel is not called."
    )
    assert [result["hooked"] for result in results] == [(said, 0)] * 2


def test_ranks_go_down_together(results: Results) -> None:
    """Where one rank needs smaller parts, both take them."""
    assert [result["split"] for result in results] == [(4, 2), (4, 2)]


def test_parameter_used_on_one_rank(results: Results) -> None:
    """A gradient that only one rank has is averaged with the others' zeros."""
    assert [result["unused"][0].tolist() for result in results] == [[0.5, 0.5]] * 2


def test_bug_on_one_rank_stops_the_other(results: Results) -> None:
    """An error of another kind passes on its own rank, and the other is told instead of hanging."""
    assert results[0]["bug"].startswith("RuntimeError: another rank failed")
    assert results[1]["bug"].startswith("IndexError: Target")


def test_optimizer_without_a_copy_ends_both(results: Results) -> None:
    """A failure in one rank's optimizer that cannot be undone is an error on both."""
    assert results[0]["hopeless"].startswith("RuntimeError: another rank ran out of memory")
    assert "the optimizer had begun to change parameters" in results[1]["hopeless"]


def test_no_room_for_a_copy_on_one_rank_ends_both(results: Results) -> None:
    """A rank that has no memory to note its state says so to the other, which would wait for it."""
    assert results[0]["no_room"].startswith("RuntimeError: another rank ran out of memory")
    assert results[1]["no_room"].startswith("OutOfMemoryError: ")


class FullyShardedDataParallel(nn.Linear):
    """Has the name by which sharded modules are known."""


def test_sharded_models_are_refused() -> None:
    """Under FSDP a retry is refused with the reason; explaining errors still works."""
    model = FullyShardedDataParallel(2, 2)
    with pytest.raises(ValueError, match="FullyShardedDataParallel: its forward pass is made of collectives"):
        oom_guard().retry(model=model)
    with pytest.raises(OutOfMemoryError), oom_guard(), inject_oom():
        model(torch.zeros(1, 2))


def test_ranks_wait_as_long_as_nccl_does() -> None:
    """While rank 0 saves a checkpoint or evaluates, the others are not to give up earlier than bare."""
    default_s = inspect.signature(oom_guard().retry).parameters["timeout_s"].default
    assert default_s == 600  # torch.distributed.constants.default_pg_nccl_timeout, None in a CPU build


class ZeroRedundancyOptimizer(torch.optim.SGD):
    """Has the name by which a sharded optimizer is known."""


def test_sharded_optimizers_are_refused() -> None:
    """Where the optimizer's step is made of collectives, a retry is refused with the reason."""
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="ZeroRedundancyOptimizer: its step waits for the other ranks"):
        oom_guard().retry(model=model, optimizer=ZeroRedundancyOptimizer(model.parameters()))


@example([(5 * 2**20, True, True), (2 * 2**20, False, True), (2**20, True, True)])  # 20, 8 and 4 MiB
@given(st.lists(st.tuples(st.integers(1, 8 * 2**20), st.booleans(), st.booleans()), max_size=12))
def test_reduction_has_room_whichever_parameters_have_gradients(
    parameters: list[tuple[int, bool, bool]],
) -> None:
    """What is set aside is enough for any of the parameters, and more than a bucket only for odd layouts."""
    tensors = [
        torch.empty(2, n, device="meta") if is_usual else torch.empty(n, 2, device="meta").t()
        for n, _, is_usual in parameters
    ]
    with_gradients = [tensor for tensor, (_, has, _) in zip(tensors, parameters, strict=True) if has]
    odd = [tensor.nbytes for tensor in tensors if not tensor.is_contiguous()]
    staging = _staging_for(tensors)
    for bucket in _buckets(with_gradients):
        if _goes_alone(bucket[0]):
            assert len(bucket) == 1
            continue
        room = staging[bucket[0].dtype, bucket[0].device]
        assert sum(tensor.numel() for tensor in bucket) <= room.numel()
        assert room.nbytes <= max(_BUCKET_BYTES, *odd, 0)
