"""The public class: what is wrapped, what is forwarded, and one pass at a time."""

import functools
import weakref
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Generic, TypedDict, TypeVar, Unpack, overload

import torch
from torch.utils.data import DataLoader, Dataset

from torchfast import _holders
from torchfast._device import resolve_device
from torchfast._loader import checks, state, wrapped
from torchfast._loader.cpus import keep_threads
from torchfast._loader.epoch import Epoch, Feed, InlineFeed, to_close_at_exit, uncopyable, warn_of_open_epoch
from torchfast._loader.feed import ThreadedFeed
from torchfast._loader.finish import Into, finishing
from torchfast._loader.stats import LoaderStats, Tally

T = TypeVar("T")


class Options(TypedDict, total=False):
    """The options of `DeviceLoader` that do not decide of what type its batches are."""

    depth: int
    channels_last: bool
    normalize: tuple[Sequence[float], Sequence[float]] | None
    image_dtype: torch.dtype
    into: Any
    streams: Sequence[torch.cuda.Stream]
    across_epochs: bool
    poison: bool


OPTIONS = frozenset({"transform", *Options.__annotations__})
"""All of them, which `from_dataset` tells from those of `DataLoader`."""

_FIXED = ("device", "loader")


class DeviceLoader(Generic[T]):
    """Wrap a `DataLoader` or any iterable of batches; yield the same batches, on the device, ahead of use.

    On a CUDA device a thread loads and copies up to `depth` batches ahead on a stream of its own. A copy
    waits for the last use of the memory it goes to, and the consumer's stream waits for the copy, so no
    batch is ever overwritten or seen half-copied, however far the host runs ahead; batches that are kept
    stay intact. Device memory is `depth + 2` batches, for any number of epochs. On the CPU batches pass
    through as the loader makes them: one that it writes over is overwritten, as without a `DeviceLoader`.

    Order, length, errors, early `break`, persistent workers: as if the loader were used bare. A batch is any
    nesting of dicts, lists, tuples, dataclasses and mappings; what is no tensor passes through.

    A tensor of a batch is used on another stream under PyTorch's own rule: `tensor.record_stream(other)`
    before it is dropped, or that stream named in `streams=` once and for all. Small tensors of a batch (below
    1 MiB) share one allocation: whoever keeps one keeps that.

    Example:
        >>> import torch
        >>> from torchfast import DeviceLoader
        >>> batches = [{"image": torch.ones(2, 3, 8, 8), "name": ["a", "b"]}]
        >>> for batch in DeviceLoader(batches, device="cpu", channels_last=True):
        ...     print(batch["image"].is_contiguous(memory_format=torch.channels_last), batch["name"])
        True ['a', 'b']

    Args:
        loader: a `DataLoader`, or any iterable of batches.
        device: where the batches go; None is the current accelerator, else the CPU.
        depth: how many batches are brought to the device ahead of the one in use, at least 1.
        channels_last: whether image tensors, (N, C, H, W), are laid out channels last, on the device.
        normalize: (mean, std), one number a channel each, for images in [0, 1]: every uint8 image
            (N, C, H, W) of so many channels, and of sides no shorter than that, becomes
            (x - 255 * mean) / (255 * std), in one kernel together with `channels_last`; other tensors stay as
            they are.
        image_dtype: the type of the images that `normalize` makes.
        transform: called with each batch once it is on the device, in the caller's thread and on its current
            stream: random numbers are drawn in the order of the batches. Its result is yielded.
        into: a batch of tensors on the device into which each batch is copied, on the current stream, and
            which is yielded: the static inputs of a CUDA graph.
        streams: CUDA streams other than the current one that use batches without `record_stream`.
        across_epochs: begin to load the next pass while the last batches of this one are in use. The draws
            that shuffle it are then made earlier than bare, and in the copying thread; on a GPU only.
        poison: for debugging, fill memory with 0xFF (NaN) as soon as a batch that was in it is gone, and let
            it rest for two batches: reading it late, on a stream that was not named, then shows. Costs two
            batches of memory.

    Raises:
        TypeError: the loader cannot be iterated over, is a dataset, or yields what is surely no batch, as a
            dict or a model; `transform` cannot be called; `streams` holds what is no CUDA stream; or a switch
            is neither True nor False.
        ValueError: no such device, a depth below 1, means and stds that cannot be, `into` not on the
            device, or, from `next`, a batch that does not fit `into` or has nothing to normalise.

    What it does not do: it runs one pass at a time. A second `iter` closes the first, with a warning, and a
    bare iterator that is left early has already given up the batches that were loaded ahead. A `DataLoader`
    with `pin_memory=True` is spared pinning, which is done here.
    """

    @overload
    def __init__(
        self,
        loader: Iterable[T],
        /,
        device: torch.device | str | int | None = ...,
        *,
        transform: None = ...,
        **options: Unpack[Options],
    ) -> None: ...

    @overload
    def __init__(
        self,
        loader: Iterable[Any],
        /,
        device: torch.device | str | int | None = ...,
        *,
        transform: Callable[[Any], T],
        **options: Unpack[Options],
    ) -> None: ...

    def __init__(  # noqa: PLR0913 - options, all of them keyword-only
        self,
        loader: Iterable[Any],
        /,
        device: torch.device | str | int | None = None,
        *,
        depth: int = 2,
        channels_last: bool = False,
        normalize: tuple[Sequence[float], Sequence[float]] | None = None,
        image_dtype: torch.dtype = torch.float32,
        transform: Callable[[Any], Any] | None = None,
        into: Any = None,
        streams: Sequence[torch.cuda.Stream] = (),
        across_epochs: bool = False,
        poison: bool = False,
    ) -> None:
        checks.check(loader, transform)
        checks.check_switches(channels_last=channels_last, across_epochs=across_epochs, poison=poison)
        depth, streams = checks.depth_of(depth), checks.streams_of(streams)
        checks.check_across_epochs(loader, across_epochs=across_epochs)
        normalization = checks.normalization_of(normalize, image_dtype, channels_last=channels_last)
        keep_threads()
        self.device = resolve_device(device)
        self.loader = loader
        self._depth = depth
        self._streams = streams
        self._poison = poison
        self._across_epochs = across_epochs
        static = None if into is None else Into(into, self.device)
        self._finish = finishing(transform, normalization, static, channels_last=channels_last)
        self._shown_options = _shown(
            channels_last=channels_last,
            normalize=normalization and (normalization.mean, normalization.std),
            image_dtype=normalization and image_dtype,
            transform=None if transform is None else getattr(transform, "__name__", type(transform).__name__),
            into=None if into is None else "...",
            streams=len(self._streams),
            across_epochs=across_epochs,
            poison=poison,
        )
        self.stands_in = False
        """Whether it stands in a loader that looks ahead, which another `DeviceLoader` wraps."""
        self._inner: DeviceLoader[Any] | None = None
        if wrapped.looks_ahead(loader):
            base = wrapped.base_of(loader)
            self._inner = DeviceLoader(base, self.device, depth=depth, streams=streams, poison=poison)
            self._inner.stands_in = True
        self._transport: Any = None
        self._is_pinned_by_us = False
        self._epoch: weakref.ref[Epoch[T]] | None = None
        self._feed: Feed | None = None
        self._n_passes = 0
        self._tally = Tally()
        if state.has_state(loader):
            kind: Any = type(self)
            self.__class__ = state.with_state(kind)
        _holders.register(self)

    @classmethod
    def from_dataset(
        cls,
        dataset: Dataset[Any],
        /,
        device: torch.device | str | int | None = None,
        *,
        batch_size: int,
        num_workers: int | None = None,
        **options: Any,
    ) -> "DeviceLoader[Any]":
        """Build the `DataLoader` too, with the settings that training on a GPU wants.

        Workers stay alive between epochs, each with 4 batches ahead; their number is that of the CPUs of this
        process less one, at most 8. An `IterableDataset` gets one: several would each yield all of it, unless
        it shares itself out; then say how many. Their batches are pinned by the `DeviceLoader`'s own parallel
        copies, so `pin_memory` stays off.

        Example:
            >>> import torch
            >>> from torch.utils.data import TensorDataset
            >>> from torchfast import DeviceLoader
            >>> digits = TensorDataset(torch.arange(10))
            >>> loader = DeviceLoader.from_dataset(digits, "cpu", batch_size=4, num_workers=0)
            >>> [len(batch) for (batch,) in loader]
            [4, 4, 2]

        Args:
            dataset: what `torch.utils.data.DataLoader` takes.
            device: as for `DeviceLoader`.
            batch_size: samples in a batch.
            num_workers: worker processes; None for the rule above.
            **options: anything else that `DeviceLoader` takes, such as `channels_last=True`, or that
                `DataLoader` takes, such as `shuffle=True`.
        """
        checks.check_dataset(dataset, num_workers)
        own = {name: options.pop(name) for name in OPTIONS & options.keys()}
        n_workers = wrapped.default_workers(dataset) if num_workers is None else num_workers
        if num_workers is None and any(options.get(name) for name in wrapped.OF_WORKERS):
            n_workers = max(1, n_workers)  # on a single CPU too: who says how workers are to be wants some
        if n_workers > 0:
            options = {"persistent_workers": True, "prefetch_factor": 4, **options}
        loader: Iterable[Any] = DataLoader(dataset, batch_size=batch_size, num_workers=n_workers, **options)
        return cls(loader, device, **own)

    def __iter__(self) -> Epoch[T]:
        """Begin a pass: the loader's own iterator is made here and now, in the caller's thread."""
        other = wrapped.replace_user(self.loader, self)
        if other is not None:  # its workers are ours now
            other._close_last_pass(stacklevel=4)
            other.close()
        self._close_last_pass(stacklevel=4)
        self._n_passes += 1
        self._tally = Tally()
        if self._n_passes == 2 and not self.stands_in:
            wrapped.warn_of_lost_workers(self.loader, stacklevel=3)
        self._feed = self._open_feed()
        epoch: Epoch[T] = Epoch(self._feed, self._finish, owner=self)
        self._epoch = weakref.ref(epoch)
        return epoch

    def __len__(self) -> int:
        """Return the loader's own length; `TypeError` where it has none."""
        return len(self.loader)  # type: ignore[arg-type]  # the error of a loader without length is the right one

    def __bool__(self) -> bool:
        """Say whether there are batches; where the loader has no length there may be."""
        try:
            return len(self) > 0
        except (TypeError, NotImplementedError):  # so iterable datasets say that they have none
            return True

    def __getattr__(self, name: str) -> Any:
        """Take the attributes in `FORWARDED` from the loader."""
        if name in wrapped.FORWARDED:
            return getattr(self.__dict__.get("loader"), name)
        if name in OPTIONS:
            raise AttributeError(f"{name!r} is an option of DeviceLoader, which its repr shows.")
        raise AttributeError(
            f"DeviceLoader has no attribute {name!r}, and does not take it from the loader it wraps. "
            f"Use .loader.{name} if you mean that loader's own."
        )

    def __setattr__(self, name: str, value: object) -> None:
        if name in wrapped.FORWARDED or name in OPTIONS or (name in _FIXED and name in vars(self)):
            raise AttributeError(
                f"{name!r} of a DeviceLoader cannot be set: it was read when that was made. Build the "
                "loader, and a DeviceLoader around it, with what you want."
            )
        super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        """List what is taken from the loader, too."""
        return [*super().__dir__(), *(name for name in wrapped.FORWARDED if hasattr(self.loader, name))]

    def set_epoch(self, epoch: int) -> None:
        """Tell the epoch's number to whatever of the loader, its samplers and its dataset wants to know.

        The first of them that has a `set_epoch` is told; where none has, nothing happens, so the same script
        runs with and without a `DistributedSampler`.
        """
        part = wrapped.takes_epochs(self.loader)
        if part is not None:
            part.set_epoch(epoch)

    @property
    def stats(self) -> LoaderStats:
        """Where the time of the latest pass went so far, and what bounds it; costs nothing on the device."""
        return self._tally.stats() if self._inner is None else self._inner.stats

    def __repr__(self) -> str:
        """Tell what is wrapped, and how the latest pass went."""
        passed = f", {self.stats!r}" if self._n_passes else ""
        name, options = type(self.loader).__name__, self._shown_options
        return f"DeviceLoader({name}, device={str(self.device)!r}, depth={self._depth}{options}{passed})"

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise uncopyable(
            "DeviceLoader",
            "it has a thread, streams and batches under way. Copy or send the loader it wraps, .loader, and "
            "wrap that where it is used.",
        )

    def close(self) -> None:
        """End the pass that is open, if any: no thread, worker or batch of it is left."""
        epoch = None if self._epoch is None else self._epoch()
        self._epoch = None
        if epoch is not None:
            epoch.close()
        if self._feed is not None:  # also where its epoch is gone, and an interrupt kept that from closing it
            self._feed.close()

    def release_memory(self) -> None:
        """Give back the device memory of batches that nobody has taken yet, without losing them.

        They go back to the host, and to the device again one by one when they are taken. `oom_guard` calls
        this when memory runs out.
        """
        epoch = None if self._epoch is None else self._epoch()
        if epoch is not None:
            epoch.release_memory()
        elif (ahead := self._ahead()) is not None:
            ahead.release_memory()

    @property
    def draws_beside(self) -> bool:
        """Whether a thread of this process loads now, as without workers, and so may draw random numbers."""
        return (
            isinstance(self._feed, ThreadedFeed)
            and self._feed.is_loading
            and not getattr(self.loader, "num_workers", 0)
        )

    def _close_last_pass(self, stacklevel: int) -> None:
        epoch = None if self._epoch is None else self._epoch()
        was_under_way = epoch is not None and epoch.is_under_way
        del epoch
        if self._ahead() is None:
            self.close()
        if was_under_way:
            warn_of_open_epoch(stacklevel)

    def _ahead(self) -> ThreadedFeed | None:
        """Return the feed that is loading a pass which nobody has begun, if there is one."""
        feed = self._feed
        return feed if isinstance(feed, ThreadedFeed) and feed.is_between_passes else None

    def _open_feed(self) -> Feed:
        if (ahead := self._ahead()) is not None:
            ahead.begin_pass(self._tally)
            return ahead
        loader, snapshot = self.loader, state.snapshot_of(self.loader)
        if self._inner is not None:
            return InlineFeed(wrapped.through(loader, self._inner), self.device, self._tally, snapshot)
        if self.device.type != "cuda":
            return InlineFeed(wrapped.begun(loader), self.device, self._tally, snapshot)
        if self._transport is None:
            from torchfast._loader.transport import CudaTransport

            self._is_pinned_by_us = wrapped.is_pinned_by_us(loader)
            self._transport = CudaTransport(
                self.device,
                self._depth,
                streams=self._streams,
                borrows=not wrapped.writes_afresh(loader),
                pins=self._is_pinned_by_us,
                n_workers=getattr(loader, "num_workers", 0),
                poison=self._poison,
            )
        begin = functools.partial(wrapped.begun_for_gpu, loader, is_pinned_by_us=self._is_pinned_by_us)
        feed = ThreadedFeed(
            begin(),
            self._transport,
            self._tally,
            depth=self._depth,
            snapshot=snapshot,
            begin_again=begin if self._across_epochs else None,
            is_instant=wrapped.is_instant(loader),
        )
        if self._across_epochs:
            to_close_at_exit().add(self)
        return feed


def _shown(**options: object) -> str:
    """Return those of the options that do something, as a `repr` goes on."""
    return "".join(f", {name}={value}" for name, value in options.items() if value)
