"""How a batch gets to a CUDA device, and when the memory it lies in is free again.

Three rules keep every batch whole, whatever the host and the GPU are doing:

1. Memory is allocated *on the consumer's stream*, in the consumer's thread, and an event (the gate) is
   recorded there at once. Whatever used that memory before was enqueued earlier, so the copy stream, which
   waits for the gate, cannot overwrite anything that is still to be read.
2. The copy records an event, and the consumer's stream waits for it before the batch is handed out.
3. A batch belongs to whoever holds it, like any tensor of that stream: memory is reused when the last
   reference is gone, by the caching allocator and by its rules, `record_stream` included.

So the caching allocator is the ring of slots: it has `depth + 2` of them in steady state, and it alone
decides when one is free. A ring of our own would need to guess that from use counts, and could neither see
`record_stream` nor lend an idle slot to the model.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from torchfast._loader.late import copied, moved, record_use
from torchfast._loader.staging import (
    CHUNK_BYTES,
    PinnedRing,
    Plan,
    Plans,
    bytes_of,
    is_dense,
    is_plain,
    team_size,
    tensor_on,
    tensors_of,
)
from torchfast._loader.stats import Moment, Span, Tally
from torchfast._tree import flatten


class Blank(NamedTuple):
    """Device memory for a batch to come, free as soon as the gate is passed."""

    buffers: list[torch.Tensor]
    stream: torch.cuda.Stream
    gate: torch.cuda.Event


class Parcel:
    """One batch on its way: on the device, or with leaves that move by themselves when it is handed out."""

    __slots__ = ("batch", "blank", "has_late", "ready", "spans")

    def __init__(
        self, batch: Any, blank: Blank | None, ready: list[torch.cuda.Event], *, has_late: bool
    ) -> None:
        self.batch = batch
        self.blank = blank
        self.ready = ready
        self.has_late = has_late
        self.spans: list[Span] = []


class CudaTransport:
    """Copies batches to one CUDA device on one stream of its own."""

    def __init__(  # noqa: PLR0913 - what the loader was told, all of it by name
        self,
        device: torch.device,
        depth: int,
        *,
        streams: Sequence[torch.cuda.Stream],
        borrows: bool,
        n_workers: int,
        poison: bool,
    ) -> None:
        self._device = device
        self._poison = poison
        self._resting: deque[Blank] = deque()
        self._team_size = team_size(n_workers)
        self._streams = tuple(streams)
        self._borrows = borrows
        self._copy_stream = torch.cuda.Stream(device)
        self._consumer = self._loading = torch.cuda.current_stream(device)
        self._owners: dict[int, torch.cuda.Stream] = {}
        self._asked = torch.cuda.Event(enable_timing=True)
        self._tally = Tally()
        self._recent: deque[tuple[int, ...]] = deque(maxlen=8)
        self._expected_bytes: tuple[int, ...] = ()
        self._plans = Plans()
        self._spans: list[Span] = []
        self._ring = PinnedRing(max(8, depth + 2))
        self._borrowed: torch.cuda.Event | None = None

    # In the consumer's thread.

    def begin(self, tally: Tally) -> None:
        """Begin a pass, which `tally` counts."""
        self._tally = tally
        self.follow()

    def follow(self) -> None:
        """Take the calling thread's current stream as the one that consumes the batches."""
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "a DeviceLoader was asked for a batch while a CUDA graph was being captured: the graph would "
                "read that batch's memory at each replay. Take batches outside, into the tensors that the "
                "graph reads: DeviceLoader(..., into=static_batch)."
            )
        # Building a Stream object takes longer than asking whether there is need to.
        if torch.accelerator.current_stream(self._device).stream_id != self._consumer.stream_id:
            self._consumer = torch.cuda.current_stream(self._device)

    def blank(self) -> Blank | None:
        """Allocate memory for a batch like the recent ones; None where there is no telling, or no room."""
        try:
            blank = self._allocate(self._expected_bytes, self._consumer)
        except torch.OutOfMemoryError:
            # Not the step's business: the batch will ask for its memory itself, and fail for itself.
            blank = self._allocate((), self._consumer)
        self._asked = blank.gate
        if self._poison:
            return self._rested(blank)
        return blank if blank.buffers else None

    def _rested(self, blank: Blank) -> Blank | None:
        """Poison memory once its last use is over, and return what was poisoned two batches ago."""
        self._copy_stream.wait_event(blank.gate)
        with torch.cuda.stream(self._copy_stream):
            for buffer in blank.buffers:
                buffer.fill_(0xFF)
        self._resting.append(blank._replace(gate=_record(self._copy_stream)))
        rested = self._resting.popleft() if len(self._resting) > 2 else None
        if rested is None or not rested.buffers:
            return None
        # A batch that does not fit drops it unused: nobody must then be given memory still to be poisoned.
        rested.stream.wait_event(rested.gate)
        return rested

    def deliver(self, parcel: Parcel) -> Any:
        """Return the batch; the current stream has then waited for its copy."""
        stream = self._consumer
        for event in parcel.ready:
            stream.wait_event(event)
        if parcel.blank is not None:
            others = self._streams if parcel.blank.stream == stream else (stream, *self._streams)
            for buffer in parcel.blank.buffers if others else ():
                for other in others:
                    buffer.record_stream(other)
        batch = self._with_late_leaves(parcel.batch) if parcel.has_late else parcel.batch
        there = _record(stream)
        n_bytes = sum(buffer.nbytes for buffer in parcel.blank.buffers) if parcel.blank else 0
        self._tally.note(Moment(self._asked, there, parcel.spans, n_bytes))
        return batch

    def _with_late_leaves(self, batch: Any) -> Any:
        """Move what moves by itself. What the loader itself put on the device, it allocated in the thread."""
        users = [self._consumer] * (self._consumer != self._loading) + [*self._streams]

        def there(leaf: Any) -> Any:
            leaf = moved(leaf, self._device)
            for stream in users:
                record_use(leaf, stream)
            return leaf

        return _map_leaves(there, batch)

    def evict(self, parcel: Parcel) -> None:
        """Bring a batch that nobody has seen yet back to the host, and free its device memory."""
        if parcel.blank is None:
            return
        for event in parcel.ready:
            event.synchronize()
        ours = {buffer.untyped_storage().data_ptr() for buffer in parcel.blank.buffers}

        def to_host(leaf: Any) -> Any:
            is_ours = type(leaf) is torch.Tensor and leaf.untyped_storage().data_ptr() in ours
            return leaf.cpu() if is_ours else leaf

        parcel.batch = _map_leaves(to_host, parcel.batch)
        parcel.blank, parcel.spans, parcel.ready, parcel.has_late = None, [], [], True

    # In the copying thread.

    def enter_thread(self) -> None:
        """Make the thread work for the device and the stream of the consumer: both belong to a thread."""
        torch.cuda.set_device(self._device)
        self._loading = self._consumer
        torch.cuda.set_stream(self._loading)
        torch.set_num_threads(min(torch.get_num_threads(), self._team_size))

    def settle(self) -> None:
        """Wait until the loader's own memory has been read: its next batch may go to the same place."""
        self._tally.read()
        if self._borrowed is not None:
            self._borrowed.synchronize()
            self._borrowed = None

    def send(self, batch: Any, blank: Blank | None) -> Parcel:
        """Start the copies of one batch, into `blank` if it fits."""
        began_s, waited_s = time.perf_counter(), self._ring.waited_s
        parcel = self._send(batch, blank)
        self._tally.stage_s += time.perf_counter() - began_s - (self._ring.waited_s - waited_s)
        return parcel

    def _send(self, batch: Any, blank: Blank | None) -> Parcel:
        leaves, structure = flatten(batch)
        plan = self._plans.plan(leaves)
        ready = []
        if plan.n_late:
            if self._borrows:
                # They move when they are asked for; by then the loader may have written its next batch there.
                leaves = [leaf if is_plain(leaf) else copied(leaf) for leaf in leaves]
                batch = structure.rebuild(leaves)
            # What the loader itself put on the device, it enqueued on this thread's current stream.
            ready.append(torch.cuda.current_stream(self._device).record_event())
        if not plan.sizes_bytes:
            return Parcel(batch, None, ready, has_late=plan.n_late > 0)
        try:
            blank = self._fitting(blank, plan)
        except torch.OutOfMemoryError:
            # The loader may write its next batch into the same host memory: keep a copy.
            return Parcel(_map_leaves(copied, batch), None, ready, has_late=True)
        try:
            spans = self._copy(leaves, plan, blank)
            parcel = Parcel(structure.rebuild(leaves), blank, ready, has_late=plan.n_late > 0)
        except BaseException:
            self.fence()
            raise
        ready.append(spans[-1][1])  # one stream: the last copy ends last
        parcel.spans = spans
        return parcel

    def _copy(self, leaves: list[Any], plan: Plan, blank: Blank) -> list[Span]:
        """Replace the plain leaves by their copies, and return the spans in which these are made."""
        self._copy_stream.wait_event(blank.gate)
        self._spans = spans = list[Span]()
        with torch.cuda.stream(self._copy_stream):
            buffers = iter(blank.buffers)
            if plan.small:
                self._copy_small(leaves, plan, next(buffers))
            for index, buffer in zip(plan.large, buffers, strict=True):
                leaves[index] = self._copy_large(leaves[index], buffer)
        return spans

    def _copy_small(self, leaves: list[Any], plan: Plan, buffer: torch.Tensor) -> None:
        originals = [leaves[index] for index in plan.small]
        copies = [tensor for run in plan.runs for tensor in tensors_of(run, buffer)]
        # One leaf of a run speaks for all: a pageable one among them is slow to enqueue, not wrong.
        goes_straight = bool(plan.middling) and all(
            leaves[run.indexes[0]].is_pinned() for run in plan.middling
        )
        n_staged = plan.n_tiny if goes_straight else len(originals)
        if n_staged:
            n_bytes = plan.tiny_bytes if goes_straight else plan.sizes_bytes[0]
            staged = self._ring.take(plan.sizes_bytes[0])
            torch._foreach_copy_(staged.packed(plan)[:n_staged], originals[:n_staged])
            self._enqueue([buffer[:n_bytes]], [staged.memory[:n_bytes]])
            self._ring.being_read(self._copy_stream)
        if goes_straight:
            self._enqueue(copies[n_staged:], originals[n_staged:])
            self._borrow()
        for index, copy in zip(plan.small, copies, strict=True):
            leaves[index] = copy

    def _copy_large(self, leaf: torch.Tensor, buffer: torch.Tensor) -> torch.Tensor:
        dense = leaf if is_dense(leaf.shape, leaf.stride()) else leaf.contiguous()
        target = tensor_on(buffer, dense)
        if dense.is_pinned():
            self._enqueue([target], [dense])
            self._borrow()
            return target
        pairs = zip(bytes_of(dense).split(CHUNK_BYTES), bytes_of(target).split(CHUNK_BYTES), strict=True)
        for source, destination in pairs:
            staged = self._ring.take(source.nbytes).memory[: source.nbytes]
            staged.copy_(source)
            self._enqueue([destination], [staged])
            self._ring.being_read(self._copy_stream)
        return target

    def _enqueue(self, targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
        """Enqueue copies on the current stream, which is the copy stream, between two events."""
        began = _record(self._copy_stream)
        if len(targets) == 1:
            targets[0].copy_(sources[0], non_blocking=True)
        else:
            torch._foreach_copy_(targets, sources, non_blocking=True)
        self._spans.append((began, _record(self._copy_stream)))

    def _borrow(self) -> None:
        """Note that what was enqueued so far reads the loader's own memory."""
        if self._borrows:
            self._borrowed = self._borrowed or torch.cuda.Event(blocking=True)
            self._borrowed.record(self._copy_stream)

    def _fitting(self, blank: Blank | None, plan: Plan) -> Blank:
        # Expect, buffer by buffer, the largest of the recent batches that are built like this one.
        self._recent.append(plan.sizes_bytes)
        alike = [sizes for sizes in self._recent if len(sizes) == len(plan.sizes_bytes)]
        self._expected_bytes = tuple(map(max, zip(*alike, strict=True)))
        if blank is not None and len(blank.buffers) == len(plan.sizes_bytes):
            pairs = zip(blank.buffers, plan.sizes_bytes, strict=True)
            if all(buffer.nbytes >= n_bytes for buffer, n_bytes in pairs):
                return blank
        consumer = self._consumer
        with torch.cuda.stream(consumer):
            return self._allocate(plan.sizes_bytes, consumer)

    # In either.

    def fence(self) -> None:
        """Let the streams that own memory wait for all copies so far: then memory may be let go unseen.

        What was handed out has been waited for. Anything else that is dropped while its copy is under way
        would give the allocator memory that is still to be written.
        """
        for stream in list(self._owners.values()):
            stream.wait_stream(self._copy_stream)

    def _allocate(self, sizes_bytes: tuple[int, ...], stream: torch.cuda.Stream) -> Blank:
        """Allocate on `stream`, which is current, and set the gate there."""
        # Tensors made in inference mode could never be saved for a backward.
        with torch.inference_mode(mode=False) if torch.is_inference_mode_enabled() else nullcontext():
            buffers = [_empty(n, self._device) for n in sizes_bytes]
        self._owners[stream.stream_id] = stream
        return Blank(buffers, stream, _record(stream))


def _record(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)
    event.record(stream)
    return event


def _empty(n_bytes: int, device: torch.device) -> torch.Tensor:
    if not torch.are_deterministic_algorithms_enabled():
        return torch.empty(n_bytes, dtype=torch.uint8, device=device)
    # torch.empty would fill it: a kernel for memory that the copy fills anyway.
    storage = torch.UntypedStorage(n_bytes, device=device)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(storage)


def _map_leaves(change: Callable[[Any], Any], batch: Any) -> Any:
    leaves, structure = flatten(batch)
    return structure.rebuild([change(leaf) for leaf in leaves])
