"""Several ranks at one step: they agree on what happened before any of them goes on.

A rank that runs out of memory in the backward pass leaves the others waiting in a collective for ever. So
attempts run without gradient synchronisation; afterwards the ranks vote through a gloo group on the CPU,
with a timeout (NCCL needs device memory for itself), and only then reduce the gradients, once.
"""

import datetime as dt
import enum
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import distributed_c10d
from torch.nn.parallel import DistributedDataParallel

from torchfast._oom.transaction import copy_all

Place = tuple[torch.dtype, torch.device]
_BUCKET_BYTES = 25 * 2**20


class Outcome(enum.IntEnum):
    """How an attempt ended, the worst last: the ranks agree on the worst of theirs."""

    DONE = 0
    AGAIN = 1  # out of memory, and the step can be tried again
    GIVE_UP = 2  # out of memory, and it cannot
    ERROR = 3  # another exception


class Vote(enum.IntEnum):
    """What the ranks tell each other, beside the parameters that have gradients."""

    OUTCOME = 0
    CANNOT_ROLL_BACK = 1
    THRASHES = 2


class PeerRanOutOfMemoryError(Exception):
    """Ends the attempt on a rank that got through, because another did not."""


class Ranks:
    """One process by itself: it agrees with itself."""

    is_distributed = False

    def begin(self) -> None:
        """Begin an attempt."""

    def end(self) -> None:
        """End an attempt."""

    def reduce(self) -> None:
        """Agree that all parts got through, and reduce the gradients."""

    def agree(self, outcome: Outcome, *, can_roll_back: bool, thrashes: bool) -> tuple[Outcome, bool]:
        """Return the outcome for all ranks, and whether any of them thrashes."""
        if outcome == Outcome.AGAIN and not can_roll_back:
            outcome = Outcome.GIVE_UP
        return outcome, thrashes


class DDPRanks(Ranks):
    """The ranks of a `DistributedDataParallel` model. Making one is a collective: every rank must."""

    is_distributed = True

    def __init__(self, model: DistributedDataParallel, timeout_s: float) -> None:
        self._model = model
        self._timeout_s = timeout_s
        self._voters = _voters(model.process_group, timeout_s)
        self._parameters = [
            p for name, p in model.module.named_parameters() if p.requires_grad and self._is_shared(name)
        ]
        self._staging = _staging_for([*self._parameters, *self._buffers()])
        self._stack = ExitStack()
        self._agreed: tuple[Outcome, bool] | None = None
        self._is_reduced = False
        self._warm_up()

    def begin(self) -> None:
        """Switch the collectives of forward and backward off."""
        self._agreed, self._is_reduced = None, False
        self._stack.enter_context(without_collectives(self._model))

    def end(self) -> None:
        """Switch them on again."""
        self._stack.close()

    @torch.no_grad()
    def reduce(self) -> None:
        """Agree that all ranks got through, then average the gradients and take rank 0's buffers."""
        for parameter in self._parameters:
            gradient = parameter.grad
            if gradient is not None and _goes_alone(parameter) and not _goes_alone(gradient):
                parameter.grad = gradient.contiguous()  # there is no staging for it
        has, lacks = self._vote_on_gradients()
        mixed = [p for p, some, not_all in zip(self._parameters, has, lacks, strict=True) if some and not_all]
        if mixed:
            for parameter in mixed:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self._vote_on_gradients()  # that took memory: nobody goes on before all have it
        self._is_reduced = True
        group = self._model.process_group
        n_ranks = dist.get_world_size(group)
        gradients = [p.grad for p, some in zip(self._parameters, has, strict=True) if some]
        for flat in self._staged([g for g in gradients if g is not None]):
            dist.all_reduce(flat.div_(n_ranks), group=group)  # in this order float16 does not overflow
        if self._model.broadcast_buffers:
            source = dist.get_process_group_ranks(group)[0]
            for flat in self._staged(self._buffers()):
                dist.broadcast(flat, source, group=group)

    def agree(self, outcome: Outcome, *, can_roll_back: bool, thrashes: bool) -> tuple[Outcome, bool]:
        """Return the outcome for all ranks: what was decided at the reduction, else what is voted now."""
        if self._agreed is not None:
            return self._agreed
        none = [False] * len(self._parameters)
        if outcome == Outcome.DONE and not self._is_reduced:
            self._vote(Outcome.ERROR, can_roll_back=True, thrashes=False, has_gradient=none)
            raise RuntimeError(
                "an attempt ended before the loop over its parts did, so the gradients were never "
                "averaged over the ranks. Loop over the attempt to its end before optimizer.step()."
            )
        return _decided(
            self._vote(outcome, can_roll_back=can_roll_back, thrashes=thrashes, has_gradient=none)
        )

    def _vote_on_gradients(self) -> tuple[list[int], list[int]]:
        """Return which parameters have a gradient on some rank, and which lack one on some."""
        has = [p.grad is not None for p in self._parameters]
        votes = self._vote(Outcome.DONE, can_roll_back=True, thrashes=False, has_gradient=has)
        if votes[Vote.OUTCOME] != Outcome.DONE:
            self._agreed = _decided(votes)
            raise PeerRanOutOfMemoryError
        n_parameters = len(self._parameters)
        masks = votes[len(Vote) :]
        return masks[:n_parameters], masks[n_parameters:]

    def _staged(self, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Yield the tensors flattened, some at a time, and write what has become of that back into them."""
        for bucket in _buckets(tensors):
            if _goes_alone(bucket[0]):
                yield bucket[0].view(-1)
                continue
            staging = self._staging[bucket[0].dtype, bucket[0].device]
            flat = staging[: sum(t.numel() for t in bucket)]
            pieces = flat.split([t.numel() for t in bucket])
            views = [piece.view(t.shape) for piece, t in zip(pieces, bucket, strict=True)]
            copy_all(views, bucket)
            yield flat
            copy_all(bucket, views)

    def _buffers(self) -> list[torch.Tensor]:
        return [buffer for name, buffer in self._model.module.named_buffers() if self._is_shared(name)]

    def _is_shared(self, name: str) -> bool:
        return name not in getattr(self._model, "parameters_to_ignore", ())

    def _warm_up(self) -> None:
        """Run what will be run while memory is short: NCCL may allocate when it first connects a way.

        It chooses among its ways by size.
        """
        group = self._model.process_group
        source = dist.get_process_group_ranks(group)[0]
        for staging in self._staging.values():
            flat = staging.zero_()
            while len(flat):
                dist.all_reduce(flat, group=group)
                dist.broadcast(flat, source, group=group)
                flat = flat[: len(flat) // 16]

    def _vote(
        self, outcome: Outcome, *, can_roll_back: bool, thrashes: bool, has_gradient: list[bool]
    ) -> list[int]:
        lacks = [not has for has in has_gradient]
        votes = torch.tensor([outcome, not can_roll_back, thrashes, *has_gradient, *lacks], dtype=torch.int32)
        try:
            self._voters.allreduce([votes], dist.ReduceOp.MAX).wait()
        except RuntimeError as error:
            raise RuntimeError(
                "the ranks could not agree on a step: one has ended, or did not take part in this attempt "
                f"within {self._timeout_s:g} s. Every rank must go through retry.attempts(...) the same "
                "number of times; a longer timeout_s= helps where ranks are merely slow."
            ) from error
        numbers: list[int] = votes.tolist()
        return numbers


def _voters(group: dist.ProcessGroup, timeout_s: float) -> Any:
    """Let the ranks of a group vote on the CPU, by what only they know of.

    Not by `new_group`: all ranks of the run would have to make it. With `use_local_synchronization=True` they
    need not; but since PyTorch 2.14 those that do not then name each later group otherwise, and all hang.
    """
    store = group.get_group_store()
    n_made = store.add(f"torchfast.retry/{group.rank()}", 1)  # as many on each of them
    own = distributed_c10d.PrefixStore(f"torchfast.retry/{n_made}", store)
    return dist.ProcessGroupGloo(own, group.rank(), group.size(), dt.timedelta(seconds=timeout_s))


@contextmanager
def without_collectives(model: DistributedDataParallel) -> Iterator[None]:
    """Switch off the collectives that the wrapper hides in its forward and backward pass."""
    if model._join_config.enable:
        raise RuntimeError(
            "guard.retry cannot be used within Join: its forward pass asks the other ranks whether they go "
            "on, and one that ran out of memory would leave them waiting. Give all ranks as many batches."
        )
    # After the first step that the wrapper itself has averaged, its next forward pass sorts the buckets
    # anew, together with the other ranks. If that fails here, it does so in the block as well.
    with suppress(RuntimeError):
        model.reducer._rebuild_buckets()
    is_enqueued = getattr(model, "_static_graph_delay_allreduce_enqueued", None)
    with model.no_sync():
        model.require_forward_param_sync = False  # buffers are broadcast with the gradients instead
        if is_enqueued is not None:
            model._static_graph_delay_allreduce_enqueued = True
        try:
            yield
        finally:
            if is_enqueued is not None:
                model._static_graph_delay_allreduce_enqueued = is_enqueued


def ranks_of(
    modules: Sequence[nn.Module], optimizers: Sequence[torch.optim.Optimizer], timeout_s: float
) -> Ranks:
    """Return how the ranks of these modules agree, or refuse with the reason."""
    everything = [m for root in modules for m in root.modules()]
    wrappers = [m for m in everything if isinstance(m, DistributedDataParallel)]
    _refuse_sharded(everything)
    _refuse_shared_steps(optimizers)
    if not wrappers:
        return Ranks()
    if any(isinstance(m, nn.SyncBatchNorm) for m in everything):
        raise ValueError(
            "guard.retry cannot be used with SyncBatchNorm: its forward pass waits for all ranks, "
            "and one that ran out "
            "of memory would leave the others waiting for ever. Use BatchNorm or GroupNorm, or "
            "oom_guard without retry."
        )
    if len(wrappers) > 1:
        raise ValueError(
            f"guard.retry was given {len(wrappers)} DistributedDataParallel models; it reduces the "
            "gradients of one. Wrap what is trained together in one module."
        )
    _refuse_sparse(everything)
    if getattr(wrappers[0], "_comm_hooks", ()):
        warnings.warn(
            "guard.retry averages gradients by itself, as they are: the communication hook that was "
            "registered with DistributedDataParallel is not called.",
            stacklevel=3,
        )
    return DDPRanks(wrappers[0], timeout_s)


def _refuse_sharded(modules: Sequence[nn.Module]) -> None:
    names = _names_of(modules)
    parameters = {type(p).__name__ for module in modules for p in module.parameters(recurse=False)}
    wrappers = {"FullyShardedDataParallel", "FSDPModule", "DeepSpeedEngine", "ShardedDataParallel"}
    found = sorted(names & wrappers) + sorted(parameters & {"DTensor"})
    if found:
        raise ValueError(
            f"guard.retry cannot be used with {found[0]}: its forward pass is made of collectives, and a "
            "rank that ran "
            "out of memory would leave the others waiting for ever. Use oom_guard without retry: it "
            "explains the error and names a batch size to restart with."
        )


def _refuse_shared_steps(optimizers: Sequence[torch.optim.Optimizer]) -> None:
    found = sorted(_names_of(optimizers) & {"ZeroRedundancyOptimizer", "PostLocalSGDOptimizer"})
    if found:
        raise ValueError(
            f"guard.retry cannot be used with {found[0]}: its step waits for the other ranks, and one that "
            "ran out of memory would leave them waiting for ever. Use another optimizer, or oom_guard "
            "without retry."
        )


def _names_of(things: Sequence[object]) -> set[str]:
    return {kind.__name__ for thing in things for kind in type(thing).__mro__}


def _refuse_sparse(modules: Sequence[nn.Module]) -> None:
    found = [m for m in modules if isinstance(m, (nn.Embedding, nn.EmbeddingBag)) and m.sparse]
    if found:
        raise ValueError(
            f"guard.retry cannot average the sparse gradients of {type(found[0]).__name__}(sparse=True) over "
            "the ranks. Use sparse=False, or oom_guard without retry."
        )


def _decided(votes: list[int]) -> tuple[Outcome, bool]:
    outcome = Outcome(votes[Vote.OUTCOME])
    if outcome == Outcome.AGAIN and votes[Vote.CANNOT_ROLL_BACK]:
        outcome = Outcome.GIVE_UP
    return outcome, bool(votes[Vote.THRASHES])


def _goes_alone(tensor: torch.Tensor) -> bool:
    """Say whether it is sent from where it lies: it fills a bucket, and is in the usual order."""
    return tensor.nbytes > _BUCKET_BYTES and tensor.is_contiguous()


def _buckets(tensors: Sequence[torch.Tensor]) -> list[list[torch.Tensor]]:
    """Return the tensors in groups of one type, of at most 25 MiB unless a single one is larger."""
    buckets: list[list[torch.Tensor]] = []
    room: dict[Place, tuple[list[torch.Tensor], int]] = {}
    for tensor in tensors:
        key = tensor.dtype, tensor.device
        bucket, n_bytes = room.get(key, ([], _BUCKET_BYTES))
        if not bucket or n_bytes + tensor.nbytes > _BUCKET_BYTES:
            bucket, n_bytes = [], 0
            buckets.append(bucket)
        bucket.append(tensor)
        room[key] = bucket, n_bytes + tensor.nbytes
    return buckets


def _staging_for(tensors: Sequence[torch.Tensor]) -> dict[Place, torch.Tensor]:
    """Allocate, while there is memory, what reducing will need: afterwards it must not fail on one rank."""
    all_bytes, largest = Counter[Place](), dict[Place, int]()
    for tensor in tensors:
        if _goes_alone(tensor):
            continue
        key = tensor.dtype, tensor.device
        all_bytes[key] += tensor.nbytes
        largest[key] = max(largest.get(key, _BUCKET_BYTES), tensor.nbytes)
    return {
        # Which tensors share a bucket depends on which parameters have gradients: any bucket must fit.
        (dtype, device): torch.empty(
            min(all_bytes[dtype, device], n_bytes) // dtype.itemsize, dtype=dtype, device=device
        )
        for (dtype, device), n_bytes in largest.items()
    }
